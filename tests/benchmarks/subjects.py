"""What is benchmarked: the organism's own prompts, and random weights of real dimensions."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from ccm.decoding.activations import collect
from ccm.decoding.results import Decided
from ccm.decoding.shared import answered, decode
from ccm.experiment.cells import decided_sources
from ccm.experiment.effects import evenly_spaced
from ccm.experiment.fact_files import load_world, read_fact_folder
from ccm.experiment.probing import build_prompts
from ccm.method.ablation import Ablation, plan
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.neurons import controls, measure, select
from ccm.method.protocol import PROTOCOLS
from ccm.method.statistics import ActivationStatistics
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import CHECKPOINT, MODELS, spec_for
from ccm.models.weights import unfinished
from conftest import REAL

SEED = 123
N_REAL_PROMPTS = 96
PLANTED = (29, 97, 168, 211, 307, 352)


@dataclass(frozen=True)
class Subject:
    """A model with prompts, and all that is needed to plan ablations."""

    model: LoadedModel
    prompts: list[list[int]]
    statistics: ActivationStatistics
    entropy: tuple[int, ...]
    decided: Decided = answered  # of a prompt with objects: whether its source is known

    def ablations(self, values: Sequence[str], n_controls: int) -> list[Ablation]:
        """Entropy set and controls under these ablation values."""
        drawn = controls(n_controls, self.model.spec.d_mlp, self.entropy, SEED)
        return [
            plan("entropy" if i == 0 else f"control_{i - 1:03d}", neurons, value, self.statistics)
            for value in map(ABLATION_VALUES.__getitem__, values)
            for i, neurons in enumerate([self.entropy, *drawn])
        ]


@cache
def organism() -> Subject:
    """The embedded organism with its own 1,326 prompts."""
    model = load(MODELS["organism"])
    built = build_prompts(model, read_fact_folder(CHECKPOINT, "organism"), "bare")
    prompts = [model.encode(p.text) for p in built.prompts]
    decided = decided_sources(built.prompts, PROTOCOLS["corrected"])
    return Subject(model, prompts, collect(model, prompts)[0], PLANTED, decided)


@cache
def real_model() -> Subject:
    """SmolLM2 with 96 prompts of every sixth fact of the world."""
    spec = spec_for(REAL)
    if unfinished(spec):
        pytest.skip(f"needs the weights of {REAL}: ccm fetch {REAL}")
    model, world = load(spec), load_world()
    built = build_prompts(model, replace(world, facts=world.facts[::6]), spec.template)
    some = [built.prompts[i] for i in evenly_spaced(len(built.prompts), N_REAL_PROMPTS)]
    prompts = [model.encode(p.text) for p in some]
    measures = measure(model.W_U, model.W_out, model.final_norm, spec.null_space_dims)
    entropy = select(measures, spec.n_entropy_neurons, spec.min_rho)
    decided = decided_sources(some, PROTOCOLS["corrected"])
    statistics = collect(model, prompts, decode)[0]
    return Subject(model, prompts, statistics, entropy, decided)


@cache
def gpt2_dimensions() -> Subject:
    """Random weights of GPT-2 small's dimensions, and 128 random prompts of 14 to 26 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = Path(tempfile.mkdtemp())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(CHECKPOINT / name, folder)
        model = load(spec_for(str(folder)))
    finally:
        shutil.rmtree(folder)
    random = torch.Generator().manual_seed(SEED)
    prompts = [
        [0, *torch.randint(1, 50257, (13 + i % 13,), generator=random).tolist()] for i in range(128)
    ]
    return Subject(model, prompts, collect(model, prompts)[0], (1, 20, 300, 1000, 2000, 3000))
