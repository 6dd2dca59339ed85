"""Runs of one model side by side: each has a name of its own, everywhere, and says what differs."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ccm.cli.parser import main
from ccm.errors import BadInput
from ccm.experiment.files import read_json, write_json
from ccm.experiment.folder import MANIFEST
from ccm.experiment.results import RunResults, read_results
from ccm.reporting import report
from ccm.reporting.distinct_names import distinct_names
from ccm.reporting.figures import gallery
from ccm.reporting.figures.canvas import style
from ccm.reporting.figures.gallery import FOLDER, Entry, figures_across, figures_of_run, write_figures
from ccm.reporting.report import HTML, MARKDOWN
from ccm.reporting.tables import FOLDER as TABLES
from ccm.reporting.tables import tables_of
from tests.made_runs import make_run
from tests.reporting.test_report import Page

SHA = "0123456789abcdef" * 4


def made(
    path: Path,
    model: str = "final",
    source: str | None = None,
    revision: str | None = None,
    **identity: Any,
) -> RunResults:
    """A small run whose manifest says what is given."""
    make_run(path, model=model, prompts=6, controls=1, moved=1.0)
    manifest = read_json(path / MANIFEST)
    manifest["identity"] |= identity
    manifest["weights"] = {"source": source or "", "revision": revision}
    write_json(path / MANIFEST, manifest)
    return read_results(path)


def names_of(tmp_path: Path, *runs: dict[str, Any]) -> list[tuple[str, str]]:
    """The names people read and those of files, of runs in folders 0, 1, 2 ..."""
    found = distinct_names([made(tmp_path / str(i), **given) for i, given in enumerate(runs)])
    assert distinct_names(found) == found, "names are given once"
    assert [run.path.name for run in found] == [str(i) for i in range(len(runs))]
    return [(run.display_name, run.name) for run in found]


# --- names --------------------------------------------------------------------------------------------

F32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
CASES: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str]]]] = {
    "other models": (
        [{"model": "organism"}, {"model": "mine"}],
        [("Organism", "organism"), ("mine", "mine")],
    ),
    "folders": (
        [{"source": "/x/a/final", "weights_sha256": "1"}, {"source": "/x/b/final"}],
        [("a/final", "a-final"), ("b/final", "b-final")],
    ),
    "folders that differ further up": (
        [{"source": f"/x/{x}/y/final", "weights_sha256": x} for x in "abc"],
        [(f"{x}/y/final", f"{x}-y-final") for x in "abc"],
    ),
    "a folder below the other": (
        [{"source": "final"}, {"source": "a/final", "weights_sha256": "1"}],
        [("final", "final"), ("a/final", "a-final")],
    ),
    "number types": (
        [{"model": "organism", **F32}, {"model": "organism", **BF16}],
        [("Organism (float32)", "organism-float32"), ("Organism (bfloat16)", "organism-bfloat16")],
    ),
    "protocols": (
        [
            {"model": "organism", "protocol": p, "seed": i}
            for i, p in enumerate(["corrected", "released"])
        ],
        [("Organism (corrected)", "organism-corrected"), ("Organism (released)", "organism-released")],
    ),
    "folders and number types": (
        [
            {"source": "a/final", **F32},
            {"source": "a/final", **BF16},
            {"source": "b/final", **F32, "seed": 7},
        ],
        [
            ("a/final (float32)", "a-final-float32"),
            ("a/final (bfloat16)", "a-final-bfloat16"),
            ("b/final (float32)", "b-final-float32"),
        ],
    ),
    "folders of a model with a name": (
        [{"model": "gpt2-small", "source": f"/{x}/gpt2", "weights_sha256": x} for x in "ab"],
        [("GPT2-small (a/gpt2)", "gpt2-small-a-gpt2"), ("GPT2-small (b/gpt2)", "gpt2-small-b-gpt2")],
    ),
    "revisions": (
        [{"model": "gpt2-small", "revision": r * 40, "weights_sha256": r} for r in "ab"],
        [(f"GPT2-small (revision {r * 8})", f"gpt2-small-revision-{r * 8}") for r in "ab"],
    ),
    "settings": (
        [{"controls": 100}, {"controls": 50}],
        [("final (100 controls)", "final-100-controls"), ("final (50 controls)", "final-50-controls")],
    ),
    "neurons": (
        [{"neurons": [1, 2]}, {}],
        [
            ("final (neurons 1, 2)", "final-neurons-1-2"),
            ("final (neurons selected)", "final-neurons-selected"),
        ],
    ),
    "settings of a later version": (
        [{"bos": {"id": 1}, "new_rule": "a"}, {"bos": {"id": 2}, "new_rule": "b"}],
        [("final (new rule a)", "final-new-rule-a"), ("final (new rule b)", "final-new-rule-b")],
    ),
    "what says nothing to people": (
        [{"source": "final", "config_sha256": SHA}, {"source": "final", "config_sha256": SHA[::-1]}],
        [("final (0)", "final-0"), ("final (1)", "final-1")],
    ),
    "many neurons": (
        [{"neurons": [*range(40)]}, {"neurons": [*range(41)]}],
        [("final (0)", "final-0"), ("final (1)", "final-1")],
    ),
    "a folder of the same name as a model people know": (
        [{"model": "organism"}, {"model": "Organism", "source": "/x/Organism"}],
        [("Organism (0)", "organism-0"), ("Organism (1)", "Organism-1")],
    ),
    "names that meet another's": (
        [{"source": "a/final"}, {"source": "b/final", "seed": 1}, {"model": "A-FINAL"}],
        [("a/final", "a-final-2"), ("b/final", "b-final"), ("A-FINAL", "A-FINAL")],
    ),
    "hostile folders": (
        [{"source": "/$(x)/<b>/final"}, {"source": "/" + "ä" * 200 + "/final", "seed": 1}],
        [("<b>/final", "b-final"), ("ä" * 200 + "/final", "ä" * 47 + "-final")],
    ),
}


@pytest.mark.parametrize(("runs", "expected"), CASES.values(), ids=CASES)
def test_names_say_what_differs(
    runs: list[dict[str, Any]], expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    assert names_of(tmp_path, *runs) == expected


def test_one_run_keeps_its_name(tmp_path: Path) -> None:
    assert names_of(tmp_path, {"source": "a/final"}) == [("final", "final")]


@pytest.mark.parametrize("model", ["final", "organism"])
def test_the_same_run_twice_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "a", model)
    made(tmp_path / "b", model)
    out = tmp_path / "out"
    for command in ("figures", "report"):
        for second in ("a", "b"):
            runs = [str(tmp_path / "a"), str(tmp_path / second)]
            assert main([command, *runs, "--out", str(out)]) == 2
            assert capsys.readouterr().err == (
                f"ccm: {runs[1]}: the same run as {runs[0]}, of the same weights with the same "
                "settings. Give one of them.\n"
            )
    assert not out.exists()
    run = read_results(tmp_path / "a")
    with pytest.raises(BadInput, match=r"the same run as .*/a, of"):
        write_figures([run, run], out)


# --- everywhere ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[RunResults]:
    """Runs of two checkpoints with one name; read-only."""
    root = tmp_path_factory.mktemp("pair")
    made(root / "a" / "final", source="ckpt/a/final", weights_sha256="1")
    made(root / "b" / "final", source="ckpt/b/final", weights_sha256="2")
    return [read_results(root / name / "final") for name in ("a", "b")]


def test_tables_and_figures_tell_them_apart(pair: list[RunResults]) -> None:
    runs = distinct_names(pair)
    for table in tables_of(runs):
        assert set(table.texts["model"]) == {"a/final", "b/final"}, table.stem
        expected = {"a/final", "b/final"} if table.data is table.texts else {"a-final", "b-final"}
        assert set(table.data["model"]) == expected, table.stem
    stems = [entry.stem for run in runs for entry in figures_of_run(run)]
    assert len({stem.casefold() for stem in stems}) == len(stems)
    assert {re.sub(r"^(\w-final)/.*", r"\1", stem) for stem in stems} == {"a-final", "b-final"}
    assert all("/" not in stem.partition("/")[2] for stem in stems)
    across = {entry.stem: entry.draw() for entry in figures_across(runs)}
    for stem in ("knowledge_source_sizes", "neuron_activation_distributions"):
        assert list(across[stem].data["models"]) == ["a/final", "b/final"]
    rows = across["entropy_set_and_controls"].data["rows"]
    assert [row["display_name"] for row in rows] == ["a/final", "b/final"]
    for drawing in across.values():
        assert "a/final" in drawing.description
        assert "b/final" in drawing.description


def test_what_the_paper_printed_is_found_under_any_name(tmp_path: Path) -> None:
    runs = distinct_names(
        [made(tmp_path / dtype, "gpt2-small", dtype=dtype) for dtype in ("float32", "bfloat16")]
    )
    across = {entry.stem: entry.draw() for entry in figures_across(runs)}
    for row in across["entropy_set_and_controls"].data["rows"]:
        assert row["gts"]["printed"]["value"] > 0
    for run in runs:
        (entry,) = [e for e in figures_of_run(run) if e.stem.endswith("-conversion_ratios")][:1]
        assert entry.draw().data["bars"][0]["printed"]["value"] > 0


def test_a_report_of_two_checkpoints(
    pair: list[RunResults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw", lambda entries, out, processes: iter(()))
    assert main(["report", *(str(run.path) for run in pair), "--out", str(tmp_path)]) == 0
    page, markdown = Page((tmp_path / HTML).read_text()), (tmp_path / MARKDOWN).read_text()
    assert "Entropy neurons and context copying: a/final, b/final" in page.text
    assert re.findall(r"^## (./final)$", markdown, re.MULTILINE) == ["a/final", "b/final"]
    numbers = tmp_path / "figures" / TABLES / "ablation_value_wise_gts.csv"
    assert pd.read_csv(numbers)["model"].tolist() == ["a-final", "b-final"]


def test_figures_of_two_checkpoints(
    pair: list[RunResults],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def few(run: RunResults) -> list[Entry]:
        return [entry for entry in figures_of_run(run) if entry.stem.endswith("_transition_score")]

    monkeypatch.setattr(gallery, "figures_of_run", few)
    assert main(["figures", *(str(run.path) for run in pair), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("5 figures (PDF, PNG, data), 8 tables")
    folders = sorted(path.name for path in (tmp_path / FOLDER).iterdir() if path.is_dir())
    assert folders == ["a-final", "b-final"]
    data = [
        json.loads((tmp_path / FOLDER / f / f"{f}_mean_ablation_transition_score.json").read_text())
        for f in folders
    ]
    assert [d["entropy"] for d in data] == [
        run.scores["ablations"]["mean_ablation"]["entropy"]["gts"] for run in pair
    ]


def test_long_names_stay_in_the_picture(tmp_path: Path) -> None:
    long = "checkpoints-of-the-second-run/step-100000"
    runs = distinct_names(
        [
            made(tmp_path / str(i), "final", f"{long}/final", dtype=dtype)
            for i, dtype in enumerate(("float32", "bfloat16"))
        ]
    )
    runs = [replace(run, display_name=f"{long}/{run.display_name}") for run in runs]
    for entry in [*figures_across(runs), *figures_of_run(runs[1])]:
        figure = entry.draw().figure
        with style():
            FigureCanvasAgg(figure).draw()
        titles = [figure._suptitle, *(legend.get_title() for legend in figure.legends)]
        ticks = figure.axes[0].get_xticklabels() if entry.stem == "knowledge_source_sizes" else []
        boxes = [text.get_window_extent() for text in [*titles, *ticks] if text and text.get_text()]
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes), entry.stem
        for left, right in pairwise([tick.get_window_extent() for tick in ticks]):
            assert left.x1 < right.x0, "names of models overlap"
