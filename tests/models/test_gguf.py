"""GGUF files: read as the library beside them reads them, converted once, and refused in one line."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import ccm.models.gguf
from ccm.cli.parser import main
from ccm.errors import BadInput, NotAvailable
from ccm.models.cache import made_once, models_cache
from ccm.models.gguf import checkpoint_of
from ccm.models.load import load
from ccm.models.specs import MODELS, spec_for
from tests.cli.test_bad_input import Refused, contents
from tests.gguf_files import GPT2_NAMES, GROUPED_NAMES, LLAMA, TOYS, GgufToy, halves, write_gguf
from tests.made_runs import few_facts
from tests.no_room import no_file_above
from tests.toys import TEXT, ToyConfig, build_tokenizer, token_prompts, toy_folder, word_prompts

each_toy = pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.id)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return models_cache()


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are converted, as they are."""
    seen: list[Path] = []

    def counted(path: Path, *given: Any, convert: Any = ccm.models.gguf.convert) -> None:
        seen.append(path)
        convert(path, *given)

    monkeypatch.setattr(ccm.models.gguf, "convert", counted)
    return seen


def numbers(toy: GgufToy, path: Path) -> dict[str, np.ndarray]:
    """A file's tensors by gguf's own reading, under transformers' names and in its layout."""
    config, found = toy.config, {}
    names = GPT2_NAMES if config.family == "gpt2" else GROUPED_NAMES
    own = {ours: theirs for theirs, ours in names.items()}
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    for tensor in GGUFReader(path).tensors:
        *where, kind, last = tensor.name.split(".")
        value = dequantize(tensor.data, tensor.tensor_type)
        if kind in heads:
            value = halves(value, heads[kind])
        if config.family == "gpt2" and where and value.ndim == 2:
            value = value.T
        layer = [own["blk"], where[1]] if where else []
        found[".".join([*layer, own[kind], last])] = value
    return found


# --- what is read -----------------------------------------------------------------------------------


@each_toy
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_tensors_are_gguf_s_own(toy: GgufToy, kind: str, tmp_path: Path) -> None:
    path = write_gguf(toy, tmp_path / "toy.gguf", kind)
    made = load_file(checkpoint_of(path) / "model.safetensors")
    wanted = numbers(toy, path)
    assert set(made) == set(wanted)
    for name, tensor in wanted.items():
        assert made[name].dtype == np.float32
        np.testing.assert_array_equal(made[name], tensor, err_msg=name)


@each_toy
def test_numbers_that_are_not_quantized_give_the_models_own_logits(
    toy: GgufToy, tmp_path: Path
) -> None:
    model = load(spec_for(str(write_gguf(toy, tmp_path / "toy.gguf"))))
    own = AutoModelForCausalLM.from_pretrained(toy_folder(toy.config))
    for tokens in token_prompts(8, toy.config):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            difference = model.bridge.original_model(ids).logits - own(ids).logits
        assert difference.abs().max() < 1e-4


@each_toy
def test_texts_are_encoded_as_by_the_models_own_tokenizer(toy: GgufToy, tmp_path: Path) -> None:
    model = load(spec_for(str(write_gguf(toy, tmp_path / "toy.gguf"))))
    own = build_tokenizer(toy.words)
    for text in (*word_prompts(20), TEXT, "Łódź 1944\n\nthe", "It's 3.14, isn't it?"):
        ids = own.encode(text, add_special_tokens=False).ids
        assert model.encode(text) == [own.token_to_id(own.id_to_token(model.bos or 0)), *ids]
        assert model.decode(ids) == own.decode(ids)
    assert (model.bos, model.eos) == ((1, {2}) if toy.words == "mistral" else (0, {0}))


