"""The list of all figures; each one's file name, title and caption are given where it is drawn.

    @register_figure(
        per="ablation value",
        stem="{name}/{name}_{value}_transition_score",
        title="Global transition score",
        caption="How many control sets changed what proportion of the answers' sources.",
        reads=lambda run, value: (run.scores["ablations"][value], run.display_name, value),
    )
    def gts_histogram(scores, model, value) -> Drawing: ...

The gallery, the files and the report follow from it. Only a new module must be named once more, in
`gallery.DRAWN_BY`, which says in which order figures are shown.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec

from ccm.reporting.figures.canvas import Drawing, styled

Per = Literal["run", "ablation value", "all runs"]
_Parameters = ParamSpec("_Parameters")


@dataclass(frozen=True)
class RegisteredFigure:
    """A figure that can be drawn of any run."""

    per: Per  # there is one figure per run, per ablation value of a run, or of all runs
    stem: str  # path below the figures' folder, without suffix; it may hold fields in braces
    title: str
    caption: str  # how to read it, in plain words; it may hold fields in braces
    reads: Callable[..., tuple[Any, ...] | None]
    draw: Callable[..., Drawing]


FIGURES: list[RegisteredFigure] = []


def register_figure(
    *, per: Per, stem: str, title: str, caption: str, reads: Callable[..., tuple[Any, ...] | None]
) -> Callable[[Callable[_Parameters, Drawing]], Callable[_Parameters, Drawing]]:
    """Register a drawing function, which then draws in the one style of all figures.

    The function must be at the top level of its module, where another process, which may draw, finds
    it by its name.

    Args:
        per: What there is one figure for: every run, every ablation value of every run, or all runs
            together.
        stem: Path below the figures' folder, without suffix. Fields: `{name}` of the run, `{k}`
            entropy neurons, `{null_space_dims}`, and `{value}`, the name of the ablation value. A
            figure of all runs has none of these.
        title: Its heading in a report.
        caption: How to read it, in plain words. Field: `{n_values}`, how many ablation values there
            are, in words.
        reads: Returns the arguments of the drawing function, or None if a run lacks what they are
            made of. It is given the run; the run and the name of the ablation value; or the runs.
    """

    def register(draw: Callable[_Parameters, Drawing]) -> Callable[_Parameters, Drawing]:
        in_style = styled(draw)
        FIGURES.append(RegisteredFigure(per, stem, title, caption, reads, in_style))
        return in_style

    return register
