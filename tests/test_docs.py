"""The pages hang together: what they link, show and name is there. `tox -e docs` builds them."""

import configparser
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES]
LARGEST = 100_000  # bytes of an image: it is in every clone
NAMED = re.compile(r"`((?:ccm|tests|reproduction|golden|docs|\.ci)/[\w./-]*)`")
EVERY_DOCUMENT = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[str(document.relative_to(ROOT)) for document in DOCUMENTS]
)


def prose(document: Path) -> str:
    """A document without its code: what looks like a link there is none."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"^ {4}\S.*$", "", text, flags=re.MULTILINE)


def links(document: Path) -> list[str]:
    """Targets of all links and images of a document."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "code", prose(document)))


def anchors(document: Path) -> set[str]:
    """Ids that a link may name: those given by hand, and those that a heading gets."""
    text = prose(document)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    made = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


def broken(document: Path) -> Iterator[str]:
    """Relative links of a document that lead nowhere."""
    for link in links(document):
        path, _, anchor = link.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        target = (document.parent / path).resolve() if path else document
        if not (target.exists() and target.is_relative_to(ROOT)):
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"


@EVERY_DOCUMENT
def test_links_and_images_lead_somewhere(document: Path) -> None:
    assert list(broken(document)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_links_only_what_the_site_holds(page: Path) -> None:
    """Sources are named, not linked: the site does not hold them."""
    inside = [link for link in links(page) if "://" not in link]
    assert [link for link in inside if ".." in Path(link).parts] == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "there.md").write_text('# A title: 1. "Two"\n<a id="by-hand"></a>\n')
    page = tmp_path / "page.md"
    good = "[a](there.md) [b](there.md#a-title-1-two) [c](there.md#by-hand) [d](https://a.b/c) `[e](f)`"
    page.write_text(f"# Here\n[self](#here) {good}\n![x](gone.png) [y](there.md#gone) [z](../up.md)\n")
    assert [found.partition(":")[0] for found in broken(page)] == [
        "gone.png",
        "there.md#gone",
        "../up.md",
    ]


def in_nav(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(target, list):
                yield from in_nav(target)
            else:
                yield target


def test_the_nav_names_every_page_once() -> None:
    config = yaml.safe_load((ROOT / ".ci" / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [target for target in in_nav(config["nav"]) if target.endswith(".md")]
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@EVERY_DOCUMENT
def test_a_document_says_something(document: Path) -> None:
    title, *rest = document.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"# \S.*", title)
    assert len([line for line in rest if line.strip()]) >= 5


@EVERY_DOCUMENT
def test_no_path_of_one_machine(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.>)])/(?:work|home|root|tmp|mnt|Users|opt|usr)\b\S*", text) == []


@EVERY_DOCUMENT
def test_files_that_are_named_are_there(document: Path) -> None:
    named = [name for name in NAMED.findall(document.read_text(encoding="utf-8")) if "NAME" not in name]
    assert [name for name in named if not (ROOT / name).exists()] == []


@EVERY_DOCUMENT
def test_what_is_said_to_be_in_a_file_is_there(document: Path) -> None:
    said = re.findall(r"`(\w+)`\s+(?:in|of)\s+`(ccm/[\w/]+\.py)`", document.read_text(encoding="utf-8"))
    for name, path in said:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(?:class |def )?{name}\b", source, flags=re.MULTILINE), (name, path)


def test_the_packages_are_those_of_the_page() -> None:
    text, *_ = (DOCS / "contributing.md").read_text(encoding="utf-8").partition("### ")
    packages = {path.parent.name for path in (ROOT / "ccm").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE)) == packages
    count = {7: "seven", 8: "eight", 9: "nine"}[len(packages)]
    assert f"`ccm/` holds {count} packages and `errors`" in text


@EVERY_DOCUMENT
def test_environments_of_tox_that_are_named_are_there(document: Path) -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    there = {section.partition(":")[2] for section in tox.sections()}
    given = re.findall(r"\btox -e ([\w,]+)", document.read_text(encoding="utf-8"))
    assert {name for names in given for name in names.split(",")} <= there


def test_the_api_names_modules_that_are_there() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: (ccm[\w.]*)$", text, flags=re.MULTILINE)
    assert named[0] == "ccm", "what a user calls comes first"
    for name in named:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_docstrings_refer_to_sections_of_the_method() -> None:
    """`Method 8` in a docstring is section 8 of docs/method.md, under an anchor that stays."""
    sections = anchors(DOCS / "method.md")
    sources = sorted((ROOT / "ccm").rglob("*.py"))
    found = [
        (source.name, int(number))
        for source in sources
        for number in re.findall(r"\bMethod (\d+)", source.read_text(encoding="utf-8"))
    ]
    assert found
    assert [each for each in found if f"section-{each[1]}" not in sections] == []
    assert {f"section-{n}" for n in range(1, 14)} <= sections


IMAGES = sorted((DOCS / "images").iterdir())


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_an_image_is_small_shown_and_described(image: Path) -> None:
    assert image.stat().st_size < LARGEST
    with Image.open(image) as opened:
        opened.verify()
    shown = re.compile(rf"!\[\S[^\]]+\]\((?:docs/)?images/{re.escape(image.name)}\)")
    assert any(shown.search(document.read_text(encoding="utf-8")) for document in DOCUMENTS)


def test_the_api_page_gets_links_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    extension = runpy.run_path(str(ROOT / ".ci" / "docs_docstrings.py"))
    docstring = SimpleNamespace(
        value="""One sentence (Method 4.3c, Method 13), Method 14.

1. First,
   going on:

       a formula

   and after it.
2. Second.

Args:
    x: A number.
"""
    )
    extension["Docstrings"]().on_instance(obj=SimpleNamespace(docstring=docstring), node=None)
    extension["Docstrings"]().on_instance(obj=SimpleNamespace(docstring=None), node=None)
    link = "[Method 4](method.md#section-4).3c, [Method 13](method.md#section-13)"
    assert (
        docstring.value
        == f"""One sentence ({link}), Method 14.


1. First,
    going on:

        a formula

    and after it.

2. Second.

Args:
    x: A number.
"""
    )
