"""Records as the numbers that are drawn and tabulated, model by model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.record import Row
from sparse_attention_decoder.measure.report.samples import Answers, Needle, Score, answers, needles, number, scores
from sparse_attention_decoder.measure.report.sides import DEFAULT, Side, side_of

Interval = tuple[float, float]
_COMMON = ("model", "dtype", "engine", "config")
# what a cell of each kind must name beside these
_NEEDED = {
    "speed": ("context", "batch", "threads", "device"),
    "agreement": ("context",),
    "retrieval": ("task", "length", "format", "sample"),
    "answers": ("file", "sample", "format"),
}
_Numbers = TypeVar("_Numbers")


@dataclass(frozen=True)
class Speed:
    """One side's time and memory in one context; shares of 1, milliseconds, seconds, bytes, nats.

    setting: dtype, device, threads, batch; sides are compared within one.
    over: this side's time per token over that of each dense side, by label; the same run's where it has both.
    """

    side: Side
    setting: str
    context: int
    over: dict[str, float]
    note: str
    share_read: float | None = None
    kl: float | None = None
    top1: float | None = None
    step_ms: float | None = None
    step_ms_low: float | None = None
    step_ms_high: float | None = None
    ceiling_ms: float | None = None
    over_ceiling: float | None = None
    ttft_s: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: float | None = None

    @property
    def best_dense(self) -> tuple[float, str] | None:
        """Time over that of the fastest dense side, and its label."""
        return max(((ratio, name) for name, ratio in self.over.items()), default=None)


@dataclass(frozen=True)
class Agreement:
    """How far one side strays from dense in one context; changes of cross-entropy in nats, of perplexity as shares."""

    side: Side
    setting: str
    context: int
    kl_ci: Interval | None
    top1_ci: Interval | None
    ppl_change_ci: Interval | None
    share_read: float | None = None
    index_share: float | None = None
    kl: float | None = None
    top1: float | None = None
    ppl_change: float | None = None
    retrieved: float | None = None
    mass: float | None = None
    recall: float | None = None
    error: float | None = None
    sparse_share: float | None = None


@dataclass(frozen=True)
class Model:
    """All that was measured with one model."""

    name: str
    speed: tuple[Speed, ...]
    agreement: tuple[Agreement, ...]
    retrieval: tuple[Score, ...]
    needles: tuple[Needle, ...]
    answers: tuple[Answers, ...]

    @property
    def sides(self) -> tuple[Side, ...]:
        """Every side, none twice, in the order of ideas."""
        rows: list[Speed | Agreement | Score | Answers] = [*self.speed, *self.agreement, *self.retrieval, *self.answers]
        return tuple(sorted({row.side for row in rows}, key=lambda side: side.order))

    @property
    def drawn(self) -> tuple[Side, ...]:
        """Those that are drawn each for itself; in the picture of agreement an idea's budgets are one line."""
        rows: list[Speed | Score] = [*self.speed, *self.retrieval]
        return tuple(sorted({row.side for row in rows}, key=lambda side: side.order))

    @property
    def subject(self) -> Side | None:
        """The side that sentences are about: the default, or else the first of ours that is not dense."""
        ours = [side for side in self.sides if side.is_ours and not side.is_dense]
        return next((side for side in ours if side.label == DEFAULT), ours[0] if ours else None)

    @property
    def subject_name(self) -> str:
        """What sentences call it."""
        return "the default" if self.subject is None or self.subject.label == DEFAULT else self.subject.label


@dataclass(frozen=True)
class Machine:
    """Where something was measured, as it said of itself."""

    name: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Numbers:
    """What a report is made of."""

    models: tuple[Model, ...]
    machines: tuple[Machine, ...]


