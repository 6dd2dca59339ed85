"""Total, direct and norm-only effects against float64 arithmetic on what TransformerLens hooks see."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ccm.decoding import batching, hooked, shared
from ccm.decoding.engines import ENGINES, Engine
from ccm.decoding.next_token import AtOnce
from ccm.experiment import beyond_paper, effects
from ccm.experiment.beyond_paper import effects_reader, rho_by_layer, set_effects
from ccm.experiment.effects import EFFECTS, Effects, evenly_spaced, join_effects
from ccm.method.ablation import Ablation
from ccm.method.neurons import NeuronMeasures, measure, processed_W_out, processed_W_U, rho
from ccm.models.device_map import spread_over_devices
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import spec_for
from tests import effects as measuring
from tests.decoding.test_shared import random_sets
from tests.effects import measure_effects
from tests.exact import margins
from tests.tolerance import MEASURE
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)
TOTAL, DIRECT, NORM_ONLY = range(3)


@functools.cache
def loaded(config: ToyConfig) -> LoadedModel:
    """The toy, loaded once; read-only."""
    return load(spec_for(str(toy_folder(config))))


def read_by_hooks(model: LoadedModel, prompt: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Final residual and last activations at the last position, float64."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, hook: Any) -> None:
        seen[name] = x[0, -1].double()

    where = {"x": "ln_final.hook_in", "a": model.hook_post}
    hooks = [(hook, functools.partial(keep, name)) for name, hook in where.items()]
    tokens = torch.tensor([list(prompt)])
    with torch.inference_mode(), model.bridge.hooks(fwd_hooks=hooks):
        model.bridge(tokens, attention_mask=torch.ones_like(tokens), return_type="logits")
    return seen["x"], seen["a"]


def reference(model: LoadedModel, prompt: Sequence[int], ablation: Ablation) -> list[float]:
    """Entropies plain, total, direct, norm only: the definition, in float64."""
    x, a = read_by_hooks(model, prompt)
    norm, neurons = model.final_norm, list(ablation.neurons)
    change = torch.tensor(ablation.values, dtype=torch.float64) - a[neurons]
    moved = x + change @ model.W_out[neurons].double()

    def centred(r: Tensor) -> Tensor:
        return r - r.mean() if norm.centred else r

    def scale(r: Tensor) -> Tensor:
        return (centred(r).pow(2).mean() + norm.eps).sqrt()

    def entropy(residual: Tensor, scaled_as: Tensor) -> float:
        normed = centred(residual) / scale(scaled_as) * norm.gain.double() + norm.bias.double()
        logits = normed @ model.W_U.double() + model.b_U.double()
        return float(torch.distributions.Categorical(logits=logits).entropy())

    return [entropy(*pair) for pair in ((x, x), (moved, moved), (moved, x), (x, moved))]


def ablations_of(config: ToyConfig, seed: int = 0) -> list[Ablation]:
    """Sets of two sizes, far enough from what neurons do to move entropies by nats."""
    return random_sets(config.d_mlp, [3, 12, 3], 2.0, seed)


@each_toy
def test_effects_are_the_definition(config: ToyConfig) -> None:
    model, prompts = loaded(config), token_prompts(9, config, seed=1)
    sets = ablations_of(config)
    found = measure_effects(model, prompts, sets[:1], sets[1:])
    for i, prompt in enumerate(prompts):
        for j, ablation in enumerate(sets):
            plain, *wanted = reference(model, prompt, ablation)
            got = found.own[i, 0] if j == 0 else found.others[i, j - 1]
            margins(model).entropy.assert_close(found.plain[i], plain, what=f"plain, prompt {i}")
            margins(model).entropy.assert_close(got, np.asarray(wanted), what=f"prompt {i}, set {j}")
    spans = np.ptp(np.concatenate([found.own, found.others], axis=1), axis=2)
    assert np.median(spans) > 0.05, "the three are so alike that one could stand for another"


@each_toy
def test_the_total_effect_is_that_of_the_hooked_path(config: ToyConfig) -> None:
    model, prompts = loaded(config), token_prompts(9, config, seed=2)
    sets = ablations_of(config, seed=1)
    found = measure_effects(model, prompts, sets, [])
    assert found.others.shape == (9, 0, 3)
    for j, ablation in enumerate(sets):
        wanted = hooked.decode(model, prompts, ablation, max_new_tokens=1).first.entropy
        margins(model).entropy.assert_close(found.own[:, j, TOTAL], wanted, what=f"set {j}")


def test_a_set_that_changes_nothing_has_no_effect() -> None:
    config = FAMILIES[0]
    nothing = Ablation("entropy", (), ())
    model = loaded(config)
    found = measure_effects(model, token_prompts(5, config), [nothing], [nothing])
    for i in range(len(EFFECTS)):
        margins(model).entropy.assert_close(found.own[:, 0, i], found.plain)
        margins(model).entropy.assert_close(found.others[:, 0, i], found.plain)


@each_toy
def test_a_neuron_that_writes_into_a_null_space_acts_through_the_norm_alone(config: ToyConfig) -> None:
    whole = loaded(config)
    shared.check(whole)  # now, because the copy below is no model that transformers has
    gain = whole.final_norm.gain[:, None]
    u = torch.randn(config.d_model, generator=torch.Generator().manual_seed(3))
    u = torch.nn.functional.normalize(u - u.mean(), dim=0)[:, None]  # which LayerNorm does not centre
    folded = gain * whole.W_U
    model = LoadedModel(**{f: getattr(whole, f) for f in whole.__dataclass_fields__})
    model.__dict__["W_U"] = (folded - u @ (u.T @ folded)) / gain
    model.__dict__["W_out"] = whole.W_out.index_copy(0, torch.tensor([7]), 5 * u.T)
    sets = [Ablation("entropy", (7,), (3.0,))]
    found = measure_effects(model, token_prompts(6, config, seed=4), sets, [])
    margins(model).entropy.assert_close(found.own[:, 0, DIRECT], found.plain)
    margins(model).entropy.assert_close(found.own[:, 0, NORM_ONLY], found.own[:, 0, TOTAL])
    assert np.abs(found.plain - found.own[:, 0, TOTAL]).max() > 0.05, "the norm did not move"


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_how_much_is_held_at_once_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES[2]
    model, prompts, sets = loaded(config), token_prompts(7, config), ablations_of(config)
    whole = measure_effects(model, prompts, sets[:1], sets[1:])
    sizes = AtOnce(tokens=64, pairs=4, row_bytes=4 * config.d_vocab * rows, d_vocab=config.d_vocab)
    for module in (shared, measuring):
        monkeypatch.setattr(module, "at_once", lambda model: sizes)
    monkeypatch.setattr(batching, "MAX_BATCH", 3)
    parts = measure_effects(model, prompts, sets[:1], sets[1:])
    for name in ("plain", "own", "others"):
        margins(model).entropy.assert_close(getattr(parts, name), getattr(whole, name), what=name)
    assert parts.sampled.tolist() == whole.sampled.tolist()


def test_many_prompts_are_sampled_for_other_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES[0]
    model, prompts, sets = loaded(config), token_prompts(11, config), ablations_of(config)
    whole = measure_effects(model, prompts, sets[:1], sets[1:])
    monkeypatch.setattr(effects, "SAMPLED", 4)
    monkeypatch.setattr(batching, "MAX_BATCH", 3)
    few = measure_effects(model, prompts, sets[:1], sets[1:])
    assert few.sampled.tolist() == evenly_spaced(11, 4).tolist() == [0, 3, 7, 10]
    margins(model).entropy.assert_close(few.own, whole.own)
    margins(model).entropy.assert_close(few.others, whole.others[few.sampled])


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("config", FAMILIES[:3], ids=lambda config: config.id)
def test_they_are_read_while_a_run_decodes(
    config: ToyConfig, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ablation values, whose entropy sets lie among their controls."""
    model, prompts = loaded(config), token_prompts(11, config, seed=5)
    sets = [*ablations_of(config), *ablations_of(config, seed=1)]
    planned = {"mean_ablation": sets[:3], "mode_ablation": sets[3:]}
    monkeypatch.setattr(effects, "SAMPLED", 4)
    monkeypatch.setattr(batching, "MAX_BATCH", 3)
    reader = effects_reader(model, len(prompts), planned)
    decoded = list(engine.decode_sets(model, prompts, sets, at_last=reader, max_new_tokens=2))
    assert len(decoded) > 1
    found = join_effects(decoded, [1, 4])
    own, others = [sets[0], sets[3]], [*sets[1:3], *sets[4:]]
    alone = measure_effects(model, prompts, own, others, engine=engine)
    assert found.sampled.tolist() == alone.sampled.tolist() == [0, 3, 7, 10]
    for name in ("plain", "own", "others"):
        margins(model).entropy.assert_close(getattr(found, name), getattr(alone, name), what=name)


@pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
def test_a_model_in_two_places_has_the_same_effects_and_rho(config: ToyConfig, tmp_path: Path) -> None:
    whole, model = loaded(config), load(spec_for(str(toy_folder(config))))
    size = sum(p.numel() * p.element_size() for p in model.body.parameters())
    spread_over_devices(model, {"cpu": size * 9 // 10}, tmp_path)
    prompts, sets = token_prompts(6, config), ablations_of(config)
    here, there = (measure_effects(m, prompts, sets, []) for m in (whole, model))
    margins(model).entropy.assert_close(there.own, here.own)
    tables = [rho_by_layer(m, measures_of(m)) for m in (whole, model)]
    pd.testing.assert_frame_equal(*tables)


# --- tables -------------------------------------------------------------------------------------------


def test_changes_are_before_less_after() -> None:
    found = Effects(
        plain=np.asarray([1.0, 5.0, 2.0]),
        own=np.asarray([[[0.5, 1.0, 0.0]], [[9.0, 9.0, 9.0]], [[1.0, 2.0, 2.0]]]),
        sampled=np.asarray([0, 2]),
        others=np.asarray([[[1.0, 1.0, 1.0]], [[3.0, 2.0, 1.0]]]),
    )
    table = set_effects(found, {"mean_ablation": ["entropy", "control_000"]})
    assert table.to_dict("list") == {
        "ablation_value": ["mean_ablation"] * 2,
        "set": ["entropy", "control_000"],
        "total": [0.75, -0.5],
        "direct": [0.0, 0.0],
        "norm_only": [0.5, 0.5],
        "prompts": [2, 2],
    }


def test_every_value_has_its_own_sets_changes() -> None:
    """Of several ablation values, whose sets are read one after the other."""
    values = {
        "mean_ablation": ["entropy", "control_000", "control_001", "matched_000"],
        "mode_ablation": ["entropy", "control_000", "control_001", "matched_000"],
        "median_ablation": ["entropy", "control_000"],
    }
    random = np.random.default_rng(0)
    found = Effects(
        plain=random.random(5),
        own=random.random((5, 3, 3)),
        sampled=np.asarray([0, 2, 4]),
        others=random.random((3, 7, 3)),
    )
    table, other = set_effects(found, values), 0
    assert [*zip(table["ablation_value"], table["set"], strict=True)] == [
        (value, name) for value, names in values.items() for name in names
    ]
    for row in table.to_dict("records"):
        if row["set"] == "entropy":
            after = found.own[found.sampled, [*values].index(row["ablation_value"])]
        else:
            after, other = found.others[:, other], other + 1
        wanted = (found.plain[found.sampled, None] - after).mean(0)
        assert [row[name] for name in ("total", "direct", "norm_only")] == pytest.approx(wanted)


@given(n=st.integers(1, 60), most=st.integers(1, 60))
@settings(deadline=None)
def test_evenly_spaced_numbers(n: int, most: int) -> None:
    chosen = evenly_spaced(n, most).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(n, most)
    assert chosen[0] == 0
    assert most == 1 or chosen[-1] == n - 1
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


# --- rho by layer -------------------------------------------------------------------------------------


def measures_of(model: LoadedModel) -> NeuronMeasures:
    return measure(model.W_U, model.W_out, model.final_norm, 5)


@each_toy
def test_rho_of_every_layer_is_the_definition(config: ToyConfig) -> None:
    model = loaded(config)
    measures = measures_of(model)
    table = rho_by_layer(model, measures)
    assert table.columns.tolist() == ["layer", "neuron_idx", "rho"]
    assert len(table) == config.n_layers * config.d_mlp
    W_U = processed_W_U(model.W_U, model.final_norm).double()
    V0 = torch.linalg.svd(W_U)[0][:, -5:]
    state = dict(model.body.named_parameters())
    for layer in range(config.n_layers):
        # Read off the plain transformers model, not through the bridge.
        last = next(n for n, p in state.items() if p is model.mlp_out.weight)
        name = last.replace(f".{config.n_layers - 1}.", f".{layer}.", 1)
        if name == last and layer != config.n_layers - 1:
            name = last.replace(f"{config.n_layers - 1}", f"{layer}", 1)
        weight = state[name].detach()
        weight = weight if config.family == "gpt2" else weight.T
        W_out = processed_W_out(weight, model.final_norm).double()
        wanted = (W_out @ V0).norm(dim=1) / W_out.norm(dim=1)
        got = table.loc[table["layer"] == layer, "rho"].to_numpy()
        MEASURE.of("rho").assert_close(got, wanted.numpy(), what=f"layer {layer}")
    last_rho = table.loc[table["layer"] == config.n_layers - 1, "rho"].to_numpy()
    assert np.array_equal(last_rho, measures.rho)
    assert measures.null_space is not None
    again = rho(model.W_out, model.final_norm, measures.null_space)
    MEASURE.of("rho").assert_close(again, measures.rho)


def test_a_layer_without_one_output_matrix_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(FAMILIES[0])
    whole = LoadedModel.output_weights

    def experts(self: LoadedModel, layer: int) -> Tensor:
        if layer == 0:
            raise AttributeError("out")
        return whole(self, layer)

    monkeypatch.setattr(LoadedModel, "output_weights", experts)
    table = beyond_paper.rho_by_layer(model, measures_of(model))
    assert table["layer"].unique().tolist() == [1]


def test_a_neuron_without_output_weight_has_no_rho() -> None:
    model = loaded(FAMILIES[0])
    measures = measures_of(model)
    assert measures.null_space is not None
    W_out = model.W_out.clone()
    W_out[3] = 0
    found = rho(W_out, model.final_norm, measures.null_space)
    assert np.isnan(found[3])
    assert np.isfinite(np.delete(found, 3)).all()
