"""Weights: where they are looked for, and what is refused before anything is loaded."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from ccm.errors import BadInput
from ccm.models import MODELS, MODELS_VARIABLE, spec_for
from ccm.organism import CHECKPOINT
from ccm.weights import (
    INDEX,
    OTHER_DIMENSIONS_VARIABLE,
    check_weights,
    revision,
    weight_files,
    weight_hash,
)
from tests.toys import FAMILIES, ToyConfig, toy_folder

TOY = ToyConfig("gpt2", tied=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A toy's own copy."""
    return Path(shutil.copytree(toy_folder(TOY), tmp_path / "toy"))


def test_weight_hash_changes_with_one_byte_and_not_with_the_folder(tmp_path: Path) -> None:
    spec = spec_for(str(toy_folder(FAMILIES[0])))
    files = weight_files(spec)
    assert [file.name for file in files] == ["model.safetensors"]
    copy = tmp_path / files[0].name
    content = bytearray(files[0].read_bytes())
    copy.write_bytes(content)
    assert weight_hash([copy]) == weight_hash(files)
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    assert weight_hash([copy]) != weight_hash(files)
    second = tmp_path / "model-2.safetensors"
    second.write_bytes(b"more")
    assert weight_hash([copy, second]) == weight_hash([second, copy]) != weight_hash([copy])


@pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
def test_whole_weights_pass(config: ToyConfig) -> None:
    spec = spec_for(str(toy_folder(config)))
    assert check_weights(spec) is spec


def test_the_organism_is_what_the_table_says() -> None:
    assert check_weights(MODELS["organism"]) is MODELS["organism"]


def test_a_model_without_weights_here_has_nothing_to_check() -> None:
    spec = replace(MODELS["gpt2-small"], hub_id="nobody/nothing")
    assert weight_files(spec) == []
    assert check_weights(spec) is spec
    assert revision(spec) is None


@pytest.mark.parametrize("kept", [-1, 1, 200], ids=["one byte short", "one byte", "within the header"])
def test_weights_that_are_cut_off_are_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    message = (
        f"cut off or damaged, {len(whole) - 1} of {len(whole)} bytes" if kept < 0 else "no safetens"
    )
    with pytest.raises(BadInput, match=message) as caught:
        check_weights(spec_for(str(folder)))
    assert str(caught.value).startswith(str(path))
    assert "Download it again" in str(caught.value)


def test_weights_with_something_behind_them_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(BadInput, match="cut off or damaged"):
        check_weights(spec_for(str(folder)))


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"data_offsets": 3}}', b"\xff\xfe"]
)
def test_a_header_that_is_none_is_refused(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BadInput, match="no safetensors file, or its header is cut off"):
        check_weights(spec_for(str(folder)))


def write_index(folder: Path, *names: str) -> None:
    weight_map = {f"weight_{i}": name for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_file_that_the_index_names_must_be_there(folder: Path) -> None:
    write_index(folder, "model.safetensors", "model-2.safetensors")
    with pytest.raises(BadInput, match=r"model-2.safetensors: missing, though the index names it"):
        check_weights(spec_for(str(folder)))


def test_only_files_that_the_index_names_are_weights(folder: Path) -> None:
    write_index(folder, "model.safetensors")
    (folder / "other.safetensors").write_bytes(b"not read")
    spec = spec_for(str(folder))
    assert weight_files(spec) == [folder / "model.safetensors"]
    assert check_weights(spec) is spec


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(BadInput, match="not an index of weights"):
        check_weights(spec_for(str(folder)))


def test_another_models_weights_are_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"gpt2-small": folder, "Phi-1_5": folder}
    with pytest.raises(BadInput, match=r"architecture for gpt2-small, n_layers is 2 there and should"):
        check_weights(spec_for("gpt2-small", paths))
    with pytest.raises(BadInput, match=r"for Phi-1_5, architecture is gpt2 there and should be phi"):
        check_weights(spec_for("Phi-1_5", paths))
    monkeypatch.setenv(OTHER_DIMENSIONS_VARIABLE, "1")
    found = check_weights(spec_for("gpt2-small", paths))
    assert (found.name, found.d_model, found.d_mlp) == ("gpt2-small", TOY.d_model, TOY.d_mlp)
    assert (found.template, found.published_neurons) == ("instruction", ())
    assert found.n_entropy_neurons == min(6, TOY.d_mlp // 8)
    assert found.folder == folder


def test_a_collection_of_models_is_looked_through(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rename(tmp_path / "gpt2-small")
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))
    assert spec_for("gpt2-small").folder == tmp_path / "gpt2-small"
    other = toy_folder(TOY)
    assert spec_for("gpt2-small", {"gpt2-small": other}).folder == other, "--model-path comes first"
    assert spec_for("Phi-1_5").folder is None
    assert spec_for("organism").folder == CHECKPOINT
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match=rf"^{MODELS_VARIABLE}=.*nowhere: no such folder"):
        spec_for("gpt2-small")


def test_the_revision_is_read_off_the_hubs_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)

    def cached(repository: str, name: str) -> str | None:
        assert repository == "openai-community/gpt2"
        return str(snapshot / name) if (snapshot / name).is_file() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    spec = MODELS["gpt2-small"]
    assert weight_files(spec) == [snapshot / "model.safetensors"]
    assert revision(spec) == "0123abc"
    assert revision(spec_for(str(snapshot))) is None, "a folder has no revision"
