"""Measures that do not depend on size, selection and controls against brute force."""

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ccm.errors import BadInput
from ccm.method import neurons as neurons_module
from ccm.method.neurons import (
    FinalNorm,
    NeuronMeasures,
    controls,
    logit_var,
    matched_controls,
    measure,
    processed_W_out,
    processed_W_U,
    rho,
    select,
    spectrum,
)
from tests.strategies import neuron_sets
from tests.tolerance import MEASURE

some = settings(max_examples=60, deadline=None)
Shape = tuple[int, int, int, bool, int]
shapes = st.tuples(
    st.integers(3, 12), st.integers(1, 20), st.integers(13, 60), st.booleans(), st.integers(0, 99)
)  # d_model, d_mlp, d_vocab, LayerNorm, seed


def weights(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, FinalNorm]:
    d_model, d_mlp, d_vocab, centred, seed = shape
    generator = torch.Generator().manual_seed(seed)
    W_U = torch.randn(d_model, d_vocab, generator=generator) + 0.5
    W_out = torch.randn(d_mlp, d_model, generator=generator) + 0.3
    gain = torch.rand(d_model, generator=generator) + 0.5
    return W_U, W_out, FinalNorm(centred, 1e-5, gain, torch.zeros(d_model))


def table(shares: Any, var: Any) -> NeuronMeasures:
    shares = np.asarray(shares, dtype=np.float64)
    return NeuronMeasures(np.asarray(var, np.float64), np.ones(len(shares)), shares, np.ones(2))


# --- measures ---------------------------------------------------------------------------------------


@given(shape=shapes, exponents=st.lists(st.integers(-10, 10), min_size=20, max_size=20))
@some
def test_a_neurons_size_changes_its_norm_alone(shape: Shape, exponents: list[int]) -> None:
    """By powers of two, because any other factor rounds the weights, and so moves what is near 0."""
    W_U, W_out, norm = weights(shape)
    scales = 2.0 ** torch.tensor(exponents[: len(W_out)])[:, None]
    plain, scaled = (measure(W_U, w, norm, 2) for w in (W_out, -W_out * scales))
    MEASURE.of("LogitVar").assert_close(scaled.logit_var, plain.logit_var)
    MEASURE.of("rho").assert_close(scaled.rho, plain.rho)
    MEASURE.of("norm").assert_close(scaled.norm, plain.norm * scales[:, 0].double().numpy())
    np.testing.assert_array_equal(scaled.singular_values, plain.singular_values)


@given(shape=shapes, data=st.data())
@some
def test_measures_are_in_range_and_agree_with_svd(shape: Shape, data: st.DataObject) -> None:
    W_U, W_out, norm = weights(shape)
    dims = data.draw(st.integers(1, len(W_U)), label="null-space dimensions")
    found = measure(W_U, W_out, norm, dims)
    assert (found.rho >= 0).all()
    assert (found.rho <= 1 + 1e-12).all(), found.rho.max()
    assert (found.logit_var >= 0).all()
    assert (found.logit_var <= W_U.shape[1] / (W_U.shape[1] - 1)).all(), "cosines span -1 to 1"
    wanted = torch.linalg.svdvals(processed_W_U(W_U, norm).double())
    scale = float(wanted[0])
    MEASURE.of("singular value").assert_close(found.singular_values, wanted, scale=scale)
    assert (np.diff(found.singular_values) <= 0).all(), "not descending"
    if norm.centred:
        assert found.singular_values[-1] < 1e-5 * scale, "centring takes one direction away"
    table_ = found.table()
    assert list(table_.columns) == ["neuron_idx", "logitvar", "norm", "rho"]
    assert list(table_["neuron_idx"]) == list(range(len(W_out)))


@given(shape=shapes, data=st.data())
@some
def test_rho_is_one_inside_the_null_space_and_zero_outside(shape: Shape, data: st.DataObject) -> None:
    W_U, _, norm = weights(shape)
    dims = data.draw(st.integers(1, len(W_U) - 1), label="null-space dimensions")
    processed = processed_W_U(W_U, norm)
    V0 = torch.linalg.svd(processed.double(), full_matrices=True)[0][:, -dims:]
    # The centred direction (1, 1, ...) is no neuron's: it is taken off W_out.
    mix = torch.randn(3, len(W_U), generator=torch.Generator().manual_seed(shape[-1])).double()
    mix = processed_W_out(mix.float(), norm).double()
    inside = mix @ V0 @ V0.T
    outside = mix - inside
    for name, vectors, wanted in (("inside", inside, 1.0), ("outside", outside, 0.0)):
        if vectors.norm(dim=1).min() > 1e-3:  # LayerNorm and one dimension: nothing is inside
            shares = measure(W_U, vectors.float(), norm, dims).rho
            MEASURE.of("rho").assert_close(shares, np.full(3, wanted), scale=1.0, what=name)


