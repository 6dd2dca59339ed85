"""Scores against their definitions, counted prompt by prompt."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ccm.method.scores import (
    CONFIDENCE,
    ControlSummary,
    conversion_ratio,
    global_transition_score,
    mean_by_transition,
    permutation_p,
    q_value,
    quantile,
    ratio,
    summarise,
    transition_counts,
    transition_scores,
)
from ccm.method.sources import SOURCES
from tests.strategies import Source, sources
from tests.tolerance import PERCENT

some = settings(max_examples=150, deadline=None)
proportions = st.sampled_from([0.0, 1 / 3, 0.5, 0.75, 0.9, 1.0])  # few, so that they tie


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Source], list[Source]]:
    """Sources before and after, of the same prompts."""
    before = draw(sources(max_size=40), label="before")
    after = draw(sources(min_size=len(before), max_size=len(before)), label="after")
    return before, after


# --- transitions --------------------------------------------------------------------------------------


@given(runs())
@some
def test_counts_and_scores_are_the_definition(run: tuple[list[Source], list[Source]]) -> None:
    pairs = list(zip(*run, strict=True))
    counts = transition_counts(*run)
    found = transition_scores(counts)
    for i, k in enumerate(SOURCES):
        before = [b for b, _ in pairs if b == k]
        for j, k2 in enumerate(SOURCES):
            moved = sum(pair == (k, k2) for pair in pairs)
            assert counts[i, j] == moved, f"{k} to {k2}"
            proportion = 100 * moved / len(before) if before else math.nan
            PERCENT.assert_close(found[i, j], proportion, equal_nan=True, what=f"TS({k}, {k2})")
        if before:
            PERCENT.assert_close(found[i].sum(), 100.0, what=f"row {k}")
    assert counts.sum() == len(pairs)


def test_before_and_after_are_of_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="zip"):
        transition_counts(["CK"], ["CK", "PK"])


@given(runs())
@some
def test_gts_and_cr_are_the_definition(run: tuple[list[Source], list[Source]]) -> None:
    pairs, counts = list(zip(*run, strict=True)), transition_counts(*run)
    gts = global_transition_score(counts)
    assert (gts.count, gts.total) == (sum(b != a for b, a in pairs), len(pairs))
    if pairs:
        same = sum(b == a for b, a in pairs) / len(pairs)
        PERCENT.assert_close(100 - 100 * same, gts.percent, what="1 - GTS")
    for k in SOURCES:
        others = [a for b, a in pairs if b != k]
        cr = conversion_ratio(counts, k)
        assert (cr.count, cr.total) == (others.count(k), len(others)), f"CR({k})"
        released = conversion_ratio(counts, k, released=True)
        assert released == conversion_ratio(counts, "PK" if k == "ND" else k), f"released CR({k})"


def test_released_nd_ratio_differs_where_it_matters() -> None:
    counts = transition_counts(["CK", "CK", "PK"], ["ND", "CK", "PK"])
    assert conversion_ratio(counts, "ND").count == 1
    assert conversion_ratio(counts, "ND", released=True) == conversion_ratio(counts, "PK")
    assert conversion_ratio(counts, "ND", released=True).count == 0


# --- intervals ----------------------------------------------------------------------------------------


@given(total=st.integers(1, 5000), data=st.data())
@some
def test_intervals_are_clopper_pearsons(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total), label="count")
    found = ratio(count, total)
    assert (found.count, found.total, found.percent) == (count, total, 100 * count / total)
    alpha = 1 - CONFIDENCE
    low = 0.0 if count == 0 else stats.beta.ppf(alpha / 2, count, total - count + 1)
    high = 1.0 if count == total else stats.beta.ppf(1 - alpha / 2, count + 1, total - count)
    assert found.low == pytest.approx(100 * low, abs=1e-7)
    assert found.high == pytest.approx(100 * high, abs=1e-7)
    assert 0 <= found.low <= found.percent <= found.high <= 100
    assert CONFIDENCE == 0.95


def test_nothing_to_divide_by_is_no_number() -> None:
    empty = ratio(0, 0)
    assert (empty.percent, empty.low, empty.high) == (None, None, None)
    assert global_transition_score(np.zeros((3, 3), dtype=np.int64)) == empty


# --- against the controls -----------------------------------------------------------------------------


@given(value=proportions, controls=st.lists(proportions, min_size=1, max_size=30))
@some
def test_q_is_counted(value: float, controls: list[float]) -> None:
    """kind='rank': those below and half of those equal, the set itself counted in where it ties."""
    below = sum(c < value for c in controls)
    equal = sum(c == value for c in controls)
    percentile = 100 * (2 * below + equal + (equal > 0)) / (2 * len(controls))
    PERCENT.assert_close(q_value(value, controls), 100 - percentile)
    PERCENT.assert_close(quantile(value, np.asarray(controls)), percentile)
    assert -1e-9 <= q_value(value, controls) <= 100 + 1e-9


def test_q_by_hand() -> None:
    assert q_value(0.1, [0.5, 0.6, 0.7, 0.8]) == 100.0  # changes more than every control
    assert q_value(0.9, [0.5, 0.6, 0.7, 0.8]) == 0.0
    assert q_value(0.65, [0.5, 0.6, 0.7, 0.8]) == 50.0
    assert quantile(math.nan, np.ones(3)) is None
    assert quantile(1.0, np.full(3, np.nan)) is None
    assert quantile(2.0, np.array([1.0, math.nan])) == 100.0


@given(changed=st.integers(0, 9), controls=st.lists(st.integers(0, 9), max_size=30))
@some
def test_permutation_p_is_counted(changed: int, controls: list[int]) -> None:
    as_large = len([c for c in [*controls, changed] if c >= changed])
    assert permutation_p(changed, controls) == as_large / (len(controls) + 1)


def test_permutation_p_has_a_floor() -> None:
    assert permutation_p(9, [1] * 100) == 1 / 101
    assert permutation_p(0, [1] * 100) == 1.0


@given(
    value=st.floats(0, 100) | st.just(math.nan),
    controls=st.lists(st.floats(0, 100) | st.just(math.nan), max_size=20),
)
@some
def test_summary_is_numpys(value: float, controls: list[float]) -> None:
    found = summarise(value, controls)
    finite = np.array([c for c in controls if not math.isnan(c)])
    if not len(finite):
        assert found == ControlSummary(None, None, None, None, None)
        return
    assert found.mean == pytest.approx(np.mean(finite))
    assert (found.low, found.high) == (min(finite), max(finite))
    if len(finite) == 1:
        assert found.three_standard_errors is None
    else:
        assert found.three_standard_errors == pytest.approx(3 * stats.sem(finite), abs=1e-9)
    if math.isnan(value):
        assert found.entropy_quantile is None
    else:
        wanted = stats.percentileofscore(finite, value, kind="rank")
        assert found.entropy_quantile == pytest.approx(wanted)


@given(runs(), st.randoms(use_true_random=False))
@some
def test_means_by_transition(run: tuple[Sequence[Source], Sequence[Source]], random: object) -> None:
    before, after = run
    values = np.array([random.uniform(-3, 3) for _ in before])  # type: ignore[attr-defined]
    found = mean_by_transition(before, after, values)
    assert [*found] == [*SOURCES]
    for k, row in found.items():
        assert [*row] == [*SOURCES]
        for k2, mean in row.items():
            chosen = [v for b, a, v in zip(before, after, values, strict=True) if (b, a) == (k, k2)]
            assert (mean is None) == (not chosen), f"{k} to {k2}"
            if chosen:
                assert mean == pytest.approx(sum(chosen) / len(chosen)), f"{k} to {k2}"
