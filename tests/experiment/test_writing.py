"""Files are written whole or not at all; what the system refuses is one line, early if it can be."""

import errno
import inspect
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from PIL import Image

import ccm.models.load
from ccm.cli.parser import main
from ccm.errors import BadInput, CannotWrite
from ccm.experiment.files import write_json, write_statistics, write_table
from ccm.experiment.folder import RunFolder
from ccm.experiment.results import read_results
from ccm.experiment.writing import _settle, remove_partial, try_writing, write_atomically
from ccm.reporting.figures.canvas import Drawing, _write_pdf, save
from ccm.reporting.tables import write_tables
from tests.made_runs import make_run
from tests.no_room import no_file_above

resource = pytest.importorskip("resource", reason="no limits on files on this system")
IDENTITY = {"model": "toy", "ablation_values": []}
MANY = np.random.default_rng(0).random(50_000)


def curve() -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure()
    figure.subplots().plot(MANY[:5000])
    return figure


def npz(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, values=MANY)


WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": partial(safetensors.numpy.save_file, {"values": MANY}),
    "parquet": pd.DataFrame({"values": MANY}).to_parquet,
    "csv": pd.DataFrame({"values": MANY}).to_csv,
    "text": lambda path: path.write_text("x" * 100_000, encoding="utf-8"),
    "bytes": lambda path: path.write_bytes(bytes(100_000)),
    "npz": npz,
    "pdf": lambda path: _write_pdf(curve(), path),
    "png": lambda path: curve().savefig(path, format="png"),
    "pillow": lambda path: Image.fromarray(np.uint8(255 * MANY[:40_000].reshape(200, 200))).save(
        path, "png"
    ),
    "copy": partial(shutil.copyfile, sys.executable),
}


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- what the system refuses --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "over an old one"])
def test_a_file_for_which_there_is_no_room_is_named_and_nothing_is_left(
    kind: str, old: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / f"result.{kind}"
    if old is not None:
        path.write_bytes(old)
    with no_file_above(4096), pytest.raises(CannotWrite) as caught:
        write_atomically(path, WRITERS[kind])
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be written (File too large")
    assert message.endswith("give the same command again: a run goes on where it stopped.")
    assert "\n" not in message
    assert names(tmp_path) == ([] if old is None else [path.name])
    assert old is None or path.read_bytes() == old
    write_atomically(path, WRITERS[kind])
    assert path.stat().st_size > 4096


def test_every_file_of_a_run_and_of_what_is_made_of_it(tmp_path: Path) -> None:
    run = read_results(make_run(tmp_path / "run", prompts=6).path)
    out = tmp_path / "out"
    drawing = Drawing(curve(), {"values": MANY.tolist()})
    table = pd.DataFrame({"values": MANY})
    writes: list[Callable[[], object]] = [
        lambda: write_json(out / "a.json", MANY),
        lambda: write_table(out / "a.parquet", table),
        lambda: write_statistics(out / "a.safetensors", run.statistics, 1),
        lambda: save(drawing, out / "a"),
        lambda: write_tables([run], out),
    ]
    for write in writes:
        with no_file_above(64), pytest.raises(CannotWrite, match=r"/out/.*\(File too large"):
            write()
        assert [path for path in out.rglob("*") if path.is_file()] == []


def test_the_error_of_a_library_that_hides_the_systems_is_read(tmp_path: Path) -> None:
    def rust(path: Path) -> None:
        raise RuntimeError("Error while serializing: No space left on device (os error 28)")

    def wrapped(path: Path) -> None:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        except OSError as error:
            raise ValueError("could not save") from error

    def wordless(path: Path) -> None:
        raise OSError("encoder error -2 when writing image file")

    expected = {
        rust: "No space left on device",
        wrapped: "Disk quota exceeded",
        wordless: "encoder err",
    }
    for write, reason in expected.items():
        with pytest.raises(CannotWrite, match=rf"a\.bin: cannot be written \({reason}"):
            write_atomically(tmp_path / "a.bin", write)
    with pytest.raises(CannotWrite, match=r"\(No such file or directory: .*missing/font\)"):
        write_atomically(tmp_path / "a.bin", lambda _: (tmp_path / "missing" / "font").read_bytes())
    assert names(tmp_path) == []


def test_the_error_comes_back_from_another_process() -> None:
    """Figures are drawn in several."""
    error = pickle.loads(pickle.dumps(CannotWrite(Path("a.pdf"), "No space left on device")))
    assert str(error).startswith("a.pdf: cannot be written (No space left on device). ")
    assert error.reason == "No space left on device"


def test_a_folder_that_cannot_be_made_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"a\.txt: cannot be written \(Not a directory"):
        write_atomically(tmp_path / "file" / "below" / "a.txt", lambda p: p.write_text("x"))


# --- on the disk before it has its name ---------------------------------------------------------------


def refusing(call: str, code: int, when: Callable[..., bool] = lambda *_, **__: True) -> Any:
    """What replaces a function of `os` that refuses."""
    original = getattr(os, call)

    def refused(*given: Any, **options: Any) -> Any:
        if when(*given, **options):
            raise OSError(code, os.strerror(code))
        return original(*given, **options)

    return refused


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for call in ("fsync", "replace"):
        original = getattr(os, call)

        def told(*given: Any, call: str = call, original: Any = original) -> None:
            if call == "fsync":
                size = os.fstat(given[0]).st_size
                assert size == 5, "not what was written"
            calls.append(call)
            original(*given)

        monkeypatch.setattr(os, call, told)
    write_atomically(tmp_path / "a.txt", lambda p: p.write_text("hello"))
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM])
@pytest.mark.parametrize("call", ["fsync", "chmod"])
def test_what_a_file_system_does_not_have_is_done_without(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, call, refusing(call, code))
    write_atomically(tmp_path / "a.txt", lambda p: p.write_text("hello"))
    try_writing(tmp_path)
    RunFolder(tmp_path / "run", IDENTITY).note(more=1)
    assert (tmp_path / "a.txt").read_text() == "hello"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_bytes_that_were_lost_on_the_way_to_the_disk_are_an_error(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refusing("fsync", code))
    with pytest.raises(CannotWrite):
        write_atomically(tmp_path / "a.txt", lambda p: p.write_text("hello"))
    assert names(tmp_path) == []


