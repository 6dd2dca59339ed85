"""The report: one page that needs nothing else, safe with any name, and says what the scores say."""

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from ccm.cli.parser import main
from ccm.decoding.results import Work
from ccm.errors import BadInput
from ccm.experiment.config import RunConfig, given
from ccm.experiment.files import read_json, to_json, write_json
from ccm.experiment.folder import MANIFEST
from ccm.experiment.plan import identity, make_plan
from ccm.experiment.results import read_results
from ccm.models.specs import CHECKPOINT, MODELS
from ccm.models.weights import OTHER_DIMENSIONS_VARIABLE
from ccm.paper.comparison import ROW_HEADER
from ccm.paper.report import JSON
from ccm.reporting import report
from ccm.reporting.report import HTML, MARKDOWN, WORK, write_report
from ccm.reporting.rerun import command_of
from ccm.reporting.sentences import answers_of, key_numbers
from tests.made_runs import make_run
from tests.toys import ToyConfig, toy_folder

pytestmark = pytest.mark.whole_runs

HOSTILE = "<script>alert('x')<script>"
ANSWER = ' <img src="x" onerror="alert(1)"> | `y` & z'
VALUES = ("mean_ablation", "mean_plus_sigma_ablation")


class Page(HTMLParser):
    """What a page holds, as a browser would read it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.text = ""
        self.style = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self.inside:
            self.style += data
        else:
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two made runs, one of them with a hostile name and answers; read-only."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "one", model="one", values=VALUES)
    make_run(root / "two", model=HOSTILE, text=ANSWER, seed=1, prompts=20)
    return [root / "one", root / "two"]


@pytest.fixture(scope="module")
def written(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of both; read-only."""
    out = tmp_path_factory.mktemp("report") / "out"
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / HTML).read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, where they do not matter."""
    monkeypatch.setattr(report, "draw", lambda entries, out, processes: iter(()))


# --- one page that needs nothing else ---------------------------------------------------------------


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "video", "audio"}
    for tag, attributes in page.tags:
        assert not [a for a in attributes if a.startswith("on")], f"<{tag}> has a handler"
        assert (attributes.get("src") or "data:").startswith("data:"), f"<{tag}> loads a file"
        assert (attributes.get("href") or "#").startswith("#"), f"<{tag}> leads away"
    assert not re.search(r"url\(|@import|https?:", page.style)
    policy = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert str(policy[0]["content"]).startswith("default-src 'none'")


def test_names_and_answers_are_text(page: Page, written: Path) -> None:
    assert HOSTILE in page.text
    assert ANSWER.strip() in page.text
    markdown = (written / MARKDOWN).read_text(encoding="utf-8")
    # A command stands in a fence, character for character.
    outside_code = re.sub(r"(```+)sh\n.*?\n\1|`[^`\n]*`", "", markdown, flags=re.DOTALL)
    assert "alert" in outside_code
    assert not re.search(r"(?<!\\)<(script|img)", outside_code)


def test_every_link_has_its_place(page: Page) -> None:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [str(a["href"]) for a in page.all("a")]
    assert len(links) > 10
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_headings_are_in_order(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels


def test_every_table_has_a_caption_and_headers_and_scrolls_in_a_box(page: Page) -> None:
    tables = [i for i, (tag, _) in enumerate(page.tags) if tag == "table"]
    assert len(tables) == len(page.all("caption")) > 5
    for i in tables:
        before = page.tags[i - 1][1]
        assert before.get("class") == "box"
        assert (before.get("tabindex"), before.get("role")) == ("0", "region")
        assert before.get("aria-label")
    assert all("scope" in attributes for attributes in page.all("th"))


def test_every_picture_says_what_it_shows_and_is_the_one_in_the_folder(
    page: Page, written: Path
) -> None:
    pictures = page.all("img")
    # The Markdown links the files, in the same order.
    markdown = (written / MARKDOWN).read_text(encoding="utf-8")
    links = re.findall(r"^!\[.*\]\(([^)\s]+)\)$", markdown, re.MULTILINE)
    files = [written / unquote(link) for link in links]
    assert len(pictures) == len(set(files)) == len(list(written.rglob("*.png"))) == 4 + 22 + 4 + 11 + 3
    for picture, file in zip(pictures, files, strict=True):
        assert re.search(r"\d", str(picture["alt"])), f"no number in {picture['alt']!r}"
        kind, data = str(picture["src"]).split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == file.read_bytes(), f"{file.name}: another picture"


def test_another_process_writes_the_same_bytes(
    folders: list[Path], written: Path, tmp_path: Path
) -> None:
    first = {p.relative_to(written): p.read_bytes() for p in written.rglob("*") if p.is_file()}
    command = [sys.executable, "-m", "ccm", "report", *map(str, folders), "--out", str(tmp_path / "b")]
    subprocess.run(command, check=True, capture_output=True)
    second = {
        p.relative_to(tmp_path / "b"): p.read_bytes()
        for p in (tmp_path / "b").rglob("*")
        if p.is_file()
    }
    assert first.keys() == second.keys()
    assert not [name for name in first if first[name] != second[name]]


# --- what it says -----------------------------------------------------------------------------------


def test_the_answer_is_the_scores(folders: list[Path], page: Page) -> None:
    run = read_results(folders[0])
    for answer in answers_of(run):
        scores = run.scores["ablations"][answer.value]
        own, controls = scores["entropy"], scores["controls"]
        for r in (own["gts"], own["conversion_ratios"]["CK"]):
            found = f"{r['percent']:.1f} % ({r['count']}/{r['total']}; 95 % interval {r['low']:.1f} to"
            assert found in " ".join(answer.sentences)
        for c in (controls["gts"], controls["conversion_ratios"]["CK"]):
            assert f"{c['mean']:.1f} % on average" in " ".join(answer.sentences)
        assert f"Q = {own['q_value']:.1f} of 100, p = {own['permutation_p']:.4f}" in answer.sentences[0]
        like = scores["matched_controls"]
        assert f"Q = {like['q_value']:.1f}, p = {like['permutation_p']:.4f}" in answer.sentences[0]
        assert f"{like['gts']['mean']:.1f} % on average" in answer.sentences[0]
        assert all(sentence in page.text for sentence in answer.sentences)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"moved": 1.0}, "more than any of 5 control sets"),
        ({"moved": 0.0}, "within the range of 5 control sets"),
        ({"controls": 0}, "no control sets were run"),
        ({"before": ("CK",)}, "Every prompt was answered from the context before"),
    ],
)
def test_the_answer_where_there_is_little_to_say(
    how: dict[str, Any], said: str, tmp_path: Path
) -> None:
    make_run(tmp_path, **how)
    (answer,) = answers_of(read_results(tmp_path))
    assert said in " ".join(answer.sentences)


def test_less_than_any_control(tmp_path: Path) -> None:
    make_run(tmp_path, moved=0.8)
    run = read_results(tmp_path)
    gts = run.scores["ablations"]["mean_ablation"]["entropy"]["gts"]
    gts |= {"count": 0, "percent": 0.0, "low": 0.0, "high": 6.0}
    assert "less than any of 5 control sets" in answers_of(run)[0].sentences[0]


def test_no_prompt_at_all(tmp_path: Path) -> None:
    make_run(tmp_path)
    run = read_results(tmp_path)
    scores = run.scores["ablations"]["mean_ablation"]["entropy"]
    scores["gts"] = {"count": 0, "total": 0, "percent": None, "low": None, "high": None}
    assert answers_of(run)[0].sentences == ("There is no prompt: nothing was measured.",)


def test_several_runs_are_laid_side_by_side(folders: list[Path], page: Page) -> None:
    table = key_numbers([read_results(folder) for folder in folders]).texts
    assert table["model"].tolist() == ["one", "one", HOSTILE]
    assert page.text.index("Side by side") < page.text.index("What was run")
    place = page.text.index("CR(CK) of controls")
    for cell in table["GTS"]:
        assert cell in page.text[place : place + 2000]


@pytest.mark.usefixtures("undrawn")
def test_one_run_is_not_laid_beside_itself(folders: list[Path], tmp_path: Path) -> None:
    write_report([read_results(folders[0])], tmp_path)
    text = Page((tmp_path / HTML).read_text(encoding="utf-8")).text
    assert "Side by side" not in text
    assert text.count("CR(CK) of controls") == 1


def test_every_counter_is_explained() -> None:
    assert list(WORK) == [f.name for f in fields(Work)]


# --- held against the paper -------------------------------------------------------------------------


def tolerance_report(path: Path, run: Path, **changes: Any) -> Path:
    """A tolerance report of one row and one claim, of a run folder."""
    held = read_json(run / MANIFEST)["identity"]
    row = {
        "model": held["model"],
        "ablation_value": "mean_ablation",
        "quantity": "GTS <b>",
        "source": "Table 6",
        "rule": "share",
        "unit": "%",
        "paper": 9.3,
        "ours": 9.9,
        "paper_text": "9.3 %",
        "ours_text": "9.9 %",
        "margin": 0.6,
        "interval": [-1.0, 2.0],
        "verdict": "agrees",
        "defect": None,
        "reason": "",
    }
    unlike = row | {"quantity": "CR(ND)", "interval": None, "margin": None, "defect": 1, "reason": "PK"}
    claim = {
        "name": "copying",
        "statement": "more",
        "holds": True,
        "as_printed": None,
        "detail": "1 of 2",
    }
    model = {
        "model": held["model"],
        "display_name": held["model"],
        "what_ran": "60 prompts",
        "provenance": held,
        "rows": [row, unlike],
        "claims": [claim],
    }
    write_json(path, {"models": [model | changes], "tolerances": []})
    return path


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("where", [f"run/{JSON}", JSON, "other.json"])
def test_the_tolerance_report_is_shown(where: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    path = tolerance_report(tmp_path / where, tmp_path / "run")
    given = ["--tolerance", str(path)] if where == "other.json" else []
    assert main(["report", str(tmp_path / "run"), *given]) == 0
    text = Page((tmp_path / "run" / HTML).read_text(encoding="utf-8")).text
    markdown = (tmp_path / "run" / MARKDOWN).read_text(encoding="utf-8")
    for shown in (text, markdown.replace("\\", "")):
        for word in (
            *ROW_HEADER,
            "GTS <b>",
            "+0.6",
            "-1 to 2",
            "agrees (defect 1: PK)",
            "copying: more",
        ):
            assert word in shown
    assert "those of another run" not in text


@pytest.mark.usefixtures("undrawn")
def test_a_tolerance_report_of_another_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    path = tolerance_report(tmp_path / JSON, tmp_path / "run", provenance={"model": "made"})
    assert main(["report", str(tmp_path / "run")]) == 0
    html = tmp_path / "run" / HTML
    assert "Held against the paper" not in html.read_text(), "what lies beside is not this run's"
    assert main(["report", str(tmp_path / "run"), "--tolerance", str(path)]) == 0
    assert "those of another run" in html.read_text()
    tolerance_report(tmp_path / "run" / JSON, tmp_path / "run", provenance={"model": "made"})
    tolerance_report(tmp_path / JSON, tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "Held against the paper" in html.read_text(), "the one beside is this run's"
    assert "those of another run" not in html.read_text()


# --- run it again -----------------------------------------------------------------------------------

MANY = {
    "ablation_values": VALUES,
    "controls": 7,
    "matched_controls": 4,
    "seed": 5,
    "protocol": "released",
    "max_prompts": 12,
    "engine": "hooked",
    "full_texts": True,
    "dtype": "bfloat16",
    "template": "chat",
}


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(
            ablation_values=("all",), facts=str(CHECKPOINT), k=4, min_rho=0.25, null_space_dims=9
        ),
        RunConfig(neurons=(3, 1, 2), **MANY),
        RunConfig(model=str(CHECKPOINT), k=3),
        # A stand-in, of whose own dimensions follow other defaults.
        RunConfig(
            model="gpt2-small",
            model_paths={"gpt2-small": toy_folder(ToyConfig("gpt2"))},
            facts=str(CHECKPOINT),
            min_rho=MODELS["gpt2-small"].min_rho,
        ),
    ],
    ids=["defaults", "measures", "many", "folder", "path"],
)
def test_the_command_does_the_same_run_again(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OTHER_DIMENSIONS_VARIABLE, "1")
    was = json.loads(to_json(identity(make_plan(config))))
    command = command_of({"asked": json.loads(to_json(given(config)))})
    caught = []

    def run(config: RunConfig, out: Path) -> None:
        caught.append(config)
        raise BadInput("seen")

    monkeypatch.setattr("ccm.experiment.run.run", run)
    program, *words = shlex.split(command)
    assert program == "ccm"
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert json.loads(to_json(identity(make_plan(caught[0])))) == was
    assert caught[0] == config


def test_defaults_need_not_be_said() -> None:
    assert command_of({"asked": given(RunConfig())}) == (
        "ccm run --model organism --device cpu --ablation-value mean_ablation --controls 100 --seed 123"
    )


# --- bad input --------------------------------------------------------------------------------------


@pytest.fixture
def broken(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with runs and things that are none."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "again", "unfinished"):
        shutil.copytree(folders[0], name)
    manifest = read_json(Path("unfinished") / MANIFEST)
    write_json(Path("unfinished") / MANIFEST, manifest | {"complete": False})
    Path("foreign").mkdir()
    Path("file").touch()
    write_json(Path("others.json"), {"models": []})
    write_json(Path("list.json"), [1, 2])


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing: no such folder"),
        (["foreign"], "no run folder"),
        (["unfinished"], "the run is not finished"),
        (["run", "again", "--out", "o"], "the same run as run"),
        (["run", "again"], "no default folder for several"),
        (["run", "--out", "file"], "is a file"),
        (["run", "--out", "file/o"], "cannot be written to"),
        (["run", "--tolerance", "missing.json"], "missing.json: no such file"),
        (["run", "--tolerance", "file"], "cannot be read as JSON"),
        (["run", "--tolerance", "list.json"], "not a tolerance report"),
        (["run", "--tolerance", "others.json"], "holds no row of one"),
    ],
)
def test_one_clear_error_before_any_drawing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("o").exists()
    assert (
        not list(Path().rglob("*.png")) + list(Path().rglob("*.tex")) + list(Path().rglob("report.*"))
    )


@pytest.mark.usefixtures("broken")
def test_a_folder_that_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", denied)  # for root, no folder is
    assert main(["report", "run"]) == 2
    assert "run: cannot be written to (Permission denied)" in capsys.readouterr().err
    assert not (Path("run") / "figures").exists()


def test_a_share_has_no_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["run", "--model", "organism", "--shard", "1/2", "--report", "--out", str(tmp_path / "o")]
    assert main(words) == 2
    assert "a shard of a run has no scores" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_run_can_end_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--model", "organism", "--max-prompts", "6", "--controls", "1", "--report"]
    out = tmp_path / "run"
    assert main([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"report: {out / HTML}\n")
    text = Page((out / HTML).read_text(encoding="utf-8")).text
    assert "--max-prompts 6" in text
    assert (out / MARKDOWN).is_file()
    assert main([*words, "--out", str(out)]) == 0, "a folder with a report is still a run folder"
