"""Samples of retrieval and question answering, averaged per side and paired with dense's over the same samples."""

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import torch

from sparse_attention_decoder.measure import interval
from sparse_attention_decoder.measure.record import Row
from sparse_attention_decoder.measure.report.sides import Side, side_of

# percent; where dense scores less, a side that scores the same has kept nothing
DENSE_FAILS_BELOW = 20.0
POOLED = "all that dense can do"
NEEDLE = "niah_single"
# normal quantile of a 95 % interval
_Z = 1.959964
_Key = TypeVar("_Key", bound=Hashable)
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Paired:
    """Percent points that a side scores more than dense over `samples` that both have, with a 95 % interval."""

    mean: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Score:
    """One side's retrieval at one task and length, in percent, with Wilson's 95 % interval.

    task: `POOLED` for the samples of every task that dense can do.
    dense_fails: dense scores below `DENSE_FAILS_BELOW`: whatever this side scores says nothing.
    over_dense: None for dense itself and where dense was not measured.
    """

    side: Side
    setting: str
    task: str
    length: int
    format: str
    share_read: float | None
    mean: float
    low: float
    high: float
    samples: int
    dense_fails: bool
    over_dense: Paired | None


@dataclass(frozen=True)
class Needle:
    """One side's mean score in percent for needles at one depth (tenths, 0 is the start) and length."""

    side: Side
    setting: str
    format: str
    length: int
    depth: float
    mean: float
    samples: int


@dataclass(frozen=True)
class Answers:
    """One side's answers to questions about one file, in percent; `over_dense` is of F1."""

    side: Side
    setting: str
    file: str
    format: str
    share_read: float | None
    f1: float | None
    exact: float | None
    rouge_l: float | None
    samples: int
    over_dense: Paired | None


@dataclass(frozen=True)
class _Sample:
    """One score in percent. name: what tells it from others of its side, so that dense's can be found."""

    side: Side
    group: tuple[str, int, str]
    task: str
    name: Hashable
    percent: float
    share_read: float | None
    depth: float | None


