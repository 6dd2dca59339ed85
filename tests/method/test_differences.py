"""Tests and intervals of differences, against their definitions and against coverage."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ccm.method.differences import clusters, fisher, holm, interval, mcnemar


@given(b=st.integers(0, 30), c=st.integers(0, 30))
@settings(deadline=None)
def test_mcnemar_is_a_fair_coin_of_the_prompts_that_differ(b: int, c: int) -> None:
    n, far = b + c, abs(b - c)
    wanted = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= far) / 2**n
    assert mcnemar(b, c) == pytest.approx(wanted)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_fisher_is_scipys() -> None:
    assert fisher(3, 40, 12, 35) == stats.fisher_exact([[3, 37], [12, 23]]).pvalue
    assert fisher(0, 10, 0, 10) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(deadline=None)
def test_holm_rejects_what_its_steps_reject(p: list[float]) -> None:
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.2):
        rejected, open_ = set[int](), sorted(range(len(p)), key=lambda i: p[i])
        while open_ and p[open_[0]] * len(open_) <= level:
            rejected.add(open_.pop(0))
        assert {i for i, a in enumerate(adjusted) if a <= level} == rejected
    assert all(a >= q for a, q in zip(adjusted, p, strict=True))


def test_means_are_those_of_the_facts_that_were_drawn() -> None:
    facts = ["a", "b", "a", "c", "c", "c"]
    values = np.asarray([[1.0, 0], [2, 0], [3, 1], [4, 1], [5, 0], [9, 1]])
    drawn = clusters(facts, resamples=50)
    assert drawn.draws.sum(1).tolist() == [3] * 50
    for row, got in zip(drawn.draws, drawn.means(values), strict=True):
        chosen = [
            i for cluster, n in enumerate(row) for i in np.flatnonzero(drawn.of == cluster).repeat(n)
        ]
        assert got == pytest.approx(values[chosen].mean(0))
    low, high = interval(drawn.means(values))
    assert (low <= values.mean(0)).all()
    assert (values.mean(0) <= high).all()


def test_facts_whose_prompts_agree_get_the_wider_interval_that_they_need() -> None:
    """Three copies of an observation say no more than one: prompt by prompt, 95 % would be 74 %."""
    random, covered = np.random.default_rng(1), {"fact": 0, "prompt": 0}
    for _ in range(200):
        of_fact = random.random(60) < 0.3
        values = of_fact.repeat(3)[:, None].astype(float)
        for how, facts in (("fact", np.arange(60).repeat(3)), ("prompt", np.arange(180))):
            low, high = interval(clusters(facts.tolist(), resamples=300).means(values))
            covered[how] += int(low[0] <= 0.3 <= high[0])
    assert covered["fact"] >= 178, covered
    assert covered["prompt"] <= 165, covered


def test_two_samples_are_drawn_apart() -> None:
    one, two = (clusters(range(20), seed) for seed in (0, 1))
    assert not np.array_equal(one.draws, two.draws)
