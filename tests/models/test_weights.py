"""Weights: where they are looked for, and what is refused before anything is loaded."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from ccm.errors import BadInput
from ccm.models.checkpoint_folder import INDEX, hash_of, hashes
from ccm.models.specs import CHECKPOINT, MODELS, MODELS_VARIABLE, spec_for
from ccm.models.weights import OTHER_DIMENSIONS_VARIABLE, check_weights, revision, weight_files
from tests.toys import FAMILIES, ToyConfig, toy_folder

TOY = ToyConfig("gpt2", tied=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A toy's own copy."""
    return Path(shutil.copytree(toy_folder(TOY), tmp_path / "toy"))


def test_the_hash_changes_with_one_byte_and_not_with_the_folder(tmp_path: Path) -> None:
    spec = spec_for(str(toy_folder(FAMILIES[0])))
    files = weight_files(spec)
    assert [file.name for file in files] == ["model.safetensors"]
    copy = tmp_path / files[0].name
    content = bytearray(files[0].read_bytes())
    copy.write_bytes(content)
    assert hash_of([copy]) == hash_of(files)
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    assert hash_of([copy]) != hash_of(files)
    second = tmp_path / "model-2.safetensors"
    second.write_bytes(b"more")
    assert hash_of([copy, second]) == hash_of([second, copy]) != hash_of([copy])


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


def split(folder: Path) -> list[Path]:
    """Replace a toy's weights by two shards and their index, as transformers writes them."""
    from safetensors.torch import load_file, save_file

    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        name = f"model-{i:05d}-of-00002.safetensors"
        save_file(dict(part), folder / name, metadata={"format": "pt"})
        weight_map |= {key: name for key, _ in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sorted(folder.glob("model-*.safetensors"))


def test_a_shard_that_the_index_names_must_be_there(folder: Path) -> None:
    split(folder)[1].unlink()
    with pytest.raises(BadInput, match=r"model-00002-of-00002.safetensors: missing, though the index"):
        check_weights(spec_for(str(folder)))


def test_only_files_that_the_index_names_are_weights(folder: Path) -> None:
    shards = split(folder)
    (folder / "other.safetensors").write_bytes(b"not read")
    spec = spec_for(str(folder))
    assert weight_files(spec) == shards
    assert check_weights(spec) is spec


@pytest.mark.parametrize("stale", [False, True], ids=["whole index", "stale index"])
def test_what_is_loaded_is_what_is_checked_and_hashed(folder: Path, stale: bool) -> None:
    """Of a single file with shards and their index beside it, transformers loads the single file."""
    import torch

    from ccm.models.load import load

    def numbers() -> torch.Tensor:
        bridge = load(spec_for(str(folder))).bridge
        return torch.cat([p.flatten() for p in bridge.original_model.parameters()])

    single = (folder / "model.safetensors").read_bytes()
    original, held = numbers(), hashes(folder)
    shards = split(folder)
    for shard in shards:  # other numbers there
        content = bytearray(shard.read_bytes())
        content[-4:] = b"\0\0\0\0"
        shard.write_bytes(content)
    if stale:
        shards[1].unlink()
    else:
        assert not torch.equal(numbers(), original)
        assert hashes(folder) != held
    (folder / "model.safetensors").write_bytes(single)
    spec = spec_for(str(folder))
    assert weight_files(spec) == [folder / "model.safetensors"]
    assert check_weights(spec) is spec
    assert hashes(folder) == held
    assert torch.equal(numbers(), original)


def test_everything_that_is_read_is_hashed(folder: Path) -> None:
    before, read = hashes(folder), set[str]()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        changed = {key for key, value in hashes(folder).items() if value != before[key]}
        assert len(changed) == 1, path.name
        read |= changed
        path.write_bytes(content)
    assert read == set(before)
    for name in ("merges.txt", "added_tokens.json"):
        assert not (folder / name).exists()
        (folder / name).write_text("{}")
        assert hashes(folder) != before, name
        (folder / name).unlink()
    (folder / "README.md").write_text("not read")
    assert hashes(folder) == before
    (folder / "generation_config.json").unlink()
    assert hashes(folder) == {**before, "generation_config_sha256": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "index.json: not JSON"),
        ("[]", "index.json: not JSON .a list, not an object"),
        ("{}", "not an index of weights"),
        ('{"weight_map": 3}', "not an index of weights"),
    ],
)
def test_an_index_that_is_none_is_refused(folder: Path, text: str, message: str) -> None:
    split(folder)
    (folder / INDEX).write_text(text)
    with pytest.raises(BadInput, match=message):
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

    def cached(repository: str, name: str, revision: str | None) -> str | None:
        assert (repository, revision) == ("openai-community/gpt2", None)
        return str(snapshot / name) if (snapshot / name).is_file() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    spec = MODELS["gpt2-small"]
    assert weight_files(spec) == [snapshot / "model.safetensors"]
    assert revision(spec) == "0123abc"
    assert revision(spec_for(str(snapshot))) is None, "a folder has no revision"
