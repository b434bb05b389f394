"""The report as one HTML page that asks nothing of anyone: pictures and style inside, no script."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from sparse_attention_decoder.measure.report.findings import summary
from sparse_attention_decoder.measure.report.numbers import Model, Numbers
from sparse_attention_decoder.measure.report.plots import Picture
from sparse_attention_decoder.measure.report.tables import SAYS_NOTHING, Group, Line, Table, tables
from sparse_attention_decoder.measure.report.wording import ABSENT

TITLE = "Sparse decoding, measured"
# a browser that obeys it loads nothing, whatever text the records hold
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LONGEST_NUMBER = 20
_KINDS = {"speed": "Speed", "agreement": "Agreement", "retrieval": "Retrieval", "answers": "Answers"}
_NOTES = {
    "speed": "Bytes read include the index that scoring reads. Quality stands beside every time: "
    "KL and top-1 against our dense on the same tokens.",
    "agreement": "Every side decodes the same true continuation; dense is what it is compared with.",
    "retrieval": f"A task where dense scores below 20% is marked “{SAYS_NOTHING}”. "
    "“evicts”: what the side does not keep is lost for good.",
    "answers": "Scores of answers to questions about a file.",
}


def page(numbers: Numbers, pictures: Sequence[Picture], paths: Iterable[Path]) -> str:
    """The whole page.

    Args:
        pictures: of `plots.draw`; those without bytes are named as missing.
        paths: the records, for the command that makes this page again; only their names are shown.
    """
    style = files(__package__).joinpath("page.css").read_text("utf-8")
    shown = [table for model in numbers.models for table in tables(model)]
    kinds = [kind for kind in _KINDS if any(table.kind == kind for table in shown)]
    links = [
        ("pictures", "Pictures"),
        *((kind, _KINDS[kind]) for kind in kinds),
        ("machine", "Machine"),
        ("again", "Again"),
    ]
    sections = [
        _section("pictures", "Pictures", (_pictures(model, pictures) for model in numbers.models)),
        *(_section(kind, _KINDS[kind], _tables_of(kind, numbers.models)) for kind in kinds),
        _section("machine", "Machine and versions", [_machines(numbers)]),
        _section("again", "How to make it again", [_again(paths)]),
    ]
    return "\n".join([
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{TITLE}</title>",
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        "<main>",
        "<header>",
        f"<h1>{TITLE}</h1>",
        '<div class="summary">',
        *(f"<p>{escape(sentence)}</p>" for sentence in summary(numbers)),
        "</div>",
        f'<nav aria-label="Sections">{"".join(_link(*link) for link in links)}</nav>',
        "</header>",
        *sections,
        "</main>",
        "</body>",
        "</html>\n",
    ])  # fmt: skip


def _link(target: str, name: str) -> str:
    return f'<a href="#{target}">{name}</a> '


def _section(name: str, title: str, parts: Iterable[str]) -> str:
    inside = "\n".join(parts)
    head = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{head}\n{inside}\n</section>'


def _pictures(model: Model, pictures: Sequence[Picture]) -> str:
    own = [picture for picture in pictures if picture.model == model.name]
    drawn = "\n".join(_figure(picture) for picture in own if picture.light)
    missing = [f"{picture.title.lower()} (needs {picture.needs})" for picture in own if not picture.light]
    text = f"<h3>{escape(model.name)}</h3>\n"
    if drawn:
        text += f'<div class="pictures">\n{drawn}\n</div>\n'
    if missing:
        text += f'<p class="absent">Not drawn, for there are no records of it: {escape("; ".join(missing))}.</p>\n'
    return text


def _figure(picture: Picture) -> str:
    alt = escape(f"{picture.title}, {picture.model}. {picture.finding}")
    size = f'width="{picture.width}" height="{picture.height}" alt="{alt}"'
    # not <picture>: Chromium prints the source that the screen chose, a dark one on white paper
    light, dark = (
        f'<img {name} src="data:image/png;base64,{b64encode(data).decode()}" {size}>'
        for name, data in (('class="light"', picture.light), ('class="dark" hidden', picture.dark))
    )
    return (
        f"<figure>\n<figcaption><strong>{escape(picture.title)}</strong> {escape(picture.finding)}</figcaption>\n"
        f"{light}\n{dark}\n</figure>"
    )


def _tables_of(kind: str, models: Sequence[Model]) -> Iterable[str]:
    yield f'<p class="note">{escape(_NOTES[kind])}</p>'
    heads: dict[tuple[str, str], None] = {}
    for number, model in enumerate(models):
        own = [table for table in tables(model) if table.kind == kind]
        if own:
            yield f"<h3>{escape(model.name)}</h3>"
        for at, table in enumerate(own):
            heads |= dict.fromkeys(table.heads)
            text = _table(table, f"{kind}-{number}-{at}")
            folded = f"<details>\n<summary>{escape(table.caption)}</summary>\n{text}\n</details>"
            yield folded if table.is_long else text
    told = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(meaning)}</dd></div>" for name, meaning in heads)
    yield f'<dl class="heads">{told}</dl>'


def _table(table: Table, name: str) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head, _ in table.heads)
    bodies = "\n".join(_body(group, len(table.heads)) for group in table.groups)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">\n<table>\n'
        f'<caption id="{name}"><span>{escape(table.caption)}</span></caption>\n'
        f'<thead><tr><th scope="col">side</th>{heads}</tr></thead>\n{bodies}\n</table>\n</div>'
    )


def _body(group: Group, columns: int) -> str:
    # the title's own cell is as wide as a name, so that it stays in sight when the table is scrolled
    title = f'<tr class="title"><th scope="rowgroup">{escape(group.title)}</th><td colspan="{columns}"></td></tr>'
    return "\n".join(["<tbody>", title, *map(_row, group.lines), "</tbody>"])


def _row(line: Line) -> str:
    cells = "".join(_cell(text) for text in line.cells)
    mark = ' class="default"' if line.is_default else ""
    return f'<tr{mark}><th scope="row">{escape(line.name)}</th>{cells}</tr>'


def _cell(text: str) -> str:
    # words may wrap, numbers may not
    kind = ' class="text"' if len(text) > _LONGEST_NUMBER else ' class="words"' if text[:1].isalpha() else ""
    return f"<td{kind}>{escape(text)}</td>"


def _machines(numbers: Numbers) -> str:
    if not numbers.machines:
        return "<p>The records name no machine.</p>"
    names = list(dict.fromkeys(name for machine in numbers.machines for name in machine.facts))
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(machine.facts.get(name, ABSENT))}</td>" for machine in numbers.machines)
        + "</tr>"
        for name in names
    ]
    caption = '<caption id="facts">Where the records were made</caption>'
    return (
        '<div class="scroll" role="region" tabindex="0" aria-labelledby="facts">\n'
        f'<table class="facts">\n{caption}\n<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table>\n</div>'
    )


def _again(paths: Iterable[Path]) -> str:
    names = " ".join(escape(path.name) for path in paths)
    return f"<p>With the records at hand:</p>\n<pre><code>sparse-decoder report {names} --out report</code></pre>"
