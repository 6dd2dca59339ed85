"""Change of the next token's entropy, transition by transition (Method 8)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ccm.experiment.results import RunResults
from ccm.method.scores import ControlSummary
from ccm.method.sources import SOURCES, Source


@dataclass(frozen=True)
class EntropyChange:
    """How the entropy changed for the prompts that made one transition."""

    before: Source
    after: Source
    values: Float[np.ndarray, "prompt"]  # H before - H after under the entropy set, nats
    controls: ControlSummary  # of the control sets' means, nats
    control_sets: int  # how many of them had a prompt that made it

    @property
    def mean(self) -> float | None:
        """Mean over the prompts; None without any."""
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
