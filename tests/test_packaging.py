"""What an installation carries: every package, and every file that the package reads."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ccm
from tests.needs import CHECKOUT, SETUPTOOLS

PACKAGE = Path(ccm.__file__).parent
ROOT = PACKAGE.parent
PRINTED = "ccm.paper.printed"  # golden/paper, under the name it is installed by


def test_no_package_is_forgotten() -> None:
    CHECKOUT.check()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"(?ms)^packages = \[(.*?)^\]", project)
    assert listed is not None
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert re.findall(r'"([^"]+)"', listed.group(1)) == sorted({*there, PRINTED})
    modules = {path.parent for path in PACKAGE.rglob("*.py")}
    assert {folder for folder in modules if not (folder / "__init__.py").is_file()} == set()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, unpacked; read-only."""
    CHECKOUT.check()
    SETUPTOOLS.check()
    checkout, wheels, unpacked = (tmp_path_factory.mktemp(name) for name in ("src", "wheels", "site"))
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("ccm", "golden/paper"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(wheels)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_a_wheel_carries_every_file(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {path.as_posix() for path in found if "__pycache__" not in path.parts}

    printed = {f"paper/printed/{path.name}" for path in (ROOT / "golden" / "paper").iterdir()}
    assert files(installed / "ccm") == files(PACKAGE) | printed


def test_the_printed_numbers_are_read_from_an_installation(installed: Path, tmp_path: Path) -> None:
    code = (
        "from ccm.paper.values import FOLDER, printed, printed_models\n"
        "print(FOLDER, *(printed(model).gts['mode_ablation'].value for model in printed_models()))"
    )
    environment = {"PYTHONPATH": str(installed), "PATH": ""}
    found = []
    for folder in (installed, ROOT):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(done.stdout.split())
    assert [folder for folder, *_ in found] == [
        str(installed / "ccm" / "paper" / "printed"),
        str(ROOT / "golden" / "paper"),
    ]
    assert found[0][1:] == found[1][1:]
    assert len(found[0]) == 1 + 5
