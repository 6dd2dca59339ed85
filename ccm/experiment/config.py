"""What a run is: all that its results depend on, checked before any weights are loaded."""

import hashlib
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import comb
from pathlib import Path
from typing import Any

import torch

from ccm.errors import BadInput, one_of
from ccm.experiment.cells import ENGINES
from ccm.experiment.folder import to_json
from ccm.experiment.released_stats import read_released_statistics, released_statistics_hash
from ccm.method.ablation import AblationValue, ablation_values, check_neurons
from ccm.method.facts import FactSet, load_pararel, read_fact_folder
from ccm.method.prompts import TEMPLATES
from ccm.models.specs import ModelSpec, device_for, dtype_for, spec_for
from ccm.models.tokenizer import Bos, parse_bos
from ccm.models.weights import check_weights, file_hashes


@dataclass(frozen=True)
class Protocol:
    """Which of the released code's behaviours a run follows; the defaults are right."""

    name: str
    lower_case_objects: bool = False  # defect 11
    controls_overlap: bool = False  # defect 6
    float16_sigma: bool = False  # defect 3
    released_tokens: bool = False  # defect 7
    nd_ratio_of_pk: bool = False  # defect 1
    counter_first: bool = False  # CK where an answer names both objects, even if PK is the longer


PROTOCOLS = {
    "corrected": Protocol("corrected"),
    "released": Protocol("released", True, True, True, True, True, True),
}


STATISTICS_FROM = ("own", "released")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run's results depend on, apart from the weights and facts themselves."""

    model: str = "organism"
    ablation_value: tuple[str, ...] = ("mean_ablation",)
    controls: int = 100
    matched_controls: int = 0  # sets that match the entropy set in norm and spread (Method 13)
    device: str = "cpu"
    device_map: str | None = None  # auto: layers over all GPUs, for a model that fits no single one
    dtype: str = "float32"
    seed: int = 123
    protocol: str = "corrected"
    facts: str | None = None  # None: the model's own
    template: str | None = None
    bos: str = "own"  # own: the tokenizer's BOS token before every prompt; none; or a token id
    k: int | None = None
    min_rho: float | None = None
    null_space_dims: int | None = None
    neurons: tuple[int, ...] | None = None  # a fixed entropy set instead of the selection rule
    max_prompts: int | None = None
    engine: str = "shared"
    full_texts: bool = False  # decode controls to the end too, not only their answers
    memory_budget: int | None = None  # bytes; None: from what is free. Changes no text or source
    stats: str = "own"  # activation statistics: own, or released by the paper's authors
    share: tuple[int, int] | None = None  # (i, n): decode the i-th of n shares, for `ccm merge`
    model_paths: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A `RunConfig` after every name in it was looked up and every number checked."""

    config: RunConfig
    spec: ModelSpec
    facts: FactSet
    template: str
    bos: Bos
    protocol: Protocol
    values: tuple[AblationValue, ...]
    k: int
    min_rho: float
    null_space_dims: int
    device: torch.device


def make_plan(config: RunConfig) -> Plan:
    """Check a configuration without loading any weights.

    Raises:
        BadInput: any name, number or file that cannot be used.
        NotAvailable: a device or data that are not here.
    """
    protocol = PROTOCOLS[one_of("protocol", config.protocol, PROTOCOLS)]
    values = tuple(ablation_values(config.ablation_value))
    spec = check_weights(spec_for(config.model, config.model_paths))
    one_of("engine", config.engine, ENGINES)
    if config.memory_budget is not None and config.memory_budget < 1 << 20:
        raise BadInput(
            f"memory budget {config.memory_budget} bytes: too small. Allowed: 1 MiB and more."
        )
    check_share(config)
    check_device_map(config)
    one_of("stats", config.stats, STATISTICS_FROM)
    if config.stats == "released":
        read_released_statistics(spec, finite=protocol.name != "released")
    device = device_for(config.device)
    dtype_for(config.dtype)
    template = config.template or spec.template
    one_of("template", template, TEMPLATES)
    bos = parse_bos(config.bos)
    if isinstance(bos, int) and bos >= spec.d_vocab:
        raise BadInput(
            f"--bos {bos}: no token of {spec.name}. Allowed: own, none, 0 to {spec.d_vocab - 1}."
        )
    if config.neurons is not None:
        check_neurons(config.neurons, spec.d_mlp)
    k = len(config.neurons) if config.neurons is not None else config.k or spec.n_entropy_neurons
    if not 1 <= k <= spec.d_mlp or config.k == 0:
        raise BadInput(
            f"k={config.k if config.k is not None else k} entropy neurons: out of range. Allowed: 1 "
            f"to {spec.d_mlp} (d_mlp of {spec.name})."
        )
    pool = spec.d_mlp if protocol.controls_overlap else spec.d_mlp - k
    exist = comb(pool, k) - int(protocol.controls_overlap)
    if not 0 <= config.controls <= exist:
        raise BadInput(
            f"{config.controls} controls: out of range. Allowed: 0 to {exist}, the distinct sets of "
            f"{k} of {pool} neurons. Lower --controls."
        )
    exist = comb(spec.d_mlp - k, k)
    if not 0 <= config.matched_controls <= exist:
        raise BadInput(
            f"{config.matched_controls} matched controls: out of range. Allowed: 0 to {exist}, the "
            f"distinct sets of {k} of {spec.d_mlp - k} neurons. Lower --matched-controls."
        )
    if not 0 <= config.seed < 2**32:
        raise BadInput(f"seed {config.seed}: out of range. Allowed: 0 to {2**32 - 1}.")
    if config.max_prompts is not None and config.max_prompts < 1:
        raise BadInput(f"max prompts {config.max_prompts}: out of range. Allowed: 1 and more.")
    dims = spec.null_space_dims if config.null_space_dims is None else config.null_space_dims
    if not 1 <= dims <= spec.d_model:
        raise BadInput(
            f"null-space dimensions {dims}: out of range. Allowed: 1 to {spec.d_model} (d_model)."
        )
    min_rho = spec.min_rho if config.min_rho is None else config.min_rho
    if not 0 <= min_rho <= 1:
        raise BadInput(f"least rho {min_rho}: out of range. Allowed: 0 to 1, for --min-rho.")
    return Plan(
        config=config,
        spec=spec,
        facts=find_facts(config.facts, spec),
        template=template,
        bos=bos,
        protocol=protocol,
        values=values,
        k=k,
        min_rho=min_rho,
        null_space_dims=dims,
        device=device,
    )


def check_share(config: RunConfig) -> None:
    """Check which share of a run is asked for."""
    if config.share is None:
        return
    i, n = config.share
    if not 1 <= i <= n:
        raise BadInput(f"shard {i}/{n}: out of range. Allowed: 1/{n} to {n}/{n}, n at least 1.")
    if config.engine != "shared":
        raise BadInput(f"shard {i}/{n}: the {config.engine} engine has none. Use --engine shared.")


def check_device_map(config: RunConfig) -> None:
    """Check whether, and on what, a model is to be laid over several devices."""
    if config.device_map is None:
        return
    one_of("device map", config.device_map, ["auto"])
    if config.device != "cuda":
        raise BadInput(f"device map auto: not with device {config.device!r}. Use --device cuda.")
    if config.engine != "shared":
        raise BadInput(f"device map auto: not with engine {config.engine!r}. Use --engine shared.")


def find_facts(name: str | None, spec: ModelSpec) -> FactSet:
    """Find the facts: `pararel`, a folder with facts.csv and relations.csv, or the model's own."""
    if name == "pararel":
        return load_pararel()
    if name is not None:
        folder = Path(name)
        if not folder.is_dir():
            raise BadInput(
                f"facts {name!r}: no such folder. Allowed: pararel, or a folder with facts.csv and "
                "relations.csv."
            )
        return read_fact_folder(folder, name=folder.resolve().name)
    if spec.folder is not None and (spec.folder / "relations.csv").is_file():
        return read_fact_folder(spec.folder, name=spec.name)
    return load_pararel()


