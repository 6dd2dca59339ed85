"""From the cells of a run folder to its scores: one tidy table, and `scores.json` made of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ccm.experiment.files import read_table, write_json, write_table
from ccm.experiment.folder import PROMPTS, SCORE_TABLE, SCORES, RunFolder
from ccm.method.ablation import CONTROL, MATCHED, PLAIN, kind_of
from ccm.method.scores import (
    ControlSummary,
    Ratio,
    conversion_ratio,
    global_transition_score,
    mean_by_transition,
    permutation_p,
    q_value,
    ratio,
    summarise,
    transition_counts,
)
from ccm.method.sources import RATIOS, SOURCES, Source, log_ratios

ENTROPY = "entropy"  # the set that the others are compared with
ALL = ""  # in place of a source: of all prompts; in place of an ablation value: before any


@dataclass(frozen=True)
class Score:
    """One number about one neuron set under one ablation value."""

    ablation_value: str  # "" before ablation
    set: str  # "plain", "entropy", "control_000", ...
    quantity: str
    source_from: str = ALL  # before ablation
    source_to: str = ALL  # after it
    count: int | None = None  # of prompts, where the number is a proportion of them ...
    n: int | None = None  # ... out of so many
    value: float | None = None  # percent, nats, or a rank; None if the denominator is 0
    low: float | None = None  # exact 95 % interval; of transition scores for the entropy set alone
    high: float | None = None

    @classmethod
    def proportion(cls, *key: str, of: Ratio, source_from: str = ALL, source_to: str = ALL) -> "Score":
        """Make the score of a proportion of prompts, in percent."""
        value, name, quantity = key
        numbers = (of.count, of.total, of.percent, of.low, of.high)
        return cls(value, name, quantity, source_from, source_to, *numbers)


def write_scores(folder: RunFolder, released: bool) -> None:
    """Score a run whose cells are all there: `scores.parquet`, and `scores.json` made of it."""
    table = score_table(folder, released)
    n_prompts = len(read_table(folder.path / PROMPTS, columns=["rel_lemma"]))
    if not folder.has(SCORE_TABLE):
        write_table(folder.path / SCORE_TABLE, table)
    write_json(folder.path / SCORES, scores_json(table, folder.manifest, n_prompts))


def score_table(folder: RunFolder, released: bool) -> pd.DataFrame:
    """Score every set of a run under every ablation value (Method 8).

    Args:
        folder: A folder whose cells are all there.
        released: Score CR(ND) with the PK function (defect 1).

    Returns:
        A row per `Score`, columns named like its fields.
    """
    # Texts and tokens are not scored, nor are the controls' log-probabilities.
    numbers = ["source", "entropy"]
    all_numbers = [*numbers, *(f"log_prob_{s.lower()}" for s in SOURCES)]
    plain, sets = read_table(folder.cell("", PLAIN.name), all_numbers), folder.manifest["sets"]
    scores = list(_before(plain, folder.manifest["facts"]))
    for value in folder.manifest["identity"]["ablation_values"]:
        for name in sets:
            cell = read_table(folder.cell(value, name), all_numbers if name == ENTROPY else numbers)
            scores += _of_set(value, name, plain, cell, released)
    table = pd.DataFrame([vars(score) for score in scores])
    return table.astype({"count": "Int64", "n": "Int64", "value": float, "low": float, "high": float})


def _before(plain: pd.DataFrame, facts: Mapping[str, int]) -> Iterator[Score]:
    """Score the plain run: recall, sources and log-ratios before any ablation."""
    key, source = (ALL, PLAIN.name), plain["source"]
    yield Score.proportion(*key, "parametric_recall", of=ratio(facts["recalled"], facts["facts"]))
    for s in SOURCES:
        yield Score.proportion(
            *key, "source", of=ratio(int((source == s).sum()), len(plain)), source_to=s
        )
    for name, values in _ratios(plain).items():
        for s in SOURCES:
            yield Score(*key, f"log_ratio {name}", s, value=_mean(values[source == s]))


def _of_set(
    value: str, name: str, plain: pd.DataFrame, cell: pd.DataFrame, released: bool
) -> Iterator[Score]:
    """Score one set under one ablation value."""
    key, own = (value, name), name == ENTROPY
    before, after = plain["source"].tolist(), cell["source"].tolist()
    counts = transition_counts(before, after)
    change = mean_by_transition(before, after, (plain["entropy"] - cell["entropy"]).to_numpy())
    for i, k in enumerate(SOURCES):
        total = int(counts[i].sum())
        for j, k2 in enumerate(SOURCES):
            # For a thousand controls, intervals would take longer than everything else.
            of = ratio(int(counts[i, j]), total) if own else _bare(int(counts[i, j]), total)
            yield Score.proportion(*key, "transition_score", of=of, source_from=k, source_to=k2)
            yield Score(*key, "entropy_difference", k, k2, value=change[k][k2])
    for k in SOURCES:
        found = conversion_ratio(counts, k, released=released)
        yield Score.proportion(*key, "conversion_ratio", of=found, source_to=k)
    yield Score.proportion(*key, "gts", of=global_transition_score(counts))
    if own:
        source, changed = np.asarray(before), _difference(_ratios(plain), _ratios(cell))
        for k in SOURCES:
            for pair, values in changed.items():
                mean = _mean(values[source == k])
                yield Score(*key, f"log_ratio_difference {pair}", k, value=mean)


def _bare(count: int, total: int) -> Ratio:
    """Make a proportion without an interval."""
    return Ratio(count, total, 100 * count / total if total else None, None, None)


# --- scores.json ------------------------------------------------------------------------------------


def scores_json(table: pd.DataFrame, manifest: Mapping[str, Any], n_prompts: int) -> dict[str, Any]:
    """Arrange a score table as `scores.json` has it.

    Args:
        table: Of `score_table`.
        manifest: Of its run folder.
        n_prompts: Probing prompts.
    """
    identity, sets, look = manifest["identity"], manifest["sets"], _Table(table)
    plain = (ALL, PLAIN.name)
    return {
        "model": identity["model"],
        "protocol": identity["protocol"],
        "n_prompts": n_prompts,
        "parametric_recall": look.ratio(*plain, "parametric_recall"),
        "sources": {s: look.ratio(*plain, "source", ALL, s) for s in SOURCES},
        "log_ratios": look.log_ratios(*plain, "log_ratio"),
        "ablations": {
            value: _json_of_value(look, value, sets) for value in identity["ablation_values"]
        },
    }


def _json_of_value(look: "_Table", value: str, sets: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Arrange the entropy set and both kinds of controls under one ablation value."""
    own = (value, ENTROPY)
    controls, matched = ([n for n in sets if kind_of(n) == kind] for kind in (CONTROL, MATCHED))
    found = {
        "entropy": {
            "neurons": sets[ENTROPY],
            "transition_counts": _square(lambda k, k2: look.count(*own, "transition_score", k, k2)),
            "transition_scores": _square(lambda k, k2: look.ratio(*own, "transition_score", k, k2)),
            "conversion_ratios": {k: look.ratio(*own, "conversion_ratio", ALL, k) for k in SOURCES},
            "gts": look.ratio(*own, "gts"),
            **_rank(look, value, controls),
            "entropy_difference": _square(lambda k, k2: look.value(*own, "entropy_difference", k, k2)),
            "log_ratio_difference": look.log_ratios(*own, "log_ratio_difference"),
        },
        "controls": _summary(look, value, controls, sets),
    }
    if matched:  # Method 13
        found["matched_controls"] = {
            **_rank(look, value, matched),
            **_summary(look, value, matched, sets),
        }
    return found


