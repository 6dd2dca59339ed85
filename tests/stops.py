"""Runs stopped at file operations: the folder as it lies there when the process is gone."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# What Python tells of before it is done; writing into a file that is open is not among it, and makes no
# other state: a file has its name only when it is whole.
# With each, which argument is the open folder that a relative name is in, if any is.
CHANGES = {"os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.chmod": 2, "os.link": 2}
CHANGES |= {"os.symlink": 2, "os.truncate": -1, "os.utime": 3}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Watch:
    """Calls `before` ahead of every file operation in a folder, of the thread that watches."""

    folder: str
    before: Callable[[str, str], None]
    thread: int = field(default_factory=threading.get_ident)
    busy: bool = False

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """What the interpreter tells; anything raised here keeps the operation from happening."""
        if threading.get_ident() != self.thread or self.busy:
            return
        given, inside = arguments[0] if arguments else None, -1
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & WRITING:
                return
        elif event in CHANGES:
            inside = arguments[CHANGES[event]] if CHANGES[event] >= 0 else -1
        else:
            return
        if not isinstance(given, (str, bytes, os.PathLike)):
            return
        name = os.fsdecode(given)
        if isinstance(inside, int) and inside >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{inside}"), name)  # Linux
        if name == self.folder or name.startswith(self.folder + os.sep):
            self.busy = True
            try:
                self.before(event, os.path.relpath(name, self.folder))
            finally:
                self.busy = False


_watches: list[Watch] = []


@cache
def _hook() -> None:
    """Hooks cannot be taken off again: one, for all that watch."""

    def told(event: str, arguments: tuple[Any, ...]) -> None:
        for watch in _watches:
            watch.see(event, arguments)

    sys.addaudithook(told)


@contextmanager
def watched(folder: Path, before: Callable[[str, str], None]) -> Iterator[None]:
    """Call `before(event, name)` ahead of every file operation in a folder."""
    _hook()
    watch = Watch(str(folder), before)
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


@contextmanager
def recorded(folder: Path, states: Path) -> Iterator[list[tuple[str, str]]]:
    """Keep what a folder holds before every operation in it, as `states`/0, 1, ...

    That is what lies there when the process is killed at this very operation: nothing of it cleans up.

    Yields:
        The operations.
    """
    operations: list[tuple[str, str]] = []

    def keep(event: str, name: str) -> None:
        to = states / str(len(operations))
        if folder.exists():
            shutil.copytree(folder, to, copy_function=_link)
        operations.append((event, name))

    with watched(folder, keep):
        yield operations


def _link(source: str, target: str) -> None:
    """No file is written to once it has its name; the lock's own ones belong to one process each."""
    if os.path.basename(source).startswith(".lock"):
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


@contextmanager
def full_disk(folder: Path, after: int) -> Iterator[list[tuple[str, str]]]:
    """Let so many operations in a folder happen; then nothing new can be written, only removed.

    Yields:
        The operations that were refused.
    """
    left, refused = after, list[tuple[str, str]]()

    def refuse(event: str, name: str) -> None:
        nonlocal left
        left -= 1
        if left < 0 and event in ("open", "os.mkdir"):
            refused.append((event, name))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / name))

    with watched(folder, refuse):
        yield refused


@cache
def dead_process() -> int:
    """A process number that is no process's: that of one that ended."""
    done = subprocess.Popen([sys.executable, "-S", "-c", ""])
    done.wait()
    return done.pid


def forsake(folder: Path) -> None:
    """Make a lock that this process holds that of one that is gone, as a kill leaves it."""
    lock, holder = folder / ".lock", folder / ".lock.holder"
    if lock.exists():
        text, mine = lock.read_text(encoding="utf-8"), f"pid={os.getpid()}\n"
        lock.write_text(text.replace(mine, f"pid={dead_process()}\n"), encoding="utf-8")
    if holder.exists():
        told = json.loads(holder.read_text(encoding="utf-8"))
        holder.write_text(json.dumps({**told, "pid": dead_process()}), encoding="utf-8")


def what_lies_in(folder: Path) -> frozenset[tuple[str, int]]:
    """What tells one state of a run from another: files by name and, as states share them, by number.

    What was being written has a random name, and nobody reads it; there it is or it is not.
    """
    found = set[tuple[str, int]]()
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name.endswith(".partial"):
            found.add((str(path.parent.relative_to(folder)) + "/*.partial", 0))
        else:
            known = path.is_dir() or path.name.startswith(".lock")
            found.add((name, 0 if known else path.stat().st_ino))
    return frozenset(found)
