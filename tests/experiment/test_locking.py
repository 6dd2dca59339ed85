"""One process at a time in a run folder; one that is gone is in nobody's way."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pytest

from ccm.cli.parser import main
from ccm.errors import BadInput, CannotWrite, InUse
from ccm.experiment import locking
from ccm.experiment.folder import MANIFEST, RunFolder, check_folder, locked_for
from ccm.experiment.locking import HOLDER, LOCK, check_still_locked, locked, refuse_if_locked
from tests.made_runs import make_run
from tests.stops import dead_process, forsake

ROOT = Path(__file__).parents[2]
IDENTITY = {"model": "toy", "ablation_values": []}
HOLD = """
import sys, time
from pathlib import Path
from ccm.experiment.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: what /proc tells")


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder's lock."""
    process = child(HOLD, folder)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n", process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is gone is seen to be within a second."""
    monkeypatch.setattr(locking, "LEASE", 1.0)
    monkeypatch.setattr(locking, "TOUCHED", 0.2)
    monkeypatch.setattr(locking, "POLL", 0.05)


def lock_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(LOCK))


# --- held ---------------------------------------------------------------------------------------------


def test_a_lock_goes_away_with_what_it_was_held_for(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with locked(folder):
        assert lock_names(folder) == [LOCK, HOLDER]
        told = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        assert told["pid"] == os.getpid()
        check_still_locked(folder)
    assert lock_names(folder) == []
    with pytest.raises(KeyError), locked(folder):
        raise KeyError
    assert lock_names(folder) == []


def test_the_second_process_is_told_who_is_there(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        for refused in (locked(tmp_path), locked(tmp_path)):
            start = time.monotonic()
            with pytest.raises(InUse) as caught, refused:
                pass
            assert time.monotonic() - start < 2
            told = json.loads((tmp_path / HOLDER).read_text(encoding="utf-8"))
            who = f"process {process.pid} on {told['host']}, since {told['since']}"
            assert str(caught.value) == (
                f"{tmp_path}: in use by {who}. Wait for it or stop it, or give another --out."
            )
        with pytest.raises(InUse):
            refuse_if_locked(tmp_path)
        process.communicate("", timeout=30)
        assert process.returncode == 0
    assert lock_names(tmp_path) == []
    refuse_if_locked(tmp_path)


def test_nobody_is_refused_where_there_is_no_folder(tmp_path: Path) -> None:
    refuse_if_locked(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_time_in_this_process_is_refused_too(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(InUse, match=f"process {os.getpid()} on "), locked(tmp_path):
            pass
        check_still_locked(tmp_path)


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "run": lambda run: ["run", "--model", "organism", "--out", str(run)],
    "shard": lambda run: ["run", "--model", "organism", "--shard", "1/2", "--out", str(run)],
    "merge": lambda run: ["merge", str(run), "--out", str(run)],
    "figures": lambda run: ["figures", str(run)],
    "figures elsewhere": lambda run: ["figures", str(run), "--out", str(run / "more")],
    "report": lambda run: ["report", str(run)],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_into_a_run_folder_is_refused_at_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    run = make_run(tmp_path / "run", prompts=6).path
    for begun in (
        "ccm.experiment.run.make_plan",
        "ccm.reporting.report._write",
        "ccm.reporting.tables.write_tables",
    ):
        monkeypatch.setattr(begun, never)
    with holder(run) as process:
        before = sorted(p.name for p in run.iterdir())
        assert main(COMMANDS[name](run)) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"ccm: {run}: in use by process {process.pid} on ")
        assert err.count("\n") == 1
        assert sorted(p.name for p in run.iterdir()) == before


def test_figures_elsewhere_lock_the_folder_they_go_to(tmp_path: Path) -> None:
    with locked_for(tmp_path / "out"):
        assert lock_names(tmp_path / "out") == [LOCK, HOLDER]
    run = make_run(tmp_path / "run", prompts=6).path
    for out in (run, run / "figures"):
        with locked_for(out):
            assert lock_names(run) == [LOCK, HOLDER]


def test_what_a_report_was_writing_when_it_was_killed_goes_with_the_next(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", prompts=6).path
    (run / "figures").mkdir()
    left = run / "figures" / ".gts.png.abc12345.partial"
    mine = tmp_path / ".notes.partial"
    for path in (left, mine):
        path.write_text("half")
    with locked_for(run):
        assert not left.exists()
    with locked_for(tmp_path):
        assert mine.exists(), "removed what is not a run's"


# --- left behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_process_is_in_nobodys_way(reaped: bool, tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        if reaped:
            process.wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert lock_names(tmp_path) == [LOCK, HOLDER]
        start = time.monotonic()
        with locked(tmp_path):
            assert time.monotonic() - start < 2
            assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    assert lock_names(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from ccm.experiment.locking import locked

folder, left = sys.argv[1], int(sys.argv[2])

def told(event, arguments):
    global left
    if event in ("os.mkdir", "os.rename", "os.remove", "os.chmod") or (
        event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
    ):
        if str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(told)
with locked(Path(folder)):
    pass
print("done", left)
"""


def test_a_process_killed_at_any_file_operation_of_its_lock_is_in_nobodys_way(tmp_path: Path) -> None:
    processes = [(n, child(KILLED, tmp_path / str(n), n)) for n in range(1, 14)]
    killed = 0
    for n, process in processes:
        out, err = process.communicate(timeout=60)
        if process.returncode == 0:
            assert out.startswith("done"), err
            assert list((tmp_path / str(n)).iterdir()) == []
            continue
        assert process.returncode == -signal.SIGKILL, err
        killed += 1
        with locked(tmp_path / str(n)):
            check_folder(tmp_path / str(n))
            RunFolder(tmp_path / str(n), IDENTITY)
        assert sorted(p.name for p in (tmp_path / str(n)).iterdir()) == [MANIFEST]
    assert 8 <= killed < len(processes), "not every operation was stopped at"


RACE = """
import os, sys, time
from pathlib import Path
from ccm.errors import InUse
from ccm.experiment.locking import locked

folder = Path(sys.argv[1])
sys.stdin.readline()
try:
    with locked(folder):
        os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
        time.sleep(0.5)
        os.unlink(folder / "inside")
    print("was in")
except InUse:
    print("refused")
"""


def test_of_many_that_find_a_lock_left_behind_one_gets_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        left = {name: (tmp_path / name).read_bytes() for name in (LOCK, HOLDER)}
    for name, content in left.items():
        (tmp_path / name).write_bytes(content)
    forsake(tmp_path)
    racers = [child(RACE, tmp_path) for _ in range(6)]
    time.sleep(1.5)  # all have imported
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60) for racer in racers]
    assert {out for out, _ in said} <= {"was in\n", "refused\n"}, said
    assert any(out == "was in\n" for out, _ in said)
    assert lock_names(tmp_path) == []


def left_behind(folder: Path, host: str | None = None, pid: int | None = None) -> None:
    """A lock as a process left it that was on another machine, or is gone."""
    with locked(folder):
        lock, told = (folder / LOCK).read_text(), json.loads((folder / HOLDER).read_text())
    if host is not None:
        lock = "".join(
            f"host={host}\n" if line.startswith("host=") else line for line in lock.splitlines(True)
        )
        told["host"] = host
    if pid is not None:
        lock = lock.replace(f"pid={os.getpid()}\n", f"pid={pid}\n")
        told["pid"] = pid
    (folder / LOCK).write_text(lock)
    (folder / HOLDER).write_text(json.dumps(told))


@contextmanager
def touched(path: Path) -> Iterator[None]:
    """A file that somebody touches, from wherever."""
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_lock_of_another_machine_is_kept_while_it_is_touched(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left_behind(tmp_path, host="node7", pid=4711)
    with touched(tmp_path / LOCK), pytest.raises(InUse) as caught, locked(tmp_path):
        pass
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: in use by process 4711 on node7, since 2")
    assert message.endswith(
        "Wait for it or stop it, or give another --out. If it is surely gone, remove "
        f"{tmp_path / LOCK}."
    )
    assert lock_names(tmp_path) == [LOCK, HOLDER]


def test_a_lock_of_another_machine_that_nobody_touches_is_taken_over(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left_behind(tmp_path, host="node7", pid=4711)
    start = time.monotonic()
    with locked(tmp_path):
        assert 0.9 < time.monotonic() - start < 10
    err = capsys.readouterr().err
    assert f"{tmp_path}: locked by process 4711 on node7, since " in err
    assert "waiting up to 1 s to see whether it is still there" in err
    assert lock_names(tmp_path) == []


def test_removing_the_lock_by_hand_is_a_way_out(tmp_path: Path) -> None:
    left_behind(tmp_path, host="node7")
    (tmp_path / LOCK).unlink()
    with locked(tmp_path):
        pass
    assert lock_names(tmp_path) == []


# Shared file systems cannot exchange two names, with which the library takes a lock over.
@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filelock.SoftFileLease, "_try_break_stale_lock", lambda _: None)


@pytest.mark.parametrize(
    ("host", "pid", "seconds"), [(None, dead_process, 0.8), ("node7", lambda: 4711, 10)]
)
def test_a_lock_is_taken_over_where_names_cannot_be_exchanged(
    host: str | None,
    pid: Callable[[], int],
    seconds: float,
    short: None,
    no_exchange: None,
    tmp_path: Path,
) -> None:
    left_behind(tmp_path, host=host, pid=pid())
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start < seconds
        check_still_locked(tmp_path)
    assert lock_names(tmp_path) == []


@linux
def test_a_process_that_has_the_number_of_one_that_is_gone_is_not_it(
    short: None, no_exchange: None, tmp_path: Path
) -> None:
    left_behind(tmp_path)
    told = json.loads((tmp_path / HOLDER).read_text())
    (tmp_path / HOLDER).write_text(json.dumps({**told, "started": told["started"] - 3600}))
    with locked(tmp_path):
        check_still_locked(tmp_path)


@pytest.mark.parametrize("content", ["", "filelock/2\npid=", "\0" * 20], ids=["empty", "torn", "zeros"])
def test_a_lock_that_says_nothing_is_taken_over(content: str, short: None, tmp_path: Path) -> None:
    """Its process was killed, or its machine, before it was written."""
    (tmp_path / LOCK).write_text(content)
    with locked(tmp_path):
        check_still_locked(tmp_path)
    assert lock_names(tmp_path) == []


# --- lost ---------------------------------------------------------------------------------------------


def test_who_lost_the_lock_stops_before_it_writes_and_leaves_the_others_alone(
    short: None, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    left_behind(other, host="node7", pid=4711)
    run = tmp_path / "run"
    with locked(run):
        folder = RunFolder(run, IDENTITY)
        folder.note(before=1)
        before = (run / MANIFEST).read_bytes()
        for name in (LOCK, HOLDER):  # this process slept, and another took its lock over
            os.replace(other / name, run / name)
        with pytest.raises(
            InUse, match=r"taken over by process 4711 on node7, since .* Stopped before"
        ):
            folder.note(after=1)
        assert (run / MANIFEST).read_bytes() == before
    assert lock_names(run) == [LOCK, HOLDER], "removed another's lock"


def test_who_lost_the_lock_to_a_user_stops(short: None, tmp_path: Path) -> None:
    with locked(tmp_path):
        folder = RunFolder(tmp_path, IDENTITY)
        (tmp_path / LOCK).unlink()
        (tmp_path / HOLDER).unlink()
        with pytest.raises(InUse, match=r"its lock was removed while this process was at work"):
            folder.note(after=1)


def test_a_lock_that_is_moved_aside_for_a_look_is_not_lost(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / LOCK).rename(tmp_path / "aside")
        back = threading.Timer(0.05, lambda: (tmp_path / "aside").rename(tmp_path / LOCK))
        back.start()
        check_still_locked(tmp_path)
        back.join()


def test_a_lock_is_touched_while_it_is_held(short: None, tmp_path: Path) -> None:
    with locked(tmp_path):
        before = (tmp_path / LOCK).stat().st_mtime_ns
        time.sleep(0.6)
        assert (tmp_path / LOCK).stat().st_mtime_ns > before


# --- folders that cannot be locked --------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_to_is_locked_by_nobody(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run may be read there; who writes is told so by whatever writes."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.SoftFileLease, "acquire", refused)
    with locked(tmp_path):
        assert lock_names(tmp_path) == []


def test_another_users_lock_is_respected(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(tmp_path, host="node7", pid=4711)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filelock.SoftFileLease, "acquire", refused)
    with (
        touched(tmp_path / LOCK),
        pytest.raises(InUse, match="process 4711 on node7"),
        locked(tmp_path),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_a_lock(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.SoftFileLease, "acquire", refused)
    message = rf"\.lock: cannot be written \({os.strerror(code)}\)"
    with pytest.raises(CannotWrite, match=message), locked(tmp_path / "run"):
        pass


def test_no_room_to_sign_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(CannotWrite, match=r"\.lock\.holder: cannot be written"), locked(tmp_path):
        pass
    assert lock_names(tmp_path) == []


def test_a_file_and_a_folder_of_others_are_refused_as_before(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with locked(tmp_path / "notes.txt"), pytest.raises(BadInput, match="is a file"):
        RunFolder(tmp_path / "notes.txt", IDENTITY)
    with pytest.raises(BadInput, match="not empty and holds no run"):
        check_folder(tmp_path)
