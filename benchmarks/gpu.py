r"""Speed of the GPU kernels against memory and the best dense attention, then of a whole model, in one run.

    scripts/bench gpu                    # all that fits into 8 minutes, the cells with a target first
    scripts/bench gpu --only kernels --batch 1 --context 131072 --budget 1024
    scripts/bench gpu --dry              # the same program on the CPU, in Triton's interpreter: no figures

Without a network: PYTHONPATH=src python3 benchmarks/gpu.py, on a machine that has torch for its CUDA, triton from 3.6
and transformers from 5.15 on. Nothing is loaded, weights are random. FlashInfer is compared where it is installed, from
    pip install --no-index --find-links WHEELS --no-deps flashinfer-python==0.6.9 apache-tvm-ffi nvidia-ml-py ninja \
        einops tabulate
and compiles itself for a minute or two when first used (with nvcc): run `--only kernels --context 8192` once before.

One layer's decode step by CUDA graph. Layers rotate, so that codes and chosen keys come from memory and not from the
L2; the scratch is shared, as a model's layers share it. Candidates take turns, medians are kept, bandwidth is a copy's
in the same turns. Keys are random: chosen tokens are scattered, the worst case for memory. One JSON line a cell; a cell
that is there, of the same kernels on the same GPU, is not run again.
"""

import argparse
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_cells import BATCHES, BUDGETS, CONTEXTS, FIRST, SHAPES, SINKS, WINDOW, Cell, measure
from gpu_timing import DENSE, header, line

import sparse_attention_decoder.kernels.triton as ours
from sparse_attention_decoder import AttentionConfig
from sparse_attention_decoder.measure import machine

Row = dict[str, Any]
# what a model of 32 layers and one GPU of 140 GB can hold, targets first
MODEL_CELLS = ((1, 131072), (4, 131072), (1, 32768), (1, 8192), (1, 524288), (4, 32768), (4, 8192))
# batch and context: kernel over the best dense, the model's token over the best dense, share of the copy bandwidth
TARGETS = {(1, 131072): (8.0, 1.8, None), (16, 131072): (12.0, None, 0.6), (4, 131072): (None, 3.5, None)}
# seconds of replays for a cell, and what is kept back for a cell to finish
REPLAYED, RESERVE = 3.0, 25.0


def facts(device: torch.device) -> Row:
    """The machine, as `measure.machine` tells, and what matters of a GPU."""
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    sources = b"".join(path.read_bytes() for path in sorted(Path(ours.__file__).parent.glob("*.py")))
    return machine.facts(device.type) | {
        "driver_and_clocks": driver, "triton": version("triton"), "cuda": torch.version.cuda,
        "kernels": hashlib.sha1(sources).hexdigest()[:10],
        "run": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }  # fmt: skip


class Record:
    """A file of rows. What is there, of the same kernels, GPU and shape, is not measured again."""

    KEY = ("kind", "kernels", "gpu", "shape", "batch", "context", "budget")

    def __init__(self, path: Path, common: Row) -> None:
        self.path, self.common = path, common
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def __contains__(self, row: Row) -> bool:
        return any(all(row.get(key) == each.get(key) for key in self.KEY) for each in self.rows)

    def add(self, row: Row) -> None:
        """On disk before this returns."""
        self.rows.append(row)
        with self.path.open("a") as out:
            out.write(json.dumps(row) + "\n")

    @property
    def own(self) -> list[Row]:
        """Rows of these kernels on this GPU."""
        return [
            row for row in self.rows if all(row.get(key) == self.common[key] for key in ("kernels", "gpu", "shape"))
        ]


def met(row: Row) -> str:
    """The row's targets, and whether it reaches them."""
    kernel, model, share = TARGETS.get((row["batch"], row["context"]), (None, None, None))
    if row["kind"] == "model":
        kernel, share = model, None
    elif row["budget"] != 1024:
        return ""
    told = [] if kernel is None else [f"{kernel:g}x {'met' if row['dense_over_sparse'] >= kernel else 'MISSED'}"]
    if share is not None:
        told.append(f"{share:.0%} {'met' if row['share_of_copy']['must'] >= share else 'MISSED'}")
    return ", ".join(told)


