"""Speed of the CPU kernels against memory and against the best dense attention of PyTorch.

    scripts/bench kernels                     # shapes S and L, bfloat16, 1 and 2 threads, 2k to 128k tokens
    scripts/bench kernels --context 8192 --threads 2 --shape S

One layer's decode step, as a model would call it: every call meets keys, values and codes that are
not in the caches (layers rotate, and between calls a part of a large buffer is read, as weights
would be), candidates take turns, medians are kept. Keys are random, so the chosen tokens are
scattered: the worst case for memory. One JSON line a cell; a cell that is there is not run again.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_attention_decoder.kernels.cpu.operations as operations
from sparse_attention_decoder.cache.arena import room
from sparse_attention_decoder.kernels import Coded, Statistics
from sparse_attention_decoder.kernels.cpu import CpuKernels, isa
from sparse_attention_decoder.kernels.cpu.library import call
from sparse_attention_decoder.kernels.reference import REFERENCE
from sparse_attention_decoder.selection import Rows

# query heads, KV heads, channels: SmolLM2-135M, Llama-3.1-8B
SHAPES = {"S": (9, 3, 64), "L": (32, 8, 128)}
CONTEXTS = (2048, 8192, 32768, 131072)
RETRIEVED, WINDOW, SINKS = 512, 256, 4
LAYERS_BYTES, FLUSH_BYTES, FLUSHED, MEASURED = 800 << 20, 512 << 20, 8 << 20, 128 << 20
CPU = CpuKernels()
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Layer:
    """Keys, values and codes of one layer, in memory of its own."""

    keys: Tensor
    values: Tensor
    coded: Coded


class Flush:
    """Reads a piece of a large buffer in order, another one each time: empties caches, measures bandwidth."""

    def __init__(self) -> None:
        self.buffer = room((FLUSH_BYTES,), torch.uint8, DEVICE).fill_(1)
        self.sink = torch.zeros(1, dtype=torch.int64)
        self.at = 0

    def read(self, size: int) -> float:
        """Seconds for the next `size` bytes."""
        if self.at + size > FLUSH_BYTES:
            self.at = 0
        begun = time.perf_counter()
        call("sad_read", codes=self.buffer.data_ptr() + self.at, count=size, counts=self.sink.data_ptr())
        self.at += size
        return time.perf_counter() - begun


def make_layers(shape: str, tokens: int, dtype: torch.dtype) -> list[Layer]:
    """As many layers as LAYERS_BYTES hold, 2 to 30."""
    _, heads, dim = SHAPES[shape]
    size = 2 * heads * tokens * dim * dtype.itemsize
    layers = []
    for _ in range(max(2, min(30, LAYERS_BYTES // size))):
        keys, values = (room((1, heads, tokens, dim), dtype, DEVICE).normal_() for _ in range(2))
        statistics_ = Statistics(torch.zeros(1, heads, dim), torch.ones(1, heads, dim))
        plain = Coded.room(tokens, statistics_)
        codes = room(tuple(plain.codes.shape), torch.uint8, DEVICE)
        coded = Coded(codes, room(tuple(plain.factors.shape), torch.float16, DEVICE), statistics_)
        CPU.encode(keys, coded, 0)
        layers.append(Layer(keys, values, coded))
    return layers


def candidates(shape: str, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[Layer], object]]:
    """What is compared: PyTorch's dense paths, its sparse one, and ours."""
    query_heads, heads, dim = SHAPES[shape]
    query = torch.randn(1, query_heads, dim).to(dtype)
    grouped = query.view(1, heads, -1, dim)
    regions = Rows.full(1, tokens).regions(SINKS, WINDOW, DEVICE)
    scale = dim**-0.5
    logits = torch.zeros(1, heads, query_heads // heads, max(0, tokens - WINDOW - SINKS))

    def matmul(layer: Layer) -> Tensor:
        weights = (scale * (grouped @ layer.keys.transpose(-1, -2)).float()).softmax(-1)
        return weights.to(dtype) @ layer.values

    found = {
        "torch sdpa": lambda layer: scaled_dot_product_attention(grouped, layer.keys, layer.values, scale=scale),
        "torch matmul": matmul,
        "torch sparse": lambda layer: REFERENCE.step(
            query, layer.keys, layer.values, layer.coded, regions, RETRIEVED, 0.0, scale
        ),
        "dense": lambda layer: CPU.attend_all(query, layer.keys, layer.values, None, scale),
        "score": lambda layer: operations.score(query, layer.coded, SINKS, tokens - WINDOW, scale, logits),
        "sparse": lambda layer: CPU.step(query, layer.keys, layer.values, layer.coded, regions, RETRIEVED, 0.0, scale),
    }
    if regions.high - regions.low <= RETRIEVED:
        del found["sparse"], found["torch sparse"], found["score"]
    return found


@torch.inference_mode()
def measure(shape: str, tokens: int, threads: int, dtype: torch.dtype, flush: Flush) -> dict[str, object]:
    """One cell: median microseconds of each candidate, and what they mean in bytes a second."""
    torch.set_num_threads(threads)
    query_heads, heads, dim = SHAPES[shape]
    layers, ways = make_layers(shape, tokens, dtype), candidates(shape, tokens, dtype)
    dense_bytes = 2 * heads * tokens * dim * dtype.itemsize
    rounds = max(9, min(60, int(3e9 / dense_bytes)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    reads = []
    for turn in range(rounds):
        reads.append(MEASURED / flush.read(MEASURED))
        for name, way in ways.items():
            # slow, and not what the ratios are against
            if name == "torch sparse" and turn % 3:
                continue
            flush.read(FLUSHED)
            layer = layers[turn % len(layers)]
            begun = time.perf_counter()
            way(layer)
            times[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(found) for name, found in times.items()}
    bandwidth = statistics.median(reads)
    cell: dict[str, object] = {
        "shape": shape, "tokens": tokens, "threads": threads, "dtype": str(dtype), "isa": isa(),
        "microseconds": {name: round(seconds * 1e6, 1) for name, seconds in median.items()},
        "read_gb_s": bandwidth / 1e9, "dense_share_of_read": dense_bytes / median["dense"] / bandwidth,
        "sdpa_over_dense": median["torch sdpa"] / median["dense"],
    }  # fmt: skip
    if "sparse" in median:
        scored = heads * (tokens - WINDOW - SINKS) * layers[0].coded.bytes_per_token
        best = min(median["torch sdpa"], median["torch matmul"])
        cell |= {
            "scan_share_of_read": scored / median["score"] / bandwidth,
            "sdpa_over_sparse": median["torch sdpa"] / median["sparse"],
            "best_torch_over_sparse": best / median["sparse"],
            "dense_over_sparse": median["dense"] / median["sparse"],
        }
    return cell


def fixed_cost() -> float:
    """Microseconds of a step on so little that only the call counts: 64 tokens dense, warm, one thread."""
    torch.set_num_threads(1)
    keys, query = torch.randn(1, 3, 64, 64).bfloat16(), torch.randn(1, 9, 64).bfloat16()
    times = []
    for _ in range(2000):
        begun = time.perf_counter()
        CPU.attend_all(query, keys, keys, None, 0.125)
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def table(cells: list[dict[str, object]]) -> str:
    """Markdown: a row a cell."""
    names = ("torch sdpa", "torch matmul", "torch sparse", "dense", "sparse")
    lines = [
        "| shape | tokens | threads | " + " | ".join(f"{name} us" for name in names)
        + " | sdpa / sparse | best torch / sparse | our dense / sparse | dense, of read bandwidth | scan, of it |",
        "|---" * (len(names) + 8) + "|",
    ]  # fmt: skip
    for cell in sorted(cells, key=lambda c: (c["shape"] != "S", c["threads"], c["tokens"])):
        micro = cell["microseconds"]
        times = " | ".join(f"{micro[name]:.0f}" if name in micro else "" for name in names)
        ratios = " | ".join(
            f"{cell[name]:.1f}" if name in cell else ""
            for name in ("sdpa_over_sparse", "best_torch_over_sparse", "dense_over_sparse")
        )
        shares = " | ".join(
            f"{cell[name]:.0%}" if name in cell else "" for name in ("dense_share_of_read", "scan_share_of_read")
        )
        lines.append(f"| {cell['shape']} | {cell['tokens']} | {cell['threads']} | {times} | {ratios} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells that are missing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--context", type=int, action="append")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    options = parser.parse_args()
    cells = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(c["shape"], c["tokens"], c["threads"], c["dtype"], c["isa"]) for c in cells}
    flush, dtype = Flush(), getattr(torch, options.dtype)
    for threads in options.threads or (1, 2):
        for shape in options.shape or SHAPES:
            for tokens in options.context or CONTEXTS:
                if (shape, tokens, threads, str(dtype), isa()) in done:
                    continue
                cell = measure(shape, tokens, threads, dtype, flush)
                cells.append(cell)
                with options.out.open("a") as out:
                    out.write(json.dumps(cell) + "\n")
                print(table([cell]).splitlines()[-1], flush=True)
    head = (
        f"# CPU kernels: one layer's decode step\n\nMade by `scripts/bench kernels` on {platform.machine()}, "
        f"{isa()}, {options.dtype}; {RETRIEVED} tokens retrieved, window {WINDOW}, {SINKS} sinks; medians.\n"
        f"S: 9 query and 3 KV heads of 64; L: 32 and 8 of 128. "
        f"A call that does nearly nothing: {fixed_cost():.0f} us.\n\n"
    )
    options.out.with_suffix(".md").write_text(head + table(cells) + "\n")
    print(head + table(cells))


if __name__ == "__main__":
    main()
