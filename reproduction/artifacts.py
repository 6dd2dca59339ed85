"""What the tests leave for people: figures, tables and one report per model, and an index of all."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import FileSystemLoader

from ccm.experiment.files import read_json
from ccm.experiment.results import RunResults
from ccm.experiment.writing import write_atomically
from ccm.models.specs import PUBLISHED
from ccm.paper.report import compare_with_paper
from ccm.reporting.figures.gallery import FOLDER, Entry, figures_across, figures_of_run
from ccm.reporting.report import FIGURES, HTML, MARKDOWN, html_environment, write_report
from ccm.reporting.tables import FOLDER as TABLES
from conftest import Options
from reproduction.pairs import Pair
from reproduction.runs import Run

REPORTS = "reports"  # apart from run folders, which the models' names are taken by
INDEX = "index.html"
KINDS = ("pdf", "png", "json")  # of each figure
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Left:
    """What a pair's run left: the report of its model, all tables, the figures that are the pair's."""

    results: RunResults
    paths: tuple[Path, ...]

    def data(self, of: str) -> Any:
        """What a figure draws, read from the JSON beside it; named by the end of its path."""
        (path,) = [p for p in self.paths if p.suffix == ".json" and p.stem.endswith(of)]
        return read_json(path)


@dataclass
class Artifacts:
    """Writes the artifacts of each model once."""

    options: Options
    root: Path
    done: dict[str, tuple[RunResults, list[Path]]] = field(default_factory=dict)

    def __call__(self, pair: Pair, run: Run) -> Left:
        """Return the artifacts of a pair's run."""
        folder = self.root / REPORTS / pair.model
        if pair.model not in self.done:
            held = None
            if pair.model in PUBLISHED:
                _, (_, held) = compare_with_paper([run.results], folder)
            results = run.results
            self.done[pair.model] = results, write_report([results], folder, held)
        results, written = self.done[pair.model]
        figures = _figures(pair, [*figures_of_run(results), *figures_across([results])])
        mine = {folder / FIGURES / FOLDER / f"{stem}.{kind}" for stem in figures for kind in KINDS}
        mine |= {folder / HTML, folder / MARKDOWN}
        paths = [p for p in written if p in mine or p.parent == folder / FIGURES / TABLES]
        return Left(results, tuple(paths))


def _figures(pair: Pair, entries: Iterable[Entry]) -> list[str]:
    return [e.stem for e in entries if e.value in (None, pair.ablation_value)]


@dataclass(frozen=True)
class Tested:
    """A test, how it ended, and what it left."""

    name: str
    outcome: str
    paths: tuple[Path, ...]


def artifacts_of(stats: Mapping[str, Sequence[Any]]) -> list[Tested]:
    """Collect the recorded paths of a session from its reports, those of workers included.

    Args:
        stats: Of pytest's terminal reporter.
    """
    found: dict[str, Tested] = {}
    for reports in stats.values():
        for report in reports:
            properties = getattr(report, "user_properties", [])
            paths = tuple(Path(str(path)) for name, path in properties if name == "artifact")
            if paths and report.when == "call":
                found[report.nodeid] = Tested(report.nodeid, report.outcome, paths)
    return [found[name] for name in sorted(found)]


def write_index(tests: Sequence[Tested], root: Path, more: Iterable[Path] = ()) -> Path:
    """Write the page that leads to everything; its links are relative, so the folder can be moved.

    Args:
        tests: What they left.
        root: Where the page goes.
        more: What the session wrote beside; only what lies in `root` is listed.

    Returns:
        Its path.
    """

    def link(path: Path) -> tuple[str, str]:
        relative = Path(os.path.relpath(path.resolve(), root.resolve())).as_posix()
        return relative, quote(relative)

    # Each test has its links; a report belongs to its model, whichever test it was recorded with.
    reports = sorted({path for test in tests for path in test.paths if path.name == HTML})
    content = {
        "reports": [(path.parent.name, *link(path)) for path in reports],
        "more": [link(path) for path in sorted(more) if path.resolve().is_relative_to(root.resolve())],
        "tests": [(t.name, t.outcome, [link(path) for path in t.paths]) for t in tests],
    }
    environment = html_environment(FileSystemLoader(TEMPLATES))
    page = environment.get_template("index.html.jinja").render(content).encode("utf-8")
    write_atomically(root / INDEX, lambda p: p.write_bytes(page))
    return root / INDEX
