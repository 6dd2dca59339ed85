"""A pair is a model and an ablation value; it knows its id, its marks and what it needs to run."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ccm.models.specs import MODELS, PUBLISHED, ModelSpec, spec_for
from ccm.models.weights import check_weights, weight_files
from ccm.paper.comparison import FACTS
from ccm.paper.comparison import rehearsal as why_rehearsal
from conftest import REAL, REPRODUCED, Options


@dataclass(frozen=True)
class Pair:
    """One cell of the grid: models x ablation values."""

    model: str
    ablation_value: str

    @property
    def id(self) -> str:
        """What the test and its golden are called."""
        return f"{self.model}-{self.ablation_value}"

    def param(self, options: Options) -> Any:
        """Return the pytest parameter of this pair; it skips where the run leaves its value out."""
        marks = [pytest.mark.gpu] if self.model in PUBLISHED else []
        run = values_of(self.model, options)
        if self.ablation_value not in run:
            reason = f"of {self.model} only {run[0]} is run here. All values: --models {self.model}"
            marks.append(pytest.mark.skip(reason=reason))
        return pytest.param(self, id=self.id, marks=marks)


def pairs(
    options: Options,
    *,
    published: bool = False,
    model: str | None = None,
    ablation_value: str | None = None,
) -> list[Any]:
    """Every selected pair, as pytest parameters; models of one kind stay together.

    Args:
        options: What is selected.
        published: Only models that the paper prints numbers of.
        model: Only this model, where it is the only one that a test says something about.
        ablation_value: Only this ablation value, likewise.

    Returns:
        The pairs; if there are none, one parameter that skips with the reason.
    """
    models = [m for m in options.models if (m in PUBLISHED or not published) and model in (None, m)]
    found = [
        Pair(m, v).param(options)
        for m in models
        for v in options.ablation_values
        if ablation_value in (None, v)
    ]
    if found:
        return found
    kind = model or ("a published model" if published else "a model")
    reason = (
        f"says something about {kind} under {ablation_value or 'any ablation value'} only, and none is "
        "selected: see --models and --ablation-values"
    )
    return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]


def values_of(model: str, options: Options) -> tuple[str, ...]:
    """The ablation values of a model: of the real one the first, unless it is asked for by name."""
    every = options.ablation_values
    return every[:1] if model == REAL and options.models == REPRODUCED else every


def missing(model: str, options: Options) -> tuple[str, bool] | None:
    """What this machine lacks to run a model, and the way out; whether options make it a failure."""
    # A folder together with --device cpu says that the CPU is meant, and not just all there is.
    on_cpu = options.device == "cpu" and model in options.model_paths
    if model in PUBLISHED and not torch.cuda.is_available() and not on_cpu:
        there = options.model_paths.get(model, "DIR")
        return (
            "needs CUDA: none found. On a machine with a GPU: tox -e gpu. On this CPU, if you say so: "
            f"pytest -m gpu --models {model} --model-path {model}={there} --device cpu",
            options.require_gpu,
        )
    spec = spec_for(model, options.model_paths)
    if not weight_files(spec):
        gated = " (gated: ask for access on its page, and set HF_TOKEN)" if spec.gated else ""
        return (
            f"needs weights of {model}: not in the cache. Download them with "
            f"ccm fetch {model}{gated}, or give --model-path {model}=DIR",
            options.require_weights,
        )
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
    """Why a run of this pair will be no measurement of the model, if it will be none."""
    # ParaRel is what the published models are asked about anyway.
    own = (None, FACTS) if pair.model in PUBLISHED else (None,)
    return why_rehearsal(
        max_prompts=options.max_prompts,
        other_facts=options.facts not in own,
        stand_in=is_stand_in(spec_of(pair, options)),
    )
