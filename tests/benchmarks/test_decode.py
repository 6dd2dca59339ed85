"""One decode for every ablation, against one plain pass of the hooked path over the same prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from ccm.decoding import hooked
from ccm.decoding.results import Work
from ccm.decoding.shared import decode_sets
from ccm.method.ablation import Ablation
from conftest import Options
from tests.benchmarks.subjects import Subject, gpt2_dimensions, organism

BATCH_SIZES = (256, 1024)  # the hooked path gets the better one


def shared(subject: Subject, ablations: Sequence[Ablation], *, to_the_end: bool = False) -> Work:
    """Plain run and all sets; every text ends with its decision unless asked for to the end."""
    work = Work()
    options: dict[str, Any] = {"full": [to_the_end] * (1 + len(ablations)), "decided": subject.decided}
    for _ in decode_sets(subject.model, subject.prompts, ablations, work=work, **options):
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
    ("n_values", "n_controls", "to_the_end", "target"),
    [(1, 100, False, 0.6), (1, 100, True, None), (1, 200, False, None), (5, 100, False, 3.0)],
    ids=["102-runs", "102-runs-full-texts", "202-runs", "506-runs"],
)
def test_organism(
    n_values: int,
    n_controls: int,
    to_the_end: bool,
    target: float | None,
    benchmark: Any,
    best_of: Callable[..., float],
) -> None:
    subject = organism()
    ablations = subject.ablations(n_values, n_controls)
    baseline = plain_pass(subject, best_of)
    work = benchmark.pedantic(
        shared, (subject, ablations), {"to_the_end": to_the_end}, rounds=5, warmup_rounds=1
    )
    ratio = benchmark.stats.stats.min / min(baseline, plain_pass(subject, best_of))
    record(benchmark, subject, work, ratio, sets=len(ablations), target=target)
    benchmark.extra_info["times_faster_than_a_pass_a_set"] = round((1 + len(ablations)) / ratio, 1)


def test_twice_the_controls(benchmark: Any, best_of: Callable[..., float]) -> None:
    subject = organism()
    hundred, two_hundred = (subject.ablations(1, n) for n in (100, 200))
    shared(subject, hundred)
    baseline = best_of(lambda: shared(subject, hundred), 5)
    work = benchmark.pedantic(shared, (subject, two_hundred), rounds=5)
    ratio = benchmark.stats.stats.min / baseline
    record(benchmark, subject, work, ratio, sets=len(two_hundred), target=1.25)
    benchmark.extra_info["of"] = "the same with 100 controls"


@pytest.mark.slow
def test_gpt2_dimensions(benchmark: Any, best_of: Callable[..., float]) -> None:
    subject = gpt2_dimensions()
    ablations = subject.ablations(1, 100)
    baseline = plain_pass(subject, best_of, rounds=2)
    work = benchmark.pedantic(shared, (subject, ablations), rounds=2)
    ratio = benchmark.stats.stats.min / baseline
    record(benchmark, subject, work, ratio, sets=len(ablations), target=1.0)


def test_cost_of_sets(benchmark: Any, best_of: Callable[..., float], options: Options) -> None:
    """Cost against the number of sets, both paths, drawn into the artifacts."""
    subject = organism()
    sizes = (1, 11, 31, 101, 201, 505)
    of_sets = {n: subject.ablations(1, n - 1) if n < 505 else subject.ablations(5, 100) for n in sizes}
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
