"""report: records as a page, pictures and a table."""

from pathlib import Path
from typing import Annotated

import typer

from sparse_attention_decoder.cli.terminal import console, out


def report(
    records: Annotated[list[Path], typer.Argument(help="Record files of bench and eval.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")] = Path("report"),
) -> None:
    """One self-contained HTML page, its pictures as PNG, and Markdown tables.

    Example:

      sparse-decoder report records/*.jsonl --out report
    """
    from sparse_attention_decoder.measure.report import write

    with console.status("drawing"):
        written = write(records, out_folder)
    for path in written:
        out.print(str(path), highlight=False)
