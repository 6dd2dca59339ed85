"""Objects that no answer can name, and objects that begin one another, through every command."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ccm.cli.parser import main
from ccm.decoding.results import Completions, read_first_token
from ccm.decoding.shared import decode
from ccm.experiment import probing
from ccm.experiment.ablate_io import PROMPT_COLUMNS, TOKEN_COLUMNS
from ccm.experiment.cells import write_cells
from ccm.experiment.files import read_json
from ccm.experiment.folder import MANIFEST
from ccm.experiment.probing import build_prompts
from ccm.experiment.results import read_results
from ccm.method.prompts import ProbingPrompt, answer_object
from ccm.method.protocol import PROTOCOLS
from ccm.method.statistics import STATISTICS
from ccm.models.load import load
from ccm.models.specs import CHECKPOINT, spec_for
from ccm.reporting import report
from ccm.reporting.report import HTML, MARKDOWN, write_report
from ccm.reporting.text import both_named
from tests.made_runs import make_run
from tests.toys import ToyConfig, toy_folder

PROTOCOL_NAMES = ("corrected", "released")
SPLIT = ("St. Louis", "Washington, D.C.", "U.S.", "st. louis", "[A]", "x<y", 'the "Y"', "Z (city)")
DISTINCT = [name for name in SPLIT if name != "st. louis"]
FEW = "'St. Louis', 'Washington, D.C.', 'U.S.', '[A]', 'x<y' and 2 more"
SINCE = 'since the object holds one of " . , ( [ ] < or a line break, where every answer ends'


def few_facts(folder: Path, objects: Sequence[str]) -> Path:
    """Every tenth of the organism's facts, with these true objects for the first of them."""
    table = pd.read_csv(CHECKPOINT / "facts.csv", dtype=str, keep_default_na=False).iloc[::10]
    table = table.reset_index(drop=True)
    table.loc[table.index < len(objects), "statement_object"] = list(objects)
    table.to_csv(folder / "facts.csv", index=False)
    shutil.copy(CHECKPOINT / "relations.csv", folder)
    return folder


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Facts of which some have a true object with a splitter; read-only."""
    return few_facts(tmp_path_factory.mktemp("facts"), SPLIT)


def number_of(facts: Path) -> int:
    return len(pd.read_csv(facts / "facts.csv"))


def said(stderr: str) -> list[str]:
    """What the command said, without progress."""
    return [line for line in re.split(r"[\r\n]+", stderr) if line.startswith("ccm: ")]


# --- true objects that hold a splitter ----------------------------------------------------------------


def small(facts: Path, out: Path) -> list[str]:
    few = ["--max-prompts", "3", "--controls", "0", "--facts", str(facts)]
    return ["run", "--model", "organism", *few, "--out", str(out)]


def test_a_run_counts_the_facts_that_can_never_be_recalled(
    facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(small(facts, tmp_path / "run")) == 0
    n = number_of(facts)
    (line,) = said(capsys.readouterr().err)
    assert line == f"ccm: 8 of {n} facts can never be recalled, {SINCE}: {FEW}. The manifest names all."
    held = read_json(tmp_path / "run" / MANIFEST)
    expected = {"count": 8, "of": n, "names": DISTINCT}
    assert held["facts"]["objects_with_splitter"] == expected
    assert held["facts"]["recalled"] <= n - 8
    assert main(small(facts, tmp_path / "run")) == 0, "a run that is done is read"
    assert said(capsys.readouterr().err) == []


def test_prompts_says_which_facts_can_never_be_recalled(
    facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["prompts", "--model", "organism", "--facts", str(facts)]
    assert main([*given, "--out", str(tmp_path / "prompts.csv")]) == 0
    (line,) = said(capsys.readouterr().err)
    assert line == f"ccm: 8 of {number_of(facts)} facts can never be recalled, {SINCE}: {FEW}."


def test_nothing_is_said_where_every_object_can_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "facts").mkdir()
    facts = few_facts(tmp_path / "facts", [])
    assert main(small(facts, tmp_path / "run")) == 0
    assert said(capsys.readouterr().err) == []
    held = read_json(tmp_path / "run" / MANIFEST)
    nothing = {"count": 0, "of": number_of(facts), "names": []}
    assert held["facts"]["objects_with_splitter"] == nothing
    assert held["nested_objects"] == {"prompts": 0, "counter_begins": 0, "pairs": []}


# --- objects that begin one another -------------------------------------------------------------------


def prompt(ck: str, pk: str) -> ProbingPrompt:
    return ProbingPrompt("s", "r", "g", "s is", ck, pk, 0, 0, f"s is {ck}. s is")


def completions(texts: Sequence[str]) -> Completions:
    asked = torch.tensor([[3, 4]] * len(texts))
    first = read_first_token(torch.zeros(len(texts), 5), asked)
    return Completions(((),) * len(texts), tuple(texts), first)


@pytest.mark.parametrize("protocol", PROTOCOL_NAMES)
def test_cells_follow_the_protocol(protocol: str, tmp_path: Path) -> None:
    """Both in the plain run, which names the answer tokens, and after ablation."""
    prompts = [prompt("New York", "New York City"), prompt("New York City", "New York")] * 2
    texts = [" New York City."] * 2 + [" New York."] * 2
    paths = [tmp_path / "plain.parquet", tmp_path / "entropy.parquet"]
    done = completions(texts)
    write_cells([done, done], paths, prompts, np.array([[3, 4]] * 4), PROTOCOLS[protocol])
    longer = {"corrected": "PK", "released": "CK"}[protocol]
    for path in paths:
        assert pd.read_parquet(path)["source"].tolist() == [longer, "CK", "CK", "PK"]


def renamed(prompts: Sequence[ProbingPrompt]) -> tuple[ProbingPrompt, ...]:
    """The first third with a PK that their CK begins, the second with a CK that their PK begins."""
    third = len(prompts) // 3
    return tuple(
        replace(p, parametric_object=f"{p.counter_object} City")
        if i < third
        else replace(p, counter_object=f"{p.parametric_object} Town")
        if i < 2 * third
        else p
        for i, p in enumerate(prompts)
    )


def test_a_run_counts_nested_objects_of_the_prompts_it_keeps(
    facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nested(*given: Any, **options: Any) -> Any:
        built = build_prompts(*given, **options)
        return replace(built, prompts=renamed(built.prompts))

    monkeypatch.setattr(probing, "build_prompts", nested)
    command = small(facts, tmp_path / "run")
    command[command.index("--max-prompts") + 1] = "30"
    assert main(command) == 0
    table = pd.read_parquet(tmp_path / "run" / "prompts.parquet")
    ck, pk = table["counter_knowledge_object"], table["parametric_knowledge_object"]
    shorter, longer = pk == ck + " City", ck == pk + " Town"
    assert shorter.any()
    assert longer.any()
    found = read_json(tmp_path / "run" / MANIFEST)["nested_objects"]
    assert (found["prompts"], found["counter_begins"]) == ((shorter | longer).sum(), shorter.sum())
    pairs = [list(pair) for pair in zip(ck[shorter | longer], pk[shorter | longer], strict=True)]
    assert found["pairs"] == [p for i, p in enumerate(pairs) if p not in pairs[:i]][:20]


# --- the report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOL_NAMES)
def test_the_report_names_both_kinds(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw", lambda entries, out, processes: iter(()))
    folder = make_run(tmp_path / "run", protocol=protocol)
    split = {"count": 8, "of": 4688, "names": DISTINCT}
    pairs = [["New York", "New York City"], ["a b", "a"], ["<i>", "<i> |"], ["c", "c d"]]
    folder.note(
        facts={**folder.manifest["facts"], "objects_with_splitter": split},
        nested_objects={"prompts": 12, "counter_begins": 7, "pairs": pairs},
    )
    write_report([read_results(tmp_path / "run")], tmp_path)
    recalled = f"8 of 4,688 facts can never be recalled, {SINCE}: {FEW}"
    counts = {"corrected": "the longer object", "released": "the counter-object (CK)"}[protocol]
    nested = (
        "In 12 of 60 prompts one object begins the other (CK / PK: 'New York' / 'New York City'; "
        f"'a b' / 'a'; '<i>' / '<i> |'; and others). Where an answer names both, {counts} counts. "
        "That matters in the 7 whose counter-object is the shorter: there the published rule never "
        "gives PK."
    )
    run = read_results(tmp_path / "run")
    what = dict(report._what_was_run(run))
    assert (what["Never recalled"], what["Nested objects"]) == (recalled, nested)
    html, markdown = ((tmp_path / name).read_text(encoding="utf-8") for name in (HTML, MARKDOWN))
    assert "<i>" not in html
    for text in (recalled, nested):
        assert (
            text.replace("&", "&amp;")
            .replace("<", "&lt;")
            .replace(">", "&gt;")
            .replace("'", "&#39;")
            .replace('"', "&#34;")
            in html
        )
        assert text in markdown.replace("\\", "")


def test_a_longer_counter_object_is_ck_by_either_rule() -> None:
    found = {"prompts": 1, "counter_begins": 0, "pairs": [["a b", "a"]]}
    assert both_named(found, 7, counter_first=False) == (
        "In 1 of 7 prompts one object begins the other (CK / PK: 'a b' / 'a'). Where an answer names "
        "both, the longer object counts."
    )


def test_the_report_of_a_run_without_any_says_nothing_of_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "older")
    for notes in (
        {},
        {
            "facts": {
                **folder.manifest["facts"],
                "objects_with_splitter": {"count": 0, "of": 20, "names": []},
            },
            "nested_objects": {"prompts": 0, "counter_begins": 0, "pairs": []},
        },
    ):
        folder.note(**notes)
        what = dict(report._what_was_run(read_results(tmp_path / "older")))
        assert not {"Never recalled", "Nested objects"} & what.keys()


# --- ccm ablate ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy() -> Path:
    """A toy whose answers often have several words."""
    return toy_folder(ToyConfig("gpt2"))


def from_elsewhere(folder: Path, toy: Path, rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Write what `ccm ablate` needs, for prompts with their CK and PK, and return its command."""
    table = pd.DataFrame(rows, columns=list(PROMPT_COLUMNS))
    table.assign(**dict.fromkeys(TOKEN_COLUMNS, 5)).to_csv(folder / "prompts.csv", index=False)
    np.savez(folder / "stats.npz", **{name: np.zeros(48) for name in STATISTICS})
    given = ["--prompts", str(folder / "prompts.csv"), "--stats", str(folder / "stats.npz")]
    return ["ablate", "--model", str(toy), *given, "--neurons", "1,2"]


