"""Figures: what is drawn is what was scored, whatever a run holds; the same bytes each time."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from PIL import Image

from ccm.cli.parser import main
from ccm.errors import BadInput
from ccm.experiment.files import read_json, to_json, write_json
from ccm.experiment.folder import MANIFEST, PROMPTS, SCORES
from ccm.experiment.results import RunResults, read_results
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.scores import conversion_ratio, q_value, transition_counts
from ccm.method.sources import RATIOS, SOURCES
from ccm.method.statistics import ActivationStatistics
from ccm.reporting.figures import activations, gallery, log_ratios, neurons, proportions
from ccm.reporting.figures.canvas import (
    COLOURS,
    RED,
    Drawing,
    bandwidth,
    density,
    drawable,
    grid_for,
    save,
    style,
)
from ccm.reporting.figures.gallery import figures_across, figures_of_run, write_figures
from tests.made_runs import make_run

pytestmark = pytest.mark.whole_runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    """A small run of two ablation values; read-only."""
    values = ("mean_ablation", "mean_plus_sigma_ablation")
    path = tmp_path_factory.mktemp("figures") / "run"
    make_run(path, values=values)
    return read_results(path)


@pytest.fixture(scope="module")
def drawn(run: RunResults) -> dict[str, Drawing]:
    """Every figure of it by file name; read-only."""
    everything = [*figures_of_run(run), *figures_across([run])]
    return {entry.stem.split("/")[-1]: entry.draw() for entry in everything}


def texts(figure: Figure) -> str:
    """Everything a figure says, in one line."""
    found = [text.get_text() for text in figure.findobj(mpl.text.Text)]
    return " ".join(" ".join(found).split())


def render(drawing: Drawing) -> None:
    """Draw for real: some mistakes only show then."""
    with style():
        FigureCanvasAgg(drawing.figure).draw()


def draw_all(path: Path) -> dict[str, Drawing]:
    """Draw and render every figure of a run folder."""
    run = read_results(path)
    found = {}
    for entry in [*figures_of_run(run), *figures_across([run])]:
        name = entry.stem.split("/")[-1]
        found[name] = entry.draw()
        render(found[name])
    return found


# --- names, and what every figure must have ---------------------------------------------------------


def test_every_figure_of_the_method_is_there(run: RunResults) -> None:
    value = "mean_ablation"
    wanted = {
        "made/made_logitvar_and_rho-nb_neurons_with_low_logitvar=3",
        "made/singular_values_and_null_space_nb_dims=2",
        "made/made_weight_norm_distro-nb_neurons_with_low_logitvar=3",
        f"made/made_{value}-conversion_ratios",
        f"made/made_{value}_transition_score",
        f"made/made_{value}-ndck_pkck_conversion_ratios",
        f"made/made_{value}_ablation_log_ck_pk",
        f"made/made_{value}_ablation_log_nd_ck",
        f"made/made_{value}_ablation_log_nd_pk",
        f"made/made_{value}_ablation_empirical_noises",
        f"made/made_{value}_entropy_by_transition",
        f"made/made_{value}_relation_groups",
        "made/made_rho_by_layer",
        f"made/made_{value}_matched_controls",
        f"made/made_{value}_effects",
    }
    stems = [entry.stem for entry in figures_of_run(run)]
    assert wanted <= set(stems)
    assert len(stems) == len(set(stems)) == 4 + 11 * 2


def visible(axes: Axes, axis: str) -> bool:
    """Whether the axis shows numbers or names (a shared one shows them elsewhere)."""
    params = getattr(axes, f"{axis}axis").get_tick_params()
    ticks = getattr(axes, f"get_{axis}ticks")()
    return bool(params.get("labelbottom" if axis == "x" else "labelleft", True)) and len(ticks) > 0


def test_every_axis_has_a_label_and_its_numbers_a_unit(drawn: dict[str, Drawing]) -> None:
    # Names of things, not numbers.
    names = {"model", "transition", "source K after ablation", "neurons", "source before → after"}
    names |= {"ablation value", "relation group", "effect"}
    seen = 0
    for stem, drawing in drawn.items():
        for axes in drawing.figure.axes:
            for axis in ("x", "y"):
                if visible(axes, axis):
                    label = getattr(axes, f"get_{axis}label")()
                    assert "(" in label or label in names, f"{stem}: {axis} label {label!r} has no unit"
                    seen += 1
    assert seen > 2 * len(drawn)


def test_no_text_is_cut_off(drawn: dict[str, Drawing]) -> None:
    for stem, drawing in drawn.items():
        render(drawing)
        figure = drawing.figure
        box = figure.bbox
        for text in figure.findobj(mpl.text.Text):
            if text.get_visible() and text.get_text().strip() and not _is_tick(text, figure):
                extent = text.get_window_extent()
                inside = (
                    extent.x0 >= box.x0 - 1
                    and extent.x1 <= box.x1 + 1
                    and extent.y0 >= box.y0 - 1
                    and extent.y1 <= box.y1 + 1
                )
                assert inside, f"{stem}: {text.get_text()!r} at {extent} is outside {box}"


def _is_tick(text: mpl.text.Text, figure: Figure) -> bool:
    """Tick labels beyond the limits exist and are not drawn."""
    return any(
        text in [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
        or any(text in (t.label1, t.label2) for t in [*axis.get_major_ticks(), *axis.get_minor_ticks()])
        or text is axis.get_offset_text()
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
    )


def test_every_figure_says_what_it_shows(drawn: dict[str, Drawing]) -> None:
    for stem, drawing in drawn.items():
        assert sum(c.isdigit() for c in drawing.description) >= 3, (
            f"{stem} says {drawing.description!r}"
        )


def test_settings_are_as_before(run: RunResults) -> None:
    before = dict(mpl.rcParams)
    proportions.class_sizes([(run.display_name, run.scores["sources"])])
    assert dict(mpl.rcParams) == before


# --- drawn is what was scored -----------------------------------------------------------------------


def test_conversion_bars_are_the_scores(run: RunResults, drawn: dict[str, Drawing]) -> None:
    scores = run.scores["ablations"]["mean_ablation"]
    drawing = drawn["made_mean_ablation-conversion_ratios"]
    bars = [c for c in drawing.figure.axes[0].containers if isinstance(c, BarContainer)]
    heights = {c.get_label(): c[0].get_height() for c in bars}
    for source, bar in zip(SOURCES, drawing.data["bars"], strict=True):
        own = scores["entropy"]["conversion_ratios"][source]
        controls = scores["controls"]["conversion_ratios"][source]
        assert bar["own"] == own
        assert bar["summary"] == controls
        assert heights[f"entropy set, to {source}"] == own["percent"]
        assert heights[f"controls, to {source}"] == controls["mean"]
        assert f"{own['count']}/{own['total']}" in texts(drawing.figure)


def test_the_nd_bar_is_nds_even_where_the_scores_have_the_printed_one(tmp_path: Path) -> None:
    make_run(tmp_path, before=("CK", "CK", "ND"), protocol="released", prompts=90)
    run = read_results(tmp_path)
    scores = run.scores["ablations"]["mean_ablation"]
    printed = scores["entropy"]["conversion_ratios"]
    assert printed["ND"] == printed["PK"]
    after = run.ablated["mean_ablation"]["source"].tolist()
    true = conversion_ratio(transition_counts(run.plain["source"].tolist(), after), "ND")
    bars = proportions.conversion_ratios(scores, "m", "mean_ablation").data["bars"]
    assert bars[1]["own"]["count"] == true.count != printed["ND"]["count"]


def test_bars_to_context_are_the_transition_scores(run: RunResults, drawn: dict[str, Drawing]) -> None:
    scores = run.scores["ablations"]["mean_ablation"]
    bars = drawn["made_mean_ablation-ndck_pkck_conversion_ratios"].data["bars"]
    for source, bar in zip(("ND", "PK"), bars, strict=True):
        assert bar["own"] == scores["entropy"]["transition_scores"][source]["CK"]
        assert bar["summary"] == scores["controls"]["transition_scores"][source]["CK"]


def test_the_histogram_holds_every_control_and_q(run: RunResults, drawn: dict[str, Drawing]) -> None:
    scores = run.scores["ablations"]["mean_ablation"]
    drawing = drawn["made_mean_ablation_transition_score"]
    controls = [entry["gts"] for entry in scores["controls"]["sets"]]
    assert drawing.data["controls"].tolist() == controls
    assert drawing.data["histogram"]["counts"].sum() == len(controls)
    own = scores["entropy"]["gts"]["percent"]
    q = q_value(100 - own, [100 - gts for gts in controls])
    assert drawing.data["q_value"] == q
    assert f"Q = {q:.1f}" in texts(drawing.figure)
    (line,) = drawing.figure.axes[0].lines
    assert set(line.get_xdata()) == {own}
    assert to_hex(line.get_color()).lower() == RED.lower()


def test_neuron_points_are_the_measures(run: RunResults, drawn: dict[str, Drawing]) -> None:
    drawing = drawn["made_logitvar_and_rho-nb_neurons_with_low_logitvar=3"]
    others, own = drawing.figure.axes[0].collections
    table = run.measures.set_index("entropy_neuron")
    for points, rows in ((others, table.loc[False]), (own, table.loc[True])):
        assert np.array_equal(points.get_offsets(), rows[["rho", "logitvar"]].to_numpy())
    assert to_hex(own.get_facecolor()[0]).lower() == RED.lower()
    assert drawing.data["entropy_neurons"].tolist() == run.entropy_neurons


def test_the_null_space_is_red(run: RunResults, drawn: dict[str, Drawing]) -> None:
    drawing = drawn["singular_values_and_null_space_nb_dims=2"]
    red = [
        c
        for c in drawing.figure.axes[0].collections
        if to_hex(c.get_facecolor()[0]).lower() == RED.lower()
    ]
    ranks = sorted(x for c in red for x in np.asarray(c.get_offsets())[:, 0])
    d_model = len(run.singular_values)
    assert ranks == [d_model - 1, d_model]  # the zero one too, as a triangle
    assert drawing.data["below_axis"] == 1


def test_box_plots_are_the_quartiles(run: RunResults, drawn: dict[str, Drawing]) -> None:
    groups = drawn["made_weight_norm_distro-nb_neurons_with_low_logitvar=3"].data["groups"]
    for name, chosen in (("entropy neurons", True), ("other neurons", False)):
        norms = run.measures.loc[run.measures["entropy_neuron"] == chosen, "norm"]
        assert groups[name]["box"]["med"] == pytest.approx(norms.median())
        assert groups[name]["box"]["q1"] == pytest.approx(norms.quantile(0.25))


@pytest.mark.parametrize(("over", "under"), RATIOS)
def test_log_ratios_are_those_of_the_cells(run: RunResults, over: str, under: str) -> None:
    ablated = run.ablated["mean_ablation"]
    drawing = log_ratios.log_ratio(run.plain, ablated, (over, under), "m", "mean_ablation")
    for when, cell in (("before", run.plain), ("after", ablated)):
        of = cell[f"log_prob_{over.lower()}"] - cell[f"log_prob_{under.lower()}"]
        for source in SOURCES:
            values = drawing.data[when][source]["values"]
            assert np.array_equal(values, of[run.plain["source"] == source])
    for axes in drawing.figure.axes:
        assert any(list(line.get_xdata()) == [0.0, 0.0] for line in axes.lines), "no boundary at 0"


def test_the_differences_have_the_scored_means(run: RunResults, drawn: dict[str, Drawing]) -> None:
    scored = run.scores["ablations"]["mean_ablation"]["entropy"]["log_ratio_difference"]
    data = drawn["made_mean_ablation_ablation_empirical_noises"].data
    for source in SOURCES:
        for ratio, mean in scored[source].items():
            assert data[ratio][source]["mean"] == pytest.approx(mean, rel=1e-12)


def test_class_sizes_are_the_scores(run: RunResults, drawn: dict[str, Drawing]) -> None:
    axes = drawn["knowledge_source_sizes"].figure.axes[0]
    heights = [container[0].get_height() for container in axes.containers]
    assert heights == [run.scores["sources"][source]["count"] for source in SOURCES]


def test_activation_marks_are_the_ablation_values(run: RunResults, drawn: dict[str, Drawing]) -> None:
    drawing = drawn["neuron_activation_distributions"]
    rows = drawing.data["models"]["made"]
    assert [row["neuron"] for row in rows] == run.entropy_neurons
    for row in rows:
        for name, value in ABLATION_VALUES.items():
            assert row[name] == value.of(run.statistics)[row["neuron"]]
    assert "not from single activations" in texts(drawing.figure)


def test_a_source_has_one_colour_everywhere(run: RunResults, drawn: dict[str, Drawing]) -> None:
    assert len(set(COLOURS.values())) == 3
    bars = drawn["made_mean_ablation-conversion_ratios"].figure.axes[0].containers
    sizes = drawn["knowledge_source_sizes"].figure.axes[0].containers
    by_label = {c.get_label(): c[0] for c in bars if isinstance(c, BarContainer)}
    lines = drawn["made_mean_ablation_ablation_log_ck_pk"].figure.axes[0].get_lines()
    for source, container in zip(SOURCES, sizes, strict=True):
        colour = COLOURS[source].lower()
        assert to_hex(container[0].get_facecolor()) == colour
        assert to_hex(by_label[f"entropy set, to {source}"].get_facecolor()) == colour
        (line,) = [x for x in lines if str(x.get_label()).startswith(source)]
        assert to_hex(line.get_color()) == colour


# --- edge cases -------------------------------------------------------------------------------------


def test_no_transition_at_all(tmp_path: Path) -> None:
    make_run(tmp_path, moved=0.0)
    drawn = draw_all(tmp_path)
    histogram = texts(drawn["made_mean_ablation_transition_score"].figure)
    assert "All controls have GTS = 0 %" in histogram
    assert "0.0 % (0/60)" in histogram


def test_a_class_without_prompts_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, before=("CK", "ND"))
    drawn = draw_all(tmp_path)
    for stem in ("-ndck_pkck_conversion_ratios", "_ablation_log_ck_pk", "_ablation_empirical_noises"):
        assert "no prompt was PK" in texts(drawn[f"made_mean_ablation{stem}"].figure), stem


def test_every_prompt_of_one_class(tmp_path: Path) -> None:
    make_run(tmp_path, before=("CK",), moved=0.0)
    drawn = draw_all(tmp_path)
    assert "every prompt was CK before ablation" in texts(
        drawn["made_mean_ablation-conversion_ratios"].figure
    )


@pytest.mark.parametrize("controls", [0, 1])
def test_few_controls(tmp_path: Path, controls: int) -> None:
    make_run(tmp_path, controls=controls)
    drawn = draw_all(tmp_path)
    word = ("No control sets were run", "One control set")[controls]
    assert word in texts(drawn["made_mean_ablation_transition_score"].figure)
    data = drawn["made_mean_ablation-conversion_ratios"].data["bars"][0]
    assert len(data["controls"]) == controls
    assert data["summary"]["three_standard_errors"] is None


def test_one_entropy_neuron(tmp_path: Path) -> None:
    make_run(tmp_path, k=1)
    drawn = draw_all(tmp_path)
    assert "entropy neurons (1)" in texts(
        drawn["made_logitvar_and_rho-nb_neurons_with_low_logitvar=1"].figure
    )


def test_a_value_that_moves_everything(tmp_path: Path) -> None:
    make_run(tmp_path, moved=1.0)
    drawn = draw_all(tmp_path)
    assert "100.0 % (60/60)" in texts(drawn["made_mean_ablation_transition_score"].figure)


def test_densities_without_spread(tmp_path: Path) -> None:
    make_run(tmp_path, same_log_probs=True)
    drawn = draw_all(tmp_path)
    assert "CK: all 20 at 0" in texts(drawn["made_mean_ablation_ablation_log_ck_pk"].figure)
    assert "no difference at all" in texts(drawn["made_mean_ablation_ablation_empirical_noises"].figure)


@pytest.mark.parametrize("name", ["Ünïcode_Ω", "模型", "a$b$c", "x\x00y"])
def test_names_that_are_not_ascii(name: str) -> None:
    sources = {s: {"count": 1, "total": 3, "percent": 33.3, "low": 0.8, "high": 90.6} for s in SOURCES}
    drawing = proportions.class_sizes([(name, sources)])
    render(drawing)  # a missing glyph would be a warning, and a warning an error
    assert name in drawing.data["models"], "the data keep the name as it is"


def test_what_the_font_cannot_draw_is_marked() -> None:
    assert drawable("Ω模") == "Ω\ufffd"


def test_a_hundred_thousand_neurons_are_pixels_in_a_small_pdf(tmp_path: Path) -> None:
    n = 100_000
    random = np.random.default_rng(1)
    table = pd.DataFrame(
        {
            "neuron_idx": np.arange(n),
            "logitvar": random.lognormal(-7, 1, n),
            "rho": random.random(n),
            "norm": random.lognormal(0, 1, n),
            "entropy_neuron": np.arange(n) < 8,
        }
    )
    for draw in (neurons.logitvar_and_rho, neurons.weight_norms):
        drawing = draw(table, "large")
        drawing.figure.savefig(tmp_path / "large.pdf")
        assert (tmp_path / "large.pdf").stat().st_size < 500_000


def test_neurons_without_measures_are_counted() -> None:
    table = pd.DataFrame(
        {
            "neuron_idx": [0, 1, 2],
            "logitvar": [0.0, 0.1, np.nan],
            "rho": [0.5, 0.6, np.nan],
            "norm": [1.0, 1.0, 0.0],
            "entropy_neuron": [False, True, False],
        }
    )
    drawing = neurons.logitvar_and_rho(table, "m")
    render(drawing)
    assert drawing.data["not_drawn"] == 2
    assert "2 neurons not drawn" in texts(drawing.figure)
    drawing = neurons.logitvar_and_rho(table.iloc[:1], "m")
    render(drawing)
    assert "No neuron has a LogitVar above 0" in texts(drawing.figure)


def test_statistics_that_are_not_finite_are_said() -> None:
    one = np.ones(2)
    broken = ActivationStatistics(
        mean=one, std=np.full(2, np.inf), median=one, mode=np.full(2, np.nan), min=-one, max=2 * one
    )
    drawing = activations.activation_ranges([("m", broken, [0, 1])])
    render(drawing)
    assert "not finite are not drawn" in texts(drawing.figure)


# --- densities --------------------------------------------------------------------------------------


def test_a_density_is_one_and_where_the_values_are() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.5, 4000)
    grid = grid_for(values)
    found = density(values, grid)
    assert found is not None
    assert np.trapezoid(found, grid) == pytest.approx(1.0, abs=0.005)
    assert np.trapezoid(found * grid, grid) == pytest.approx(values.mean(), abs=0.005)
    assert found.max() == pytest.approx(1 / (0.5 * np.sqrt(2 * np.pi)), rel=0.06)


@pytest.mark.parametrize(
    "values", [[], [1.0], [2.0, 2.0, 2.0], [np.nan, np.inf, 1.0], [0.1 + 0.2, 0.3]]
)
def test_no_spread_no_density(values: list[float]) -> None:
    array = np.asarray(values, dtype=float)
    assert density(array, grid_for(array)) is None


def test_a_bandwidth_survives_equal_quartiles() -> None:
    assert bandwidth(np.asarray([0.0] * 98 + [1.0, 2.0])) is not None


# --- files ------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_another_process_writes_the_same_bytes(run: RunResults, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ccm.reporting.figures.canvas import save\n"
        "from ccm.reporting.figures.gallery import figures_of_run\n"
        "from ccm.experiment.results import read_results\n"
        "drawn = {e.stem: e.draw for e in figures_of_run(read_results(Path(sys.argv[1])))}\n"
        "for stem in sys.argv[3:]: save(drawn[stem](), Path(sys.argv[2]) / stem)\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    figures = {entry.stem: entry.draw for entry in figures_of_run(run)}
    stems = [
        stem for stem in figures if "rho" in stem or stem.endswith("mean_ablation-conversion_ratios")
    ]  # points, boxes, and bars with hatches
    for stem in stems:
        save(figures[stem](), tmp_path / "here" / stem)
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path), str(tmp_path / "there"), *stems],
        check=True,
        capture_output=True,
        text=True,
        # Python orders its sets by hashes, and those by this.
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    first, second = digests(tmp_path / "here"), digests(tmp_path / "there")
    assert len(first) == 9
    assert first == second
    assert done.stdout.strip() == "False", "pyplot keeps a global state and may open a window"


def test_several_processes_draw_the_same(
    run: RunResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = list(figures_of_run(run))[:4]
    alone = list(gallery.draw(entries, tmp_path / "one", processes=2))  # too few to be worth a second
    monkeypatch.setattr(gallery, "WORTH_A_PROCESS", 2)
    together = list(gallery.draw(entries, tmp_path / "two", processes=2))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert [drawn.alt for drawn in together] == [drawn.alt for drawn in alone]
    assert [drawn.paths[0].stem for drawn in together] == [Path(entry.stem).name for entry in entries]


def test_few_colours_are_enough(drawn: dict[str, Drawing], tmp_path: Path) -> None:
    drawing = drawn["made_mean_ablation_ablation_log_ck_pk"]  # shaded areas, one over the other
    _, png, _ = save(drawing, tmp_path / "few")
    with style():
        drawing.figure.savefig(tmp_path / "all.png")
    with Image.open(png) as few, Image.open(tmp_path / "all.png") as whole:
        assert few.size == whole.size
        assert few.info["dpi"] == whole.info["dpi"]
        difference = np.asarray(few.convert("RGB"), float) - np.asarray(whole.convert("RGB"), float)
    assert np.abs(difference).mean() < 0.3
    assert np.abs(difference).max() < 64
    assert png.stat().st_size < 0.6 * (tmp_path / "all.png").stat().st_size


def test_the_data_beside_a_figure_are_its_data(drawn: dict[str, Drawing], tmp_path: Path) -> None:
    drawing = drawn["made_mean_ablation_transition_score"]
    paths = save(drawing, tmp_path / "a=1.5_b")
    assert [p.name for p in paths] == ["a=1.5_b.pdf", "a=1.5_b.png", "a=1.5_b.json"]
    assert paths[0].read_bytes().startswith(b"%PDF")
    assert b"CreationDate" not in paths[0].read_bytes()
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert read_json(paths[2]) == json.loads(to_json(drawing.data))


def test_the_command_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    before = digests(tmp_path / "run")
    assert main(["figures", str(tmp_path / "run")]) == 0
    out = tmp_path / "run" / "figures"
    assert capsys.readouterr().out == f"18 figures (PDF, PNG, data), 8 tables: {out}\n"
    assert len(digests(out)) == 18 * 3 + 8 * 3
    after = digests(tmp_path / "run")
    assert {name: after[name] for name in before} == before, "the run itself was changed"


def test_two_models_side_by_side(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path / name, model=name)
    runs = [read_results(tmp_path / name) for name in ("one", "two")]
    across = {entry.stem: entry.draw() for entry in figures_across(runs)}
    assert list(across["knowledge_source_sizes"].data["models"]) == ["one", "two"]
    with pytest.raises(BadInput, match=f"^{tmp_path}/one: the same run as {tmp_path}/one"):
        write_figures([runs[0], runs[0]], tmp_path / "out")


# --- folders that are no run ------------------------------------------------------------------------


def _broken(how: str, path: Path) -> None:
    manifest = read_json(path / MANIFEST)
    if how == "shard":
        manifest["identity"]["shard"] = "1/2"
    if how == "unfinished":
        manifest["complete"] = False
    if how == "other format":
        manifest["format"] = 2
    if how == "foreign":
        manifest = {"name": "a web site"}
    write_json(path / MANIFEST, manifest)
    if how == "no manifest":
        (path / MANIFEST).unlink()
    if how == "no scores":
        (path / SCORES).unlink()
    if how == "other scores":
        write_json(path / SCORES, {"ablations": {}})
    if how == "no JSON":
        (path / SCORES).write_text("{")
    if how == "damaged table":
        (path / PROMPTS).write_bytes(b"PAR1")
    if how == "other table":
        pd.DataFrame({"a": [1]}).to_parquet(path / PROMPTS)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shard", "shard 1/2 of a run has no scores"),
        ("unfinished", "the run is not finished"),
        ("foreign", "not a run's manifest"),
        ("other format", "a run folder of format 2, and this version of ccm reads format 1. Run again"),
        ("no manifest", "no run folder"),
        ("no scores", "missing from the run folder"),
        ("other scores", "not the scores of this run"),
        ("no JSON", "cannot be read as JSON"),
        ("damaged table", "damaged"),
        ("other table", "not a table of a run"),
    ],
)
def test_a_folder_that_is_no_run_is_one_clear_error(
    tmp_path: Path, how: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", prompts=6, controls=1)
    _broken(how, tmp_path / "run")
    assert main(["figures", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "figures").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such folder"),
        (["a", "b"], "no default folder for several"),
        (["a", "--out", "file"], "is a file"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["figures", *arguments]) == 2
    assert message in capsys.readouterr().err