@given(shape=shapes, data=st.data())
@some
def test_measures_are_the_definition(shape: Shape, data: st.DataObject) -> None:
    """Method 2 and 5 written a second time, in float64 and with the whole cosine matrix at hand."""
    W_U, W_out, norm = weights(shape)
    dims = data.draw(st.integers(1, len(W_U)), label="null-space dimensions")
    U = W_U.double().numpy() * norm.gain.double().numpy()[:, None]
    w = W_out.double().numpy()
    if norm.centred:
        U, w = U - U.mean(axis=0), w - w.mean(axis=1, keepdims=True)
    U = U - U.mean(axis=1, keepdims=True)
    sizes = np.linalg.norm(w, axis=1)
    cosines = (w / sizes[:, None]) @ (U / np.linalg.norm(U, axis=0))
    vectors, values, _ = np.linalg.svd(U, full_matrices=True)
    values = np.append(values, np.zeros(len(U) - len(values)))
    # Where two singular values are alike, either direction may be the last one of V0.
    assume(dims == len(U) or values[-dims - 1] - values[-dims] > 1e-2 * values[0])
    V0 = vectors[:, -dims:]

    found = measure(W_U, W_out, norm, dims)
    MEASURE.of("norm").assert_close(found.norm, sizes)
    MEASURE.of("LogitVar").assert_close(found.logit_var, cosines.var(axis=1, ddof=1))
    wanted_rho = np.linalg.norm(w @ V0, axis=1) / sizes
    MEASURE.of("rho").assert_close(found.rho, wanted_rho, scale=1.0)
    MEASURE.of("singular value").assert_close(found.singular_values, values, scale=values[0])
    assert found.null_space is not None
    assert found.null_space.shape == V0.shape
    MEASURE.of("V0").assert_close(found.null_space @ found.null_space.T, V0 @ V0.T, scale=1.0)
    MEASURE.of("rho").assert_close(rho(W_out, norm, found.null_space), wanted_rho, scale=1.0)
    for column, wanted in (("logitvar", found.logit_var), ("norm", found.norm), ("rho", found.rho)):
        np.testing.assert_array_equal(found.table()[column], wanted)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer_norm"])
def test_each_step_of_the_processing(centred: bool) -> None:
    W_U, W_out, norm = weights((6, 4, 30, centred, 7))
    folded = W_U * norm.gain[:, None]
    found = processed_W_U(W_U, norm)
    assert abs(found.mean(1)).max() < 1e-6, "a constant on all logits says nothing"
    assert (abs(found.mean(0)).max() < 1e-6) == centred, "RMSNorm takes no mean away"
    off = folded - folded.mean(1, keepdim=True)
    off = off - off.mean(0, keepdim=True) if centred else off
    torch.testing.assert_close(found, off)
    outputs = processed_W_out(W_out, norm)
    torch.testing.assert_close(outputs, W_out - W_out.mean(1, keepdim=True) if centred else W_out)


def test_left_singular_vectors_are_those_of_svd() -> None:
    W_U = weights((8, 1, 40, False, 3))[0]
    values, vectors = spectrum(W_U)
    U, S, _ = torch.linalg.svd(W_U.double(), full_matrices=False)
    MEASURE.of("singular value").assert_close(values, S)
    np.testing.assert_allclose((vectors.T @ U).abs(), np.eye(8), atol=1e-6)


@given(shape=shapes, chunk=st.integers(1, 70))
@some
def test_the_vocabulary_may_come_in_any_chunks(shape: Shape, chunk: int) -> None:
    W_U, W_out, norm = weights(shape)
    W_U, W_out = processed_W_U(W_U, norm), processed_W_out(W_out, norm)
    whole = logit_var(W_U, W_out), spectrum(W_U)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neurons_module, "VOCAB_COLUMNS", chunk)
        parts = logit_var(W_U, W_out), spectrum(W_U)[0]
    MEASURE.of("LogitVar").assert_close(parts[0], whole[0])
    MEASURE.of("singular value").assert_close(parts[1], whole[1], scale=float(whole[1][0]))


@pytest.mark.parametrize("dims", [0, -1, 5])
def test_null_space_dimensions_out_of_range(dims: int) -> None:
    W_U, W_out, norm = weights((4, 2, 13, True, 0))
    message = rf"^null-space dimensions {dims}: out of range. Allowed: 1 to 4"
    with pytest.raises(BadInput, match=message):
        measure(W_U, W_out, norm, dims)
    assert len(measure(W_U, W_out, norm, 4).rho) == 2


