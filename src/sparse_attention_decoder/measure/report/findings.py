"""What the numbers say, in sentences: above the report, below its pictures, and for whoever cannot see them."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from sparse_attention_decoder.measure.report.numbers import Agreement, Model, Numbers, Speed
from sparse_attention_decoder.measure.report.samples import POOLED, Score
from sparse_attention_decoder.measure.report.sides import STOCK, Side
from sparse_attention_decoder.measure.report.wording import (
    change,
    gigabytes,
    listed,
    milliseconds,
    percent,
    plain,
    signed,
    small,
    tokens,
)

_InContext = TypeVar("_InContext", Speed, Agreement)
# models that get a sentence each; of more, one sentence names the worst
SINGLE = 2


def summary(numbers: Numbers) -> list[str]:
    """Three to five sentences: what was measured, what is read and lost for which time, what retrieval keeps."""
    found = [_scope(numbers)]
    heads = [text for model in numbers.models if (text := _head(model))]
    found += heads if len(heads) <= SINGLE else _range(numbers.models)
    if retrieval := _retrieval_overall(numbers.models):
        found.append(retrieval)
    found += [text for model in numbers.models[:1] if (text := crossover(model))]
    return found


def quality(model: Model) -> str:
    """Of the longest context: the subject, and the best of what reads no more."""
    row = _longest(model.agreement, model.subject)
    if row is None or row.kl is None or row.share_read is None:
        return "KL to dense against the bytes read, of which less is better on both axes."
    text = (
        f"At {tokens(row.context)} tokens {model.subject_name} reads {percent(row.share_read)} of the bytes "
        f"at a KL of {small(row.kl)}"
    )
    same = [one for one in model.agreement if (one.setting, one.context) == (row.setting, row.context)]
    rivals = [
        one for one in same if one.side.idea != row.side.idea and one.kl is not None and one.share_read is not None
    ]
    no_more = [one for one in rivals if (one.share_read or 0) <= row.share_read]
    if not no_more:
        return f"{text}; no other idea that was measured reads as little."
    best = min(no_more, key=lambda one: one.kl or 0)
    return f"{text}; the best other idea that reads no more, {best.side.label}, is at {small(best.kl)}."


def time(model: Model) -> str:
    """Of the longest context: the subject, the best dense side, the ceiling."""
    row = _longest(model.speed, model.subject)
    if row is None or row.step_ms is None:
        return "Median time per token against context."
    text = f"At {tokens(row.context)} tokens {model.subject_name} takes {milliseconds(row.step_ms)} ms a token"
    if row.best_dense:
        ratio, name = row.best_dense
        text += f", {plain(ratio, 2)} of the best dense ({name})"
    if row.over_ceiling:
        text += f" and {plain(row.over_ceiling, 1)} times the least that memory allows"
    return f"{text}."


def memory(model: Model) -> str:
    """Of the longest context: the subject's peak and transformers'."""
    row = _longest([one for one in model.speed if one.peak_bytes], model.subject)
    if row is None:
        return "Peak memory against context."
    text = f"At {tokens(row.context)} tokens {model.subject_name} peaks at {gigabytes(row.peak_bytes)} GB"
    stock = [one for one in _beside(model, row) if one.side.idea == STOCK and one.peak_bytes]
    return f"{text}, transformers at {gigabytes(stock[0].peak_bytes)} GB." if stock else f"{text}."


def crossover(model: Model) -> str:
    """From which context on the subject is faster than the best dense side, as far as was measured."""
    row = _longest(model.speed, model.subject)
    if row is None:
        return ""
    mine = [one for one in model.speed if (one.side, one.setting) == (row.side, row.setting) and one.best_dense]
    if not mine:
        return ""
    ratios = {one.context: one.best_dense[0] for one in mine if one.best_dense}
    faster: list[int] = []
    for context in sorted(ratios, reverse=True):
        if ratios[context] >= 1:
            break
        faster.append(context)
    last = max(ratios)
    name = f"On {model.name} {model.subject_name}"
    if not faster:
        return (
            f"{name} is not faster than the best dense at {tokens(last)} tokens ({plain(ratios[last], 2)} of its time)."
        )
    since = "at every context measured" if len(faster) == len(ratios) else f"from {tokens(faster[-1])} tokens on"
    return f"{name} is faster than the best dense {since} ({plain(ratios[last], 2)} of its time at {tokens(last)})."


def needles(model: Model) -> str:
    """Mean over depths and lengths: dense, the subject and the worst."""
    means = {}
    for side in dict.fromkeys(one.side for one in model.needles):
        cells = [one for one in model.needles if one.side == side]
        means[side] = sum(one.mean * one.samples for one in cells) / sum(one.samples for one in cells)
    dense = next((side for side in means if side.is_reference), None)
    shown = [side for side in dict.fromkeys((dense, model.subject)) if side in means]
    rest = {side: mean for side, mean in means.items() if side not in shown}
    if rest:
        shown.append(min(rest, key=lambda side: rest[side]))
    parts = [f"{side.label} {plain(means[side], 0)}%" for side in shown if side]
    return f"Needles found, mean over depths and lengths: {', '.join(parts)}."


def retrieval(model: Model) -> str:
    """Of the longest length: the subject against dense over what dense can do, and what it cannot."""
    rows = [one for one in model.retrieval if one.side == model.subject and one.over_dense]
    pooled = [one for one in rows if one.task == POOLED] or [one for one in rows if not one.dense_fails]
    text = ""
    if pooled:
        row = max(pooled, key=lambda one: one.length)
        text = f"At {tokens(row.length)} tokens {model.subject_name} scores {_against(row)}."
    failed = sorted({one.task for one in model.retrieval if one.dense_fails})
    if failed:
        text += f" Dense cannot do {listed(failed)}, at one length at least: a score there says nothing."
    return text.strip() or "Mean score by task."


def _against(row: Score) -> str:
    over = row.over_dense
    assert over is not None
    ends = f"{signed(over.low)} to {signed(over.high)}"
    what = "over all tasks that dense can do" if row.task == POOLED else f"in {row.task}"
    return f"{plain(row.mean, 1)}% {what}, {signed(over.mean)} points from dense ({ends}, {over.samples} pairs)"


def _scope(numbers: Numbers) -> str:
    models = numbers.models
    found = {row.context for model in models for row in model.speed}
    found |= {row.context for model in models for row in model.agreement}
    contexts = sorted(found | {row.length for model in models for row in model.retrieval})
    sides = {side.label for model in models for side in model.sides}
    names = listed([model.name for model in models])
    where = f", contexts from {tokens(contexts[0])} to {tokens(contexts[-1])} tokens" if len(contexts) > 1 else ""
    return f"Measured: {names}{where}, {len(sides)} ways of decoding."


def _head(model: Model) -> str:
    """`On SmolLM2 at 7,000 tokens the default reads 17.6% of the bytes: KL 0.0008, ...`."""
    parts, place, share = [], None, None
    row, speed = _longest(model.agreement, model.subject), _longest(model.speed, model.subject)
    if row is not None:
        place, share = row.context, row.share_read
        parts += [f"KL {small(row.kl)}"] if row.kl is not None else []
        parts += [f"top-1 {plain(row.top1, 2)}"] if row.top1 is not None else []
        parts += [f"perplexity {change(row.ppl_change)}"] if row.ppl_change is not None else []
    if speed is not None and (told := _time_ratio(speed)):
        # a ratio from elsewhere says so: another context, or another dtype of the weights
        if place not in (None, speed.context):
            told = f"at {tokens(speed.context)} tokens {told}"
        dtype = speed.setting.split(",")[0]
        parts.append(f"{told} in {dtype}" if row is not None and row.setting != dtype else told)
        place, share = place or speed.context, share if share is not None else speed.share_read
    if place is None or share is None or not parts:
        return ""
    return (
        f"On {model.name} at {tokens(place)} tokens {model.subject_name} reads {percent(share)} of the bytes: "
        f"{', '.join(parts)}."
    )


def _time_ratio(row: Speed) -> str:
    if STOCK in row.over:
        return f"{plain(row.over[STOCK], 2)} of transformers' time per token"
    if row.best_dense:
        return f"{plain(row.best_dense[0], 2)} of the time per token of {row.best_dense[1]}"
    return ""


def _range(models: Sequence[Model]) -> list[str]:
    """Of many models, each in its longest context: the spread, and who is worst."""
    found = []
    rows = [(model.name, row) for model in models if (row := _longest(model.agreement, model.subject))]
    read = [row.share_read for _, row in rows if row.share_read is not None]
    if read:
        name, worst = max(rows, key=lambda pair: pair[1].kl or 0)
        found.append(
            f"At each one's longest context the default reads {percent(min(read))} to {percent(max(read))} "
            f"of the bytes; the worst KL is {small(worst.kl)} ({name}, top-1 {plain(worst.top1, 2)}, "
            f"perplexity {change(worst.ppl_change)})."
        )
    timed = [(model.name, one) for model in models if (one := _longest(model.speed, model.subject))]
    ratios = sorted((one.over[STOCK], name) for name, one in timed if STOCK in one.over)
    if ratios:
        (low, fastest), (high, slowest) = ratios[0], ratios[-1]
        found.append(
            f"It takes {plain(low, 2)} ({fastest}) to {plain(high, 2)} ({slowest}) of transformers' time per token."
        )
    return found


def _retrieval_overall(models: Sequence[Model]) -> str:
    """The model and length where the subject loses most against dense."""
    rows = [
        (row.over_dense.mean, model, row)
        for model in models
        for row in model.retrieval
        if row.task == POOLED and row.side == model.subject and row.over_dense
    ]
    if not rows:
        return ""
    _, model, row = min(rows, key=lambda found: found[0])
    which = "Retrieval where it suffers most" if len(rows) > 1 else "Retrieval"
    where = f"on {model.name} at {tokens(row.length)} tokens"
    return f"{which}, {where}: {model.subject_name} scores {_against(row)}."


def _longest(rows: Iterable[_InContext], side: Side | None) -> _InContext | None:
    return max((row for row in rows if row.side == side), key=lambda row: row.context, default=None)


def _beside(model: Model, row: Speed) -> list[Speed]:
    return [one for one in model.speed if (one.setting, one.context) == (row.setting, row.context)]
