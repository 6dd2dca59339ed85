"""Lists of guessed length hold what lists of the right length hold, and nobody waits for them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ccm.decoding import hooked
from ccm.decoding import next_token as choosing
from ccm.decoding import shared as decoding
from ccm.decoding.bounded import BoundedLists, distinct
from ccm.decoding.forward import plan_rows
from ccm.decoding.results import Batch, Work
from ccm.method.ablation import Ablation
from ccm.models.load import load
from ccm.models.specs import spec_for
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder
from tests.without_data import Finished, InventedLengths, no_data

masks = st.lists(st.booleans(), min_size=1, max_size=40).map(torch.tensor)


@given(masks, st.integers(0, 8))
def test_a_list_that_holds_is_the_exact_one(mask: torch.Tensor, least: int) -> None:
    guessed, exact = BoundedLists(exact=False), BoundedLists(exact=True)
    wanted = exact.places("list", mask)
    found = guessed.places("list", mask, least)
    if len(wanted) > least:
        assert not guessed.holds()
        assert guessed.was_short("list")
        guessed.start()
        found = guessed.places("list", mask, least)
    assert guessed.holds()
    assert torch.equal(found[: guessed.count("list")], wanted)
    assert (found[guessed.count("list") :] == len(mask)).all()
    assert guessed.count("list") == exact.count("list") == guessed.total("is") == len(wanted)


def test_room_grows_with_need_and_what_is_rare_loses_it_again() -> None:
    lists, many = BoundedLists(exact=False), torch.ones(30, dtype=torch.bool)

    def lengths(mask: torch.Tensor) -> tuple[int, int, bool]:
        lists.start()
        usual, rare = lists.places("usual", mask, least=4), lists.places("rare", mask, least=0)
        return len(usual), len(rare), lists.holds()

    assert lengths(~many) == (4, 0, True)
    assert lengths(many[:10]) == (4, 0, False)
    assert lengths(many[:10]) == (10, 10, True)
    assert lengths(many) == (20, 20, False)
    assert lengths(many) == (30, 30, True)
    assert lengths(~many) == (30, 30, True)
    assert lengths(~many) == (30, 0, True)


def test_lists_that_are_short_in_turn_come_to_an_end() -> None:
    """What has found room keeps it while the step is made again for another list."""
    lists, many = BoundedLists(exact=False), torch.ones(30, dtype=torch.bool)
    for name in ("a", "b", "c"):  # each is seen only once the one before it fits
        lists.start()
        found = [lists.places(other, many, least=0) for other in "abc" if other <= name]
        assert not lists.holds()
        assert [len(places) for places in found] == [30] * (len(found) - 1) + [0]
    lists.start()
    assert [len(lists.places(name, many, least=0)) for name in "abc"] == [30] * 3
    assert lists.holds()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.integers(0, 4))
def test_distinct_keys_and_places_are_numpys(keys: list[int], fillers: int) -> None:
    wanted, inverse = np.unique(keys, return_inverse=True)
    for n_keys in (13, 13 * 40):  # by counting, and by sorting
        found, place = distinct(torch.tensor(keys), n_keys)
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(place, inverse)
    lists = BoundedLists(exact=False)
    found, place = lists.distinct("keys", torch.tensor([*keys, *[13] * fillers]), 13)
    assert lists.holds()
    np.testing.assert_array_equal(found[: lists.count("keys")], wanted)
    np.testing.assert_array_equal(place[: len(keys)], inverse)
    assert ((found >= 0) & (found < 13)).all(), "what fills up a list must be some key"


@given(st.lists(st.integers(0, 7), min_size=1, max_size=24).map(sorted), st.integers(0, 5))
def test_rows_are_planned_alike_for_lists_of_any_length(parents: list[int], fillers: int) -> None:
    n, exact, guessed = len(parents), BoundedLists(exact=True), BoundedLists(exact=False)
    wanted = plan_rows(torch.tensor(parents), exact, n)
    rows = plan_rows(torch.tensor([*parents, *[0] * fillers]), guessed, torch.tensor(n))
    assert guessed.holds()
    assert torch.equal(rows.branch[:n], wanted.branch)
    moved = guessed.count("moved")
    assert torch.equal(rows.moved[:moved], wanted.moved)
    assert torch.equal(rows.source[:moved], wanted.source)


# --- the whole decode -----------------------------------------------------------------------------


def decoded(config: ToyConfig, sizes: tuple[int, ...], **options: Any) -> tuple[list[Batch], Work]:
    model, prompts = load(spec_for(str(toy_folder(config)))), token_prompts(9, config, seed=3)
    random_ = np.random.default_rng(0)
    sets = []
    for size in sizes:
        neurons = random_.choice(config.d_mlp, size, replace=False)
        values = tuple(float(v) for v in 3 * random_.normal(size=size))
        sets.append(Ablation("set", tuple(int(i) for i in neurons), values))
    work = Work()
    return list(decoding.decode_sets(model, prompts, sets, work=work, **options)), work


each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)


@each_toy
@pytest.mark.parametrize("own_top", [False, True])
@pytest.mark.parametrize("full", [None, [True] + [False] * 6], ids=["full", "cut"])
def test_guessed_lengths_change_neither_results_nor_counts(
    config: ToyConfig, own_top: bool, full: list[bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def early(prompt: int, text: str) -> bool:
        return (prompt + len(text)) % 3 == 0

    options: dict[str, Any] = {"own_top": own_top, "full": full, "decided": early}
    exact, wanted = decoded(config, (5, 0, 12, 5, 5, 5), **options)
    waits = []

    class Guessing(BoundedLists):
        def holds(self) -> bool:
            waits.append(super().holds())
            return waits[-1]

    monkeypatch.setattr(decoding, "BoundedLists", lambda exact: Guessing(exact=False))
    for unsure, whole in ((1, 1), (1 << 12, 1 << 6)):
        monkeypatch.setattr(choosing, "UNSURE", unsure)
        monkeypatch.setattr(choosing, "WHOLE", whole)
        waits.clear()
        shards, work = decoded(config, (5, 0, 12, 5, 5, 5), **options)
        assert work == wanted
        if unsure > 1:
            assert waits.count(False) <= work.refereed, "a step waits once, but for near ties"
        else:
            assert not all(waits), "no list was too short: nothing was tested"
        for mine, its in zip(shards, exact, strict=True):
            assert mine.leaves == its.leaves
            assert mine.texts == its.texts
            for name in ("prompts", "leaf", "entropy", "asked", "log_probs", "top_tokens"):
                np.testing.assert_array_equal(getattr(mine, name), getattr(its, name))


# --- one wait a step ------------------------------------------------------------------------------


def test_what_holds_no_data_cannot_be_read() -> None:
    with no_data():
        values = torch.arange(5) + 1
        for ask in (
            lambda: values.sum().item(),
            lambda: bool((values > 2).all()),
            lambda: torch.nonzero(values),
            lambda: values[values > 2],
            lambda: torch.unique(values),
        ):
            with pytest.raises(Exception, match=r"aten\.|not linked"):
                ask()


@each_toy
def test_a_step_reads_nothing_but_the_lengths_of_its_lists(
    config: ToyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    # transformers looks for masked slots unless it sees that there is no data.
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *args: False)
    room = InventedLengths(3, kept=4, moved=1, on=7, branches=5)
    monkeypatch.setattr(decoding, "BoundedLists", lambda exact: room)
    run = decoding.Engine.run

    def without_data(*args: Any) -> Any:
        with no_data():
            return run(*args)

    monkeypatch.setattr(decoding.Engine, "run", without_data)
    with pytest.raises(Finished):
        decoded(config, (5, 0, 12, 5))
    assert room.left == -1


def test_a_sliding_window_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = next(c for c in FAMILIES if c.family == "mistral")
    model, prompts = load(spec_for(str(toy_folder(config)))), token_prompts(9, config, seed=3)
    wide = hooked.decode(model, prompts).tokens
    for settings in (model.body.config, model.bridge.original_model.config):
        monkeypatch.setattr(settings, "sliding_window", 6)
    model.trial = None  # of the model as it was loaded
    narrow = hooked.decode(model, prompts).tokens
    assert narrow != wide, "the window hides nothing: nothing was tested"
    assert decoding.decode(model, prompts).tokens == narrow
