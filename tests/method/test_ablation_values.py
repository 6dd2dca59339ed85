"""An ablation value is one row: a sixth one, added here, arrives everywhere."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from ccm.cli.parser import main
from ccm.errors import BadInput
from ccm.experiment.results import RunResults, read_results
from ccm.method.ablation import PLAIN, plan
from ccm.method.ablation_values import ABLATION_VALUES, AblationValue, ablation_values
from ccm.method.statistics import ActivationStatistics
from ccm.reporting.figures.gallery import figures_across, figures_of_run
from ccm.reporting.rerun import command_of
from ccm.reporting.sentences import answers_of, key_numbers
from ccm.reporting.table_formats import latex, markdown
from ccm.reporting.tables import gts_by_value, tables_of
from tests.made_runs import make_run

SIXTH = AblationValue(
    name="six_sigma_ablation",
    label="μ + 6σ",
    symbol="μ + 6 σ",
    constant="mean + 6 sigma",
    marker="P",
    colour="#117733",
    of=lambda s: s.mean + 6 * s.std,
)


@pytest.fixture
def sixth(monkeypatch: pytest.MonkeyPatch) -> AblationValue:
    monkeypatch.setitem(ABLATION_VALUES, SIXTH.name, SIXTH)
    return SIXTH


@pytest.fixture
def run(sixth: AblationValue, tmp_path: Path) -> RunResults:
    make_run(tmp_path / "run", values=("mean_ablation", sixth.name), prompts=30)
    return read_results(tmp_path / "run")


def test_it_is_one_of_all(sixth: AblationValue) -> None:
    assert ablation_values("all")[-1] == sixth
    assert len(ablation_values("all")) == 6
    assert ablation_values([sixth.name]) == [sixth]
    with pytest.raises(BadInput, match=f"Allowed: mean_ablation, .*, {sixth.name}, all"):
        ablation_values("seventh_ablation")


def test_a_plan_takes_its_numbers(sixth: AblationValue) -> None:
    three = np.arange(3.0)
    statistics = ActivationStatistics(three, three + 1, three, three, three - 9, three + 9)
    assert plan("mine", [0, 2], sixth, statistics).values == (6.0, 20.0)


@pytest.mark.parametrize("command", ["run", "ablate"])
def test_the_help_names_it(
    command: str, sixth: AblationValue, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert ", ".join(ABLATION_VALUES) in words
    assert sixth.name in words


def test_the_command_line_runs_it_by_name_and_as_one_of_all(
    sixth: AblationValue, tmp_path: Path
) -> None:
    few = ["run", "--model", "organism", "--max-prompts", "4", "--controls", "0"]
    assert main([*few, "--ablation-value", sixth.name, "--out", str(tmp_path / "one")]) == 0
    assert main([*few, "--ablation-value", "all", "--out", str(tmp_path / "all")]) == 0
    one, everything = (read_results(tmp_path / name) for name in ("one", "all"))
    assert one.values == (sixth.name,)
    assert everything.values == tuple(ABLATION_VALUES)
    assert everything.ablated[sixth.name].equals(one.ablated[sixth.name])
    assert "--ablation-value all " in command_of(everything.manifest)
    assert f"--ablation-value {sixth.name} " in command_of(one.manifest)


def test_without_its_row_its_runs_cannot_be_read(run: RunResults, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(run.path, path)
    del ABLATION_VALUES[SIXTH.name]
    try:
        with pytest.raises(BadInput, match=r"scores\.json"):
            read_results(path)
    finally:
        ABLATION_VALUES[SIXTH.name] = SIXTH


def test_figures_have_its_files_its_label_and_its_mark(run: RunResults, sixth: AblationValue) -> None:
    own = [entry for entry in figures_of_run(run) if entry.value == sixth.name]
    first = [entry for entry in figures_of_run(run) if entry.value == "mean_ablation"]
    renamed = [entry.stem.replace("mean_ablation", sixth.name) for entry in first]
    assert [entry.stem for entry in own] == renamed
    figure = own[0].draw().figure
    assert figure.get_suptitle() == "made, μ + 6σ ablation"
    forest, activations = list(figures_across([run]))[-2:]
    assert [t.get_text() for t in forest.draw().figure.axes[0].get_yticklabels()][-1] == sixth.label
    assert "the six constants" in activations.caption
    drawing = activations.draw()
    (legend,) = drawing.figure.legends
    (mark,) = [h for h in legend.legend_handles if h is not None and h.get_label() == sixth.label]
    assert (mark.get_marker(), to_hex(mark.get_color())) == (sixth.marker, sixth.colour)  # type: ignore[attr-defined]
    replaced = sixth.of(run.statistics)
    places = [line.get_ydata()[0] for line in drawing.figure.axes[0].lines]
    for row, neuron in zip(drawing.data["models"]["made"], run.entropy_neurons, strict=True):
        assert row[sixth.name] == replaced[neuron]
    for line in drawing.figure.axes[0].lines:
        if line.get_marker() == sixth.marker:
            assert to_hex(line.get_color()) == sixth.colour
            assert line.get_xdata()[0] in replaced
    # Six marks to a neuron, none above another, the middle of them on the neuron's line.
    marks = [y for line, y in zip(drawing.figure.axes[0].lines, places, strict=True)
             if line.get_marker() in {v.marker for v in ABLATION_VALUES.values()}][:6]  # fmt: skip
    assert len(set(marks)) == 6
    assert np.mean(marks) == pytest.approx(0)


def test_tables_and_sentences_say_its_symbol_and_its_label(
    run: RunResults, sixth: AblationValue
) -> None:
    table = gts_by_value([run])
    assert table.texts["ablation"].tolist() == ["μ", sixth.symbol]
    assert r"$\mu$ + 6 $\sigma$" in latex(table)
    assert sixth.symbol in markdown(table)
    for other in tables_of([run]):
        if "ablation" in other.texts.columns and len(other.texts):
            assert sixth.symbol in other.texts["ablation"].tolist(), other.stem
    assert [answer.label for answer in answers_of(run)] == ["mean (μ)", sixth.label]
    assert key_numbers([run]).texts["ablation value"].tolist() == ["mean (μ)", sixth.label]


def test_the_documentation_has_the_rows_of_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    rows = [f"| `{value.name}` | {value.constant} |" for value in ABLATION_VALUES.values()]
    head = "| ablation value | constant |\n| --- | --- |"
    assert "\n".join([head, *rows]) + "\n\n" in page


def test_every_row_can_be_told_from_the_others(sixth: AblationValue) -> None:
    rows = ablation_values("all")
    for of in ("name", "label", "symbol", "constant", "marker"):
        assert len({getattr(row, of) for row in rows}) == len(rows), of
    assert sixth.name == [*ABLATION_VALUES][-1]
    assert PLAIN.name not in ABLATION_VALUES, "a folder of the plain run's name"


def test_the_table_needs_no_numpy() -> None:
    code = "import sys, ccm.method.ablation_values; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
