import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tolerance import (
    ENTROPY,
    GPU_WIDENING,
    LOG_PROBABILITY,
    MEASURE,
    PERCENT,
    STATISTIC,
    Tolerance,
)

# Typed in again, so that a margin cannot be moved without a test that says so.
MARGINS = [
    (MEASURE, 1e-4, 0.0),
    (ENTROPY, 0.0, 1e-4),
    (LOG_PROBABILITY, 0.0, 1e-4),
    (PERCENT, 0.0, 1e-9),
    (STATISTIC, 1e-6, 0.0),
]
each_margin = pytest.mark.parametrize(
    ("tolerance", "rtol", "atol"), MARGINS, ids=[tolerance.name for tolerance, *_ in MARGINS]
)
both_sides = pytest.mark.parametrize("side", [-1.0, 1.0], ids=["below", "above"])


@each_margin
@both_sides
@pytest.mark.parametrize("expected", [3.0, -3.0])
def test_just_inside_is_close_and_just_outside_is_not(
    tolerance: Tolerance, rtol: float, atol: float, side: float, expected: float
) -> None:
    margin = rtol * 3 + atol
    tolerance.assert_close(expected + side * 0.999 * margin, expected)
    with pytest.raises(AssertionError, match=f"{tolerance.name}="):
        tolerance.assert_close(expected + side * 1.001 * margin, expected)


@each_margin
def test_every_tolerance_gives_its_reason(tolerance: Tolerance, rtol: float, atol: float) -> None:
    assert len(tolerance.reason) > 40
    assert (tolerance.rtol, tolerance.atol) == (rtol, atol)


@both_sides
def test_scale_takes_the_place_of_the_expected_value(side: float) -> None:
    STATISTIC.assert_close(side * 0.999e-4, 0.0, scale=100.0)
    with pytest.raises(AssertionError, match=r"statistic="):
        STATISTIC.assert_close(side * 1.001e-4, 0.0, scale=100.0)
    with pytest.raises(AssertionError, match=r"statistic="):
        STATISTIC.assert_close(1000.0 + side * 0.5e-3, 1000.0, scale=100.0)  # 1000 alone allows it


def test_scale_may_differ_by_neuron() -> None:
    STATISTIC.assert_close([0.9e-6, 0.9e-4], [0.0, 0.0], scale=[1.0, 100.0])
    with pytest.raises(AssertionError, match=r"statistic=0.00009\d* at \[1\]|statistic=9e-05"):
        STATISTIC.assert_close([0.9e-6, 0.9e-4], [0.0, 0.0], scale=[100.0, 1.0])


@both_sides
def test_a_gpu_widens_the_margin_by_one_factor(side: float) -> None:
    inside, outside = (1.0 + side * part * GPU_WIDENING * 1e-4 for part in (0.999, 1.001))
    ENTROPY.assert_close(inside, 1.0, device="cuda")
    ENTROPY.assert_close(inside, 1.0, device=torch.device("cuda", 1))
    with pytest.raises(AssertionError, match="entropy="):
        ENTROPY.assert_close(outside, 1.0, device="cuda")
    with pytest.raises(AssertionError, match="entropy="):
        ENTROPY.assert_close(inside, 1.0, device="cpu")


def test_the_message_names_quantity_place_margin_and_case() -> None:
    actual, expected = [1.0, 2.0, 3.0, 1.2345], [1.0, 2.0, 3.0, 1.2340]
    with pytest.raises(AssertionError) as failure:
        ENTROPY.assert_close(actual, expected, what="organism, mean_ablation")
    message = "entropy=1.2345 at [3], expected 1.234 +- 0.0001 [organism, mean_ablation]"
    assert str(failure.value) == message


def test_the_message_shows_the_worst_value_and_counts_the_others() -> None:
    actual = np.zeros((2, 3))
    actual[0, 1], actual[1, 2], actual[1, 0] = 0.5, -2.0, 1e-5
    with pytest.raises(AssertionError) as failure:
        LOG_PROBABILITY.assert_close(actual, np.zeros((2, 3)))
    message = "log-probability=-2 at [1, 2], expected 0.0 +- 0.0001 (and 1 more of 6)"
    assert str(failure.value) == message
    actual[1, 1] = math.nan
    with pytest.raises(AssertionError, match=r"=nan at \[1, 1\], .* \(and 2 more of 6\)$"):
        LOG_PROBABILITY.assert_close(actual, np.zeros((2, 3)))


