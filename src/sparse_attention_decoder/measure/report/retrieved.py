"""Pictures of retrieval: needles by depth and length, scores by task."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparse_attention_decoder.measure.report.numbers import Model
from sparse_attention_decoder.measure.report.panels import Legend, figure_of, shown, title
from sparse_attention_decoder.measure.report.samples import POOLED, Needle, Score
from sparse_attention_decoder.measure.report.sides import Side
from sparse_attention_decoder.measure.report.style import Mark, Palette, marks
from sparse_attention_decoder.measure.report.wording import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# inches a line of cells, a task, and what stands above and below them
_CELL, _TASK, _AROUND = 0.19, 0.3, 0.55
# of a task's line, which is 1 high, what the sides' points spread over
_SPREAD = 0.56
_MOST_TICKS = 4


def draw_needles(model: Model, palette: Palette) -> "Figure | None":
    """Needles found by depth and length, dense and every side beside each other."""
    if not model.needles:
        return None
    settings = sorted({one.setting for one in model.needles})
    places = sorted({(one.setting, one.side) for one in model.needles}, key=lambda place: (place[0], place[1].order))
    lengths = sorted({one.length for one in model.needles})
    depths = sorted({one.depth for one in model.needles})
    columns = min(2, len(places))
    figure, axes = figure_of(len(places), _CELL * len(depths) + _AROUND, columns, shared=True)
    for axis, (setting, side) in zip(axes, places, strict=True):
        here = [one for one in model.needles if (one.setting, one.side) == (setting, side)]
        title(axis, side.label, setting, settings)
        axis.title.set_fontsize(9.5)
        _cells(axis, here, lengths, depths, palette)
    figure.supxlabel("tokens; the number is the percentage found, none is 100", color=palette.muted, fontsize=9.5)
    figure.supylabel("depth in the text", color=palette.muted, fontsize=9.5)
    return figure


def _cells(
    axis: "Axes", found: Sequence[Needle], lengths: Sequence[int], depths: Sequence[float], palette: Palette
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    means = {(one.depth, one.length): one.mean for one in found}
    grid = [[means.get((depth, length), math.nan) for length in lengths] for depth in depths]
    axis.pcolormesh(
        grid, cmap=LinearSegmentedColormap.from_list("score", palette.heat), vmin=0, vmax=100,
        edgecolors=palette.background, linewidth=1.5,
    )  # fmt: skip
    for at, line in enumerate(grid):
        for column, mean in enumerate(line):
            if round(mean if mean == mean else 100) < 100:
                ink = palette.ink if mean < 60 else palette.background
                axis.text(
                    column + 0.5, at + 0.5, f"{mean:.0f}", ha="center", va="center_baseline", color=ink, fontsize=8.5
                )
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=9)
    step = -(-len(lengths) // _MOST_TICKS)
    kept = range(len(lengths) - 1, -1, -step)
    axis.set_xticks([at + 0.5 for at in kept], [tokens(lengths[at]) for at in kept])
    ends = sorted({0, len(depths) // 2, len(depths) - 1})
    axis.set_yticks([at + 0.5 for at in ends], [f"{100 * depths[at]:.0f}%" for at in ends])
    # the start of the text on top
    axis.set_ylim(len(depths), 0)


def draw_tasks(model: Model, palette: Palette) -> "Figure | None":
    """Mean score of every task, dense as a line with its interval, the sides as points; a panel for every length."""
    rows = model.retrieval
    if not rows:
        return None
    places = sorted({(row.setting, row.format, row.length) for row in rows})
    names = [POOLED] * any(row.task == POOLED for row in rows) + sorted({row.task for row in rows} - {POOLED})
    figure, axes = figure_of(len(places), _TASK * len(names) + _AROUND)
    legend, looks = Legend(), marks(model.drawn, palette)
    settings = [", ".join(place[:2]) for place in places]
    for axis, (setting, form, length) in zip(axes, places, strict=True):
        here = [row for row in rows if (row.setting, row.format, row.length) == (setting, form, length)]
        title(axis, f"{tokens(length)} tokens", f"{setting}, {form}", settings)
        _points(axis, here, names, looks, legend, palette)
    axes[-1].set_xlabel("mean score, percent")
    legend.place(figure)
    return figure


def _points(
    axis: "Axes", rows: Sequence[Score], names: Sequence[str], looks: dict[str, Mark], legend: Legend, palette: Palette
) -> None:
    others: list[Side] = sorted({row.side for row in rows if not row.side.is_reference}, key=lambda side: side.order)
    for row in rows:
        at = names.index(row.task)
        faint = 0.3 if row.dense_fails else 1.0
        if row.side.is_reference:
            band = axis.barh(at, row.high - row.low, 0.8, row.low, color=palette.grid, zorder=0.5, alpha=faint)
            line = axis.plot(
                [row.mean] * 2, [at - 0.4, at + 0.4], color=palette.colours["dense"], linewidth=2, alpha=faint
            )  # fmt: skip
            if not row.dense_fails:
                legend.add(row.side.label, line[0])
                legend.add("its 95% interval", band)
            continue
        shift = _SPREAD * ((others.index(row.side) + 0.5) / len(others) - 0.5)
        point = axis.plot([row.mean], [at + shift], **looks[row.side.label].point, alpha=faint, clip_on=False)
        if not row.dense_fails:
            legend.add(row.side.label, point[0])
    hopeless = {row.task for row in rows if row.dense_fails}
    axis.set_yticks(
        range(len(names)), [f"{shown(name)}\ndense cannot" if name in hopeless else shown(name) for name in names]
    )
    for name, text in zip(names, axis.get_yticklabels(), strict=True):
        text.set_fontsize(9.5 if name not in hopeless else 8.5)
        text.set_color(palette.muted if name in hopeless else palette.ink)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_xticks(range(0, 101, 25))
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
