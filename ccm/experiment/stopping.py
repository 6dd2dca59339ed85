"""Signals that ask the command to stop: Ctrl-C, a batch system's SIGTERM, a terminal that closes.

All three are raised as `Stopped` in the main thread, so that half-written files are removed and one
line is printed. Worker processes, which draw figures, end with the command and print nothing.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn, TypeVar

from ccm.errors import NotAvailable

# Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Ends a worker; nobody else sends it, so that none ends before the parent knows why.
END_OF_WORKER = getattr(signal, "SIGUSR1", signal.SIGTERM)
AGAIN_SECONDS = 0.05
PATIENCE_SECONDS = 5.0  # for a worker to clean up
BY_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)
SAME_SECONDS = 2.0  # a signal this soon after the first is the same one, also sent by a parent
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, number: int) -> None:
        """Note which signal it was."""
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.code = 128 + number  # as a shell gives it for a program that the signal ended


class _Again:
    """Handles exceptions that cannot be raised: a signal's are raised again a little later.

    A handler may run within a finalizer or a weak reference's callback, whose exceptions Python only
    prints, with a traceback; the command would not stop.
    """

    def __init__(self, kind: type[BaseException], again: Callable[[], None]) -> None:
        """Keep the hook that was there before.

        Args:
            kind: What a handler raises.
            again: Sends the signal again.
        """
        self.kind, self.again, self.before = kind, again, sys.unraisablehook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Handle an exception that could not be raised."""
        if isinstance(unraisable.exc_value, self.kind):
            timer = threading.Timer(AGAIN_SECONDS, self.again)
            timer.daemon = True
            timer.start()
        else:
            self.before(unraisable)


def _interrupt_main(number: int) -> None:
    """Send a signal to the main thread, which wakes it if it waits."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


class Stopping:
    """Handlers of `SIGNALS`: the first signal is raised, and a much later one ends the program.

    A signal that has another handler keeps it, and an ignored one stays ignored, as `nohup` wants.
    Outside the main thread nothing is installed.
    """

    def __init__(self, last_words: Callable[[], None]) -> None:
        """Install nothing yet.

        Args:
            last_words: Called before a second signal ends the program.
        """
        self.stopped: Stopped | None = None
        self._last_words = last_words
        self._finished = self._ended = self._lost = False
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {n: handler for n, handler in found.items() if handler in BY_DEFAULT}
            for number in self._before:
                signal.signal(number, self._handle)
            sys.unraisablehook = _Again(Stopped, self._again)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the earlier handlers."""
        if not self._finished:
            self._ended = True
            for number, handler in self._before.items():
                signal.signal(number, handler)
            if isinstance(sys.unraisablehook, _Again):
                sys.unraisablehook = sys.unraisablehook.before

    def finish(self) -> None:
        """Keep the handlers until the process ends; from now on a signal ends it silently."""
        self._finished = True

    def _again(self) -> None:
        if self.stopped is not None and not self._ended:
            self._lost = True
            _interrupt_main(self.stopped.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._finished:
            os._exit((self.stopped or Stopped(number)).code)
        if self._lost:
            self._lost = False
            raise self.stopped or Stopped(number)
        if self.stopped is None:
            self.stopped, self._at = Stopped(number), time.monotonic()
            raise self.stopped
        if time.monotonic() - self._at > SAME_SECONDS:
            # Raised, it would print a traceback from whatever cleans up.
            self._last_words()
            os._exit(self.stopped.code)


def in_processes(
    function: Callable[[_In], _Out], items: Sequence[_In], processes: int
) -> Generator[_Out, None, None]:
    """Map over items in several processes, which end with this one, however it ends.

    Args:
        function: Applied to every item; it and the items are pickled.
        items: The items.
        processes: How many. Each is a Python of its own, started anew: a fork of a process with
            threads, as torch has, may hang.

    Yields:
        The results, in the order of the items.

    Raises:
        NotAvailable: one of the processes was killed.
    """
    others, threads = set(multiprocessing.active_children()), set(threading.enumerate())
    context, pool = multiprocessing.get_context("spawn"), None
    try:
        with _signals_held():
            pool = ProcessPoolExecutor(processes, context, initializer=_begin_worker)
            # Not `map`: what it does when an item fails conflicts with what the pool itself does.
            futures = [pool.submit(_work, function, item) for item in items]
        for future in futures:
            yield future.result()
    except BaseException as error:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)  # before the pool misses a worker that ends
        _end(set(multiprocessing.active_children()) - others)
        # A pool that was told not to wait forgets its thread, which would be woken at the end of the
        # process, through a pipe that it may just have closed.
        for thread in set(threading.enumerate()) - threads:
            thread.join(PATIENCE_SECONDS)
        if isinstance(error, BrokenProcessPool):
            raise NotAvailable(
                f"one of {processes} processes was killed, most often for want of memory. Free some "
                "and give the same command again."
            ) from error
        raise
    finally:
        if pool is not None:
            pool.shutdown()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Block signals while workers start; they inherit the block, and die with no traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # started by the pool, it would let some through
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(workers: Iterable[BaseProcess]) -> None:
    """End workers; each is asked first, so that it leaves nothing half-written."""
    for worker in workers:
        with suppress(OSError):  # gone already
            os.kill(worker.pid or 0, END_OF_WORKER)
    until = time.monotonic() + PATIENCE_SECONDS
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
        worker.kill()


def _begin_worker() -> None:
    """Leave signals to the parent, and end when the parent says so or is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END_OF_WORKER, _end_worker)
    sys.unraisablehook = _Again(SystemExit, partial(_interrupt_main, END_OF_WORKER))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_worker(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _interrupt_main(END_OF_WORKER)


def _work(function: Callable[[_In], _Out], item: _In) -> _Out:
    """Process one item; end the process if `_end_worker` raised, because the pool would go on."""
    try:
        return function(item)
    except SystemExit:
        os._exit(1)
