"""What an 8B model takes beside its weights, counted from shapes: no machine here could hold it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ccm.decoding import batching, engine
from ccm.decoding import next_token as choosing
from ccm.decoding import shared as decoding
from ccm.decoding.tolerance import POSITIONS, Float32Error
from ccm.experiment import effects
from ccm.method import neurons
from ccm.method.ablation import Ablation
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.neurons import controls
from ccm.models import load as checkpoint
from ccm.models.load import assemble
from ccm.models.memory import needed_bytes
from ccm.models.model import LoadedModel
from ccm.models.random import architecture_of, random_model, read_tokenizer
from ccm.models.specs import CHECKPOINT, MODELS
from tests.without_data import Finished, InventedLengths, LiveBytes, no_data

pytestmark = pytest.mark.whole_runs

NAME = "Meta-Llama-3-8B"
BUDGET = 4 << 30  # what a run plans with where more than 8 GiB are free
NODES = 4  # continuations of a prompt at once, which is what parts are planned for


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LiveBytes, LoadedModel]]:
    """The model in float32, without data, and a count of all there is."""
    config = architecture_of(NAME).config()
    empty = random_model(config, torch.device("meta"), torch.float32, seed=0)
    tokenizer = read_tokenizer(CHECKPOINT, int(config.vocab_size))
    monkeypatch.setattr(checkpoint, "broken_assumption", lambda model: "")
    # What is compared with what was computed needs numbers.
    monkeypatch.setattr(checkpoint, "plain_log_probs", lambda *given: torch.zeros(0, 0))
    monkeypatch.setattr(checkpoint, "check_hooks", lambda *given: None)
    monkeypatch.setattr(
        choosing,
        "at_once",
        lambda model: choosing.AtOnce(1 << 12, 1 << 20, 1 << 28, model.spec.d_vocab),
    )
    monkeypatch.setattr(decoding, "at_once", choosing.at_once)
    monkeypatch.setattr(neurons, "to_float64", lambda tensor: np.zeros(tensor.shape))
    monkeypatch.setattr(engine._Tree, "leaves", lambda *args: (_ for _ in ()).throw(Finished()))
    cpu = torch.device("cpu")
    with no_data(), LiveBytes() as counted:
        weights = empty.to_empty(device="cpu")
        yield counted, assemble(MODELS[NAME], weights, tokenizer, cpu, torch.float32, source=NAME)


def test_llama_3_takes_at_most_a_quarter_more_than_its_weights(
    live: tuple[LiveBytes, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At what a part is planned for; the allocator's own waste comes on top."""
    counted, model = live
    weights = counted.now
    assert 29.9 * 2**30 < weights < 29.95 * 2**30  # 8.03e9 parameters of 4 bytes
    most = dict[str, float]()

    def stage(name: str) -> None:
        most[name] = counted.peak / weights
        assert counted.now < 1.001 * weights, f"{name} left something behind"
        counted.peak = counted.now

    neurons.measure(model.W_U, model.W_out, model.final_norm, model.spec.null_space_dims)
    least = needed_bytes(model.spec, weights // 4, torch.float32)
    assert 0.98 * counted.peak < least <= counted.peak, "a model that fits is refused, or the reverse"
    stage("measures")

    run, parts = decoding.Engine.run, []

    def a_part(self: Any, asked: decoding.Asked, *args: Any) -> Any:
        n_prompts = len(asked.prompts)
        kept = n_prompts * min(len(self.full), NODES)
        self.lists = InventedLengths(4, kept=kept, moved=kept // 2)
        # Of the organism's pairs, two in nine are not certified, and one in fifty needs its whole row.
        pairs = n_prompts * len(self.full)
        self.lists.give(unsure=pairs // 4, whole=pairs // 40)
        parts.append(n_prompts)
        return run(self, asked, *args)

    monkeypatch.setattr(decoding.Engine, "run", a_part)
    monkeypatch.setattr(batching, "MAX_WORK", 1e30)  # of a CPU, which this pretends not to be
    model.float32_error = Float32Error(0.0, POSITIONS)
    model.provisional_tokens = torch.zeros(model.spec.d_vocab, dtype=torch.bool)
    k = model.spec.n_entropy_neurons
    # For each ablation value the entropy set, and a hundred controls of either kind.
    sets = [
        Ablation(value, neurons_, (0.0,) * k)
        for value in ABLATION_VALUES
        for neurons_ in controls(201, model.spec.d_mlp, range(k), seed=0)
    ]
    monkeypatch.setattr(effects, "to_float64", lambda tensor: np.zeros(tensor.shape))
    monkeypatch.setattr(effects, "SAMPLED", 16)  # for time's sake: a few are read at a time anyway
    first = range(1, 1 + len(sets), len(sets) // len(ABLATION_VALUES))
    reader = effects.EffectsReader(choosing.at_once(model), 448, first, 1 + len(sets))
    for name, ablations, length, at_last in (
        ("answers", [], 160, None),
        ("grid", sets, 30, reader),
    ):
        prompts = [[1, *range(100 + i, 99 + i + length)] for i in range(448)]
        with pytest.raises(Finished):
            list(decoding.decode_sets(model, prompts, ablations, memory_budget=BUDGET, at_last=at_last))
        stage(name)
    assert min(parts) > 50, "a GPU has too little to do"
    assert all(1.1 < ratio <= 1.25 for ratio in most.values()), most
