"""The model cache: folders that are made once per machine and shared by every process on it.

A folder is made beside its final place and moved there whole. While one process makes it, others wait;
a killed process leaves a partial folder, which the next one removes before it starts.
"""

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ccm.errors import CcmError, NotAvailable, system_error

PARTIAL = ".partial"  # ends the name of a folder that is being made
FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


def models_cache() -> Path:
    """Return the model cache's folder, in the user's cache, which `XDG_CACHE_HOME` moves on Linux."""
    import platformdirs

    return platformdirs.user_cache_path("ccm") / "models"


def made_once(name: str, make: Callable[[Path], object], *, needed: int, anew: bool = False) -> Path:
    """Return a folder of the cache, which is made first if it is missing.

    Args:
        name: Of the folder; it identifies the content, so that other content has another name.
        make: Fills the empty folder it is given.
        needed: Bytes that the folder takes, which are checked before it is begun.
        anew: Make it again, because the existing one is damaged.

    Raises:
        NotAvailable: the cache cannot be written to, or has too little room.
    """
    cache = models_cache()
    target = cache / name
    if target.is_dir() and not anew:
        return target
    try:
        with _alone(cache, name):
            if not target.is_dir() or anew:  # otherwise another process made it meanwhile
                _make(target, make, needed)
    except CcmError:
        raise
    except Exception as error:  # some libraries raise their own errors for what the system refuses
        refused = system_error(error)
        if refused is None:
            raise
        what = "is full" if refused.errno in FULL else "cannot be written to"
        reason = refused.strerror or str(refused)
        raise NotAvailable(f"{cache}: {what} ({reason}), and {_wants(needed)}") from error
    return target


def _wants(needed: int) -> str:
    return (
        f"{needed / 1e9:.1f} GB are needed there. Free some, or set XDG_CACHE_HOME to a folder with "
        "room."
    )


@contextmanager
def _alone(cache: Path, name: str) -> Iterator[None]:
    """Keep other processes out, or wait for the one that is making the folder."""
    from filelock import FileLock, Timeout

    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning(f"another process is making {cache / name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(target: Path, make: Callable[[Path], object], needed: int) -> None:
    """Make the folder beside its place, and move it there."""
    for left in target.parent.glob(f".{target.name}.*{PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise NotAvailable(f"{target.parent}: {free / 1e9:.1f} GB are free, and {_wants(needed)}")
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}{PARTIAL}"
    try:
        partial.mkdir()
        make(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
