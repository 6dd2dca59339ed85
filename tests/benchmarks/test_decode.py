"""One decode for every ablation, against one plain pass of the hooked path over the same prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from matplotlib.figure import Figure

from ccm.decoding import hooked
from ccm.decoding.results import Work
from ccm.decoding.shared import decode_sets
from ccm.method.ablation import Ablation
from ccm.method.ablation_values import ABLATION_VALUES
from conftest import Options
from tests.benchmarks.subjects import Subject, gpt2_dimensions, organism, real_model

BATCH_SIZES = (256, 1024)  # the hooked path gets the better one


To = Literal["decision", "end", "as in a run"]
MEAN = ("mean_ablation",)


def shared(subject: Subject, ablations: Sequence[Ablation], to: To = "decision") -> Work:
    """Decode the plain run and all sets.

    Args:
        subject: The model and its prompts.
        ablations: The sets.
        to: How far: every text to its decision, every text to its end, or, as in a run, the controls'
            to their decision and the others to their end.
    """
    controls = [False, *(a.name != "entropy" for a in ablations)]
    full = {
        "decision": [False] * len(controls),
        "end": [True] * len(controls),
        "as in a run": [not control for control in controls],
    }[to]
    work = Work()
    for _ in decode_sets(
        subject.model, subject.prompts, ablations, full=full, decided=subject.decided, work=work
    ):
        pass
    return work


def plain_pass(subject: Subject, best_of: Callable[..., float], rounds: int = 3) -> float:
    """Seconds of the hooked path generating 10 tokens for the prompts once, at its best."""
    return min(
        best_of(
            lambda size=size: hooked.decode(subject.model, subject.prompts, batch_size=size), rounds
        )
        for size in BATCH_SIZES
    )


def record(benchmark: Any, subject: Subject, work: Work, ratio: float, **more: Any) -> None:
    """Note what was run and how long it took beside the plain pass."""
    model = subject.model
    benchmark.extra_info.update(
        model=model.spec.name,
        prompts=len(subject.prompts),
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        work=work.as_dict(),
        ratio=round(ratio, 4),
        of="one plain hooked pass",
        **more,
    )


@pytest.mark.parametrize(
    ("values", "n_controls", "to", "target"),
    [
        (MEAN, 100, "decision", 0.6),
        (MEAN, 100, "end", None),
        (MEAN, 200, "decision", None),
        (tuple(ABLATION_VALUES), 100, "decision", 1.5),
    ],
    ids=["102-runs", "102-runs-full-texts", "202-runs", "506-runs"],
)
def test_organism(
    values: Sequence[str],
    n_controls: int,
    to: To,
    target: float | None,
    benchmark: Any,
    best_of: Callable[..., float],
) -> None:
    subject = organism()
    ablations = subject.ablations(values, n_controls)
    baseline = plain_pass(subject, best_of)
    work = benchmark.pedantic(shared, (subject, ablations, to), rounds=5, warmup_rounds=1)
    ratio = benchmark.stats.stats.min / min(baseline, plain_pass(subject, best_of))
    record(benchmark, subject, work, ratio, sets=len(ablations), target=target)
    benchmark.extra_info["times_faster_than_a_pass_a_set"] = round((1 + len(ablations)) / ratio, 1)


def test_twice_the_controls(benchmark: Any, best_of: Callable[..., float]) -> None:
    subject = organism()
    hundred, two_hundred = (subject.ablations(MEAN, n) for n in (100, 200))
    shared(subject, hundred)
    baseline = best_of(lambda: shared(subject, hundred), 5)
    work = benchmark.pedantic(shared, (subject, two_hundred), rounds=5)
    ratio = benchmark.stats.stats.min / baseline
    record(benchmark, subject, work, ratio, sets=len(two_hundred), target=1.2)
    benchmark.extra_info["of"] = "the same with 100 controls"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "target"),
    [
        (MEAN, 1.25),
        (("mean_minus_sigma_ablation",), 1.3),
        (("mean_plus_sigma_ablation",), 1.3),
        (tuple(ABLATION_VALUES), 2.0),
    ],
    ids=["mean", "mean-minus-sigma", "mean-plus-sigma", "all-values"],
)
def test_real_model(
    values: Sequence[str], target: float, benchmark: Any, best_of: Callable[..., float]
) -> None:
    """A hundred controls on SmolLM2, as in a run, against the shared engine's own plain pass."""
    subject = real_model()
    ablations = subject.ablations(values, 100)
    plain = shared(subject, (), "end")  # also warms up
    baseline = best_of(lambda: shared(subject, (), "end"), 2)
    work = benchmark.pedantic(shared, (subject, ablations, "as in a run"), rounds=2)
    baseline = min(baseline, best_of(lambda: shared(subject, (), "end"), 1))
    ratio = benchmark.stats.stats.min / baseline
    record(benchmark, subject, work, ratio, sets=len(ablations), target=target)
    hooks = best_of(lambda: hooked.decode(subject.model, subject.prompts, batch_size=256), 1)
    benchmark.extra_info.update(
        of="one plain pass of the shared engine",
        nodes_of_the_plain_pass=round(work.nodes / plain.nodes, 3),
        one_hooked_pass=round(hooks / baseline, 3),
        hooked_passes=round((1 + len(ablations)) * hooks / baseline),
    )


