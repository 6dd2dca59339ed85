"""What a sweep found: a row for each choice and ablation value."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ccm.experiment.folder import locked_for
from ccm.experiment.results import RunResults
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.reporting.table_formats import DASH, Table, save_table
from ccm.reporting.text import digits, mean_and_most, proportion

STEM = "sweep"


def sweep_table(runs: Sequence[tuple[str, RunResults]]) -> Table:
    """Tabulate the runs of a sweep, one below the other.

    Args:
        runs: Each run and what was chosen in it, in words.
    """
    texts, data = [], []
    for name, run in runs:
        for value in run.values:
            scores = run.scores["ablations"][value]
            own, controls = scores["entropy"], scores["controls"]
            matched: dict[str, Any] = scores.get("matched_controls", {})
            ck = own["conversion_ratios"]["CK"]
            texts.append(
                {
                    "choice": name,
                    "ablation": ABLATION_VALUES[value].symbol,
                    "prompts": run.scores["n_prompts"],
                    "entropy neurons": len(run.entropy_neurons),
                    "GTS": proportion(own["gts"]),
                    "controls, mean (highest)": mean_and_most(controls["gts"]),
                    "p": digits(own["permutation_p"], 4),
                    "matched controls": mean_and_most(matched["gts"]) if matched else DASH,
                    "p, matched": digits(matched["permutation_p"], 4) if matched else DASH,
                    "CR(CK)": proportion(ck),
                    "CR(CK) of controls": mean_and_most(controls["conversion_ratios"]["CK"]),
                }
            )
            data.append(
                {"choice": name, "ablation_value": value, "prompts": run.scores["n_prompts"]}
                | {"neurons": " ".join(map(str, run.entropy_neurons))}
                | {f"gts_{key}": own["gts"][key] for key in own["gts"]}
                | {f"gts_controls_{key}": controls["gts"][key] for key in controls["gts"]}
                | {"p": own["permutation_p"], "p_matched": matched.get("permutation_p")}
                | {f"cr_ck_{key}": ck[key] for key in ck}
            )
    return Table(
        STEM,
        "The same experiment with other choices, one at a time. GTS: prompts whose source changes; "
        "CR(CK): of the prompts that were not CK, those that become CK. Proportions with their exact "
        "95 % intervals; controls: mean and highest of the random sets.",
        pd.DataFrame(texts),
        pd.DataFrame(data),
    )


def write_sweep(table: Table, out: Path) -> list[Path]:
    """Write the table of a sweep as .tex, .csv and .md.

    Raises:
        InUse: another process is writing there.
    """
    with locked_for(out):
        return save_table(table, out / STEM)
