"""Goldens: JSON by syrupy, numbers with the tolerance they were stored with.

A number that may differ between machines is stored as `{"value": ..., "tolerance": ...}`; everything
else (names, neuron numbers, counts of a float32 run) must be equal. Inside its tolerance a golden is
left as it is, also by `--snapshot-update`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from syrupy.extensions.json import JSONSnapshotExtension

GOLDEN = Path(__file__).parent.parent / "golden"


def measured(value: float | None, tolerance: float) -> dict[str, float] | None:
    """A number with its two-sided tolerance, in the number's own unit; None stays None."""
    return None if value is None else {"value": float(value), "tolerance": tolerance}


def counted(n: int, *, exact: bool) -> Any:
    """A count of prompts; where it is not exact (below float32), good to two near ties."""
    return n if exact else measured(n, 2)


def _is_measured(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"value", "tolerance"}


def differences(found: Any, golden: Any, where: str = "") -> Iterator[str]:
    """Yield a line for every place where `found` is not what the golden allows."""
    if _is_measured(golden):
        if not _is_measured(found):
            yield f"{where}={found!r}, expected a number"
        elif not abs(found["value"] - golden["value"]) <= golden["tolerance"]:
            yield (
                f"{where}={found['value']:.6g}, expected {golden['value']:.6g} +- "
                f"{golden['tolerance']:g}"
            )
    elif isinstance(golden, dict) and isinstance(found, dict):
        for key in [*golden, *(k for k in found if k not in golden)]:
            if key not in found or key not in golden:
                yield f"{where}.{key}: only in the {'golden' if key in golden else 'result'}"
            else:
                yield from differences(found[key], golden[key], f"{where}.{key}")
    elif isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        for i, (a, b) in enumerate(zip(found, golden, strict=True)):
            yield from differences(a, b, f"{where}[{i}]")
    elif found != golden or type(found) is not type(golden):
        yield f"{where}={found!r}, expected {golden!r}"


@dataclass(frozen=True, eq=False)
class NotHeld:
    """Stands where a golden is compared with; skips the test there, after all its other checks."""

    reason: str

    def __eq__(self, other: object) -> bool:
        pytest.skip(self.reason)

    __hash__ = None  # type: ignore[assignment]


class GoldenExtension(JSONSnapshotExtension):
    """Compares within stored tolerances, in `golden/<test file>/<test>[<id>].json`."""

    def serialize(self, data: Any, **_: Any) -> str:
        """Write plain JSON with all digits."""
        return json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def matches(self, *, serialized_data: Any, snapshot_data: Any) -> bool:
        """Whether the result lies within what the golden allows."""
        return not any(differences(json.loads(serialized_data), json.loads(snapshot_data)))

    def diff_lines(self, serialized_data: Any, snapshot_data: Any) -> Iterator[str]:
        """Say which values are out, by how much."""
        if not snapshot_data:
            yield "no golden: measure it with --snapshot-update"
            return
        yield from differences(json.loads(serialized_data), json.loads(snapshot_data or "null"))

    @classmethod
    def dirname(cls, *, test_location: Any) -> str:
        """The golden folder of a test file."""
        return str(GOLDEN / Path(test_location.filepath).stem)

    @classmethod
    def discovery_dirname(cls, *, test_location: Any) -> str:
        """Look for stale goldens there only: `golden/paper` is nobody's snapshot to delete."""
        return cls.dirname(test_location=test_location)
