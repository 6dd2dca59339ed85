"""Finished batches of a stage, kept in the run folder until the stage's results are written."""

import hashlib
from contextlib import suppress
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.numpy

from ccm.decoding.results import Batch
from ccm.errors import BadInput
from ccm.experiment.files import read_json, read_stamped, to_json
from ccm.experiment.folder import BATCHES, MANIFEST
from ccm.experiment.writing import remove_partial, write_atomically

AT_LAST = "at_last."  # begins the names of arrays that were read at last prompt positions


class BatchStore:
    """Finished batches of a stage, kept until the stage's results are written.

    Then they are removed, one by one. A stage whose results are all written must not read the batches:
    an earlier start may have been stopped while it removed them.
    """

    def __init__(self, run: Path, stage: str = "ablations") -> None:
        """Name the folder, which is created with the first batch."""
        self.run, self.stage = run, stage
        self.path = run / BATCHES / stage

    @cached_property
    def stamp(self) -> dict[str, str]:
        """Metadata of every batch: which run (not which shard) and which stage it belongs to.

        It has one key, because safetensors writes several in an order that changes.
        """
        known = read_json(self.run / MANIFEST)["identity"] if (self.run / MANIFEST).is_file() else {}
        told = to_json({key: known[key] for key in sorted(known) if key != "shard"})
        return {"of": f"{self.stage} {hashlib.sha256(told.encode()).hexdigest()}"}

    def write(self, batch: Batch) -> None:
        """Keep a batch, named after its first prompt."""
        arrays = {
            f.name: np.ascontiguousarray(getattr(batch, f.name))
            for f in fields(batch)
            if f.name not in ("leaves", "texts", "at_last")
        }
        arrays |= {AT_LAST + name: array for name, array in batch.at_last.items()}
        # Ragged: all continuations end to end, and their lengths.
        arrays["leaf_tokens"] = np.asarray([t for leaf in batch.leaves for t in leaf], dtype=np.int64)
        arrays["leaf_lengths"] = np.asarray([len(leaf) for leaf in batch.leaves], dtype=np.int64)
        encoded = [text.encode() for text in batch.texts]
        arrays["text_bytes"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays["text_lengths"] = np.asarray([len(text) for text in encoded], dtype=np.int64)
        write_atomically(
            self.path / f"batch_{int(batch.prompts[0]):06d}.safetensors",
            lambda p: safetensors.numpy.save_file(arrays, p, metadata=self.stamp),
        )

    def read(self) -> list[Batch]:
        """Read all batches of the folder.

        Raises:
            BadInput: a batch is damaged or of another run or stage, or two hold the same prompt.
        """
        batches, held = list[Batch](), dict[int, Path]()
        for path in sorted(self.path.glob("batch_*.safetensors")):
            arrays, stamp = read_stamped(path)
            if stamp != self.stamp:
                raise self._unfit(path, "no batch of this stage of this run")
            for prompt in arrays["prompts"].tolist():
                if prompt in held:
                    raise self._unfit(path, f"holds prompt {prompt} as {held[prompt].name} does")
                held[prompt] = path
            batches.append(_batch(arrays))
        return batches

    def _unfit(self, path: Path, why: str) -> BadInput:
        return BadInput(f"{path}: {why}. Remove {self.path}: what it held is computed again.")

    def clear(self) -> None:
        """Remove the batches, and their folders if nothing else is in them.

        A file that cannot be removed does no harm: it is not read again.
        """
        remove_partial(self.path)
        for path in self.path.glob("batch_*.safetensors"):
            with suppress(OSError):
                path.unlink()
        for folder in (self.path, self.path.parent):
            with suppress(OSError):
                folder.rmdir()


def _batch(arrays: dict[str, np.ndarray]) -> Batch:
    leaves = _split(arrays.pop("leaf_tokens"), arrays.pop("leaf_lengths"))
    texts = _split(arrays.pop("text_bytes"), arrays.pop("text_lengths"))
    noted = [name for name in arrays if name.startswith(AT_LAST)]
    return Batch(
        leaves=tuple(tuple(leaf.tolist()) for leaf in leaves),
        texts=tuple(text.tobytes().decode() for text in texts),
        at_last={name.removeprefix(AT_LAST): arrays.pop(name) for name in noted},
        **arrays,
    )


def _split(joined: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(joined, np.cumsum(lengths)[:-1])