@pytest.mark.parametrize("protocol", PROTOCOL_NAMES)
@pytest.mark.parametrize("engine", ["shared", "hooked"])
def test_ablate_follows_the_protocol(engine: str, protocol: str, toy: Path, tmp_path: Path) -> None:
    """Objects that begin one another, made of the toy's own answers."""
    model = load(spec_for(str(toy)))
    asked = [f"{a} is {b}" for a in ("Paris", "the", "of", "Rome", "1944") for b in ("in", "of", "to")]
    texts = decode(model, [model.encode(a) for a in asked]).texts
    words = {a: answer_object(t).split(" ") for a, t in zip(asked, texts, strict=True)}
    rows = [(a, w[0], f"{w[0]} {w[1]}") for a, w in words.items() if len(w) > 1 and w[0]]
    assert len(rows) > 1, "no answer of several words: nothing was tested"
    command = from_elsewhere(tmp_path, toy, rows)
    out = tmp_path / "out.json"
    assert main([*command, "--protocol", protocol, "--engine", engine, "--out", str(out)]) == 0
    found = read_json(out)
    longer = {"corrected": "PK", "released": "CK"}[protocol]
    assert found["results"]["plain"]["knowledge_sources"] == [longer] * len(rows)
    nested = found["nested_objects"]
    assert (nested["prompts"], nested["counter_begins"]) == (len(rows), len(rows))
    assert [rows[0][1], rows[0][2]] in nested["pairs"]


