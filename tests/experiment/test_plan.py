"""Which facts a model is asked about, where none are named or some are."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ccm.errors import BadInput
from ccm.experiment import fact_files, plan
from ccm.experiment.fact_files import RELEASED, pararel_at_hand, read_fact_folder
from ccm.experiment.plan import find_facts
from ccm.method.facts import FactSet
from ccm.models.specs import CHECKPOINT, MODELS
from tests.toys import ToyConfig, toy_folder

NO_FACTS = replace(MODELS["smollm2-135m"], folder=toy_folder(ToyConfig("llama", tied=True)))


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CCM_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pararel(monkeypatch: pytest.MonkeyPatch) -> FactSet:
    """What stands for ParaRel, wherever it would come from."""
    facts = read_fact_folder(CHECKPOINT, "pararel")
    monkeypatch.setattr(plan, "load_pararel", lambda: facts)
    monkeypatch.setitem(plan.FACTS, "pararel", lambda: facts)  # type: ignore[arg-type]
    return facts


def test_the_facts_of_the_world_are_said_to_be_taken_where_no_others_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert find_facts(None, NO_FACTS).name == "world"
    assert caplog.messages == [
        "smollm2-135m: asked about the facts of the world that come with ccm (--facts world), because "
        "ParaRel is not at hand (--facts pararel downloads it)"
    ]


def test_the_facts_of_the_world_are_taken_without_a_word_where_they_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = find_facts("world", NO_FACTS)
    assert (world.name, len(world.relations) >= 12, len(world.facts) >= 400) == ("world", True, True)
    assert find_facts("world", MODELS["organism"]) == world, "though it has its own"
    assert caplog.messages == []


def test_pararel_comes_first_where_it_is_at_hand(
    pararel: FactSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_facts(None, NO_FACTS).name == "world"
    monkeypatch.setattr(plan, "pararel_at_hand", lambda: True)
    caplog.clear()
    assert find_facts(None, NO_FACTS) is pararel
    assert find_facts("pararel", NO_FACTS) is pararel
    assert caplog.messages == []


def test_a_published_model_is_asked_about_pararel(pararel: FactSet) -> None:
    assert find_facts(None, MODELS["gpt2-small"]) is pararel


def test_a_model_with_facts_of_its_own_is_asked_about_these(pararel: FactSet) -> None:
    assert find_facts(None, MODELS["organism"]).name == "organism"
    assert find_facts("pararel", MODELS["organism"]) is pararel


def test_a_folder_is_named_by_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("facts.csv", "relations.csv"):
        shutil.copy(CHECKPOINT / name, folder)
    assert find_facts(str(folder), NO_FACTS).name == "mine"
    with pytest.raises(BadInput, match=r"^facts 'nowhere': no such folder\. Allowed: pararel, world"):
        find_facts("nowhere", NO_FACTS)


def test_pararel_is_at_hand_in_a_folder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not pararel_at_hand()
    monkeypatch.setenv("CCM_DATA_DIR", str(tmp_path))
    with pytest.raises(BadInput, match=f"^CCM_DATA_DIR={tmp_path}: no pararel_statements.csv"):
        find_facts(None, NO_FACTS)
    for file in RELEASED:
        (tmp_path / file.name).touch()
    assert pararel_at_hand()


def test_pararel_is_at_hand_once_every_file_was_downloaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    known = tuple(replace(f, sha256=hashlib.sha256(f.name.encode()).hexdigest()) for f in RELEASED)
    monkeypatch.setattr(fact_files, "RELEASED", known)
    cache = tmp_path / "cache" / "ccm"
    cache.mkdir(parents=True)
    for file in known:
        assert not pararel_at_hand(), f"without {file.name}"
        (cache / file.name).write_text(file.name)
    assert pararel_at_hand()
    (cache / known[0].name).write_text("half")
    assert not pararel_at_hand()
