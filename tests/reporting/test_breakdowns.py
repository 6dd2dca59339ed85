"""Effects by relation and by transition are those of the cells, and add up to the scores."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ccm.errors import BadInput
from ccm.experiment.results import RunResults, read_results, source_codes
from ccm.method.scores import conversion_ratio, global_transition_score, summarise, transition_counts
from ccm.method.sources import SOURCES
from ccm.reporting.breakdowns import entropy_changes, group_effects, relation_effects
from tests.made_runs import RELATIONS, make_run

VALUE = "mean_ablation"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    """A run with three relations in two groups, and a group without prompts; read-only."""
    path = tmp_path_factory.mktemp("relations") / "run"
    make_run(path, prompts=180, controls=7)
    return read_results(path)


def control_cells(run: RunResults) -> list[pd.DataFrame]:
    """Every control's cell, read whole."""
    paths = sorted((run.path / VALUE).glob("control_*.parquet"))
    return [pd.read_parquet(path) for path in paths]


def test_relations_are_scored_on_their_own_prompts(run: RunResults) -> None:
    effects = relation_effects(run, VALUE)
    assert [(e.name, e.group) for e in effects] == [*RELATIONS, ("is-subclass", "hierarchy")]
    for effect in effects[:-1]:
        mine = (run.prompts["rel_lemma"] == effect.name).to_numpy()
        before = run.plain.loc[mine, "source"].tolist()
        own, *controls = (
            transition_counts(before, cell.loc[mine, "source"].tolist())
            for cell in (run.ablated[VALUE], *control_cells(run))
        )
        assert effect.prompts == mine.sum() > 0
        for score, found, summary in (
            (global_transition_score, effect.gts, effect.gts_controls),
            (lambda counts: conversion_ratio(counts, "CK"), effect.cr_ck, effect.cr_ck_controls),
        ):
            assert found == score(own)
            assert summary == summarise(score(own).percent, [score(c).percent for c in controls])
    assert len({effect.gts.percent for effect in effects}) > 2, "all alike: nothing was told apart"


def test_one_group_of_all_prompts_has_the_scores(tmp_path: Path) -> None:
    make_run(tmp_path, relations=(("capital-of", "places"), ("born-in", "places")))
    run = read_results(tmp_path)
    scores = run.scores["ablations"][VALUE]
    effect, empty = group_effects(run, VALUE)
    assert vars(effect.gts) == scores["entropy"]["gts"]
    assert vars(effect.cr_ck) == scores["entropy"]["conversion_ratios"]["CK"]
    for mine, its in (
        (effect.gts_controls, scores["controls"]["gts"]),
        (effect.cr_ck_controls, scores["controls"]["conversion_ratios"]["CK"]),
    ):
        assert vars(mine) == pytest.approx(its)
    assert (empty.name, empty.prompts, empty.gts.percent, empty.gts_controls.mean) == (
        "hierarchy",
        0,
        None,
        None,
    )


def test_groups_are_those_of_the_relations_in_their_order(run: RunResults) -> None:
    groups = group_effects(run, VALUE)
    assert [effect.name for effect in groups] == ["places", "music", "hierarchy"]
    relations = relation_effects(run, VALUE)
    for group in groups:
        of_group = [effect for effect in relations if effect.group == group.name]
        assert group.prompts == sum(effect.prompts for effect in of_group)
        assert group.gts.count == sum(effect.gts.count for effect in of_group)


def test_without_controls_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    make_run(tmp_path, controls=0)
    run = read_results(tmp_path)
    assert run.control_sources[VALUE].shape == (0, len(run.plain))
    assert all(effect.gts_controls.mean is None for effect in group_effects(run, VALUE))


def test_control_sources_are_those_of_the_cells(run: RunResults) -> None:
    found = run.control_sources[VALUE]
    assert found.dtype == np.int8
    for row, cell in zip(found, control_cells(run), strict=True):
        assert [SOURCES[i] for i in row] == cell["source"].tolist()
    assert source_codes(pd.Series(["PK", "?", "CK"])).tolist() == [2, -1, 0]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: path.unlink(), "missing from the run folder"),
        (lambda path: path.write_bytes(b"PAR1"), "damaged"),
        (lambda path: pd.DataFrame({"source": ["CK"]}).to_parquet(path), "not a cell of this run"),
        (lambda path: pd.DataFrame({"source": ["?"] * 60}).to_parquet(path), "not a cell of this run"),
    ],
)
def test_a_broken_cell_is_one_clear_error(tmp_path: Path, break_it: object, message: str) -> None:
    make_run(tmp_path)
    break_it(tmp_path / VALUE / "control_002.parquet")  # type: ignore[operator]
    run = read_results(tmp_path)  # reads no control cell
    with pytest.raises(BadInput, match=f"control_002.*{message}"):
        _ = run.control_sources


def test_entropy_changes_have_the_scored_means(run: RunResults) -> None:
    scores = run.scores["ablations"][VALUE]
    changes = entropy_changes(run, VALUE)
    assert [(c.before, c.after) for c in changes] == [(k, k2) for k in SOURCES for k2 in SOURCES]
    for change in changes:
        k, k2 = change.before, change.after
        assert len(change.values) == scores["entropy"]["transition_counts"][k][k2]
        assert change.mean == pytest.approx(scores["entropy"]["entropy_difference"][k][k2])
        means = []
        for cell in control_cells(run):
            moved = (run.plain["source"] == k) & (cell["source"] == k2)
            means += [(run.plain["entropy"] - cell["entropy"])[moved].mean()] if moved.any() else []
        assert change.control_sets == len(means)
        expected = vars(summarise(np.nan if change.mean is None else change.mean, means))
        assert vars(change.controls) == pytest.approx(expected)
    assert 0 < min(c.control_sets for c in changes) < 7, "no transition that only some controls make"
