"""What the command line costs to start, and that imports name modules in full."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ccm

PACKAGE = Path(ccm.__file__).parent
HEAVY = ("torch", "transformers", "transformer_lens", "pandas", "numpy", "scipy")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_import_is_relative(path: Path) -> None:
    imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    assert all(node.level == 0 for node in imports), path


@pytest.mark.parametrize("module", ["ccm", "ccm.cli.parser", "ccm.__main__"])
def test_the_command_line_starts_without_heavy_libraries(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], f"import {module} also imports {done.stdout}"
