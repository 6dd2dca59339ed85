"""The options of a run: one row each, from which all else that knows them is derived.

A field of `RunConfig` carries its help, its checks and how it is read and written. The command line's
options, a run's identity, its manifest and the command that does it again follow from the fields, so a
new option is a new field and nothing else. Nothing heavy is imported: `ccm --help` reads this, too.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ccm.errors import BadInput, one_of
from ccm.method.ablation_values import ABLATION_VALUES, ALL, ablation_values
from ccm.method.protocol import PROTOCOLS
from ccm.models.specs import DTYPES

STATISTICS_FROM = ("own", "released")
PUBLISHED_NEURONS = "published"  # instead of neurons: those that the paper's authors picked


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its value."""

    told: str | Callable[[], str]  # help: what it is, and what may be given
    flag: str
    default: Any
    read: Callable[[Any], Any] = str  # from the command line's text
    shown: Callable[[Any], str] = str  # back to it
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: int | float | None = None
    most: int | float | None = None
    result: bool = True  # whether results depend on it, so that it tells runs apart
    always: bool = False  # said by "run it again" even where it is the default
    switch: bool = False  # given without a value
    repeated: bool = False  # may be given several times

    @property
    def help(self) -> str:
        """What the option is, and its default where the text does not say it."""
        told = self.told if isinstance(self.told, str) else self.told()
        if self.switch or self.default in (None, {}):
            return told
        return f"{told} (default: {self.shown(self.default)})"

    def is_default(self, value: Any) -> bool:
        """Whether a value is what is taken where none is given."""
        return bool(value == self.default)

    def value_of(self, given: Any) -> Any:
        """Read a value where it is text or a list, as the command line and a manifest have it.

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
        """Hold a value to what is allowed, as far as that does not depend on the model.

        Raises:
            BadInput: it is not.
        """
        if value is None or isinstance(value, bool):
            return
        name = self.flag.lstrip("-").replace("-", " ")
        if self.choices:
            one_of(name, value, self.choices)
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
    """What a field of a configuration says of itself; its flag is its name unless it has another."""
    found: Option = f.metadata["option"]
    return found if found.flag else replace(found, flag="--" + f.name.replace("_", "-"))


# --- how values are written on the command line -----------------------------------------------------
# Each reads text, or says in a ValueError what it should have been.


def whole(text: str) -> int:
    """Read a whole number."""
    # Not so many digits that it takes long to read; and `int` alone would take 1_000, too.
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
    """Read a size: `500M`, `8G` or plain bytes.

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


def model_folders(entries: str | Iterable[str] | Mapping[str, str | Path]) -> dict[str, Path]:
    """Read `NAME=DIR` entries, or take folders by name.

    Raises:
        BadInput: an entry without `=`, or a folder that is not there.
    """
    if isinstance(entries, Mapping):
        entries = [f"{name}={folder}" for name, folder in entries.items()]
    paths = {}
    for entry in [entries] if isinstance(entries, str) else entries:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise BadInput(f"--model-path {entry!r}: not NAME=DIR. Give gpt2-small=/path/to/folder.")
        if not Path(folder).is_dir():
            raise BadInput(f"--model-path {entry!r}: no such folder {folder!r}.")
        paths[name] = Path(folder)
    return paths


def _joined(values: Sequence[object] | str) -> str:
    return values if isinstance(values, str) else ",".join(map(str, values))


