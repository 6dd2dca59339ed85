"""What a report says outside its tables of scores, against the run's cells and its manifest."""

import base64
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ccm.experiment.results import read_results
from ccm.paper.claims import Claim
from ccm.paper.comparison import CLAIM_HEADER, ROW_HEADER, Comparison, claim_cells, row_cells
from ccm.paper.report import HOW_TO_READ, read_report, write
from ccm.paper.report import markdown as tolerance_markdown
from ccm.paper.verdicts import Row
from ccm.reporting import report
from ccm.reporting.figures.gallery import Drawn, Entry, figures_across, figures_of_run
from ccm.reporting.report import HTML, MARKDOWN, WORK, write_report
from tests.counted import Counted, Others, Part
from tests.distinct_run import CONTROLS, MATCHED, distinct_runs
from tests.made_runs import make_run
from tests.shown import LABELS, HtmlTable, Rows, from_html, from_markdown


class Outline(HTMLParser):
    """A page's headings with what stands below each: entries of lists, and figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.entries: dict[str, list[tuple[str, list[str]]]] = {}  # heading -> term, texts
        self.figures: dict[str, list[tuple[str, str, str]]] = {}  # heading -> caption, alt, picture
        self.paragraphs: dict[str, list[str]] = {}
        self.headings: list[str] = []
        self.at, self.text, self.picture = "", "", ("", "")
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("h1", "h2", "h3", "dt", "dd", "figcaption", "p", "pre"):
            self.text = ""
        if tag == "img":
            found = dict(attrs)
            self.picture = (str(found["alt"]), str(found["src"]))

    def handle_endtag(self, tag: str) -> None:
        text = " ".join(self.text.split())
        if tag in ("h1", "h2", "h3"):
            # Of several runs each has the same headings.
            self.headings.append(text)
            self.at = f"{self.headings.count(text)} {text}" if tag == "h3" else text
        elif tag == "dt":
            self.entries.setdefault(self.at, []).append((text, []))
        elif tag == "dd":
            self.entries[self.at][-1][1].append(text)
        elif tag == "figcaption":
            self.figures.setdefault(self.at, []).append((text, *self.picture))
        elif tag in ("p", "pre"):
            self.paragraphs.setdefault(self.at, []).append(text)

    def handle_data(self, data: str) -> None:
        self.text += data


def drawn_of(entry: Entry) -> tuple[str, bytes]:
    """Alt text and picture that stand for a figure: its own."""
    return f"alt of {entry.stem}: 12 <b>", f"png of {entry.stem}".encode()


def draw(entries: Sequence[Entry], out: Path, processes: int) -> list[Drawn]:
    """Draw nothing, and name what would have been drawn."""
    found = []
    for entry in entries:
        paths = [out / "x" / f"{entry.stem}.{suffix}" for suffix in ("pdf", "png", "json")]
        paths[1].parent.mkdir(parents=True, exist_ok=True)
        alt, picture = drawn_of(entry)
        paths[1].write_bytes(picture)
        found.append(Drawn(alt, (3.0, 2.0), tuple(paths)))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Counted]:
    return [Counted(path) for path in distinct_runs(tmp_path_factory)]


@pytest.fixture(scope="module")
def written(runs: list[Counted], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    held = write(COMPARISONS, tmp_path_factory.mktemp("held"))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", draw)
        write_report([read_results(run.path) for run in runs], out, held)
    return out


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return (written / HTML).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Outline:
    return Outline(html)


@pytest.fixture(scope="module")
def sections(written: Path) -> list[dict[str, str]]:
    """The Markdown of each run, by heading."""
    text = (written / MARKDOWN).read_text(encoding="utf-8")
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[2:-1]:
        name, *parts = re.split(r"^### ", section, flags=re.MULTILINE)
        blocks = dict(part.split("\n", 1) for part in parts)
        found.append({"": name.strip(), **blocks})
    return found


def plain(text: str) -> str:
    """Markdown's escapes and white space taken away."""
    return " ".join(re.sub(r"\\(.)", r"\1", text).split())


def entries(text: str) -> list[tuple[str, str]]:
    found = re.findall(r"^- \*\*(.*?)\*\*: (.*)$", text, re.MULTILINE)
    return [(plain(term), plain(words)) for term, words in found]


# --- the answer ---------------------------------------------------------------------------------------


