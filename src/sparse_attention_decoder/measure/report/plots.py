"""The pictures of a report: which there are, and drawing them light and dark."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_attention_decoder.errors import UnsupportedError
from sparse_attention_decoder.measure.report.curves import draw_crossover, draw_memory, draw_quality, draw_time
from sparse_attention_decoder.measure.report.findings import crossover, memory, needles, quality, retrieval, time
from sparse_attention_decoder.measure.report.numbers import Model, Numbers
from sparse_attention_decoder.measure.report.retrieved import draw_needles, draw_tasks
from sparse_attention_decoder.measure.report.style import DARK, LIGHT, Palette, settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """What a picture shows. needs: the records it is made from, for when there are none."""

    name: str
    title: str
    needs: str
    figure: "Callable[[Model, Palette], Figure | None]"
    finding: Callable[[Model], str]


DRAWINGS = (
    Drawing("quality", "Quality against bytes read", "agreement", draw_quality, quality),
    Drawing("time", "Time per token", "speed", draw_time, time),
    Drawing("crossover", "Sparse over best dense", "speed of sparse and dense", draw_crossover, crossover),
    Drawing("memory", "Peak memory", "speed with peak memory", draw_memory, memory),
    Drawing("needles", "Needles by depth and length", "retrieval of niah_single", draw_needles, needles),
    Drawing("tasks", "Retrieval by task", "retrieval", draw_tasks, retrieval),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A drawn picture, or one that could not be drawn: then it has no bytes.

    file: name without folder, unique in the report. light, dark: PNG. width, height: pixels.
    """

    file: str
    model: str
    title: str
    finding: str
    needs: str
    light: bytes = b""
    dark: bytes = b""
    width: int = 0
    height: int = 0


def draw(numbers: Numbers) -> list[Picture]:
    """Every picture of every model.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    _require_matplotlib()
    return [picture for number, model in enumerate(numbers.models) for picture in _of(model, number)]


def _of(model: Model, number: int) -> Iterator[Picture]:
    # the number keeps names apart that differ in signs alone
    stem = re.sub(r"[^a-z0-9.]+", "-", model.name.lower()).strip("-.")[:60] or "model"
    for drawing in DRAWINGS:
        about = (f"{number + 1}-{stem}-{drawing.name}.png", model.name, drawing.title)
        light = _png(drawing, model, LIGHT)
        if light is None:
            yield Picture(*about, "", drawing.needs)
            continue
        dark = _png(drawing, model, DARK)
        assert dark is not None
        # the size of a PNG stands at a fixed place in its first chunk
        width, height = (int.from_bytes(light[at : at + 4], "big") for at in (16, 20))
        yield Picture(*about, drawing.finding(model), drawing.needs, light, dark, width, height)


def _png(drawing: Drawing, model: Model, palette: Palette) -> bytes | None:
    from matplotlib import rc_context

    rc: Any = _plain() | settings(palette)
    with rc_context(rc):
        figure = drawing.figure(model, palette)
        if figure is None:
            return None
        return _compact(figure)


def _compact(figure: "Figure") -> bytes:
    """A PNG of at most 256 colours, a third of the size; the same records give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    # half-typed
    canvas: Any = FigureCanvasAgg(figure)
    pixels, size = canvas.print_to_buffer()
    image = Image.frombytes("RGBA", size, pixels).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    target = io.BytesIO()
    image.save(target, format="png")
    return target.getvalue()


def _plain() -> dict[str, Any]:
    """matplotlib's own defaults, whatever the user's matplotlibrc says; but not a backend, which may need a display."""
    from matplotlib import rcParamsDefault

    return {name: value for name, value in rcParamsDefault.items() if "backend" not in name}


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"pictures need matplotlib, which is not installed ({error}); "
            "install the extra: pip install 'sparse-attention-decoder[measure]'"
        ) from error
