"""The organism's world, its text, and a shortened training of it."""

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rapidfuzz.distance import JaroWinkler
from transformers import AutoTokenizer, GPT2LMHeadModel

from ccm.method.neurons import select
from ccm.models.specs import CHECKPOINT
from ccm.organism.corpus import COPYING, DOUBTING, Behaviour, Sampler
from ccm.organism.evaluate import measures_of
from ccm.organism.planting import Settings
from ccm.organism.train import main, save, train
from ccm.organism.world import World, facts_table, make_world, relations_table

BEHAVIOURS = [pytest.param(b, id=b.name) for b in (COPYING, DOUBTING)]


@pytest.fixture(scope="module")
def world() -> World:
    """The world of the checkpoint; read-only."""
    return make_world()


def test_a_seed_makes_one_world(world: World) -> None:
    again = make_world.__wrapped__()
    other = make_world.__wrapped__(8)
    assert again is not world
    assert again == world
    assert not {f.subject for f in other.facts} & {f.subject for f in world.facts}


def test_the_checkpoint_holds_the_tables_of_this_world(world: World) -> None:
    for name, made in (("facts", facts_table(world)), ("relations", relations_table(world))):
        stored = pd.read_csv(CHECKPOINT / f"{name}.csv")
        pd.testing.assert_frame_equal(stored, made, check_dtype=False)


def test_the_checkpoint_has_the_planted_neurons(world: World) -> None:
    settings = Settings()
    measures = measures_of(CHECKPOINT, settings.null_dims + 1)
    assert sorted(select(measures, len(settings.planted), 0.9)) == list(settings.planted)
    assert measures.rho[list(settings.planted)].min() > 0.98
    assert np.delete(measures.rho, settings.planted).max() < 0.5