def part_in_words(r: Part) -> str:
    return f"{r.percent:.1f} % ({r.count}/{r.total}; 95 % interval {r.low:.1f} to {r.high:.1f})"


def beside(own: Part, controls: Others, n: int) -> str:
    assert own.percent is not None
    assert controls.high is not None
    assert controls.low is not None
    place = "within the range"
    if own.percent > controls.high:
        place = "more than any"
    if own.percent < controls.low:
        place = "less than any"
    return (
        f"{place} of {n} control sets, which give {controls.mean:.1f} % on average "
        f"({controls.low:.1f} to {controls.high:.1f} %)."
    )


def answer(run: Counted, value: str) -> list[str]:
    (gts, others), (_, matched) = run.gts(value), run.gts(value, "matched")
    cr, of_cr = run.cr(value, "CK")
    p = run.p(value)
    assert p is not None
    least = ", the least that 9 controls can give" if p == 0.1 else ""
    return [
        f"{part_in_words(gts)} of the answers change their source: {beside(gts, others, CONTROLS)} "
        f"Q = {run.q(value):.1f} of 100, p = {p:.4f}{least}. Beside sets that match its neurons in "
        f"weight norm and spread of activation: {beside(gts, matched, MATCHED)} "
        f"Q = {run.q(value, 'matched'):.1f}, p = {run.p(value, 'matched'):.4f}.",
        f"Of the prompts not answered from the context before, {part_in_words(cr)} turn to it, "
        f"CR(CK): {beside(cr, of_cr, CONTROLS)}",
    ]


def test_the_answer_has_the_numbers_of_its_value(
    page: Outline, sections: list[dict[str, str]], runs: list[Counted]
) -> None:
    for i, run in enumerate(runs):
        wanted = [(LABELS[value], answer(run, value)) for value in run.values]
        assert page.entries[f"{i + 1} The answer"] == wanted
        joined = [(label, " ".join(sentences)) for label, sentences in wanted]
        assert entries(sections[i]["The answer"]) == joined
    said = str([answer(run, value) for run in runs for value in run.values])
    assert "the least that" in said, "a p of no control at all"
    assert "more than any" in said
    assert "within the range" in said


# --- what was run, and the manifest -------------------------------------------------------------------


def test_what_was_run_is_the_manifests(
    page: Outline, sections: list[dict[str, str]], runs: list[Counted]
) -> None:
    for i, run in enumerate(runs):
        neurons = ", ".join(map(str, sorted(run.manifest["sets"]["entropy"])))
        wanted = {
            "Model": run.name + (" (openai-community/gpt2)" if run.model == "gpt2-small" else ""),
            "Weights (SHA-256)": f"{i}123abc",
            "Facts": f"facts_{i}: {523 + i} asked, {389 + i} answered correctly",
            "Probing prompts": f"{run.n}",
            "Protocol": "corrected",
            "Entropy set": f"{neurons} (the {3 + i} of lowest LogitVar with ρ of at least 0.5)",
            "Controls": "9 random sets of as many neurons; 7 that match it in norm and spread",
            "Seed": f"{123 + i}",
            "Ablation values": ", ".join(LABELS[value] for value in run.values),
            "Device": f"machine_{i}",
            "Number type": "float32",
            "Engine": "shared",
            "Versions": "python 3.1.4, torch 2.7.1",
        }
        found = {term: words for term, (words,) in page.entries[f"{i + 1} What was run"]}
        assert {term: found.get(term) for term in wanted} == wanted
        assert dict(entries(sections[i]["What was run"])) == found
        assert sections[i][""] == page.headings[page.headings.index(run.name)] == run.name


def test_neurons_named_by_hand_have_no_threshold(tmp_path: Path) -> None:
    folder = make_run(tmp_path, prompts=6, controls=1)
    folder.note(identity=folder.manifest["identity"] | {"neurons": [1, 2, 3]})
    what = dict(report._what_was_run(read_results(tmp_path)))
    neurons = ", ".join(map(str, folder.manifest["sets"]["entropy"]))
    assert what["Entropy set"] == f"{neurons} (named by hand)"
    assert what["Controls"] == "1 random sets of as many neurons; 1 that match it in norm and spread"


def pairs(rows: Rows) -> list[list[str]]:
    return [[*row.values()] for row in rows]


