"""Neuron sets with what their neurons are replaced by, and activation statistics (Method 7)."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ccm.errors import BadInput
from ccm.method.ablation_values import AblationValue

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


STATISTICS = ("mean", "std", "median", "mode", "min", "max")


@dataclass(frozen=True)
class Ablation:
    """A neuron set with its replacement values; the empty set is the plain run."""

    name: str  # of the set: "plain", "entropy", "control_000", "matched_000", ...
    neurons: tuple[int, ...]  # distinct, ascending
    values: tuple[float, ...]  # one per neuron


PLAIN = Ablation(name="plain", neurons=(), values=())
CONTROL, MATCHED = "control", "matched"  # kinds of sets that the entropy set is compared with
_NUMBERED = re.compile(rf"({CONTROL}|{MATCHED})_\d{{3,}}")


def numbered(kind: str, sets: Iterable[Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Name the sets of a kind.

    >>> numbered(MATCHED, [(1, 2), (3, 4)])
    {'matched_000': (1, 2), 'matched_001': (3, 4)}
    """
    return {f"{kind}_{i:03d}": tuple(neurons) for i, neurons in enumerate(sets)}


def kind_of(name: str) -> str | None:
    """`CONTROL` or `MATCHED` for a set that `numbered` named; None for any other.

    >>> kind_of("control_007"), kind_of("entropy"), kind_of("controls of mine")
    ('control', None, None)
    """
    found = _NUMBERED.fullmatch(name)
    return None if found is None else found[1]


def plan(
    name: str, neurons: Sequence[int], value: AblationValue, statistics: ActivationStatistics
) -> Ablation:
    """Fix what a neuron set is replaced by. Order and duplicates of `neurons` do not matter.

    Raises:
        BadInput: a neuron outside 0..d_mlp-1, or one whose replacement value is not finite.
    """
    values = value.of(statistics)
    chosen = tuple(sorted({int(i) for i in neurons}))
    for i in chosen:
        if not 0 <= i < len(values):
            raise BadInput(f"neuron {i}: out of range. Allowed: 0 to {len(values) - 1}.")
        if not np.isfinite(values[i]):
            raise BadInput(
                f"neuron {i}: its {value.name} value is {values[i]}, not finite. "
                "Recompute the activation statistics."
            )
    return Ablation(name=name, neurons=chosen, values=tuple(float(values[i]) for i in chosen))


def check_neurons(neurons: Sequence[int], d_mlp: int, what: str = "neurons") -> tuple[int, ...]:
    """Check a neuron list a user typed: not empty, in range, none repeated.

    Raises:
        BadInput: otherwise, with the number that is wrong.
    """
    if not neurons:
        raise BadInput(f"{what}: empty. Give at least one neuron number from 0 to {d_mlp - 1}.")
    seen: set[int] = set()
    for i in neurons:
        if not 0 <= i < d_mlp:
            raise BadInput(f"{what}: neuron {i} is out of range. Allowed: 0 to {d_mlp - 1}.")
        if i in seen:
            raise BadInput(f"{what}: neuron {i} is repeated. Name each one once.")
        seen.add(i)
    return tuple(neurons)


def check_statistics(statistics: ActivationStatistics, d_mlp: int) -> ActivationStatistics:
    """Check that statistics fit a model and are finite.

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