@pytest.mark.slow
def test_gpt2_dimensions(benchmark: Any, best_of: Callable[..., float]) -> None:
    subject = gpt2_dimensions()
    ablations = subject.ablations(MEAN, 100)
    baseline = plain_pass(subject, best_of, rounds=2)
    work = benchmark.pedantic(shared, (subject, ablations), rounds=2)
    ratio = benchmark.stats.stats.min / baseline
    record(benchmark, subject, work, ratio, sets=len(ablations), target=1.0)


def test_cost_of_sets(benchmark: Any, best_of: Callable[..., float], options: Options) -> None:
    """Cost against the number of sets, both paths, drawn into the artifacts."""
    subject = organism()
    sizes = (1, 11, 31, 101, 201, 505)
    of_sets = {n: subject.ablations(MEAN, n - 1) for n in sizes if n < 505}
    of_sets[505] = subject.ablations(tuple(ABLATION_VALUES), 100)
    one_pass = plain_pass(subject, best_of)
    one_set = best_of(lambda: hooked.decode(subject.model, subject.prompts, of_sets[1][0]))
    seconds = {n: best_of(lambda n=n: shared(subject, of_sets[n])) for n in sizes}
    work = benchmark.pedantic(shared, (subject, of_sets[101]), rounds=1)
    record(benchmark, subject, work, seconds[101] / one_pass, sets=101)
    benchmark.extra_info["seconds"] = {str(n): round(s, 3) for n, s in seconds.items()}
    out = options.artifacts or Path("artifacts")
    out.mkdir(parents=True, exist_ok=True)
    figure = draw_cost(sizes, [one_pass + n * one_set for n in sizes], list(seconds.values()), one_pass)
    figure.savefig(out / "cost_of_sets.png", dpi=150, metadata={"Software": None})


def draw_cost(
    sizes: Sequence[int], hooks: Sequence[float], one_decode: Sequence[float], one_pass: float
) -> Figure:
    """Draw seconds as multiples of one plain pass, on logarithmic axes."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, seconds, style in (
        ("a hooked pass for each set (one measured, times sets)", hooks, "--"),
        ("one decode for all sets", one_decode, "o-"),
    ):
        axes.loglog(sizes, [s / one_pass for s in seconds], style, label=label)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.annotate("one plain pass", (sizes[0], 1.0), (0, 4), textcoords="offset points", color="grey")
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("neuron sets ablated (505: five ablation values x 101)")
    axes.set_ylabel("time, in plain passes")
    axes.legend()
    return figure
