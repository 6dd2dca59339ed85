"""Conversion ratios to CK, ND and PK (Figures 4b and 8)."""

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


def test_conversion_ratios(
    pair: Pair, run: Run, scores: dict[str, Any], golden: SnapshotAssertion
) -> None:
    # 1: it runs
    result = scores["ablations"][pair.ablation_value]
    own, controls = result["entropy"], result["controls"]
    # 2: shapes and types
    assert list(own["conversion_ratios"]) == list(SOURCES)
    # 3: invariants
    for name in SOURCES:
        found = own["conversion_ratios"][name]
        # The released protocol scores ND with the PK function (defect 1).
        k = "PK" if scores["protocol"] == "released" and name == "ND" else name
        assert found["total"] == scores["n_prompts"] - scores["sources"][k]["count"]
        to_k = sum(own["transition_counts"][j][k] for j in SOURCES if j != k)
        assert found["count"] == to_k, f"CR({k}) counts {found['count']}, the table {to_k} [{pair.id}]"
        if found["total"] == 0:  # every prompt was k before: no ratio
            assert (found["percent"], found["low"], found["high"]) == (None, None, None)
            continue
        assert found["percent"] == pytest.approx(100 * to_k / found["total"])
        assert 0 <= found["low"] <= found["percent"] <= found["high"] <= 100
    # 4: values
    assert {
        k: {
            "entropy_set": {
                "count": counted(own["conversion_ratios"][k]["count"], exact=run.exact),
                "total": counted(own["conversion_ratios"][k]["total"], exact=run.exact),
            },
            "controls_mean": measured(controls["conversion_ratios"][k]["mean"], POINTS),
        }
        for k in SOURCES
    } == golden


@pytest.mark.only(model="organism", ablation_value="mean_ablation")
def test_organism_copies_more_without_its_entropy_neurons(pair: Pair, scores: dict[str, Any]) -> None:
    """The planted effect: more non-CK prompts turn to CK than under any control."""
    result = scores["ablations"][pair.ablation_value]
    own = result["entropy"]["conversion_ratios"]["CK"]["percent"]
    highest = result["controls"]["conversion_ratios"]["CK"]["high"]
    assert own > highest, f"CR(CK)={own:.1f} %, highest control {highest:.1f} % [{pair.id}]"
