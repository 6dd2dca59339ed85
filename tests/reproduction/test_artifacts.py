"""The index of what a test session leaves: every recorded file once a test, by links that can move."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest

from ccm.reporting.report import HTML
from conftest import OPTIONS, artifact_root
from reproduction.artifacts import INDEX, Artifacts, artifacts_of, write_index
from reproduction.pairs import Pair
from reproduction.runs import Run
from tests.made_runs import make_run
from tests.reproduction.test_runs import options


def report_of(name: str, *paths: Path, when: str = "call", outcome: str = "passed") -> Any:
    recorded = [("artifact", str(path)) for path in paths] + [("other", "x")]
    return SimpleNamespace(nodeid=name, when=when, outcome=outcome, user_properties=recorded)


def test_the_index_leads_to_every_file_wherever_it_is_moved(tmp_path: Path) -> None:
    root = tmp_path / "root"
    files = [root / "reports" / "a model" / HTML, root / "reports" / "a model" / "x=1 <b>.png"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (root / "tolerance_report.md").touch()
    stats = {
        "passed": [report_of("t::one[<i>]", *files), report_of("t::one[<i>]", *files, when="teardown")],
        "failed": [report_of("t::two", files[1], outcome="failed")],
        "skipped": [report_of("t::three")],
        "": [SimpleNamespace(nodeid="a warning")],
    }
    tests = artifacts_of(stats)
    assert [(t.name, t.outcome, len(t.paths)) for t in tests] == [
        ("t::one[<i>]", "passed", 2),
        ("t::two", "failed", 1),
    ]
    (root / "tolerance_report.json").touch()  # another session's
    elsewhere = tmp_path / "tolerance_report.md"
    assert write_index(tests, root, [root / "tolerance_report.md", elsewhere]) == root / INDEX
    moved = tmp_path / "elsewhere"
    shutil.move(root, moved)
    page = (moved / INDEX).read_text(encoding="utf-8")
    assert "<i>" not in page
    assert "<b>" not in page
    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 5  # the report, the tolerance report, three files by test
    assert all((moved / unquote(link)).is_file() for link in links)


def test_artifacts_have_a_folder_of_their_own_unless_told(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    config: Any = SimpleNamespace(stash={OPTIONS: options()}, rootpath=tmp_path)
    assert artifact_root(config) == tmp_path / "artifacts"
    config.stash[OPTIONS] = options(artifacts=tmp_path / "mine")
    assert artifact_root(config) == tmp_path / "mine"
    ignored = (pytestconfig.rootpath / ".gitignore").read_text().splitlines()
    assert "artifacts/" in ignored


def test_a_model_is_drawn_once_and_a_pair_gets_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = ("mean_ablation", "mode_ablation")
    make_run(tmp_path / "run", values=values)
    written = []

    def write(runs: Any, out: Path, held: Path | None) -> list[Path]:
        written.append(out)
        stems = [f"made/made_{value}-conversion_ratios" for value in values]
        figures = [out / "figures" / "entropy_neurons_figures" / f"{stem}.png" for stem in stems]
        return [out / HTML, out / "figures" / "latex_tables" / "x.csv", *figures]

    monkeypatch.setattr("reproduction.artifacts.write_report", write)
    artifacts = Artifacts(options(), tmp_path / "root")
    run: Any = Run(spec=None, folder=tmp_path / "run", scores={})  # type: ignore[arg-type]
    for value in values:
        left = artifacts(Pair("made", value), run)
        names = [path.name for path in left.paths]
        assert names == [HTML, "x.csv", f"made_{value}-conversion_ratios.png"]
    assert written == [tmp_path / "root" / "reports" / "made"]
