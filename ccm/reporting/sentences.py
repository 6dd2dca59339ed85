"""What a run found, in sentences and in one table: the top of its report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ccm.experiment.results import RunResults
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.reporting.table_formats import Table
from ccm.reporting.text import IN_BRACKETS, digits, mean_and_most, proportion


@dataclass(frozen=True)
class Answer:
    """What one ablation value did, in sentences."""

    value: str
    label: str  # of the ablation value, for people
    sentences: tuple[str, ...]


def answers_of(run: RunResults) -> list[Answer]:
    """Describe what each ablation value changed, compared with the control sets."""
    return [
        Answer(value, ABLATION_VALUES[value].label, _sentences(run.scores["ablations"][value]))
        for value in run.values
    ]


def _sentences(scores: Mapping[str, Any]) -> tuple[str, ...]:
    own, controls = scores["entropy"], scores["controls"]
    ratio = own["conversion_ratios"]["CK"]
    if own["gts"]["percent"] is None:
        return ("There is no prompt: nothing was measured.",)
    changed = f"{_with_interval(own['gts'])} of the answers change their source" + _against(
        own["gts"], controls["gts"], int(controls["n"])
    )
    if own["q_value"] is not None:
        n = int(controls["n"])
        least = (
            f", the least that {n} controls can give" if own["permutation_p"] * (n + 1) < 1.5 else ""
        )
        changed += f" Q = {own['q_value']:.1f} of 100, p = {own['permutation_p']:.4f}{least}."
    matched = scores.get("matched_controls")
    if matched is not None:
        n = int(matched["n"])
        beside = _against(own["gts"], matched["gts"], n).lstrip(":; ")
        changed += (
            f" Beside sets that match its neurons in weight norm and spread of activation: {beside} "
            f"Q = {matched['q_value']:.1f}, p = {matched['permutation_p']:.4f}."
        )
    if ratio["percent"] is None:
        return changed, "Every prompt was answered from the context before: none could turn to it."
    copied = (
        f"Of the prompts not answered from the context before, {_with_interval(ratio)} turn to it, "
        f"CR(CK){_against(ratio, controls['conversion_ratios']['CK'], int(controls['n']))}"
    )
    return changed, copied


def _with_interval(r: Mapping[str, Any]) -> str:
    interval = f"95 % interval {r['low']:.1f} to {r['high']:.1f}"
    return f"{r['percent']:.1f} % ({r['count']}/{r['total']}; {interval})"


def _against(r: Mapping[str, Any], controls: Mapping[str, Any], n: int) -> str:
    """Compare a proportion with those of the controls: above, below, or within their range."""
    if n == 0:
        return "; no control sets were run."
    if r["percent"] > controls["high"]:
        place = "more than any"
    elif r["percent"] < controls["low"]:
        place = "less than any"
    else:
        place = "within the range"
    sets = f"{n} control sets, which give" if n > 1 else "one control set, which gives"
    return (
        f": {place} of {sets} {controls['mean']:.1f} % on average "
        f"({controls['low']:.1f} to {controls['high']:.1f} %)."
    )


def key_numbers(runs: Sequence[RunResults]) -> Table:
    """Lay the scores of every run and ablation value side by side."""
    rows = []
    for run in runs:
        for value in run.values:
            scores = run.scores["ablations"][value]
            own, controls = scores["entropy"], scores["controls"]
            rows.append(
                {
                    "model": run.display_name,
                    "ablation value": ABLATION_VALUES[value].label,
                    "GTS": proportion(own["gts"]),
                    "GTS of controls": mean_and_most(controls["gts"]),
                    "Q": digits(own["q_value"], 1),
                    "p": digits(own["permutation_p"], 4),
                    "CR(CK)": proportion(own["conversion_ratios"]["CK"]),
                    "CR(CK) of controls": mean_and_most(controls["conversion_ratios"]["CK"]),
                }
            )
    table = pd.DataFrame(rows)
    caption = (
        "GTS: proportion of prompts whose source changes. Q: percentile of the entropy set's GTS among "
        "the controls'; p: one-sided permutation test. CR(CK): of the prompts that were not CK, the "
        f"proportion that becomes CK. {IN_BRACKETS} Controls: mean, in brackets the highest."
    )
    return Table("key_numbers", caption, table, table)
