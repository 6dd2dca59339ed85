"""What some tests need of the machine, and what runs them where it is not there."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ccm.experiment.fact_files import DATA_VARIABLE, RELEASED, pararel_folder
from ccm.experiment.released_stats import FOLDER


@dataclass(frozen=True)
class Need:
    """One thing that not every machine has."""

    what: str
    there: Callable[[], bool]
    how: str  # to have the tests run

    @property
    def reason(self) -> str:
        """Why a test skips, and what a user can do."""
        return f"needs {self.what}: {self.how}"

    def mark(self) -> pytest.MarkDecorator:
        """Skip a test where it is not there."""
        return pytest.mark.skipif(not self.there(), reason=self.reason)

    def check(self) -> None:
        """Skip the running test where it is not there."""
        if not self.there():
            pytest.skip(self.reason)


def _statistics() -> bool:
    folder = pararel_folder()
    return folder is not None and (folder / FOLDER).is_dir()


FACTS = Need(
    "the released facts",
    lambda: pararel_folder() is not None,
    f"set {DATA_VARIABLE} to the folder that holds {' and '.join(file.names for file in RELEASED)}",
)
STATISTICS = Need(
    "the released activation statistics",
    _statistics,
    f"set {DATA_VARIABLE} to a folder that holds {FOLDER} beside the released facts",
)
NO_GPU = Need(
    "a machine without CUDA",
    lambda: not torch.cuda.is_available(),
    "hide its GPUs, CUDA_VISIBLE_DEVICES= pytest ...",
)
PDFLATEX = Need(
    "pdflatex",
    lambda: shutil.which("pdflatex") is not None,
    "install TeX Live's LaTeX (Debian: texlive-latex-recommended)",
)
PROC = Need("a folder that even root cannot write to", Path("/proc").is_dir, "run it on Linux (/proc)")
XDIST = Need(
    "pytest-xdist",
    lambda: _importable("xdist"),
    "pip install -e .[test]",
)
CHECKOUT = Need(
    "pyproject.toml",
    (Path(__file__).parent.parent / "pyproject.toml").is_file,
    "run it in a checkout of the repository",
)
SETUPTOOLS = Need("setuptools", lambda: _importable("setuptools"), "pip install 'setuptools>=77'")
NEEDS = (FACTS, STATISTICS, NO_GPU, PDFLATEX, PROC, XDIST, CHECKOUT, SETUPTOOLS)


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
