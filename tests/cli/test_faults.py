"""Whatever goes wrong, the user reads one line: what nobody foresaw, too, and where nobody reads."""

import errno
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ccm.cli import commands as subcommands
from ccm.cli.parser import main, parser
from ccm.errors import BadInput
from tests.reproduction.test_options import checked  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]
HEAD = "import sys; from ccm.cli import commands as subcommands, parser as cli\n"


class Panic(BaseException):
    """As what libraries in Rust raise, which is no `Exception`."""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tracebacks go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


Fail = Callable[[BaseException], list[str]]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Makes a command that fails in the way that is given; returns its arguments."""

    def that(error: BaseException) -> list[str]:
        def broken(options: Any) -> None:
            raise error

        monkeypatch.setattr(subcommands, "measure", broken)
        return ["measure", "--model", "a b"]

    return that


# --- what nobody foresaw ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("a bug"), "RuntimeError: a bug."),
        (KeyError("W_U"), "KeyError: 'W_U'."),
        (AssertionError(), "AssertionError."),
        (Panic("in\n  Rust\u2028there"), "Panic: in Rust there."),
        (ValueError("x" * 5000), f"ValueError: {'x' * 188} ...."),
        (ImportError("no such name", name="ccm.decoding.engine"), "ImportError: no such name."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_fault_is_one_line_and_its_traceback_a_file(
    error: BaseException, said: str, fail: Fail, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fail(error)) == 1
    (file,) = kept.iterdir()
    printed = capsys.readouterr()
    assert printed.err == (
        f"ccm: {said} This is a fault of ccm, not of what was given. Please report it with {file}, its "
        "traceback; --debug shows it here.\n"
    )
    assert printed.out == ""
    assert re.fullmatch(r"ccm-traceback-\w+\.txt", file.name)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text(encoding="utf-8")
    assert text.startswith("command: ccm measure --model 'a b'\n")
    assert re.search(r"^packages: ccm \d.*, torch \d", text, re.MULTILINE)
    assert re.search(rf"in broken\n    raise error\n[\w.]*{type(error).__name__}\b", text)


def test_a_traceback_that_cannot_be_kept_is_no_second_error(
    fail: Fail, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    assert main(fail(RuntimeError("a bug"))) == 1
    assert capsys.readouterr().err == (
        "ccm: RuntimeError: a bug. This is a fault of ccm, not of what was given. Please report it; "
        "its traceback could not be kept ([Errno 28] No space left on device); --debug shows it here.\n"
    )


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback_and_writes_no_file(
    before: bool, fail: Fail, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fail(RuntimeError("a bug"))
    assert main(["--debug", *arguments] if before else [*arguments, "--debug"]) == 1
    *shown, last = capsys.readouterr().err.splitlines()
    assert shown[0] == "Traceback (most recent call last):"
    assert shown[-1] == "RuntimeError: a bug"
    assert last.endswith("Please report it with the traceback above.")
    assert [*kept.iterdir()] == []


def test_debug_shows_where_bad_input_was_found(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = fail(BadInput("k=0: out of range."))
    assert main(["--debug", *arguments]) == 2
    *shown, last = capsys.readouterr().err.splitlines()
    assert shown[0] == "Traceback (most recent call last):"
    assert last == "ccm: k=0: out of range."
    assert main(arguments) == 2
    assert capsys.readouterr().err == "ccm: k=0: out of range.\n"


REQUIRED = {
    "run": ["--model", "x"],
    "sweep": ["--model", "x", "--vary", "k=1", "--out", "y"],
    "merge": ["x", "--out", "y"],
    "figures": ["x"],
    "report": ["x"],
    "compare": ["x"],
    "models": [],
    "fetch": ["x"],
    "tokens": ["--model", "x", "y"],
    "prompts": ["--model", "x", "--out", "y"],
    "measure": ["--model", "x"],
    "ablate": ["--model", "x", "--prompts", "x", "--stats", "x", "--neurons", "1", "--out", "y"],
    "rehearse": ["--model", "x"],
}


def test_every_command_takes_debug() -> None:
    for command, given in REQUIRED.items():
        for arguments in ([command, *given, "--debug"], ["--debug", command, *given]):
            assert parser().parse_args(arguments).debug is True
        assert not hasattr(parser().parse_args([command, *given]), "debug")
    overview = parser().format_help()
    assert set(re.findall(r"^    (\w+) ", overview, re.MULTILINE)) == set(REQUIRED)


def test_a_package_that_is_missing_is_no_fault(
    fail: Fail, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fail(ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece"))
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "ccm: No module named 'sentencepiece'. Install what is missing; --debug shows what needs it.\n"
    )
    assert [*kept.iterdir()] == []


def test_a_message_of_several_lines_is_one_line(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(fail(BadInput("a\nb:\r\n wrong."))) == 2
    assert capsys.readouterr().err == "ccm: a b:  wrong.\n"


def test_a_wrong_option_of_a_reproduction_that_nobody_foresaw(
    checked: Callable[..., Any],  # noqa: F811
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("W_U")

    monkeypatch.setattr("conftest.device_for", broken)
    with pytest.raises(pytest.UsageError, match=r"^KeyError: 'W_U'\. This is a fault of ccm"):
        checked()
    assert len([*kept.iterdir()]) == 1


# --- where nobody reads -------------------------------------------------------------------------------

MANY = HEAD + "subcommands.models = lambda options: print('line\\n' * 99999)\nsys.exit(cli.main())"
FEW = HEAD + "subcommands.models = lambda options: print('line')\nsys.exit(cli.main())"
BAR = HEAD + (
    "from tqdm import tqdm\nsubcommands.models = lambda options: list(tqdm(range(10**9)))\n"
    "sys.exit(cli.main())"
)
BAD = HEAD + "sys.exit(cli.main())"


def shell(code: str, arguments: str, rest: str) -> tuple[int, str]:
    """Run a command line of bash's; the exit code of ccm itself, and what came on stderr."""
    command = f'"{sys.executable}" -c "$CODE" {arguments} {rest}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "CODE": code, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("code", "rest", "expected"),
    [
        (MANY, "| head -1", (141, "")),
        (FEW, "| true", (141, "")),  # found only when what was printed is sent
        (BAR, "2>&1 | head -c 20", (141, "")),  # progress, too, is output
        (FEW, ">&-", (0, "")),
        (FEW, "2>&-", (0, "")),
        (
            FEW,
            "> /dev/full",
            (2, "ccm: [Errno 28] No space left on device. Nothing half-written is left.\n"),
        ),
    ],
    ids=["many lines", "one line", "progress", "no output", "no errors", "full"],
)
def test_output_that_nobody_takes(code: str, rest: str, expected: tuple[int, str]) -> None:
    assert shell(code, "models", rest) == expected


@pytest.mark.parametrize("rest", ["2>&-", "2> /dev/full"])
def test_an_error_that_nobody_takes(rest: str) -> None:
    assert shell(BAD, "measure --model x --out /", rest) == (2, "")


def test_another_pipe_that_breaks_is_said(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(fail(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 2
    assert capsys.readouterr().err.startswith("ccm: [Errno 32] Broken pipe.")


def test_any_name_can_be_printed() -> None:
    code = HEAD + (
        "subcommands.models = lambda options: print('m\\u00efne \\udcff')\nsys.exit(cli.main())"
    )
    assert shell(code, "models", "| cat") == (0, "")
