"""Times the stages of a run, in its manifest; whatever else is to be known of them extends this."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ccm.experiment.folder import RunFolder

Per = Literal["run", "fact", "prompt"]  # what a stage is done once for


class Clock:
    """Writes the time of every stage to the manifest, once the stage is done."""

    def __init__(self, folder: RunFolder) -> None:
        """Fix the manifest."""
        self.folder: RunFolder | None = folder

    @contextmanager
    def __call__(self, stage: str, per: Per = "run", items: int = 1) -> Iterator[None]:
        """Time what the block does; a block that fails is no stage that is done.

        Args:
            stage: Its name in the manifest.
            per: What it is done once for.
            items: So many facts or prompts; 1 for a run.
        """
        start = time.perf_counter()
        yield
        self.done(stage, time.perf_counter() - start)

    def done(self, stage: str, seconds: float) -> None:
        """Write a stage down."""
        if self.folder is not None:
            self.folder.time(stage, seconds)
