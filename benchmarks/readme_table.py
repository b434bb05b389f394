"""Write the README's table from policies.jsonl and defaults.jsonl.

python benchmarks/readme_table.py
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARKS = "<!-- table: python benchmarks/readme_table.py -->\n", "<!-- end of table -->\n"


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


def with_table(text: str) -> str:
    """The README with its table made anew."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
