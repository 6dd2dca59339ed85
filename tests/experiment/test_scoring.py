"""scores.json is what the cells of a run say, counted anew; a run is read back as it was written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from ccm.experiment.results import read_results
from tests.counted import SOURCES, Counted, Others, Part, changed, conversion, others, part
from tests.distinct_run import CONTROLS, MATCHED, distinct_runs
from tests.made_runs import make_run

KINDS = {"controls": ("control", CONTROLS), "matched_controls": ("matched", MATCHED)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Counted]:
    return [Counted(path) for path in distinct_runs(tmp_path_factory)]


def scores_of(run: Counted) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "scores.json").read_text(encoding="utf-8"))
    return found


def near(value: Any) -> Any:
    """Equal but for the last digits of a float, all the way down."""
    if isinstance(value, dict):
        return {key: near(v) for key, v in value.items()}
    return pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value


def of_share(r: Part) -> dict[str, Any]:
    return near(dict(vars(r)))


def of_controls(c: Others) -> dict[str, Any]:
    names = ("mean", "three_standard_errors", "low", "high", "entropy_quantile")
    return near(dict(zip(names, vars(c).values(), strict=True)))


def square(cell: Any) -> dict[str, dict[str, Any]]:
    return {k: {j: cell(k, j) for j in SOURCES} for k in SOURCES}


def summary_of(run: Counted, value: str, kind: str) -> dict[str, Any]:
    sets = run.manifest["sets"]
    return {
        "n": len(run.sets(kind)),
        "gts": of_controls(run.gts(value, kind)[1]),
        "transition_scores": square(lambda k, j: of_controls(run.ts(value, k, j, kind)[1])),
        "conversion_ratios": {k: of_controls(run.cr(value, k, kind)[1]) for k in SOURCES},
        "entropy_difference": square(
            lambda k, j: of_controls(others(*run.entropy_means(value, k, j, kind)))  # type: ignore[arg-type]
        ),
        "sets": [
            {
                "name": name,
                "neurons": sets[name],
                "transition_counts": square(lambda k, j, c=counts: c[k, j]),
                "gts": near(changed(counts).percent),
                "conversion_ratios": {k: near(conversion(counts, k).percent) for k in SOURCES},
            }
            for name, counts in ((name, run.counts(value, name)) for name in run.sets(kind))
        ],
    }


def scores_of_value(run: Counted, value: str) -> dict[str, Any]:
    own = run.counts(value)
    before, after = (run.log_ratios(cell) for cell in (run.plain, run.cells[value]["entropy"]))
    of = {k: (run.plain["source"] == k).to_numpy() for k in SOURCES}
    return {
        "entropy": {
            "neurons": run.manifest["sets"]["entropy"],
            "transition_counts": square(lambda k, j: own[k, j]),
            "transition_scores": square(lambda k, j: of_share(run.ts(value, k, j)[0])),
            "conversion_ratios": {k: of_share(run.cr(value, k)[0]) for k in SOURCES},
            "gts": of_share(run.gts(value)[0]),
            "q_value": near(run.q(value)),
            "permutation_p": near(run.p(value)),
            "entropy_difference": square(lambda k, j: near(run.entropy_means(value, k, j)[0])),
            "log_ratio_difference": {
                k: {name: near(float((x - after[name])[of[k]].mean())) for name, x in before.items()}
                for k in SOURCES
            },
        },
        "controls": summary_of(run, value, "control"),
        "matched_controls": {
            "q_value": near(run.q(value, "matched")),
            "permutation_p": near(run.p(value, "matched")),
            **summary_of(run, value, "matched"),
        },
    }


@pytest.mark.parametrize("which", [0, 1])
def test_every_score_is_that_of_the_cells(which: int, runs: list[Counted]) -> None:
    run = runs[which]
    scores, facts = scores_of(run), run.manifest["facts"]
    source, logs = run.plain["source"], run.log_ratios(run.plain)
    ablations = scores.pop("ablations")
    assert scores == {
        "model": run.model,
        "protocol": "corrected",
        "n_prompts": run.n,
        "parametric_recall": of_share(part(facts["recalled"], facts["facts"])),
        "sources": {s: of_share(part((source == s).sum(), run.n)) for s in SOURCES},
        "log_ratios": {
            s: {name: near(float(x[source == s].mean())) for name, x in logs.items()} for s in SOURCES
        },
    }
    assert [*ablations] == run.values
    for value, found in ablations.items():
        assert found == scores_of_value(run, value)


def test_scores_differ_enough_to_be_told_apart(runs: list[Counted]) -> None:
    """Or one in another's place would pass."""
    for run in runs:
        for value, scores in scores_of(run)["ablations"].items():
            for group in (
                scores["entropy"]["conversion_ratios"],
                scores["entropy"]["transition_counts"],
            ):
                numbers = [json.dumps(v) for v in group.values()]
                assert len(set(numbers)) == len(numbers)
            moved = [n for (k, j), n in run.counts(value).items() if k != j]
            assert len(set(moved)) == len(moved) == 6
            means = [scores[kind]["gts"]["mean"] for kind in KINDS]
            assert len({*means, scores["entropy"]["gts"]["percent"]}) == 3
            assert (scores["entropy"]["q_value"], scores["entropy"]["permutation_p"]) != (
                scores["matched_controls"]["q_value"],
                scores["matched_controls"]["permutation_p"],
            )


