"""Two runs held against each other: every number against the cells, through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ccm.cli.parser import main
from ccm.experiment.results import RunResults, read_results
from ccm.method.differences import clusters, interval
from ccm.method.sources import SOURCES
from ccm.reporting.two_runs import compare_runs, markdown, paired_rows, sentences
from tests.made_runs import make_run

VALUES = ("mean_ablation", "mode_ablation")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of the same prompts that move differently; read-only."""
    root, before = tmp_path_factory.mktemp("two"), ("PK", "PK", "CK")
    one, two = (
        make_run(root / name, values=VALUES, prompts=240, before=before, moved=moved, seed=seed).path
        for name, moved, seed in (("a", 0.5, 1), ("b", 0.1, 2))
    )
    change_identity(two, seed=2)
    return one, two


def change_identity(folder: Path, **settings: object) -> None:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    manifest["identity"] |= settings
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read(folders: tuple[Path, Path]) -> tuple[RunResults, RunResults]:
    one, two = map(read_results, folders)
    return one, two


def test_numbers_of_the_same_prompts_are_those_of_their_cells(folders: tuple[Path, Path]) -> None:
    one, two = read(folders)
    found = compare_runs(one, two)
    assert found.paired == 240
    assert found.prompts == (240, 240)
    assert [a.ablation for a in found.alike] == ["plain", *VALUES]
    cells = {"plain": (one.plain, two.plain), **{v: (one.ablated[v], two.ablated[v]) for v in VALUES}}
    for alike in found.alike:
        a, b = cells[alike.ablation]
        assert alike.sources.count == int((a["source"].to_numpy() == b["source"].to_numpy()).sum())
        assert alike.texts.count == int((a["text"].to_numpy() == b["text"].to_numpy()).sum())
    assert [(c.ablation, c.source) for c in found.sources] == [(n, s) for n in cells for s in SOURCES]
    moved = 0
    for change in found.sources:
        a, b = ((cell["source"] == change.source).to_numpy() for cell in cells[change.ablation])
        assert (change.first.count, change.second.count) == (a.sum(), b.sum())
        only = int((a & ~b).sum()), int((b & ~a).sum())
        assert (change.only_first, change.only_second) == only
        wanted = stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
        assert change.p == pytest.approx(wanted)
        assert change.p <= change.p_holm <= min(1.0, change.p * len(found.sources))
        assert change.difference == pytest.approx(100 * (b.mean() - a.mean()))
        assert change.low <= change.difference <= change.high
        moved += change.p_holm < 0.05
    assert moved, "nothing differs: nothing was tested"
    for entropy in found.entropies:
        a, b = (cell["entropy"].to_numpy() for cell in cells[entropy.ablation])
        assert (entropy.first, entropy.second) == pytest.approx((a.mean(), b.mean()))
        assert entropy.difference == pytest.approx(b.mean() - a.mean())
        assert entropy.low < entropy.difference < entropy.high


def test_a_run_does_not_differ_from_itself(folders: tuple[Path, Path]) -> None:
    one, _ = read(folders)
    found = compare_runs(one, one)
    assert {c.p for c in found.sources} == {1.0}
    assert {(c.low, c.high) for c in found.sources} == {(0.0, 0.0)}
    assert {a.texts.percent for a in found.alike} == {100.0}


def test_prompts_are_paired_by_what_they_ask_and_not_by_their_place(folders: tuple[Path, Path]) -> None:
    one, two = read(folders)
    order = np.random.default_rng(0).permutation(240)[:200]
    shuffled = shuffle(two, order)
    rows = paired_rows(one.prompts, shuffled.prompts)
    assert rows[0].tolist() == sorted(order.tolist())
    assert order[rows[1]].tolist() == rows[0].tolist()
    mine, straight = compare_runs(one, shuffled), compare_runs(shuffle(one, np.sort(order)), two)
    assert mine.paired == straight.paired == 200
    assert mine.sources == straight.sources
    assert "(40 and 0 that only one of them asked are left out)" in sentences(mine)[0]


