"""Which neurons the selection rule finds (Table 4 and the released lists)."""

from typing import Any

from syrupy.assertion import SnapshotAssertion

from ccm.models import MODELS
from reproduction.pairs import Pair
from reproduction.printed import printed


def test_selected_neurons(pair: Pair, scores: dict[str, Any], golden: SnapshotAssertion) -> None:
    # 1: it runs
    neurons = scores["ablations"][pair.ablation_value]["entropy"]["neurons"]
    spec = MODELS[pair.model]
    # 2: shapes and types
    assert len(neurons) == spec.n_entropy_neurons
    assert all(type(i) is int for i in neurons)
    # 3: invariants
    assert len(set(neurons)) == len(neurons)
    assert all(0 <= i < spec.d_mlp for i in neurons)
    for control in scores["ablations"][pair.ablation_value]["controls"]["sets"]:
        assert len(set(control["neurons"])) == len(neurons)
        assert not set(control["neurons"]) & set(neurons), f"{control['name']} holds entropy neurons"
    # 4: values
    if spec.published_neurons:
        assert sorted(neurons) == sorted(spec.published_neurons), f"not the released list [{pair.id}]"
        assert len(neurons) == printed("table4_models")[pair.model]["n_entropy_neurons"]
    assert sorted(neurons) == golden
