"""The report of finished runs: one self-contained HTML page, and the same as Markdown."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined

from ccm.errors import BadInput
from ccm.experiment.folder import locked_for
from ccm.experiment.results import RunResults
from ccm.experiment.writing import write_atomically
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.prompts import never_recalled
from ccm.method.protocol import PROTOCOLS
from ccm.models.specs import MODELS
from ccm.paper.comparison import CLAIM_HEADER, ROW_HEADER, Comparison
from ccm.paper.markdown import escape_markdown, markdown_table
from ccm.paper.report import HOW_TO_READ, JSON, read_report
from ccm.reporting.distinct_names import distinct_names
from ccm.reporting.figures.canvas import SINGLE
from ccm.reporting.figures.gallery import Drawn, Entry, draw, figures_across, figures_of_run
from ccm.reporting.rerun import command_of
from ccm.reporting.sentences import Answer, answers_of, key_numbers
from ccm.reporting.table_formats import Table, markdown
from ccm.reporting.tables import tables_of, write_tables
from ccm.reporting.text import both_named

HTML, MARKDOWN = "report.html", "report.md"
FIGURES = "figures"  # folder beside the report
# What each counter of `ccm.decoding.results.Work` counts.
WORK = {
    "prompts": "prompts decoded",
    "forward_tokens": "positions run through the transformer",
    "nodes": "distinct prefixes, prompts included",
    "certified": "choices of a token proved to be those of the plain run",
    "shortlisted": "choices settled among a few likely tokens",
    "low_rank": "choices that took a whole row of logits, in low-rank form",
    "first_rows": "rows for entropies and log-probabilities of the first token",
    "full_rows": "whole products with the unembedding",
    "refereed": "near ties settled in float64",
    "repeated": "prompts decoded again because float64 chose otherwise",
    "halved": "batches that ran out of memory and were halved",
    "peak_bytes": "peak of the GPU's allocator, bytes; 0 on a CPU",
}
STRICT: Mapping[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """One figure as the report shows it."""

    title: str
    caption: str
    alt: str
    source: str  # the PNG in base64
    link: str  # of the PNG, relative to the report
    wide: bool


@dataclass(frozen=True)
class Group:
    """Figures that belong together, under one heading."""

    title: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Section:
    """Everything about one run."""

    name: str
    what: Pairs
    answers: list[Answer]
    groups: list[Group]
    held: Comparison | None
    same_run: bool  # whether `held` is of this very run
    timings: Pairs
    work: list[tuple[str, str, str]]
    manifest: Pairs
    command: str


def write_report(
    runs: Sequence[RunResults], out: Path, held: Path | None = None, processes: int = 1
) -> list[Path]:
    """Write a report of runs, with all their figures and tables beside it.

    Args:
        runs: Finished runs; those of one model get names of their own.
        out: The folder: `report.html`, `report.md` and `figures/` are made in it.
        held: A tolerance report; None: the one in a run folder or beside it, if it is of
            that run.
        processes: How many may draw at once, as for `ccm.reporting.figures.gallery.draw`.

    Returns:
        Every path written: the two reports, then figures and tables.

    Raises:
        BadInput: two are the same run, or a tolerance report that cannot be read.
        InUse: another process is writing there.
    """
    runs = distinct_names(runs)
    found = [_held(run, held) for run in runs]
    with locked_for(out):
        return _write(runs, out, found, processes)


def _write(
    runs: Sequence[RunResults], out: Path, found: Sequence[Comparison | None], processes: int
) -> list[Path]:
    written = write_tables(runs, out / FIGURES)

    groups = [*(list(figures_of_run(run)) for run in runs), list(figures_across(runs))]
    drawn = list(draw([entry for group in groups for entry in group], out / FIGURES, processes))
    written += [path for figure in drawn for path in figure.paths]
    figures = iter(drawn)
    *own, across = [
        [(e.value, _picture(e, figure, out)) for e, figure in zip(group, figures, strict=False)]
        for group in groups
    ]
    several = len(runs) > 1
    content = {
        "title": "Entropy neurons and context copying: " + ", ".join(run.display_name for run in runs),
        "several": several,
        "key_numbers": key_numbers(runs),
        "across": [picture for _, picture in across] if several else [],
        "sections": [
            _section(run, [*pictures, *([] if several else across)], result)
            for run, pictures, result in zip(runs, own, found, strict=True)
        ],
        "tables": tables_of(runs),
        "claim_header": CLAIM_HEADER,
        "row_header": ROW_HEADER,
        "how_to_read": HOW_TO_READ,
    }
    pages = {HTML: render_html(content), MARKDOWN: render_markdown(content)}
    for name, text in pages.items():
        write_atomically(out / name, partial(Path.write_bytes, data=text.encode()))
    return [*(out / name for name in pages), *written]


def html_environment(*loaders: BaseLoader) -> Environment:
    """Load templates of HTML pages. Every text is escaped: names and answers may hold anything.

    Args:
        loaders: Where to look for templates before the package's own.
    """
    environment = Environment(
        loader=ChoiceLoader([*loaders, PackageLoader("ccm.reporting")]), autoescape=True, **STRICT
    )
    environment.filters["sides"] = _sides
    return environment


def render_html(content: Mapping[str, Any]) -> str:
    """Fill the HTML template."""
    return html_environment().get_template("report.html.jinja").render(content)


def render_markdown(content: Mapping[str, Any]) -> str:
    """Fill the Markdown template. Every text is escaped; tables already are."""
    environment = Environment(
        loader=PackageLoader("ccm.reporting"),
        autoescape=False,  # that is for HTML; `finalize` escapes what is filled in
        finalize=lambda value: value if isinstance(value, _Markdown) else escape_markdown(str(value)),
        **STRICT,
    )
    environment.filters["table"] = lambda table: _Markdown(markdown(table))
    environment.filters["rows"] = lambda header, lines: _Markdown(markdown_table(header, lines))
    environment.filters["link"] = lambda path: _Markdown(quote(path))
    environment.filters["raw"] = _Markdown
    environment.filters["code"] = _code
    return environment.get_template("report.md.jinja").render(content)


class _Markdown(str):
    """Text that is Markdown already and must not be escaped."""


def _code(text: str) -> _Markdown:
    """Put a shell command into a code block, with a fence longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return _Markdown(f"{fence}sh\n{text}\n{fence}")


