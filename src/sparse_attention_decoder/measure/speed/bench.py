"""The bench: sides in turns on one prompt, medians, what they read, the physical ceiling beside it."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import InputError, WorkerError
from sparse_attention_decoder.measure.compare import STOCK, TURN
from sparse_attention_decoder.measure.record import OURS, Records, Row, as_cell, label


def baselines(kv_dtype: str | None) -> tuple[AttentionConfig, ...]:
    """The dense ones on our cache: our kernel, and PyTorch's SDPA, which reads no packed cache."""
    ours = AttentionConfig(policy="dense", kv_dtype=kv_dtype)
    return (ours,) if kv_dtype else (ours, replace(ours, backend="reference"))


@dataclass(frozen=True)
class Setting:
    """One prompt on one set of weights: where sides meet.

    name: the model as records call it. model: what `load` takes.
    ids: B passages of `context + (rounds + 1) * TURN` token ids.
    bandwidth_gb_s: of this machine. Measured outside the sides: what it allocates is no part of their memory.
    weights, kv_dtype, compile: how our sides keep weights, keys and values, and whether their steps are compiled;
        transformers' side is plain.
    """

    name: str
    model: str | None
    dtype: str
    device: str
    threads: int
    context: int
    rounds: int
    ids: list[list[int]]
    bandwidth_gb_s: float
    weights: str | None = None
    kv_dtype: str | None = None
    compile: bool = False

    def cell(self, engine: str, config: Row) -> Row:
        """What names a side's measurement here."""
        own = {"weights": self.weights, "compile": self.compile} if engine == OURS else {}
        return {
            "model": self.name, "dtype": self.dtype, "engine": engine, "config": config, "context": self.context,
            "batch": len(self.ids), "threads": self.threads, "device": self.device,
            **{name: value for name, value in own.items() if value},
        }  # fmt: skip

    def piece(self, start: int, count: int) -> list[list[int]]:
        """Token ids [B, count] from `start` on."""
        return [row[start : start + count] for row in self.ids]


@dataclass
class Side:
    """One way of decoding, and what was seen of it.

    turn: decodes ids [B, N] behind so many tokens; says ms and the preferred tokens.
    finish: ends it; says its peak memory, unless `facts` has it.
    is_fed: it goes on with the tokens it is given, and not with those it prefers.
    ms: of every timed step; the warm-up's are not among them.
    facts: what it said of itself: time to first token, first step, peak memory, a note.
    """

    cell: Row
    turn: Callable[[int, list[list[int]]], Row]
    finish: Callable[[], Row] = dict
    is_fed: bool = True
    ms: list[float] = field(default_factory=list)
    facts: Row = field(default_factory=dict)
    reads: dict[str, float] = field(default_factory=dict)
    kl: float | None = None
    same: int = 0
    same_as_stock: int = 0
    compared: int = 0


@dataclass(frozen=True)
class Ceiling:
    """What must be read for one token at least, and how long this machine's memory takes for it.

    weight_bytes: of the weights that a step reads.
    dense_bytes: keys and values of the whole context.
    near_bytes: those of sinks and window, the least that sparse reads: its index and what it retrieves come on top.
    """

    bandwidth_gb_s: float
    weight_bytes: int
    dense_bytes: int
    near_bytes: int

    def ms(self, kv_bytes: float) -> float:
        """Milliseconds for the weights and so many bytes of keys, values and index."""
        return (self.weight_bytes + kv_bytes) / self.bandwidth_gb_s / 1e6


@dataclass(frozen=True)
class Listener:
    """Told what goes on: a stage in words, the ceiling before anything is timed, tokens done of all."""

    stage: Callable[[str], None]
    ceiling: Callable[[Setting, Ceiling], None]
    progress: Callable[[int, int], None]


def missing(setting: Setting, configs: list[AttentionConfig], records: Records) -> list[AttentionConfig]:
    """The configs that have no record yet, and can be sparse in this context."""
    return [
        config for config in configs
        if config not in baselines(setting.kv_dtype) and config.budget_tokens < setting.context
        and not records.has("speed", setting.cell(OURS, as_cell(config)))
    ]  # fmt: skip


