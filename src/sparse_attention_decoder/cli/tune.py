"""tune: the cheapest config that holds a quality on a text, with its evidence, as a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_attention_decoder.cli.bench import ThreadsOption
from sparse_attention_decoder.cli.terminal import ModelOption, WeightsOption, console, load_model, out, progress_bar
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import InputError

if TYPE_CHECKING:
    from sparse_attention_decoder.measure.tuned import Tuned


def tune(
    text: Annotated[list[Path], typer.Option("--text", help="A UTF-8 text like those to come; repeat for several.")],
    max_kl: Annotated[float | None, typer.Option("--max-kl", min=1e-9, help="Mean KL from dense, nats.")] = None,
    max_change: Annotated[
        float | None, typer.Option("--max-perplexity-change", min=1e-4, help="Percent, either way.")
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    context: Annotated[int, typer.Option("--context", "-c", min=64, help="Tokens read before those measured.")] = 4096,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens measured behind each context.")] = 96,
    samples: Annotated[int, typer.Option(min=1, help="Passages of each text to tune on, and as many held out.")] = 2,
    threads: ThreadsOption = None,
    out_file: Annotated[Path, typer.Option("--out", "-o", help="What AttentionConfig.load takes.")] = Path(
        "tuned.json"
    ),
) -> None:
    """Find the cheapest config for this model and this kind of text that holds a quality.

    Half of the text is tuned on; what is claimed is measured on the other half, by decoding one token at a time. Where
    the target does not hold there, nothing is written and the exit status is 1.

    Examples:

      sparse-decoder tune --text novel.txt --max-kl 0.02

      sparse-decoder tune --text notes.txt --text code.py --max-perplexity-change 1 --out notes.json
    """
    if (max_kl is None) == (max_change is None):
        raise InputError("give one target: --max-kl such as 0.02, or --max-perplexity-change such as 1")
    import torch

    from sparse_attention_decoder.measure.record import model_name
    from sparse_attention_decoder.measure.texts import texts
    from sparse_attention_decoder.measure.tune import Target
    from sparse_attention_decoder.measure.tuned import Listener, Plan
    from sparse_attention_decoder.measure.tuned import tune as run

    if threads is not None:
        torch.set_num_threads(threads)
    target = Target(max_kl, None if max_change is None else max_change / 100)
    decoder = load_model(model, AttentionConfig(policy="dense"), weights)
    with progress_bar("tuning", "steps") as progress:
        stages = Listener(lambda words: console.print(f"[dim]{words}[/dim]", highlight=False), progress)
        found = run(decoder, model_name(model), texts(text), target, Plan(context, tokens, samples), stages)
    _show(found)
    if not found.holds:
        console.print(f"[red]{target} did not hold on the text held out[/red]; nothing is written: give more text or a "
                      "stricter target", highlight=False)  # fmt: skip
        raise typer.Exit(1)
    found.write(out_file)
    out.print(f"{out_file}: use it with AttentionConfig.load({str(out_file)!r})", markup=False, highlight=False)


def _show(found: "Tuned") -> None:
    from sparse_attention_decoder.models.tuned import told

    out.print(told(found.config), markup=False, highlight=False)
    for name, result in found.evidence["held_out"].items():
        low, high = result["kl_ci"]
        change = f"perplexity {result['ppl_change']:+.2%}"
        out.print(
            f"{name:8} KL {result['kl']:.5f} ({low:.5f} to {high:.5f})  {change}  bytes {result['share_read']:.1%}  "
            f"retrieved {result['retrieved']:.0f}",
            markup=False, highlight=False,
        )  # fmt: skip
