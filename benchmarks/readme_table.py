"""Write the README's tables from the records: models/*.jsonl and small_device.jsonl (bench and eval), kernels.jsonl,
small_quality.jsonl, small_growth.jsonl and gpu_predicted.jsonl.

python benchmarks/readme_table.py
"""

import json
import statistics
from pathlib import Path

from sparse_attention_decoder.measure.record import label, read

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
COMMENT = "<!-- {}: python benchmarks/readme_table.py -->\n", "<!-- end of {} -->\n"
SMOL, QWEN = "SmolLM2-135M-Instruct.Q4_1", "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M"
NAMES = {SMOL: "SmolLM2-135M", QWEN: "Qwen2.5-Coder-0.5B"}
DEFAULT = "sketch, the default"
SHOWN = (
    DEFAULT, "sketch, 256", "oracle, 256", "quest, 256", "quest, 1024", "window, 512",
    "snapkv, 256 (evicts)", "h2o, 256 (evicts)",
)  # fmt: skip


def rows(kind: str, model: str) -> list[dict]:
    """The records of one kind and model."""
    found = read(sorted((HERE / "models").glob("*.jsonl")))
    return [row for row in found if row["kind"] == kind and row["cell"]["model"] == model]


def bold(name: str) -> str:
    """The default stands out."""
    return f"**{name}**" if name == DEFAULT else name