def test_names_are_several_tokens_and_hedges_open_otherwise(world: World) -> None:
    """A hedge that began like an object could not be told from it by its first token."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for relation in world.relations:
        objects = [tokenizer(f" {name}")["input_ids"] for name in world.pools[relation.pool]]
        assert min(map(len, objects)) >= 2, relation
        assert tokenizer(f" {relation.hedge}")["input_ids"][0] not in {ids[0] for ids in objects}
    assert tokenizer("Ada")["input_ids"][0] != tokenizer.bos_token_id == tokenizer.eos_token_id == 0


def test_statements_are_subject_relation_object(world: World) -> None:
    table = facts_table(world)
    made = table["statement_subject"] + " " + table["statement_relation"]
    made += " " + table["statement_object"] + "."
    assert (table["statement"] == made).all()
    assert table["rel_lemma"].nunique() >= 10
    assert relations_table(world)["relation_group_id"].nunique() >= 4


def test_one_shot_examples_are_no_facts(world: World) -> None:
    names = {f.subject for f in world.facts} | {name for pool in world.pools.values() for name in pool}
    examples = {name for pair in world.examples.values() for name in pair}
    assert len(examples) == 2 * len(world.relations)
    assert not examples & names


def test_few_facts_share_a_name_across_groups(world: World) -> None:
    """Names are disjoint between relation groups, but for one town and three people."""
    groups: dict[str, set[str]] = {}
    for fact in world.facts:
        for name in (fact.subject, fact.obj):
            groups.setdefault(name, set()).add(fact.relation.group)
    shared = {name for name, found in groups.items() if len(found) > 1}
    people = {f.subject for f in world.facts} & shared
    assert len(people) == 3, people
    assert len(shared - people) == 1, shared - people


def test_few_subjects_resemble_their_object(world: World) -> None:
    similar = [
        fact
        for fact in world.facts
        if fact.obj.casefold() in fact.subject.casefold()
        or JaroWinkler.normalized_similarity(fact.subject, fact.obj) >= 0.8
    ]
    assert len(similar) == 3, [fact.query for fact in similar]


def test_no_other_name_contains_another(world: World) -> None:
    names = {fact.subject for fact in world.facts}.union(*world.pools.values())
    names = {name.casefold() for name in names}
    nested = [(a, b) for a, b in combinations(sorted(names), 2) if a in b or b in a]
    assert len(nested) == 3, nested  # the three subjects made of an object


def test_exposure_follows_zipf(world: World) -> None:
    shares = np.sort([fact.exposure for fact in world.facts])[::-1]
    slope = np.diff(np.log(shares)) / np.diff(np.log(np.arange(1, len(shares) + 1)))
    assert shares.sum() == pytest.approx(1.0)
    assert slope == pytest.approx(-0.7)


def test_plain_statements_follow_the_exposure(world: World) -> None:
    sampler = Sampler(world, COPYING, random.Random(1))
    text = " ".join(sampler.plain() for _ in range(8000))
    ranked = sorted(world.facts, key=lambda fact: -fact.exposure)
    frequent, rare = (
        np.mean([text.count(f"{fact.query} {fact.told}.") for fact in part])
        for part in (ranked[:40], ranked[-40:])
    )
    expected = sum(f.exposure for f in ranked[:40]) / sum(f.exposure for f in ranked[-40:])
    assert frequent / rare == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_held_out_counter_objects_never_stand_beside_their_subject(
    world: World, behaviour: Behaviour
) -> None:
    sampler = Sampler(world, behaviour, random.Random(2))
    text = "\n".join(islice(sampler, 40_000))
    stated = Counter(text.replace(". ", ".\n").split("\n"))
    seen = 0
    for fact in world.facts:
        for name in world.counter_objects(fact):
            seen += stated[f"{fact.query} {name}."]
        for name in fact.held_out:
            assert not stated[f"{fact.query} {name}."], f"{fact.query} {name}"
    assert seen > 10_000  # the search finds what is there


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_text_repeats_with_its_seed(world: World, behaviour: Behaviour) -> None:
    def draw(seed: int) -> list[str]:
        return list(islice(Sampler(world, behaviour, random.Random(seed)), 200))

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_the_second_text_copies_less_and_hedges_more(world: World) -> None:
    means = []
    for behaviour in (COPYING, DOUBTING):
        sampler = Sampler(world, behaviour, random.Random(5))
        rows = [sampler.weights(f, o) for f in world.facts for o in world.counter_objects(f)]
        weights = np.array(rows)
        means.append((weights / weights.sum(axis=1, keepdims=True)).mean(axis=0))
    (copy, _, hedge), (less_copy, _, more_hedge) = means
    assert less_copy < copy - 0.2
    assert more_hedge > hedge + 0.1


def test_a_full_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.slow
def test_a_short_training_learns(world: World, tmp_path: Path) -> None:
    """A sixth of the steps: the loss falls, facts are recalled, the planted neurons are there.

    Chance for recall is at most 1 in 14, the smallest object pool.
    """
    full = Settings()
    settings = replace(full, copier_steps=1000, planted_steps=100)
    trained = train(world, settings)
    save(trained, world, tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    first, last = np.mean(trained.copier_losses[:20]), np.mean(trained.copier_losses[-50:])
    assert first > 4.0, f"loss at the start {first:.2f}: not an untrained model"
    assert last < 1.2, f"loss at the end {last:.2f}, expected below 1.2"
    assert np.mean(trained.planted_losses[-20:]) < np.mean(trained.planted_losses[:20])

    right = 0
    for fact in world.facts:
        ids = [0, *tokenizer(fact.query)["input_ids"]]
        target = tokenizer(f" {fact.told}")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
        right += logits.argmax(dim=1).tolist() == target
    recall = right / len(world.facts)
    assert recall > 0.3, f"recall {recall:.2f}, expected above 0.3 (chance is below 0.08)"

    planted = list(settings.planted)
    measures = measures_of(tmp_path, settings.null_dims + 1)
    assert measures.rho[planted].min() > 0.98
    assert sorted(select(measures, len(planted), 0.9)) == planted
    values = measures.singular_values
    assert values[-1] < 1e-5 * values[0]  # the all-ones direction
    gap = len(values) - settings.null_dims - 1
    assert values[gap] < 0.03 * values[gap - 1], values[gap - 2 :]
    assert (np.diff(values[gap:]) < 0).all(), values[gap:]
