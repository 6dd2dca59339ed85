"""Comparison of two runs: prompt by prompt if both asked the same ones, else as two samples."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ccm.errors import BadInput
from ccm.experiment.files import to_json, write_json
from ccm.experiment.folder import locked_for
from ccm.experiment.results import RunResults
from ccm.experiment.writing import write_atomically
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.differences import SEED, clusters, fisher, holm, interval, mcnemar
from ccm.method.scores import Ratio, ratio
from ccm.method.sources import SOURCES, Source
from ccm.paper.markdown import escape_markdown, markdown_table
from ccm.reporting.breakdowns import facts_of
from ccm.reporting.text import proportion

JSON, MARKDOWN = "run_comparison.json", "run_comparison.md"
PLAIN = "plain"
PROMPT = ["knowledge_probing_prompt", "counter_knowledge_object", "parametric_knowledge_object"]
# Entries of the identity whose differences are not listed.
UNTOLD = ("shard",)
HOW_TO_READ = (
    "Differences: the second run less the first, in points or nats, with 95 % intervals that are "
    "bootstrapped over facts, because a fact's three prompts are not independent. p: {test}, which "
    "takes prompts as independent; in brackets, adjusted for the {tests} of this table (Holm)."
)


@dataclass(frozen=True)
class SourceChange:
    """How often a source is given under one ablation in each run."""

    ablation: str  # "plain", or the ablation value of the entropy sets
    source: Source
    first: Ratio
    second: Ratio
    only_first: int | None  # prompts with the source in one run alone; None for different prompts
    only_second: int | None
    difference: float  # percentage points
    low: float
    high: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class EntropyChange:
    """First-token entropy under one ablation in each run: means and their difference, nats."""

    ablation: str
    first: float
    second: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Alike:
    """How many of the same prompts end alike in both runs, under one ablation."""

    ablation: str
    texts: Ratio
    sources: Ratio


@dataclass(frozen=True)
class TwoRuns:
    """What differs between two runs."""

    names: tuple[str, str]
    folders: tuple[str, str]
    settings: Mapping[str, tuple[Any, Any]]  # of the identity, where they differ
    prompts: tuple[int, int]
    paired: int  # prompts that both asked; 0: the runs are two samples
    alike: tuple[Alike, ...]  # empty for two samples
    sources: tuple[SourceChange, ...]
    entropies: tuple[EntropyChange, ...]


# --- compared -----------------------------------------------------------------------------------------


def compare_runs(first: RunResults, second: RunResults) -> TwoRuns:
    """Compare two runs, without ablation and under every ablation value that both have.

    Prompts that are the same in both, including their objects, are paired, and the others left out. If
    there are none, the runs are two samples.

    Args:
        first: A finished run.
        second: Another one.
    """
    rows = paired_rows(first.prompts, second.prompts)
    paired = len(rows[0]) > 0
    if not paired:
        rows = np.arange(len(first.prompts)), np.arange(len(second.prompts))
    runs = (first, second)
    facts = [facts_of(run.prompts)[at].tolist() for run, at in zip(runs, rows, strict=True)]
    drawn = [clusters(facts[0])]
    drawn.append(drawn[0] if paired else clusters(facts[1], SEED + 1))
    names = [PLAIN, *(value for value in first.values if value in second.values)]
    alike, sources, entropies = list[Alike](), list[dict[str, Any]](), list[EntropyChange]()
    for name in names:
        both = [run.plain if name == PLAIN else run.ablated[name] for run in runs]
        cells = [cell.iloc[at] for cell, at in zip(both, rows, strict=True)]
        tables = [_quantities(cell) for cell in cells]
        if paired:
            difference = tables[1] - tables[0]
            differences, draws = difference.mean(0), drawn[0].means(difference)
            alike.append(_alike(name, *cells))
        else:
            differences = tables[1].mean(0) - tables[0].mean(0)
            draws = drawn[1].means(tables[1]) - drawn[0].means(tables[0])
        low, high = interval(draws)
        for i, source in enumerate(SOURCES):
            has = [table[:, i] > 0 for table in tables]
            counts = [int(x.sum()) for x in has]
            only = [int((a & ~b).sum()) for a, b in (has, has[::-1])] if paired else []
            sources.append(
                {
                    "ablation": name,
                    "source": source,
                    "first": ratio(counts[0], len(has[0])),
                    "second": ratio(counts[1], len(has[1])),
                    "only_first": only[0] if paired else None,
                    "only_second": only[1] if paired else None,
                    "difference": 100 * float(differences[i]),
                    "low": 100 * float(low[i]),
                    "high": 100 * float(high[i]),
                    "p": mcnemar(*only)
                    if paired
                    else fisher(counts[0], len(has[0]), counts[1], len(has[1])),
                }
            )
        one, two = (float(table[:, -1].mean()) for table in tables)
        entropies.append(
            EntropyChange(name, one, two, float(differences[-1]), float(low[-1]), float(high[-1]))
        )
    adjusted = holm([row["p"] for row in sources])
    return TwoRuns(
        names=(first.display_name, second.display_name),
        folders=(str(first.path), str(second.path)),
        settings=_settings(first.identity, second.identity),
        prompts=(len(first.prompts), len(second.prompts)),
        paired=len(rows[0]) if paired else 0,
        alike=tuple(alike),
        sources=tuple(SourceChange(**row, p_holm=p) for row, p in zip(sources, adjusted, strict=True)),
        entropies=tuple(entropies),
    )


def paired_rows(first: pd.DataFrame, second: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows of the prompts that two tables have in common, in the order of the first.

    Args:
        first: Probing prompts.
        second: Other probing prompts.
    """
    at = {tuple(key): i for i, key in enumerate(second[PROMPT].to_numpy())}
    pairs = [(i, at[key]) for i, key in enumerate(map(tuple, first[PROMPT].to_numpy())) if key in at]
    rows = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def _quantities(cell: pd.DataFrame) -> np.ndarray:
    """Return, for every prompt, 1 for its source and 0 for the others, and its entropy."""
    sources = cell["source"].to_numpy()
    return np.column_stack([*(sources == s for s in SOURCES), cell["entropy"].to_numpy(float)])


