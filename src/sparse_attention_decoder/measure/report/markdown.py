"""The report's sentences and tables as Markdown, to be taken into a README."""

from collections.abc import Iterable

from sparse_attention_decoder.measure.report.findings import summary
from sparse_attention_decoder.measure.report.numbers import Numbers
from sparse_attention_decoder.measure.report.tables import Table, tables


def markdown(numbers: Numbers) -> str:
    """What was found, then every table under its model."""
    parts = ["# Sparse decoding, measured", "", *(f"- {_plain(sentence)}" for sentence in summary(numbers))]
    for model in numbers.models:
        parts += ["", f"## {_plain(model.name)}"]
        for table in tables(model):
            parts += ["", f"### {_plain(table.caption)}", "", markdown_table(table)]
    return "\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A pipe table; its groups' titles are the first column, the default is bold."""
    heads = [table.groups_are, "", *(name for name, _ in table.heads)]
    lines = [_line(heads), "|---|---|" + "---:|" * len(table.heads)]
    for group in table.groups:
        for line in group.lines:
            name = _plain(line.name)
            lines.append(_line((group.title, f"**{name}**" if line.is_default else name, *line.cells), named=1))
    return "\n".join(lines)


def _line(cells: Iterable[str], named: int | None = None) -> str:
    """One row; the cell number `named` is Markdown already."""
    return "| " + " | ".join(cell if at == named else _plain(cell) for at, cell in enumerate(cells)) + " |"


def _plain(text: str) -> str:
    """Text that no Markdown reader takes for anything else."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for sign in "|`*_[]$~":
        text = text.replace(sign, f"\\{sign}")
    return text