# --- the options ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    """Everything a run's results depend on, apart from the weights and facts themselves.

    Raises:
        BadInput: a value that can be seen to be wrong without the model (`ccm.experiment.plan` sees to
            the rest).
    """

    model: str = option(
        "organism", "a name of `ccm models`, or a checkpoint folder", always=True, result=False
    )
    model_paths: Mapping[str, Path] = option(
        {},
        "checkpoint folder of a named model; may be repeated",
        "--model-path",
        metavar="NAME=DIR",
        read=model_folders,
        repeated=True,
        result=False,
    )
    device: str = option("cpu", "cpu, cuda, cuda:N, auto", always=True)
    dtype: str = option("float32", "float32, bfloat16 or float16", choices=DTYPES)
    protocol: str = option(
        "corrected",
        "corrected, or released: with the released code's behaviours",
        choices=tuple(PROTOCOLS),
    )
    bos: str = option(
        "own",
        "token before every prompt: own (the tokenizer's BOS), none, or an id",
        metavar="none|ID",
    )
    facts: str | None = option(
        None,
        "pararel, or a folder with facts.csv and relations.csv (default: the model's own)",
        result=False,
    )
    template: str | None = option(None, "bare, instruction or chat (default: the model's)")
    ablation_values: tuple[str, ...] = option(
        ("mean_ablation",),
        lambda: f"{', '.join(ABLATION_VALUES)}, several with commas, or {ALL}",
        "--ablation-value",
        read=names,
        shown=_joined,
        always=True,
    )
    controls: int = option(100, "random sets", read=whole, least=0, always=True)
    matched_controls: int | None = option(
        None,
        "sets of neurons near the entropy neurons in weight norm and spread (default: as many as "
        "--controls)",
        metavar="N",
        read=whole,
        least=0,
    )
    seed: int = option(123, "of the controls", read=whole, least=0, most=2**32 - 1, always=True)
    k: int | None = option(
        None, "entropy neurons to select (default: the model's)", "-k", read=whole, least=1
    )
    min_rho: float | None = option(
        None, "least rho to select (default: the model's)", read=real, least=0, most=1
    )
    null_space_dims: int | None = option(
        None, "directions of V0 (default: the model's)", read=whole, least=1
    )
    neurons: tuple[int, ...] | str | None = option(
        None,
        "fix the entropy set: 1,2,3, or published",
        read=neurons_or_published,
        shown=_joined,
    )
    max_prompts: int | None = option(
        None, "use only so many prompts, evenly chosen", read=whole, least=1
    )
    engine: str = option(
        "shared",
        "shared: one decode for all sets; hooked: the slow reference, one pass per set",
        choices=("shared", "hooked"),
    )
    device_map: str | None = option(
        None,
        "auto: lay the layers over all GPUs, for a model that fits no single one",
        choices=("auto",),
    )
    full_texts: bool = option(
        False, "decode controls to 10 tokens, not only to their answer", switch=True
    )
    stats: str = option(
        "own",
        "activation statistics: own, or released, those of the paper's authors",
        choices=STATISTICS_FROM,
    )
    memory_budget: int | None = option(
        None,
        "what is decoded at once may take so much, like 500M or 8G (default: half of what is free)",
        metavar="SIZE",
        read=size_in_bytes,
        least=1 << 20,
        result=False,  # it changes no text and no source
    )
    shard: tuple[int, int] | None = option(
        None,
        "decode only the I-th of N shards of the prompts; `ccm merge` joins them",
        metavar="I/N",
        read=shard,
        shown=lambda value: "{}/{}".format(*value),
        result=False,  # noted apart: shards of one run are one run
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            option_of(f).check(getattr(self, f.name))
        if self.k is not None and self.neurons is not None:
            raise BadInput(f"-k {self.k}: --neurons says how many there are. Drop one of the two.")
        values = self.ablation_values
        if len(values) > 1 and ALL in values:
            raise BadInput(f"--ablation-value {_joined(values)!r}: all are more than these. Drop one.")
        ablation_values(values)
        if self.shard is not None:
            i, n = self.shard
            if not 1 <= i <= n:
                raise BadInput(f"shard {i}/{n}: out of range. Allowed: 1/{n} to {n}/{n}, n at least 1.")

    @classmethod
    def read(cls, **given: Any) -> "RunConfig":
        """Make one of values as the command line has them, or of what they stand for.

        Raises:
            BadInput: a name that is no option, or a value that cannot be read or is not allowed.

        >>> RunConfig.read(ablation_values="all", shard="2/8", memory_budget="8G").shard
        (2, 8)
        """
        known = {f.name: option_of(f) for f in fields(cls)}
        for name in given:
            one_of("option", name, known)
        return cls(**{name: known[name].value_of(value) for name, value in given.items()})


def given(config: RunConfig) -> dict[str, Any]:
    """What differs from the defaults, for a manifest: `RunConfig.read(**...)` makes the same of it."""
    differing = {
        f.name: value
        for f in fields(config)
        if not option_of(f).is_default(value := getattr(config, f.name))
    }
    if config.model_paths:
        differing["model_paths"] = {name: str(path) for name, path in config.model_paths.items()}
    return differing


def command_line(config: RunConfig) -> list[str]:
    """Options of `ccm run` that give this configuration.

    >>> command_line(RunConfig(seed=7))[-2:]
    ['--seed', '7']
    """
    words = list[str]()
    for f in fields(config):
        option_, value = option_of(f), getattr(config, f.name)
        if option_.is_default(value) and not option_.always:
            continue
        if option_.switch:
            words.append(option_.flag)
        elif isinstance(value, Mapping):
            for name, folder in value.items():
                words += [option_.flag, f"{name}={folder}"]
        else:
            words += [option_.flag, option_.shown(value)]
    return words
