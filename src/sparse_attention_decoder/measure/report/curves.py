"""Pictures against context or bytes read: quality, time, memory, crossover."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sparse_attention_decoder.measure.report.numbers import Agreement, Model, Speed
from sparse_attention_decoder.measure.report.panels import Legend, context_axis, figure_of, title
from sparse_attention_decoder.measure.report.sides import Side
from sparse_attention_decoder.measure.report.style import CEILING, Palette, mark, marks
from sparse_attention_decoder.measure.report.wording import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
# above this ratio of the largest to the smallest value an axis is logarithmic
_WIDE = 10.0
PANEL = 2.3


def draw_quality(model: Model, palette: Palette) -> "Figure | None":
    """KL against the share of bytes read, a line for every idea over its budgets, a panel for every context."""
    rows = [row for row in model.agreement if (row.kl or 0) > 0 and (row.share_read or 0) > 0]
    places = sorted({(row.setting, row.context) for row in rows})
    if not rows:
        return None
    figure, axes = figure_of(len(places), PANEL if len(places) == 1 else 0.85 * PANEL, shared=True)
    legend = Legend()
    for axis, (setting, context) in zip(axes, places, strict=True):
        here = [row for row in rows if (row.setting, row.context) == (setting, context)]
        title(axis, f"{tokens(context)} tokens", setting, [place[0] for place in places])
        for side, by_threshold, line in _series(here):
            drawn = mark(side, palette, "none" if side.idea in _twofold(rows) and not by_threshold else "full")
            found = axis.plot(_values(line, "share_read"), _values(line, "kl"), **drawn.line)
            legend.add(_series_name(side, by_threshold, rows), found[0])
        subject = [row for row in here if row.side == model.subject]
        if subject:
            ring = mark(subject[0].side, palette).point | {"markersize": 13, "fillstyle": "none"}
            found = axis.plot(_values(subject, "share_read"), _values(subject, "kl"), **ring)
            legend.add(model.subject_name, found[0])
        axis.set_ylabel("KL to dense, nats")
    _share_axis(axes, [row.share_read or 1 for row in rows])
    _decades(axes, [row.kl or 1 for row in rows])
    axes[-1].set_xlabel("bytes read, scoring included, over dense")
    legend.place(figure)
    return figure


def draw_time(model: Model, palette: Palette) -> "Figure | None":
    """Milliseconds per token against context, with the least that memory allows for dense and for the subject."""
    return _against_context(model, palette, "step_ms", 1.0, "ms per token")


def draw_memory(model: Model, palette: Palette) -> "Figure | None":
    """Peak memory against context."""
    return _against_context(model, palette, "peak_bytes", 1e-9, "peak memory, GB")


def draw_crossover(model: Model, palette: Palette) -> "Figure | None":
    """Time of the sparse sides over that of the fastest dense one, against context."""
    rows = [row for row in model.speed if not row.side.is_dense and row.best_dense]
    if not rows:
        return None
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure, axes = figure_of(len(settings), PANEL)
    legend, looks = Legend(), marks(model.drawn, palette)
    for axis, setting in zip(axes, settings, strict=True):
        here = [row for row in rows if row.setting == setting]
        title(axis, "", setting, settings)
        axis.set_yscale("log")
        axis.axhline(1, color=palette.ink, linewidth=1.2)
        for side, line in _lines(here):
            ratios = [row.best_dense[0] for row in line if row.best_dense]
            found = axis.plot(_values(line, "context"), ratios, **looks[side.label].line)
            legend.add(side.label, found[0])
        _ratio_axis(axis, [row.best_dense[0] for row in here if row.best_dense])
        context_axis(axis, {row.context for row in model.speed})
        axis.annotate(
            "faster than the best dense", (1, 1), (-2, -3), ("axes fraction", "data"), "offset points",
            ha="right", va="top", color=palette.muted, fontsize=9.5,
        )  # fmt: skip
        axis.set_ylabel("time over best dense")
    axes[-1].set_xlabel("context, tokens")
    legend.place(figure)
    return figure


def _against_context(model: Model, palette: Palette, field: str, scale: float, name: str) -> "Figure | None":
    rows = [row for row in model.speed if getattr(row, field)]
    if not rows:
        return None
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure, axes = figure_of(len(settings), PANEL)
    legend, looks = Legend(), marks(model.drawn, palette)
    for axis, setting in zip(axes, settings, strict=True):
        here = [row for row in rows if row.setting == setting]
        title(axis, "", setting, settings)
        for side, line in _lines(here):
            values = [scale * value for value in _values(line, field)]
            found = axis.plot(_values(line, "context"), values, **looks[side.label].line)
            legend.add(side.label, found[0])
        if field == "step_ms":
            _ceilings(axis, model, here, palette, legend)
        _value_axis(axis)
        context_axis(axis, {row.context for row in rows})
        axis.set_ylabel(name)
    axes[-1].set_xlabel("context, tokens")
    legend.place(figure)
    return figure


def _ceilings(axis: "Axes", model: Model, rows: list[Speed], palette: Palette, legend: Legend) -> None:
    """What reading alone takes at this machine's bandwidth: of dense, and of what the subject reads."""
    reference = next((row.side for row in rows if row.side.is_dense and row.ceiling_ms), None)
    for side, name in ((reference, "dense"), (model.subject, model.subject_name)):
        line = [row for row in rows if row.side == side and row.ceiling_ms]
        if side is None or not line:
            continue
        colour = palette.colours["dense"] if side == reference else palette.colours.get(side.idea, palette.muted)
        found = axis.plot(
            _values(line, "context"), _values(line, "ceiling_ms"),
            color=colour, linestyle=CEILING, linewidth=1.3, marker="_" if len(line) == 1 else "",
        )  # fmt: skip
        legend.add(f"bytes / bandwidth, {name}", found[0])


