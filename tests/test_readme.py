"""The README is short, and starts a reader off."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP = "python3 -m venv .venv && .venv/bin/pip install --quiet tox && .venv/bin/tox -e "


def test_it_is_read_in_one_go() -> None:
    assert len(TEXT.splitlines()) <= 150


def test_one_picture_shows_the_result_of_each_model() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(docs/images/(\w+)\.png\)", TEXT)
    assert [name.split("_")[0] for name in pictures] == ["organism", "smollm2"]


@pytest.mark.parametrize("environment", ["organism", "tests"])
def test_a_command_sets_up_all_it_needs(environment: str) -> None:
    """Each stands alone in its block, to be copied; CI gives the second in the same words."""
    assert f"```sh\n{SET_UP}{environment}\n```\n" in TEXT
    assert SET_UP + "tests" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_python_example_is_short_and_python() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    compile(block, "README.md", "exec")
    assert len(block.splitlines()) <= 12


def test_every_page_is_named() -> None:
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"\]\((docs/[\w-]+\.md)", TEXT))