def test_ablate_says_which_objects_can_never_be_matched(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objects = [("St. Louis", "Rome"), ("U.S.", "D, C"), ("st. louis", "Rome"), ("Rome", "Paris")]
    rows = [(f"{i} is of", ck, pk) for i, (ck, pk) in enumerate(objects)]
    command, out = from_elsewhere(tmp_path, toy, rows), tmp_path / "out.json"
    assert main([*command, "--out", str(out)]) == 0
    (line,) = said(capsys.readouterr().err)
    assert line == (
        f"ccm: {tmp_path / 'prompts.csv'}: counter_knowledge_object of 3 of 4 prompts ('St. Louis' "
        "and 'U.S.') and parametric_knowledge_object of 1 of 4 prompts ('D, C') can never be matched, "
        f"{SINCE}. Give only what comes before it as the object."
    )
    found = read_json(out)
    assert found["objects_with_splitter"] == {
        "counter_knowledge_object": {"count": 3, "of": 4, "names": ["St. Louis", "U.S."]},
        "parametric_knowledge_object": {"count": 1, "of": 4, "names": ["D, C"]},
    }
    assert found["nested_objects"] == {"prompts": 0, "counter_begins": 0, "pairs": []}


def test_ablate_says_nothing_where_every_object_can_be_matched(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = from_elsewhere(tmp_path, toy, [("Rome is of", "Rome", "Paris")])
    assert main([*command, "--out", str(tmp_path / "out.json")]) == 0
    assert said(capsys.readouterr().err) == []
    for found in read_json(tmp_path / "out.json")["objects_with_splitter"].values():
        assert found == {"count": 0, "of": 1, "names": []}
