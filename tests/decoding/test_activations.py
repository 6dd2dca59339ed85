"""Streamed statistics against numpy, however the rows arrive."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccm.decoding import activations, hooked
from ccm.decoding import shared as decoding
from ccm.decoding.activations import (
    MEDIAN_BINS,
    MODE_BINS,
    Histograms,
    Moments,
    collect,
    finish,
    float16_sigma,
)
from ccm.decoding.results import Completions
from ccm.errors import CcmError
from ccm.method.ablation import PLAIN
from ccm.method.statistics import STATISTICS, ActivationStatistics
from ccm.models.bridge import Tokens
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import MAX_NEW_TOKENS, spec_for
from tests.decoding.test_hooked import fed_back, naive
from tests.exact import clear, margins
from tests.strategies import activation_matrices, chunkings
from tests.tolerance import STATISTIC
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

Matrix = npt.NDArray[np.float32]
some = settings(max_examples=80, deadline=None)


def streamed(rows: Matrix, chunks: Sequence[slice]) -> tuple[Moments, Histograms]:
    tensor = torch.from_numpy(rows)
    moments = Moments(rows.shape[1])
    for chunk in chunks:
        moments.update(tensor[chunk])
    histograms = Histograms(moments)
    for chunk in chunks:
        histograms.update(tensor[chunk])
    return moments, histograms


def statistics(rows: Matrix, chunks: Sequence[slice] = (slice(None),)) -> ActivationStatistics:
    return finish(*streamed(rows, chunks))


def edge_slack(column: npt.NDArray[np.float64], edges: npt.NDArray[np.float64], bin_: int) -> int:
    """How many values lie so near an edge of the bin that float64 may put them on either side."""
    near = 1e-12 * np.abs(column).max() + 1e-9 * (edges[1] - edges[0])
    return int((np.abs(column[:, None] - edges[[bin_, bin_ + 1]]) <= near).sum())


@given(rows=activation_matrices(), data=st.data())
@some
def test_statistics_are_numpys(rows: Matrix, data: st.DataObject) -> None:
    found = statistics(rows, data.draw(chunkings(len(rows)), label="chunks"))
    exact = rows.astype(np.float64)
    low, high = exact.min(axis=0), exact.max(axis=0)
    span = high - low
    np.testing.assert_array_equal(found.min, low)
    np.testing.assert_array_equal(found.max, high)
    # A constant neuron has no range: what is left is the last bit of its value.
    scale = np.maximum(span, 1e-9 * np.abs(exact).max(axis=0))
    STATISTIC.of("mean").assert_close(found.mean, exact.mean(axis=0), scale=scale)
    STATISTIC.of("std").assert_close(found.std, exact.std(axis=0), scale=scale)
    off = np.abs(found.median - np.median(exact, axis=0))
    bound = span / MEDIAN_BINS * (1 + 1e-6) + 1e-12 * np.abs(exact).max(axis=0)
    assert (off <= bound).all(), f"median off by {off}, allowed {bound}"
    for neuron in range(rows.shape[1]):
        check_mode(exact[:, neuron], float(found.mode[neuron]), f"neuron {neuron}")


def check_mode(column: npt.NDArray[np.float64], mode: float, what: str) -> None:
    low, high = column.min(), column.max()
    if low == high:
        assert mode == low, f"{what}: a constant's mode is {mode}, expected {low}"
        return
    counts, edges = np.histogram(column, bins=MODE_BINS, range=(low, high))
    bin_ = int((mode - low) / (high - low) * MODE_BINS)
    centre = (edges[bin_] + edges[bin_ + 1]) / 2
    STATISTIC.of("mode").assert_close(mode, centre, scale=high - low, what=what)
    lacking = int(counts.max() - counts[bin_])
    assert lacking <= edge_slack(column, edges, bin_) + edge_slack(
        column, edges, int(counts.argmax())
    ), f"{what}: bin {bin_} holds {counts[bin_]}, the fullest {counts.max()}"


@given(rows=activation_matrices(), data=st.data())
@some
def test_ranges_and_counts_are_the_same_bits_for_any_chunks(rows: Matrix, data: st.DataObject) -> None:
    moments, histograms = streamed(rows, [slice(None)])
    chunks = data.draw(chunkings(len(rows)), label="chunks")
    parts, part_histograms = streamed(rows, [slice(0, 0), *chunks[::-1], slice(0, 0)])
    assert parts.count == moments.count == len(rows)
    assert torch.equal(parts.min, moments.min)
    assert torch.equal(parts.max, moments.max)
    assert torch.equal(part_histograms.counts, histograms.counts)
    assert (histograms.counts.sum(1) == len(rows)).all(), "a row was lost or counted twice"
    for name in ("median", "mode"):
        whole, other = getattr(histograms, name)(), getattr(part_histograms, name)()
        assert torch.equal(whole, other), f"{name} depends on the chunks"


def test_the_fullest_bin_wins_and_the_lowest_of_equals() -> None:
    rows = np.array([[0, 0], [0, 1], [1, 2], [256, 2], [256, 256]], dtype=np.float32)
    found = statistics(rows)
    np.testing.assert_array_equal(found.mode, [0.5, 2.5])  # bins [0, 1) and [2, 3) of 256
    np.testing.assert_allclose(found.median, [1, 2], atol=256 / MEDIAN_BINS)


@given(value=st.floats(-1e6, 1e6, width=32), n=st.integers(1, 5))
def test_a_constant_neuron_is_its_own_every_statistic(value: float, n: int) -> None:
    found = statistics(np.full((n, 2), value, dtype=np.float32))
    for name, values in vars(found).items():
        np.testing.assert_array_equal(values, [0.0 if name == "std" else value] * 2, err_msg=name)


def test_memory_does_not_grow_with_the_rows() -> None:
    moments, histograms = streamed(np.zeros((1, 3), dtype=np.float32), [slice(None)])
    size = histograms.counts.numel()
    held = set(vars(moments)), set(vars(histograms))
    for _ in range(5):
        moments.update(torch.zeros(1000, 3))
        histograms.update(torch.zeros(1000, 3))
    assert histograms.counts.numel() == size == 3 * MEDIAN_BINS
    assert moments.mean.shape == moments.m2.shape == (3,)
    assert (set(vars(moments)), set(vars(histograms))) == held


@pytest.mark.parametrize(("at_once", "most"), [(10, 1), (48, 1), (100, 2), (1000, 7)])
def test_many_rows_are_taken_a_few_at_a_time(
    at_once: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "AT_ONCE", at_once)
    rows, seen = torch.arange(7.0 * 48).reshape(7, 48), list[torch.Tensor]()
    activations._in_chunks(seen.append)(rows)
    assert torch.equal(torch.cat(seen), rows), "a row was lost, or changed its place"
    assert max(map(len, seen)) == most


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_refused(bad: float) -> None:
    rows = np.ones((4, 3), dtype=np.float32)
    rows[2, 1] = bad
    with pytest.raises(CcmError, match=r"^neuron 1: its activations are not finite"):
        statistics(rows, [slice(0, 2), slice(2, 4)])


@given(sigma=st.lists(st.floats(0, 1e3), min_size=1, max_size=8), count=st.integers(1, 10**6))
def test_released_sigma_is_a_float16_sum(sigma: list[float], count: int) -> None:
    std = np.asarray(sigma)
    zeros = np.zeros_like(std)
    exact = ActivationStatistics(zeros, std, zeros, zeros, zeros, zeros)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = float16_sigma(exact, count)
    squares = std**2 * count
    overflows = squares >= 65520  # halfway to what would be the next float16
    np.testing.assert_array_equal(np.isinf(found.std), overflows)
    inside = ~overflows
    # float16 keeps 11 bits of the sum of squares, and steps of 2^-24 below 2^-14.
    lost = np.abs(found.std[inside] ** 2 * count - squares[inside])
    assert (lost <= 2**-11 * squares[inside] * (1 + 1e-9) + 2**-25).all()
    assert exact.std is std
    assert found.mean is exact.mean, "something else than sigma was changed"


@pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
def test_collect_covers_what_decoding_reads(config: ToyConfig) -> None:
    model = load(spec_for(str(toy_folder(config))))
    prompts = clear(model, token_prompts(6, config, max_len=5))
    assert len(prompts) > 3
    rows: list[torch.Tensor] = []
    for prompt in prompts:
        hooked.decode(model, [prompt], observe=lambda r: rows.append(r.clone()))
    every = torch.cat(rows).double().numpy()
    found, positions = collect(model, prompts)
    assert positions == len(every)
    span = every.max(axis=0) - every.min(axis=0)
    within = margins(model).a
    for name, wanted in (("mean", every.mean(0)), ("std", every.std(0)), ("min", every.min(0))):
        within.of(name).assert_close(getattr(found, name), wanted, what=config.id)
    off = np.abs(found.median - np.median(every, axis=0))
    assert (off <= 2 * span / MEDIAN_BINS + within.atol).all(), off / span


def test_what_fits_is_kept_and_the_rest_seen_again(capsys: pytest.CaptureFixture[str]) -> None:
    config = FAMILIES[0]
    model, prompts = load(spec_for(str(toy_folder(config)))), token_prompts(9, config, max_len=7)
    asked = list[int]()

    def decode(model: LoadedModel, prompts: Sequence[Tokens], **options: Any) -> Completions:
        asked.append(len(prompts))
        return decoding.decode(model, prompts, **options)

    kept, n = collect(model, prompts, decode)
    assert asked == [9], "what fits was run again"
    at_most = [4 * config.d_mlp * (len(prompt) + MAX_NEW_TOKENS - 1) for prompt in prompts]
    for keep, wanted in (
        (sum(at_most), [9]),
        (sum(at_most) - 1, [8, 1, 1]),
        (sum(at_most[:3]), [3, 6, 6]),
        (at_most[0] - 1, [9, 9]),
    ):
        asked.clear()
        again, m = collect(model, prompts, decode, keep)
        assert (asked, m) == (wanted, n)
        for name in STATISTICS:  # of other batches, whose rounding differs
            found, once = getattr(again, name), getattr(kept, name)
            assert np.abs(found - once).max() <= 1e-5 * np.abs(once).max(), name
    shown = capsys.readouterr().err
    assert f"{n}/{n}" in shown, "the bar of a second pass ends where it is done"
    assert "activation_stats" in shown


@pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
@pytest.mark.parametrize("decode", [hooked.decode, decoding.decode], ids=["hooked", "shared"])
def test_collected_statistics_are_those_of_plain_transformers(
    config: ToyConfig, decode: Callable[..., Completions]
) -> None:
    """Of every prompt position and every token fed back, read off at the last MLP's output matrix.

    Prompts of several lengths, some of which share a prefix and some of which end before others.
    """
    model = load(spec_for(str(toy_folder(config))))
    first, *others = token_prompts(6, config, seed=9, min_len=3, max_len=6)
    prompts = [first, [*first[:-1], 5], [*first, 7, 8], *others]
    read = [naive(config, prompt, PLAIN) for prompt in prompts]
    every = [r.activations[: len(p) + fed_back(r)] for p, r in zip(prompts, read, strict=True)]
    rows = torch.cat(every).double().numpy()
    found, positions = collect(model, prompts, decode)
    assert positions == len(rows)
    span = np.ptp(rows, axis=0)
    # A float32 activation is that far off; a row too many or too few moves a mean by a part in 80.
    near = 1e-4 * span + 1e-5 * np.abs(rows).max()
    for name, wanted in (
        *(("mean", rows.mean(0)), ("std", rows.std(0)), ("min", rows.min(0)), ("max", rows.max(0))),
        ("median", np.median(rows, axis=0)),
    ):
        off = np.abs(getattr(found, name) - wanted)
        bound = near + (2 * span / MEDIAN_BINS if name == "median" else 0)
        assert (off <= bound).all(), (
            f"{name} of neuron {int((off - bound).argmax())} is off by {off.max()}"
        )
