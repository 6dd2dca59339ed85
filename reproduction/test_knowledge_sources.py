"""How many prompts each knowledge source answers before ablation (Figure 5)."""

from typing import Any

from syrupy.assertion import SnapshotAssertion

from ccm.method.sources import SOURCES
from reproduction.goldens import measured
from reproduction.pairs import Pair

# Two prompts: another CPU's matrix product may settle a near tie the other way.
PROMPTS = 2


def test_sources_before_ablation(pair: Pair, scores: dict[str, Any], golden: SnapshotAssertion) -> None:
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
        "sources": {s: measured(counts[s], PROMPTS) for s in SOURCES},
        "recalled": measured(scores["parametric_recall"]["count"], PROMPTS),
    } == golden
