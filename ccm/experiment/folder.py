"""The files a run leaves behind: written atomically, read back for resuming, never another run's."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy

from ccm.decoding.results import Batch
from ccm.errors import BadInput, CannotWrite
from ccm.experiment.locking import LOCK, check_still_locked, locked
from ccm.experiment.writing import PARTIAL, remove_partial, try_writing
from ccm.experiment.writing import write_atomically as write_atomically
from ccm.experiment.writing import write_formats as write_formats
from ccm.method.ablation import STATISTICS, ActivationStatistics

FORMAT = 1  # of run folders; a folder of another is not read
MANIFEST = "manifest.json"
PROMPTS = "prompts.parquet"
MEASURES = "measures.parquet"
SINGULAR_VALUES = "singular_values.parquet"
RHO_BY_LAYER = "rho_by_layer.parquet"
PROMPT_EFFECTS = "effects.parquet"  # one in the folder of each ablation value
SET_EFFECTS = "set_effects.parquet"
ACTIVATION_STATS = "activation_stats.safetensors"
SCORES = "scores.json"
SCORE_TABLE = "scores.parquet"
BATCHES = "batches"
# What a run makes before anything is decoded under an ablation, and beside it.
FILES = (PROMPTS, MEASURES, SINGULAR_VALUES, RHO_BY_LAYER, ACTIVATION_STATS, SET_EFFECTS)


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
    """Refuse what JSON lets pass: of two values under one key, the first would be lost."""
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
        raise _damaged(path, error) from error


def write_statistics(path: Path, statistics: ActivationStatistics, positions: int) -> None:
    """Write activation statistics as float64 safetensors, with the number of positions."""
    tensors = {name: np.ascontiguousarray(getattr(statistics, name)) for name in STATISTICS}
    tensors["n_positions"] = np.asarray([positions])
    write_atomically(path, lambda p: safetensors.numpy.save_file(tensors, p))


def read_statistics(path: Path) -> tuple[ActivationStatistics, int]:
    """Read what `write_statistics` wrote.

    Raises:
        BadInput: the file is damaged.
    """
    tensors = _read_tensors(path)
    if tensors.keys() != {*STATISTICS, "n_positions"}:
        raise _damaged(path, "not activation statistics")
    positions = int(tensors.pop("n_positions")[0])
    return ActivationStatistics(**tensors), positions


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return dict(safetensors.numpy.load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(path, error) from error


def _read_stamped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read tensors with what the file says of itself."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names, stamp = list(file.keys()), dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in names}, stamp
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: object) -> BadInput:
    """What to say of a file of ours: they are written whole, so the damage came later."""
    return BadInput(f"{path}: damaged ({error}). Remove it to compute it again.")


def check_folder(path: Path) -> None:
    """Refuse what is there and is no run folder, nor an empty one.

    Raises:
        BadInput: a file, or a folder of other files.
    """
    # `os.path` says that a name too long for the file system is not there, where `Path` raises.
    if os.path.exists(path) and not path.is_dir():
        raise BadInput(f"{path}: is a file. Give a folder with --out.")
    if os.path.isdir(path) and not (path / MANIFEST).is_file() and _names(path):
        raise BadInput(f"{path}: not empty and holds no run. Nothing was written; give another --out.")


def read_manifest(folder: Path, way_out: str) -> dict[str, Any]:
    """Read what a run folder says of itself.

    Args:
        folder: The folder.
        way_out: What to do where it holds no run, for the message.

    Raises:
        BadInput: no manifest there, not a run's, or one of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BadInput(f"{folder}: no run folder (no {MANIFEST}). {way_out}")
    manifest = read_json(path)
    parts = [manifest.get(p) for p in ("identity", "timings_s")] if isinstance(manifest, dict) else []
    if not (parts and all(isinstance(part, dict) for part in parts)):
        raise BadInput(f"{path}: not a run's manifest. {way_out}")
    if manifest.get("format") != FORMAT:
        raise BadInput(
            f"{folder}: a run folder of format {manifest.get('format', 'none')}, and this version of "
            f"ccm reads format {FORMAT}. Run again in a new folder."
        )
    return dict(manifest)


def _names(path: Path) -> set[str]:
    """What a folder holds besides a lock and what was being written when its process was killed."""
    return {p.name for p in path.iterdir() if p.suffix != PARTIAL and not p.name.startswith(LOCK)}