def measure(
    setting: Setting, configs: list[AttentionConfig], ours: Any, stock: Any, peers: list[Side], listener: Listener
) -> Iterator[tuple[Row, Row]]:
    """Measure the dense baselines, the configs and the peers side by side.

    Args:
        configs: sparse ones, beside the baselines.
        ours, stock: the workers' processes, to be asked. peers: other programs that have read the prompt.
    Yields:
        (cell, result) of every side, when all are done.
    Raises:
        InputError: the sides' weights or threads differ, or a sparse config read everything.
    """
    listener.stage("loading the model, once for us and once for transformers")
    facts = _load(setting, ours, stock)
    listener.stage(f"reading {setting.context} tokens")
    held = [*baselines(setting.kv_dtype), *configs]
    prefill = ours.ask("read", ids=setting.piece(0, setting.context), configs=[asdict(config) for config in held])
    ceiling = _ceiling(setting, facts, prefill)
    listener.ceiling(setting, ceiling)
    sides = [_our_side(setting, ours, number, config) for number, config in enumerate(held)]
    # dense last: the next round stands on what it wrote
    for number in reversed(range(len(held))):
        listener.stage(f"first step of {label(sides[number].cell)}")
        first = ours.ask("begin", side=number)
        peak = max(first.pop("peak_bytes"), prefill["peak_bytes"])
        sides[number].facts = {**prefill, **first, "peak_bytes": peak}
        sides[number].facts["ttft_s"] = prefill["prefill_s"] + first["first_step_ms"] / 1e3
    listener.stage("transformers reads the prompt")
    theirs = Side(setting.cell(STOCK, {}), lambda at, ids: stock.ask("turn", ids=ids), lambda: stock.ask("finish"))
    theirs.facts = stock.ask("read", ids=setting.piece(0, setting.context))
    everyone = _rounds(setting, [theirs, *peers, *sides], ours, listener)
    for side in everyone:
        side.facts |= side.finish()
    for side in everyone:
        yield side.cell, _result(setting, side, ceiling, everyone)


def _load(setting: Setting, ours: Any, stock: Any) -> Row:
    asked = {"model": setting.model, "dtype": setting.dtype, "device": setting.device, "threads": setting.threads}
    facts: Row = ours.ask("load", **asked, weights=setting.weights, compile=setting.compile)
    theirs = stock.ask("load", **asked)
    # packed weights are others than the plain ones
    for name in ("threads",) if setting.weights else ("fingerprint", "threads"):
        if facts[name] != theirs[name]:
            raise InputError(f"the sides differ in {name}: ours {facts[name]}, transformers {theirs[name]}")
    return facts


def _ceiling(setting: Setting, facts: Row, prefill: Row) -> Ceiling:
    config = AttentionConfig()
    near = (config.sink_tokens + config.attention_window) / setting.context
    kv = prefill["kv_bytes"]
    return Ceiling(setting.bandwidth_gb_s, facts["weight_bytes"], kv, int(kv * min(1.0, near)))


def _our_side(setting: Setting, ours: Any, number: int, config: AttentionConfig) -> Side:
    def turn(at: int, ids: list[list[int]]) -> Row:
        answer: Row = ours.ask("turn", side=number, at=at, ids=ids)
        return answer

    return Side(setting.cell(OURS, as_cell(config)), turn)


def _rounds(setting: Setting, sides: list[Side], ours: Any, listener: Listener) -> list[Side]:
    """Turns of all sides; the first round warms up and is not counted. A peer that fails is left out of the rest."""
    listener.stage("decoding in turns")
    anchor = _anchor(sides)
    numbers = {str(at): side for at, side in enumerate(side for side in sides if side.cell["engine"] == OURS)}
    others = [side for side in sides if side is not anchor]
    total = (setting.rounds + 1) * len(sides)
    for number in range(setting.rounds + 1):
        at, first = setting.context + number * TURN, number % len(others)
        answers: list[tuple[Side, Row]] = []
        # another one begins every time
        for side in [*others[first:], *others[:first], anchor]:
            try:
                answers.append((side, side.turn(at, setting.piece(at, TURN))))
            except WorkerError as error:
                if side.cell["engine"] in (OURS, STOCK):
                    raise
                listener.stage(f"left out: {error}")
                others.remove(side)
            listener.progress(min(total, number * len(sides) + len(answers)), total)
        strayed = ours.ask("compare")
        if number == 0:
            continue
        plain = next(answer for side, answer in answers if side.cell["engine"] == STOCK)
        for side, answer in answers:
            _count(side, answer, answers[-1][1], plain)
        for key, kl in strayed.items():
            numbers[key].kl = (numbers[key].kl or 0.0) + kl
    return [side for side in sides if side is anchor or side in others]