def agreement_table() -> str:
    """Bytes and agreement of the policies, the longest common contexts of both models side by side."""
    contexts = [(SMOL, 7000), (QWEN, 16000)]
    heads = [f"{NAMES[model]} at {context:,}: bytes | KL | top-1 | perplexity" for model, context in contexts]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + 4 * len(contexts)) + "|"]
    for name in SHOWN:
        cells = []
        for model, context in contexts:
            here = [r["result"] for r in rows("agreement", model)
                    if r["cell"]["context"] == context and label(r["cell"]) == name]  # fmt: skip
            for row in here[:1]:
                cells += [f"{row['share_read']:.1%}", f"{row['kl']:.4f}", f"{row['top1']:.3f}",
                          f"{row['ppl_change']:+.2%}"]  # fmt: skip
            cells += [] if here else ["-"] * 4
        lines.append(f"| {bold(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def retrieval_table() -> str:
    """Mean score over the samples of tasks that dense can do, and the bytes read."""
    scores: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for model in (SMOL, QWEN):
        for row in rows("retrieval", model):
            cell = row["cell"]
            key = f"{NAMES[model]}, {cell['task']}", f"{cell['length']:,}"
            scores.setdefault(key, {}).setdefault(label(cell), []).append(row["result"])
    sides = ["dense, our kernel", *(name for name in SHOWN if any(name in found for found in scores.values()))]
    lines = [f"| | tokens | samples | {' | '.join(bold(side) for side in sides)} |", "|---" * (3 + len(sides)) + "|"]
    for (task, length), found in sorted(
        scores.items(), key=lambda item: (item[0][0], int(item[0][1].replace(",", "")))
    ):
        dense = found["dense, our kernel"]
        if len(found) == 1 or statistics.fmean(result["score"] for result in dense) < 0.2:
            continue
        means = [f"{statistics.fmean(r['score'] for r in found[side]):.0%}" if side in found else "-" for side in sides]
        lines.append(f"| {task} | {length} | {len(dense)} | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def token_table() -> str:
    """Time per token, time to the first, memory, bytes and agreement, per model and context."""
    lines = [
        "| tokens | | ms a token | of transformers | of the ceiling | first token, s | peak MB | KV bytes "
        "| KL | top-1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in (SMOL, QWEN):
        for row in sorted(rows("speed", model), key=lambda row: row["cell"]["context"]):
            cell, result = row["cell"], row["result"]
            own = cell["engine"] != "ours" or cell["config"]["policy"] in ("dense", "sketch")
            if not own or label(cell) == "sketch, 256":
                continue
            lines.append(
                f"| {NAMES[model]}, {cell['context']:,} | {bold(label(cell))} | {result['step_ms']:.0f} "
                f"| {result['over'].get('transformers', 0):.2f} | {shown(result.get('over_ceiling'), '.1f')} "
                f"| {result['ttft_s']:.1f} | {shown(result['peak_bytes'] and result['peak_bytes'] / 1e6, '.0f')} "
                f"| {shown(result.get('share_read'), '.0%')} | {shown(result.get('kl'), '.4f')} "
                f"| {shown(result.get('top1'), '.2f')} |"
            )
    return "\n".join(lines) + "\n"


def shown(value: float | None, form: str) -> str:
    """A number, or a dash for what was not measured."""
    return "-" if value is None else f"{value:{form}}"


def step_table() -> str:
    """One layer's step on two threads, from kernels.jsonl, as Markdown."""
    cells = [json.loads(line) for line in (HERE / "kernels.jsonl").read_text().splitlines()]
    chosen = [cell for cell in cells if cell["threads"] == 2 and cell["tokens"] > 2048]
    lines = [
        "| query / KV heads, channels | context | sparse, us | PyTorch's SDPA | PyTorch's best | our dense kernel |",
        "|---|---|---|---|---|---|",
    ]
    shapes = {"S": "9 / 3, 64", "L": "32 / 8, 128"}
    for cell in sorted(chosen, key=lambda cell: (cell["shape"] != "S", cell["tokens"])):
        names = ("sdpa_over_sparse", "best_torch_over_sparse", "dense_over_sparse")
        times = " | ".join(f"{cell[name]:.1f}x" for name in names)
        sparse = cell["microseconds"]["sparse"]
        lines.append(f"| {shapes[cell['shape']]} | {cell['tokens']:,} | {sparse:.0f} | {times} |")
    return "\n".join(lines) + "\n"


def gpu_table() -> str:
    """One layer's step and a whole model on a GPU as predicted, budget 1,024, from gpu_predicted.jsonl, as Markdown."""
    found = [json.loads(line) for line in (HERE / "gpu_predicted.jsonl").read_text().splitlines()]
    models = {(row["batch"], row["context"]): row for row in found if row["kind"] == "predicted model"}
    lines = [
        "| PREDICTED, not measured | context | sparse, us | dense, us | dense / sparse | whole model, the same |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        if row["kind"] == "predicted kernel" and row["budget"] == 1024 and row["context"] in (32768, 131072, 524288):
            micro, model = row["microseconds"], models.get((row["batch"], row["context"]), {})
            lines.append(
                f"| batch {row['batch']} | {row['context']:,} | {micro['sparse']:.0f} | {micro['dense']:.0f} "
                f"| {row['dense_over_sparse']:.1f}x | {shown(model.get('dense_over_sparse'), '.1f')} |"
            )
    return "\n".join(lines) + "\n"


def small_table() -> str:
    """Small forms of the model beside transformers and the peers, from small_device.jsonl."""
    lines = [
        "| tokens | | ms a token | of transformers | first token, s | peak MB | KL | top-1, of float32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = [row for row in read([HERE / "small_device.jsonl"]) if row["kind"] == "speed"]
    for row in sorted(found, key=lambda row: row["cell"]["context"]):
        cell, result = row["cell"], row["result"]
        if cell["config"].get("backend") == "reference":
            continue
        name = label(cell)
        top1 = result.get("top1_stock", 1.0 if cell["engine"] == "transformers" else None)
        lines.append(
            f"| {cell['context']:,} | {f'**{name}**' if name.startswith(DEFAULT) else name} | {result['step_ms']:.1f} "
            f"| {result['over'].get('transformers', 0):.2f} | {result['ttft_s']:.1f} "
            f"| {shown(result['peak_bytes'] and result['peak_bytes'] / 1e6, '.0f')} | {shown(result.get('kl'), '.4f')} "
            f"| {shown(top1, '.2f')} |"
        )
    return "\n".join(lines) + "\n"


def form_table() -> str:
    """What small forms cost in quality, from small_quality.jsonl."""
    lines = [
        "| weights | keys and values | read | bytes a token | KL | perplexity | bytes read, of dense in that dtype |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in map(json.loads, (HERE / "small_quality.jsonl").read_text().splitlines()):
        lines.append(
            f"| {row['weights']} | {row['kv']} | {'densely' if row['policy'] == 'dense' else 'sparsely'} "
            f"| {row['token_bytes']:,} | {row['kl']:.4f} | {row['ppl_change']:+.2%} | {row['share_read']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def growth_table() -> str:
    """Milliseconds a token by context, from small_growth.jsonl."""
    found = [json.loads(line) for line in (HERE / "small_growth.jsonl").read_text().splitlines()]
    # peers beside us have a line of their own in the record alone
    found = [row for row in found if row["engine"] == "ours"]
    forms = list(dict.fromkeys((row["weights"], row["kv_dtype"]) for row in found))
    contexts = sorted({row["context"] for row in found})
    lines = [
        f"| ms a token at | {' | '.join(f'{context:,}' for context in contexts)} |",
        "|---" * (1 + len(contexts)) + "|",
    ]
    for weights, kv_dtype in forms:
        own = {row["context"]: row for row in found if (row["weights"], row["kv_dtype"]) == (weights, kv_dtype)}
        times = " | ".join(f"{own[context]['step_ms']:.1f}" for context in contexts)
        lines.append(f"| {weights} weights, {kv_dtype or 'bfloat16'} keys and values | {times} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "agreement table": agreement_table,
    "retrieval table": retrieval_table,
    "token table": token_table,
    "step table": step_table,
    "GPU table": gpu_table,
    "small table": small_table,
    "form table": form_table,
    "growth table": growth_table,
}


def with_table(text: str) -> str:
    """The README with its tables made anew."""
    for name, make in TABLES.items():
        begin, end = (mark.format(name) for mark in COMMENT)
        before, rest = text.split(begin)
        text = before + begin + make() + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