def test_the_base_of_rotary_embeddings_is_the_files(tmp_path: Path) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf", fields={"llama.rope.freq_base": 500000.0})
    folder = tmp_path / "toy"
    shutil.copytree(toy_folder(LLAMA.config), folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500000.0
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.tensor(token_prompts(1, LLAMA.config, min_len=20))
    with torch.no_grad():
        own, before = (
            AutoModelForCausalLM.from_pretrained(f)(ids).logits
            for f in (folder, toy_folder(LLAMA.config))
        )
        found = AutoModelForCausalLM.from_pretrained(checkpoint_of(path))(ids).logits
    assert (own - before).abs().max() > 1e-2
    assert (found - own).abs().max() < 1e-4


def test_what_was_converted_is_in_the_folder_and_not_where_it_lay(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf", "Q8_0")
    (tmp_path / "config.json").write_text("{")  # not the file's
    folder = checkpoint_of(path)
    made = json.loads((folder / "converted.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert folder == cache / f"gguf-{digest[:16]}"
    assert made["gguf_sha256"] == digest
    assert (made["from"], made["architecture"], made["dtype"]) == ("toy.gguf", "llama", "float32")
    assert (made["types"]["attn_q"], made["types"]["attn_norm"]) == ("Q8_0", "F32")
    assert made["tokenizer"] == "gpt-2"
    for file in folder.glob("*.json"):
        assert str(tmp_path) not in file.read_text(), f"{file.name}: a path of this machine"


# --- through the command line -----------------------------------------------------------------------


def test_a_file_is_measured_like_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf", "Q8_0")
    assert main(["measure", "--model", str(path)]) == 0
    by_file = capsys.readouterr()
    (line,) = by_file.err.splitlines()
    assert line == "ccm: toy.gguf: dequantizing F32, Q8_0 to float32, once, into the model cache"
    assert main(["measure", "--model", str(checkpoint_of(path))]) == 0
    by_folder = capsys.readouterr()
    assert by_file.out.replace("toy", "") == by_folder.out.replace(checkpoint_of(path).name, "")


def test_the_manifest_of_a_run_names_the_file_and_its_types(
    tmp_path: Path, conversions: list[Path]
) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf", "Q4_1")
    (tmp_path / "facts").mkdir()
    facts = few_facts(tmp_path / "facts", 8)
    command = ["run", "--model", str(path), "--facts", str(facts), "--controls", "1"]
    command += ["--matched-controls", "0", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert main(command) == 0, "a finished run is shown again"
    assert conversions == [path]
    weights = json.loads((tmp_path / "run" / "manifest.json").read_text())["weights"]
    assert weights["converted"]["gguf_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights["converted"]["types"]["ffn_down"] == "Q4_1"
    assert weights["source"] == str(checkpoint_of(path))


def test_a_folder_that_was_not_converted_says_so(tmp_path: Path) -> None:
    assert ccm.models.gguf.conversion(toy_folder(LLAMA.config)) is None


# --- once -------------------------------------------------------------------------------------------


def test_a_file_is_converted_once_wherever_it_lies(tmp_path: Path, conversions: list[Path]) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf")
    elsewhere = Path(shutil.copy(path, tmp_path / "other.gguf"))
    assert spec_for(str(path)).folder == spec_for(str(elsewhere)).folder
    assert conversions == [path]
    other = write_gguf(LLAMA, tmp_path / "toy.gguf", "Q8_0")
    assert spec_for(str(other)).folder != spec_for(str(elsewhere)).folder
    assert conversions == [path, other], "another file of the same name is another model"


def test_what_is_damaged_is_made_again(tmp_path: Path, conversions: list[Path]) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf")
    weights = checkpoint_of(path) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    checkpoint_of(path, anew=True)
    assert weights.read_bytes() == whole
    assert len(conversions) == 2


def test_one_process_makes_a_folder_and_the_others_wait(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun, go_on, made = threading.Event(), threading.Event(), list[str]()

    def slow(folder: Path) -> None:
        begun.set()
        assert go_on.wait(30)
        (folder / "whole").touch()
        made.append("first")

    def second(folder: Path) -> None:
        made.append("second")

    one = threading.Thread(target=made_once, args=("x", slow), kwargs={"needed": 0})
    two = threading.Thread(target=made_once, args=("x", second), kwargs={"needed": 0})
    one.start()
    assert begun.wait(30)
    assert not (cache / "x").exists(), "a partial folder in the place of a whole one"
    two.start()
    two.join(0.5)
    assert two.is_alive(), "did not wait"
    assert caplog.messages == [f"another process is making {cache / 'x'}; waiting for it"]
    go_on.set()
    one.join(30)
    two.join(30)
    assert made == ["first"]
    assert [p.name for p in (cache / "x").iterdir()] == ["whole"]


HANGING = """
import sys, time
from pathlib import Path
from ccm.models.cache import made_once

def make(folder):
    (folder / "half").touch()
    print("begun", flush=True)
    time.sleep(60)

made_once("x", make, needed=0)
"""


@pytest.fixture
def killed(cache: Path) -> Iterator[Callable[[], None]]:
    """Start a process that makes the folder `x`, and kill it in the middle."""
    started: list[subprocess.Popen[str]] = []

    def kill() -> None:
        process = subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()

    yield kill
    for process in started:
        process.kill()
        process.wait(30)


def test_what_a_killed_process_left_is_removed_and_never_taken(
    killed: Callable[[], None], cache: Path
) -> None:
    killed()
    (left,) = cache.glob(".x.*.partial")
    assert (left / "half").exists()
    assert not (cache / "x").exists()
    made_once("x", lambda folder: (folder / "whole").touch(), needed=0)
    assert [p.name for p in (cache / "x").iterdir()] == ["whole"]
    assert not left.exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_a_conversion_that_stops_in_the_middle_leaves_nothing(
    stop: type[BaseException], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf")

    def stopped(path: Path, header: Any, digest: str, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise stop

    with monkeypatch.context() as patched:
        patched.setattr(ccm.models.gguf, "convert", stopped)
        with pytest.raises(stop):
            checkpoint_of(path)
    assert [p for p in cache.iterdir() if p.is_dir()] == []
    assert (checkpoint_of(path) / "model.safetensors").is_file()


# --- bad input --------------------------------------------------------------------------------------


@pytest.fixture
def refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """Measures and runs a file that must be refused, and gives its one line."""
    monkeypatch.delenv("CCM_DATA_DIR", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    one_line = Refused(work, capsys)

    def line(path: Path) -> str:
        said = one_line("measure", "--model", path)
        assert said == one_line("run", "--model", path, "--out", "new", "--controls", "1")
        return said

    yield line
    left = contents(cache) if cache.exists() else {}
    assert [name for name in left if not name.endswith(".lock")] == []


def cut(path: Path, keep: float) -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    return path


@pytest.mark.parametrize("keep", [0.001, 0.05, 0.5, 0.9999])
def test_a_file_that_is_cut_off(keep: float, refused: Callable[..., str], tmp_path: Path) -> None:
    path = cut(write_gguf(LLAMA, tmp_path / "toy.gguf"), keep)
    line = refused(path)
    assert line.startswith(f"{path}: cut off or damaged (")
    assert line.endswith("Download it again.")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02}q\x00.", r"no GGUF file (it begins with b'\x80\x02}q', not b'GGUF'). Download it"),
        (b"", "no GGUF file (it begins with b'', not b'GGUF'). It is empty: download it again."),
        (POINTER, "It is a pointer of git-lfs, not the file itself: run `git lfs pull`"),
    ],
    ids=["something else", "empty", "pointer"],
)
def test_a_file_that_is_none(
    content: bytes, said: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "toy.gguf"
    path.write_bytes(content)
    assert refused(path).startswith(f"{path}: no GGUF file (")
    assert said in refused(path)


def test_a_file_of_another_architecture(refused: Callable[..., str], tmp_path: Path) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf", fields={"general.architecture": "whisper"})
    line = refused(path)
    assert f"{path}: architecture 'whisper', which transformers does not read from GGUF" in line
    assert "Allowed: bloom, " in line
    assert "llama, " in line
    assert "save_pretrained" in line


LACKING: dict[str, tuple[GgufToy, dict[str, Any], str]] = {
    "more tokens than rows": (
        LLAMA,
        {"fields": {"tokenizer.ggml.tokens": [f"t{i}" for i in range(321)]}},
        "its tokenizer has 321 tokens, but the model 320. Give the file as it was published.",
    ),
    "no tokenizer": (LLAMA, {"fields": {"tokenizer.ggml.tokens": None}}, "no tokenizer in it."),
    "a tokenizer that nobody reads": (
        LLAMA,
        {"fields": {"tokenizer.ggml.model": "rwkv"}},
        "Cannot build a tokenizer from a GGUF file stating tokenizer 'rwkv'",
    ),
    "factors of rotary embeddings": (
        LLAMA,
        {"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}},
        "scaled rotary embeddings (rope_freqs.weight)",
    ),
    "scaled rotary embeddings": (
        LLAMA,
        {"fields": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}},
        "scaled rotary embeddings (yarn), which transformers leaves out",
    ),
    "a tensor without a place": (
        LLAMA,
        {"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}},
        "but it holds 28,864, so this would be another model. Give the original checkpoint folder.",
    ),
    "a d_mlp that transformers does not read": (
        GgufToy(ToyConfig("gpt2", d_mlp=64), "gpt2"),
        {},
        "so this would be another model",
    ),
    "a context that transformers does not read": (
        GgufToy(ToyConfig("gpt2", d_mlp=128, n_ctx=512), "gpt2"),
        {},
        "so this would be another model",
    ),
}


@pytest.mark.parametrize("what", LACKING)
def test_a_file_that_transformers_would_read_otherwise(
    what: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    toy, changed, said = LACKING[what]
    path = write_gguf(toy, tmp_path / "toy.gguf", **changed)
    line = refused(path)
    assert line.startswith(f"{path}: ")
    assert said in line


def test_rotary_embeddings_that_are_said_not_to_be_scaled_are_read(tmp_path: Path) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf", fields={"llama.rope.scaling.type": "none"})
    assert checkpoint_of(path).is_dir()


@pytest.mark.parametrize("there", [(1, 2, 3), (1, 3), (2,)])
def test_a_part_of_a_file(there: tuple[int, ...], refused: Callable[..., str], tmp_path: Path) -> None:
    names = [f"toy-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for i in there:
        write_gguf(LLAMA, tmp_path / names[i - 1])
    path = tmp_path / names[there[0] - 1]
    line = refused(path)
    assert line.startswith(f"{path}: one of 3 parts of a split GGUF")
    assert "`llama-gguf-split --merge`" in line
    for i in (1, 2, 3):
        assert (f"{names[i - 1]!r}" in line) == (i not in there)
    assert ("not there" in line) == (len(there) < 3)


def test_a_cache_that_cannot_be_written(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    line = refused(path)
    assert line.startswith(f"{tmp_path}/file/cache/ccm/models: cannot be written to (Not a directory)")
    assert "set XDG_CACHE_HOME to a folder with room." in line


def test_a_disk_that_is_full(
    refused: Callable[..., str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf")
    full = shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    line = refused(path)
    assert line.startswith(f"{cache}: 0.0 GB are free, and 0.0 GB are needed there. Free some, or set")


def test_a_disk_that_fills_up_in_the_middle(
    refused: Callable[..., str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf")

    def fills_up(path: Path, header: Any, digest: str, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ccm.models.gguf, "convert", fills_up)
    assert refused(path).startswith(
        f"{cache}: is full (No space left on device), and 0.0 GB are needed"
    )


def test_a_disk_that_has_no_room_for_the_weights(cache: Path, tmp_path: Path) -> None:
    """safetensors has an error of its own for that."""
    path = write_gguf(LLAMA, tmp_path / "toy.gguf")
    with no_file_above(20_000), pytest.raises(NotAvailable) as caught:
        ccm.load(path)
    assert str(caught.value).startswith(f"{cache}: cannot be written to (File too large), and 0.0 GB")
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []


def test_a_folder_with_a_file_in_it_says_to_give_the_file(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_folder(LLAMA.config), tmp_path / "toy"))
    (folder / "model.safetensors").unlink()
    path = write_gguf(LLAMA, folder / "toy.gguf")
    with pytest.raises(BadInput, match=f"only toy.gguf. Give the file itself: --model {path}"):
        spec_for(str(folder))


def test_a_named_model_may_be_given_as_a_file(tmp_path: Path) -> None:
    path = write_gguf(LLAMA, tmp_path / "toy.gguf")
    assert spec_for("mine", {"mine": path}).name == "mine"
    given = spec_for("gpt2-small", {"gpt2-small": path})
    assert (given.name, given.folder) == ("gpt2-small", checkpoint_of(path))
    assert "gpt2-small" in MODELS
