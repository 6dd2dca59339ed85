"""The kinds of errors; every message names the value, what is allowed, and what to do."""

import os
import re
from collections.abc import Sequence

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class CcmError(Exception):
    """Any failure that `ccm` foresees; the command line prints it and exits with 2."""


class BadInput(CcmError, ValueError):
    """A value, file or folder that cannot be used as given."""


class NotAvailable(CcmError):
    """Something that is not on this machine: weights, data, CUDA, the network."""


class CannotWrite(CcmError):
    """A file that the system refuses to write: a full disk, a quota, missing permissions."""

    def __init__(self, path: object, reason: str) -> None:
        """Keep what cannot be written and why; pickling keeps both.

        Args:
            path: The file or folder.
            reason: Why, in the system's words.
        """
        super().__init__(str(path), reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.args[0]}: cannot be written ({self.reason}). Nothing half-written is left; make "
            "room or fix that, and give the same command again: a run goes on where it stopped."
        )


class InUse(CcmError):
    """A run folder that another process is writing to."""


class AssumptionBroken(CcmError):
    """A model that breaks the method's assumptions, or is not computed correctly."""


def one_of(what: str, name: str, known: object) -> str:
    """Check that a name is a known one, and return it.

    >>> one_of("engine", "warp", ["shared", "hooked"])
    Traceback (most recent call last):
    ...
    ccm.errors.BadInput: engine 'warp': unknown. Allowed: shared, hooked.

    Raises:
        BadInput: it is not.
    """
    if name not in known:  # type: ignore[operator]
        raise BadInput(f"{what} {name!r}: unknown. {allowed(known)}.")
    return name


def allowed(values: object) -> str:
    """List allowed names for a message.

    >>> allowed(["b", "a"])
    'Allowed: b, a'
    """
    return "Allowed: " + ", ".join(str(v) for v in values)  # type: ignore[attr-defined]


def listed(words: Sequence[str]) -> str:
    """Join words as people do.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def a_few(names: Sequence[str], most: int = 5) -> str:
    """Quote the first of many names, and say how many more there are.

    >>> a_few(["St. Louis", "U.S.", "Inc."], 2)
    "'St. Louis', 'U.S.' and 1 more"
    """
    more = len(names) - most
    return listed([*(repr(name) for name in names[:most]), *([f"{more:,} more"] if more > 0 else [])])


def reason_of(error: Exception) -> str:
    """Shorten a library's error to its kind and first sentence, because some list all known names."""
    words = " ".join(str(error).split()).partition(". ")[0]
    return f"{type(error).__name__}: {words}"[:160].rstrip(" :.")


def system_error(error: BaseException | None) -> OSError | None:
    """Find what the system refused, in an error or its causes; None if it refused nothing.

    Libraries written in Rust name the system's error in the text of one of their own.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error
        if found := _OS_ERROR.search(str(error)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        error = error.__cause__
    return None
