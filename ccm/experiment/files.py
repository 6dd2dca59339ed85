"""Files of a run by kind: JSON, tables, statistics; written atomically, checked when read back."""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy

from ccm.errors import BadInput
from ccm.experiment.writing import write_atomically
from ccm.method.statistics import STATISTICS, ActivationStatistics


def to_json(value: object) -> str:
    """Serialise dataclasses and numpy numbers; NaN becomes null, floats keep all their digits."""
    return json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda p: p.write_text(to_json(value), encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read JSON back.

    Raises:
        BadInput: not JSON, or an object that names a key twice.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({error}).") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a duplicate key, which JSON allows: its first value would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is there twice")
        found[key] = value
    return found


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a Parquet file atomically."""
    write_atomically(path, lambda p: table.to_parquet(p, index=False))


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Read what `write_table` wrote.

    Raises:
        BadInput: the file is damaged.
    """
    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError) as error:  # pyarrow's errors are kinds of these
        raise damaged(path, error) from error


def write_statistics(path: Path, statistics: ActivationStatistics, positions: int) -> None:
    """Write activation statistics as float64 safetensors.

    Args:
        path: The file.
        statistics: What to write.
        positions: How many token positions they were taken over; 0 if that is not known.
    """
    tensors = {name: np.ascontiguousarray(getattr(statistics, name)) for name in STATISTICS}
    tensors["n_positions"] = np.asarray([positions])
    write_atomically(path, lambda p: safetensors.numpy.save_file(tensors, p))


def read_statistics(path: Path) -> tuple[ActivationStatistics, int]:
    """Read what `write_statistics` wrote.

    Returns:
        The statistics, and how many token positions they were taken over.

    Raises:
        BadInput: the file is damaged.
    """
    tensors, _ = read_stamped(path)
    if tensors.keys() != {*STATISTICS, "n_positions"}:
        raise damaged(path, "not activation statistics")
    positions = int(tensors.pop("n_positions")[0])
    return ActivationStatistics(**tensors), positions


def read_stamped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        BadInput: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names, stamp = list(file.keys()), dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in names}, stamp
    except (OSError, safetensors.SafetensorError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: object) -> BadInput:
    """Make the error for a damaged file of a run: it was written whole, so the damage came later."""
    return BadInput(f"{path}: damaged ({error}). Remove it to compute it again.")
