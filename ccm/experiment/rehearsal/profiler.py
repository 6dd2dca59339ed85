"""Measures stages: wall time, and the highest memory while each ran."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ccm.experiment.rehearsal.projection import Per, Stage

SAMPLE_SECONDS = 0.005  # between two looks at the process's memory
Say = Callable[[str], None]


class Meter:
    """Measures stages: wall time, and the highest memory while each ran."""

    def __init__(self, device: torch.device, say: Say) -> None:
        """Start with no stages."""
        self.device, self.say = device, say
        self.stages: list[Stage] = []

    @property
    def memory(self) -> str:
        """What the peaks count."""
        if self.device.type == "cuda":
            return "allocated on the GPU (torch.cuda.max_memory_allocated, reset before each stage)"
        return f"resident memory of the process, looked at every {1000 * SAMPLE_SECONDS:.0f} ms"

    @contextmanager
    def stage(
        self,
        name: str,
        per: Per = "run",
        items: int = 1,
        *,
        in_run: bool = True,
        most: int | None = None,
    ) -> Iterator[None]:
        """Measure what the block does."""
        self.say(f"{name} ...")
        peak = self._start()
        start = time.perf_counter()
        try:
            yield
            self.wait()
            seconds = time.perf_counter() - start
        finally:
            peak_bytes = peak()
        stage = Stage(name, seconds, peak_bytes, per, items, in_run=in_run, most=most)
        self.stages.append(stage)

    def seconds(self, step: Callable[[], object]) -> float:
        """Time one call; what it returns is let go of."""
        start = time.perf_counter()
        step()
        self.wait()
        return time.perf_counter() - start

    def fix(self, seconds: float) -> None:
        """Say how much of the last stage more items leave as it is."""
        self.stages[-1] = replace(self.stages[-1], fixed_seconds=min(seconds, self.stages[-1].seconds))

    def wait(self) -> None:
        """Wait for the device, whose work is queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _start(self) -> Callable[[], int]:
        """Start to watch memory; the returned function ends it and gives the peak in bytes."""
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