# --- selection --------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30),
    k=st.integers(1, 30),
    threshold=st.integers(0, 4),
)
def test_selection_is_the_definition(rows: list[tuple[int, int]], k: int, threshold: int) -> None:
    shares, var = np.array(rows).T / 4  # few values, so that both criteria tie
    eligible = [i for i in range(len(rows)) if shares[i] >= threshold / 4]
    wanted = sorted(eligible, key=lambda i: (var[i], i))[:k]
    if k <= len(eligible):
        assert select(table(shares, var), k, threshold / 4) == tuple(wanted)
    else:
        with pytest.raises(BadInput, match=f"^k={k} entropy neurons: "):
            select(table(shares, var), k, threshold / 4)


@pytest.mark.parametrize(
    ("k", "min_rho", "message"),
    [
        (0, 0.0, r"k=0 entropy neurons: out of range. Allowed: 1 to 3"),
        (4, 0.0, r"k=4 entropy neurons: out of range. Allowed: 1 to 3"),
        (3, 0.5, r"k=3 entropy neurons: only 2 of 3 reach rho >= 0.5. Lower"),
    ],
)
def test_selection_errors(k: int, min_rho: float, message: str) -> None:
    with pytest.raises(BadInput, match=f"^{message}"):
        select(table([0.4, 0.5, 0.9], [3, 2, 1]), k, min_rho)


# --- controls ---------------------------------------------------------------------------------------


@given(entropy=neuron_sets(40, min_size=2, max_size=8), seed=st.integers(0, 9), overlap=st.booleans())
def test_controls_are_distinct_and_of_the_sets_size(
    entropy: tuple[int, ...], seed: int, overlap: bool
) -> None:
    sets = controls(20, 40, entropy, seed, overlap=overlap)
    assert len(sets) == len({frozenset(s) for s in sets}) == 20
    for drawn in sets:
        assert len(set(drawn)) == len(drawn) == len(entropy)
        assert set(drawn) <= set(range(40))
        assert set(drawn) != set(entropy)
        assert overlap or not set(drawn) & set(entropy), "a control holds an entropy neuron"
    assert sets == controls(20, 40, entropy[::-1], seed, overlap=overlap)
    assert sets[:5] == controls(5, 40, entropy, seed, overlap=overlap)
    assert sets != controls(20, 40, entropy, seed + 1, overlap=overlap)


def released_draws(n: int, d_mlp: int, entropy: frozenset[int]) -> list[tuple[int, ...]]:
    random = np.random.RandomState(123)
    drawn: list[npt.NDArray[np.int64]] = []
    while len(drawn) < n:
        one = random.choice(d_mlp, len(entropy), replace=False)
        if set(one) not in [entropy, *map(set, drawn)]:
            drawn.append(one)
    return [tuple(int(i) for i in one) for one in drawn]


@pytest.mark.parametrize(("d_mlp", "entropy"), [(3072, (584, 1611, 2123)), (6, (1, 4)), (5, (0,))])
def test_the_released_stream(d_mlp: int, entropy: tuple[int, ...]) -> None:
    n = min(100, len(list(combinations(range(6), 2))) - 1 if d_mlp == 6 else 100, d_mlp - 1)
    assert controls(n, d_mlp, entropy, 123, overlap=True) == released_draws(
        n, d_mlp, frozenset(entropy)
    )


@pytest.mark.parametrize(("overlap", "exist"), [(False, 3), (True, 9)])
def test_every_set_can_be_drawn_and_not_one_more(overlap: bool, exist: int) -> None:
    sets = controls(exist, 5, (1, 3), 0, overlap=overlap)
    pool = range(5) if overlap else (0, 2, 4)
    every = {frozenset(pair) for pair in combinations(pool, 2)} - {frozenset((1, 3))}
    assert {frozenset(s) for s in sets} == every
    message = f"^{exist + 1} controls: only {exist} distinct sets of 2 of {len(pool)} neurons exist"
    with pytest.raises(BadInput, match=message):
        controls(exist + 1, 5, (1, 3), 0, overlap=overlap)


# --- matched controls ---------------------------------------------------------------------------------

layers = st.tuples(st.integers(8, 60), st.integers(1, 6), st.integers(0, 99))  # d_mlp, k, seed
Layer = tuple[int, int, int]


