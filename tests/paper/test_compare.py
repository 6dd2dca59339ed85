"""`ccm compare`: finished runs of published models against the print, and what it says of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ccm.cli.parser import main
from ccm.errors import BadInput
from ccm.experiment.files import read_json, read_table, write_json, write_table
from ccm.experiment.folder import MANIFEST, MEASURES, RHO_BY_LAYER, SCORES, SINGULAR_VALUES
from ccm.experiment.locking import locked
from ccm.experiment.results import read_results
from ccm.models.specs import MODELS, PUBLISHED
from ccm.paper.comparison import comparison_of, found_in
from ccm.paper.report import (
    JSON,
    MARKDOWN,
    compare_with_paper,
    comparisons_of,
    markdown,
    one_line,
    read_report,
)
from ccm.paper.values import MEAN, NEURON_MEASURES, printed
from reproduction.complaints import complaints
from tests.made_runs import make_run
from tests.published_run import found, published_run, scores_of

GPT2, PHI = "gpt2-small", "Phi-1_5"
AS_PRINTED = "10684 prompts, a GPU, float32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of GPT-2 and one of Phi-1.5 that found what was printed; read-only."""
    parent = tmp_path_factory.mktemp("runs")
    published_run(parent / "gpt2")
    published_run(parent / "phi", PHI)
    return parent


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A run of GPT-2 of one's own."""
    return Path(shutil.copytree(folder / "gpt2", tmp_path / "run"))


def note(run: Path, **identity: Any) -> None:
    manifest = read_json(run / MANIFEST)
    write_json(run / MANIFEST, {**manifest, "identity": {**manifest["identity"], **identity}})


def what_ran(run: Path) -> str:
    return comparison_of(read_results(run)).what_ran


# --- what is compared ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_run_is_compared_by_its_own_files(model: str, tmp_path: Path) -> None:
    of_run, paper = read_results(published_run(tmp_path, model)), printed(model)
    taken, wanted = found_in(of_run), found(model)
    assert (taken.sources, taken.transition_counts, taken.q_values, taken.n_controls) == (
        wanted.sources,
        wanted.transition_counts,
        wanted.q_values,
        wanted.n_controls,
    )
    assert sorted(taken.selected or ()) == sorted(MODELS[model].published_neurons)
    assert taken.measures is not None
    for neuron in paper.neurons:
        for name in NEURON_MEASURES:
            assert taken.measures[name].loc[neuron.neuron] == getattr(neuron, name).value
    comparison = comparison_of(of_run)
    assert complaints(comparison.rows) == []
    assert {row.verdict for row in comparison.rows} <= {
        "agrees", "differs, as expected", "agrees, though an artefact"
    }  # fmt: skip
    assert comparison.what_ran == f"{of_run.scores['n_prompts']} prompts, a GPU, float32"
    assert (comparison.model, comparison.display_name) == (model, MODELS[model].display_name)
    assert comparison.provenance == of_run.identity
    assert len(comparison.claims) == 4


def test_a_rule_that_finds_no_set_finds_none_of_the_published_neurons(run: Path) -> None:
    table = read_table(run / MEASURES)
    table["rho"] = 0.5
    write_table(run / MEASURES, table)
    rows = {row.quantity: row for row in comparison_of(read_results(run)).rows}
    assert rows["selected neurons"].ours_text == "0 of 6"
    assert rows["selected neurons"].verdict == "differs"


