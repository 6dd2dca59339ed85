"""Figures of what goes beyond the paper: rho by layer, matched controls, effects on entropy."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from ccm.errors import BadInput
from ccm.experiment.folder import PROMPT_EFFECTS, RHO_BY_LAYER, SET_EFFECTS
from ccm.experiment.results import RunResults, read_results
from ccm.reporting.figures import effects, layers, matched
from ccm.reporting.figures.canvas import Drawing
from ccm.reporting.figures.gallery import figures_of_run
from tests.made_runs import make_run
from tests.reporting.test_figures import draw_all, render, texts

pytestmark = pytest.mark.whole_runs

VALUE = "mean_ablation"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    """A small run; read-only."""
    path = tmp_path_factory.mktemp("comparisons") / "run"
    make_run(path, controls=9, matched=7, moved=0.08)  # so few that some controls move as many
    return read_results(path)


@pytest.fixture(scope="module")
def drawn(run: RunResults) -> dict[str, Drawing]:
    """Its figures by file name; read-only."""
    return {e.stem.split("/")[-1]: e.draw() for e in figures_of_run(run)}


def dots(figure: Figure) -> list[float]:
    """Heights of every dot of the first panel."""
    return sorted(float(y) for c in figure.axes[0].collections for _, y in _points(c.get_offsets()))


def _points(offsets: object) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in np.asarray(offsets).reshape(-1, 2)]


# --- what is drawn is what was stored -----------------------------------------------------------------


def test_every_control_of_both_kinds_is_a_dot(run: RunResults, drawn: dict[str, Drawing]) -> None:
    scores, drawing = run.scores["ablations"][VALUE], drawn[f"made_{VALUE}_matched_controls"]
    said, gts, to_ck = texts(drawing.figure), drawing.data["gts"], drawing.data["conversion_to_ck"]
    own = scores["entropy"]["conversion_ratios"]["CK"]
    ranks = {"controls": scores["entropy"], "matched_controls": scores["matched_controls"]}
    everything, ties = [], 0
    for kind, n in (("controls", 9), ("matched_controls", 7)):
        sets = scores[kind]["sets"]
        assert gts[kind]["percent"] == [s["gts"] for s in sets]
        assert len(gts[kind]["percent"]) == n
        everything += gts[kind]["percent"]
        assert gts[kind]["quantile"] == ranks[kind]["q_value"]
        assert gts[kind]["permutation_p"] == ranks[kind]["permutation_p"]
        percent = [s["conversion_ratios"]["CK"] for s in sets]
        assert to_ck[kind]["percent"] == pytest.approx(percent)
        at_least = sum(c >= own["percent"] - 1e-9 for c in percent)
        ties += sum(c == own["percent"] for c in percent)
        assert to_ck[kind]["permutation_p"] == (1 + at_least) / (1 + n)
        assert f"({n}) Q = {gts[kind]['quantile']:.1f} p = {gts[kind]['permutation_p']:.4f}" in said
    assert ties, "no control moves as many prompts as the entropy set"
    assert set(np.round(everything, 9)) <= set(np.round(dots(drawing.figure), 9))
    assert f"{own['percent']:.1f} % ({own['count']}/{own['total']})" in said


def test_the_plane_holds_every_neuron_in_its_group(run: RunResults, drawn: dict[str, Drawing]) -> None:
    drawing = drawn[f"made_{VALUE}_matched_controls"]
    plane = [_points(c.get_offsets()) for c in drawing.figure.axes[2].collections]
    norm = run.measures["norm"].to_numpy()
    drawn_matched = {
        i for s in run.scores["ablations"][VALUE]["matched_controls"]["sets"] for i in s["neurons"]
    }
    for points, chosen in zip(plane[1:], (drawn_matched, set(run.entropy_neurons)), strict=True):
        wanted = sorted((norm[i], run.sigma[i]) for i in chosen)
        np.testing.assert_allclose(sorted(points), wanted)
    assert sum(map(len, plane)) == len(norm)


def test_distances_are_those_of_paired_neurons() -> None:
    """Matched sets say at each position which entropy neuron they stand for."""
    norm, sigma = np.exp([0.0, 1.0, 2.0, 3.0]), np.ones(4)
    sets = [{"neurons": [2, 3], "gts": 0.0}]
    scores = {"entropy": {"neurons": [0, 1]}, "matched_controls": {"sets": sets}}
    found = matched._neurons(scores, norm, sigma)
    # The others' log norms, 2 and 3, have standard deviation 0.5.
    assert found["distance_of_matched"] == pytest.approx([4.0, 0.0])
    assert found["distance_of_others"] == pytest.approx([(4 + 6 + 2 + 4) / 4, 0.0])


def test_effects_are_means_with_students_interval(run: RunResults, drawn: dict[str, Drawing]) -> None:
    data, table = drawn[f"made_{VALUE}_effects"].data, run.effects[VALUE]
    changes = {
        n: table["entropy_plain"] - table[f"entropy_{n}"] for n in ("total", "direct", "norm_only")
    }
    changes["through_norm"] = changes["total"] - changes["direct"]
    for name, values in changes.items():
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        found = data["entropy"][name]
        assert (found["mean"], found["low"], found["high"]) == pytest.approx((values.mean(), low, high))
    sets = run.set_effects.set_index("set")
    for kind, n in (("control", 9), ("matched", 7)):
        assert data["sets"][kind]["set"] == [f"{kind}_{i:03d}" for i in range(n)]
        for name in ("total", "norm_only"):
            assert data["sets"][kind][name] == sets.loc[data["sets"][kind]["set"], name].tolist()
        through = sets.loc[data["sets"][kind]["set"], ["total", "direct"]]
        assert data["sets"][kind]["through_norm"] == (through["total"] - through["direct"]).tolist()


def test_boxes_are_the_percentiles_of_each_layer(run: RunResults, drawn: dict[str, Drawing]) -> None:
    data = drawn["made_rho_by_layer"].data
    assert [row["layer"] for row in data["layers"]] == [0, 1, 2]
    for row in data["layers"]:
        values = run.rho_by_layer.loc[run.rho_by_layer["layer"] == row["layer"], "rho"]
        for q in layers.QUANTILES:
            assert row[f"percentile_{q}"] == pytest.approx(np.percentile(values, q))
    assert [e["neuron_idx"] for e in data["entropy_neurons"]] == run.entropy_neurons
    assert {e["rho"] for e in data["entropy_neurons"]} == {0.9}
    assert data["random_direction"] == pytest.approx((2 / 12) ** 0.5)


# --- what a run may lack ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [RHO_BY_LAYER, f"{VALUE}/{PROMPT_EFFECTS}", SET_EFFECTS])
def test_a_file_that_should_be_there_is_missed(name: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(BadInput, match="missing from the run folder"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"controls": 0, "matched": 2},
        {"controls": 1, "matched": 1, "k": 1},
        {"prompts": 1},
        {"before": ["CK"]},
        {"moved": 0.0},
        {"moved": 1.0},
        {"layers": 1},
        {"layers": 32, "d_mlp": 3000},
        {"model": "模型_Ω$"},
    ],
    ids=str,
)
def test_runs_at_the_edge_are_drawn(changes: dict[str, object], tmp_path: Path) -> None:
    make_run(tmp_path, **changes)  # type: ignore[arg-type]
    found = draw_all(tmp_path)
    assert sum(stem.endswith(("_rho_by_layer", "_matched_controls", "_effects")) for stem in found) == 3
    said = {stem.split("ablation_")[-1]: texts(d.figure) for stem, d in found.items()}
    if changes.get("controls") == 0:
        assert "no sets" in said["matched_controls"]
        assert "controls (0)" in said["effects"]
    if changes.get("prompts") == 1:
        assert "its mean has no interval" in said["effects"]
    if changes.get("before") == ["CK"]:
        assert "Every prompt was CK before ablation." in said["matched_controls"]


def test_prompts_of_the_dots_are_told_from_all(run: RunResults) -> None:
    few = run.set_effects.assign(prompts=30)
    drawing = effects.entropy_effects(run.effects[VALUE], few, "m", VALUE)
    render(drawing)
    assert "the same (the dots' 30 prompts)" in texts(drawing.figure)
    assert "mean over 30 of the prompts, evenly spaced" in texts(drawing.figure)


def test_neurons_without_norm_or_spread_are_counted(run: RunResults) -> None:
    scores, norm = run.scores["ablations"][VALUE], run.measures["norm"].to_numpy().copy()
    norm[:2], sigma = 0.0, run.sigma.copy()
    sigma[2] = np.inf
    drawing = matched.matched_controls(scores, norm, sigma, "m", VALUE)
    render(drawing)
    assert "3 neurons not drawn" in texts(drawing.figure)
    drawing = matched.matched_controls(scores, 0 * norm, sigma, "m", VALUE)
    render(drawing)
    assert "No neuron has a norm and a σ above 0." in texts(drawing.figure)
    assert "No distance between entropy neurons and others is finite." in texts(drawing.figure)


def test_layers_without_rho_are_said() -> None:
    table = pd.DataFrame(
        {"layer": [0, 0, 2, 2], "neuron_idx": [0, 1, 0, 1], "rho": [0.1, np.nan, 0.3, 0.4]}
    )
    drawing = layers.rho_by_layer(table, [1], "m", 2, 8, 0.5)
    render(drawing)
    said = texts(drawing.figure)
    assert "so without ρ: 1." in said
    assert "Layers without one output matrix: 1." in said
    drawing = layers.rho_by_layer(table.assign(rho=np.nan), [1], "m", 2, 8)
    render(drawing)
    assert "No neuron has a ρ." in texts(drawing.figure)


def test_a_hundred_thousand_neurons_make_a_small_pdf(run: RunResults, tmp_path: Path) -> None:
    norm, sigma = np.random.default_rng(1).lognormal(0, 1, (2, 100_000))
    scores = run.scores["ablations"][VALUE]
    matched.matched_controls(scores, norm, sigma, "m", VALUE).figure.savefig(tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").stat().st_size < 500_000
