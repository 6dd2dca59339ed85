"""What a reader of `ccm` can rely on: docstrings, annotations, and one version number."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ccm
from tests.needs import CHECKOUT

PACKAGE = Path(ccm.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__")


def public(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions and classes, and the public methods of public classes, by dotted name."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and is_public(node.name):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, Function) and is_public(member.name):
                        yield f"{node.name}.{member.name}", member


def unannotated(node: Function, *, method: bool) -> list[str]:
    """Names of arguments without a type, and `return` where that has none."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    static = any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
    arguments = arguments[1:] if method and not static else arguments
    arguments += node.args.kwonlyargs
    arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
    missing = [argument.arg for argument in arguments if argument.annotation is None]
    return missing if node.returns is not None else [*missing, "return"]


def complaints(source: str) -> list[str]:
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for name, node in public(tree):
        if not (ast.get_docstring(node) or "").strip():
            found.append(f"{name} has no docstring")
        if isinstance(node, Function):
            found += [f"{name}: no type for {part}" for part in unannotated(node, method="." in name)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_public_things_are_documented_and_typed(path: Path) -> None:
    assert complaints(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1", "the module has no docstring"),
        ('"""M."""\ndef f() -> None: ...', "f has no docstring"),
        ('"""M."""\ndef f(a, *, b: int) -> None:\n    """F."""', "f: no type for a"),
        ('"""M."""\ndef f(*a: int, **b) -> None:\n    """F."""', "f: no type for b"),
        ('"""M."""\nclass C: ...', "C has no docstring"),
        (
            '"""M."""\nclass C:\n    """C."""\n    def m(self):\n        """M."""',
            "C.m: no type for return",
        ),
        ('"""M."""\nclass C:\n    """C."""\n    def m(self) -> int: ...', "C.m has no docstring"),
    ],
)
def test_what_is_missing_is_named(source: str, complaint: str) -> None:
    assert complaints(source) == [complaint]


def test_private_things_may_speak_for_themselves() -> None:
    assert complaints('"""M."""\ndef _f(x): ...\nclass _C: ...\n') == []


def test_annotations_are_real_objects() -> None:
    """Text annotations would blind the shape checks of the tests."""
    for path in MODULES:
        assert "from __future__ import annotations" not in path.read_text(encoding="utf-8"), path


def test_one_version() -> None:
    CHECKOUT.check()
    project = PACKAGE.parent / "pyproject.toml"
    written = re.search(r'(?m)^version = "([^"]+)"$', project.read_text(encoding="utf-8"))
    assert written is not None
    assert ccm.__version__ == written.group(1)


def test_the_types_are_published() -> None:
    assert (PACKAGE / "py.typed").is_file()
