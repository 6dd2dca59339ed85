"""A signal ends the command in one line, with its exit code, its workers, and nothing half-written."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ccm.cli import commands as subcommands
from ccm.cli.parser import main
from ccm.errors import NotAvailable
from ccm.experiment import stopping
from ccm.experiment.folder import BATCHES, SCORES
from ccm.experiment.stopping import SIGNALS, Stopped, Stopping, in_processes
from tests.experiment.test_run import check_finished, command, names, times
from tests.made_runs import make_run
from tests.slow_work import write_slowly

pytestmark = pytest.mark.whole_runs

ROOT = Path(__file__).parents[2]
SECONDS = 60.0  # for what takes a few
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
each_signal = pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def nothing_ignored() -> Iterator[None]:
    """Signals mean what they mean in a terminal, even where the tests themselves run under `nohup`.

    What is ignored is inherited, by commands that tests start, too.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        by_default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, by_default)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes of a group of their own; none is left."""
    started: list[subprocess.Popen[str]] = []

    def begin(arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                # One thread here as there: sums in another order differ in their last bits.
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(torch.get_num_threads()),
                    "PYTHONPATH": str(ROOT),
                },
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                **options,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if group(process):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def group(process: subprocess.Popen[str]) -> list[int]:
    """Who is left of a process's group."""
    found = []
    for other in psutil.process_iter():
        try:
            alive = os.getpgid(other.pid) == process.pid and other.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
        found += [other.pid] if alive else []
    return found


def said(process: subprocess.Popen[str]) -> list[str]:
    """The lines on stderr of a process that ends, without its progress bars."""
    error = process.communicate(timeout=SECONDS)[1]
    lines = [line.split("\r")[-1] for line in error.split("\n")]
    return [line for line in lines if line and "%|" not in line]


# --- a run --------------------------------------------------------------------------------------------


