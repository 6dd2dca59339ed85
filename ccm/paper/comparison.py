"""One finished run compared with the paper: every row and claim, and whether it is the paper's run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ccm.errors import BadInput, listed
from ccm.experiment.results import RunResults
from ccm.method.neurons import select
from ccm.models.specs import MODELS
from ccm.paper.agreement import Found, compare
from ccm.paper.claims import Claim, claims
from ccm.paper.values import PrintedModel, printed
from ccm.paper.verdicts import Row

FACTS = "pararel"  # what the paper asks about
CLAIM_HEADER = ("claim (mean ablation)", "here", "as printed", "numbers")
ROW_HEADER = ("ablation value", "quantity", "paper", "ours", "margin", "interval", "verdict")


@dataclass(frozen=True)
class Comparison:
    """One model's run, compared with the paper."""

    model: str
    display_name: str
    what_ran: str  # prompts, device, dtype; and how the run differs from the paper's
    provenance: Mapping[str, Any]  # identity of the run
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]

    @property
    def row_cells(self) -> list[tuple[str, ...]]:
        """The rows as texts, in the order of `ROW_HEADER`."""
        return [row_cells(row) for row in self.rows]

    @property
    def claim_cells(self) -> list[tuple[str, ...]]:
        """The claims as texts, in the order of `CLAIM_HEADER`."""
        return [claim_cells(claim) for claim in self.claims]


def row_cells(row: Row) -> tuple[str, ...]:
    """Write one compared quantity as texts, in the order of `ROW_HEADER`."""
    numbers = ("-", "-")
    if row.interval is not None and row.margin is not None:
        low, high = row.interval
        numbers = (f"{row.margin:+.3g}", f"{low:.3g} to {high:.3g}")
    note = str(row.verdict)
    if row.defect is not None:
        note += f" (defect {row.defect}: {row.reason})"
    elif row.reason:
        note += f" ({row.reason})"
    return (row.ablation_value or "-", row.quantity, row.paper_text, row.ours_text, *numbers, note)


def claim_cells(claim: Claim) -> tuple[str, ...]:
    """Write one claim as texts, in the order of `CLAIM_HEADER`."""
    yes = {True: "yes", False: "no", None: "-"}
    statement = f"{claim.name}: {claim.statement}"
    return (statement, yes[claim.holds], yes[claim.as_printed], claim.detail)


# --- is it the paper's run? --------------------------------------------------------------------------


def rehearsal(*, max_prompts: int | None, other_facts: bool, stand_in: bool) -> str | None:
    """Say why a run is not a measurement of its model; None if it is one.

    Args:
        max_prompts: How many prompts the run was limited to, if it was.
        other_facts: Whether it asked about other facts than the model's own.
        stand_in: Whether its weights are of other dimensions than the model's.

    >>> rehearsal(max_prompts=60, other_facts=True, stand_in=False)
    'a rehearsal: --max-prompts 60 and other facts'
    """
    reasons = {
        f"--max-prompts {max_prompts}": max_prompts is not None,
        "other facts": other_facts,
        "a stand-in of other dimensions": stand_in,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return f"a rehearsal: {listed(found)}" if found else None


def is_stand_in(run: RunResults) -> bool:
    """Return whether a run's weights have other dimensions than the model that it names."""
    spec = MODELS[run.model]
    n_layers = spec.n_layers if run.rho_by_layer.empty else int(run.rho_by_layer["layer"].max()) + 1
    found = (n_layers, len(run.singular_values), len(run.measures))
    return found != (spec.n_layers, spec.d_model, spec.d_mlp)


def _asks_other_facts(run: RunResults) -> bool:
    """Return whether a run asks about other facts than ParaRel; a folder may have that name, too."""
    asked = run.manifest.get("asked", {}).get("facts")
    return run.identity.get("facts") != FACTS or asked not in (None, FACTS)


def _other_settings(run: RunResults, paper: PrintedModel) -> str | None:
    """Say which settings of a run differ from those of the printed one."""
    spec, identity = MODELS[run.model], run.identity
    theirs = sorted(n.neuron for n in paper.neurons)
    dims, template, bos = (identity.get(key) for key in ("null_space_dims", "template", "bos"))
    departures = {
        f"{identity.get('protocol')} protocol": identity.get("protocol") != "released",
        f"template {template}": template != spec.template,
        f"BOS {bos}": bos != "own",
    }
    if not is_stand_in(run):  # a stand-in has neurons and dimensions of its own
        departures["other neurons than the published ones"] = run.entropy_neurons != theirs
        departures[f"null space of {dims} dimensions"] = dims != spec.null_space_dims
    found = [departure for departure, holds in departures.items() if holds]
    return f"unlike the paper's run: {listed(found)}" if found else None


# --- the comparison ----------------------------------------------------------------------------------


def found_in(run: RunResults) -> Found:
    """Collect what a run measured of what the paper prints."""
    spec = MODELS[run.model]
    if is_stand_in(run):
        why = f"{run.model} is a stand-in of other dimensions, whose neurons are others"
        return Found.of(run.scores, no_weights=why)
    try:
        selected = select(run.neuron_measures, spec.n_entropy_neurons, spec.min_rho)
    except BadInput:  # too few neurons reach the threshold: the rule finds no set
        selected = ()
    measures = run.measures.set_index("neuron_idx").rename(columns={"logitvar": "logit_var"})
    return Found.of(run.scores, measures=measures, selected=selected)


def comparison_of(run: RunResults) -> Comparison:
    """Compare the run of a published model with the paper.

    Raises:
        BadInput: the paper printed no number of its model.
    """
    paper, identity = printed(run.model), run.identity
    no_measurement = rehearsal(
        max_prompts=identity.get("max_prompts"),
        other_facts=_asks_other_facts(run),
        stand_in=is_stand_in(run),
    )
    what = [f"{run.scores['n_prompts']} prompts", identity.get("device_name"), identity.get("dtype")]
    what += [no_measurement, _other_settings(run, paper)]
    return Comparison(
        model=run.model,
        display_name=run.display_name,
        what_ran=", ".join(str(part) for part in what if part is not None),
        provenance=dict(identity),
        rows=tuple(compare(paper, found_in(run))),
        claims=tuple(claims(paper, run.scores)),
    )
