"""One run per model, whatever tests ask for it: its folder read back, and why there is none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from ccm.errors import CcmError, NotAvailable
from ccm.experiment.config import RunConfig
from ccm.experiment.files import read_json
from ccm.experiment.folder import MANIFEST
from ccm.experiment.results import RunResults, read_results
from ccm.experiment.run import run
from ccm.method.neurons import select
from ccm.models.specs import PUBLISHED, ModelSpec
from conftest import REAL, SEED, Options
from reproduction.pairs import Pair, device_of, is_stand_in, missing, spec_of, values_of

# Less of the real model, whose whole experiment is `tox -e real`: all facts, a third of the prompts.
N_CONTROLS, N_REAL_CONTROLS, N_REAL_PROMPTS = 100, 20, 500


def n_controls(model: str) -> int:
    """Plain controls that a model is run with."""
    return N_REAL_CONTROLS if model == REAL else N_CONTROLS


def n_prompts(model: str) -> int | None:
    """Most probing prompts that a model is run with; None for all."""
    return N_REAL_PROMPTS if model == REAL else None


def n_matched(model: str) -> int:
    """Matched controls: the print knows none, and no golden of the real model holds any."""
    return 0 if model == REAL or model in PUBLISHED else N_CONTROLS


@dataclass(frozen=True)
class Run:
    """A finished run folder; read-only."""

    spec: ModelSpec
    folder: Path
    scores: Mapping[str, Any]

    @property
    def manifest(self) -> dict[str, Any]:
        """What was run, on what, with what."""
        return dict(read_json(self.folder / MANIFEST))

    @property
    def exact(self) -> bool:
        """Whether its counts are the same on every machine."""
        return bool(self.manifest["identity"]["dtype"] == "float32")

    @cached_property
    def results(self) -> RunResults:
        """The folder, read back."""
        return read_results(self.folder)

    def selected(self) -> tuple[int, ...]:
        """The neurons that the selection rule finds, whether or not the run ablated them."""
        return select(self.results.neuron_measures, self.spec.n_entropy_neurons, self.spec.min_rho)


def config_of(pair: Pair, options: Options, spec: ModelSpec) -> RunConfig:
    """Say how a pair's model is run: all selected ablation values at once.

    A published model follows the released protocol, because the case of the objects decides the
    prompts (defect 11), and ablates the published neurons, so that what differs from the print is not
    another choice of neurons; the rule that finds them is held against the list apart from that.
    """
    published = pair.model in PUBLISHED
    return RunConfig(
        model=pair.model,
        ablation_values=values_of(pair.model, options),
        controls=n_controls(pair.model),
        matched_controls=n_matched(pair.model),
        device=device_of(pair, options),
        dtype=options.dtype,
        seed=SEED,
        protocol="released" if published else "corrected",
        facts=options.facts or ("world" if pair.model == REAL else None),
        neurons=spec.published_neurons or None,
        # The threshold belongs to the published weights.
        min_rho=0.0 if is_stand_in(spec) else None,
        max_prompts=options.max_prompts or n_prompts(pair.model),
        model_paths=options.model_paths,
    )


@dataclass
class Runs:
    """Runs each model once and remembers how it ended."""

    options: Options
    root: Path
    done: dict[str, Run] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __call__(self, pair: Pair) -> Run:
        """Return the run of a pair's model; skips the test where the machine cannot run it.

        An error is a failure of the first test that needs the run, and the others skip with it.
        """
        lacking = missing(pair.model, self.options)
        if lacking is not None:
            reason, fail = lacking
            (pytest.fail if fail else pytest.skip)(reason)
        if pair.model in self.failed:
            pytest.skip(f"no run of {pair.model}: {self.failed[pair.model]}")
        if pair.model not in self.done:
            self._run(pair)
        return self.done[pair.model]

    def _run(self, pair: Pair) -> None:
        folder = self.root / pair.model
        try:
            spec = spec_of(pair, self.options)
            scores = run(config_of(pair, self.options, spec), folder)
        except CcmError as error:
            message = str(error)
            if isinstance(error, NotAvailable) and not self.options.network:
                message += " Or let tests use the network: --force-enable-socket."
            self.failed[pair.model] = message
            # What is not on this machine (facts that cannot be downloaded) is no failure of the code.
            here = isinstance(error, NotAvailable) and not self.options.require_weights
            (pytest.skip if here else pytest.fail)(f"no run of {pair.model}: {message}")
        self.done[pair.model] = Run(spec, folder, scores)
