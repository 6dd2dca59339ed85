"""What the figures draw (Figures 2 to 5, 8, 9): the data beside them, for pixels differ by machine."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.sources import RATIOS, SOURCES
from ccm.reporting.report import HTML
from reproduction.artifacts import Left
from reproduction.goldens import counted, measured
from reproduction.pairs import Pair
from reproduction.runs import Run

pytestmark = pytest.mark.whole_runs

POINTS = 0.16  # of controls, percentage points: two prompts of some 1,300
NATS = 1e-3  # of a class's mean
SHARE = 1e-3  # of a measure: sums of float32 products in another order
HTML_LIMIT = 10_000_000  # bytes


def near(value: float, scale: float | None = None) -> dict[str, float] | None:
    """A measure, good to a thousandth of itself or of what it is small beside."""
    return measured(value, SHARE * abs(value if scale is None else scale))


def bars_of(data: Mapping[str, Any], exact: bool) -> dict[str, Any]:
    return {
        bar["label"]: {
            "entropy_set": counted(bar["own"]["count"], exact=exact),
            "controls_mean": measured(bar["summary"]["mean"], POINTS),
        }
        for bar in data["bars"]
    }


def classes_of(data: Mapping[str, Any], exact: bool) -> dict[str, Any]:
    # Two of some 400 prompts that change class, 10 nats off.
    nats = NATS if exact else 0.05
    return {
        source: {
            "n": counted(data[source]["n"], exact=exact),
            "mean": measured(data[source]["mean"], nats),
        }
        for source in SOURCES
    }


def test_figures_of_the_ablation_value(
    pair: Pair, run: Run, scores: dict[str, Any], left: Left, golden: SnapshotAssertion
) -> None:
    exact = run.exact
    stem = f"{pair.model}_{pair.ablation_value}"
    # 1: it runs
    result = scores["ablations"][pair.ablation_value]
    ratios, gts = left.data(f"{stem}-conversion_ratios"), left.data(f"{stem}_transition_score")
    to_context = left.data(f"{stem}-ndck_pkck_conversion_ratios")
    log_ratios = {
        f"{a}/{b}": left.data(f"{stem}_ablation_log_{a.lower()}_{b.lower()}") for a, b in RATIOS
    }
    changes = left.data(f"{stem}_ablation_empirical_noises")
    # 2: every file is there, and none is empty
    kinds = {
        kind: {p.stem for p in left.paths if p.suffix == kind} for kind in (".pdf", ".png", ".json")
    }
    assert kinds[".pdf"] == kinds[".png"] == kinds[".json"]
    assert len([name for name in kinds[".png"] if name.startswith(stem)]) >= 7
    assert [path.name for path in left.paths if not path.stat().st_size] == []
    # 3: drawn is what was scored
    assert [bar["own"]["count"] for bar in to_context["bars"]] == [
        result["entropy"]["transition_counts"][k]["CK"] for k in ("ND", "PK")
    ]
    assert gts["entropy"] == result["entropy"]["gts"]
    assert gts["controls"] == [c["gts"] for c in result["controls"]["sets"]]
    assert sum(gts["histogram"]["counts"]) == result["controls"]["n"]
    for name, data in log_ratios.items():
        for source in SOURCES:
            assert data["before"][source]["n"] == scores["sources"][source]["count"]
            scored = scores["log_ratios"][source][name]
            mean = data["before"][source]["mean"]
            # A class without prompts has no mean.
            assert mean is None if scored is None else mean == pytest.approx(scored, rel=1e-9)
    # 4: values
    assert {
        "conversion_ratios": bars_of(ratios, exact),
        "to_context": bars_of(to_context, exact),
        "gts": counted(gts["entropy"]["count"], exact=exact),
        "gts_of_controls": {
            f"{q} %": measured(float(np.percentile(gts["controls"], q)), POINTS)
            for q in (0, 25, 50, 75, 100)
        },
        "log_ratios": {
            name: {when: classes_of(data[when], exact) for when in ("before", "after")}
            for name, data in log_ratios.items()
        },
        "changes_of_log_ratios": {name: classes_of(data, exact) for name, data in changes.items()},
    } == golden


def test_figures_of_the_model(
    pair: Pair, run: Run, scores: dict[str, Any], left: Left, golden: SnapshotAssertion
) -> None:
    # 1: it runs
    chosen = left.results.entropy_neurons
    neurons = left.data(f"logitvar_and_rho-nb_neurons_with_low_logitvar={len(chosen)}")
    dims = left.results.identity["null_space_dims"]
    spectrum = left.data(f"singular_values_and_null_space_nb_dims={dims}")
    norms = left.data(f"weight_norm_distro-nb_neurons_with_low_logitvar={len(chosen)}")["groups"]
    sizes = left.data("knowledge_source_sizes")["models"][left.results.display_name]
    (rows,) = left.data("neuron_activation_distributions")["models"].values()
    # 2: the report is one file of a size to send
    (html,) = [path for path in left.paths if path.name == HTML]
    assert html.stat().st_size < HTML_LIMIT
    # 3: drawn is what was measured
    assert sorted(neurons["entropy_neurons"]) == chosen == [row["neuron"] for row in rows]
    values = np.asarray(spectrum["singular_values"])
    assert (np.diff(values) <= 0).all()
    assert sizes == scores["sources"]
    replaced = ABLATION_VALUES[pair.ablation_value].of(left.results.statistics)
    assert [row[pair.ablation_value] for row in rows] == pytest.approx([replaced[i] for i in chosen])
    # 4: values
    at = {neuron: i for i, neuron in enumerate(neurons["neuron_idx"])}
    assert {
        "entropy_neurons": {
            str(i): {name: near(neurons[name][at[i]]) for name in ("logitvar", "rho")} for i in chosen
        },
        "median_norms": {name: near(group["box"]["med"]) for name, group in norms.items()},
        "null_space": [near(float(v), float(values[0]) / 100) for v in values[-dims:]],
        "largest_singular_value": near(float(values[0])),
        "sources": {source: counted(sizes[source]["count"], exact=run.exact) for source in SOURCES},
        "constants": {str(row["neuron"]): near(row[pair.ablation_value], row["max"]) for row in rows},
    } == golden