def _lines(rows: Sequence[Speed]) -> Iterable[tuple[Side, list[Speed]]]:
    for side in sorted({row.side for row in rows}, key=lambda side: side.order):
        yield side, sorted((row for row in rows if row.side == side), key=lambda row: row.context)


def _series(rows: Sequence[Agreement]) -> Iterable[tuple[Side, bool, list[Agreement]]]:
    """The budgets of every idea in the order of bytes; a threshold and a fixed number are two series."""
    found: dict[tuple[str, bool], list[Agreement]] = {}
    for row in sorted(rows, key=lambda row: row.side.order):
        found.setdefault((row.side.idea, row.side.by_threshold), []).append(row)
    for (_, by_threshold), line in found.items():
        yield line[0].side, by_threshold, sorted(line, key=lambda row: row.share_read or 0)


def _twofold(rows: Sequence[Agreement]) -> set[str]:
    """Ideas that were measured both by threshold and by number."""
    return {row.side.idea for row in rows if row.side.by_threshold} & {
        row.side.idea for row in rows if not row.side.by_threshold
    }


def _series_name(side: Side, by_threshold: bool, rows: Sequence[Agreement]) -> str:
    if side.idea in _twofold(rows):
        return f"{side.idea}, {'threshold' if by_threshold else 'fixed number'}"
    return f"{side.idea} (evicts)" if side.evicts else side.idea


def _share_axis(axes: "Sequence[Axes]", shares: Sequence[float]) -> None:
    low, high = min(shares) / 1.25, max(1.0, *shares) * 1.08
    ticks = [share for share in _SHARES if low <= share <= high]
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{100 * share:g}%" for share in ticks])
        axis.minorticks_off()
        axis.set_xlim(low, high)


def _decades(axes: "Sequence[Axes]", values: Sequence[float]) -> None:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    step = 1 + (high - low) // 5
    ticks = [10.0**power for power in range(low, high + 1, step)]
    for axis in axes:
        axis.set_yscale("log")
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(10.0**low, 10.0**high)


def _ratio_axis(axis: "Axes", ratios: Sequence[float]) -> None:
    low, high = min(0.5, *ratios) / 1.1, max(1.15, *ratios) * 1.1
    ticks = [ratio for ratio in _RATIOS if low <= ratio <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(low, high)


def _value_axis(axis: "Axes") -> None:
    values = [value for line in axis.get_lines() for value in _finite(line.get_ydata())]
    if max(values) <= _WIDE * min(values):
        axis.set_ylim(0, 1.06 * max(values))
        axis.locator_params(axis="y", nbins=5)
        return
    axis.set_yscale("log")
    low, high = min(values) / 1.2, max(values) * 1.2
    ticks = [
        lead * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for lead in (1, 2, 5)
        if low <= lead * 10.0**power <= high
    ]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(low, high)


def _values(rows: Sequence[Speed] | Sequence[Agreement], field: str) -> list[float]:
    return [float(getattr(row, field)) for row in rows]


def _finite(values: Any) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]
