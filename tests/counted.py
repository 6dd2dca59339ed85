"""A run's scores counted anew from its cells, with pandas and scipy alone: what tables should show."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import beta

SOURCES = ("CK", "ND", "PK")
Counts = dict[tuple[str, str], int]


@dataclass(frozen=True)
class Part:
    """A share of prompts, percent, with its exact interval; None without a denominator."""

    count: int
    total: int
    percent: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Others:
    """What control sets gave for one quantity."""

    mean: float | None = None
    error: float | None = None  # three standard errors
    low: float | None = None
    high: float | None = None
    rank: float | None = None  # of the entropy set among them, percent


def part(count: int, total: int) -> Part:
    """Clopper and Pearson's interval, from the quantiles of the beta distribution."""
    count, total = int(count), int(total)
    if not total:
        return Part(0, 0, None, None, None)
    low = beta.ppf(0.025, count, total - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    return Part(count, total, 100 * count / total, 100 * float(low), 100 * float(high))


def others(own: float | None, values: list[float | None]) -> Others:
    """Summarise control sets; those without a value do not count."""
    found = [v for v in values if v is not None]
    if not found:
        return Others()
    mean = sum(found) / len(found)
    error = None
    if len(found) > 1:
        variance = sum((v - mean) ** 2 for v in found) / (len(found) - 1)
        error = 3 * math.sqrt(variance / len(found))
    return Others(mean, error, min(found), max(found), None if own is None else rank(own, found))


def rank(own: float, values: list[float]) -> float:
    """Percentile rank: the mean rank of a value among others it ties with."""
    below, ties = sum(v < own for v in values), sum(v == own for v in values)
    return 100 * (below + (ties + 1) / 2 if ties else below) / len(values)


class Counted:
    """One run folder, its cells counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        self.identity = self.manifest["identity"]
        self.model: str = self.identity["model"]
        self.name = {"gpt2-small": "GPT2-small"}.get(self.model, self.model)
        self.values: list[str] = self.identity["ablation_values"]
        self.plain = pd.read_parquet(path / "plain.parquet")
        self.prompts = pd.read_parquet(path / "prompts.parquet")
        self.measures = pd.read_parquet(path / "measures.parquet")
        self.n = len(self.plain)

    @cached_property
    def cells(self) -> dict[str, dict[str, pd.DataFrame]]:
        """Every cell by ablation value and set."""
        names = self.manifest["sets"]
        return {
            v: {s: pd.read_parquet(self.path / v / f"{s}.parquet") for s in names} for v in self.values
        }

    def sets(self, kind: str = "control") -> list[str]:
        """Names of the control sets of a kind."""
        return [name for name in self.manifest["sets"] if name.startswith(f"{kind}_")]

    def counts(self, value: str, name: str = "entropy", of: np.ndarray | None = None) -> Counts:
        """Prompts by source before and after, of some prompts or of all."""
        after = self.cells[value][name]["source"]
        chosen = np.ones(self.n, bool) if of is None else of
        pairs = zip(self.plain["source"][chosen], after[chosen], strict=True)
        found = dict.fromkeys(((k, j) for k in SOURCES for j in SOURCES), 0)
        for pair in pairs:
            found[pair] += 1
        return found

    def of_sets(self, value: str, kind: str, of: np.ndarray | None = None) -> list[Counts]:
        """The same of every control set of a kind."""
        return [self.counts(value, name, of) for name in self.sets(kind)]

    def ts(self, value: str, k: str, j: str, kind: str = "control") -> tuple[Part, Others]:
        """Transition score of the entropy set, and its control sets'."""
        return self._both(value, kind, lambda c: part(c[k, j], sum(c[k, i] for i in SOURCES)))

    def cr(
        self, value: str, k: str, kind: str = "control", of: np.ndarray | None = None
    ) -> tuple[Part, Others]:
        """Conversion ratio."""
        return self._both(value, kind, lambda c: conversion(c, k), of)

    def gts(
        self, value: str, kind: str = "control", of: np.ndarray | None = None
    ) -> tuple[Part, Others]:
        """Global transition score."""
        return self._both(value, kind, changed, of)

    def q(self, value: str, kind: str = "control") -> float | None:
        """Q: 100 - rank of the invariant share among the control sets'."""
        kept = [self.n - changed(c).count for c in self.of_sets(value, kind)]
        return 100 - rank(self.n - changed(self.counts(value)).count, kept) if kept else None

    def p(self, value: str, kind: str = "control") -> float | None:
        """One-sided permutation p-value."""
        own = changed(self.counts(value)).count
        found = [changed(c).count >= own for c in self.of_sets(value, kind)]
        return (1 + sum(found)) / (1 + len(found)) if found else None

    def entropy_change(self, value: str, k: str, j: str, name: str = "entropy") -> np.ndarray:
        """H before - after of the prompts that make a transition, nats."""
        cell = self.cells[value][name]
        made = (self.plain["source"] == k) & (cell["source"] == j)
        return (self.plain["entropy"] - cell["entropy"])[made].to_numpy()

    def entropy_means(
        self, value: str, k: str, j: str, kind: str = "control"
    ) -> tuple[float | None, list[float]]:
        """Mean change of the entropy set, and of the control sets that make the transition."""
        found = [self.entropy_change(value, k, j, name) for name in ("entropy", *self.sets(kind))]
        own, *rest = [float(sum(x) / len(x)) if len(x) else None for x in found]
        return own, [mean for mean in rest if mean is not None]

    def log_ratios(self, cell: pd.DataFrame) -> dict[str, np.ndarray]:
        """The three log-ratios, nats."""
        logs = {s: cell[f"log_prob_{s.lower()}"].to_numpy() for s in SOURCES}
        pairs = (("CK", "PK"), ("ND", "CK"), ("ND", "PK"))
        return {f"{a}/{b}": logs[a] - logs[b] for a, b in pairs}

    def parts(self, column: str) -> list[tuple[str, str, np.ndarray]]:
        """Relations, or their groups: name, group, and which prompts are of it; group by group."""
        group_of = dict(self.manifest["facts"]["relation_groups"])
        groups = list(dict.fromkeys(group_of.values()))
        if column == "relation_group_id":
            return [(g, g, (self.prompts[column] == g).to_numpy()) for g in groups]
        return [
            (name, g, (self.prompts[column] == name).to_numpy())
            for g in groups
            for name in group_of
            if group_of[name] == g
        ]

    def _both(
        self, value: str, kind: str, score: Any, of: np.ndarray | None = None
    ) -> tuple[Part, Others]:
        own = score(self.counts(value, "entropy", of))
        return own, others(own.percent, [score(c).percent for c in self.of_sets(value, kind, of)])


def changed(counts: Counts) -> Part:
    """Share of prompts whose source changed."""
    return part(sum(n for (k, j), n in counts.items() if k != j), sum(counts.values()))


def conversion(counts: Counts, k: str) -> Part:
    """Share that is K afterwards among those that were not."""
    rest = {pair: n for pair, n in counts.items() if pair[0] != k}
    return part(sum(n for (_, j), n in rest.items() if j == k), sum(rest.values()))
