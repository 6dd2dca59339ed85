"""How many prompts each knowledge source answers before ablation (Figure 5)."""

from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from ccm.method.sources import SOURCES
from reproduction.goldens import counted
from reproduction.pairs import Pair
from reproduction.runs import Run

pytestmark = pytest.mark.whole_runs


def test_sources_before_ablation(
    pair: Pair, run: Run, scores: dict[str, Any], golden: SnapshotAssertion
) -> None:
    # 1: it runs
    sources = scores["sources"]
    # 2: shapes and types
    assert list(sources) == list(SOURCES)
    # 3: invariants
    counts = {s: sources[s]["count"] for s in SOURCES}
    assert sum(counts.values()) == scores["n_prompts"]
    for s in SOURCES:
        share = sources[s]
        assert share["low"] <= share["percent"] <= share["high"], f"{s} [{pair.id}]: {share}"
    # 4: values
    assert {
        "prompts": scores["n_prompts"],
        "sources": {s: counted(counts[s], exact=run.exact) for s in SOURCES},
        "recalled": counted(scores["parametric_recall"]["count"], exact=run.exact),
    } == golden