def _sides(table: Table) -> list[str]:
    """Return the CSS class of each column: names and running text go left, numbers right."""
    columns = [str(column) for column in table.texts.columns]
    return [
        "text" if column in table.wide else "name" if i < 2 else "number"
        for i, column in enumerate(columns)
    ]


def _picture(entry: Entry, drawn: Drawn, out: Path) -> Picture:
    png = drawn.paths[1]
    return Picture(
        title=entry.title,
        caption=entry.caption,
        alt=drawn.alt,
        source=base64.b64encode(png.read_bytes()).decode("ascii"),
        link=png.relative_to(out).as_posix(),
        wide=drawn.inches[0] > 1.5 * SINGLE,
    )


def _section(
    run: RunResults, pictures: Sequence[tuple[str | None, Picture]], held: Comparison | None
) -> Section:
    groups = [
        Group(
            "Figures before ablation"
            if value is None
            else f"Figures of {ABLATION_VALUES[value].label} ablation",
            tuple(picture for of, picture in pictures if of == value),
        )
        for value in (None, *run.values)
    ]
    manifest = run.manifest
    return Section(
        name=run.display_name,
        what=_what_was_run(run),
        answers=answers_of(run),
        groups=[group for group in groups if group.pictures],
        held=held,
        same_run=held is not None and dict(held.provenance) == dict(run.identity),
        timings=[(stage, f"{seconds:.1f} s") for stage, seconds in manifest["timings_s"].items()],
        work=[(k, f"{v:,}", WORK.get(k, "")) for k, v in manifest["work"].items()],
        manifest=[
            pair
            for key, value in manifest.items()
            if key not in ("timings_s", "work", "sets")
            for pair in _flat(key, value)
        ],
        command=command_of(manifest),
    )


def _held(run: RunResults, given: Path | None) -> Comparison | None:
    """Read a run's comparison from the report given, or from its own in or beside its folder."""
    if given is not None:
        return read_report(given).get(run.model)
    own = run.path.resolve()
    for path in (own / JSON, own.parent / JSON):
        if not path.is_file():
            continue
        try:
            held = read_report(path).get(run.model)
        except BadInput as error:
            raise BadInput(
                f"{error} It lies in or beside the run folder: move it, or name one."
            ) from error
        if held is not None and dict(held.provenance) == dict(run.identity):
            return held
    return None


def _what_was_run(run: RunResults) -> Pairs:
    """List what was run."""
    identity, facts = run.identity, run.manifest["facts"]
    split, nested = facts["objects_with_splitter"], run.manifest["nested_objects"]
    spec = MODELS.get(run.model)
    neurons = ", ".join(str(i) for i in run.entropy_neurons)
    how = (
        "named by hand"
        if identity["neurons"] is not None
        else f"the {identity['k']} of lowest LogitVar with ρ of at least {identity['min_rho']:g}"
    )
    alike = identity["matched_controls"]
    matched = f"; {alike} that match it in norm and spread" if alike else ""
    known = f"{facts['facts']:,} asked, {facts['recalled']:,} answered correctly"
    found: dict[str, Any] = {
        "Model": run.display_name + (f" ({spec.hub_id})" if spec and spec.hub_id else ""),
        "Weights (SHA-256)": identity["weights_sha256"],
        "Facts": f"{identity['facts']}: {known}",
        "Never recalled": never_recalled(split) if split["count"] else None,
        "Probing prompts": f"{run.scores['n_prompts']:,}",
        "Nested objects": (
            both_named(
                nested,
                run.scores["n_prompts"],
                counter_first=PROTOCOLS[identity["protocol"]].counter_first,
            )
            if nested["prompts"]
            else None
        ),
        "Protocol": identity["protocol"],
        "Entropy set": f"{neurons} ({how})",
        "Controls": f"{identity['controls']} random sets of as many neurons{matched}",
        "Seed": identity["seed"],
        "Ablation values": ", ".join(ABLATION_VALUES[value].label for value in run.values),
        "Device": identity["device_name"],
        "Number type": identity["dtype"],
        "Engine": run.manifest["engine"],
        "Versions": ", ".join(f"{name} {number}" for name, number in identity["versions"].items()),
    }
    return [(term, str(text)) for term, text in found.items() if text is not None]


def _flat(key: str, value: Any) -> Pairs:
    """Turn nested JSON into lines: `identity.versions.torch`, `2.13.0`."""
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in _flat(f"{key}.{k}", v)]
    if isinstance(value, list):
        return [(key, ", ".join(str(v) for v in value))]
    return [(key, "none" if value is None else str(value))]
