"""Activation statistics of the last layer's neurons (Method 6)."""

from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float

from ccm.errors import BadInput

Values = Float[np.ndarray, "d_mlp"]


@dataclass(frozen=True)
class ActivationStatistics:
    """Per-neuron statistics of the last layer's `hook_post` (Method 6), float64."""

    mean: Values
    std: Values  # population (n), not sample (n-1)
    median: Values
    mode: Values
    min: Values
    max: Values

    def __post_init__(self) -> None:
        lengths = {name: np.shape(values) for name, values in vars(self).items()}
        if len(set(lengths.values())) != 1:
            raise BadInput(f"activation statistics of different lengths: {lengths}.")


STATISTICS = tuple(f.name for f in fields(ActivationStatistics))


def check_statistics(statistics: ActivationStatistics, d_mlp: int) -> ActivationStatistics:
    """Check that statistics fit a model and are finite, and return them.

    Args:
        statistics: One value per neuron of each statistic.
        d_mlp: Neurons of the model's last layer.

    Raises:
        BadInput: another number of neurons than `d_mlp`, or a value that is not finite.
    """
    for name in STATISTICS:
        values = getattr(statistics, name)
        if values.shape != (d_mlp,):
            raise BadInput(
                f"activation statistics: {name} has shape {values.shape}, the model has "
                f"{d_mlp} last-layer neurons. Use the statistics of this model."
            )
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise BadInput(
                f"activation statistics: {name} of neuron {bad[0]} is {values[bad[0]]}, not finite "
                f"({len(bad)} in all). Recompute them."
            )
    return statistics
