"""Models by their id on the hub: what is asked of it, at which revision, and what a message says."""

import json
import shutil
from pathlib import Path

import pytest

import ccm
from ccm.cli.parser import main
from ccm.errors import BadInput, NotAvailable
from ccm.models.load import load
from ccm.models.specs import MODELS, spec_for
from ccm.models.weights import folder_of, revision, unfinished
from tests.cli.test_bad_input import Refused
from tests.made_runs import few_facts
from tests.toys import ToyConfig, toy_folder

TOY = ToyConfig("llama", tied=True)
COMMITS = {None: "0123abc", "v2": "4567def"}  # of the main branch, and of a tag
Fetch = tuple[str, str, str | None]  # repository, file, revision


class Hub:
    """A hub with one model of two revisions, and its cache, which is empty at first."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.fetched, self.offline = root, list[Fetch](), False
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", self.cached)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.one)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.rest)
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self.info)

    def snapshot(self, revision: str | None) -> Path:
        return self.root / "models--nobody--toy" / "snapshots" / COMMITS[revision]

    def cached(self, repository: str, name: str, revision: str | None = None) -> str | None:
        path = self.snapshot(revision) / name
        return str(path) if repository == "nobody/toy" and path.is_file() else None

    def info(self, repository: str, revision: str | None, timeout: int) -> None:
        if self.offline:
            raise ConnectionError("no route to host")

    def one(self, repository: str, name: str, revision: str | None = None) -> str:
        if self.offline or repository != "nobody/toy" or revision not in COMMITS:
            raise ConnectionError("no route to host")
        self.fetched.append((repository, name, revision))
        path = self.snapshot(revision) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(toy_folder(TOY) / name, path)
        return str(path)

    def rest(self, repository: str, revision: str | None, allow_patterns: list[str]) -> None:
        for path in sorted(toy_folder(TOY).iterdir()):
            if not (self.snapshot(revision) / path.name).exists():
                self.one(repository, path.name, revision)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Hub(tmp_path / "hub", monkeypatch)


@pytest.mark.parametrize("at", COMMITS)
def test_a_model_is_known_by_its_config_which_is_fetched_once(at: str | None, hub: Hub) -> None:
    spec = spec_for("nobody/toy", revision=at)
    assert hub.fetched == [("nobody/toy", "config.json", at)]
    assert (spec.hub_id, spec.name, spec.folder) == ("nobody/toy", "toy", None)
    assert spec.display_name == ("toy" if at is None else "toy@v2")
    assert (spec.architecture, spec.n_layers, spec.d_mlp) == ("llama", 2, 48)
    assert spec_for("nobody/toy", revision=at) == spec
    assert len(hub.fetched) == 1, "fetched again"
    assert unfinished(spec) == ["model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("at", COMMITS)
def test_the_rest_is_fetched_when_it_is_loaded(at: str | None, hub: Hub) -> None:
    model = ccm.load("nobody/toy", revision=at)
    assert model.source == str(hub.snapshot(at))
    assert {(repository, where) for repository, _, where in hub.fetched} == {("nobody/toy", at)}
    assert revision(model.spec) == COMMITS[at]
    hub.offline, before = True, list(hub.fetched)
    again = load(spec_for("nobody/toy", revision=at))
    assert again.source == model.source
    assert hub.fetched == before


def test_another_revision_is_another_folder(hub: Hub) -> None:
    first, second = (load(spec_for("nobody/toy", revision=at)) for at in COMMITS)
    assert folder_of(first.spec) != folder_of(second.spec)


def test_the_command_line_passes_the_revision_on(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "nobody/toy", "--revision", "v2"]) == 0
    assert capsys.readouterr().out == f"toy: {hub.snapshot('v2')}\n"
    assert {where for _, _, where in hub.fetched} == {"v2"}
    hub.offline = True
    assert main(["measure", "--model", "nobody/toy", "--revision", "v2"]) == 0
    assert main(["measure", "--model", "nobody/toy"]) == 2, "the main branch is not here"


def test_a_run_notes_the_commit_and_how_to_run_it_again(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = few_facts(tmp_path, 8)
    command = ["run", "--model", "nobody/toy", "--revision", "v2", "--facts", str(facts)]
    command += ["--controls", "1", "--matched-controls", "0", "--out", "run"]
    assert main(command) == 0
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["weights"]["revision"] == COMMITS["v2"]
    assert manifest["weights"]["converted"] is None
    assert manifest["asked"]["revision"] == "v2"
    assert main(["report", "run"]) == 0
    assert "--model nobody/toy --revision v2" in Path("run/report.md").read_text()


def test_a_folder_of_that_name_comes_first(hub: Hub) -> None:
    shutil.copytree(toy_folder(TOY), Path("nobody") / "toy")
    spec = spec_for("nobody/toy")
    assert (spec.folder, spec.hub_id) == (Path("nobody/toy"), None)
    assert hub.fetched == []


def test_without_a_network_the_message_says_what_to_do(hub: Hub) -> None:
    hub.offline = True
    with pytest.raises(NotAvailable) as caught:
        spec_for("nobody/toy", revision="v2")
    message = str(caught.value)
    assert message.startswith(
        "model 'nobody/toy': no such folder or file here, and the hub does not give config.json of a "
        "model of that name at revision v2 (ConnectionError: no route to host)."
    )
    assert "look at its name; if it is gated, ask for access and set HF_TOKEN; or give a" in message


def test_a_misspelt_path_with_one_slash_says_that_it_is_no_folder(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Refused(tmp_path, capsys)("measure", "--model", "runs/toy")
    assert line.startswith("model 'runs/toy': no such folder or file here, and the hub does not give")
    for name in ("a/b/c", "/nowhere", "./nowhere/x", "owner/na me"):
        with pytest.raises(BadInput, match="unknown, and no such folder or file"):
            spec_for(name)
    assert hub.fetched == []


@pytest.mark.parametrize("model", ["organism", "folder", "smollm2-135m"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(
    model: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(toy_folder(TOY)) if model == "folder" else model
    line = Refused(tmp_path, capsys)("measure", "--model", name, "--revision", "v2")
    assert line == f"--revision v2: {name} is not on the hub. Leave it out."


def test_a_named_model_of_the_hub_has_revisions_unless_a_folder_is_given() -> None:
    spec = spec_for("gpt2-small", revision="v2")
    assert (spec.revision, spec.hub_id) == ("v2", MODELS["gpt2-small"].hub_id)
    with pytest.raises(BadInput, match=r"^--revision v2: gpt2-small is not on the hub\. Leave it out"):
        spec_for("gpt2-small", {"gpt2-small": toy_folder(TOY)}, "v2")
