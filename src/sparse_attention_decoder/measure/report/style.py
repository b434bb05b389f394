"""How pictures look: two palettes, a colour and a marker per idea, the same in every picture."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparse_attention_decoder.measure.report.sides import STOCK, Side

# inches; a picture this wide shrinks to 360 px with letters of 11 px
WIDTH = 4.7
DOTS_PER_INCH = 200
DASHES = (0, (4, 1.6))
CEILING = (0, (1.5, 1.5))
# sides of one idea differ in how their marker is filled
_FILLS = ("full", "none", "left", "bottom", "right", "top")
_MARKERS = {
    STOCK: "s", "llama.cpp": "P", "openvino": "X", "vllm": "d", "dense": "D", "sketch": "o", "oracle": "*",
    "quest": "^", "window": "v", "snapkv": "p", "h2o": "h", "streaming": "<", "kvpress": ">",
}  # fmt: skip
_OTHER = "8"


@dataclass(frozen=True)
class Palette:
    """Colours of the light or the dark variant. colours: by idea; heat: from a score of 0 to one of 100."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    colours: dict[str, str]
    heat: tuple[str, str]


# hues after Okabe and Ito (told apart by the colour blind), darkened or lightened to 3:1 against the background
LIGHT = Palette(
    "light", "#ffffff", "#1b2127", "#59636e", "#e3e7eb",
    {
        STOCK: "#6e4b1f", "llama.cpp": "#a8326e", "openvino": "#7a5cc0", "vllm": "#5f6b00", "dense": "#1b2127",
        "sketch": "#0067b1", "oracle": "#a87600", "quest": "#c74e00", "window": "#737c86", "snapkv": "#b0479a",
        "h2o": "#00805f", "streaming": "#2a8fbd", "kvpress": "#8a3b3b",
    },
    ("#eef2f5", "#5f9fd2"),
)  # fmt: skip
DARK = Palette(
    "dark", "#11161b", "#e6eaee", "#9aa5b1", "#2a323a",
    {
        STOCK: "#c9a26d", "llama.cpp": "#f08ab8", "openvino": "#b8a1f2", "vllm": "#c3cc55", "dense": "#f2f5f7",
        "sketch": "#56b4f5", "oracle": "#f0c04a", "quest": "#ff8b4d", "window": "#8f9aa6", "snapkv": "#e48fd0",
        "h2o": "#3fcf9f", "streaming": "#8fd3f0", "kvpress": "#e08f8f",
    },
    ("#1d262e", "#3c82b8"),
)  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """How one side is drawn."""

    colour: str
    marker: str
    fill: str
    dashes: Any

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of matplotlib's `plot` for a line with markers."""
        size = 8.5 if self.marker == "*" else 6.0
        return {
            "color": self.colour, "marker": self.marker, "fillstyle": self.fill, "linestyle": self.dashes,
            "linewidth": 1.5, "markersize": size, "markeredgewidth": 1.2, "markerfacecoloralt": "none",
        }  # fmt: skip

    @property
    def point(self) -> dict[str, Any]:
        """The same without the line."""
        return {**self.line, "linestyle": "none"}


def marks(sides: Iterable[Side], palette: Palette) -> dict[str, Mark]:
    """A mark for every label; sides of one idea share colour and marker and are filled differently."""
    found: dict[str, Mark] = {}
    seen: dict[str, int] = {}
    for side in sides:
        at = seen[side.idea] = seen.get(side.idea, -1) + 1
        found[side.label] = mark(side, palette, _FILLS[at % len(_FILLS)])
    return found


def mark(side: Side, palette: Palette, fill: str = "full") -> Mark:
    """The mark of a side's idea; what forgets is dashed."""
    colour = palette.colours.get(side.idea, palette.muted)
    return Mark(colour, _MARKERS.get(side.idea, _OTHER), fill, DASHES if side.evicts else "-")


def settings(palette: Palette) -> dict[str, Any]:
    """matplotlib's rcParams for a palette."""
    return {
        "text.parse_math": False,
        "font.family": "DejaVu Sans", "font.size": 10.5,
        "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlecolor": palette.ink,
        "axes.labelsize": 10.5, "axes.labelcolor": palette.muted,
        "axes.facecolor": palette.background, "axes.edgecolor": palette.muted, "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": palette.grid, "grid.linewidth": 0.8,
        "xtick.color": palette.muted, "ytick.color": palette.muted,
        "xtick.minor.visible": False, "ytick.minor.visible": False,
        "legend.frameon": False, "legend.fontsize": 10.0, "legend.labelcolor": palette.ink,
        "legend.handlelength": 2.4, "legend.columnspacing": 1.2, "legend.borderaxespad": 0.2,
        "text.color": palette.ink, "figure.facecolor": palette.background,
        "figure.constrained_layout.h_pad": 0.07, "figure.constrained_layout.w_pad": 0.05,
         "figure.dpi": DOTS_PER_INCH,
    }  # fmt: skip
