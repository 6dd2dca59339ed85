"""All figures of one or more runs, under the names of Method 10."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ccm.errors import BadInput
from ccm.figures import activations, log_ratios, neurons, shares
from ccm.figures.canvas import Drawing, save
from ccm.knowledge import RATIOS
from ccm.results import RunResults

FOLDER = "entropy_neurons_figures"
Draw = Callable[[], Drawing]


def figures_of_run(run: RunResults) -> Iterator[tuple[str, Draw]]:
    """Name every figure of one model, without drawing it yet.

    Args:
        run: A finished run.

    Yields:
        The path below the figures' folder, without its suffix, and the call that draws it.
    """
    name, model = run.model, run.display_name
    k, dims = len(run.entropy_neurons), int(run.identity["null_space_dims"])
    few = f"nb_neurons_with_low_logitvar={k}"
    # Neurons that were named by hand were chosen by no threshold.
    threshold = None if run.identity.get("neurons") is not None else float(run.identity["min_rho"])
    yield (
        f"{name}/{name}_logitvar_and_rho-{few}",
        partial(neurons.logitvar_and_rho, run.measures, model, threshold),
    )
    yield (
        f"{name}/singular_values_and_null_space_nb_dims={dims}",
        partial(neurons.singular_value_spectrum, run.singular_values, dims, model),
    )
    yield f"{name}/{name}_weight_norm_distro-{few}", partial(neurons.weight_norms, run.measures, model)
    for value in run.values:
        scores = run.scores["ablations"][value]
        stem = f"{name}/{name}_{value}"
        yield f"{stem}-conversion_ratios", partial(shares.conversion_ratios, scores, model, value)
        yield f"{stem}_transition_score", partial(shares.gts_histogram, scores, model, value)
        yield f"{stem}-ndck_pkck_conversion_ratios", partial(shares.to_context, scores, model, value)
        ablated = run.ablated[value]
        for names in RATIOS:
            yield (
                f"{stem}_ablation_log_{'_'.join(names).lower()}",
                partial(log_ratios.log_ratio, run.plain, ablated, names, model, value),
            )
        yield (
            f"{stem}_ablation_empirical_noises",
            partial(log_ratios.log_ratio_differences, run.plain, ablated, model, value),
        )


def figures_across(runs: Sequence[RunResults]) -> Iterator[tuple[str, Draw]]:
    """Name the figures that lay models side by side, as `figures_of_run` does."""
    sizes = [(run.display_name, run.scores["sources"]) for run in runs]
    yield "knowledge_source_sizes", partial(shares.class_sizes, sizes)
    ranges = [(run.display_name, run.statistics, run.entropy_neurons) for run in runs]
    yield "neuron_activation_distributions", partial(activations.activation_ranges, ranges)


def check_distinct(runs: Sequence[RunResults]) -> None:
    """Refuse two runs of one model: their files would have the same names.

    Raises:
        BadInput: otherwise.
    """
    seen: dict[str, Path] = {}
    for run in runs:
        if run.model in seen:
            raise BadInput(
                f"{run.path}: a run of {run.model}, as {seen[run.model]} is. Give one run a model."
            )
        seen[run.model] = run.path


def write_figures(runs: Sequence[RunResults], out: Path) -> list[Path]:
    """Draw every figure and write it as PDF and PNG, its data as JSON beside them.

    Args:
        runs: Finished runs, one a model.
        out: The folder; `entropy_neurons_figures/` is made in it.

    Returns:
        Every path written.

    Raises:
        BadInput: two runs of one model.
    """
    check_distinct(runs)
    written = []
    everything = [figure for run in runs for figure in figures_of_run(run)]
    for stem, draw in [*everything, *figures_across(runs)]:
        # One at a time: a hundred open figures would be gigabytes.
        written += save(draw(), out / FOLDER / stem)
    return written