def layer(shape: Layer) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Norms, sigmas and an entropy set, some of it far from the other neurons."""
    d_mlp, k, seed = shape
    random = np.random.default_rng(seed)
    norm, sigma = random.lognormal(0, 0.5, (2, d_mlp))
    entropy = tuple(int(i) for i in random.choice(d_mlp, min(k, d_mlp // 2 - 1), replace=False))
    norm[list(entropy[:2])] *= 3
    return norm, sigma, entropy


@given(shape=layers, seed=st.integers(0, 9), n=st.integers(1, 4))
@some
def test_matched_controls_are_distinct_sets_of_other_neurons(shape: Layer, seed: int, n: int) -> None:
    norm, sigma, entropy = layer(shape)
    sets = matched_controls(n, norm, sigma, entropy, seed)
    assert len(sets) == len({frozenset(s) for s in sets}) == n
    for drawn in sets:
        assert len(set(drawn)) == len(drawn) == len(entropy), "a neuron twice in a set"
        assert not set(drawn) & set(entropy), "an entropy neuron"
        assert set(drawn) <= set(range(len(norm)))
    assert sets == matched_controls(n, norm, sigma, entropy[::-1] + entropy, seed)
    assert sets[:1] == matched_controls(1, norm, sigma, entropy, seed)


@given(seed=st.integers(0, 99), k=st.integers(1, 6))
@some
def test_every_slot_is_filled_from_the_nearest_neurons(seed: int, k: int) -> None:
    norm, sigma, entropy = layer((60, k, seed))
    sets = np.asarray(matched_controls(12, norm, sigma, entropy, seed, nearest=15))
    others = np.setdiff1d(np.arange(60), entropy)
    places = np.log(np.stack([norm, sigma], axis=1))
    low, high = places[others].min(0), places[others].max(0)
    places = np.clip(places, low, high) / places[others].std(0)
    for slot, own in enumerate(sorted(entropy)):
        distance = np.linalg.norm(places - places[own], axis=1)
        # 12 sets of one neuron need more than 15 of them: 24.
        furthest = np.sort(distance[others])[(24 if k == 1 else 15) - 1]
        assert (distance[sets[:, slot]] <= furthest + 1e-12).all()
    assert (sets[0] != sets[1]).any()


@given(seed=st.integers(0, 99))
@some
def test_matched_controls_are_nearer_than_random_ones(seed: int) -> None:
    norm, sigma, entropy = layer((60, 4, seed))
    places = np.log(np.stack([norm, sigma], axis=1))
    places /= places.std(0)
    own = places[sorted(entropy)]
    matched = np.asarray(matched_controls(40, norm, sigma, entropy, seed, nearest=8))
    plain = np.asarray(controls(40, 60, entropy, seed))

    def distance(sets: np.ndarray) -> float:
        return float(np.linalg.norm(places[sets] - own, axis=-1).mean())

    assert distance(matched) < 0.8 * distance(plain)


@pytest.mark.parametrize("k", [1, 2, 19, 20, 30])
def test_a_hundred_sets_whatever_the_size(k: int) -> None:
    random = np.random.default_rng(0)
    norm, sigma = random.lognormal(0, 0.5, (2, 300))
    sets = matched_controls(100, norm, sigma, range(k), 123)
    assert len({frozenset(s) for s in sets}) == 100
    assert all(len(set(s)) == k and min(s) >= k for s in sets)


def test_neurons_without_weight_or_spread() -> None:
    """They are never drawn, and where an entropy neuron is one it is matched by the least ones."""
    norm = np.asarray([0.0, 1.0, 1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    sigma = np.asarray([1.0, 0.0, np.inf, 1.0, 0.0, *[1.0] * 6])
    assert matched_controls(1, norm, sigma, [0], 0, nearest=1) in ([(5,)], [(6,)])  # of two nearest
    drawn = {i for s in matched_controls(15, norm, sigma, [0, 1], 0, nearest=9) for i in s}
    assert drawn == {5, 6, 7, 8, 9, 10}, "neurons that cannot be ablated"
    assert len(matched_controls(3, norm, sigma, [2], 0)) == 3, "infinite sigma (defect 3)"
    message = r"^7 matched controls: only 6 distinct sets of 1 of 6 neurons with an output weight"
    with pytest.raises(BadInput, match=message):
        matched_controls(7, norm, sigma, [0], 0)
    assert matched_controls(0, norm, sigma, [0], 0) == []
    sigma[0] = np.nan
    with pytest.raises(BadInput, match=r"^neuron 0: norm 0.0, sigma nan, so nothing matches it"):
        matched_controls(1, norm, sigma, [0], 0)
    assert matched_controls(0, norm, sigma, [0], 0) == []  # what the message says to do


def test_every_matched_set_there_is() -> None:
    norm = np.arange(1.0, 6.0)
    sets = matched_controls(3, norm, np.ones(5), [1, 3], 0)
    assert {frozenset(s) for s in sets} == {frozenset(p) for p in combinations((0, 2, 4), 2)}
