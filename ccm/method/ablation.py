"""Neuron sets, and the constants that replace their activations (Method 7)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ccm.errors import BadInput
from ccm.method.ablation_values import AblationValue
from ccm.method.protocol import Protocol
from ccm.method.statistics import ActivationStatistics


@dataclass(frozen=True)
class Ablation:
    """A neuron set with its replacement values; the empty set is the plain run."""

    name: str  # of the set: "plain", "entropy", "control_000", "matched_000", ...
    neurons: tuple[int, ...]  # distinct, ascending
    values: tuple[float, ...]  # one per neuron


PLAIN = Ablation(name="plain", neurons=(), values=())
BITS = 11  # significant bits of replacement values, as in float16 and in the released statistics
CONTROL, MATCHED = "control", "matched"  # kinds of sets that the entropy set is compared with
_NUMBERED = re.compile(rf"({CONTROL}|{MATCHED})_\d{{3,}}")


def numbered(kind: str, sets: Iterable[Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Name the sets of a kind by their numbers.

    Args:
        kind: `CONTROL` or `MATCHED`.
        sets: The neurons of each set.

    Returns:
        The sets by name, in their order.

    >>> numbered(MATCHED, [(1, 2), (3, 4)])
    {'matched_000': (1, 2), 'matched_001': (3, 4)}
    """
    return {f"{kind}_{i:03d}": tuple(neurons) for i, neurons in enumerate(sets)}


def kind_of(name: str) -> str | None:
    """Return `CONTROL` or `MATCHED` for a set that `numbered` named, None for any other.

    >>> kind_of("control_007"), kind_of("entropy"), kind_of("controls of mine")
    ('control', None, None)
    """
    found = _NUMBERED.fullmatch(name)
    return None if found is None else found[1]


def plan(
    name: str,
    neurons: Sequence[int],
    value: AblationValue,
    statistics: ActivationStatistics,
    *,
    rounded: bool = True,
) -> Ablation:
    """Look up the replacement value of each neuron of a set (Method 7).

    Args:
        name: Of the set.
        neurons: Last-layer neurons; their order and duplicates do not matter.
        value: Which constant replaces their activations.
        statistics: Of the activations, from which the constant is taken.
        rounded: Round values to `BITS` significant bits. Machines sum statistics in different orders;
            after rounding, all but about one value in ten thousand agree.

    Returns:
        The set with its distinct neurons in ascending order.

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
    held = np.asarray([values[i] for i in chosen], dtype=np.float64)
    held = round_to_bits(held) if rounded else held
    return Ablation(name=name, neurons=chosen, values=tuple(held.tolist()))


def plan_sets(
    values: Sequence[AblationValue],
    sets: Mapping[str, Sequence[int]],
    statistics: ActivationStatistics,
    protocol: Protocol,
) -> dict[str, list[Ablation]]:
    """Plan every set under every ablation value."""
    rounded = not protocol.unrounded_values
    return {
        value.name: [
            plan(name, neurons, value, statistics, rounded=rounded) for name, neurons in sets.items()
        ]
        for value in values
    }


def round_to_bits(values: Float[np.ndarray, "value"], bits: int = BITS) -> Float[np.ndarray, "value"]:
    """Round numbers to a number of significant bits, halves to even.

    >>> round_to_bits(np.array([1 / 3, -2049.0, 0.0])).tolist()
    [0.333251953125, -2048.0, 0.0]
    """
    fraction, exponent = np.frexp(values)  # 0.5 <= |fraction| < 1
    return np.asarray(np.ldexp(np.round(np.ldexp(fraction, bits)), exponent - bits))


def check_neurons(neurons: Sequence[int], d_mlp: int, what: str = "neurons") -> tuple[int, ...]:
    """Check a list of neurons that a user typed.

    Args:
        neurons: Numbers of last-layer neurons, from 0.
        d_mlp: Neurons of the layer.
        what: What to call the list in the message.

    Returns:
        The neurons, in their order.

    Raises:
        BadInput: an empty list, or a neuron that is out of range or repeated.
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