def number(value: object) -> float | None:
    """A finite number, or None for whatever else a record has there."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def wilson(mean: float, samples: int) -> tuple[float, float]:
    """95 % interval, in percent, of a mean score in percent.

    Wilson's for a share; scores between none and all vary less than it assumes, so it is wide enough for them.
    """
    share, extra = mean / 100, _Z**2 / samples
    middle = (share + extra / 2) / (1 + extra)
    reach = _Z / (1 + extra) * math.sqrt(share * (1 - share) / samples + extra / (4 * samples))
    return max(0.0, 100 * (middle - reach)), min(100.0, 100 * (middle + reach))


def scores(rows: list[Row]) -> tuple[Score, ...]:
    """Scores of every side by dtype, length, format and task; what is pooled over tasks comes before them."""
    found: list[Score] = []
    for group, samples in sorted(_grouped(_retrieved(rows), lambda one: one.group).items()):
        tasks = _grouped(samples, lambda one: one.task)
        fails = {task: _dense_fails(tasks[task]) for task in tasks}
        able = [one for one in samples if fails[one.task] is False]
        pooled = {POOLED: able} if len({one.task for one in able}) > 1 else {}
        for task, members in {**pooled, **dict(sorted(tasks.items()))}.items():
            found += _scores(group, task, members, bool(fails.get(task)))
    return tuple(found)


def needles(rows: list[Row]) -> tuple[Needle, ...]:
    """Mean scores of single needles by depth, in the format that most samples have."""
    samples = [one for one in _retrieved(rows) if one.task == NEEDLE and one.depth is not None]
    forms = _grouped(samples, lambda one: one.group[2])
    kept = max(forms.values(), key=len, default=[])
    cells = _grouped(kept, lambda one: (one.side, one.group, round(one.depth or 0.0, 1)))
    return tuple(
        Needle(side, setting, form, length, depth, fmean(one.percent for one in members), len(members))
        for (side, (setting, length, form), depth), members in cells.items()
    )


def answers(rows: list[Row]) -> tuple[Answers, ...]:
    """Scores of every side by dtype, file and format."""
    found: list[Answers] = []
    for _, group in sorted(_grouped(rows, lambda row: (*_answer_place(row), str(row["cell"]["dtype"]))).items()):
        sides = _grouped(group, lambda row: side_of(row["cell"]))
        dense = next((sides[side] for side in _in_order(sides) if side.is_reference), [])
        for side in _in_order(sides):
            found.append(_answers(side, sides[side], dense))
    return tuple(found)


def _retrieved(rows: list[Row]) -> list[_Sample]:
    """Every sample that has a score, each once: of one measured again the newest."""
    found = {}
    for row in rows:
        cell, result = row["cell"], row["result"]
        score = number(result.get("score"))
        if score is None:
            continue
        group = str(cell["dtype"]), int(cell["length"]), str(cell["format"])
        name = cell.get("seed"), cell["sample"]
        share, depth = number(result.get("share_read")), number(result.get("depth"))
        sample = _Sample(side_of(cell), group, str(cell["task"]), name, 100 * score, share, depth)
        found[sample.side, group, sample.task, name] = sample
    return list(found.values())


def _scores(group: tuple[str, int, str], task: str, samples: list[_Sample], dense_fails: bool) -> Iterable[Score]:
    setting, length, form = group
    sides = _grouped(samples, lambda one: one.side)
    dense = next((sides[side] for side in _in_order(sides) if side.is_reference), [])
    for side in _in_order(sides):
        members = sides[side]
        mean = fmean(one.percent for one in members)
        over = None if side.is_reference else _paired(_by_name(members), _by_name(dense))
        low, high = wilson(mean, len(members))
        share = _mean(one.share_read for one in members)
        yield Score(side, setting, task, length, form, share, mean, low, high, len(members), dense_fails, over)


def _dense_fails(samples: list[_Sample]) -> bool | None:
    """Whether dense cannot do a task; None where it was not measured."""
    dense = [one.percent for one in samples if one.side.is_reference]
    return fmean(dense) < DENSE_FAILS_BELOW if dense else None


def _by_name(samples: list[_Sample]) -> dict[Hashable, float]:
    return {(one.task, one.name): one.percent for one in samples}


def _paired(side: dict[Hashable, float], dense: dict[Hashable, float]) -> Paired | None:
    changes = [percent - dense[name] for name, percent in side.items() if name in dense]
    if not changes:
        return None
    low, high = interval.of_samples(torch.tensor(changes, dtype=torch.float64))
    if low == high:
        # all alike: nothing to draw from, yet few samples prove little. The rule of three: what was never seen in n
        # samples happens in at most 3 of n, with 95 % confidence
        reach = 100 * min(1.0, 3 / len(changes))
        low, high = max(-100.0, low - reach), min(100.0, high + reach)
    return Paired(fmean(changes), low, high, len(changes))


def _answer_place(row: Row) -> tuple[str, str]:
    file = row["cell"]["file"]
    return str(file.get("name") if isinstance(file, dict) else file), str(row["cell"]["format"])


def _answers(side: Side, rows: list[Row], dense: list[Row]) -> Answers:
    file, form = _answer_place(rows[0])
    of_side, of_dense = _percents(rows, "f1"), _percents(dense, "f1")
    return Answers(
        side,
        str(rows[0]["cell"]["dtype"]),
        file,
        form,
        share_read=_mean(number(row["result"].get("share_read")) for row in rows),
        f1=_mean(of_side.values()),
        exact=_mean(_percents(rows, "exact").values()),
        rouge_l=_mean(_percents(rows, "rouge_l").values()),
        samples=len(of_side),
        over_dense=None if side.is_reference else _paired(of_side, of_dense),
    )


def _percents(rows: list[Row], name: str) -> dict[Hashable, float]:
    found = {row["cell"]["sample"]: number(row["result"].get(name)) for row in rows}
    return {sample: 100 * value for sample, value in found.items() if value is not None}


def _in_order(sides: dict[Side, Any]) -> list[Side]:
    return sorted(sides, key=lambda side: side.order)


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return fmean(kept) if kept else None


def _grouped(rows: Iterable[_Row], key: Callable[[_Row], _Key]) -> dict[_Key, list[_Row]]:
    found: dict[_Key, list[_Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found
