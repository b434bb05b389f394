"""What all commands share: where they print, how they load a model, the progress they show."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from sparse_attention_decoder.config import AttentionConfig

if TYPE_CHECKING:
    from sparse_attention_decoder.decoder import SparseAttention


class Weights(str, Enum):
    """The forms of weights, as `models.weights.FORMS` has them."""

    float32 = "float32"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class KvDtype(str, Enum):
    """What keys and values are packed in, as `tables.KV_BITS` has it."""

    int8 = "int8"
    int4 = "int4"


class Quality(str, Enum):
    """The presets, as `tables.QUALITIES` has them."""

    fast = "fast"
    balanced = "balanced"
    firm = "firm"


console = Console(stderr=True)
# results go to stdout, so that they can be piped; progress and remarks to stderr
out = Console(soft_wrap=True)

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Hub name, directory or GGUF file. Default: the embedded SmolLM2-135M-Instruct."
    ),
]
WeightsOption = Annotated[
    Weights | None, typer.Option("--weights", help="Keep the weights so; fewer bits are faster and less exact.")
]
KvOption = Annotated[
    KvDtype | None, typer.Option("--kv-dtype", help="Keep keys and values in so many bits; int4 is lossy.")
]
QualityOption = Annotated[
    Quality | None,
    typer.Option("--quality", help="A measured preset in place of threshold and window."),
]
MissingOption = Annotated[
    float | None,
    typer.Option(
        "--missing-mass",
        help="Move the threshold so that this estimated share of the attention goes unread, such as 0.03.",
    ),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the decode step: a minute once for a model, faster from then on.")
]
OnProgress = Callable[[int, int], None]


def load_model(
    model: str | None, config: AttentionConfig, weights: Weights | None = None, **model_kwargs: Any
) -> "SparseAttention":
    """Load a model, saying what is done; with the plain default config a model may have a default of its own."""
    with console.status("starting") as status:
        from sparse_attention_decoder.decoder import SparseAttention

        asked = None if config == AttentionConfig() else config
        return SparseAttention.from_pretrained(
            model, asked, weights=weights and weights.value, on_stage=status.update, **model_kwargs
        )


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[OnProgress]:
    """A bar with the time left, to be told (done, total); it is gone when all is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, left"),
        TimeLeft(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, visible=False, total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=done < total)

        yield report
