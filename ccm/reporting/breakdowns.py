"""Effects broken down: relation by relation, and transition by transition (Method 3, 8).

A mean over all prompts may come from a few relations, or from one kind of transition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Int8

from ccm.experiment.results import RunResults, source_codes
from ccm.method.scores import (
    ControlSummary,
    Ratio,
    conversion_ratio,
    global_transition_score,
    summarise,
)
from ccm.method.sources import SOURCES, Source

CK = SOURCES.index("CK")


def facts_of(prompts: pd.DataFrame) -> Int[np.ndarray, "prompt"]:
    """Number prompts by their facts; the prompts of one fact contradict it in different ways."""
    groups = prompts.groupby(["statement_subject", "rel_lemma"], sort=False, dropna=False)
    return np.asarray(groups.ngroup(), dtype=np.int64)


@dataclass(frozen=True)
class RelationEffect:
    """What an ablation did to the prompts of one relation, or of one group of relations."""

    name: str
    group: str
    prompts: int
    gts: Ratio  # of the entropy set
    gts_controls: ControlSummary
    cr_ck: Ratio
    cr_ck_controls: ControlSummary


def group_effects(run: RunResults, value: str) -> list[RelationEffect]:
    """Score every relation group separately, in the order of the relations table.

    Args:
        run: A finished run.
        value: Name of the ablation value.
    """
    groups = list(dict.fromkeys(run.relation_groups.values()))
    return _effects(run, value, "relation_group_id", groups, groups)


def relation_effects(run: RunResults, value: str) -> list[RelationEffect]:
    """Score every relation separately, group by group; arguments as for `group_effects`."""
    of, groups = run.relation_groups, list(dict.fromkeys(run.relation_groups.values()))
    # Sorting is stable: within a group the order of the table.
    names = sorted(of, key=lambda name: groups.index(of[name]))
    return _effects(run, value, "rel_lemma", names, [of[name] for name in names])


def _effects(
    run: RunResults, value: str, column: str, names: Sequence[str], groups: Sequence[str]
) -> list[RelationEffect]:
    index = {name: i for i, name in enumerate(names)}
    part = np.asarray([index[str(name)] for name in run.prompts[column]], dtype=np.int64)
    before = source_codes(run.plain["source"])
    (own,) = _transition_counts(
        part, before, source_codes(run.ablated[value]["source"])[None], len(names)
    )
    controls = _transition_counts(part, before, run.control_sources[value], len(names))
    gts, cr_ck = _gts_percent(controls), _cr_ck_percent(controls)
    found = []
    for i, (name, group) in enumerate(zip(names, groups, strict=True)):
        own_gts, own_cr_ck = global_transition_score(own[i]), conversion_ratio(own[i], "CK")
        found.append(
            RelationEffect(
                name=name,
                group=group,
                prompts=int(own[i].sum()),
                gts=own_gts,
                gts_controls=_summary(own_gts, gts[:, i]),
                cr_ck=own_cr_ck,
                cr_ck_controls=_summary(own_cr_ck, cr_ck[:, i]),
            )
        )
    return found


def _summary(own: Ratio, controls: Float[np.ndarray, "set"]) -> ControlSummary:
    return summarise(float("nan") if own.percent is None else own.percent, controls.tolist())


def _transition_counts(
    part: Int[np.ndarray, "prompt"],
    before: Int8[np.ndarray, "prompt"],
    after: Int8[np.ndarray, "set prompt"],
    parts: int,
) -> Int[np.ndarray, "set part from=3 to=3"]:
    """Count the transitions of several sets in each part of the prompts.

    Args:
        part: The part that each prompt belongs to, from 0.
        before: Sources without ablation, as indices in `SOURCES`.
        after: Sources under each set.
        parts: How many parts there are.
    """
    place = 9 * part + 3 * before
    counts = [np.bincount(place + row, minlength=9 * parts) for row in after]
    return np.asarray(counts, dtype=np.int64).reshape(len(after), parts, 3, 3)


def _gts_percent(counts: Int[np.ndarray, "set part 3 3"]) -> Float[np.ndarray, "set part"]:
    totals = counts.sum((2, 3))
    return _percent(totals - np.trace(counts, axis1=2, axis2=3), totals)


def _cr_ck_percent(counts: Int[np.ndarray, "set part 3 3"]) -> Float[np.ndarray, "set part"]:
    others = np.delete(counts, CK, axis=2)
    return _percent(others[..., CK].sum(2), others.sum((2, 3)))


def _percent(
    count: Int[np.ndarray, "set part"], total: Int[np.ndarray, "set part"]
) -> Float[np.ndarray, "set part"]:
    percent = np.full(count.shape, np.nan)
    np.divide(100.0 * count, total, out=percent, where=total > 0)
    return percent


@dataclass(frozen=True)
class EntropyChange:
    """How the entropy changed for the prompts that made one transition."""

    before: Source
    after: Source
    values: Float[np.ndarray, "prompt"]  # H before - H after under the entropy set, nats
    controls: ControlSummary  # of the control sets' means, nats
    control_sets: int  # how many of them had a prompt that made this transition

    @property
    def mean(self) -> float | None:
        """Mean over the prompts; None if there are none."""
        return float(self.values.mean()) if len(self.values) else None


def entropy_changes(run: RunResults, value: str) -> list[EntropyChange]:
    """List the nine transitions of the entropy set, by source before, then after.

    Args:
        run: A finished run.
        value: Name of the ablation value.
    """
    ablated, controls = run.ablated[value], run.scores["ablations"][value]["controls"]
    before, after = (cell["source"].to_numpy(object) for cell in (run.plain, ablated))
    change = (run.plain["entropy"] - ablated["entropy"]).to_numpy(float)
    return [
        EntropyChange(
            before=k,
            after=k2,
            values=change[(before == k) & (after == k2)],
            controls=ControlSummary(**controls["entropy_difference"][k][k2]),
            control_sets=sum(entry["transition_counts"][k][k2] > 0 for entry in controls["sets"]),
        )
        for k in SOURCES
        for k2 in SOURCES
    ]
