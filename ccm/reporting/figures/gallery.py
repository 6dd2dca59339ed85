"""All figures of finished runs, in order: what the drawing modules registered, drawn and written."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ccm.experiment.results import RunResults
from ccm.experiment.stopping import in_processes
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.models.memory import free_bytes
from ccm.reporting.distinct_names import distinct_names
from ccm.reporting.figures import (
    activations,
    changes,
    effects,
    forest,
    layers,
    log_ratios,
    matched,
    neurons,
    proportions,
    registry,
    training,
)
from ccm.reporting.figures.canvas import Drawing, save
from ccm.reporting.figures.registry import Per, RegisteredFigure
from ccm.reporting.text import number_in_words

# The order of figures: by module, those of other modules last; within a module as they are written.
DRAWN_BY = (
    *(neurons, layers, proportions, log_ratios, changes, forest, training),
    *(matched, effects, activations),
)
FOLDER = "entropy_neurons_figures"
WORTH_A_PROCESS = 20  # figures, which take some ten seconds; a process takes two to start
WORKER_BYTES = 512 << 20  # memory of one such process: 314 MiB for 8,192 neurons and 3,000 prompts
Draw = Callable[[], Drawing]


@dataclass(frozen=True)
class Entry:
    """One figure of given runs: named and explained, but not drawn yet."""

    stem: str  # path below the figures' folder, without its suffix
    title: str
    caption: str  # how to read it, in plain words
    draw: Draw
    value: str | None = None  # name of its ablation value; None: it belongs to the whole run


def figures_of_run(run: RunResults) -> Iterator[Entry]:
    """Name every figure of one run, without drawing it yet.

    Args:
        run: A finished run.

    Yields:
        One entry per figure: those of the whole run first, then those of each ablation value.
    """
    fields = {
        "name": run.name,
        "k": len(run.entropy_neurons),
        "null_space_dims": int(run.identity["null_space_dims"]),
    }
    yield from _entries("run", fields, run)
    for value in run.values:
        yield from _entries("ablation value", {**fields, "value": value}, run, value)


def figures_across(runs: Sequence[RunResults]) -> Iterator[Entry]:
    """Name every figure that compares runs, without drawing it yet."""
    yield from _entries("all runs", {}, runs)


def _entries(per: Per, fields: dict[str, Any], *source: Any) -> Iterator[Entry]:
    """Name the figures of one kind, except those for which the run has no data.

    Args:
        per: The kind.
        fields: What fills the braces of a stem.
        source: The arguments of each figure's `reads`.
    """
    fields = {**fields, "n_values": number_in_words(len(ABLATION_VALUES))}
    for registered in sorted((f for f in registry.FIGURES if f.per == per), key=_place):
        arguments = registered.reads(*source)
        if arguments is not None:
            yield Entry(
                registered.stem.format(**fields),
                registered.title,
                registered.caption.format(**fields),
                partial(registered.draw, *arguments),
                fields.get("value"),
            )


def _place(registered: RegisteredFigure) -> int:
    """Return the place of a figure's module in `DRAWN_BY`."""
    modules = [module.__name__ for module in DRAWN_BY]
    module = registered.draw.__module__
    return modules.index(module) if module in modules else len(modules)


@dataclass(frozen=True)
class Drawn:
    """One figure, drawn and written."""

    alt: str  # what it shows, in words, for those who cannot see it
    inches: tuple[float, float]  # width, height
    paths: tuple[Path, ...]  # PDF, PNG, JSON


def draw(entries: Sequence[Entry], out: Path, processes: int = 1) -> Iterator[Drawn]:
    """Draw figures and write each as PDF and PNG, its data as JSON beside them.

    Args:
        entries: What to draw.
        out: The folder; `entropy_neurons_figures/` is made in it.
        processes: How many may draw at once; the bytes are the same. Starting one takes time, so there
            is at most one for every 20 figures and for every 512 MiB of free memory. More than one
            starts the main module anew: a script needs its `if __name__ == "__main__":`.

    Yields:
        What was written for each entry, in the order of the entries. Only one figure is open at a
            time: a hundred would take gigabytes.

    Raises:
        NotAvailable: a process that drew was killed.
    """
    fitting = free_bytes(torch.device("cpu")) // WORKER_BYTES
    processes = min(processes, fitting, len(entries) // WORTH_A_PROCESS)
    one = partial(_draw_one, out)
    bar = partial(tqdm, total=len(entries), desc="figures", unit="figure")
    if processes < 2:
        yield from bar(map(one, entries))
        return
    with closing(in_processes(one, entries, processes)) as drawn:
        yield from bar(drawn)


def _draw_one(out: Path, entry: Entry) -> Drawn:
    drawing = entry.draw()
    width, height = drawing.figure.get_size_inches()
    paths = save(drawing, out / FOLDER / entry.stem)
    alt = f"{entry.title}. {drawing.description or entry.caption}"
    return Drawn(alt, (float(width), float(height)), tuple(paths))


def write_figures(runs: Sequence[RunResults], out: Path, processes: int = 1) -> list[Path]:
    """Draw and write every figure of some runs.

    Args:
        runs: Finished runs; those of one model get names of their own.
        out: The folder, as for `draw`.
        processes: How many may draw at once, as for `draw`.

    Returns:
        Every path written.

    Raises:
        BadInput: two are the same run.
    """
    runs = distinct_names(runs)
    everything = [entry for run in runs for entry in figures_of_run(run)]
    drawn = draw([*everything, *figures_across(runs)], out, processes)
    return [path for figure in drawn for path in figure.paths]