def test_a_near_miss_prints_two_different_numbers() -> None:
    with pytest.raises(AssertionError) as failure:
        PERCENT.assert_close(50.0000000011, 50.0)
    assert str(failure.value) == "percent=50.0000000011, expected 50 +- 1e-09"


def test_a_tolerance_takes_the_name_of_a_quantity() -> None:
    with pytest.raises(AssertionError, match=r"^rho=0\.5, expected 0\.6 \+- 6e-05$"):
        MEASURE.of("rho").assert_close(0.5, 0.6)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [([1.0], 1.0), ([1.0, 1.0], [1.0]), ([[1.0, 1.0]], [1.0, 1.0]), ([], [1.0])],
    ids=["list-for-number", "two-for-one", "matrix-for-vector", "none-for-one"],
)
def test_shapes_are_not_broadcast(actual: list[float], expected: list[float]) -> None:
    with pytest.raises(AssertionError, match=r"^entropy has shape .*, expected .* \[organism\]$"):
        ENTROPY.assert_close(actual, expected, what="organism")


@pytest.mark.parametrize(
    "actual", [1, True, "1.0", None, 1.0 + 0.0j, torch.tensor(1)], ids=lambda value: repr(value)
)
def test_only_floats_are_measured(actual: object) -> None:
    with pytest.raises(AssertionError, match=r"^entropy has type .*, expected a float"):
        ENTROPY.assert_close(actual, 1.0)


@pytest.mark.parametrize("expected", [True, "1.0", None])
def test_an_expected_value_is_a_number(expected: object) -> None:
    with pytest.raises(AssertionError, match=r"^entropy: expected has type"):
        ENTROPY.assert_close(1.0, expected)


def test_type_is_checked_before_shape_and_shape_before_value() -> None:
    with pytest.raises(AssertionError, match="has type"):
        ENTROPY.assert_close([1, 2], [9.0])
    with pytest.raises(AssertionError, match="has shape"):
        ENTROPY.assert_close([1.0, 2.0], [9.0])


@pytest.mark.parametrize(
    ("actual", "expected"),
    [(math.nan, math.nan), (math.nan, 1.0), (1.0, math.nan)],
    ids=["both", "actual", "expected"],
)
def test_nan_is_refused(actual: float, expected: float) -> None:
    with pytest.raises(AssertionError, match=r"entropy=.* at \[1\]"):
        ENTROPY.assert_close([1.0, actual], [1.0, expected])


def test_nan_equals_nan_at_the_same_place_when_asked() -> None:
    ENTROPY.assert_close([math.nan, 1.0], [math.nan, 1.0], equal_nan=True)
    with pytest.raises(AssertionError, match=r"entropy=nan at \[0\], expected 1 \+- .*1 more of 2"):
        ENTROPY.assert_close([math.nan, 1.0], [1.0, math.nan], equal_nan=True)


@pytest.mark.parametrize("tolerance", [ENTROPY, MEASURE], ids=["absolute", "relative"])
def test_infinity_is_close_to_itself_only(tolerance: Tolerance) -> None:
    tolerance.assert_close([-math.inf], [-math.inf])
    for actual, expected in ((math.inf, -math.inf), (1.0, math.inf), (math.inf, 1.0)):
        with pytest.raises(AssertionError, match="expected"):
            tolerance.assert_close(actual, expected)


def test_a_relative_margin_around_zero_is_nothing() -> None:
    MEASURE.assert_close(0.0, 0.0)
    with pytest.raises(AssertionError, match=r"measure=1e-300, expected 0.0 \+- 0"):
        MEASURE.assert_close(1e-300, 0.0)


@given(st.lists(st.floats(-1e6, 1e6, width=32), max_size=5))
def test_arrays_tensors_and_lists_compare_alike(values: list[float]) -> None:
    forms = [values, np.array(values, dtype=np.float32), torch.tensor(values, requires_grad=True)]
    for actual in forms:
        for expected in forms:
            PERCENT.assert_close(actual, expected)
            if values:
                moved = [values[0] + 1.0, *values[1:]]
                with pytest.raises(AssertionError, match=r"percent=.* at \[0\]"):
                    PERCENT.assert_close(moved, expected)


def test_bfloat16_is_a_float_of_its_own_precision() -> None:
    MEASURE.assert_close(torch.tensor([0.5], dtype=torch.bfloat16), [0.5])
    with pytest.raises(AssertionError, match="measure="):
        MEASURE.assert_close(torch.tensor([0.3], dtype=torch.bfloat16), [0.3])
