"""All figures of one or more runs, under the names of Method 10."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ccm.experiment.results import RunResults
from ccm.experiment.stopping import in_processes
from ccm.method.sources import RATIOS
from ccm.models.memory import free_bytes
from ccm.reporting.by_relation import group_effects
from ccm.reporting.by_transition import entropy_changes
from ccm.reporting.figures import (
    activations,
    changes,
    effects,
    forest,
    layers,
    log_ratios,
    matched,
    neurons,
    shares,
)
from ccm.reporting.figures.canvas import Drawing, save
from ccm.reporting.telling_apart import told_apart

FOLDER = "entropy_neurons_figures"
WORTH_A_PROCESS = 20  # figures, which take some ten seconds; a process takes two to start
WORKER_BYTES = 512 << 20  # memory of one such process: 314 MiB for 8,192 neurons and 3,000 prompts
Draw = Callable[[], Drawing]


@dataclass(frozen=True)
class Entry:
    """One figure of the gallery: named, explained, not drawn yet."""

    stem: str  # path below the figures' folder, without its suffix
    title: str
    caption: str  # how to read it, in plain words
    draw: Draw
    value: str | None = None  # the ablation value it belongs to; None: to all of the run


def figures_of_run(run: RunResults) -> Iterator[Entry]:
    """Name every figure of one model, without drawing it yet.

    Args:
        run: A finished run.

    Yields:
        An entry a figure: those of the whole run first, then those of each ablation value.
    """
    name, model = run.name, run.display_name
    k, dims = len(run.entropy_neurons), int(run.identity["null_space_dims"])
    few = f"nb_neurons_with_low_logitvar={k}"
    # Neurons that were named by hand were chosen by no threshold.
    threshold = None if run.identity.get("neurons") is not None else float(run.identity["min_rho"])
    yield Entry(
        f"{name}/{name}_logitvar_and_rho-{few}",
        "LogitVar against ρ",
        "Each point is a neuron of the last layer. Entropy neurons (red) write almost only into the "
        "null space of the unembedding (ρ near 1, right) and move all logits alike (low LogitVar, "
        "bottom).",
        partial(neurons.logitvar_and_rho, run.measures, model, threshold),
    )
    yield Entry(
        f"{name}/singular_values_and_null_space_nb_dims={dims}",
        "Spectrum of the unembedding",
        "Singular values of the unembedding, largest first. What is written into the directions of the "
        "lowest ones (red, the null space) barely reaches the logits.",
        partial(neurons.singular_value_spectrum, run.singular_values, dims, model),
    )
    yield Entry(
        f"{name}/{name}_weight_norm_distro-{few}",
        "Weight norms",
        "Norms of the output weights of the entropy neurons (red) and of all other neurons of the last "
        "layer: density above, quartiles below.",
        partial(neurons.weight_norms, run.measures, model),
    )
    if len(run.rho_by_layer):
        yield Entry(
            f"{name}/{name}_rho_by_layer",
            "ρ by layer",
            "The share of each neuron's output weight that lies in the null space of the unembedding, "
            "layer by layer. The entropy neurons are red.",
            partial(
                layers.rho_by_layer,
                run.rho_by_layer,
                run.entropy_neurons,
                model,
                dims,
                len(run.singular_values),
                threshold,
            ),
        )
    for value in run.values:
        yield from _figures_of_value(run, value)


def _figures_of_value(run: RunResults, value: str) -> Iterator[Entry]:
    """Name the figures of one ablation value."""
    name, model = run.name, run.display_name
    scores, ablated = run.scores["ablations"][value], run.ablated[value]
    stem = f"{name}/{name}_{value}"
    yield Entry(
        f"{stem}-conversion_ratios",
        "Conversion ratios",
        "Of the prompts that were not answered from a source, the share that is after the ablation. "
        "Coloured: the entropy set; grey: the control sets.",
        partial(shares.conversion_ratios, scores, model, value, run.model),
        value,
    )
    yield Entry(
        f"{stem}_transition_score",
        "Global transition score",
        "How many control sets changed what share of the answers' sources. Red line: the entropy set. "
        "The further right of all controls it lies, the less chance explains it.",
        partial(shares.gts_histogram, scores, model, value),
        value,
    )
    yield Entry(
        f"{stem}-ndck_pkck_conversion_ratios",
        "Turning to the context",
        "Of the prompts answered with neither object (ND), and of those answered from the weights "
        "(PK), the share that is answered from the context (CK) after the ablation.",
        partial(shares.to_context, scores, model, value),
        value,
    )
    for over, under in RATIOS:
        yield Entry(
            f"{stem}_ablation_log_{over.lower()}_{under.lower()}",
            f"Log-ratio of {over} to {under}",
            f"How much likelier the first token of the {over} answer is than that of the {under} "
            "answer, before (top) and after the ablation (bottom), by the source before it.",
            partial(log_ratios.log_ratio, run.plain, ablated, (over, under), model, value),
            value,
        )
    yield Entry(
        f"{stem}_ablation_empirical_noises",
        "Change of the log-ratios",
        "The three log-ratios before the ablation minus after it, by the source before it. At 0 "
        "nothing has changed.",
        partial(log_ratios.log_ratio_differences, run.plain, ablated, model, value),
        value,
    )
    yield Entry(
        f"{stem}_entropy_by_transition",
        "Entropy by transition",
        "Entropy of the next token before the ablation minus after it, prompt by prompt, for each pair "
        "of sources before and after; the controls' means beside. Above 0 the ablation made the model "
        "surer.",
        partial(_entropy_by_transition, run, value),
        value,
    )
    yield Entry(
        f"{stem}_relation_groups",
        "Effect by relation group",
        "Where the effect comes from: conversion to the context and change of source by the group that "
        "the prompt's relation belongs to.",
        partial(_relation_groups, run, value),
        value,
    )
    if "matched_controls" in scores:
        norm = run.measures["norm"].to_numpy(float)
        yield Entry(
            f"{stem}_matched_controls",
            "Matched controls",
            "Part of any contrast is size: beside the plain controls, sets drawn to be like the "
            "entropy neurons in weight norm and in the spread of their activations. Right: how alike.",
            partial(matched.matched_controls, scores, norm, run.sigma, model, value),
            value,
        )
    if value in run.effects:
        of_value = run.set_effects[run.set_effects["ablation_value"] == value]
        yield Entry(
            f"{stem}_effects",
            "Total, direct and norm-only effect",
            "Entropy before the ablation minus after it: in all (total), with the final norm's scale "
            "as it was before (direct), and with the new scale alone (norm-only). What is total but "
            "not direct acts through the norm.",
            partial(effects.entropy_effects, run.effects[value], of_value, model, value),
            value,
        )


def _entropy_by_transition(run: RunResults, value: str) -> Drawing:
    return changes.by_transition(entropy_changes(run, value), run.display_name, value)


def _relation_groups(run: RunResults, value: str) -> Drawing:
    return forest.by_group(group_effects(run, value), run.display_name, value)


def figures_across(runs: Sequence[RunResults]) -> Iterator[Entry]:
    """Name the figures that lay models side by side, as `figures_of_run` does."""
    sizes = [(run.display_name, run.scores["sources"]) for run in runs]
    yield Entry(
        "knowledge_source_sizes",
        "Knowledge sources before ablation",
        "How many prompts were answered from the context (CK), with neither object (ND), and from the "
        "weights (PK).",
        partial(shares.class_sizes, sizes),
    )
    ablations = [(run.model, run.display_name, run.scores["ablations"]) for run in runs]
    yield Entry(
        "entropy_set_and_controls",
        "Entropy set against controls",
        "Conversion to the context and change of source, a row a model and ablation value: the entropy "
        "set with its exact interval, the control sets with their whole range, and the paper's value "
        "where there is one.",
        partial(forest.across_runs, ablations),
    )
    ranges = [(run.display_name, run.statistics, run.entropy_neurons) for run in runs]
    yield Entry(
        "neuron_activation_distributions",
        "Activations of the entropy neurons",
        "A row a neuron: where its activations lie, and the five constants that an ablation may put in "
        "their place.",
        partial(activations.activation_ranges, ranges),
    )


@dataclass(frozen=True)
class Drawn:
    """One figure of the gallery, drawn and written."""

    alt: str  # in words, for whom the picture does not reach
    inches: tuple[float, float]  # width, height
    paths: tuple[Path, ...]  # PDF, PNG, JSON


def draw(entries: Sequence[Entry], out: Path, processes: int = 1) -> Iterator[Drawn]:
    """Draw figures and write each as PDF and PNG, its data as JSON beside them.

    Args:
        entries: What to draw.
        out: The folder; `entropy_neurons_figures/` is made in it.
        processes: How many may draw at once; the bytes are the same. Each costs the start of a Python,
            so that there is at most one for every 20 figures, and for every 512 MiB that are free. More
            than one starts the main module anew: a script needs its `if __name__ == "__main__":`.

    Yields:
        What became of each, in their order; one is open at a time, a hundred would be gigabytes.

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
    alt = f"{entry.title}. {drawing.says or entry.caption}"
    return Drawn(alt, (float(width), float(height)), tuple(paths))


def write_figures(runs: Sequence[RunResults], out: Path, processes: int = 1) -> list[Path]:
    """Draw and write every figure of some runs.

    Args:
        runs: Finished runs; those of one model are told apart.
        out: The folder, as for `draw`.
        processes: How many may draw at once, as for `draw`.

    Returns:
        Every path written.

    Raises:
        BadInput: two are the same run.
    """
    runs = told_apart(runs)
    everything = [entry for run in runs for entry in figures_of_run(run)]
    drawn = draw([*everything, *figures_across(runs)], out, processes)
    return [path for figure in drawn for path in figure.paths]