@contextmanager
def locked_for(out: Path) -> Iterator[None]:
    """Hold the folder that what is made of finished runs is written to, or the run folder it lies in.

    Args:
        out: A run folder, a folder in one, or any other.

    Raises:
        InUse: another process is writing there.
    """
    folder = folder_to_lock(out)
    with locked(folder):
        if (folder / MANIFEST).is_file():  # nobody else's files are there
            remove_partial(folder)
        yield


def folder_to_lock(out: Path) -> Path:
    """The run folder that a folder is or lies in, or else that folder."""
    return next((folder for folder in (out, out.parent) if (folder / MANIFEST).is_file()), out)


class RunFolder:
    """One run's folder: its manifest says which run it holds."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Open a new folder, or one that an earlier start of the same run left.

        Args:
            path: The folder; made if it is not there.
            identity: Everything a result depends on. Two runs may share a folder only if it is equal.

        Raises:
            BadInput: the folder holds another run, or files that are no run at all, or cannot be
                written to.
        """
        self.path = path
        # Through JSON, so that it compares equal to what is read back.
        identity = json.loads(to_json(identity))
        try:
            self.manifest = self._open(identity)
        except (OSError, CannotWrite) as error:
            reason = error.reason if isinstance(error, CannotWrite) else error.strerror
            raise BadInput(f"{path}: cannot be written to ({reason}). Give another --out.") from error

    def _open(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Return the manifest that is there, or write a new one."""
        path = self.path
        check_folder(path)
        fresh = {"format": FORMAT, "identity": identity, "timings_s": {}, "done": [], "complete": False}
        if os.path.isfile(path / MANIFEST):
            held = read_manifest(path, "Give another --out.")
            if _names(path) == {MANIFEST} and held["identity"] != identity:  # nothing to lose
                held = fresh
            self._check_same(identity, held["identity"])
            if held["complete"]:  # it may be where nobody can write
                return held
        else:
            held = fresh
        # A folder that cannot be written to is found out before the work: all that is done to files
        # later is done now, below the folder and, with the manifest, in it.
        remove_partial(path)
        trial = path / f".trial{PARTIAL}"
        try_writing(trial)
        trial.rmdir()
        for _ in range(2):
            write_json(path / MANIFEST, held)
        return held

    def _check_same(self, identity: dict[str, Any], held: dict[str, Any]) -> None:
        for key in sorted(identity.keys() | held.keys()):
            if identity.get(key) != held.get(key):
                raise BadInput(
                    f"{self.path}: holds another run ({key} is {held.get(key)!r} there, "
                    f"{identity.get(key)!r} here). Nothing was written; give another --out."
                )

    def save_manifest(self) -> None:
        """Write the manifest as it stands.

        Raises:
            InUse: the folder is another process's now (see `ccm.experiment.locking`).
        """
        check_still_locked(self.path)
        write_json(self.path / MANIFEST, self.manifest)

    def note(self, **entries: Any) -> None:
        """Add entries to the manifest and save it."""
        self.manifest.update(json.loads(to_json(entries)))
        self.save_manifest()

    def time(self, stage: str, seconds: float) -> None:
        """Add to the time a stage has taken over all starts of this run: it is done."""
        timings = self.manifest["timings_s"]
        timings[stage] = round(timings.get(stage, 0.0) + seconds, 3)
        if stage not in self.manifest["done"]:
            self.manifest["done"].append(stage)
        self.save_manifest()

    def has(self, name: str) -> bool:
        """Whether a file is there already."""
        return (self.path / name).is_file()

    def missing(self) -> list[Path]:
        """Files of a finished run that are not there, whatever the manifest says of them.

        Of a shard of a run those that every shard has, which are no cells and no scores.
        """
        values, shared = self.manifest["identity"]["ablation_values"], [self.path / n for n in FILES]
        shared += [self.path / value / PROMPT_EFFECTS for value in values]
        if self.manifest["identity"].get("shard") is not None:
            return [path for path in shared if not path.is_file()]
        cells = [self.cell("", "plain")]
        cells += [
            self.cell(v, name) for v in values for name in self.manifest.get("sets", ("entropy",))
        ]
        return [
            path
            for path in [*shared, *cells, self.path / SCORE_TABLE, self.path / SCORES]
            if not path.is_file()
        ]

    def cell(self, ablation_value: str, set_name: str) -> Path:
        """Path of one cell's completions; the plain run belongs to no ablation value."""
        if set_name == "plain":
            return self.path / "plain.parquet"
        return self.path / ablation_value / f"{set_name}.parquet"


class ArrayStore:
    """Arrays of finished batches of a stage, kept until what is made of them is written.

    Only then are they removed, one by one: a stage whose results are all there must not read what is
    left of its batches, for a start before may have been stopped while it removed them.
    """

    def __init__(self, run: Path, stage: str) -> None:
        """Name the folder; nothing is made before the first batch."""
        self.run, self.stage = run, stage
        self.path = run / BATCHES / stage

    @cached_property
    def stamp(self) -> dict[str, str]:
        """What every batch says of itself: its run, whichever shard of it, and its stage.

        Under one key: safetensors writes several in an order that changes.
        """
        known = read_json(self.run / MANIFEST)["identity"] if (self.run / MANIFEST).is_file() else {}
        told = to_json({key: known[key] for key in sorted(known) if key != "shard"})
        return {"of": f"{self.stage} {hashlib.sha256(told.encode()).hexdigest()}"}

    def write_arrays(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep a batch, named after its first prompt."""
        name = f"batch_{first:06d}.safetensors"
        write_atomically(
            self.path / name, lambda p: safetensors.numpy.save_file(arrays, p, metadata=self.stamp)
        )

    def paths(self) -> list[Path]:
        """Files of the batches that are there."""
        return sorted(self.path.glob("batch_*.safetensors"))

    def read_arrays(self) -> Iterator[dict[str, np.ndarray]]:
        """Read every batch that is there, one at a time.

        Raises:
            BadInput: one is damaged, of another run or of another stage, or two hold the same prompt.
        """
        held: dict[int, Path] = {}
        for path in sorted(self.path.glob("batch_*.safetensors")):
            arrays, stamp = _read_stamped(path)
            if stamp != self.stamp:
                raise self._unfit(path, "no batch of this stage of this run")
            for prompt in arrays["prompts"].tolist():
                if prompt in held:
                    raise self._unfit(path, f"holds prompt {prompt} as {held[prompt].name} does")
                held[prompt] = path
            yield arrays

    def _unfit(self, path: Path, why: str) -> BadInput:
        return BadInput(f"{path}: {why}. Remove {self.path}: what it held is computed again.")

    def clear(self) -> None:
        """Remove the batches, and their folders unless others put something there.

        What cannot be removed is in nobody's way: it is not read again.
        """
        remove_partial(self.path)
        for path in self.path.glob("batch_*.safetensors"):
            with suppress(OSError):
                path.unlink()
        for folder in (self.path, self.path.parent):
            with suppress(OSError):
                folder.rmdir()


class BatchStore(ArrayStore):
    """Finished batches of a shared decode."""

    def __init__(self, run: Path, stage: str = "ablations") -> None:
        """Name the folder; nothing is made before the first batch."""
        super().__init__(run, stage)

    def write(self, batch: Batch) -> None:
        """Keep a batch, named after its first prompt."""
        arrays = {
            f.name: np.ascontiguousarray(getattr(batch, f.name))
            for f in fields(batch)
            if f.name not in ("leaves", "texts")
        }
        # Ragged: all continuations end to end, and their lengths.
        arrays["leaf_tokens"] = np.asarray([t for leaf in batch.leaves for t in leaf], dtype=np.int64)
        arrays["leaf_lengths"] = np.asarray([len(leaf) for leaf in batch.leaves], dtype=np.int64)
        encoded = [text.encode() for text in batch.texts]
        arrays["text_bytes"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays["text_lengths"] = np.asarray([len(text) for text in encoded], dtype=np.int64)
        self.write_arrays(int(batch.prompts[0]), arrays)

    def read(self) -> list[Batch]:
        """Read every batch that is there.

        Raises:
            BadInput: one is damaged, of another run or of another stage, or two hold the same prompt.
        """
        batches = []
        for arrays in self.read_arrays():
            leaves = _split(arrays.pop("leaf_tokens"), arrays.pop("leaf_lengths"))
            texts = _split(arrays.pop("text_bytes"), arrays.pop("text_lengths"))
            batches.append(
                Batch(
                    leaves=tuple(tuple(leaf.tolist()) for leaf in leaves),
                    texts=tuple(text.tobytes().decode() for text in texts),
                    **arrays,
                )
            )
        return batches


def _split(joined: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(joined, np.cumsum(lengths)[:-1])
