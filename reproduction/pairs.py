"""A pair is a model and an ablation value; it knows its id, its marks and what it needs to run."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ccm.models import MODELS, PUBLISHED, ModelSpec, spec_for
from ccm.weights import check_weights, weight_files
from conftest import Options


@dataclass(frozen=True)
class Pair:
    """One cell of the grid: models x ablation values."""

    model: str
    ablation_value: str

    @property
    def id(self) -> str:
        """What the test and its golden are called."""
        return f"{self.model}-{self.ablation_value}"

    def param(self) -> Any:
        """Return the pytest parameter of this pair."""
        marks = [pytest.mark.gpu] if self.model in PUBLISHED else []
        return pytest.param(self, id=self.id, marks=marks)


def pairs(options: Options, *, published: bool = False) -> list[Any]:
    """Every selected pair, as pytest parameters; models of one kind stay together.

    Args:
        options: What is selected.
        published: Only models that the paper prints numbers of.
    """
    models = [m for m in options.models if m in PUBLISHED or not published]
    return [Pair(m, v).param() for m in models for v in options.ablation_values]


def missing(pair: Pair, options: Options) -> tuple[str, bool] | None:
    """What this machine lacks to run a pair, and whether an option makes that a failure."""
    # A folder together with --device cpu says that the CPU is meant, and not just all there is.
    on_cpu = options.device == "cpu" and pair.model in options.model_paths
    if pair.model in PUBLISHED and not torch.cuda.is_available() and not on_cpu:
        return "needs CUDA: none found", options.require_gpu
    spec = spec_for(pair.model, options.model_paths)
    if not weight_files(spec):
        where = f"not in the cache; give --model-path {spec.name}=DIR"
        return f"needs weights of {spec.name}: {where}", options.require_weights
    return None


def spec_of(pair: Pair, options: Options) -> ModelSpec:
    """The spec of a pair's model, as the weights that are here have it."""
    return check_weights(spec_for(pair.model, options.model_paths))


def device_of(pair: Pair, options: Options) -> str:
    """Where a pair runs: published models where asked, everything else on the CPU."""
    return options.device if pair.model in MODELS and pair.model in PUBLISHED else "cpu"


def is_stand_in(spec: ModelSpec) -> bool:
    """Whether a published name stands for a folder of other dimensions."""
    return spec.name in PUBLISHED and not spec.published_neurons


def rehearsal(pair: Pair, options: Options) -> str | None:
    """Why a run of this pair is no measurement of the model, if it is none."""
    if options.max_prompts is not None:
        return f"a rehearsal: --max-prompts {options.max_prompts}"
    # ParaRel is what the published models are asked about anyway.
    if options.facts is not None and (options.facts != "pararel" or pair.model not in PUBLISHED):
        return "a rehearsal: other facts"
    if is_stand_in(spec_of(pair, options)):
        return "a rehearsal: a stand-in of other dimensions"
    return None