def table(rows: list[Row]) -> str:
    """Markdown: kernels, then the model, then what was left out."""
    parts = ("sparse", "score", "select", "attend", "append", "gather, sdpa", "ours, whole row")
    lines = header(
        "batch", "context", "budget", *(f"{name} us" for name in parts), "best dense us", "dense / sparse",
        "must-read GB/s",        "of copy", "moved, of copy", "dense, of copy", "targets",
    )  # fmt: skip
    for row in sorted((row for row in rows if row["kind"] == "kernel" and row.get("microseconds")), key=place):
        us, share, best = row["microseconds"], row["share_of_copy"], row["best_dense"]
        lines.append(
            line(
                *place(row), *(f"{us[name]:.1f}" for name in parts), f"{us[best]:.1f} ({best})",
                f"{row['dense_over_sparse']:.2f}", row["gb_s"]["must"],
                *(f"{share[name]:.0%}" for name in ("must", "moved", "dense")), met(row),
            )
        )  # fmt: skip
    names = ("transformers", "plain", "dense", "sparse")
    lines += ["", *header("batch", "context", *(f"{name} ms" for name in names), "best dense / sparse", "targets")]
    for row in sorted((row for row in rows if row["kind"] == "model" and row.get("milliseconds")), key=place):
        times = [row["milliseconds"].get(name, "") for name in names]
        lines.append(line(*place(row)[:2], *times, row.get("dense_over_sparse", ""), met(row)))
    reasons = sorted({f"{name}: {reason}" for row in rows for name, reason in row.get("left_out", {}).items()})
    return "\n".join([*lines, "", "Left out:", "", *(f"- {reason}" for reason in reasons)])


def place(row: Row) -> tuple[int, int, int]:
    """Order of the tables."""
    return row["batch"], row["context"], row.get("budget", 0)


def model_row(model: Any, common: Row, batch: int, context: int, record: Record, device: torch.device) -> Row:
    """One row of end to end. Its dense side takes the way that the kernel cell found fastest."""
    import gpu_end_to_end

    times = [
        row["microseconds"] for row in record.own if row["kind"] == "kernel" and place(row)[:2] == (batch, context)
    ]
    way = (
        min((name for name in times[0] if name in DENSE), key=times[0].__getitem__)
        if times and times[0]
        else "flash packed"
    )
    sparse = AttentionConfig(1024, None, WINDOW, SINKS, backend="triton", dense_below=0)
    found = gpu_end_to_end.measure(model, batch, context, sparse, way, device)
    row = common | {"kind": "model", "batch": batch, "context": context, "budget": sparse.top_k} | found
    dense = [ms for name, ms in found["milliseconds"].items() if name != "sparse"]
    if dense and "sparse" in found["milliseconds"]:
        row["dense_over_sparse"] = round(min(dense) / found["milliseconds"]["sparse"], 2)
    return row


