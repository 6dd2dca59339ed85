"""The README shows what is there."""

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
IMAGES = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
LARGEST = 80_000  # bytes: they are in every clone


def test_the_story_is_shown() -> None:
    assert len(IMAGES) >= 4


@pytest.mark.parametrize(("alt", "path"), IMAGES, ids=[path for _, path in IMAGES])
def test_an_image_is_there_small_and_described(alt: str, path: str) -> None:
    assert alt.strip()
    file = ROOT / path
    assert file.is_file(), f"{path}: the README shows it, and it is not there"
    assert file.stat().st_size < LARGEST
    with Image.open(file) as image:
        image.verify()


def test_no_image_is_left_over() -> None:
    shown = {ROOT / path for _, path in IMAGES}
    assert set((ROOT / "golden" / "figures").iterdir()) <= shown
