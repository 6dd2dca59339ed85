"""What figures have in common: style, colours, titles, densities, and words for empty panels."""

import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
import numpy as np
from jaxtyping import Float
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from PIL import Image

from ccm.experiment.files import to_json
from ccm.experiment.writing import write_formats
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.sources import Source
from ccm.paper.values import Number, Printed

STYLE = Path(__file__).parent.parent / "style.mplstyle"
# Okabe and Ito's colours: with any common colour blindness they still look different.
COLOURS: dict[Source, str] = {"CK": "#0072B2", "ND": "#009E73", "PK": "#E69F00"}
HATCHES: dict[Source, str] = {"CK": "", "ND": "///", "PK": "..."}  # they differ in grey, too
RED = "#C8102E"  # the entropy set, and the null space
GREY = "#8A8A8A"  # controls, and neurons that are not in the entropy set
MATCHED_COLOUR = "#56B4E9"  # matched controls and their neurons; with another marker, too
# The paper's values: a ring, or a cross if the value is an artefact of the released code.
PRINTED_MARKS: dict[bool, dict[str, Any]] = {
    False: {"color": "#222222", "marker": "o", "fillstyle": "none", "markersize": 7.5},
    True: {"color": "#222222", "marker": "x", "markersize": 5},
}
ENTROPY_DOTS: dict[str, Any] = {"c": RED, "edgecolors": "white", "linewidths": 0.4, "zorder": 3}
ABOVE: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 6.5}  # small words above a point
SINGLE, DOUBLE = 3.4, 6.9  # widths of one and of two columns, inches
TITLE_CHARACTERS = 12  # that fit into an inch
FINE_BINS = 4096
GRID_POINTS = 301
PNG_COLOURS = 256  # a third of the size of a PNG with all colours, and looks the same
FEW = 20  # fewer values are drawn one by one: a density would show more than is known
_Parameters = ParamSpec("_Parameters")


@dataclass(frozen=True)
class Drawing:
    """A figure with the numbers it shows. Numbers can be compared between machines, pixels cannot."""

    figure: Figure
    data: dict[str, Any]
    description: str = ""  # what it shows, with its numbers, for those who cannot see it


def style() -> AbstractContextManager[None]:
    """Return a context with the one style of all figures, whatever the user's matplotlibrc says."""
    return matplotlib.style.context(["default", str(STYLE)])