def collect(rows: Iterable[Row]) -> Numbers:
    """The numbers in records as `record.read` returns them; kinds that no report shows are passed over.

    Raises:
        InputError: no measurement among them, or a cell without what its kind must name.
    """
    rows = list(rows)
    shown = [row for row in rows if row["kind"] in _NEEDED]
    for row in shown:
        _require(row)
    if not shown:
        raise InputError(f"no measurement among {len(rows)} records; expected kinds {', '.join(_NEEDED)}")
    names = dict.fromkeys(str(row["cell"]["model"]) for row in shown)
    models = tuple(_model(name, [row for row in shown if str(row["cell"]["model"]) == name]) for name in names)
    used = {row["machine"] for row in shown}
    machines = [row for row in rows if row["kind"] == "machine" and row["machine"] in used]
    return Numbers(
        models,
        tuple(Machine(str(row["machine"]), {k: str(v) for k, v in row["facts"].items()}) for row in machines),
    )


def _require(row: Row) -> None:
    if not isinstance(row.get("cell"), dict) or not isinstance(row.get("result"), dict):
        raise InputError(f"a record of kind {row['kind']} has no cell or no result; measure it again")
    lacking = [name for name in (*_COMMON, *_NEEDED[row["kind"]]) if name not in row["cell"]]
    if lacking:
        raise InputError(f"a record of kind {row['kind']} does not name its {', '.join(lacking)}; measure it again")


def _model(name: str, rows: list[Row]) -> Model:
    def of(kind: str) -> list[Row]:
        return [row for row in rows if row["kind"] == kind]

    return Model(
        name,
        speed=_ordered(_with_ratios([_speed(row) for row in of("speed")]), _place),
        agreement=_ordered((_agreement(row) for row in of("agreement")), _place),
        retrieval=scores(of("retrieval")),
        needles=needles(of("retrieval")),
        answers=answers(of("answers")),
    )


def _place(row: Speed | Agreement) -> tuple[Any, ...]:
    # the default first among its idea, then what reads most
    *idea, label = row.side.order
    return row.setting, row.context, *idea, -(row.share_read or 0), label


def _speed(row: Row) -> Speed:
    cell, result = row["cell"], row["result"]
    threads = f"{cell['threads']} thread{'s' * (cell['threads'] != 1)}"
    setting = f"{cell['dtype']}, {cell['device']}, {threads}, batch {cell['batch']}"
    over = {str(name): ratio for name, ratio in (result.get("over") or {}).items() if number(ratio)}
    note = str(result.get("note") or "")
    return Speed(side_of(cell), setting, int(cell["context"]), over, note, **_picked(Speed, result))


def _with_ratios(rows: list[Speed]) -> list[Speed]:
    """The rows with `over` of every dense side of their setting and context."""
    found = []
    for row in rows:
        same = [one for one in rows if (one.setting, one.context) == (row.setting, row.context)]
        over = {}
        for dense in same:
            if not dense.side.is_dense:
                continue
            ratio = row.over.get(dense.side.label)
            if ratio is None and row.step_ms and dense.step_ms:
                ratio = row.step_ms / dense.step_ms
            if ratio is not None:
                over[dense.side.label] = ratio
        found.append(replace(row, over=over))
    return found


def _agreement(row: Row) -> Agreement:
    cell, result = row["cell"], row["result"]
    return Agreement(
        side_of(cell),
        str(cell["dtype"]),
        int(cell["context"]),
        _pair(result.get("kl_ci")),
        _pair(result.get("top1_ci")),
        _pair(result.get("ppl_change_ci")),
        **_picked(Agreement, result),
    )


def _picked(kind: type, result: Row) -> dict[str, Any]:
    """The numbers of a result that a dataclass has optional fields for."""
    names = [field.name for field in fields(kind) if field.default is None]
    return {name: number(result.get(name)) for name in names}


def _pair(value: object) -> Interval | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def _ordered(rows: Iterable[_Numbers], key: Callable[[_Numbers], Any]) -> tuple[_Numbers, ...]:
    return tuple(sorted(rows, key=key))