def test_a_signal_between_any_two_instructions_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    # Without what checks the arguments' types in tests.
    code = {inspect.unwrap(function).__code__ for function in (write_atomically, _settle)}

    def interrupted_at(place: int) -> bool:
        """Write, with the signal before the `place`-th instruction; whether there was such a one."""
        count = iter(range(1, 1000))

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            if frame.f_code not in code:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and next(count) == place:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            write_atomically(path, lambda p: p.write_text("after"))
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    places = 0
    path.write_text("before")
    while interrupted_at(places + 1):
        places += 1
        assert names(tmp_path) == ["a.txt"]
        assert path.read_text() in ("before", "after")
        path.write_text("before")
    assert places > 60
    assert path.read_text() == "after"


def test_a_measurement_is_kept_where_chmod_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "chmod", refusing("chmod", errno.EPERM))
    assert main(["measure", "--model", "organism", "--out", str(tmp_path / "m.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "m.csv")) > 0


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".csv", "ł" * 125 + ".csv"):
        write_atomically(tmp_path / name, lambda p: p.write_text("hello"))
        assert (tmp_path / name).read_text() == "hello"


# --- found out before the work ------------------------------------------------------------------------


def over_another(source: Any, target: Any) -> bool:
    return os.path.exists(target)


# What a file system may refuse of what comes at the end, and how that is made.
REFUSALS: dict[str, tuple[str, int, Callable[..., bool]]] = {
    "a new file": ("open", errno.EACCES, lambda path, *_: ".partial" in str(path)),
    "room": ("fsync", errno.ENOSPC, lambda *_: True),
    "a rename": ("replace", errno.EPERM, lambda *_: True),
    "a rename over another": ("replace", errno.EEXIST, over_another),
    "removing": ("unlink", errno.EPERM, lambda *_, **__: True),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_will_be_refused_is_found_out_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    call, code, when = REFUSALS[name]
    monkeypatch.setattr(ccm.models.load, "load", never)
    make_run(tmp_path / "made", prompts=6)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refusing(call, code, when))
        with pytest.raises(CannotWrite) as caught:
            try_writing(tmp_path / "trial")
        assert caught.value.reason.startswith(os.strerror(code))
        out = tmp_path / "out.csv"
        assert main(["measure", "--model", "organism", "--out", str(out)]) == 2
        message = f"ccm: --out {out}: cannot write to {tmp_path} ({os.strerror(code)}"
        assert capsys.readouterr().err.startswith(message)
        with pytest.raises(BadInput, match=r"run: cannot be written to \(.*\)\. Give another --out\."):
            RunFolder(tmp_path / "run", IDENTITY)
        assert main(["figures", str(tmp_path / "made")]) == 2
        assert "figures: cannot be written to (" in capsys.readouterr().err
    assert not out.exists()
    RunFolder(tmp_path / "run", IDENTITY)


def test_folders_in_a_run_folder_are_tried_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()

    def below(path: Any, *_: Any) -> bool:
        return Path(path).parent == tmp_path / "run"

    monkeypatch.setattr(os, "mkdir", refusing("mkdir", errno.EACCES, below))
    with pytest.raises(BadInput, match=r"run: cannot be written to \(Permission denied"):
        RunFolder(tmp_path / "run", IDENTITY)


def test_a_trial_leaves_nothing(tmp_path: Path) -> None:
    try_writing(tmp_path / "new" / "folder")
    assert names(tmp_path) == ["new", "new/folder"]


def test_a_name_that_no_file_can_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", "--model", "organism", "--out", str(tmp_path / ("x" * 300))]) == 2
    err = capsys.readouterr().err
    assert "File name too long" in err
    assert err.count("\n") == 1


def test_what_was_being_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.txt.abcd1234.partial", "deep/.b.partial", "a.txt", "b.partial", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".trial.partial").mkdir()
    (tmp_path / ".trial.partial" / "x").write_text("")
    remove_partial(tmp_path)
    assert names(tmp_path) == [".hidden", "a.txt", "b.partial", "deep"]
