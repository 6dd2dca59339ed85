"""How an option of a run is declared, read, checked and written."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ccm.errors import BadInput, one_of

PUBLISHED_NEURONS = "published"  # instead of neurons: those that the paper's authors picked


@dataclass(frozen=True)
class Option:
    """Everything about an option but its value."""

    told: str | Callable[[], str]  # what `help` says before the default
    flag: str
    default: Any
    read: Callable[[Any], Any] = str  # from the command line's text
    shown: Callable[[Any], str] = str  # back to the command line's text
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: int | float | None = None
    most: int | float | None = None
    result: bool = True  # whether a run's identity contains its value
    always: bool = False  # written in "run it again" commands even if it is the default
    switch: bool = False  # given without a value
    repeated: bool = False  # may be given several times

    @property
    def help(self) -> str:
        """The help text, with the default unless the text says it already."""
        told = self.told if isinstance(self.told, str) else self.told()
        if self.switch or self.default in (None, {}):
            return told
        return f"{told} (default: {self.shown(self.default)})"

    def is_default(self, value: Any) -> bool:
        """Return whether a value is the default."""
        return bool(value == self.default)

    def value_of(self, given: Any) -> Any:
        """Read a value that is text or a list, as on the command line or in a manifest.

        Raises:
            BadInput: it cannot be read.
        """
        if isinstance(given, str) or self.repeated:
            try:
                return self.read(given)
            except BadInput:
                raise
            except ValueError as error:
                raise BadInput(f"{self.flag} {given!r}: {error}.") from error
        return tuple(given) if isinstance(given, list) else given

    def check(self, value: Any) -> None:
        """Check a value as far as possible without the model.

        Raises:
            BadInput: it is not allowed.
        """
        if value is None and self.default is None:
            return
        name = self.flag.lstrip("-").replace("-", " ")
        kind = bool if self.switch else KINDS.get(self.read, object)
        if not isinstance(value, kind) or isinstance(value, bool) != self.switch or value == ():
            raise BadInput(
                f"{name} {value!r}: not a value for {self.flag}. RunConfig.read takes text, as the "
                "command line does."
            )
        if self.choices:
            one_of(name, str(value), self.choices)
        low, high = self.least, self.most
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            extent = f"{low:g} and more" if high is None else f"{low:g} to {high:.10g}"
            raise BadInput(f"{name} {value}: out of range. Allowed: {extent}, for {self.flag}.")


def option(default: Any, told: str | Callable[[], str], flag: str = "", **more: Any) -> Any:
    """Declare a field of `RunConfig`; `more` are fields of `Option`."""
    metadata = {"option": Option(told, flag, default, **more)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def option_of(f: "dataclasses.Field[Any]") -> Option:
    """Return the option of a configuration's field; by default its flag is the field's name."""
    found: Option = f.metadata["option"]
    return found if found.flag else replace(found, flag="--" + f.name.replace("_", "-"))


def whole(text: str) -> int:
    """Read a whole number."""
    # A limit, because long numbers are slow to read; and `int` alone would accept 1_000.
    if not re.fullmatch("-?[0-9]{1,40}", text.strip()):
        raise ValueError("not a whole number. Give one, like 100")
    return int(text)


def real(text: str) -> float:
    """Read a number."""
    try:
        return float(text)
    except ValueError:
        raise ValueError("not a number. Give one, like 0.9") from None


def size_in_bytes(text: str) -> int:
    """Read a size: `500M`, `8G`, `1T` or plain bytes.

    >>> size_in_bytes("8G") == 8 * 2**30
    True
    """
    units = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        size = float(number) * unit
    except ValueError:
        size = math.nan
    if not (1 << 20) <= size < math.inf:
        raise ValueError("no size. Give 1M or more, like 500M or 8G")
    return int(size)


def shard(text: str) -> tuple[int, int]:
    """Read `2/8`."""
    if not re.fullmatch("[0-9]{1,9}/[0-9]{1,9}", text):
        raise ValueError("no shard. Give I/N, like 2/8")
    i, n = text.split("/")
    return int(i), int(n)


def names(text: str) -> tuple[str, ...]:
    """Read names with commas between them."""
    return tuple(name.strip() for name in text.split(","))


def neuron_numbers(text: str) -> tuple[int, ...]:
    """Read `1,2,3`."""
    numbers = []
    for part in map(str.strip, text.split(",")):
        if not re.fullmatch("-?[0-9]{1,9}", part):
            raise ValueError(f"{part!r} is not a neuron number. Give 1,2,3")
        numbers.append(int(part))
    return tuple(numbers)


def neurons_or_published(text: str) -> tuple[int, ...] | str:
    """Read `1,2,3`, or leave `published` as it is."""
    return text if text == PUBLISHED_NEURONS else neuron_numbers(text)


def paths_of_models(entries: str | Iterable[str] | Mapping[str, str | Path]) -> dict[str, Path]:
    """Read `NAME=PATH` entries, or take folders and files by name.

    Raises:
        BadInput: an entry without `=`, or a path that does not exist.
    """
    if isinstance(entries, Mapping):
        entries = [f"{name}={path}" for name, path in entries.items()]
    paths = {}
    for entry in [entries] if isinstance(entries, str) else entries:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise BadInput(f"--model-path {entry!r}: not NAME=PATH. Give gpt2-small=/path/to/folder.")
        if not Path(path).exists():
            raise BadInput(f"--model-path {entry!r}: no such folder or file {path!r}.")
        paths[name] = Path(path)
    return paths


def joined(values: Sequence[object] | str) -> str:
    """Write names or numbers with commas between them, and text as it is."""
    return values if isinstance(values, str) else ",".join(map(str, values))


# The type that each reader returns.
KINDS: Mapping[Callable[..., Any], Any] = {
    str: str,
    whole: int,
    real: (int, float),
    size_in_bytes: int,
    shard: tuple,
    names: tuple,
    neurons_or_published: (tuple, str),
    paths_of_models: Mapping,
}