def _count(side: Side, answer: Row, dense: Row, stock: Row) -> None:
    side.ms += answer["ms"]
    for own, expected, plain in zip(answer["tokens"], dense["tokens"], stock["tokens"], strict=True):
        side.same += sum(one == other for one, other in zip(own, expected, strict=True))
        side.same_as_stock += sum(one == other for one, other in zip(own, plain, strict=True))
        side.compared += len(own)
    for name, value in answer.get("reads", {}).items():
        side.reads[name] = side.reads.get(name, 0) + value


def _result(setting: Setting, side: Side, ceiling: Ceiling, everyone: list[Side]) -> Row:
    median = statistics.median(side.ms)
    tenths = statistics.quantiles(side.ms, n=10, method="inclusive")
    result: Row = {
        "ttft_s": side.facts["ttft_s"], "prefill_s": side.facts.get("prefill_s"),
        "first_step_ms": side.facts.get("first_step_ms"),
        "step_ms": median, "step_ms_low": tenths[0], "step_ms_high": tenths[-1], "steps": len(side.ms),
        "tokens_per_s": len(setting.ids) / median * 1e3,
        "peak_bytes": side.facts.get("peak_bytes"), "bandwidth_gb_s": ceiling.bandwidth_gb_s,
        "over": {label(other.cell): median / statistics.median(other.ms) for other in everyone if _is_dense(other)},
        "note": side.facts.get("note", ""),
    }  # fmt: skip
    if side.cell["engine"] == OURS:
        result |= _read(side, ceiling)
    elif side.cell["engine"] == STOCK:
        result |= _read_all(ceiling)
    if "ceiling_ms" in result:
        result["over_ceiling"] = median / result["ceiling_ms"]
    if side.is_fed and side is not _anchor(everyone):
        result["top1"] = side.same / side.compared
    if side.is_fed and side.cell["engine"] != STOCK:
        result["top1_stock"] = side.same_as_stock / side.compared
    if side.kl is not None:
        # rounding can take it below 0
        result["kl"] = max(0.0, side.kl / side.compared)
    return result


def _anchor(everyone: list[Side]) -> Side:
    """Dense on our cache, by our kernel: what the others are compared with."""
    return next(side for side in everyone if side.cell["engine"] == OURS)


def _is_dense(side: Side) -> bool:
    return bool(side.cell["engine"] == STOCK or side.cell["config"].get("policy") == "dense")


def _read(side: Side, ceiling: Ceiling) -> Row:
    """Bytes that a side on our cache read, a step; sparse sides must have been sparse."""
    config, reads, steps = AttentionConfig(**side.cell["config"]), side.reads, len(side.ms)
    if config.policy != "dense" and not reads["sparse_steps"]:
        raise InputError(
            f"{label(side.cell)} read everything: dense would be compared with dense; take a longer context"
        )
    found = (reads["bytes_read"] + reads["index_bytes"]) / steps
    tokens = reads["tokens_read"] / (reads["steps"] * side.facts["heads"])
    near = config.sink_tokens + config.attention_window
    return {
        "weight_bytes": ceiling.weight_bytes, "kv_bytes": ceiling.dense_bytes,
        "bytes_per_token": found, "index_bytes": reads["index_bytes"] / steps,
        "dense_bytes_per_token": reads["bytes_dense"] / steps,
        "share_read": (reads["bytes_read"] + reads["index_bytes"]) / reads["bytes_dense"],
        "sparse_share": reads["sparse_steps"] / reads["steps"],
        "retrieved": tokens - near if config.policy != "dense" else None,
        "ceiling_ms": ceiling.ms(found),
    }  # fmt: skip


def _read_all(ceiling: Ceiling) -> Row:
    dense = ceiling.dense_bytes
    return {
        "weight_bytes": ceiling.weight_bytes, "kv_bytes": dense, "bytes_per_token": dense, "index_bytes": 0,
        "dense_bytes_per_token": dense, "share_read": 1.0, "sparse_share": 0.0, "retrieved": None,
        "ceiling_ms": ceiling.ms(dense),
    }  # fmt: skip