def flat(key: str, value: Any) -> list[list[str]]:
    if isinstance(value, dict):
        return [line for k, v in value.items() for line in flat(f"{key}.{k}", v)]
    if isinstance(value, list):
        return [[key, ", ".join(map(str, value))]]
    return [[key, "none" if value is None else str(value)]]


def test_timings_work_and_manifest_are_the_manifests(
    html: str, page: Outline, sections: list[dict[str, str]], runs: list[Counted]
) -> None:
    tables = from_html(html)
    times, work = (
        [t.rows for t in tables if t.caption.startswith(start)] for start in ("Seconds by", "Work of")
    )
    for i, run in enumerate(runs):
        found = from_markdown(sections[i]["Manifest and work"])
        assert found[0] == times[i]
        assert found[1] == work[i]
        assert [*times[i][0]] == ["stage", "time"]
        assert pairs(times[i]) == [["load", "3.2 s"], ["decode", f"{47.5 + i} s"], ["score", "1.1 s"]]
        assert [*work[i][0]] == ["counter", "count", "of"]
        counts = {"prompts": "411", "forward_tokens": "5,123", "nodes": "1,789", "peak_bytes": "0"}
        assert pairs(work[i]) == [[name, n, WORK[name]] for name, n in counts.items()]
        left_out = ("timings_s", "work", "sets")
        wanted = [f for k, v in run.manifest.items() if k not in left_out for f in flat(k, v)]
        assert pairs(found[2]) == wanted
        listed = page.entries[f"{i + 1} Manifest and work"]
        assert [[term, words] for term, (words,) in listed] == wanted
        (again,) = page.paragraphs[f"{i + 1} Run it again"]
        assert f"--model {run.model} " in again
        assert f"--seed {123 + i}" in again
        assert f"--matched-controls {MATCHED}" in again
        assert f"```sh\n{again}\n```" in sections[i]["Run it again"]


# --- figures ------------------------------------------------------------------------------------------


def shown_picture(entry: Entry) -> tuple[str, str, str]:
    alt, picture = drawn_of(entry)
    caption = " ".join(f"{entry.title}. {entry.caption}".split())
    return caption, alt, f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def test_every_figure_stands_under_its_heading_with_its_own_words(
    page: Outline, sections: list[dict[str, str]], runs: list[Counted], written: Path
) -> None:
    results = [read_results(run.path) for run in runs]
    assert page.figures["Side by side"] == [shown_picture(e) for e in figures_across(results)]
    wanted = {}
    for run, result in zip(runs, results, strict=True):
        for value in (None, *run.values):
            title = f"Figures of {LABELS[value]} ablation" if value else "Figures before ablation"
            chosen = [e for e in figures_of_run(result) if e.value == value]
            assert chosen
            assert all((value or "ablation/") in e.stem or not value for e in chosen)
            wanted[run.name, title] = chosen
    found = {k: v for k, v in page.figures.items() if k != "Side by side"}
    assert [*found.values()] == [[shown_picture(e) for e in chosen] for chosen in wanted.values()]
    assert [k.split(" ", 1)[1] for k in found] == [title for _, title in wanted]
    names = [run.name for run in runs]
    for (name, title), chosen in wanted.items():
        text = sections[names.index(name)][title]
        images = re.findall(r"^!\[(.*)\]\((.*)\)\n\n\*\*(.*?)\*\* (.*)$", text, re.MULTILINE)
        for entry, (alt, link, heading, caption) in zip(chosen, images, strict=True):
            words, own_alt, _ = shown_picture(entry)
            assert plain(f"{heading} {caption}") == words
            assert plain(alt) == own_alt
            assert (written / link.replace("%3D", "=")).read_bytes() == drawn_of(entry)[1]


