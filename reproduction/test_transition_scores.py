"""Transition scores of the entropy set and of the controls (Table 5, Figure 4c)."""

from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from ccm.method.sources import SOURCES
from reproduction.goldens import counted, measured
from reproduction.pairs import Pair
from reproduction.runs import Run

pytestmark = pytest.mark.whole_runs

# Of the controls' mean, percentage points: of their thousands of replacement values, a machine may
# round one otherwise.
POINTS = 0.1


def test_transition_scores(
    pair: Pair, run: Run, scores: dict[str, Any], golden: SnapshotAssertion
) -> None:
    # 1: it runs
    result = scores["ablations"][pair.ablation_value]
    own, controls = result["entropy"], result["controls"]
    # 2: shapes and types
    assert [list(own["transition_counts"][k]) for k in SOURCES] == [list(SOURCES)] * 3
    assert all(type(own["transition_counts"][k][j]) is int for k in SOURCES for j in SOURCES)
    # 3: invariants
    for k in SOURCES:
        row = own["transition_counts"][k]
        assert sum(row.values()) == scores["sources"][k]["count"], f"row {k} [{pair.id}]"
        if not sum(row.values()):  # an empty row has no shares
            assert {own["transition_scores"][k][j]["percent"] for j in SOURCES} == {None}
            continue
        shares = [own["transition_scores"][k][j]["percent"] for j in SOURCES]
        assert sum(shares) == pytest.approx(100.0), f"TS({k}, .)={shares} [{pair.id}]"
        means = [controls["transition_scores"][k][j]["mean"] for j in SOURCES]
        assert sum(means) == pytest.approx(100.0), f"controls' TS({k}, .)={means} [{pair.id}]"
    # 4: values
    assert {
        "entropy_set": {
            k: {j: counted(own["transition_counts"][k][j], exact=run.exact) for j in SOURCES}
            for k in SOURCES
        },
        "controls_mean_percent": {
            k: {j: measured(controls["transition_scores"][k][j]["mean"], POINTS) for j in SOURCES}
            for k in SOURCES
        },
    } == golden
