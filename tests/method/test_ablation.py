"""The five values against their formulas, and every list or table that is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccm.errors import BadInput
from ccm.method.ablation import (
    BITS,
    CONTROL,
    MATCHED,
    PLAIN,
    check_neurons,
    kind_of,
    numbered,
    plan,
    round_to_bits,
)
from ccm.method.ablation_values import ABLATION_VALUES, ablation_values
from ccm.method.statistics import STATISTICS, ActivationStatistics, check_statistics

NAMES = (
    "mean_ablation",
    "median_ablation",
    "mode_ablation",
    "mean_minus_sigma_ablation",
    "mean_plus_sigma_ablation",
)


def statistics(n: int = 4, **changed: Any) -> ActivationStatistics:
    """Ordinary ones: neuron i has mean i and sigma 1, a median and mode of its own, and +-10."""
    mean = np.arange(n, dtype=np.float64)
    values = {"mean": mean, "std": np.ones(n), "median": mean + 0.25, "mode": mean - 0.5}
    values |= {"min": mean - 10, "max": mean + 10}
    return ActivationStatistics(**{**values, **changed})


# --- the values -------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.floats(0, 5), st.floats(0, 9), st.floats(0, 9)),
        min_size=1,
        max_size=6,
    )
)
def test_five_values_are_the_formulas(rows: list[tuple[float, float, float, float]]) -> None:
    mean, std, below, above = np.array(rows).T
    held = ActivationStatistics(mean, std, mean + 0.1, mean - 0.2, mean - below, mean + above)
    found = {value.name: value.of(held) for value in ablation_values("all")}
    assert tuple(found) == NAMES
    for i, (mu, sigma, _, _) in enumerate(rows):
        wanted = (
            mu,
            mu + 0.1,
            mu - 0.2,
            max(mu - 3 * sigma, held.min[i]),
            min(mu + 3 * sigma, held.max[i]),
        )
        assert [found[name][i] for name in NAMES] == list(wanted), f"neuron {i}"


def test_sigma_values_are_clipped_to_what_the_neuron_reaches() -> None:
    held = statistics(
        2, std=np.array([1.0, np.inf]), min=np.array([-1.0, -7.0]), max=np.array([9.0, 8.0])
    )
    minus, plus = ablation_values(["mean_minus_sigma_ablation", "mean_plus_sigma_ablation"])
    np.testing.assert_array_equal(minus.of(held), [-1, -7])  # clipped; released sigmas are infinite
    np.testing.assert_array_equal(plus.of(held), [3, 8])


def test_names() -> None:
    assert tuple(ABLATION_VALUES) == NAMES
    assert ablation_values("all") == ablation_values(["mode_ablation", "all"])
    assert [v.name for v in ablation_values("mode_ablation")] == ["mode_ablation"]
    twice = ["mode_ablation", "mean_ablation", "mode_ablation"]
    assert [v.name for v in ablation_values(twice)] == ["mode_ablation", "mean_ablation"]
    with pytest.raises(
        BadInput, match=r"^ablation value 'mean': unknown. Allowed: mean_ablation, .*all"
    ):
        ablation_values(["mean_ablation", "mean"])


@pytest.mark.parametrize("kind", [CONTROL, MATCHED])
def test_a_numbered_set_is_of_its_kind(kind: str) -> None:
    names = list(numbered(kind, [(i,) for i in range(1001)]))
    assert (names[0], names[999], names[1000]) == (f"{kind}_000", f"{kind}_999", f"{kind}_1000")
    assert {kind_of(name) for name in names} == {kind}
    for other in (kind, f"{kind}_", f"{kind}_07", f"my {kind}_007", f"{kind}_007b", "entropy"):
        assert kind_of(other) is None, other


# --- plans ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_pairs_each_neuron_with_its_own_value(name: str) -> None:
    held = statistics()
    planned = plan("some", [3, 0, 3, 1], ABLATION_VALUES[name], held)
    values = ABLATION_VALUES[name].of(held)
    assert (planned.name, planned.neurons) == ("some", (0, 1, 3))
    assert planned.values == tuple(values[[0, 1, 3]])
    assert all(type(v) is float for v in planned.values), "a numpy float would not serialise"


def test_an_empty_plan_is_the_plain_run() -> None:
    empty = plan("plain", [], ABLATION_VALUES["mean_ablation"], statistics())
    assert empty == PLAIN


@pytest.mark.parametrize("neuron", [-1, 4])
def test_a_plan_refuses_neurons_out_of_range(neuron: int) -> None:
    with pytest.raises(BadInput, match=rf"^neuron {neuron}: out of range. Allowed: 0 to 3\."):
        plan("some", [1, neuron], ABLATION_VALUES["mean_ablation"], statistics())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_plan_refuses_a_value_that_is_not_finite(bad: float) -> None:
    held = statistics(mode=np.array([0, 1, bad, 3]))
    message = rf"^neuron 2: its mode_ablation value is {bad}, not finite"
    with pytest.raises(BadInput, match=message):
        plan("some", [0, 2], ABLATION_VALUES["mode_ablation"], held)
    assert plan("some", [0, 1], ABLATION_VALUES["mode_ablation"], held).values == (0, 1)


# --- what users give --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ([], r"mine: empty. Give at least one neuron number from 0 to 7"),
        ([1, 8], r"mine: neuron 8 is out of range. Allowed: 0 to 7"),
        ([-1], r"mine: neuron -1 is out of range"),
        ([3, 4, 3], r"mine: neuron 3 is repeated"),
    ],
)
def test_neuron_lists_that_are_refused(neurons: list[int], message: str) -> None:
    with pytest.raises(BadInput, match=f"^{message}"):
        check_neurons(neurons, 8, "mine")


def test_a_neuron_list_keeps_its_order() -> None:
    assert check_neurons([5, 0, 7], 8) == (5, 0, 7)


def test_statistics_of_different_lengths_are_refused() -> None:
    held = statistics()
    object.__setattr__(held, "mode", np.zeros(3))  # the tests' type checker would refuse it first
    with pytest.raises(
        BadInput, match=r"^activation statistics of different lengths: .*'mode': \(3,\)"
    ):
        held.__post_init__()


def test_statistics_of_another_model_are_refused() -> None:
    held = statistics()
    assert check_statistics(held, 4) is held
    with pytest.raises(
        BadInput, match=r"^activation statistics: mean has shape \(4,\), the model has 5"
    ):
        check_statistics(held, 5)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_statistics_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    values = np.array([0.0, bad, 1.0, bad])
    message = rf"^activation statistics: {name} of neuron 1 is {bad}, not finite \(2 in all\)"
    with pytest.raises(BadInput, match=message):
        check_statistics(statistics(**{name: values}), 4)


@given(
    st.floats(-1e30, 1e30, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-30),
    st.floats(-1e-9, 1e-9),
)
def test_values_are_rounded_as_float16_rounds(value: float, off: float) -> None:
    found = float(round_to_bits(np.array([value]))[0])
    if 2**-14 <= abs(value) < 65504:  # float16's normal numbers
        assert found == float(np.float16(value))
    assert abs(found - value) <= 2.0**-BITS * abs(value)
    assert float(round_to_bits(np.array([found]))[0]) == found
    from_edge = abs(np.ldexp(np.frexp(value)[0], BITS)) % 1 - 0.5  # where rounding turns
    if abs(from_edge) > 2**BITS * abs(off):
        assert float(round_to_bits(np.array([value * (1 + off)]))[0]) == found


def test_a_set_holds_rounded_values_unless_told_otherwise() -> None:
    held = statistics()
    third = replace(held, mean=held.mean + 1 / 3)
    mean = ABLATION_VALUES["mean_ablation"]
    exact = plan("some", [0, 1], mean, third, rounded=False).values
    assert exact == tuple(third.mean[:2])
    assert plan("some", [0, 1], mean, third).values == tuple(round_to_bits(third.mean[:2]))
    assert plan("some", [0, 1], mean, third).values != exact
