"""A run's configuration, checked against its model before any weights are loaded; its identity."""

import hashlib
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from importlib.metadata import version
from math import comb
from pathlib import Path
from typing import Any

import torch

from ccm.decoding.engines import AUTO, ENGINES
from ccm.errors import BadInput, allowed, one_of
from ccm.experiment.config import RunConfig
from ccm.experiment.fact_files import load_pararel, load_world, pararel_at_hand, read_fact_folder
from ccm.experiment.files import to_json
from ccm.experiment.options import PUBLISHED_NEURONS, option_of
from ccm.experiment.released_stats import read_released_statistics, released_statistics_hash
from ccm.method.ablation import check_neurons
from ccm.method.ablation_values import AblationValue, ablation_values
from ccm.method.facts import FactSet
from ccm.method.prompts import TEMPLATE_ALIASES, TEMPLATES
from ccm.method.protocol import PROTOCOLS, Protocol
from ccm.models.devices import device_for
from ccm.models.specs import MODELS, ModelSpec, spec_for
from ccm.models.tokenizer import Bos, parse_bos
from ccm.models.weights import check_weights, file_hashes

_log = logging.getLogger(__name__)
FACTS: Mapping[str, Callable[[], FactSet]] = {"pararel": load_pararel, "world": load_world}


@dataclass(frozen=True)
class Plan:
    """A `RunConfig` with every name looked up and every number checked."""

    config: RunConfig
    spec: ModelSpec
    facts: FactSet
    template: str
    bos: Bos
    protocol: Protocol
    values: tuple[AblationValue, ...]
    neurons: tuple[int, ...] | None  # a fixed entropy set instead of the selection rule
    k: int
    min_rho: float
    null_space_dims: int
    matched_controls: int
    device: torch.device


def make_plan(config: RunConfig, spec: ModelSpec | None = None, facts: FactSet | None = None) -> Plan:
    """Check a configuration without loading any weights.

    Args:
        config: What to run.
        spec: Spec of a model without a checkpoint; no weights are looked for.
        facts: Used instead of those that the configuration names.

    Raises:
        BadInput: a name, number or file cannot be used.
        NotAvailable: a device or data are not available.
    """
    protocol = PROTOCOLS[config.protocol]
    values = tuple(ablation_values(config.ablation_values))
    if spec is None:
        spec = find_model(config)
    _check_engine(config)
    if config.stats == "released":
        read_released_statistics(spec, finite=protocol.name != "released")
    device = device_for(config.device)
    template = config.template or spec.template
    template = one_of("template", TEMPLATE_ALIASES.get(template, template), TEMPLATES)
    bos = parse_bos(config.bos)
    if isinstance(bos, int) and bos >= spec.d_vocab:
        raise BadInput(
            f"--bos {bos}: no token of {spec.name}. Allowed: own, none, 0 to {spec.d_vocab - 1}."
        )
    neurons, rule = _neurons(config, spec), check_measures(config, spec)
    k = rule["k"] if neurons is None else len(neurons)
    matched = config.controls if config.matched_controls is None else config.matched_controls
    _check_controls(config.controls, matched, k, spec.d_mlp, protocol)
    return Plan(
        config=config,
        spec=spec,
        facts=facts or find_facts(config.facts, spec),
        template=template,
        bos=bos,
        protocol=protocol,
        values=values,
        neurons=neurons,
        k=k,
        min_rho=rule["min_rho"],
        null_space_dims=rule["null_space_dims"],
        matched_controls=matched,
        device=device,
    )


def new_folder(config: RunConfig) -> Path:
    """Name a new run folder after the model, the ablation values and the time.

    Raises:
        CcmError: the configuration cannot be run.
    """
    make_plan(config)
    values = config.ablation_values
    what = "all_ablation_values" if values == ("all",) else ",".join(values)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    shard = "" if config.shard is None else "-shard-{}-of-{}".format(*config.shard)
    return Path("runs") / f"{Path(config.model).name}-{what}-{stamp}{shard}"


def check_measures(config: RunConfig, spec: ModelSpec) -> dict[str, Any]:
    """Check the selection rule against the model: `k`, `min_rho` and `null_space_dims`.

    Raises:
        BadInput: more neurons or directions than the model has.
    """
    k = config.k or spec.n_entropy_neurons
    if k > spec.d_mlp:
        raise BadInput(
            f"k={k} entropy neurons: out of range. Allowed: 1 to {spec.d_mlp} (d_mlp of {spec.name})."
        )
    dims = spec.null_space_dims if config.null_space_dims is None else config.null_space_dims
    if dims > spec.d_model:
        raise BadInput(
            f"null-space dimensions {dims}: out of range. Allowed: 1 to {spec.d_model} (d_model)."
        )
    min_rho = spec.min_rho if config.min_rho is None else config.min_rho
    return {"k": k, "min_rho": min_rho, "null_space_dims": dims}


