"""Identities of the hooked path on every family, and the same result without cache, batch or bridge."""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccm.decoding import hooked
from ccm.decoding.results import Completions
from ccm.method.ablation import PLAIN, Ablation, plan
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.statistics import ActivationStatistics
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import MAX_NEW_TOKENS, spec_for
from tests.exact import clear, down_projection, margins, plain_transformers
from tests.strategies import neuron_sets, ragged_prompts, toy_configs
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)
few = settings(max_examples=12, deadline=None)
SMALL = ToyConfig("gpt2")


@functools.cache
def loaded(config: ToyConfig) -> LoadedModel:
    """The toy, loaded once; read-only."""
    return load(spec_for(str(toy_folder(config))))


def draw_prompts(config: ToyConfig) -> st.SearchStrategy[list[list[int]]]:
    """Few lengths, so that prompts do share batches; any id, special ones in any place too."""
    return ragged_prompts(config.d_vocab, max_len=4)


def an_ablation(config: ToyConfig, n: int = 8, value: float = 1.5) -> Ablation:
    neurons = tuple(range(0, config.d_mlp, max(1, config.d_mlp // n)))
    return Ablation("some", neurons, tuple(value * (-1) ** i for i in neurons))


def draw_ablation(data: st.DataObject, d_mlp: int) -> Ablation:
    """Not a strategy: the type checker samples items with `random`, which strategies must not."""
    neurons = tuple(sorted(data.draw(neuron_sets(d_mlp, max_size=12), label="neurons")))
    values = [data.draw(st.floats(-3, 3, width=32), label=f"value of {i}") for i in neurons]
    return Ablation("drawn", neurons, tuple(values))


def assert_same_bits(a: Completions, b: Completions) -> None:
    assert a.tokens == b.tokens
    assert a.texts == b.texts
    for name in ("entropy", "log_probs", "top_tokens", "top_log_probs"):
        left, right = getattr(a.first, name), getattr(b.first, name)
        np.testing.assert_array_equal(left, right, strict=True, err_msg=name)


# --- the plainly independent path: transformers alone, one prompt, in float64, the whole text each step


@dataclass(frozen=True)
class Naive:
    """What the independent path gives for one prompt."""

    tokens: list[int]
    ended: bool  # at EOS, rather than after the last allowed token
    entropy: float
    log_probs: np.ndarray  # of the whole vocabulary, at the last prompt position
    activations: torch.Tensor  # before ablation, of every position that was ever read


@contextmanager
def replaced(module: torch.nn.Module, ablation: Ablation, seen: list[torch.Tensor]) -> Iterator[None]:
    def hook(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = inputs[0].clone()
        seen.append(x[0].clone())
        for neuron, value in zip(ablation.neurons, ablation.values, strict=True):
            x[..., neuron] = value
        return (x,)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def naive(config: ToyConfig, prompt: list[int], ablation: Ablation, steps: int = 10) -> Naive:
    model, tokens = plain_transformers(str(toy_folder(config)), torch.float64), list(prompt)
    seen: list[torch.Tensor] = []
    first, ended = np.zeros(0), False
    with torch.inference_mode(), replaced(down_projection(model), ablation, seen):
        for step in range(steps):
            row = torch.tensor([tokens])
            logits = model(row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, -1]
            logits = logits.double().numpy()
            if step == 0:
                first = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            token = int(logits.argmax())
            ended = token == config.eos_id
            if ended:
                break
            tokens.append(token)
    return Naive(
        tokens=tokens[len(prompt) :],
        ended=ended,
        entropy=float(-(np.exp(first) * first).sum()),
        log_probs=first,
        activations=seen[-1],
    )


def check_against_naive(config: ToyConfig, prompts: list[list[int]], ablation: Ablation) -> None:
    targets = torch.tensor([[(7 * i) % config.d_vocab, i] for i in range(len(prompts))])
    model = loaded(config)
    done = hooked.decode(model, prompts, ablation, targets=targets)
    for i, prompt in enumerate(prompts):
        wanted = naive(config, prompt, ablation)
        what = f"{config.id}, prompt {prompt}, neurons {ablation.neurons}"
        within = margins(model)
        within.entropy.assert_close(done.first.entropy[i], wanted.entropy, what=what)
        within.log_prob.assert_close(
            done.first.log_probs[i], wanted.log_probs[targets[i].numpy()], what=what
        )
        top = np.argsort(-wanted.log_probs, kind="stable")[:4]
        within.log_prob.assert_close(done.first.top_log_probs[i], wanted.log_probs[top[:3]], what=what)
        if clear(model, [prompt], [ablation]):
            assert done.tokens[i] == tuple(wanted.tokens), what
        if np.diff(-wanted.log_probs[top]).min() > within.lead:
            np.testing.assert_array_equal(done.first.top_tokens[i], top[:3], err_msg=what)


@each_toy
def test_agrees_with_transformers_without_cache(config: ToyConfig) -> None:
    prompts, sets = token_prompts(8, config, seed=3), (PLAIN, an_ablation(config))
    assert len(clear(loaded(config), prompts, sets)) > 4, "hardly a choice is clear"
    for ablation in sets:
        check_against_naive(config, prompts, ablation)


@given(st.data())
@few
def test_agrees_with_transformers_on_any_toy(data: st.DataObject) -> None:
    config = data.draw(toy_configs(max_layers=2), label="toy")
    prompts = data.draw(ragged_prompts(config.d_vocab, max_len=12, max_prompts=3), label="prompts")
    check_against_naive(config, prompts, draw_ablation(data, config.d_mlp))


# --- identities -----------------------------------------------------------------------------------


@each_toy
def test_an_empty_set_changes_nothing(config: ToyConfig) -> None:
    model, prompts = loaded(config), token_prompts(6, config)
    plain = hooked.decode(model, prompts)
    empty = Ablation("empty", (), ())
    assert_same_bits(plain, hooked.decode(model, prompts, empty))
    rows: list[torch.Tensor] = []
    assert_same_bits(plain, hooked.decode(model, prompts, empty, observe=rows.append))
    assert rows


@each_toy
def test_neurons_held_at_their_own_activation_change_nothing(config: ToyConfig) -> None:
    model = loaded(config)
    for prompt in clear(model, token_prompts(4, config, seed=5)):
        rows: list[torch.Tensor] = []
        plain = hooked.decode(model, [prompt], max_new_tokens=1, observe=rows.append)
        own = rows[-1][-1].tolist()
        # Other positions are held at the wrong value, which the last one cannot see: the last MLP
        # writes where no later position reads.
        held = Ablation("own", tuple(range(config.d_mlp)), tuple(own))
        again = hooked.decode(model, [prompt], held, max_new_tokens=1)
        assert again.tokens == plain.tokens
        margins(model).entropy.assert_close(again.first.entropy, plain.first.entropy, what=config.id)
        off = replace(held, values=tuple(2.0 * (-1) ** i - value for i, value in enumerate(own)))
        moved = hooked.decode(model, [prompt], off, max_new_tokens=1).first.entropy
        least = 10 * margins(model).entropy.atol
        assert abs(moved - plain.first.entropy)[0] > least, "the ablation has no effect to cancel"


@given(st.data())
@few
def test_order_and_duplicates_of_neurons_do_not_matter(data: st.DataObject) -> None:
    d_mlp = SMALL.d_mlp
    neurons = data.draw(neuron_sets(d_mlp, min_size=1, max_size=8), label="neurons")
    again = data.draw(st.lists(st.sampled_from(neurons), max_size=5), label="again")
    shuffled = data.draw(st.permutations([*neurons, *again]), label="shuffled")
    ramp = np.arange(d_mlp) / 16 - 1.0  # of few bits, as replacement values are
    statistics = ActivationStatistics(ramp, ramp * 0 + 1, ramp, ramp, ramp - 1, ramp + 1)
    value = ABLATION_VALUES["mean_ablation"]
    a = plan("a", neurons, value, statistics)
    b = plan("a", shuffled, value, statistics)
    assert a == b
    assert dict(zip(a.neurons, a.values, strict=True)) == {i: ramp[i] for i in neurons}
    prompts = token_prompts(2, SMALL)
    turned = Ablation("turned", a.neurons[::-1], a.values[::-1])
    done = hooked.decode(loaded(SMALL), prompts, a, max_new_tokens=3)
    assert_same_bits(done, hooked.decode(loaded(SMALL), prompts, turned, max_new_tokens=3))


def fingerprint(model: LoadedModel) -> tuple[str, list[str], dict[str, int]]:
    """Hash of the weights, bridge hooks that are set, and how many hooks torch modules hold."""
    digest = hashlib.sha256()
    for name, tensor in model.bridge.original_model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    points = model.bridge.hook_dict.items()
    set_hooks = [name for name, point in points if point.fwd_hooks or point.bwd_hooks]
    held = {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.bridge.named_modules()
    }
    return digest.hexdigest(), set_hooks, held


@each_toy
def test_weights_and_hooks_are_as_before(config: ToyConfig) -> None:
    model, prompts = loaded(config), token_prompts(5, config)
    before = fingerprint(model)
    assert before[1] == []
    hooked.decode(model, prompts, an_ablation(config), observe=lambda rows: None)
    assert fingerprint(model) == before

    def fail(rows: torch.Tensor) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        hooked.decode(model, prompts, an_ablation(config), observe=fail)
    assert fingerprint(model) == before, "a run that failed left its hooks behind"


@pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
@given(data=st.data())
@few
def test_a_result_does_not_depend_on_the_batch(config: ToyConfig, data: st.DataObject) -> None:
    model = loaded(config)
    prompts = data.draw(draw_prompts(config), label="prompts")
    order = data.draw(st.permutations(range(len(prompts))), label="order")
    batch_size = data.draw(st.integers(1, 4), label="batch size")
    ablation = an_ablation(config) if data.draw(st.booleans(), label="ablate") else PLAIN
    targets = torch.arange(2 * len(prompts)).reshape(-1, 2) % config.d_vocab
    shuffled = hooked.decode(
        model,
        [prompts[i] for i in order],
        ablation,
        targets=targets[list(order)],
        batch_size=batch_size,
    )
    within = margins(model)
    for row, i in enumerate(order):
        alone = hooked.decode(model, [prompts[i]], ablation, targets=targets[i : i + 1])
        if clear(model, [prompts[i]], [ablation]):
            assert shuffled.tokens[row] == alone.tokens[0], f"prompt {prompts[i]}"
            assert shuffled.texts[row] == alone.texts[0]
        within.entropy.assert_close(shuffled.first.entropy[row], alone.first.entropy[0])
        within.log_prob.assert_close(shuffled.first.log_probs[row], alone.first.log_probs[0])
        within.log_prob.assert_close(shuffled.first.top_log_probs[row], alone.first.top_log_probs[0])


# --- where decoding stops ---------------------------------------------------------------------------


@each_toy
def test_decoding_stops_at_any_eos_and_the_eos_is_in_no_text(config: ToyConfig) -> None:
    model, prompts = loaded(config), token_prompts(24, config, seed=9)
    endless = hooked.decode(replace(model, eos=frozenset()), prompts)
    assert {len(tokens) for tokens in endless.tokens} == {MAX_NEW_TOKENS}
    third = {tokens[2] for tokens in endless.tokens[:8]}
    for eos in (model.eos, frozenset(third), model.eos | third):
        done = hooked.decode(replace(model, eos=eos), prompts)
        for tokens, text, whole in zip(done.tokens, done.texts, endless.tokens, strict=True):
            end = next((i for i, token in enumerate(whole) if token in eos), len(whole))
            assert tokens == whole[:end], f"{config.id}: {whole} cut at {eos}"
            assert text == model.decode(whole[:end])
        if eos != model.eos:  # one toy, Phi's, never ends by itself here
            assert min(map(len, done.tokens)) < MAX_NEW_TOKENS, "no prompt ended: nothing was tested"
        if eos == model.eos:
            specials = model.tokenizer.all_special_tokens
            assert not [t for t in done.texts if any(special in t for special in specials)]


@given(prompts=draw_prompts(SMALL), steps=st.integers(1, MAX_NEW_TOKENS))
@few
def test_fewer_new_tokens_are_a_prefix(prompts: list[list[int]], steps: int) -> None:
    full = hooked.decode(loaded(SMALL), prompts)
    part = hooked.decode(loaded(SMALL), prompts, max_new_tokens=steps)
    assert part.tokens == tuple(tokens[:steps] for tokens in full.tokens)
    np.testing.assert_array_equal(part.first.entropy, full.first.entropy)


def test_ten_new_tokens_are_the_papers() -> None:
    assert MAX_NEW_TOKENS == 10


@each_toy
def test_every_position_is_held_and_nothing_else_is_touched(config: ToyConfig) -> None:
    """What a later position holds is seen in no text, so the hook itself is asked."""
    model, ablation = loaded(config), an_ablation(config)
    seen: list[torch.Tensor] = []
    live = torch.tensor([True, False])
    hook = hooked._hook(model, ablation, seen.append, live)
    given = torch.randn((2, 3, config.d_mlp), generator=torch.Generator().manual_seed(0))
    before = given.clone()
    held = hook(given, hook=None)
    assert torch.equal(given, before), "changed in place"
    assert torch.equal(seen[0], before[0]), "not what it was before ablation, of the live row alone"
    others = [i for i in range(config.d_mlp) if i not in ablation.neurons]
    assert torch.equal(held[..., others], before[..., others])
    values = torch.tensor(ablation.values)
    assert torch.equal(held[..., list(ablation.neurons)], values.expand(2, 3, -1))


# --- the observer -----------------------------------------------------------------------------------


def fed_back(wanted: Naive) -> int:
    """A prompt that ended had its every token read; otherwise the last one never is."""
    return len(wanted.tokens) if wanted.ended else MAX_NEW_TOKENS - 1


@each_toy
def test_observer_sees_prompt_and_fed_back_positions_of_live_rows(config: ToyConfig) -> None:
    model, ablation = loaded(config), an_ablation(config)
    prompts = [prompt for n in (3, 6) for prompt in token_prompts(5, config, n, n, n)]
    prompts = clear(model, prompts, [ablation])
    assert len(prompts) > 4
    expected = [naive(config, prompt, ablation) for prompt in prompts]
    for prompt, wanted in zip(prompts, expected, strict=True):
        rows: list[torch.Tensor] = []
        hooked.decode(model, [prompt], ablation, observe=rows.append)
        seen = torch.cat(rows)
        assert len(seen) == len(prompt) + fed_back(wanted), f"{config.id}, {prompt}"
        # Before ablation: the naive path read these at the hook's input. What is chosen depends on
        # the ablation, what is seen at a given token does not.
        margins(model).a.assert_close(seen, wanted.activations[: len(seen)], what=config.id)

    together: list[torch.Tensor] = []
    hooked.decode(model, prompts, ablation, observe=together.append)
    seen = torch.cat(together)
    positions = sum(len(p) + fed_back(w) for p, w in zip(prompts, expected, strict=True))
    assert len(seen) == positions, "rows that ended, or pads, were counted"
    total = torch.cat([w.activations for w in expected]).double()
    mean = seen.double().mean(0)
    margins(model).a.assert_close(mean, total.mean(0), what=f"{config.id}: mean activation")
