"""What all pictures share: panels below each other, an axis of contexts, a legend below."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparse_attention_decoder.measure.report.style import WIDTH
from sparse_attention_decoder.measure.report.wording import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# inches
_LEGEND_LINE, _AXIS_LABEL = 0.205, 0.3
_TICKS = 5


@dataclass
class Legend:
    """Names and what stands for them, each name once, in the order of coming."""

    handles: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, handle: Any) -> None:
        """Take a name up, if it is new."""
        self.handles.setdefault(name, handle)

    def place(self, figure: "Figure", columns: int = 2) -> None:
        """Below the panels, in as many columns as fit; the figure grows by its height."""
        if not self.handles:
            return
        labels = [shown(name) for name in self.handles]
        drawn = figure.legend(list(self.handles.values()), labels, loc="outside lower left", ncols=columns)
        if drawn.get_window_extent().width > figure.bbox.width and columns > 1:
            drawn.remove()
            self.place(figure, columns - 1)
            return
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + _LEGEND_LINE * -(-len(labels) // columns))


def figure_of(count: int, height: float, columns: int = 1, shared: bool = False) -> "tuple[Figure, list[Axes]]":
    """A figure of `count` panels, each so many inches high. shared: they have one pair of axes."""
    from matplotlib.figure import Figure

    lines = -(-count // columns)
    figure = Figure(figsize=(WIDTH, lines * height + _AXIS_LABEL), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=shared, sharey=shared)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def title(axis: "Axes", name: str, setting: str, settings: Iterable[str]) -> None:
    """A panel's title; the setting is part of it where there are several."""
    parts = [name] if name else []
    if len(set(settings)) > 1:
        parts.append(shown(setting))
    axis.set_title(", ".join(parts))


def context_axis(axis: "Axes", contexts: Iterable[int]) -> None:
    """Contexts by their doubling; a tick at those that were measured, five at most."""
    found = sorted(set(contexts))
    axis.set_xscale("log", base=2)
    ticks = _thinned(found)
    axis.set_xticks(ticks, [tokens(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(found[0] / 1.15, found[-1] * 1.15)


def shown(text: str) -> str:
    """Text from records as the pictures' font can write it."""
    return text.encode("ascii", "replace").decode()


def _thinned(values: Sequence[int]) -> list[int]:
    """At most five, the last among them."""
    step = -(-len(values) // _TICKS)
    return list(values[::-1][::step][::-1])