def work(options: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Kind, batch and context of every cell asked for, in the order of their weight."""
    asked = [(batch, context) for batch in options.batch for context in options.context]
    rest = sorted((cell for cell in asked if cell not in FIRST), key=lambda cell: cell[0] * cell[1])
    kernels = [("kernel", *cell) for cell in (*(cell for cell in FIRST if cell in asked), *rest)]
    models = [("model", *cell) for cell in MODEL_CELLS if cell in asked]
    if options.only == "kernels":
        models = []
    yield from kernels[: len(FIRST)] if options.only != "model" else ()
    yield from models
    yield from kernels[len(FIRST) :] if options.only != "model" else ()


def run(options: argparse.Namespace, record: Record, device: torch.device) -> dict[str, str]:
    """Measure what is missing until the time is out; returns what was not measured, and why."""
    stop, missing, model = time.monotonic() + 60 * options.minutes - RESERVE, {}, None
    query_heads, heads, dim = SHAPES[options.shape]
    for kind, batch, context in work(options):
        name, at = f"{kind} {batch} x {context}", {"kind": kind, "batch": batch, "context": context}
        budgets = tuple(each for each in options.budget if record.common | at | {"budget": each} not in record)
        if not budgets or (kind == "model" and record.common | at | {"budget": 1024} in record):
            continue
        if time.monotonic() > stop:
            missing[name] = f"no time left of {options.minutes:g} minutes"
            continue
        begun = time.monotonic()
        try:
            if kind == "kernel":
                model = None
                cell = Cell(query_heads, heads, dim, batch, context)
                rows = [record.common | row for row in measure(cell, budgets, device, torch.bfloat16, REPLAYED)]
            else:
                if model is None:
                    import gpu_end_to_end

                    backend = None if options.eager else "inductor"
                    model = gpu_end_to_end.model_of(query_heads, heads, dim, device, backend)
                rows = [model_row(model, record.common, batch, context, record, device)]
        except torch.OutOfMemoryError as error:
            missing[name] = f"does not fit: {str(error).split('. ')[0]}"
            rows = []
        except ArithmeticError as error:
            missing[name] = f"WRONG: {error}"
            rows = []
        for row in rows:
            record.add(row)
        torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - begun:.0f} s {missing.get(name, '')}", flush=True)
    return missing


def dry() -> None:
    """One tiny cell and one tiny model on the CPU, printed and not kept."""
    import gpu_end_to_end

    torch.manual_seed(0)
    device, common = torch.device("cpu"), {"dry": True, "shape": "tiny"}
    rows = measure(Cell(4, 2, 32, 2, 200, 32), (16, 32), device, torch.bfloat16, 0, timed=False)
    model = gpu_end_to_end.model_of(4, 2, 32, device, "eager", tiny=True)
    sparse = AttentionConfig(16, None, 32, SINKS, backend="triton", dense_below=0)
    rows.append({"kind": "model"} | gpu_end_to_end.measure(model, 2, 140, sparse, "flash packed", device, False))
    for row in rows:
        print(json.dumps(common | row))


def main() -> None:
    """Run the cells that are missing, write the table, and say what it could not do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="run the plumbing on the CPU, measure nothing")
    parser.add_argument(
        "--minutes", type=float, default=8, help="stop after so many; a run goes on where the last one stopped"
    )
    parser.add_argument("--only", choices=("kernels", "model"))
    parser.add_argument("--eager", action="store_true", help="compile nothing of the model for any side")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--context", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--budget", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    options = parser.parse_args()
    if options.dry:
        # read when triton is imported, and that is still to come
        os.environ["TRITON_INTERPRET"] = "1"
        dry()
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device: --dry runs the program without one; gpu_predicted.md has what is expected of one")
    device = torch.device("cuda", torch.cuda.current_device())
    told = facts(device)
    record = Record(options.out, {"kernels": told["kernels"], "gpu": told["gpu"], "shape": options.shape})
    record.add({"kind": "machine", **told})
    missing = run(options, record, device)
    head = (
        f"# GPU kernels and a model of Llama-3.1-8B's shape\n\nMade by `scripts/bench gpu` on {told['gpu']} "
        f"({told['driver_and_clocks']}), torch {told['torch']}, triton {told['triton']}, commit {told['commit']}, "
        f"{told['run']}. Shape {options.shape}, bfloat16, window {WINDOW}, {SINKS} sinks, random keys; medians of "
        "graph replays. Must-read: codes, near and chosen tokens, once each; moved: float16 logits, written and read, "
        "too.\n\n"
    )
    text = head + table(record.own) + "".join(f"\n- {name}: {reason}" for name, reason in missing.items()) + "\n"
    options.out.with_suffix(".md").write_text(text)
    print(text)
    print(json.dumps({"missing": missing, "rows": len(record.own)}))
    if any(reason.startswith("WRONG") for reason in missing.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
