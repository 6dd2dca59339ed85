"""A lock on a run folder, against other processes here and on machines that share the file system.

The lock is a file in the folder that its holder touches every few seconds (`filelock.SoftFileLease`).
It needs no system call for locking, which shared file systems often lack. A holder on this machine
counts as gone if its process has ended; a holder on another machine, whose processes cannot be seen, if
it does not touch the file for a minute. A process that loses its lock in this way while it lives (on a
machine that slept) notices before it writes its manifest again, and stops.
"""

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from ccm.errors import CannotWrite, InUse
from ccm.experiment.writing import write_atomically

LOCK = ".lock"  # begins the names of all lock files
HOLDER = ".lock.holder"  # who holds it, for people
TOUCHED = 5.0  # seconds from one touch to the next
LEASE = 60.0  # seconds without a touch after which a holder counts as gone
POLL = 0.2  # seconds between two looks at a lock that may be stale
_held: dict[str, SoftFileLease] = {}  # locks of this process, by real path of the folder


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as it signed."""

    token: str  # of the lock that it signed for; an earlier holder's file has another token
    host: str
    pid: int
    pids: int  # the PID namespace on that host: containers have their own
    started: float  # when the process began, seconds since 1970
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_there(self) -> bool | None:
        """Whether the process is running; None if that cannot be seen from here."""
        if (self.host, self.pids) != (socket.gethostname(), _pid_namespace()):
            return None
        try:
            process = psutil.Process(self.pid)
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return False
            # Otherwise another process has its number now, or the machine's clock was set.
            return True if abs(process.create_time() - self.started) < 2 else None
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux: there is only one
        return 0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; the folder is made if it is missing.

    A folder that cannot be written to is not locked: writing to it then fails with the reason.

    Args:
        folder: The run folder.

    Raises:
        InUse: another process is at work there.
        CannotWrite: there is no room for the lock file.
    """
    lease = _acquire(folder)
    if lease is None:
        yield
        return
    key = os.path.realpath(folder)
    try:
        _held[key] = lease
        yield
    finally:
        _held.pop(key, None)
        if _is_ours(lease):
            with suppress(OSError):
                (folder / HOLDER).unlink(missing_ok=True)
        lease.release()


def refuse_if_locked(folder: Path) -> None:
    """Check, before any work and without making a folder, that no other process is at work there.

    Raises:
        InUse: another process is.
    """
    if os.path.exists(folder / LOCK):  # also False for a name that the file system does not allow
        with locked(folder):
            pass


def check_still_locked(folder: Path) -> None:
    """Check that this process still holds a folder that it locked; other folders pass.

    Raises:
        InUse: another process took the lock over, or it was removed.
    """
    lease = _held.get(os.path.realpath(folder))
    if lease is None or _is_ours(lease):
        return
    time.sleep(POLL)  # a process that checks whether a lock is stale moves it aside for a moment
    if not _is_ours(lease):
        who = _read_holder(folder)
        raise InUse(
            f"{folder}: its lock was {'removed' if who is None else f'taken over by {who}'} while this "
            "process was at work. Stopped before writing; the same command goes on when it is free."
        )


def _is_ours(lease: SoftFileLease) -> bool:
    owner = lease.owner
    if owner is None:
        return os.path.exists(lease.lock_file)  # only unreadable for now
    return owner.token == lease.token


def _acquire(folder: Path) -> SoftFileLease | None:
    """Get the lock of a folder; None if the folder cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lease = SoftFileLease(
            folder / LOCK, lease_duration=LEASE, heartbeat_interval=TOUCHED, thread_local=False
        )
        got = _try(lease) or _wait_for(lease, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotWrite(folder / LOCK, str(error.strerror)) from error
        return None  # writing to the folder will say what is wrong with it
    if not got:
        return None
    try:
        _sign(folder, lease)
    except BaseException:
        lease.release()
        raise
    return lease


def _sign(folder: Path, lease: SoftFileLease) -> None:
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    me = Holder(
        token=lease.token or "",
        host=socket.gethostname(),
        pid=os.getpid(),
        pids=_pid_namespace(),
        started=psutil.Process().create_time(),
        since=now,
    )
    text = json.dumps(asdict(me)) + "\n"
    write_atomically(folder / HOLDER, lambda p: p.write_text(text, encoding="utf-8"))


def _try(lease: SoftFileLease) -> bool:
    """Try to take a lock that is free, or whose holder the library knows to be gone."""
    try:
        lease.acquire(timeout=0)
    except (Timeout, LeaseSettingsMismatch):
        return False
    except PermissionError:
        if os.path.exists(lease.lock_file):  # it is another user's
            return False
        raise
    return True


def _wait_for(lease: SoftFileLease, folder: Path) -> bool:
    """Watch a lock until it is clear whether its holder is running (refuse) or gone (take over).

    The library itself takes over no lock if the file system cannot exchange two names (NFS, Windows
    shares), if the holder was killed before it signed, or if it is a zombie.
    """
    first, start, told = _look(lease), time.monotonic(), False
    while True:
        now, holder = _look(lease), _read_holder(folder, lease)
        there = None if holder is None else holder.is_there
        if there:
            raise _in_use(folder, holder)
        if first is None:
            first, start = now, time.monotonic()
        elif now is not None and now != first:
            raise _in_use(folder, holder)
        elif there is False or time.monotonic() - start > LEASE:
            if now is not None and _look(lease) == now:
                lease.force_break()
            if _try(lease):
                return True
            raise _in_use(folder, _read_holder(folder, lease))
        if _try(lease):
            return True
        if not told:
            who = holder or "an unknown process"
            wait = f"waiting up to {LEASE:.0f} s to see whether it is still there"
            print(f"ccm: {folder}: locked by {who}; {wait}", file=sys.stderr)
            told = True
        time.sleep(POLL)


def _look(lease: SoftFileLease) -> tuple[int, ...] | None:
    """Read what changes with each touch of the lock file; None if there is no file."""
    try:
        # Opened, because a shared file system's cached attributes may be a minute old.
        with open(lease.lock_file, "rb") as stream:
            found = os.fstat(stream.fileno())
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _read_holder(folder: Path, lease: SoftFileLease | None = None) -> Holder | None:
    """Read who holds a lock; None if nobody signed for it, or only for an earlier one."""
    with suppress(OSError, ValueError, TypeError):
        found = Holder(**json.loads((folder / HOLDER).read_text(encoding="utf-8")))
        if lease is None or (lease.owner is not None and lease.owner.token == found.token):
            return found
    return None


def _in_use(folder: Path, holder: Holder | None) -> InUse:
    near = holder is not None and holder.is_there
    return InUse(
        f"{folder}: in use by {holder or 'another process'}. Wait for it or stop it, or give another "
        "--out." + ("" if near else f" If it is surely gone, remove {folder / LOCK}.")
    )
