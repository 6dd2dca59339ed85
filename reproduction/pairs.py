"""A pair is a model and an ablation value; it knows its id, its marks and what it needs to run."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ccm.models import MODELS, PUBLISHED, spec_for
from ccm.weights import weight_files
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


def pairs(options: Options) -> list[Any]:
    """Every selected pair, as pytest parameters; models of one kind stay together."""
    return [Pair(m, v).param() for m in options.models for v in options.ablation_values]


def missing(pair: Pair, options: Options) -> tuple[str, bool] | None:
    """What this machine lacks to run a pair, and whether an option makes that a failure."""
    if pair.model in PUBLISHED and not torch.cuda.is_available():
        return "needs CUDA: none found", options.require_gpu
    spec = spec_for(pair.model, options.model_paths)
    if not weight_files(spec):
        where = f"not in the cache; give --model-path {spec.name}=DIR"
        return f"needs weights of {spec.name}: {where}", options.require_weights
    return None


def device_of(pair: Pair, options: Options) -> str:
    """Where a pair runs: published models where asked, everything else on the CPU."""
    return options.device if pair.model in MODELS and pair.model in PUBLISHED else "cpu"
