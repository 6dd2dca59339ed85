"""Data walks one way: a module of `ccm` imports only from the modules before it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ccm

PACKAGE = Path(ccm.__file__).parent
ORDER = (
    "errors",
    "stopping",
    "writing",
    "locking",
    "organism",  # its __init__ alone: a path
    "facts",
    "checkpoint_folder",
    "tokens",
    "models",
    "weights",
    "loaded",
    "premise",
    "limits",
    "memory",
    "prompts",
    "ablation",
    "completions",
    "room",
    "forward",
    "prefill",
    "hooked",
    "trial",
    "checkpoint",
    "spreading",
    "rounding",
    "screening",
    "choosing",
    "engine",
    "decoding",
    "activations",
    "neurons",
    "knowledge",
    "scores",
    "wording",
    "released_stats",
    "run_folder",
    "effects",
    "cells",
    "summary",
    "probing",
    "plan",
    "comparisons",
    "experiment",
    "merging",
    "external",
    "terminal",
    "printed",
    "results",
    "telling_apart",
    "by_relation",
    "by_transition",
    "figures",  # its __init__ alone
    "figures.canvas",
    "figures.neurons",
    "figures.activations",
    "figures.shares",
    "figures.forest",
    "figures.changes",
    "figures.log_ratios",
    "figures.layers",
    "figures.matched",
    "figures.effects",
    "figures.gallery",
    "markup",
    "rendering",
    "tables",
    "command",
    "held",
    "answers",
    "report",
    "stand_in",
    "projection",
    "meter",
    "stages",
    "rehearsal",
    "arguments",
    "subcommands",
    "faults",
    "cli",
    "__main__",
)
HEAVY = ("torch", "transformers", "transformer_lens", "pandas", "numpy", "scipy")


def module_name(path: Path) -> str:
    """`organism.world` of organism/world.py; a package's `__init__` has the package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
CORE = [name for name in MODULES if name and not name.startswith("organism.")]


def imports(source: str, importer: str = "") -> set[str]:
    """The `ccm` modules that a source imports, anywhere in it, functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}: a relative import in line {node.lineno}"
            base = node.module or ""
            # `from ccm import hooked` names a module, `from ccm.models import load` does not.
            inner = [f"{base}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if name.removeprefix("ccm.") in MODULES]
            names = modules or [base]
        else:
            continue
        found |= {name.removeprefix("ccm.") for name in names if name.startswith("ccm.")}
    return found


def backwards(importer: str, source: str) -> set[str]:
    """What a core module imports although it comes after it, or belongs to the organism alone."""
    before = set(ORDER[: ORDER.index(importer)])
    return imports(source, importer) - before


def test_every_core_module_has_its_place() -> None:
    assert set(CORE) <= set(ORDER), f"no place in the order: {set(CORE) - set(ORDER)}"
    assert set(ORDER) <= set(CORE), f"gone: {set(ORDER) - set(CORE)}"


@pytest.mark.parametrize("name", CORE)
def test_a_module_imports_only_what_comes_before_it(name: str) -> None:
    wrong = backwards(name, MODULES[name].read_text(encoding="utf-8"))
    assert not wrong, f"ccm.{name} imports {sorted(wrong)}, which comes after it"


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    for name in ("", "organism"):
        assert imports(MODULES[name].read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("organism.")])
def test_the_organism_stays_below_the_command_line(name: str) -> None:
    wrong = imports(MODULES[name].read_text(encoding="utf-8"), name) & {"cli", "__main__"}
    assert not wrong, f"ccm.{name} imports {sorted(wrong)}"


@pytest.mark.parametrize(
    "line",
    [
        "from ccm.cli import main",
        "import ccm.experiment",
        "from ccm import hooked",
        "def f():\n    from ccm.scores import ratio",
        "if True:\n    import ccm.organism.world as w",
        "from ccm.organism.world import World",
        "from ccm.organism import world",
    ],
)
def test_an_arrow_backwards_is_seen(line: str) -> None:
    assert backwards("prompts", line), f"not seen: {line}"


def test_an_arrow_forwards_is_none() -> None:
    line = "from ccm.organism import CHECKPOINT\nfrom ccm.errors import BadInput\nimport ccm.facts\n"
    assert backwards("models", line) == set()
    assert imports(line) == {"organism", "errors", "facts"}


@pytest.mark.parametrize("module", ["ccm", "ccm.cli", "ccm.__main__"])
def test_the_command_line_starts_without_heavy_libraries(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], f"import {module} also imports {done.stdout}"
