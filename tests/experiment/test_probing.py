"""Counter-objects are chosen as exact arithmetic ranks them, off residuals that were kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ccm.decoding import hooked
from ccm.decoding.engines import ENGINES, Engine
from ccm.experiment import probing
from ccm.experiment.plan import find_facts
from ccm.experiment.probing import NEAR, answers_of, first_log_probs, parametric_prompts
from ccm.method.prompts import SPLITTER
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import MODELS, spec_for
from tests.exact import forward, margins
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

each_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
each_family = pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)


def toy(config: ToyConfig) -> LoadedModel:
    return load(spec_for(str(toy_folder(config))))


@each_engine
@each_family
def test_log_probabilities_come_off_the_residuals_that_were_kept(
    config: ToyConfig, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = toy(config), token_prompts(7, config, seed=5, min_len=2)
    said = answers_of(engine, model, prompts)
    asked_for = [[i, 3 * i + 1, 40, 7][: 2 + i % 3] for i in range(7)]
    monkeypatch.setattr(probing, "NEAR", -1.0)  # nothing is run again
    monkeypatch.setattr(model.body, "forward", None)
    found = first_log_probs(engine, model, prompts, said.first.residual, asked_for)
    wanted = forward(model.source, prompts).log_probs
    for i, (prompt, ids) in enumerate(zip(prompts, asked_for, strict=True)):
        exact = wanted[i, len(prompt) - 1, ids]
        margins(model).log_prob.assert_close(np.array(found[i]), exact.numpy(), what=config.id)


@each_engine
def test_what_nearly_ties_is_ranked_by_exact_arithmetic(engine: Engine) -> None:
    model, prompts = load(MODELS["organism"]), [[0, *range(i, i + 9)] for i in range(3, 60, 4)]
    said = answers_of(engine, model, prompts)
    wanted = forward(model.source, prompts).log_probs[:, -1]
    order = wanted.argsort(-1)
    # Neighbours in the exact order; some lie closer together than float32 can tell.
    asked_for = [[0, *row[40:46].tolist()] for row in order]
    off = torch.randn(said.first.residual.shape, generator=torch.Generator().manual_seed(0)).numpy()
    noisy = said.first.residual * (1 + 1e-5 * off)
    found = first_log_probs(engine, model, prompts, noisy.astype(np.float32), asked_for)
    near = 0
    for exact, ids, row in zip(wanted, asked_for, found, strict=True):
        if np.diff(np.sort(exact[ids[1:]].numpy())[:5]).min() < NEAR / 2:
            near += 1
            assert np.abs(np.array(row) - exact[ids].numpy()).max() < 2e-9
            assert sorted(row[1:]) == row[1:]
    assert near > len(prompts) // 3, "hardly a near tie: nothing was tested"


def test_equal_tokens_are_no_near_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not probing._near([1, 5, 5, 6, 7, 8], [0.0, -9.0, -9.0, -8.0, -7.0, -6.0])
    assert probing._near([1, 5, 4, 6, 7, 8], [0.0, -9.0, -9.0, -8.0, -7.0, -6.0])
    assert probing._near([1, 5, 6], [0.0, -9.0, -9.0 + NEAR / 2])
    assert not probing._near([1, 5, 6], [0.0, -9.0, -9.0 + 2 * NEAR])
    assert not probing._near([1, 5], [0.0, 0.0]), "the fact's own token is no candidate"
    # Beyond the three that are chosen, the next, and the fact's own object, order does not matter.
    assert not probing._near([1, *range(5, 12)], [0.0, -9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -4.0])


def test_answers_are_decoded_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(MODELS["organism"])
    built = find_facts(None, MODELS["organism"])
    prompts = [model.encode(text) for text in parametric_prompts(model, built, "bare")[:30]]
    model = replace(model, eos=frozenset())  # the organism ends by itself after its full stop
    cut, whole = answers_of(ENGINES["shared"], model, prompts), hooked.decode(model, prompts)
    shorter = 0
    for mine, its in zip(cut.texts, whole.texts, strict=True):
        assert its.startswith(mine)
        shorter += mine != its
        assert mine == its or SPLITTER.search(mine), "cut before its answer ended"
    assert shorter, "nothing was cut"
