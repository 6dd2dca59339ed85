"""A run's folder: which files it holds, and a manifest that says which run it belongs to."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ccm.errors import BadInput, CannotWrite
from ccm.experiment.files import read_json, to_json, write_json
from ccm.experiment.locking import LOCK, check_still_locked, locked
from ccm.experiment.writing import PARTIAL, remove_partial, try_writing

FORMAT = 1  # of run folders; a folder of another format is not read
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
# Files that a run writes before anything is decoded under an ablation.
FILES = (PROMPTS, MEASURES, SINGULAR_VALUES, RHO_BY_LAYER, ACTIVATION_STATS)


def check_folder(path: Path) -> None:
    """Refuse a path that exists and is neither a run folder nor an empty folder.

    Raises:
        BadInput: it is a file, or a folder that holds something else.
    """
    # For a name too long for the file system `os.path` says that it does not exist; `Path` raises.
    if os.path.exists(path) and not path.is_dir():
        raise BadInput(f"{path}: is a file. Give a folder with --out.")
    if os.path.isdir(path) and not (path / MANIFEST).is_file() and _names(path):
        raise BadInput(f"{path}: not empty and holds no run. Nothing was written; give another --out.")


def read_manifest(folder: Path, way_out: str) -> dict[str, Any]:
    """Read the manifest of a run folder.

    Args:
        folder: The folder.
        way_out: What to do if it holds no run, for the message.

    Raises:
        BadInput: the manifest is missing, not a run's, or of another format.
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
    """List the names in a folder, without locks and files that a killed process was writing."""
    return {p.name for p in path.iterdir() if p.suffix != PARTIAL and not p.name.startswith(LOCK)}


@contextmanager
def locked_for(out: Path) -> Iterator[None]:
    """Lock the folder for figures or reports of finished runs, or the run folder that it lies in.

    Args:
        out: Where they are written: a run folder, a folder in one, or any other.

    Raises:
        InUse: another process is writing there.
    """
    folder = folder_to_lock(out)
    with locked(folder):
        if (folder / MANIFEST).is_file():  # then all files in it are a run's
            remove_partial(folder)
        yield


def folder_to_lock(out: Path) -> Path:
    """Return the run folder that a folder is or lies in; else the folder itself."""
    return next((folder for folder in (out, out.parent) if (folder / MANIFEST).is_file()), out)


class RunFolder:
    """The folder of one run, with its manifest."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Open a new folder, or one that an earlier start of the same run left.

        Args:
            path: The folder; made if it is missing.
            identity: Everything that a result depends on. A folder belongs to one identity.

        Raises:
            BadInput: the folder holds another run or other files, or cannot be written to.
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
        """Return the folder's manifest, or write a new one."""
        path = self.path
        check_folder(path)
        fresh = {"format": FORMAT, "identity": identity, "timings_s": {}, "done": [], "complete": False}
        if os.path.isfile(path / MANIFEST):
            held = read_manifest(path, "Give another --out.")
            if _names(path) == {MANIFEST} and held["identity"] != identity:  # nothing to lose
                held = fresh
            self._check_same(identity, held["identity"])
            if held["complete"]:  # the folder may be read-only
                return held
        else:
            held = fresh
        # A folder that cannot be written to is found before the work: everything that is done to files
        # later is tried now, in a subfolder and, with the manifest, in the folder itself.
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
            InUse: another process has taken the folder over (see `ccm.experiment.locking`).
        """
        check_still_locked(self.path)
        write_json(self.path / MANIFEST, self.manifest)

    def note(self, **entries: Any) -> None:
        """Add entries to the manifest and save it."""
        self.manifest.update(json.loads(to_json(entries)))
        self.save_manifest()

    def time(self, stage: str, seconds: float) -> None:
        """Note a stage as done, and add its seconds to those of earlier starts that completed it."""
        timings = self.manifest["timings_s"]
        timings[stage] = round(timings.get(stage, 0.0) + seconds, 3)
        if stage not in self.manifest["done"]:
            self.manifest["done"].append(stage)
        self.save_manifest()

    def has(self, name: str) -> bool:
        """Return whether the folder has a file."""
        return (self.path / name).is_file()

    def missing(self) -> list[Path]:
        """List the files of a finished run that are missing, whatever the manifest says.

        A shard of a run has neither cells nor effects nor scores: only what every shard has counts.
        """
        values, shared = self.manifest["identity"]["ablation_values"], [self.path / n for n in FILES]
        if self.manifest["identity"].get("shard") is not None:
            return [path for path in shared if not path.is_file()]
        cells = [self.cell("", "plain"), self.path / SET_EFFECTS]
        cells += [self.path / value / PROMPT_EFFECTS for value in values]
        cells += [
            self.cell(v, name) for v in values for name in self.manifest.get("sets", ("entropy",))
        ]
        return [
            path
            for path in [*shared, *cells, self.path / SCORE_TABLE, self.path / SCORES]
            if not path.is_file()
        ]

    def cell(self, ablation_value: str, set_name: str) -> Path:
        """Return the path of a cell; the plain run's belongs to no ablation value."""
        if set_name == "plain":
            return self.path / "plain.parquet"
        return self.path / ablation_value / f"{set_name}.parquet"
