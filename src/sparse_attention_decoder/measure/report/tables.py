"""The numbers as tables of text: bytes read first, quality beside every time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sparse_attention_decoder.measure.report.numbers import Agreement, Model, Speed
from sparse_attention_decoder.measure.report.samples import POOLED, Answers, Paired, Score
from sparse_attention_decoder.measure.report.sides import DEFAULT, STOCK
from sparse_attention_decoder.measure.report.wording import (
    ABSENT,
    between,
    change,
    gigabytes,
    milliseconds,
    percent,
    plain,
    signed,
    small,
    tokens,
)

REFERENCE, INCOMPARABLE = "reference", "not comparable"
SAYS_NOTHING = "dense cannot do it: says nothing"
_Measured = TypeVar("_Measured", Speed, Agreement, Score, Answers)


@dataclass(frozen=True)
class Line:
    """A row: the side's name and a text for every column. is_default: it is what a user gets."""

    name: str
    cells: tuple[str, ...]
    is_default: bool


@dataclass(frozen=True)
class Group:
    """Rows that are compared with each other."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Table:
    """kind: speed, agreement, retrieval or answers. heads: (name, what it means) of every column.

    groups_are: what the groups' titles name. is_long: of interest to those who look something up.
    """

    kind: str
    model: str
    caption: str
    heads: tuple[tuple[str, str], ...]
    groups_are: str
    groups: tuple[Group, ...]
    is_long: bool = False


_BYTES = ("bytes read", "keys, values and index read per token over what dense reads")
_KL = ("KL", "divergence of next-token distributions from our dense, nats")
_TOP1 = ("top-1", "share of tokens where both prefer the same one")
_CI = ("95%", "95% interval")
_SPEED = (
    _BYTES, _KL, _TOP1,
    ("ms a token", "median time of a decode step"),
    ("10 to 90%", "10th and 90th percentile"),
    ("of transformers", "time over that of transformers"),
    ("of best dense", "time over that of the fastest dense side"),
    ("of ceiling", "time over what reading weights, keys, values and index takes at the machine's bandwidth"),
    ("first token, s", "prefill and first step, index included"),
    ("tokens/s", "of all rows of the batch"),
    ("peak GB", "most resident memory"),
)  # fmt: skip
_AGREEMENT = (
    _BYTES,
    ("index", "the index's part of it"),
    _KL, _CI, _TOP1, _CI,
    ("perplexity", "change of perplexity against dense"),
    _CI,
    ("retrieved", "tokens chosen per head beside sinks and window"),
    ("mass", "true share of attention on the tokens read"),
    ("recall", "share of the oracle's choice that was chosen"),
    ("error", "relative error of attention's output"),
)  # fmt: skip
_RETRIEVAL = (
    _BYTES,
    ("score", "mean, percent"),
    ("95%", "Wilson's interval"),
    ("against dense", "percent points, over the same samples"),
    ("95%", "bootstrap interval of the paired difference"),
    ("pairs", "samples that dense has too"),
)
_ANSWERS = (
    _BYTES,
    ("F1", "of words, percent"),
    ("against dense", "percent points of F1, over the same samples"),
    ("95%", "bootstrap interval of the paired difference"),
    ("exact", "percent"),
    ("ROUGE-L", "percent"),
    ("samples", "questions answered"),
)


def tables(model: Model) -> list[Table]:
    """Those that there are records for."""
    return [table for table in (_speed(model), _agreement(model), *_retrieval(model), _answers(model)) if table.groups]


def _speed(model: Model) -> Table:
    has_notes = any(row.note for row in model.speed)
    heads = (*_SPEED, ("note", "what to know of it")) if has_notes else _SPEED
    settings = sorted({row.setting for row in model.speed})

    def cells(row: Speed) -> tuple[str, ...]:
        kl = small(row.kl) if row.kl is not None else REFERENCE if row.side.is_reference else INCOMPARABLE
        spread = None
        if row.step_ms_low is not None and row.step_ms_high is not None:
            spread = f"{milliseconds(row.step_ms_low)} to {milliseconds(row.step_ms_high)}"
        best = row.best_dense[0] if row.best_dense else None
        found = (
            percent(row.share_read), kl, plain(row.top1, 3), milliseconds(row.step_ms), spread or ABSENT,
            plain(row.over.get(STOCK), 2), plain(best, 2), plain(row.over_ceiling, 2), plain(row.ttft_s, 1),
            plain(row.tokens_per_s, 1), gigabytes(row.peak_bytes),
        )  # fmt: skip
        return (*found, row.note or ABSENT) if has_notes else found

    caption = "Time and memory" + (f": {settings[0]}" if len(settings) == 1 else "")
    groups = _groups(model.speed, lambda row: _place(row.context, row.setting, settings), cells)
    return Table("speed", model.name, caption, heads, "context", groups)


def _agreement(model: Model) -> Table:
    settings = sorted({row.setting for row in model.agreement})

    def cells(row: Agreement) -> tuple[str, ...]:
        kl_ci = f"{small(row.kl_ci[0])} to {small(row.kl_ci[1])}" if row.kl_ci else ABSENT
        return (
            percent(row.share_read), percent(row.index_share), small(row.kl), kl_ci, plain(row.top1, 3),
            between(row.top1_ci, 3), change(row.ppl_change, 2), between(row.ppl_change_ci, 2, 100.0),
            plain(row.retrieved, 0), plain(row.mass, 3), plain(row.recall, 3), small(row.error),
        )  # fmt: skip

    groups = _groups(model.agreement, lambda row: _place(row.context, row.setting, settings), cells)
    return Table("agreement", model.name, "Agreement with dense on the same text", _AGREEMENT, "context", groups)


def _retrieval(model: Model) -> list[Table]:
    settings = sorted({row.setting for row in model.retrieval})

    def cells(row: Score) -> tuple[str, ...]:
        against, ends, pairs = _paired(row.over_dense, row.side.is_reference)
        if row.dense_fails:
            against, ends = SAYS_NOTHING, ABSENT
        interval = between((row.low, row.high))
        return percent(row.share_read), plain(row.mean, 1), interval, against, ends, pairs

    def table(rows: Iterable[Score], caption: str, is_long: bool) -> Table:
        def title(row: Score) -> str:
            place = f"{_place(row.length, row.setting, settings)}, {row.format}"
            return place if row.task == POOLED else f"{row.task}, {place}"

        groups = _groups(rows, title, cells)
        return Table("retrieval", model.name, caption, _RETRIEVAL, "task", groups, is_long)

    pooled = [row for row in model.retrieval if row.task == POOLED]
    single = sorted((row for row in model.retrieval if row.task != POOLED), key=lambda row: (row.task, row.length))
    whole = table(pooled, "Retrieval over all tasks that dense can do", False)
    return [whole, table(single, "Retrieval task by task", bool(pooled))]


def _answers(model: Model) -> Table:
    settings = sorted({row.setting for row in model.answers})

    def cells(row: Answers) -> tuple[str, ...]:
        against, ends, _ = _paired(row.over_dense, row.side.is_reference)
        scores = plain(row.f1, 1), against, ends, plain(row.exact, 1), plain(row.rouge_l, 1)
        return percent(row.share_read), *scores, str(row.samples)

    def title(row: Answers) -> str:
        return ", ".join((row.file, row.format, *([row.setting] if len(settings) > 1 else [])))

    return Table("answers", model.name, "Answers", _ANSWERS, "file", _groups(model.answers, title, cells))


def _paired(over: Paired | None, is_reference: bool) -> tuple[str, str, str]:
    if over is None:
        return REFERENCE if is_reference else "dense not measured", ABSENT, ABSENT
    return signed(over.mean), f"{signed(over.low)} to {signed(over.high)}", str(over.samples)


def _place(count: int, setting: str, settings: Sequence[str]) -> str:
    return f"{tokens(count)} tokens" + (f", {setting}" if len(settings) > 1 else "")


def _groups(
    rows: Iterable[_Measured], title: Callable[[_Measured], str], cells: Callable[[_Measured], tuple[str, ...]]
) -> tuple[Group, ...]:
    found: dict[str, list[Line]] = {}
    for row in rows:
        line = Line(row.side.label, cells(row), row.side.label == DEFAULT)
        found.setdefault(title(row), []).append(line)
    return tuple(Group(name, tuple(lines)) for name, lines in found.items())
