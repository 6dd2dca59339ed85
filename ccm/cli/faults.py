"""Unforeseen errors: the traceback goes to a file, and the user reads one line."""

import os
import platform
import shlex
import tempfile
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ccm", "torch", "transformers", "transformer_lens", "tokenizers", "safetensors", "numpy")
LONGEST = 200  # characters of an error's own words


def fault(error: BaseException, command: Sequence[str], *, shown: bool = False) -> str:
    """Say in one line what to do about an unforeseen error, and keep its traceback.

    The traceback goes to the system's folder for temporary files, readable by its user alone: a run
    folder holds nothing but the run.

    Args:
        error: What was raised.
        command: The program and its arguments, for the file.
        shown: Whether the traceback was printed; if so, no file is written.
    """
    what = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    what = what if len(what) <= LONGEST else what[:LONGEST] + " ..."
    try:
        where = "the traceback above" if shown else f"{_keep(error, command)}, its traceback"
        report = f"Please report it with {where}"
    except OSError as reason:
        report = f"Please report it; its traceback could not be kept ({reason})"
    hint = "" if shown else "; --debug shows it here"
    return f"{what}. This is a fault of ccm, not of what was given. {report}{hint}."


def _keep(error: BaseException, command: Sequence[str]) -> str:
    """Write the file and return its path."""
    lines = [
        f"command: {shlex.join(command)}",
        f"system: {platform.platform()}, Python {platform.python_version()}",
        f"packages: {', '.join(_versions())}",
        "",
        "".join(traceback.format_exception(error)),
    ]
    handle, path = tempfile.mkstemp(prefix="ccm-traceback-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("\n".join(lines))
    return path


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} is missing")
    return found