def asked(config: RunConfig) -> dict[str, Any]:
    """Where things were looked for: no result depends on it, but it takes that to run again."""
    paths = {name: str(path) for name, path in config.model_paths.items()}
    return {"model": config.model, "facts": config.facts, "model_paths": paths}


# What computes a result: the model, its tokens, names that are alike, intervals.
PACKAGES = (
    *("ccm", "torch", "transformers", "transformer_lens", "tokenizers", "numpy", "scipy", "rapidfuzz"),
)


def identity(plan_: Plan) -> dict[str, Any]:
    """Everything a result depends on: two starts with the same identity give the same bytes."""
    config = plan_.config
    facts = [asdict(f) for f in plan_.facts.facts] + [asdict(r) for r in plan_.facts.relations.values()]
    return {
        "model": plan_.spec.name,
        **file_hashes(plan_.spec),
        "facts": plan_.facts.name,
        "facts_sha256": hashlib.sha256(to_json(facts).encode()).hexdigest(),
        "ablation_values": [v.name for v in plan_.values],
        "controls": config.controls,
        "matched_controls": config.matched_controls,
        "seed": config.seed,
        "protocol": plan_.protocol.name,
        "device": plan_.device.type,
        "device_name": (
            torch.cuda.get_device_name(plan_.device)
            if plan_.device.type == "cuda"
            else platform.machine()
        ),
        "device_map": config.device_map,
        "dtype": config.dtype,
        "template": plan_.template,
        "bos": config.bos,
        "k": plan_.k,
        "min_rho": plan_.min_rho,
        "null_space_dims": plan_.null_space_dims,
        "neurons": config.neurons,
        "max_prompts": config.max_prompts,
        "engine": config.engine,
        "full_texts": config.full_texts,
        "stats": config.stats,
        "statistics_sha256": (
            released_statistics_hash(plan_.spec) if config.stats == "released" else None
        ),
        "shard": None if config.share is None else "{}/{}".format(*config.share),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
    }
