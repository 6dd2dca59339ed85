"""The facts of the world: their form, and how few of them the filters would drop if all were known."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

import ccm
from ccm.experiment.fact_files import read_fact_folder
from ccm.method.prompts import (
    ParametricAnswer,
    counter_candidates,
    filter_answers,
    filter_relation_groups,
    filter_subject_object,
    holds_splitter,
    same_name,
)

FOLDER = Path(ccm.__file__).parent / "experiment" / "world"
WORLD = read_fact_folder(FOLDER, "world")
FACT_HEADER = ["statement_subject", "statement_relation", "statement_object", "statement", "rel_lemma"]
RELATION_HEADER = [
    "relation",
    "relation_group_id",
    "object_generation_description",
    "generation_statement_1",
    "generation_subject_1",
    "generation_object_1",
]


@pytest.fixture(scope="module")
def known() -> list[ParametricAnswer]:
    """What a model that knows everything would answer."""
    return [
        ParametricAnswer(row, fact, "", f" {fact.object}.", fact.object, row)
        for row, fact in enumerate(WORLD.facts)
    ]


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(FOLDER / name, dtype=str, keep_default_na=False)


def test_columns() -> None:
    assert list(table("facts.csv").columns) == FACT_HEADER
    assert list(table("relations.csv").columns) == RELATION_HEADER


def test_size() -> None:
    assert len(WORLD.facts) >= 480
    assert 12 <= len(WORLD.relations) <= 16
    assert len({r.group for r in WORLD.relations.values()}) in (4, 5)
    counts = Counter(f.relation for f in WORLD.facts)
    assert set(counts) == set(WORLD.relations)
    assert min(counts.values()) >= 20


@pytest.mark.parametrize("name", ["facts.csv", "relations.csv"])
def test_cells_are_clean(name: str) -> None:
    for cell in table(name).to_numpy().ravel():
        assert cell
        assert cell == " ".join(cell.split())


def test_statements_are_subject_words_object() -> None:
    for subject, words, object_, statement, _ in table("facts.csv").to_numpy():
        assert statement == f"{subject} {words} {object_}."


def test_one_answer_each() -> None:
    twice = Counter((same_name(f.subject), f.relation) for f in WORLD.facts)
    assert [key for key, n in twice.items() if n > 1] == []
    words: dict[str, set[str]] = {}
    for fact in WORLD.facts:
        words.setdefault(fact.relation, set()).add(fact.words)
    assert all(len(w) == 1 for w in words.values())


def test_no_name_holds_a_splitter() -> None:
    names = [name for f in WORLD.facts for name in (f.subject, f.object)]
    names += [n for r in WORLD.relations.values() for n in (r.example_subject, r.example_object)]
    assert [name for name in names if holds_splitter(name)] == []


def test_no_subject_shares_a_name_with_its_object(known: list[ParametricAnswer]) -> None:
    kept = {a.row for a in filter_subject_object(known)}
    assert [a.fact for a in known if a.row not in kept] == []


def test_examples_are_queries_outside_the_facts() -> None:
    words = {f.relation: f.words for f in WORLD.facts}
    subjects = {same_name(f.subject) for f in WORLD.facts}
    pairs = {frozenset((same_name(f.subject), same_name(f.object))) for f in WORLD.facts}
    for relation in WORLD.relations.values():
        assert relation.example_query == f"{relation.example_subject} {words[relation.name]}"
        assert same_name(relation.example_subject) not in subjects
        example = frozenset((same_name(relation.example_subject), same_name(relation.example_object)))
        assert example not in pairs


def test_descriptions_name_the_subject() -> None:
    assert all("the subject" in r.description for r in WORLD.relations.values())


def test_relation_groups_share_few_names(known: list[ParametricAnswer]) -> None:
    dropped = len(known) - len(filter_relation_groups(known, WORLD.relations))
    assert dropped <= 0.02 * len(known)


def test_every_relation_has_three_counter_objects(known: list[ParametricAnswer]) -> None:
    candidates = counter_candidates(filter_answers(known, WORLD.relations))
    assert all(len(candidates[name]) >= 4 for name in WORLD.relations)
