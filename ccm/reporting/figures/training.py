"""Checkpoints of one training on an axis of steps: what the model knows, and what the ablation does."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ccm.experiment.results import RunResults
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.scores import Ratio
from ccm.method.sources import SOURCES
from ccm.reporting.figures.canvas import (
    COLOURS,
    DOUBLE,
    GREY,
    RED,
    Drawing,
    footnote,
    titled_legend,
)
from ccm.reporting.figures.registry import register_figure
from ccm.reporting.text import IN_BRACKETS, proportion

# How a step is written in the name of a revision or a folder: `step1000`, `checkpoint-500`.
STEP = re.compile(r"(?:steps?|checkpoint|iter(?:ation)?)[-_ ]?(\d+)", re.IGNORECASE)
MARKS = {"CK": "o", "ND": "s", "PK": "^"}


@dataclass(frozen=True)
class Checkpoint:
    """What one run says about a step of the training."""

    step: int
    recall: Ratio
    sources: Mapping[str, Ratio]  # before ablation
    own: Ratio  # CR(CK) of the entropy set
    controls: tuple[float | None, float | None, float | None]  # theirs: mean, least, greatest


def step_of(run: RunResults) -> int | None:
    """Read the step of a training off a run's revision, or off the folder of its weights.

    >>> STEP.search("a/step1000").group(1), STEP.search("checkpoint-500").group(1)
    ('1000', '500')
    """
    source = PurePath(run.manifest["weights"]["source"])
    for name in (str(run.manifest["asked"].get("revision") or ""), *reversed(source.parts[-3:])):
        found = STEP.search(name)
        if found is not None:
            return int(found.group(1))
    return None


def checkpoints(runs: Sequence[RunResults]) -> tuple[list[Checkpoint], str] | None:
    """Gather the steps of a training and the ablation value that is shown, the first they all have.

    None if there are fewer than two runs, or they are not of different steps.
    """
    steps = [step_of(run) for run in runs]
    values = [value for value in runs[0].values if all(value in run.values for run in runs)]
    if None in steps or len(set(steps)) != len(runs) or len(runs) < 2 or not values:
        return None
    found = [_checkpoint(run, step or 0, values[0]) for run, step in zip(runs, steps, strict=True)]
    return sorted(found, key=lambda checkpoint: checkpoint.step), values[0]


def _checkpoint(run: RunResults, step: int, value: str) -> Checkpoint:
    scores = run.scores["ablations"][value]
    controls = scores["controls"]["conversion_ratios"]["CK"]
    return Checkpoint(
        step,
        Ratio(**run.scores["parametric_recall"]),
        {source: Ratio(**run.scores["sources"][source]) for source in SOURCES},
        Ratio(**scores["entropy"]["conversion_ratios"]["CK"]),
        (controls["mean"], controls["low"], controls["high"]),
    )


@register_figure(
    per="all runs",
    stem="training",
    title="Through training",
    caption=(
        "Checkpoints of one training, by step: which facts the model names and what it answers before "
        "ablation, and how often ablating each checkpoint's own entropy neurons turns answers to the "
        "context, beside its control sets."
    ),
    reads=checkpoints,
)
def through_training(found: Sequence[Checkpoint], value: str) -> Drawing:
    """Recall and sources before ablation, and CR(CK), at every step of a training.

    Args:
        found: The checkpoints, by step.
        value: Name of the ablation value of CR(CK).
    """
    steps = np.asarray([checkpoint.step for checkpoint in found], dtype=float)
    figure = Figure(figsize=(DOUBLE, 3.1))
    left, right = figure.subplots(1, 2)
    _curve(left, steps, [c.recall for c in found], GREY, "D", "facts named (recall)")
    for source in SOURCES:
        ratios = [c.sources[source] for c in found]
        _curve(left, steps, ratios, COLOURS[source], MARKS[source], f"answers: {source}")
    left.set_ylabel("proportion (%)\nof facts asked, or of prompts")
    mean, low, high = (np.asarray([c.controls[i] for c in found], dtype=float) for i in range(3))
    right.fill_between(steps, low, high, color=GREY, alpha=0.25, linewidth=0, label="controls, all")
    right.plot(steps, mean, color=GREY, label="controls, mean")
    _curve(right, steps, [c.own for c in found], RED, "o", "entropy set")
    right.set_ylabel("conversion ratio CR(CK)\n(% of prompts that were not CK)")
    for axes in (left, right):
        axes.set_xlabel("step of the training")
        axes.set_xscale("symlog", linthresh=max(1.0, float(steps[steps > 0].min(initial=np.inf))))
        axes.set_xticks(steps, [f"{int(step):,}" for step in steps], minor=False)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    handles = [handle for axes in (left, right) for handle in axes.get_legend_handles_labels()[0]]
    titled_legend(figure, handles, f"Through training; {ABLATION_VALUES[value].label} ablation")
    small = "Bars: exact 95 % intervals. Every checkpoint has prompts and entropy neurons of its own."
    footnote(figure, [small], 120)
    said = [
        f"step {c.step:,}: CK {proportion(asdict(c.sources['CK']))}, CR(CK) {proportion(asdict(c.own))}"
        for c in found
    ]
    data = {"ablation_value": value, "checkpoints": [asdict(checkpoint) for checkpoint in found]}
    return Drawing(figure, data, f"{'; '.join(said)}. {IN_BRACKETS}")


def _curve(
    axes: Axes, steps: np.ndarray, ratios: Sequence[Ratio], colour: str, marker: str, label: str
) -> None:
    """Draw proportions with their intervals; a step without a denominator is left out."""
    y, low, high = (
        np.asarray([getattr(r, name) for r in ratios], dtype=float)
        for name in ("percent", "low", "high")
    )
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2}
    axes.errorbar(steps, y, yerr=[y - low, high - y], label=label, linewidth=1, **style)