def styled(draw: Callable[_Parameters, Drawing]) -> Callable[_Parameters, Drawing]:
    """Run a drawing function under the style, then restore matplotlib's settings."""

    @wraps(draw)
    def inside(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Drawing:
        with style():
            drawing = draw(*args, **kwargs)
            title = drawing.figure.get_suptitle()
            if title != (fitting := _folded(title, drawing.figure)):
                drawing.figure.suptitle(fitting)
            return drawing

    return inside


def _folded(title: str, figure: Figure) -> str:
    """Fold a title that is wider than its figure: a model may have a long folder as its name."""
    return folded(title, int(TITLE_CHARACTERS * figure.get_size_inches()[0]))


def folded(text: str, width: int) -> str:
    r"""Fold the lines of a text from `drawable` that are longer than a width.

    >>> folded("one two", 4), folded("a\\$b", 2)
    ('one\ntwo', 'a\n\\$b')
    """
    lines = (textwrap.fill(x, width) if len(x) > width else x for x in text.split("\n"))
    return "\n".join(lines).replace("\\\n$", "\n\\$")  # a dollar stays escaped


def save(drawing: Drawing, stem: Path) -> list[Path]:
    """Write a drawing as PDF and PNG and its data as JSON. The bytes are the same every time.

    Args:
        drawing: What to write.
        stem: The path without its suffix; it may hold dots.

    Returns:
        The three paths.
    """
    figure = drawing.figure
    writers: dict[str, Callable[[Path], object]] = {
        "pdf": partial(_write_pdf, figure),
        "png": partial(_write_png, figure),
        "json": lambda path: path.write_text(to_json(drawing.data), encoding="utf-8"),
    }
    # Laid out once for both files: with a layout engine, matplotlib would draw each of them twice.
    with style(), matplotlib.rc_context({"figure.constrained_layout.use": False}):
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.execute(figure)
            figure.set_layout_engine(None)
        return write_formats(stem, writers)


# Dates and the writer's version would make two runs differ.


def _write_pdf(figure: Figure, path: Path) -> None:
    metadata: dict[str, Any] = {"CreationDate": None, "Creator": None, "Producer": None}
    whole = io.BytesIO()  # if it cannot write a file to its end, matplotlib leaves it open
    figure.savefig(whole, format="pdf", metadata=metadata)
    path.write_bytes(whole.getvalue())


def _write_png(figure: Figure, path: Path) -> None:
    whole = io.BytesIO()
    figure.savefig(whole, format="png", metadata={"Software": None})
    with Image.open(whole) as image:
        # Not dithered: the dots would take more bytes than they save.
        flat = image.convert("RGB").quantize(PNG_COLOURS, dither=Image.Dither.NONE)
        flat.save(path, "png", optimize=True, dpi=image.info["dpi"])


def legend_dot(colour: str, marker: str, label: str, edge: str | None = None) -> Line2D:
    """Make the legend entry of some dots."""
    look = {"marker": marker, "markersize": 4.0, "markeredgecolor": edge or colour}
    return Line2D([], [], color=colour, linestyle="", label=label, **look)  # type: ignore[arg-type]


def titled_legend(figure: Figure, handles: Sequence[Artist | Container], title: str) -> None:
    """Write a figure's title and its legend below it, in one block: two of them would overlap."""
    fitting = _folded(title, figure)
    look: dict[str, Any] = {"ncols": 4, "title": fitting, "title_fontsize": "large"}
    figure.legend(handles=handles, loc="outside upper center", **look)


def jitter(n: int) -> Float[np.ndarray, "n"]:
    """Spread n dots that would cover each other: offsets from -0.5 to 0.5.

    They follow from the order of the dots, not from chance: the picture is the same each time.
    """
    return (np.arange(n) * 0.618) % 1 - 0.5


def draw_dots(
    axes: Axes, x: Number, width: float, values: Sequence[float] | np.ndarray, size: Number, **look: Any
) -> None:
    """Draw values as dots in a column around x."""
    axes.scatter(x + width * jitter(len(values)), values, s=size, linewidths=0, **look)


def draw_box(
    axes: Axes, box: dict[str, Any], at: Number, width: float, colour: str, alpha: float, **look: Any
) -> None:
    """Draw what matplotlib's `boxplot_stats` gives of some values, in one colour."""
    axes.bxp(
        [box],
        positions=[at],
        widths=width,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": colour, "alpha": alpha, "edgecolor": colour},
        medianprops={"color": "#222222"},
        whiskerprops={"color": colour},
        capprops={"color": colour},
        **look,
    )


@cache
def _font() -> FT2Font:
    return font_manager.get_font(font_manager.findfont("DejaVu Sans"))


def drawable(text: str) -> str:
    """Make any text safe to draw: matplotlib must see no formula in it, nor a glyph the font lacks.

    >>> drawable("a$b_c")
    'a\\\\$b_c'
    """
    glyphs = (c if c.isprintable() and _font().get_char_index(ord(c)) else "\ufffd" for c in text)
    return "".join(glyphs).replace("$", r"\$")


def ablation_title(model: str, value: str) -> str:
    """Begin the title of a figure of one ablation value: `GPT2-small, mean (μ) ablation`.

    Args:
        model: Display name.
        value: Name of the ablation value.
    """
    return f"{drawable(model)}, {ABLATION_VALUES[value].label} ablation"


def explain_empty(axes: Axes, text: str) -> None:
    """Write in the middle of an empty panel why it is empty, and take its scales away."""
    look: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
    axes.text(0.5, 0.5, textwrap.fill(text, 34), color="#444444", **look)
    axes.set_xticks([])
    axes.set_yticks([])


def footnote(figure: Figure, lines: Sequence[str], width: int) -> None:
    """Write small print below a figure, wrapped at `width` letters."""
    text = "\n".join(textwrap.fill(line, width) for line in lines if line)
    if text:
        figure.supxlabel(text, fontsize=6.5, color="#444444", x=0.02, ha="left")


def draw_printed(axes: Axes, x: float, y: float, printed: Printed) -> None:
    """Mark a value that the paper printed."""
    mark = PRINTED_MARKS[printed.defect is not None]
    axes.plot(x, y, linestyle="", markeredgewidth=0.9, clip_on=False, zorder=4, **mark)


def artefacts_in_words(printed: Iterable[Printed | None]) -> str:
    """Explain the crosses among the paper's values; an empty text if there is no cross."""
    defects = sorted({p.defect for p in printed if p is not None and p.defect is not None})
    if not defects:
        return ""
    which = f"defect{'s' if len(defects) > 1 else ''} {' and '.join(str(d) for d in defects)}"
    return f"Cross: the paper's value, an artefact of the released code ({which} of the list)."


def density(
    values: Float[np.ndarray, "value"], grid: Float[np.ndarray, "point"]
) -> Float[np.ndarray, "point"] | None:
    """Estimate a density with Gaussian kernels, on a fixed grid.

    The values are binned first (4,096 bins over the grid), so that 100,000 of them cost as much as
    100. Bandwidth: Silverman's rule, 0.9 min(sd, IQR / 1.34) n^(-1/5).

    Returns:
        The density, per unit of the values; None if the values have no spread, or so little that
        it would be a spike between two points of the grid, drawn as nothing.
    """
    values = values[np.isfinite(values)]
    h = bandwidth(values)
    if h is None or h < 0.5 * (grid[1] - grid[0]):
        return None
    counts, edges = np.histogram(values, FINE_BINS, (float(grid[0]), float(grid[-1])))
    used = np.flatnonzero(counts)
    centres = ((edges[:-1] + edges[1:]) / 2)[used]
    kernels = np.exp(-0.5 * ((grid[:, None] - centres) / h) ** 2)  # (point, bin)
    total: Float[np.ndarray, "point"] = kernels @ counts[used] / (len(values) * h * np.sqrt(2 * np.pi))
    return total


def bandwidth(values: Float[np.ndarray, "value"]) -> float | None:
    """Compute Silverman's bandwidth; None if the values have no spread that a float can hold."""
    if len(values) < 2:
        return None
    sd = float(values.std(ddof=1))
    if sd <= 1e-9 * max(1e-300, float(np.abs(values).max())):
        return None
    quartiles = np.percentile(values, [25, 75])
    iqr = float(quartiles[1] - quartiles[0]) / 1.34
    return float(0.9 * (min(sd, iqr) if iqr > 0 else sd) * len(values) ** -0.2)


def grid_for(*groups: Float[np.ndarray, "_"]) -> Float[np.ndarray, "point"]:
    """Make one grid for several densities: all of the values, with space for their tails."""
    values = np.concatenate([g[np.isfinite(g)] for g in groups] or [np.zeros(0)])
    if not len(values):
        return np.linspace(-1.0, 1.0, GRID_POINTS)
    low, high = float(values.min()), float(values.max())
    margin = max(
        [3 * h for g in groups if (h := bandwidth(g[np.isfinite(g)])) is not None], default=0.0
    )
    size = max(1.0, abs(low), abs(high))
    if high - low <= 1e-6 * size:  # all values alike: an axis whose numbers can be read
        margin = 0.5 * size
    margin = max(margin, 0.02 * (high - low))
    return np.linspace(low - margin, high + margin, GRID_POINTS)


def draw_density(
    axes: Axes,
    values: Float[np.ndarray, "value"],
    grid: Float[np.ndarray, "point"],
    colour: str,
    label: str,
    line: str = "-",
) -> Float[np.ndarray, "point"] | None:
    """Draw one density, filled; values closer together than the grid's points become lines."""
    found = density(values, grid)
    if found is None:
        places = np.unique(values[np.isfinite(values)])
        for at in places if len(places) <= FEW else places[[0, len(places) // 2, -1]]:
            axes.axvline(float(at), color=colour, linestyle=line, linewidth=1.6, label=label)
            label = "_"  # one entry in the legend
    else:
        axes.plot(grid, found, color=colour, linestyle=line, label=label)
        axes.fill_between(grid, found, color=colour, alpha=0.18, linewidth=0)
    return found
