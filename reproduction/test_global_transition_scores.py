"""Global transition scores and Q-values, ablation value by ablation value (Table 6)."""

from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from reproduction.goldens import counted, measured
from reproduction.pairs import Pair
from reproduction.runs import Run, n_controls

pytestmark = pytest.mark.whole_runs

# Of their thousands of replacement values, a machine may round one otherwise.
POINTS = 0.16  # of controls, percentage points: two prompts of some 1,300
RANKS = 1.0  # of Q, percent, for 100 controls: one may trade places with the entropy set


def test_global_transition_score(
    pair: Pair, run: Run, scores: dict[str, Any], golden: SnapshotAssertion
) -> None:
    # 1: it runs
    result = scores["ablations"][pair.ablation_value]
    own, controls = result["entropy"], result["controls"]
    # 2: shapes and types
    n = controls["n"]
    assert n == len(controls["sets"]) == n_controls(pair.model)
    # 3: invariants
    counts = own["transition_counts"]
    changed = sum(n for k, row in counts.items() for j, n in row.items() if j != k)
    assert own["gts"]["count"] == changed, f"GTS counts {own['gts']['count']}, the table {changed}"
    assert own["gts"]["total"] == scores["n_prompts"]
    assert 0 <= own["q_value"] <= 100
    # With 100 controls it cannot fall below 0.0099.
    assert 1 / (1 + n) <= own["permutation_p"] <= 1
    at_least = sum(c["gts"] >= own["gts"]["percent"] for c in controls["sets"])
    assert own["permutation_p"] == pytest.approx((1 + at_least) / (1 + n))
    # 4: values
    assert {
        "gts": counted(own["gts"]["count"], exact=run.exact),
        "q_value": measured(own["q_value"], RANKS * 100 / n),
        "controls_mean": measured(controls["gts"]["mean"], POINTS),
        "controls_max": measured(controls["gts"]["high"], POINTS),
    } == golden


@pytest.mark.only(model="organism", ablation_value="mean_ablation")
def test_organism_changes_most_without_its_entropy_neurons(pair: Pair, scores: dict[str, Any]) -> None:
    """The planted effect: a GTS above every one of the 100 controls."""
    result = scores["ablations"][pair.ablation_value]
    own, highest = result["entropy"]["gts"]["percent"], result["controls"]["gts"]["high"]
    assert own > highest, f"GTS={own:.1f} %, highest control {highest:.1f} % [{pair.id}]"