def test_a_run_that_a_batch_system_stops_goes_on_to_the_same_bytes(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    more = ["--controls", "60", "--ablation-value", "mean_ablation", "--memory-budget", "1M"]
    decoded = set[Path]()

    def goes_on(process: subprocess.Popen[str]) -> bool:
        """Whether one shard more than before is there."""
        found = set((out / BATCHES / "ablations").glob("batch_*"))
        return found > decoded or process.poll() is not None

    for number in (signal.SIGTERM, signal.SIGHUP):
        process = start(["-m", "ccm", *command(out, *more)])
        wait_for(partial(goes_on, process))
        process.send_signal(number)
        assert said(process) == [
            f"ccm: interrupted; the same command with --out {out} goes on from here."
        ]
        assert process.returncode == CODES[number]
        assert not (out / SCORES).exists()
        assert not [name for name in names(out) if name.endswith(".partial")]
        decoded |= set((out / BATCHES / "ablations").glob("batch_*"))
    finished = times(out)
    assert main(command(out, *more)) == main(command(whole, *more)) == 0
    check_finished(out, whole, finished)


@each_signal
def test_every_signal_is_said_alike(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    monkeypatch.setattr(subcommands, "measure", lambda options: os.kill(os.getpid(), number))
    assert main(["measure", "--model", "organism"]) == CODES[number]
    assert capsys.readouterr().err == "\nccm: interrupted; no result.\n"
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_what_an_interrupted_step_makes_of_it_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a library that turns every exception into its own."""

    def step(options: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise RuntimeError("could not load") from error

    monkeypatch.setattr(subcommands, "measure", step)
    assert main(["measure", "--model", "organism"]) == 143
    assert capsys.readouterr().err == "\nccm: interrupted; no result.\n"


class Finalized:
    """What is stopped while it goes away: Python cannot raise what is raised there."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)


def test_a_signal_within_a_finalizer_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(options: Any) -> None:
        Finalized()
        time.sleep(SECONDS)

    hook = sys.unraisablehook
    monkeypatch.setattr(subcommands, "measure", step)
    assert main(["measure", "--model", "organism"]) == 143
    assert capsys.readouterr().err == "\nccm: interrupted; no result.\n"
    assert sys.unraisablehook is hook


# --- handlers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [signal.SIG_IGN, lambda *_: None], ids=["ignored", "handled"])
def test_a_signal_that_is_ignored_or_handled_stays_so(kept: Any) -> None:
    """`nohup` ignores SIGHUP, so that a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, kept)
    try:
        with Stopping(lambda: None):
            assert signal.getsignal(signal.SIGHUP) is kept
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is kept
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_installs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = list[object]()

    def look(options: Any) -> None:
        seen.extend(signal.getsignal(number) for number in SIGNALS)

    monkeypatch.setattr(subcommands, "models", look)
    before, codes = [signal.getsignal(number) for number in SIGNALS], list[int]()
    thread = threading.Thread(target=lambda: codes.append(main(["models"])))
    thread.start()
    thread.join()
    assert (codes, seen) == ([0], before)


@each_signal
def test_a_second_signal_is_no_traceback(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same one passed on by a parent is no wish to end at once; a later one is."""
    words, codes = list[str](), list[int]()
    monkeypatch.setattr(os, "_exit", codes.append)
    with Stopping(lambda: words.append("last")) as stop:
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.code == CODES[number]
        assert stop.stopped is caught.value
        for second in SIGNALS:
            os.kill(os.getpid(), second)
        assert (words, codes) == ([], [])
        monkeypatch.setattr(stopping, "SAME_SECONDS", -1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (words, codes) == (["last"], [CODES[number]])


def test_a_signal_at_the_very_end_is_no_traceback(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    code = (
        "import atexit, os, sys, time\n"
        "from ccm.cli import commands as subcommands, parser as cli\n"
        "subcommands.models = lambda options: None\n"
        "atexit.register(lambda: os.kill(os.getpid(), int(sys.argv[2])) or time.sleep(9))\n"
        "sys.exit(cli.main())"
    )
    for number, expected in CODES.items():
        process = start(["-c", code.replace("sys.argv[2]", str(int(number))), "models"])
        assert (said(process), process.returncode) == ([], expected)


# --- workers ------------------------------------------------------------------------------------------

WORKERS = """
import sys
from pathlib import Path
from ccm.experiment.stopping import Stopped, Stopping, in_processes
from tests.slow_work import write_slowly

with Stopping(lambda: None):
    try:
        list(in_processes(write_slowly, [Path(sys.argv[1]) / str(i) for i in range(9)], 2))
    except Stopped as error:
        sys.exit(error.code)
"""
STOPS = [(n, whole, early) for n in CODES for whole in (True, False) for early in (True, False)]


@pytest.mark.parametrize(("number", "whole", "early"), [*STOPS, (signal.SIGKILL, False, False)])
def test_workers_end_with_their_parent(
    number: signal.Signals,
    whole: bool,
    early: bool,
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    """Whether the signal comes to all of them, as Ctrl-C, or to the parent alone."""
    process = start(["-c", WORKERS, str(tmp_path)])
    # The third is multiprocessing's own, which keeps account of locks.
    wait_for(lambda: len(group(process)) == 4 if early else len(list(tmp_path.iterdir())) == 2)
    (os.killpg if whole else os.kill)(process.pid, number)
    begun = time.monotonic()
    assert process.wait(SECONDS) == CODES.get(number, -9)
    wait_for(lambda: not group(process))
    assert time.monotonic() - begun < stopping.PATIENCE_SECONDS, "had to be killed"
    # Of one that was killed, multiprocessing says itself that it had no time to give back locks.
    assert [line for line in said(process) if "Traceback" in line or CODES.get(number)] == []
    assert [*tmp_path.iterdir()] == [], "something half-written is left"


def test_a_worker_that_was_killed_is_said(tmp_path: Path) -> None:
    """As the kernel does where memory runs out."""

    def kill_one() -> None:
        wait_for(lambda: [*tmp_path.iterdir()])
        psutil.Process().children()[-1].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(NotAvailable, match=r"^one of 2 processes was killed, .* for want of memory"):
        list(in_processes(write_slowly, [tmp_path / str(i) for i in range(4)], 2))
    killer.join()


REPORT = """
import sys
from ccm.cli import parser as cli
from ccm.cli import finished
finished.cores = lambda: 2
sys.exit(cli.main())
"""


def test_a_report_is_stopped_with_its_workers(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Under `nohup`: SIGHUP is ignored, SIGTERM is not."""
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        make_run(run, model=run.name, values=("mean_ablation", "mode_ablation"))
    out, code = tmp_path / "out", tmp_path / "report.py"
    code.write_text(f"if __name__ == '__main__':\n    exec({REPORT!r})\n")
    process = start(
        [str(code), "report", *map(str, runs), "--out", str(out)],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_for(lambda: [*out.rglob("*.png")] or process.poll() is not None)
    os.killpg(process.pid, signal.SIGHUP)
    drawn = len([*out.rglob("*.png")])
    wait_for(lambda: len([*out.rglob("*.png")]) > drawn or process.poll() is not None)
    os.killpg(process.pid, signal.SIGTERM)
    assert said(process) == ["ccm: interrupted; no result."]
    assert process.returncode == 143
    wait_for(lambda: not group(process))
    assert not [*out.rglob("*.partial")]
