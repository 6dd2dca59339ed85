"""Limits on this process's memory and CPUs: those of its container or batch job, not the host's.

Linux keeps them in control groups, of which there are two versions, and a machine may have both at
once. A limit holds for a group and all groups below it. So every group is read, from the process's own
up to the topmost visible one, and the tightest limit counts. A file that cannot be read sets no limit.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path("/")  # below it lie /proc and /sys
NONE = 1 << 62  # bytes: version 1 writes "no limit" as a number above this
PERIOD = 100_000  # microseconds, the kernel's default if a quota names no period
# By version: files of the limits, of the memory in use, and counters of cached pages of files.
_MEMORY: Mapping[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    "cgroup": (
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def cores(root: Path | None = None) -> int:
    """Count the CPUs that this process may use: those it may run on, but no more than its quota.

    Args:
        root: The folder that holds /proc and /sys; None: the machine's.
    """
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return seen if quota is None else max(1, min(seen, int(quota)))


def cpu_quota(root: Path | None = None) -> float | None:
    """Read the tightest quota of CPU time, in CPUs; None without one.

    Args:
        root: As for `cores`.
    """
    quotas = []
    for version, group in _groups(root or ROOT, "cpu"):
        if version == "cgroup2":
            quota, _, period = (_text(group / "cpu.max") or "").partition(" ")
        else:
            quota = _text(group / "cpu.cfs_quota_us") or ""
            period = _text(group / "cpu.cfs_period_us") or ""
        microseconds = _number(quota)
        if microseconds:  # `_number` gives None for "max" and -1, and a quota cannot be 0
            quotas.append(microseconds / (_number(period) or PERIOD))
    return min(quotas, default=None)


def memory_left(root: Path | None = None) -> int | None:
    """Return the bytes that this process may still allocate; None if no limit is set.

    For a control group, that is its limit less its working set: the memory in use, without the cached
    pages of files, which the kernel gives up before it refuses memory. For the process, it is what
    `ulimit -v` and `ulimit -d` leave. The smallest of these counts.

    Args:
        root: As for `cores`.
    """
    left = [*_left_in_groups(root or ROOT), *_left_of_process()]
    return min(left, default=None)


def _left_in_groups(root: Path) -> Iterator[int]:
    for version, group in _groups(root, "memory"):
        limits, used, given_up = _MEMORY[version]
        counters = _counters(group / "memory.stat")
        # Version 1 also reports limits of groups above those that a container sees.
        found = [_number(_text(group / name)) for name in limits]
        found.append(counters.get("hierarchical_memory_limit"))
        limit = min((n for n in found if n is not None and n < NONE), default=None)
        if limit is not None:
            working_set = (_number(_text(group / used)) or 0) - sum(
                counters.get(name, 0) for name in given_up
            )
            yield max(0, limit - max(0, working_set))


def _left_of_process() -> Iterator[int]:
    """Yield the bytes that the process's own limits leave of address space and of data."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    import psutil

    used: Any = psutil.Process().memory_info()
    for limit, field in (("RLIMIT_AS", "vms"), ("RLIMIT_DATA", "data")):
        soft = resource.getrlimit(getattr(resource, limit))[0]
        if soft != resource.RLIM_INFINITY and hasattr(used, field):
            yield max(0, soft - int(getattr(used, field)))


def _groups(root: Path, controller: str) -> Iterator[tuple[str, Path]]:
    """Yield the version and folder of every group that this process is in, its own first.

    Args:
        root: As for `cores`.
        controller: cpu or memory.
    """
    own = _own_groups(root)
    for line in _lines(root / "proc/self/mountinfo"):
        # ID, parent, device, root within the file system, mount point, options ... - type, source,
        # options of the file system, among them the controllers of version 1.
        before, dash, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if not dash or len(fields) < 5 or len(kind) < 3 or kind[0] not in _MEMORY:
            continue
        version = kind[0]
        if version == "cgroup" and controller not in kind[2].split(","):
            continue
        top = root / _unescaped(fields[4]).lstrip("/")
        group = own.get("" if version == "cgroup2" else controller, PurePosixPath("/"))
        mounted = PurePosixPath(_unescaped(fields[3]))
        # If the file system shows another part of the tree than the process's, as in a container
        # without a namespace of its own, only its top can be read.
        inside = group.is_relative_to(mounted) and ".." not in group.parts
        folder = top / group.relative_to(mounted) if inside else top
        yield version, folder
        while folder != top:
            folder = folder.parent
            yield version, folder


def _own_groups(root: Path) -> dict[str, PurePosixPath]:
    """Read the process's groups by controller; the group of version 2 has the key ""."""
    found = dict[str, PurePosixPath]()
    for line in _lines(root / "proc/self/cgroup"):
        _, first, rest = line.partition(":")
        controllers, second, path = rest.partition(":")
        if first and second and path.startswith("/"):
            found |= dict.fromkeys(controllers.split(","), PurePosixPath(path))
    return found


def _unescaped(path: str) -> str:
    r"""Undo mountinfo's escapes of blanks and backslashes.

    >>> _unescaped(r"/my\040groups")
    '/my groups'
    """
    for code, character in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
        path = path.replace(f"\\{code}", character)
    return path


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _lines(path: Path) -> list[str]:
    return (_text(path) or "").splitlines()


def _number(text: str | None) -> int | None:
    """Read a number of at most 20 digits; return None for anything else, such as `max`."""
    good = text is not None and text.isascii() and text.isdecimal() and len(text) <= 20
    return int(text) if good and text else None


def _counters(path: Path) -> dict[str, int]:
    pairs = [line.split() for line in _lines(path)]
    read = {pair[0]: _number(pair[1]) for pair in pairs if len(pair) == 2}
    return {name: number for name, number in read.items() if number is not None}
