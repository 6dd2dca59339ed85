"""Checks of where a command writes, before any long work: results come minutes later."""

from pathlib import Path

from ccm.errors import BadInput, CannotWrite
from ccm.experiment.writing import try_writing


def new_file(path: Path) -> Path:
    """Check that an output file can be written and would overwrite nothing.

    Raises:
        BadInput: it exists already, or its folder is missing or cannot be written to.
    """
    try:
        there = path.exists()
    except OSError as error:  # a name that the file system does not allow
        raise BadInput(f"--out {path}: {error.strerror}. Give another file.") from error
    if there:
        raise BadInput(f"--out {path}: exists already. Nothing was written; give another file.")
    if not path.parent.is_dir():
        raise BadInput(f"--out {path}: no folder {path.parent}. Make it first.")
    check_writing(path.parent, f"--out {path}: cannot write to {path.parent}", "file")
    return path


def check_writing(folder: Path, trouble: str, other: str) -> None:
    """Check that a folder, made if it is missing, can be written to.

    Args:
        folder: The folder.
        trouble: The start of the message.
        other: What to give instead: "file" or "folder".

    Raises:
        BadInput: it cannot be written to.
    """
    try:
        try_writing(folder)
    except CannotWrite as error:
        raise BadInput(f"{trouble} ({error.reason}). Give another {other}.") from error
