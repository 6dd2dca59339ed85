"""Files written whole or not at all, on any file system; if that fails, one clear line says why."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from ccm.errors import CannotWrite, system_error

PARTIAL = ".partial"  # ends the name of a file that is being written
NAME_KEPT = 40  # characters of a file's name kept in its partial name, which may not get too long
# Errors of `fsync` that mean lost bytes; any other means that the file system has no `fsync`.
LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ESTALE)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and rename over it, so that no reader ever finds half a file.

    Args:
        path: The file; its folder is made where it is missing.
        write: Writes to the path it is given, which is not `path`.

    Raises:
        CannotWrite: the system refused (full disk, quota, permissions), however the library that writes
            reports it. An earlier file is left as it was.
    """
    # Named before it is made: a signal may come between any two lines, and clean-up needs the name.
    written = path.parent / f".{path.name[:NAME_KEPT]}.{secrets.token_hex(4)}{PARTIAL}"
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            written.touch(exist_ok=False)  # refused here in the system's words, not in a library's
            write(written)
            _settle(written)
            os.replace(written, path)
        except BaseException:
            with suppress(OSError):  # the error that matters is the one that led here
                written.unlink(missing_ok=True)
            raise
    except Exception as error:
        reason = _reason(error, path)
        if reason is None:
            raise
        raise CannotWrite(path, reason) from error


def _settle(path: Path) -> None:
    """Make a new file readable for others, and flush its bytes to disk before it is renamed.

    Otherwise a crash after the rename could leave an empty file. Some file systems (of buckets, of
    Windows shares) refuse one or the other, yet store results all the same.
    """
    with suppress(OSError):
        path.chmod(0o644)  # some writers' 0600 would hide results from the group
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in LOST:
            raise
    finally:
        os.close(handle)


def _reason(error: BaseException, path: Path) -> str | None:
    """Return what the system refused, in its words; None if the error is not the system's."""
    refused = system_error(error)
    if refused is None:
        return None
    reason = os.strerror(refused.errno) if refused.errno else str(refused) or type(refused).__name__
    other = refused.filename is not None and Path(os.fsdecode(refused.filename)).parent != path.parent
    return f"{reason}: {os.fsdecode(refused.filename)}" if other else reason


def write_formats(stem: Path, writers: Mapping[str, Callable[[Path], object]]) -> list[Path]:
    """Write a file in several formats.

    Args:
        stem: The path without its suffix; it may hold dots.
        writers: By suffix, the function that writes to the path it is given.

    Returns:
        The paths, in the order of `writers`.
    """
    paths = {stem.parent / f"{stem.name}.{suffix}": write for suffix, write in writers.items()}
    for path, write in paths.items():
        write_atomically(path, write)
    return list(paths)


def try_writing(folder: Path) -> None:
    """Try, in advance, everything that writing results to a folder will do.

    A file is written, overwritten and removed, as `write_atomically` does it. The folder is made if it
    is missing, and stays; nothing else does.

    Raises:
        CannotWrite: one of these is refused.
    """
    trial = folder / f".trial-{os.getpid()}{PARTIAL}"
    try:
        for text in ("first", "over it"):
            write_atomically(trial, partial(Path.write_text, data=text))
    finally:  # also if a signal arrives
        try:
            trial.unlink(missing_ok=True)
        except OSError as error:
            raise CannotWrite(folder, error.strerror or str(error)) from error


def remove_partial(folder: Path) -> None:
    """Remove the partial files that a killed process left in a folder or below it."""
    for path in folder.rglob(f".*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # one that stays does no harm
                path.unlink()
