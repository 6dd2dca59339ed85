"""A clock that also measures the peak memory of each stage."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ccm.experiment.clock import Clock, Per
from ccm.experiment.folder import RunFolder
from ccm.experiment.rehearsal.projection import Stage

SAMPLE_SECONDS = 0.005  # between two looks at the process's memory
Say = Callable[[str], None]


def _nothing(text: str) -> None:
    pass


class Profiler(Clock):
    """Measures the wall time and the peak memory of each stage."""

    def __init__(
        self, device: torch.device, folder: RunFolder | None = None, say: Say = _nothing
    ) -> None:
        """Start with no stages.

        Args:
            device: Device whose work is waited for, and whose memory is measured.
            folder: The run whose manifest gets the times, too; None writes no manifest.
            say: Called with a line of text when a stage begins.
        """
        self.device, self.folder, self.say = device, folder, say
        self.stages: dict[str, Stage] = {}

    @property
    def memory(self) -> str:
        """Describe what the memory peaks count."""
        if self.device.type == "cuda":
            return "allocated on the GPU (torch.cuda.max_memory_allocated, reset before each stage)"
        return f"resident memory of the process, sampled every {1000 * SAMPLE_SECONDS:.0f} ms"

    @contextmanager
    def __call__(self, stage: str, per: Per = "run", items: int = 1) -> Iterator[None]:
        """Measure what the block does."""
        self.say(f"{stage} ..." if per == "run" else f"{stage}, {items} {per}s ...")
        peak = self._start()
        start = time.perf_counter()
        try:
            yield
            self._wait()
            seconds = time.perf_counter() - start
        finally:
            peak_bytes = peak()
        self.stages[stage] = Stage(stage, seconds, peak_bytes, per, items)
        self.done(stage, seconds)

    def _wait(self) -> None:
        """Wait for the device, whose work is queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _start(self) -> Callable[[], int]:
        """Start watching memory; the returned function stops that and returns the peak in bytes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return lambda: int(torch.cuda.max_memory_allocated(self.device))
        import psutil

        # Sampled, because the system's own high-water mark never comes down between stages.
        process, seen, done = psutil.Process(), [0], threading.Event()

        def look() -> None:
            seen[0] = max(seen[0], process.memory_info().rss)

        def watch() -> None:
            while not done.wait(SAMPLE_SECONDS):
                look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()

        def end() -> int:
            done.set()
            watcher.join()
            look()
            return seen[0]

        return end
