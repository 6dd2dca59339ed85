"""The dress rehearsal: every stage of a run on a published architecture with random weights.

Time and memory follow from shapes, so they can be measured before a checkpoint of many gigabytes is
downloaded. Prompts are built from the facts themselves, because a random model knows no object: its
parametric object is taken to be the true one, and three other objects of the relation contradict it.
"""

import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ccm.decoding.shared import decode
from ccm.errors import BadInput
from ccm.experiment.fact_files import load_pararel, pararel_folder, read_fact_folder
from ccm.experiment.folder import RunFolder
from ccm.experiment.rehearsal.profiler import Meter, Say
from ccm.experiment.rehearsal.projection import PUBLISHED_FACTS, PUBLISHED_PROMPTS, Rehearsal, project
from ccm.experiment.rehearsal.stages import RehearsalConfig, Stages
from ccm.method.ablation_values import ablation_values
from ccm.method.facts import FactSet
from ccm.method.prompts import (
    N_COUNTER_OBJECTS,
    Candidate,
    ParametricAnswer,
    counter_candidates,
    filter_answers,
)
from ccm.models.bridge import Tokens
from ccm.models.devices import device_for, dtype_for
from ccm.models.memory import check_memory, needed_bytes
from ccm.models.random import (
    LETTERS,
    Architecture,
    architecture_of,
    build,
    n_parameters,
)
from ccm.models.specs import CHECKPOINT, MODELS, dimensions
from ccm.models.tokenizer import read_tokenizer


def rehearsal_facts() -> FactSet:
    """Return the ParaRel facts where `CCM_DATA_DIR` has them, else the organism's; no download."""
    if pararel_folder() is not None:
        return load_pararel()
    return read_fact_folder(CHECKPOINT, "the organism's")


def choose_facts(
    facts: FactSet, n_prompts: int
) -> tuple[list[ParametricAnswer], Mapping[str, list[Candidate]]]:
    """Choose facts as a model that knows all of them would be probed on, evenly over the relations.

    Args:
        facts: Facts and relations.
        n_prompts: Prompts wanted, up to three a fact.

    Returns:
        Answers whose parametric object is the true one (no tokens yet), and all objects by relation.

    Raises:
        BadInput: fewer than 3 prompts, or more than the facts give.
    """
    answers = [ParametricAnswer(row, f, "", "", f.object, 0) for row, f in enumerate(facts.facts)]
    answers = filter_answers(answers, facts.relations)
    candidates = counter_candidates(answers)
    probed = [a for a in answers if len(candidates[a.fact.relation]) > N_COUNTER_OBJECTS]
    most = N_COUNTER_OBJECTS * len(probed)
    if not N_COUNTER_OBJECTS <= n_prompts <= most:
        raise BadInput(
            f"--prompts {n_prompts}: out of range. Allowed: {N_COUNTER_OBJECTS} (those of one fact) to "
            f"{most}, of {facts.name} facts."
        )
    n_facts = ceil(n_prompts / N_COUNTER_OBJECTS)
    chosen = np.linspace(0, len(probed) - 1, n_facts).round().astype(int)
    return [probed[i] for i in chosen], candidates


def _to_stderr(text: str) -> None:
    print(f"rehearsal: {text}", file=sys.stderr)


# --- the rehearsal ------------------------------------------------------------------------------------


def rehearse(
    config: RehearsalConfig,
    *,
    architecture: Architecture | None = None,
    facts: FactSet | None = None,
    keep: Path | None = None,
    say: Say = _to_stderr,
) -> Rehearsal:
    """Build a published architecture with random weights and run every stage of a run on it.

    Args:
        config: What to rehearse.
        architecture: A smaller model of the family instead of the real one: a rehearsal in seconds,
            whose projection says nothing about the real one.
        facts: Facts to build prompts of; by default those of `rehearsal_facts`.
        keep: Folder for what a run would leave behind; by default it goes with the rehearsal.
        say: Told what begins.

    Returns:
        What was measured and what follows for the published numbers of facts and prompts.

    Raises:
        BadInput, NotAvailable: before anything is built.
    """
    hf_config = (architecture or architecture_of(config.model)).config()
    values = ablation_values(config.ablation_value)
    device, dtype = device_for(config.device), dtype_for(config.dtype)
    _check(config, hf_config, keep)
    facts = facts or rehearsal_facts()
    answers, candidates = choose_facts(facts, config.prompts)
    parameters = n_parameters(hf_config)
    needed = needed_bytes(replace(MODELS[config.model], **dimensions(hf_config)), parameters, dtype)
    check_memory(config.model, needed, device, dtype)
    origin: dict[str, Any] = {
        "model": config.model,
        "seed": config.seed,
        "dtype": config.dtype,
        "device": device.type,
        "controls": config.controls,
        "prompts": config.prompts,
        "ablation_values": [v.name for v in values],
        "versions": _versions(),
    }
    identity = {**origin, "weights": "random", "protocol": "corrected", "facts": facts.name}
    meter = Meter(device, say)
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(keep or Path(scratch) / "run", identity)
        with meter.stage("build"):
            model = build(
                config.model, hf_config, device, dtype, tokenizer=config.tokenizer, seed=config.seed
            )
            # One answer, so that what is set up at first use is not counted again for every prompt.
            decode(model, [[model.bos or 0]])
        stages = Stages(config, model, facts, values, meter, folder, Path(scratch))
        stages.run(answers, candidates)
    measured = tuple(meter.stages)
    return Rehearsal(
        **origin,
        parameters=parameters,
        weight_bytes=parameters * dtype.itemsize,
        device_name=(
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        ),
        threads=torch.get_num_threads(),
        memory=meter.memory,
        tokenizer=_tokenizer_name(config),
        facts_name=facts.name,
        facts=len(answers),
        mean_prompt_tokens=_mean_length(stages.tokens),
        mean_fact_prompt_tokens=_mean_length(stages.asked),
        first_prompt_tokens=list(stages.tokens[0]),
        entropy_neurons=list(stages.entropy),
        stages=measured,
        work={name: work.as_dict() for name, work in stages.work.items()},
        published=project(measured, PUBLISHED_FACTS, PUBLISHED_PROMPTS[config.model]),
    )


def _check(config: RehearsalConfig, hf_config: Any, keep: Path | None) -> None:
    """Refuse numbers and folders that cannot be used."""
    if not 0 <= config.seed < 2**32:
        raise BadInput(f"seed {config.seed}: out of range. Allowed: 0 to {2**32 - 1}.")
    if config.controls < 0:
        raise BadInput(f"{config.controls} controls: out of range. Allowed: 0 and more.")
    if config.tokenizer is not None:
        read_tokenizer(config.tokenizer, int(hf_config.vocab_size), "--tokenizer")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise BadInput(f"--keep {keep}: not an empty folder. Nothing was written; give another one.")


def _versions() -> dict[str, str]:
    packages = ("ccm", "torch", "transformers", "transformer_lens", "numpy")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


def _tokenizer_name(config: RehearsalConfig) -> str:
    if config.tokenizer is None:
        return f"a stand-in that cuts words into pieces of {LETTERS} letters"
    return config.tokenizer.resolve().name


def _mean_length(rows: Sequence[Tokens]) -> float:
    return float(np.mean([len(row) for row in rows]))