def _rank(look: "_Table", value: str, others: Sequence[str]) -> dict[str, float | None]:
    """Compute Q and permutation p of the entropy set's GTS among that of other sets."""
    if not others:
        return {"q_value": None, "permutation_p": None}

    def invariant(name: str) -> float:
        gts = look.ratio(value, name, "gts")
        return float((gts.total - gts.count) / gts.total)

    def changed(name: str) -> int:
        return look.count(value, name, "gts")

    return {
        "q_value": q_value(invariant(ENTROPY), [invariant(n) for n in others]),
        "permutation_p": permutation_p(changed(ENTROPY), [changed(n) for n in others]),
    }


def _summary(
    look: "_Table", value: str, others: Sequence[str], sets: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Summarise other sets, and compare the entropy set with them."""

    def over(quantity: str, *sources: str) -> ControlSummary:
        own, *rest = (_number(look.value(value, n, quantity, *sources)) for n in (ENTROPY, *others))
        return summarise(own, rest)

    return {
        "n": len(others),
        "gts": over("gts"),
        "transition_scores": _square(lambda k, k2: over("transition_score", k, k2)),
        "conversion_ratios": {k: over("conversion_ratio", ALL, k) for k in SOURCES},
        "entropy_difference": _square(lambda k, k2: over("entropy_difference", k, k2)),
        "sets": [
            {
                "name": n,
                "neurons": sets[n],
                "transition_counts": _square(
                    lambda k, k2, n=n: look.count(value, n, "transition_score", k, k2)
                ),
                "gts": look.value(value, n, "gts"),
                "conversion_ratios": {
                    k: look.value(value, n, "conversion_ratio", ALL, k) for k in SOURCES
                },
            }
            for n in others
        ],
    }


class _Table:
    """Looks scores up by ablation value, set, quantity and sources."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.rows = {
            row[:5]: row[5:]
            for row in table.astype(object)
            .where(table.notna(), None)
            .itertuples(index=False, name=None)
        }

    def ratio(self, value: str, name: str, quantity: str, k: str = ALL, k2: str = ALL) -> Ratio:
        """Look up a proportion with its count, total and interval."""
        return Ratio(*self.rows[value, name, quantity, k, k2])

    def count(self, *key: str) -> int:
        """Look up a count of prompts."""
        return self.ratio(*key).count

    def value(self, value: str, name: str, quantity: str, k: str = ALL, k2: str = ALL) -> float | None:
        """Look up a number."""
        number: float | None = self.rows[value, name, quantity, k, k2][2]
        return number

    def log_ratios(self, value: str, name: str, quantity: str) -> dict[Source, dict[str, float | None]]:
        """Look up mean log-ratios by source before ablation."""
        return {
            k: {f"{a}/{b}": self.value(value, name, f"{quantity} {a}/{b}", k) for a, b in RATIOS}
            for k in SOURCES
        }


def _square(entry: Callable[..., Any]) -> dict[Source, dict[Source, Any]]:
    """Build a from -> to table."""
    return {k: {k2: entry(k, k2) for k2 in SOURCES} for k in SOURCES}


def _ratios(cell: pd.DataFrame) -> dict[str, np.ndarray]:
    log_probs: dict[Source, np.ndarray] = {s: cell[f"log_prob_{s.lower()}"].to_numpy() for s in SOURCES}
    return log_ratios(log_probs)


def _difference(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{a}/{b}": before[f"{a}/{b}"] - after[f"{a}/{b}"] for a, b in RATIOS}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