def _alike(name: str, first: pd.DataFrame, second: pd.DataFrame) -> Alike:
    same = [
        ratio(int((first[column].to_numpy() == second[column].to_numpy()).sum()), len(first))
        for column in ("text", "source")
    ]
    return Alike(name, *same)


def _settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [key for key in dict.fromkeys([*first, *second]) if key not in UNTOLD]
    return {k: (first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k)}


# --- in words -----------------------------------------------------------------------------------------


def label(ablation: str) -> str:
    """Name an ablation for people."""
    return "without ablation" if ablation == PLAIN else ABLATION_VALUES[ablation].label


def sentences(found: TwoRuns) -> list[str]:
    """Sum the comparison up, a sentence for what was asked and one for each ablation."""
    a, b = found.names
    if found.paired:
        said = f"{a} and {b} both asked {found.paired:,} prompts"
        alone = [n - found.paired for n in found.prompts]
        if any(alone):
            said += f" ({alone[0]:,} and {alone[1]:,} that only one of them asked are left out)"
    else:
        said = f"{a} ({found.prompts[0]:,} prompts) and {b} ({found.prompts[1]:,}) share no prompt"
    lines = [said + "."]
    by_name = {alike.ablation: alike for alike in found.alike}
    for entropy in found.entropies:
        name = entropy.ablation
        (ck,) = [c for c in found.sources if (c.ablation, c.source) == (name, "CK")]
        same = ""
        if name in by_name:
            texts, sources = by_name[name].texts, by_name[name].sources
            same = f"the same text at {texts.count:,}, the same source at {sources.count:,}; "
        points = signed(ck.difference, ck.low, ck.high)
        nats = signed(entropy.difference, entropy.low, entropy.high, 3)
        lines.append(
            f"{label(name)[0].upper()}{label(name)[1:]}: {same}CK {ck.first.percent:.1f} and "
            f"{ck.second.percent:.1f} %, {points} points, p {ck.p_holm:.2g}; entropy {nats} nats."
        )
    return lines


def signed(difference: float, low: float, high: float, places: int = 1) -> str:
    """Write a difference with its interval.

    >>> signed(-0.25, -1.0, 0.5)
    '-0.2 (-1.0 to +0.5)'
    """
    return f"{difference:+.{places}f} ({low:+.{places}f} to {high:+.{places}f})"


def markdown(found: TwoRuns) -> str:
    """Write the comparison as a page."""
    a, b = map(escape_markdown, found.names)
    lines = [f"# {a} against {b}", "", *(f"- {escape_markdown(line)}" for line in sentences(found)), ""]
    test, n = "McNemar's exact test" if found.paired else "Fisher's exact test", len(found.sources)
    lines += [HOW_TO_READ.format(test=test, tests=f"{n} tests"), "", "## What was run differently", ""]
    settings = [[key, *map(_short, pair)] for key, pair in found.settings.items()]
    lines += [markdown_table(["setting", *found.names], settings) if settings else "Nothing.", ""]
    lines += ["## Sources", "", markdown_table(*_source_table(found)), "", "## Entropy", ""]
    header = ["ablation", *(f"{name}, nats" for name in found.names), "difference"]
    rows = [
        [label(e.ablation), f"{e.first:.3f}", f"{e.second:.3f}", signed(e.difference, e.low, e.high, 3)]
        for e in found.entropies
    ]
    return "\n".join([*lines, markdown_table(header, rows)]) + "\n"


def _source_table(found: TwoRuns) -> tuple[list[str], list[list[str]]]:
    header = ["ablation", "source", *found.names]
    header += ["only the first", "only the second"] * bool(found.paired) + ["difference", "p"]
    rows = []
    for c in found.sources:
        only = [f"{c.only_first}", f"{c.only_second}"] if found.paired else []
        row = [label(c.ablation), c.source, proportion(asdict(c.first)), proportion(asdict(c.second))]
        rows.append([*row, *only, signed(c.difference, c.low, c.high), f"{c.p:.2g} ({c.p_holm:.2g})"])
    return header, rows


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else " ".join(to_json(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


# --- written ------------------------------------------------------------------------------------------


def check_two(runs: Sequence[RunResults]) -> None:
    """Check that there are two runs to compare with each other.

    Raises:
        BadInput: there is one, or more than two.
    """
    if len(runs) != 2:
        raise BadInput(
            f"{len(runs)} runs: two are compared with each other. Give two, or --to paper with runs of "
            "published models."
        )


def write_comparison(found: TwoRuns, out: Path) -> list[Path]:
    """Write `run_comparison.md` and `run_comparison.json`.

    Raises:
        InUse: another process is writing there.
    """
    with locked_for(out):
        page, data = out / MARKDOWN, out / JSON
        write_atomically(page, lambda p: p.write_text(markdown(found), encoding="utf-8"))
        write_json(data, found)
    return [page, data]
