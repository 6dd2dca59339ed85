"""Which package may import which, and what the command line costs to start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ccm

PACKAGE = Path(ccm.__file__).parent
ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "transformer_lens", "pandas", "numpy", "scipy")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_import_is_relative(path: Path) -> None:
    imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    assert all(node.level == 0 for node in imports), path


def test_imports_run_one_way() -> None:
    """The contract of pyproject.toml, with every package of ccm in it."""
    # In a process of its own: it switches off the loggers of the one that calls it.
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["ccm", "ccm.cli.parser", "ccm.__main__"])
def test_the_command_line_starts_without_heavy_libraries(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], f"import {module} also imports {done.stdout}"
