"""One run a model, whatever tests ask for it: its scores, its measures, and why there is none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ccm.errors import CcmError, NotAvailable
from ccm.experiment.config import RunConfig
from ccm.experiment.folder import MANIFEST, MEASURES, SINGULAR_VALUES, read_json, read_table
from ccm.experiment.run import run
from ccm.method.ablation import ablation_values
from ccm.method.neurons import NeuronMeasures, select
from ccm.models.specs import PUBLISHED, ModelSpec
from ccm.paper.agreement import Found, compare
from ccm.paper.claims import claims
from ccm.paper.report import Comparison
from ccm.paper.values import printed
from conftest import SEED, Options
from reproduction.pairs import Pair, device_of, is_stand_in, missing, rehearsal, spec_of

N_CONTROLS = 100


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

    def measures(self) -> pd.DataFrame:
        """LogitVar, norm and rho of every last-layer neuron: `logit_var`, `norm`, `rho` by number."""
        table = read_table(self.folder / MEASURES).set_index("neuron_idx")
        return table.rename(columns={"logitvar": "logit_var"})

    def selected(self) -> tuple[int, ...]:
        """The neurons that the selection rule finds, whether or not the run ablated them."""
        table = self.measures()
        measures = NeuronMeasures(
            logit_var=table["logit_var"].to_numpy(),
            norm=table["norm"].to_numpy(),
            rho=table["rho"].to_numpy(),
            singular_values=np.asarray(read_table(self.folder / SINGULAR_VALUES)["singular_value"]),
        )
        return select(measures, self.spec.n_entropy_neurons, self.spec.min_rho)


def config_of(pair: Pair, options: Options, spec: ModelSpec) -> RunConfig:
    """Say how a pair's model is run: all selected ablation values at once.

    A published model follows the released protocol, because the case of the objects decides the
    prompts (defect 11), and ablates the published neurons, so that what differs from the print is not
    another choice of neurons; the rule that finds them is held against the list apart from that.
    """
    published = pair.model in PUBLISHED
    return RunConfig(
        model=pair.model,
        ablation_value=tuple(v.name for v in ablation_values(options.ablation_values)),
        controls=N_CONTROLS,
        # The print knows plain controls only.
        matched_controls=0 if published else N_CONTROLS,
        device=device_of(pair, options),
        dtype=options.dtype,
        seed=SEED,
        protocol="released" if published else "corrected",
        facts=options.facts,
        neurons=spec.published_neurons or None,
        # The threshold belongs to the published weights.
        min_rho=0.0 if is_stand_in(spec) else None,
        max_prompts=options.max_prompts,
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


def found_in(result: Run) -> Found:
    """Collect what a run measured of what the paper prints."""
    if is_stand_in(result.spec):
        why = f"{result.spec.name} is a stand-in of other dimensions, whose neurons are others"
        return Found.of(result.scores, no_weights=why)
    return Found.of(result.scores, measures=result.measures(), selected=result.selected())


def comparison_of(pair: Pair, result: Run, options: Options) -> Comparison:
    """Hold a published model's run against the paper."""
    paper, identity = printed(pair.model), result.manifest["identity"]
    what = [f"{result.scores['n_prompts']} prompts", identity["device_name"], identity["dtype"]]
    what += [r for r in [rehearsal(pair, options)] if r is not None]
    return Comparison(
        model=pair.model,
        display_name=result.spec.display_name,
        what_ran=", ".join(what),
        provenance=identity,
        rows=tuple(compare(paper, found_in(result))),
        claims=tuple(claims(paper, result.scores)),
    )
