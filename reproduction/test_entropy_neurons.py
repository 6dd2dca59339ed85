"""Which neurons the selection rule finds (Table 4 and the released lists)."""

from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from ccm.models.specs import PUBLISHED
from reproduction.pairs import Pair
from reproduction.runs import Run

pytestmark = pytest.mark.whole_runs


def test_selected_neurons(
    pair: Pair, run: Run, scores: dict[str, Any], golden: SnapshotAssertion
) -> None:
    # 1: it runs
    neurons = scores["ablations"][pair.ablation_value]["entropy"]["neurons"]
    selected = run.selected()
    spec = run.spec
    # 2: shapes and types
    assert len(neurons) == len(selected) == spec.n_entropy_neurons
    assert all(type(i) is int for i in [*neurons, *selected])
    # 3: invariants
    assert len(set(neurons)) == len(neurons)
    assert all(0 <= i < spec.d_mlp for i in neurons)
    # A published model ablates the released list, whatever the rule finds.
    assert sorted(neurons) == sorted(spec.published_neurons or selected), f"not the set [{pair.id}]"
    for control in scores["ablations"][pair.ablation_value]["controls"]["sets"]:
        found = set(control["neurons"])
        assert len(found) == len(neurons)
        assert found != set(neurons), f"{control['name']} is the entropy set"
        # The released protocol forbids nothing else (defect 6).
        overlap = found & set(neurons)
        assert pair.model in PUBLISHED or not overlap, f"{control['name']} holds entropy neurons"
    # 4: values
    assert sorted(selected) == golden
