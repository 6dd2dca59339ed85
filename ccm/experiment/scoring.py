"""From the cells of a run folder to its `scores.json`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ccm.experiment.folder import PROMPTS, RunFolder, read_table
from ccm.method.ablation import CONTROL, MATCHED, kind_of
from ccm.method.scores import (
    conversion_ratio,
    global_transition_score,
    invariant_share,
    mean_by_transition,
    permutation_p,
    q_value,
    ratio,
    summarise,
    transition_counts,
    transition_scores,
)
from ccm.method.sources import RATIOS, SOURCES, Source, log_ratios


def scores_of_run(folder: RunFolder, released: bool) -> dict[str, Any]:
    """Score every ablation value of a run (Method 8), reading only what is in the folder.

    Args:
        folder: A folder whose cells are all there.
        released: Score CR(ND) with the PK function (defect 1).
    """
    identity, sets = folder.manifest["identity"], folder.manifest["sets"]
    plain = read_table(folder.cell("", "plain"))
    facts = folder.manifest["facts"]
    return {
        "model": identity["model"],
        "protocol": identity["protocol"],
        "n_prompts": len(read_table(folder.path / PROMPTS, columns=["rel_lemma"])),
        "parametric_recall": ratio(facts["recalled"], facts["facts"]),
        "sources": {s: ratio(int((plain["source"] == s).sum()), len(plain)) for s in SOURCES},
        "log_ratios": {
            s: {name: _mean(values[plain["source"] == s]) for name, values in _ratios(plain).items()}
            for s in SOURCES
        },
        "ablations": {
            value: _scores_of_value(
                plain,
                {name: read_table(folder.cell(value, name)) for name in sets},
                sets,
                released,
            )
            for value in identity["ablation_values"]
        },
    }


def _scores_of_value(
    plain: pd.DataFrame,
    cells: dict[str, pd.DataFrame],
    sets: dict[str, list[int]],
    released: bool,
) -> dict[str, Any]:
    """Score the entropy set and both kinds of controls under one ablation value."""
    scored = _Scored(plain, cells, sets, released)
    controls, matched = ([n for n in cells if kind_of(n) == kind] for kind in (CONTROL, MATCHED))
    own = scored.counts["entropy"]
    changed = _difference(_ratios(plain), _ratios(cells["entropy"]))
    source = np.asarray(scored.before)
    found = {
        "entropy": {
            "neurons": sets["entropy"],
            "transition_counts": _square(lambda i, j: int(own[i, j])),
            "transition_scores": _square(lambda i, j: ratio(int(own[i, j]), int(own[i].sum()))),
            "conversion_ratios": scored.cr["entropy"],
            "gts": scored.gts["entropy"],
            **scored.rank(controls),
            "entropy_difference": scored.entropy_change["entropy"],
            "log_ratio_difference": {
                k: {name: _mean(values[source == k]) for name, values in changed.items()}
                for k in SOURCES
            },
        },
        "controls": scored.summary(controls),
    }
    if matched:  # Method 13
        found["matched_controls"] = {**scored.rank(matched), **scored.summary(matched)}
    return found


class _Scored:
    """Every set's scores under one ablation value, and what some of them say of the entropy set."""

    def __init__(
        self,
        plain: pd.DataFrame,
        cells: dict[str, pd.DataFrame],
        sets: dict[str, list[int]],
        released: bool,
    ) -> None:
        self.sets = sets
        self.before = plain["source"].tolist()
        self.counts = {
            name: transition_counts(self.before, cell["source"].tolist())
            for name, cell in cells.items()
        }
        self.entropy_change = {
            name: mean_by_transition(
                self.before, cell["source"].tolist(), (plain["entropy"] - cell["entropy"]).to_numpy()
            )
            for name, cell in cells.items()
        }
        # Percent arrays per set; NaN in rows without prompts.
        self.ts = {name: transition_scores(c) for name, c in self.counts.items()}
        self.cr = {
            name: {k: conversion_ratio(c, k, released=released) for k in SOURCES}
            for name, c in self.counts.items()
        }
        self.gts = {name: global_transition_score(c) for name, c in self.counts.items()}

    def rank(self, others: Sequence[str]) -> dict[str, float | None]:
        """Q-value and permutation p of the entropy set's GTS among that of other sets."""
        if not others:
            return {"q_value": None, "permutation_p": None}
        own, counts, gts = self.counts["entropy"], self.counts, self.gts
        return {
            "q_value": q_value(invariant_share(own), [invariant_share(counts[n]) for n in others]),
            "permutation_p": permutation_p(gts["entropy"].count, [gts[n].count for n in others]),
        }

    def summary(self, others: Sequence[str]) -> dict[str, Any]:
        """Summarise other sets, and hold the entropy set against them."""
        counts, ts, cr, gts, change = self.counts, self.ts, self.cr, self.gts, self.entropy_change
        return {
            "n": len(others),
            "gts": summarise(_percent(gts["entropy"]), [_percent(gts[n]) for n in others]),
            "transition_scores": _square(
                lambda i, j: summarise(float(ts["entropy"][i, j]), [float(ts[n][i, j]) for n in others])
            ),
            "conversion_ratios": {
                k: summarise(_percent(cr["entropy"][k]), [_percent(cr[n][k]) for n in others])
                for k in SOURCES
            },
            "entropy_difference": _square(
                lambda i, j: summarise(
                    _number(change["entropy"][SOURCES[i]][SOURCES[j]]),
                    [_number(change[n][SOURCES[i]][SOURCES[j]]) for n in others],
                )
            ),
            "sets": [
                {
                    "name": n,
                    "neurons": self.sets[n],
                    "transition_counts": _square(lambda i, j, n=n: int(counts[n][i, j])),
                    "gts": gts[n].percent,
                    "conversion_ratios": {k: cr[n][k].percent for k in SOURCES},
                }
                for n in others
            ],
        }


def _square(entry: Any) -> dict[Source, dict[Source, Any]]:
    """Build a from -> to table."""
    return {k: {k2: entry(i, j) for j, k2 in enumerate(SOURCES)} for i, k in enumerate(SOURCES)}


def _ratios(cell: pd.DataFrame) -> dict[str, np.ndarray]:
    log_probs: dict[Source, np.ndarray] = {s: cell[f"log_prob_{s.lower()}"].to_numpy() for s in SOURCES}
    return log_ratios(log_probs)


def _difference(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{a}/{b}": before[f"{a}/{b}"] - after[f"{a}/{b}"] for a, b in RATIOS}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _percent(r: Any) -> float:
    return _number(r.percent)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
