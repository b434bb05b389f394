"""Write the README's tables from the records: policies, defaults, kernels, end_to_end.

python benchmarks/readme_table.py
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
COMMENT = "<!-- {}: python benchmarks/readme_table.py -->\n", "<!-- end of {} -->\n"


def rows() -> list[dict]:
    """The default and every policy at a budget of 256 tokens."""
    found = []
    for name in ("defaults.jsonl", "policies.jsonl"):
        for line in (HERE / name).read_text().splitlines():
            row = json.loads(line)
            config = row["config"]
            is_default = (config["top_k"], config["threshold"], config["attention_window"]) == (32, 3e-5, 256)
            is_shown = is_default if name == "defaults.jsonl" else config["top_k"] == 256
            if is_shown:
                found.append({**row, "label": "**the default**" if is_default else f"{config['policy']}, 256 tokens"})
    return found


def table() -> str:
    """The rows as Markdown, contexts side by side."""
    contexts = sorted({row["context"] for row in rows()})
    head = " | ".join(f"{name} at {context}" for context in contexts for name in ("bytes", "KL", "top-1", "perplexity"))
    lines = [f"| | {head} |", "|---" * (1 + 4 * len(contexts)) + "|"]
    for label in dict.fromkeys(row["label"] for row in rows()):
        cells = []
        for context in contexts:
            row = next(row for row in rows() if (row["label"], row["context"]) == (label, context))
            cells += [f"{row['share_read']:.1%}", f"{row['kl']:.4f}", f"{row['top1']:.3f}", f"{row['ppl_change']:+.2%}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def token_table() -> str:
    """Milliseconds a token of the newest end-to-end record, as Markdown."""
    record = json.loads((HERE / "end_to_end.jsonl").read_text().splitlines()[-1])
    lines = ["| | ms a token | sparse takes |", "|---|---|---|"]
    for name, milliseconds in record["milliseconds"].items():
        lines.append(f"| {name} | {milliseconds:.0f} | {record['sparse_over'][name]:.2f} of it |")
    read = f"Sparse read {record['share_read']:.0%} of the bytes; {record['agreeing']} of {record['tokens']} tokens are"
    return "\n".join(lines) + f"\n\n{read} those of dense.\n"


def step_table() -> str:
    """One layer's step on two threads, from kernels.jsonl, as Markdown."""
    cells = [json.loads(line) for line in (HERE / "kernels.jsonl").read_text().splitlines()]
    shown = [cell for cell in cells if cell["threads"] == 2 and cell["tokens"] > 2048]
    lines = [
        "| query / KV heads, channels | context | sparse, us | PyTorch's SDPA | PyTorch's best | our dense kernel |",
        "|---|---|---|---|---|---|",
    ]
    shapes = {"S": "9 / 3, 64", "L": "32 / 8, 128"}
    for cell in sorted(shown, key=lambda cell: (cell["shape"] != "S", cell["tokens"])):
        names = ("sdpa_over_sparse", "best_torch_over_sparse", "dense_over_sparse")
        times = " | ".join(f"{cell[name]:.1f}x" for name in names)
        sparse = cell["microseconds"]["sparse"]
        lines.append(f"| {shapes[cell['shape']]} | {cell['tokens']:,} | {sparse:.0f} | {times} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The README with its tables made anew."""
    for name, made in (("table", table()), ("token table", token_table()), ("step table", step_table())):
        begin, end = (mark.format(name) for mark in COMMENT)
        before, rest = text.split(begin)
        text = before + begin + made + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
