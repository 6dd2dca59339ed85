import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.strategies import (
    activation_matrices,
    chunkings,
    neuron_sets,
    object_names,
    ragged_prompts,
    sources,
    toy_configs,
)
from tests.toys import FAMILIES, GROUPED, ToyConfig, save_toy, token_prompts, toy_folder, word_prompts

each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)
SPLITTER = re.compile(r'"|\.|\n|\\n|,|\(|\[|\]|<')


def bridge(config: ToyConfig) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(toy_folder(config)), device="cpu")


def tokenizer(config: ToyConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(toy_folder(config))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def first_tokens(model: Any, prompts: list[list[int]], hooks: list[Any]) -> list[int]:
    tokens = []
    with torch.inference_mode(), model.hooks(hooks):
        for prompt in prompts:  # one at a time: no pads, nothing for the library to guess
            row = torch.tensor([prompt])
            logits = model(row, attention_mask=torch.ones_like(row), return_type="logits")
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


@each_toy
def test_a_toy_loads_offline_and_its_greedy_tokens_depend_on_the_prompt(config: ToyConfig) -> None:
    model = bridge(config)
    sizes = (model.cfg.n_layers, model.cfg.d_model, model.cfg.d_mlp, model.cfg.d_vocab)
    assert sizes == (config.n_layers, config.d_model, config.d_mlp, config.d_vocab)
    prompts = token_prompts(50, config, seed=1)
    plain = first_tokens(model, prompts, hooks=[])
    assert len(set(plain)) > 5, plain
    assert sum(token == prompt[-1] for token, prompt in zip(plain, prompts, strict=True)) < 10

    widths = set()

    def silence_half(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        widths.add(activation.shape[-1])
        activation[..., ::2] = 0.0
        return activation

    last = f"blocks.{config.n_layers - 1}.mlp.hook_post"
    ablated = first_tokens(model, prompts, hooks=[(last, silence_half)])
    assert widths == {config.d_mlp}
    flips = sum(a != b for a, b in zip(plain, ablated, strict=True))
    assert 3 <= flips < 50, f"{flips} of 50 first tokens change under ablation"


def test_ids_and_families_cover_the_models() -> None:
    assert len({config.id for config in FAMILIES}) == len(FAMILIES)
    own_forms = [config.family for config in FAMILIES[:5]]
    assert own_forms == ["gpt2", "neox", "phi", "mistral", "llama"]


@each_toy
def test_a_checkpoint_has_the_wiring_of_its_family(config: ToyConfig) -> None:
    names = weights(toy_folder(config))
    written = json.loads((toy_folder(config) / "config.json").read_text())
    unembedding = {"lm_head.weight", "embed_out.weight"} & set(names)
    assert bool(unembedding) != config.tied
    assert ("lm_head.bias" in names) == (config.family == "phi")
    final_norm_bias = {name for name in names if re.search(r"(ln_f|final_layer_?norm)\.bias", name)}
    assert bool(final_norm_bias) == (config.family not in GROUPED)
    if config.family in GROUPED:
        assert written["num_key_value_heads"] == config.n_kv_heads
        assert names["model.layers.0.mlp.gate_proj.weight"].shape == (config.d_mlp, config.d_model)
    if config.family == "neox":
        assert written["use_parallel_residual"] is config.parallel
    for name, tensor in names.items():
        assert tensor.dtype == torch.float32, name
        assert tensor.std() > 0.05, f"{name} was left as it was initialised"


@each_toy
def test_the_seed_alone_fixes_the_weights(config: ToyConfig, tmp_path: Path) -> None:
    torch.manual_seed(12345)  # another global state must not matter, nor be moved
    before = torch.get_rng_state()
    again = weights(save_toy(config, tmp_path / "again"))
    other = weights(save_toy(replace(config, seed=7), tmp_path / "other"))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in weights(toy_folder(config)).items():
        assert torch.equal(tensor, again[name]), name
        assert not torch.equal(tensor, other[name]), name


def test_a_folder_is_written_once() -> None:
    assert toy_folder(ToyConfig("phi")) == toy_folder(ToyConfig("phi", parallel=True))
    assert toy_folder(ToyConfig("phi")) != toy_folder(ToyConfig("phi", seed=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"family": "bert"}, "family='bert', allowed"),
        ({"family": "gpt2", "d_model": 30}, "d_model=30"),
        ({"family": "llama", "n_kv_heads": 3}, "n_heads=4"),
        ({"family": "neox", "n_kv_heads": 2}, "neox has no grouped-query"),
        ({"family": "phi", "tied": True}, "phi is never tied"),
        ({"family": "gpt2", "parallel": True}, "parallel=True"),
        ({"family": "phi", "parallel": False}, "parallel=False"),
        ({"family": "mistral", "d_vocab": 300}, "d_vocab=300"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wiring_no_family_has_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ToyConfig(**wrong)


@each_toy
def test_text_survives_the_tokenizer(config: ToyConfig) -> None:
    own = tokenizer(config)
    for text in ("Paris is the capital of São Łódź.", "東京 😀", 'two  spaces, "a" (b)\n1944'):
        ids = own.encode(text, add_special_tokens=False)
        assert own.decode(ids) == text
        assert max(ids) < len(own) < config.d_vocab
    assert own.decode([config.d_vocab - 1]) == ""


@each_toy
def test_only_mistral_and_llama_add_bos_on_encode(config: ToyConfig) -> None:
    own = tokenizer(config)
    assert (own.bos_token_id, own.eos_token_id) == (config.bos_id, config.eos_id)
    bare = own.encode("Rome is", add_special_tokens=False)
    added = [config.bos_id] if config.family in GROUPED else []
    assert config.bos_id not in bare
    assert own.encode("Rome is") == [*added, *bare]


@each_toy
def test_a_known_word_is_one_token_and_another_where_a_space_is_in_front(config: ToyConfig) -> None:
    encode = partial(tokenizer(config).encode, add_special_tokens=False)
    assert len(encode("in the capital")) < len("in the capital") / 2
    assert encode("of the")[-1] != encode("ofthe")[-1]


def test_prompts_are_ragged_and_reproducible() -> None:
    config = ToyConfig("llama")
    prompts = token_prompts(40, config, seed=3, min_len=1, max_len=9)
    assert {len(prompt) for prompt in prompts} == set(range(1, 10))
    assert all(prompt[0] == config.bos_id for prompt in prompts)
    assert all(2 < token < config.d_vocab for prompt in prompts for token in prompt[1:])
    assert prompts == token_prompts(40, config, seed=3, min_len=1, max_len=9)
    assert prompts != token_prompts(40, config, seed=4, min_len=1, max_len=9)
    texts = word_prompts(40, seed=3)
    assert texts == word_prompts(40, seed=3) != word_prompts(40, seed=4)
    assert len({len(text.split()) for text in texts}) > 5


@settings(max_examples=10, deadline=None)
@given(config=toy_configs(max_layers=2))
def test_any_drawn_toy_runs(config: ToyConfig) -> None:
    assert config.d_model // config.n_heads % 2 == 0
    (token,) = first_tokens(bridge(config), token_prompts(1, config, min_len=5), hooks=[])
    assert 0 <= token < config.d_vocab


@given(data=st.data(), n=st.integers(0, 30))
def test_chunks_hold_every_row_once_in_order(data: st.DataObject, n: int) -> None:
    chunks = data.draw(chunkings(n), label="chunks")
    assert [row for chunk in chunks for row in range(n)[chunk]] == list(range(n))
    assert all(range(n)[chunk] for chunk in chunks)


@given(activation_matrices())
def test_activations_are_finite_float32_matrices(activations: np.ndarray) -> None:
    assert activations.dtype == np.float32
    assert activations.ndim == 2
    assert np.isfinite(activations).all()
    assert np.abs(activations).max() <= 1e5


@given(neurons=neuron_sets(12, min_size=1, max_size=5), prompts=ragged_prompts(300), run=sources())
def test_drawn_sets_prompts_and_sources_keep_their_bounds(
    neurons: tuple[int, ...], prompts: list[list[int]], run: list[str]
) -> None:
    assert 1 <= len(set(neurons)) == len(neurons) <= 5
    assert set(neurons) <= set(range(12))
    assert all(1 <= len(prompt) <= 20 for prompt in prompts)
    assert all(0 <= token < 300 for prompt in prompts for token in prompt)
    assert set(run) <= {"CK", "PK", "ND"}


@given(object_names())
def test_the_splitter_leaves_an_object_whole(name: str) -> None:
    assert SPLITTER.split(name) == [name.strip()]
    assert " ".join(name.split()) == name != ""