def find_model(config: RunConfig) -> ModelSpec:
    """Find the model that a configuration names, and check its weights as far as they are here.

    Raises:
        BadInput: no such model, unusable weights, or a path given for a model that is not run.
        NotAvailable: a hub that cannot be reached, a model cache that cannot be written to.
    """
    for name in config.model_paths:
        if name not in (*MODELS, config.model):
            raise BadInput(
                f"--model-path {name}=...: no model of that name is run. {allowed(MODELS)}, or the "
                "name that --model gives."
            )
    return check_weights(spec_for(config.model, config.model_paths, config.revision))


def _neurons(config: RunConfig, spec: ModelSpec) -> tuple[int, ...] | None:
    """Return the fixed entropy set, if one is asked for."""
    if config.neurons is None:
        return None
    if config.neurons == PUBLISHED_NEURONS:
        if not spec.published_neurons:
            raise BadInput(f"--neurons published: none are published for {spec.name}. Give 1,2,3.")
        return spec.published_neurons
    return check_neurons(tuple(map(int, config.neurons)), spec.d_mlp)


def _check_controls(controls: int, matched: int, k: int, d_mlp: int, protocol: Protocol) -> None:
    """Check that enough distinct sets of either kind exist."""
    pool = d_mlp if protocol.controls_overlap else d_mlp - k
    plain = comb(pool, k) - int(protocol.controls_overlap)
    for what, n, of, exist in (
        ("controls", controls, pool, plain),
        ("matched controls", matched, d_mlp - k, comb(d_mlp - k, k)),
    ):
        if n > exist:
            raise BadInput(
                f"{n} {what}: out of range. Allowed: 0 to {exist}, the distinct sets of {k} of {of} "
                f"neurons. Lower --{what.replace(' ', '-')}."
            )


def _check_engine(config: RunConfig) -> None:
    """Check that the engine supports the options given, and that a device map has its device."""
    for name in ("shard", "device_map"):
        value = getattr(config, name)
        # `auto` may fall back on an engine that supports less; the run is refused then.
        takes = ENGINES["shared" if config.engine == AUTO else config.engine].TAKES
        if value is not None and name not in takes:
            able = [engine for engine in ENGINES if name in ENGINES[engine].TAKES]
            raise BadInput(
                f"{name.replace('_', ' ')} {value}: not with engine {config.engine!r}. Use --engine "
                f"{' or '.join(able)}."
            )
    if config.device_map is not None and config.device != "cuda":
        raise BadInput(f"device map auto: not with device {config.device!r}. Use --device cuda.")


def find_facts(name: str | None, spec: ModelSpec) -> FactSet:
    """Find the facts that are named, or else the model's own, or else those that are at hand.

    Args:
        name: `pararel`, `world`, a folder with facts.csv and relations.csv, or None.
        spec: The model's spec. The published models get ParaRel, as in the paper.

    Raises:
        BadInput: no such folder, or files that hold no facts.
        NotAvailable: ParaRel has to be downloaded and cannot be.
    """
    if name is not None and name in FACTS:
        return FACTS[name]()
    if name is not None:
        folder = Path(name)
        if not folder.is_dir():
            raise BadInput(
                f"facts {name!r}: no such folder. Allowed: {', '.join(FACTS)}, or a folder with "
                "facts.csv and relations.csv."
            )
        return read_fact_folder(folder, name=folder.resolve().name)
    if spec.folder is not None and (spec.folder / "relations.csv").is_file():
        return read_fact_folder(spec.folder, name=spec.name)
    if spec.published_neurons or pararel_at_hand():
        return load_pararel()
    _log.warning(
        f"{spec.name}: asked about the facts of the world that come with ccm (--facts world), because "
        "ParaRel is not at hand (--facts pararel downloads it)"
    )
    return load_world()


# Packages that a result depends on: for the model, its tokens, similar names, intervals.
PACKAGES = (
    *("ccm", "torch", "transformers", "transformer_lens", "tokenizers", "numpy", "scipy", "rapidfuzz"),
)


def identity(plan_: Plan, hashes: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """Gather everything that a result depends on: the same identity gives the same bytes.

    Args:
        plan_: What is run.
        hashes: Hashes of the model's files; by default those of its checkpoint.
    """
    config = plan_.config
    facts = [asdict(f) for f in plan_.facts.facts] + [asdict(r) for r in plan_.facts.relations.values()]
    options = {f.name: getattr(config, f.name) for f in fields(config) if option_of(f).result}
    decided = {
        "ablation_values": [v.name for v in plan_.values],
        **{name: getattr(plan_, name) for name in ("template", "neurons", "k", "min_rho")},
        **{name: getattr(plan_, name) for name in ("null_space_dims", "matched_controls")},
    }
    released = config.stats == "released"
    return {
        "model": plan_.spec.name,
        **(file_hashes(plan_.spec) if hashes is None else hashes),
        "facts": plan_.facts.name,
        "facts_sha256": hashlib.sha256(to_json(facts).encode()).hexdigest(),
        "statistics_sha256": released_statistics_hash(plan_.spec) if released else None,
        **{name: decided.get(name, value) for name, value in options.items()},
        "device": plan_.device.type,
        "device_name": (
            torch.cuda.get_device_name(plan_.device)
            if plan_.device.type == "cuda"
            else platform.machine()
        ),
        "shard": None if config.shard is None else "{}/{}".format(*config.shard),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
    }
