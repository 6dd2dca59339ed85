"""A clock that writes the time of each stage to the manifest; a rehearsal's profiler extends it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ccm.experiment.folder import RunFolder

Per = Literal["run", "fact", "prompt"]  # unit of a stage's work


class Clock:
    """Writes the time of every stage to the manifest, once the stage is done."""

    def __init__(self, folder: RunFolder) -> None:
        """Take the run folder whose manifest gets the times."""
        self.folder: RunFolder | None = folder

    @contextmanager
    def __call__(self, stage: str, per: Per = "run", items: int = 1) -> Iterator[None]:
        """Time a stage; if the block fails, the stage is not noted.

        Args:
            stage: Its name in the manifest.
            per: Unit of its work.
            items: How many facts or prompts; 1 for a run.
        """
        start = time.perf_counter()
        yield
        self.done(stage, time.perf_counter() - start)

    def done(self, stage: str, seconds: float) -> None:
        """Note a stage that is done, with its time in seconds."""
        if self.folder is not None:
            self.folder.time(stage, seconds)
