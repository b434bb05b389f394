"""bench: speed and memory of any policy beside the best dense ways and the peers."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sparse_attention_decoder.cli.terminal import (
    CompileOption,
    KvOption,
    ModelOption,
    WeightsOption,
    console,
    out,
    progress_bar,
)
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.tables import POLICIES

if TYPE_CHECKING:
    from sparse_attention_decoder.measure.record import Row
    from sparse_attention_decoder.measure.speed.bench import Ceiling, Listener, Setting

app = typer.Typer(name="bench", invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})

_HEADS = ("ms", "±", "stock", "ceil", "TTFT", "MB", "bytes", "KL", "top1")
_LEGEND = (
    "ms a token, half the way from the 10th to the 90th percentile; over transformers' and over the ceiling's; seconds "
    "to the first token; peak memory; KV bytes read, index counted, over dense; KL and agreement with dense"
)

ContextList = Annotated[list[int], typer.Option("--context", "-c", min=64, help="Tokens read; repeat for several.")]
PolicyList = Annotated[list[str], typer.Option("--policy", "-p", help=f"Repeat for several: {', '.join(POLICIES)}.")]
BudgetList = Annotated[
    list[str],
    typer.Option(
        "--budget", "-b",
        help="Repeat for several: default (the default's threshold), a number of tokens, a threshold such as 1e-4, a "
        "missing attention mass such as 5%, or fast, balanced, firm.",
    ),
]  # fmt: skip
NearOption = Annotated[int | None, typer.Option("--window", min=1, help="Newest tokens, always read; the default's.")]
TextList = Annotated[
    list[Path], typer.Option("--text", help="A UTF-8 text to decode; default: Python's documentation and sources.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Default: what PyTorch takes.")]


class Dtype(str, Enum):
    """What weights are loaded as."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(str, Enum):
    """Where everything runs."""

    cpu = "cpu"
    cuda = "cuda"


OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="Records, one JSON line a cell; cells in it are not run again.")
]


@app.callback()
def bench(
    ctx: typer.Context,
    model: ModelOption = None,
    context: ContextList = [4096],
    policy: PolicyList = ["sketch", "quest", "window"],
    budget: BudgetList = ["default", "256"],
    window: NearOption = None,
    batch: Annotated[list[int], typer.Option("--batch", min=1, help="Rows decoded together.")] = [1],
    dtype: Annotated[list[Dtype], typer.Option(help="Of the weights; repeat for several.")] = [Dtype.float32],
    threads: ThreadsOption = None,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of 8 tokens for every side.")] = 6,
    text: TextList = [],
    weights: WeightsOption = None,
    kv_dtype: KvOption = None,
    compile_steps: CompileOption = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also llama.cpp, OpenVINO GenAI, vLLM and kvpress, if installed.")
    ] = False,
    peers_folder: Annotated[Path, typer.Option(help="Where scripts/peers put their environments.")] = Path(".peers"),
    out_file: OutOption = Path("records/speed.jsonl"),
) -> None:
    """Time to first token, time per token, memory and bytes read, sides in turns, beside the physical ceiling.

    Every side continues the same tokens: transformers as it is, dense on our cache (PyTorch's SDPA and our
    kernel), and every policy at every budget. The table says how far sparse strays from dense, too.

    Examples:

      sparse-decoder bench --context 4096 --policy sketch --policy quest --budget default --budget 256

      sparse-decoder bench --peers --context 8000

      sparse-decoder bench compare before.jsonl after.jsonl
    """
    if ctx.invoked_subcommand is not None:
        return
    from sparse_attention_decoder.measure.grid import configs
    from sparse_attention_decoder.measure.speed.run import Plan, run

    plan = Plan(
        tuple(context), tuple(configs(policy, budget, window)), out_file, model, tuple(batch),
        tuple(one.value for one in dtype), threads, device.value, rounds, tuple(text),
        peers_folder if peers else None, weights and weights.value, kv_dtype and kv_dtype.value, compile_steps,
    )  # fmt: skip
    with _listener() as listener:
        for setting, rows in run(plan, listener):
            _show(setting, rows)
    out.print(f"records: {out_file}", highlight=False)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Records.")],
    after: Annotated[Path, typer.Argument(help="Records with some of the same cells.")],
) -> None:
    """What changed between two record files, cell by cell."""
    from sparse_attention_decoder.measure.record import changes

    found = changes(before, after)
    if not found:
        raise InputError(f"{before} and {after} have no cell in common; cells are the same model, context, config, …")
    table = Table(box=None, pad_edge=False)
    for head in ("cell", "measure", "before", "after", "change"):
        table.add_column(head, no_wrap=True)
    for name, measure, old, new in found:
        table.add_row(name, measure, f"{old:.4g}", f"{new:.4g}", f"{new / old - 1:+.1%}" if old else "")
    out.print(table)


@contextmanager
def _listener() -> Iterator["Listener"]:
    from sparse_attention_decoder.measure.speed.bench import Listener

    def stage(text: str) -> None:
        # a line each: some stages take minutes, and the bar shows only what can be counted
        console.print(f"[dim]{text}[/dim]", highlight=False)

    with progress_bar("decoding in turns", "turns") as progress:
        yield Listener(stage, _show_ceiling, progress)


def _show_ceiling(setting: "Setting", ceiling: "Ceiling") -> None:
    dense, near = ceiling.ms(ceiling.dense_bytes), ceiling.ms(ceiling.near_bytes)
    out.print(
        f"\n{setting.name}, {setting.dtype}, context {setting.context}, batch {len(setting.ids)}, "
        f"{setting.threads} threads\n"
        f"the ceiling, at {ceiling.bandwidth_gb_s:.1f} GB/s as measured: weights {ceiling.weight_bytes / 1e6:.0f} MB "
        f"and keys and values {ceiling.dense_bytes / 1e6:.0f} MB take dense {dense:.1f} ms a token at least; "
        f"sinks and window alone {near:.1f} ms\n"
        f"a token of context takes {ceiling.dense_bytes // setting.context} bytes of keys and values",
        highlight=False,
    )


def _show(setting: "Setting", rows: list[tuple["Row", "Row"]]) -> None:
    from sparse_attention_decoder.measure.compare import STOCK
    from sparse_attention_decoder.measure.record import label

    table = Table(box=None, pad_edge=False, title=f"context {setting.context}", title_justify="left")
    table.add_column("", min_width=18)
    for head in _HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for cell, result in rows:
        table.add_row(
            label(cell),
            f"{result['step_ms']:.1f}",
            f"{(result['step_ms_high'] - result['step_ms_low']) / 2 / result['step_ms']:.0%}",
            _shown(result["over"].get(STOCK), ".2f"),
            _shown(result.get("over_ceiling"), ".1f", "x"),
            _shown(result["ttft_s"], ".1f"),
            _shown(result["peak_bytes"] and result["peak_bytes"] / 1e6, ".0f"),
            _shown(result.get("share_read"), ".1%"),
            _shown(result.get("kl"), ".4f"),
            _shown(result.get("top1"), ".2f"),
        )
    out.print(table)
    out.print(f"[dim]{_LEGEND}[/dim]", highlight=False)


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