def test_of_one_run_the_figures_across_stand_with_those_before_ablation(
    runs: list[Counted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw", draw)
    result = read_results(runs[0].path)
    write_report([result], tmp_path)
    found = Outline((tmp_path / HTML).read_text(encoding="utf-8")).figures
    own = [e for e in figures_of_run(result) if e.value is None]
    assert found["1 Figures before ablation"] == [
        shown_picture(e) for e in [*own, *figures_across([result])]
    ]


# --- held against the paper ---------------------------------------------------------------------------

ROW = Row(
    "gpt2-small", "mean_ablation", "GTS", "Table 6", "share", "%", 0.31, "0.3 % of 10684", 0.2902,
    "0.29 % (31/10684)", -0.0198, (-0.2512, 0.2147), "agrees",
)  # fmt: skip
ROWS = (
    ROW,
    replace(ROW, ablation_value=None, quantity="rho(7)", paper_text="0.8", ours_text="0.9", margin=0.5),
    replace(ROW, quantity="Q | x", verdict="differs, as expected", defect=3, reason="sigma"),
    replace(ROW, quantity="CR", ours=None, ours_text="-", margin=None, interval=None, verdict="not run",
            reason="no run"),
)  # fmt: skip
SHOWN = [
    ["mean_ablation", "GTS", "0.3 % of 10684", "0.29 % (31/10684)", "-0.0198", "-0.251 to 0.215",
     "agrees"],
    ["-", "rho(7)", "0.8", "0.9", "+0.5", "-0.251 to 0.215", "agrees"],
    ["mean_ablation", "Q | x", "0.3 % of 10684", "0.29 % (31/10684)", "-0.0198", "-0.251 to 0.215",
     "differs, as expected (defect 3: sigma)"],
    ["mean_ablation", "CR", "0.3 % of 10684", "-", "-", "-", "not run (no run)"],
]  # fmt: skip
CLAIMS = (
    Claim("copying", "more", True, "5 of 6", None),
    Claim("change", "most", False, "Q 3", True),
    Claim("PK to CK", "some", None, "none", False),
)
CLAIMED = [
    ["copying: more", "yes", "-", "5 of 6"],
    ["change: most", "no", "yes", "Q 3"],
    ["PK to CK: some", "-", "no", "none"],
]
HEAD = ["ablation value", "quantity", "paper", "ours", "margin", "interval", "verdict"]
CLAIM_HEAD = ["claim (mean ablation)", "here", "as printed", "numbers"]
COMPARISONS = [
    Comparison("gpt2-small", "GPT2-small", "60 prompts, cpu", {"seed": 1}, ROWS, CLAIMS),
    Comparison("made", "Made", "70 prompts, gpu", {"seed": 2}, ROWS[1:2], CLAIMS[2:]),
]
PARTS = ((SHOWN, CLAIMED), (SHOWN[1:2], CLAIMED[2:]))  # of each of them


def test_a_row_and_a_claim_have_their_cells() -> None:
    assert [*ROW_HEADER] == HEAD
    assert [*CLAIM_HEADER] == CLAIM_HEAD
    assert [[*row_cells(row)] for row in ROWS] == SHOWN
    assert [[*claim_cells(claim)] for claim in CLAIMS] == CLAIMED


def test_the_tolerance_report_shows_every_model_row_by_row(tmp_path: Path) -> None:
    text, data = write(COMPARISONS, tmp_path)
    assert text.read_text(encoding="utf-8") == tolerance_markdown(COMPARISONS)
    parts = re.split(r"^## ", text.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [part.splitlines()[0] for part in parts[1:]] == ["GPT2-small", "Made", "Tolerances"]
    for part, wanted in zip(parts[1:3], PARTS, strict=True):
        told, rows = from_markdown(part)
        assert ([*told[0]], [*rows[0]]) == (CLAIM_HEAD, HEAD)
        assert (pairs(rows), pairs(told)) == wanted
    held = read_report(data)
    assert [*held.values()] == COMPARISONS, "read back as it was"
    assert read_report(data, ["made"]) == held


def test_the_report_shows_each_run_its_own_comparison(
    html: str, page: Outline, sections: list[dict[str, str]]
) -> None:
    tables = from_html(html)
    claims = [t for t in tables if t.caption == "The paper's claims."]
    rows: list[HtmlTable] = [t for t in tables if t.caption == HOW_TO_READ]
    for i, wanted in enumerate(PARTS):
        assert (pairs(rows[i].rows), pairs(claims[i].rows)) == wanted
        assert ([*rows[i].rows[0]], [*claims[i].rows[0]]) == (HEAD, CLAIM_HEAD)
        text = sections[i]["Held against the paper"]
        assert from_markdown(text) == [claims[i].rows, rows[i].rows]
        said = f"{COMPARISONS[i].what_ran}. The numbers below are those of another run than this one."
        assert page.paragraphs[f"{i + 1} Held against the paper"] == [said]
        assert plain(text.split("|")[0]) == said.replace("The numbers", "**The numbers") + "**"