def test_controls_that_move_as_many_count_against_the_entropy_set(tmp_path: Path) -> None:
    make_run(tmp_path, moved=0.0)
    scores = scores_of(Counted(tmp_path))["ablations"]["mean_ablation"]
    for found in (scores["entropy"], scores["matched_controls"]):
        # The mean rank of one among five others alike is 3 of 5.
        assert (found["q_value"], found["permutation_p"]) == (40.0, 1.0)
    assert scores["controls"]["gts"]["entropy_quantile"] == 60.0


def test_the_released_nd_ratio_is_the_pk_ratio(tmp_path: Path) -> None:
    make_run(tmp_path, before=("CK", "CK", "ND"), protocol="released", prompts=90)
    run = Counted(tmp_path)
    scores = scores_of(run)["ablations"]["mean_ablation"]
    (own, rest), (true, _) = run.cr("mean_ablation", "PK"), run.cr("mean_ablation", "ND")
    assert scores["entropy"]["conversion_ratios"]["ND"] == of_share(own) != of_share(true)
    assert scores["controls"]["conversion_ratios"]["ND"] == of_controls(rest)


def test_without_controls_nothing_is_ranked(tmp_path: Path) -> None:
    make_run(tmp_path, controls=0)
    scores = scores_of(Counted(tmp_path))["ablations"]["mean_ablation"]
    assert (scores["entropy"]["q_value"], scores["entropy"]["permutation_p"]) == (None, None)
    assert scores["controls"]["n"] == 0
    assert "matched_controls" not in scores


# --- read back ----------------------------------------------------------------------------------------


def test_a_run_is_read_back_as_it_was_written(runs: list[Counted]) -> None:
    for run, display_name in zip(runs, ("GPT2-small", "made"), strict=True):
        found = read_results(run.path)
        assert (found.path, found.model, found.display_name) == (run.path, run.model, display_name)
        assert (found.identity, found.manifest) == (run.identity, run.manifest)
        assert found.scores == scores_of(run)
        assert found.values == tuple(run.values)
        assert found.entropy_neurons == sorted(run.manifest["sets"]["entropy"])
        for table, file in (
            (found.measures, "measures"),
            (found.prompts, "prompts"),
            (found.plain, "plain"),
            (found.rho_by_layer, "rho_by_layer"),
            (found.set_effects, "set_effects"),
        ):
            pd.testing.assert_frame_equal(table, pd.read_parquet(run.path / f"{file}.parquet"))
        for value in run.values:
            pd.testing.assert_frame_equal(found.ablated[value], run.cells[value]["entropy"])
            effects = pd.read_parquet(run.path / value / "effects.parquet")
            pd.testing.assert_frame_equal(found.effects[value], effects)
            sources = [run.cells[value][name]["source"].tolist() for name in run.sets()]
            assert [[SOURCES[i] for i in row] for row in found.control_sources[value]] == sources
        spectrum = pd.read_parquet(run.path / "singular_values.parquet")["singular_value"]
        np.testing.assert_array_equal(found.singular_values, spectrum)
        tensors = load_file(run.path / "activation_stats.safetensors")
        for name, values in vars(found.statistics).items():
            np.testing.assert_array_equal(values, tensors[name])
        np.testing.assert_array_equal(found.sigma, tensors["std"])


@pytest.mark.parametrize(("stats", "rounded"), [("own", True), ("released", False)])
def test_only_own_statistics_of_the_released_protocol_have_sigma_of_float16(
    stats: str, rounded: bool, tmp_path: Path
) -> None:
    folder = make_run(tmp_path, protocol="released")
    identity = folder.manifest["identity"] | {"stats": stats}
    folder.note(identity=identity)
    found, stored = read_results(tmp_path), load_file(tmp_path / "activation_stats.safetensors")
    np.testing.assert_array_equal(found.sigma, stored["std"])
    half = np.sqrt((stored["std"] ** 2 * 1000).astype(np.float16).astype(np.float64) / 1000)
    np.testing.assert_array_equal(found.statistics.std, half if rounded else stored["std"])
    assert not np.array_equal(half, stored["std"])
