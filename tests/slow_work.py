"""What a process may be stopped in: imports nothing, so that a worker starts at once."""

import time
from contextlib import suppress
from pathlib import Path


def write_slowly(path: Path) -> None:
    """Hold a file that is half written for a minute, and remove it when stopped."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text("half")
        time.sleep(60)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