# --- whether it can be compared -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"dtype": "bfloat16"}, ""),
        ({"max_prompts": 60}, ", a rehearsal: --max-prompts 60"),
        ({"facts": "mine"}, ", a rehearsal: other facts"),
        ({"max_prompts": 9, "facts": "mine"}, ", a rehearsal: --max-prompts 9 and other facts"),
        ({"protocol": "corrected"}, ", unlike the paper's run: corrected protocol"),
        ({"template": "bare"}, ", unlike the paper's run: template bare"),
        ({"bos": "none"}, ", unlike the paper's run: BOS none"),
        ({"null_space_dims": 12}, ", unlike the paper's run: null space of 12 dimensions"),
        (
            {"max_prompts": 60, "protocol": "corrected", "template": "own"},
            ", a rehearsal: --max-prompts 60, unlike the paper's run: corrected protocol and template "
            "own",
        ),
    ],
)
def test_a_run_that_is_not_the_papers_says_so(changed: dict[str, Any], said: str, run: Path) -> None:
    note(run, **changed)
    precision = changed.get("dtype", "float32")
    assert what_ran(run) == AS_PRINTED.replace("float32", precision) + said


@pytest.mark.parametrize(
    ("asked", "said"), [(None, ""), ("pararel", ""), ("/my/pararel", ", a rehearsal: other facts")]
)
def test_a_folder_of_facts_may_be_called_pararel(asked: str | None, said: str, run: Path) -> None:
    write_json(run / MANIFEST, read_json(run / MANIFEST) | {"asked": {"facts": asked}})
    assert what_ran(run) == AS_PRINTED + said


def test_a_run_of_neurons_that_were_selected(run: Path) -> None:
    table = read_table(run / MEASURES)
    table["entropy_neuron"] = table["neuron_idx"] < 6
    write_table(run / MEASURES, table)
    assert what_ran(run) == (
        f"{AS_PRINTED}, unlike the paper's run: other neurons than the published ones"
    )


def narrower(run: Path) -> None:
    write_table(run / MEASURES, read_table(run / MEASURES).iloc[:40])


def thinner(run: Path) -> None:
    write_table(run / SINGULAR_VALUES, pd.DataFrame({"singular_value": np.ones(12)}))


def shallower(run: Path) -> None:
    table = read_table(run / RHO_BY_LAYER)
    write_table(run / RHO_BY_LAYER, table[table["layer"] < 2])


@pytest.mark.parametrize("change", [narrower, thinner, shallower])
def test_the_neurons_of_a_stand_in_are_not_compared(change: Any, run: Path) -> None:
    change(run)
    comparison = comparison_of(read_results(run))
    assert comparison.what_ran == f"{AS_PRINTED}, a rehearsal: a stand-in of other dimensions"
    not_run = [row for row in comparison.rows if row.verdict == "not run"]
    assert len(not_run) == 3 * 6 + 1
    assert {row.reason for row in not_run} == {
        "gpt2-small is a stand-in of other dimensions, whose neurons are others"
    }


# --- the command --------------------------------------------------------------------------------------


def test_one_run_leaves_its_report_in_its_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in run.iterdir()}
    assert main(["compare", str(run)]) == 0
    comparison = comparison_of(read_results(run))
    assert capsys.readouterr().out.splitlines() == [
        one_line(comparison),
        f"report: {run / MARKDOWN}",
        f"report: {run / JSON}",
    ]
    assert {path.name for path in run.iterdir()} == before | {MARKDOWN, JSON}
    assert (run / MARKDOWN).read_text(encoding="utf-8") == markdown([comparison])
    assert read_report(run / JSON) == {GPT2: comparison}
    assert main(["compare", str(run)]) == 0, "written over"


