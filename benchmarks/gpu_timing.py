"""How gpu.py and gpu_end_to_end.py measure: captured graphs replayed in turn, and the dense attention of PyTorch."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# the query as [B, Hq, 1, D] with PyTorch's own grouping, or as [B, Hkv, G, D], where it has none to do
DENSE = {
    f"{name} {form}": (backend, form)
    for name, backend in {
        "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }.items() for form in ("gqa", "packed")
}  # fmt: skip
# clocks for which the GPU waits, so that what follows is queued before it starts
AHEAD = 300_000


def dense(name: str, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention [B, Hq, D] of queries [B, Hq, D] to all of keys and values [B, Hkv, T, D], the way DENSE says.

    Raises:
        RuntimeError: this way does not serve these tensors here.
    """
    backend, form = DENSE[name]
    shaped = query.unsqueeze(2) if form == "gqa" else query.unflatten(1, (keys.shape[1], -1))
    with sdpa_kernel(backend):
        output = scaled_dot_product_attention(shaped, keys, values, scale=scaling, enable_gqa=form == "gqa")
    return output.reshape(query.shape)


def refusal(way: Callable[[], object], device: torch.device) -> str | None:
    """Why a comparator does not run here, or None: it is run once to find out."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
        # PyTorch's dispatcher, FlashInfer's builds: each has its own words, and none of them ends the run
        except (RuntimeError, OSError) as error:
            reasons = [str(error), *(str(each.message) for each in told)]
            return "; ".join(reason.split("\n")[0].split(" (Triggered")[0] for reason in reasons)[:400]
    return None


def captured(calls: Sequence[Callable[[], object]], pool: Any = None) -> torch.cuda.CUDAGraph:
    """The calls one after the other as a graph. The first is run twice before, for what compiles or allocates."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            call()
    return graph


def replayed(
    graphs: dict[str, torch.cuda.CUDAGraph],
    seconds: float,
    before: Callable[[], object],
    least: int = 5,
    most: int = 25,
) -> dict[str, list[float]]:
    """Microseconds of each graph, round by round: all take turns until the time is out; the first round is not counted.

    before: undoes what a replay changed; not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    stop = time.monotonic() + seconds
    for turn in range(most + 1):
        marks = {}
        for name, graph in graphs.items():
            before()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(AHEAD)
            begin.record()
            graph.replay()
            end.record()
            marks[name] = begin, end
        torch.cuda.synchronize()
        if turn > 0:
            for name, (begin, end) in marks.items():
                times[name].append(begin.elapsed_time(end) * 1e3)
        if turn >= least and time.monotonic() > stop:
            break
    return times


def middle(times: dict[str, list[float]], calls: dict[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """Median microseconds a call, and the spread: (largest - smallest) / median."""
    median = {name: statistics.median(of) / calls[name] for name, of in times.items()}
    spread = {name: (max(of) - min(of)) / calls[name] / median[name] for name, of in times.items()}
    return {name: round(us, 2) for name, us in median.items()}, {name: round(of, 3) for name, of in spread.items()}


def line(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*names: str) -> list[str]:
    """The two lines that begin a Markdown table."""
    return [line(*names), "|---" * len(names) + "|"]
