"""sparse-decoder: generate, read, ask, chat, demo, bench, eval, tune, report, doctor. It parses; others work."""

import logging
import sys
from typing import Any

import typer
from rich.logging import RichHandler
from rich.table import Table
from typer.core import TyperGroup

from sparse_attention_decoder.cli.bench import app as bench_app
from sparse_attention_decoder.cli.evaluate import evaluate
from sparse_attention_decoder.cli.generate import demo, generate
from sparse_attention_decoder.cli.report import report
from sparse_attention_decoder.cli.session import ask, chat, read
from sparse_attention_decoder.cli.terminal import console, out
from sparse_attention_decoder.cli.tune import tune
from sparse_attention_decoder.errors import SparseAttentionError


class _Commands(TyperGroup):
    """Turns our errors into one line and lets Ctrl-C end quietly."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.print("\nstopped")
            sys.exit(130)
        except SparseAttentionError as error:
            console.print("[red]error:[/red] ", end="")
            console.print(str(error), markup=False, highlight=False)
            sys.exit(1)


app = typer.Typer(
    cls=_Commands,
    help="Decode long contexts with sparse attention: read the cached tokens that matter, keep the rest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(read)
app.command()(ask)
app.command()(chat)
app.command()(demo)
app.add_typer(bench_app)
app.command("eval")(evaluate)
app.command()(tune)
app.command()(report)


@app.command()
def doctor() -> None:
    """What is installed, which backends can serve, which model is found."""
    from sparse_attention_decoder.measure.doctor import facts

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts():
        table.add_row(name, value)
    out.print(table)


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)],
    )
    app()