def test_several_runs_share_a_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    runs = [str(folder / "phi"), str(folder / "gpt2")]
    assert main(["compare", *runs, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [PHI, GPT2, "report:", "report:"]
    assert [*read_report(out / JSON)] == [PHI, GPT2]
    assert {path.name for path in out.iterdir()} == {MARKDOWN, JSON}


def test_python_gets_the_comparisons_and_the_paths(folder: Path, tmp_path: Path) -> None:
    runs = [read_results(folder / "gpt2")]
    comparisons, paths = compare_with_paper(runs, tmp_path)
    assert comparisons == comparisons_of(runs)
    assert paths == [tmp_path / MARKDOWN, tmp_path / JSON]
    assert all(path.is_file() for path in paths)


def test_a_run_without_mean_ablation_tells_no_claim(run: Path) -> None:
    scores = scores_of(found(GPT2))
    values = ["mode_ablation"]
    scores["ablations"] = {value: scores["ablations"][value] for value in values}
    write_json(run / SCORES, scores)
    note(run, ablation_values=values)
    comparison = comparison_of(read_results(run))
    assert comparison.claims == ()
    assert one_line(comparison).endswith("Claims: cannot be told without mean ablation.")
    absent = {row.reason for row in comparison.rows if row.verdict == "not run"}
    assert f"{MEAN} is not in the run" in absent


@pytest.fixture
def bad(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with runs that cannot be compared, or not together."""
    parent = run.parent
    monkeypatch.chdir(parent)
    shutil.copytree(run, "again")
    shutil.copytree(run, "other")
    note(parent / "other", seed=7)
    make_run(Path("organism"), model="organism", prompts=3, controls=1)
    make_run(Path("mine"), model="mine", prompts=3, controls=1)
    shutil.copytree(run, "unfinished")
    write_json(Path("unfinished") / MANIFEST, read_json(run / MANIFEST) | {"complete": False})
    shutil.copytree(run, "share")
    note(Path("share"), shard="1/2")
    Path("foreign").mkdir()
    Path("file").touch()
    return parent


NOTHING = (
    "of which the paper printed nothing. Allowed: EleutherAI_pythia-1.4b, Meta-Llama-3-8B, "
    "Mistral-7B-v0.1, Phi-1_5, gpt2-small; give a run of one of these."
)


@pytest.mark.usefixtures("bad")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["organism"], f"ccm: organism: a run of organism, {NOTHING}"),
        (["run", "mine", "--to", "paper", "--out", "o"], f"ccm: mine: a run of mine, {NOTHING}"),
        (
            ["run", "other", "--to", "paper", "--out", "o"],
            "ccm: other: a run of gpt2-small, as run is. A report holds",
        ),
        (["run", "again", "--out", "o"], "the same run as run"),
        (["run", "again"], "2 runs: no default folder for several. Give one with --out."),
        (["missing"], "missing: no such folder"),
        (["foreign"], "no run folder"),
        (["unfinished"], "the run is not finished"),
        (["share"], "has no scores"),
        (["run", "--out", "file"], "file: is a file"),
        (["run", "--out", "file/o"], "ccm: file/o: cannot be written to (Not a directory"),
    ],
)
def test_one_clear_error_and_nothing_written(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *arguments]) == 2
    printed_ = capsys.readouterr()
    assert message in printed_.err
    assert (printed_.err.count("\n"), printed_.out) == (1, "")
    assert not Path("o").exists()
    assert not list(Path().rglob("tolerance_report.*"))


def test_a_folder_that_another_process_writes_to(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for where, given in ((run, []), (out, ["--out", str(out)])):
        with locked(where):
            assert main(["compare", str(run), *given]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"ccm: {where}: ")
        assert error.count("\n") == 1
        assert not (where / JSON).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "not a tolerance report"),
        ('{"models": [{"model": "x"}]}', "not a tolerance report"),
        ('{"models": [{"model": "x", "rows": [1], "claims": []}]}', "not a tolerance report"),
        ('{"models": 3}', "not a tolerance report"),
        ("{", "cannot be read as JSON"),
        ('{"models": []}', "holds no row of gpt2-small"),
    ],
)
def test_what_is_no_tolerance_report(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_report(path, [GPT2])


def test_a_report_with_an_entry_that_is_none_of_a_rows(run: Path) -> None:
    assert main(["compare", str(run)]) == 0
    held = json.loads((run / JSON).read_text(encoding="utf-8"))
    for part in ("rows", "claims"):
        entry = held["models"][0][part][0]
        changed = json.loads(json.dumps(held))
        changed["models"][0][part][0] = entry | {"more": 1}
        write_json(run / JSON, changed)
        with pytest.raises(BadInput, match=r"not a tolerance report .*Give the tolerance_report\.json"):
            read_report(run / JSON)