def shuffle(run: RunResults, order: np.ndarray) -> RunResults:
    """The run with some of its prompts, in another order."""
    changed = RunResults(**{f: getattr(run, f) for f in run.__dataclass_fields__})
    for name in ("prompts", "plain"):
        object.__setattr__(changed, name, getattr(run, name).iloc[order].reset_index(drop=True))
    ablated = {v: table.iloc[order].reset_index(drop=True) for v, table in run.ablated.items()}
    object.__setattr__(changed, "ablated", ablated)
    return changed


def test_other_prompts_are_two_samples(folders: tuple[Path, Path]) -> None:
    one, two = read(folders)
    other = shuffle(two, np.arange(240))
    object.__setattr__(
        other,
        "prompts",
        other.prompts.assign(knowledge_probing_prompt=[f"other {i}" for i in range(240)]),
    )
    found = compare_runs(one, other)
    assert (found.paired, found.alike) == (0, ())
    for change in found.sources:
        table = [[r.count, r.total - r.count] for r in (change.first, change.second)]
        assert change.p == pytest.approx(stats.fisher_exact(table).pvalue)
        assert change.only_first is None
        assert change.low <= change.difference <= change.high
    # Drawn apart: the same draws would let what the samples have in common cancel.
    facts = (one.prompts["statement_subject"] + one.prompts["rel_lemma"]).tolist()
    drawn = [
        clusters(facts, seed).means(run.plain[["entropy"]].to_numpy(float))
        for seed, run in ((0, one), (1, other))
    ]
    low, high = interval(drawn[1] - drawn[0])
    assert (found.entropies[0].low, found.entropies[0].high) == pytest.approx((low[0], high[0]))
    paired = compare_runs(one, two)
    assert [c.difference for c in found.sources] == pytest.approx(
        [c.difference for c in paired.sources]
    )
    page = markdown(found)
    assert "share no prompt" in page
    assert "Fisher" in page
    assert "only the first" not in page


def test_the_command_writes_and_says_it(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", *map(str, folders), "--out", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "both asked 240 prompts" in shown[0]
    assert [line.split(":")[0] for line in shown[1:4]] == ["Without ablation", "Mean (μ)", "Mode"]
    written = json.loads((out / "run_comparison.json").read_text())
    found = compare_runs(*read(folders))
    assert written["paired"] == 240
    assert [c["p"] for c in written["sources"]] == [c.p for c in found.sources]
    page = (out / "run_comparison.md").read_text()
    rows = [
        r.split(" | ") for r in page.splitlines() if r.startswith(("| without", "| mean", "| mode"))
    ]
    assert len(rows) == 9 + 3
    for row, change in zip(rows, found.sources, strict=False):
        assert row[1] == change.source
        assert f"({change.first.count}/240;" in row[2]
        assert f"({change.second.count}/240;" in row[3]
        assert (row[4], row[5]) == (str(change.only_first), str(change.only_second))
        assert row[6].startswith(f"{change.difference:+.1f} ")


def test_settings_that_differ_are_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(folders[1], tmp_path / "b"))
    change_identity(other, dtype="bfloat16", protocol="released")
    found = compare_runs(read_results(folders[0]), read_results(other))
    assert found.settings["dtype"] == ("float32", "bfloat16")
    assert found.settings["protocol"][1] == "released"
    assert "| dtype | float32 | bfloat16 |" in markdown(found)


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ("a", [], "of which the paper printed nothing"),
        ("ab", ["--to", "paper"], "of which the paper printed nothing"),
        ("a", ["--to", "run"], "1 runs: two are compared with each other"),
        ("aa", [], "the same run"),
    ],
)
def test_runs_that_cannot_be_held_against_each_other(
    runs: str,
    options: list[str],
    message: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(folders["ab".index(name)]) for name in runs]
    assert main(["compare", *given, "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_of_two_published_models_are_held_against_the_paper_unless_told(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        str(make_run(tmp_path / name, model=name, values=VALUES[:1]).path)
        for name in ("gpt2-small", "Phi-1_5")
    ]
    assert main(["compare", *made, "--out", str(tmp_path / "p")]) == 0
    assert "Claims:" in capsys.readouterr().out
    assert main(["compare", *made, "--to", "run", "--out", str(tmp_path / "r")]) == 0
    assert "both asked 60 prompts" in capsys.readouterr().out
