"""The constants that replace ablated neurons' activations: one row per ablation value (Method 7).

The command line, figures and tables are derived from the rows, and a test holds the documentation to
them. NumPy is not imported, because the help of the command line lists the names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ccm.errors import BadInput, allowed

if TYPE_CHECKING:
    from ccm.method.statistics import ActivationStatistics, Values


@dataclass(frozen=True)
class AblationValue:
    """One of the constants that can replace a neuron's activation."""

    name: str  # on the command line, in run folders and names of files
    label: str  # in figures and sentences: "mean (μ) ablation"
    symbol: str  # in the columns of tables; LaTeX is made from it, Greek letters included
    constant: str  # what replaces the activation, in the table of the documentation
    marker: str  # matplotlib's, of its points in figures
    colour: str  # of these points
    of: Callable[["ActivationStatistics"], "Values"]  # one number per neuron


ABLATION_VALUES: dict[str, AblationValue] = {
    value.name: value
    for value in (
        AblationValue(
            name="mean_ablation",
            label="mean (μ)",
            symbol="μ",
            constant="mean",
            marker="o",
            colour="#000000",
            of=lambda s: s.mean,
        ),
        AblationValue(
            name="median_ablation",
            label="median",
            symbol="median",
            constant="median",
            marker="s",
            colour="#56B4E9",
            of=lambda s: s.median,
        ),
        AblationValue(
            name="mode_ablation",
            label="mode",
            symbol="mode",
            constant="mode",
            marker="D",
            colour="#CC79A7",
            of=lambda s: s.mode,
        ),
        # Clipped: a constant the neuron never reaches would be no ablation but an injection.
        AblationValue(
            name="mean_minus_sigma_ablation",
            label="μ − 3σ",
            symbol="μ − 3 σ",
            constant="max(mean − 3 sigma, minimum)",
            marker="<",
            colour="#D55E00",
            of=lambda s: (s.mean - 3 * s.std).clip(min=s.min),
        ),
        AblationValue(
            name="mean_plus_sigma_ablation",
            label="μ + 3σ",
            symbol="μ + 3 σ",
            constant="min(mean + 3 sigma, maximum)",
            marker=">",
            colour="#D55E00",
            of=lambda s: (s.mean + 3 * s.std).clip(max=s.max),
        ),
    )
}
ALL = "all"  # on the command line: every row of the table


def ablation_values(names: str | Sequence[str]) -> list[AblationValue]:
    """Look up ablation values by name.

    Args:
        names: One name or several; `all` means every one.

    Returns:
        Their rows in the order of the names, each once.

    Raises:
        BadInput: an unknown name.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in ABLATION_VALUES and name != ALL:
            raise BadInput(f"ablation value {name!r}: unknown. {allowed([*ABLATION_VALUES, ALL])}.")
    if ALL in names:
        return list(ABLATION_VALUES.values())
    return [ABLATION_VALUES[name] for name in dict.fromkeys(names)]


def one_ablation_value(name: str) -> AblationValue:
    """Look up one ablation value by name.

    Raises:
        BadInput: an unknown name, or `all`.
    """
    if name == ALL:
        raise BadInput(f"ablation value {ALL!r}: one is needed. {allowed(ABLATION_VALUES)}.")
    return ablation_values(name)[0]
