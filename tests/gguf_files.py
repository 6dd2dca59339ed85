"""Toys as GGUF files, written as llama.cpp writes the models that they are small versions of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import load_file

from tests.toys import GROUPED, Family, ToyConfig, build_tokenizer, toy_folder

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # types of tokens

GROUPED_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}
GPT2_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "transformer.h": "blk",
}


@dataclass(frozen=True)
class GgufToy:
    """A toy and the tokenizer of its file: a Llama may split text as GPT-2 does, as SmolLM2 does."""

    config: ToyConfig
    words: Family

    @property
    def id(self) -> str:
        return f"{self.config.id}-{'bytes' if self.words == 'gpt2' else 'pieces'}"


# Widths of whole blocks of 32; for GPT-2, d_mlp has to be 4 d_model, which the file does not say.
TOYS = (
    GgufToy(ToyConfig("llama", d_mlp=64, tied=True), "gpt2"),
    GgufToy(ToyConfig("mistral", d_mlp=64), "mistral"),
    GgufToy(ToyConfig("gpt2", d_mlp=128), "gpt2"),
    GgufToy(ToyConfig("gpt2", d_mlp=128, tied=False), "gpt2"),
)
LLAMA = TOYS[0]


def write_gguf(
    toy: GgufToy,
    path: Path,
    kind: str = "F32",
    *,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a toy's file.

    Args:
        toy: Which.
        path: Where.
        kind: Type of its matrices; vectors are always F32.
        fields: What it says otherwise; None leaves a field out.
        tensors: What it holds otherwise, or besides.
    """
    said = {**_sizes(toy.config), **_words(toy), **(fields or {})}
    writer = GGUFWriter(path, said.pop("general.architecture"))
    for name, value in said.items():
        _add(writer, name, value)
    for name, tensor in {**_tensors(toy.config), **(tensors or {})}.items():
        type_ = GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        writer.add_tensor(name, quantize(tensor, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif value is not None:
        writer.add_uint32(name, value)


def _sizes(config: ToyConfig) -> dict[str, Any]:
    kind = "gpt2" if config.family == "gpt2" else "llama"
    sizes: dict[str, Any] = {
        "context_length": config.n_ctx,
        "block_count": config.n_layers,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_mlp,
        "attention.head_count": config.n_heads,
    }
    if kind == "gpt2":
        sizes["attention.layer_norm_epsilon"] = 1e-5
    else:
        sizes |= {"attention.head_count_kv": config.n_kv_heads, "vocab_size": config.d_vocab}
        sizes |= {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0}
        sizes["rope.dimension_count"] = config.d_model // config.n_heads
    # Mistral is a Llama to llama.cpp.
    named = {"general.architecture": kind, "general.name": f"Toy {config.family}"}
    return {**named, **{f"{kind}.{name}": value for name, value in sizes.items()}}


def _words(toy: GgufToy) -> dict[str, Any]:
    tokenizer = build_tokenizer(toy.words)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    pieces = toy.words in GROUPED
    types = [
        (UNKNOWN if t == "<unk>" else CONTROL)
        if t in special
        else (BYTE if pieces and t.startswith("<0x") else NORMAL)
        for t in tokens
    ]
    if toy.config.family == "gpt2":  # whose file says by them how many there are
        spare = range(len(tokens), toy.config.d_vocab)
        tokens, types = [*tokens, *(f"[PAD{i}]" for i in spare)], [*types, *(UNUSED for _ in spare)]
    found: dict[str, Any] = {
        "model": "llama" if pieces else "gpt2",
        "pre": "default" if pieces else "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 1 if pieces else 0,
        "eos_token_id": 2 if pieces else 0,
    }
    if pieces:
        found |= {"scores": [-float(i) for i in range(len(tokens))], "unknown_token_id": 0}
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}


def _tensors(config: ToyConfig) -> dict[str, np.ndarray]:
    """The toy's weights by llama.cpp's names and in its layout."""
    names = GPT2_NAMES if config.family == "gpt2" else GROUPED_NAMES
    found = {}
    for name, tensor in load_file(toy_folder(config) / "model.safetensors").items():
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        if config.family == "gpt2" and name.startswith("blk.") and tensor.ndim == 2:
            tensor = tensor.T  # stored [in, out]
        heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
        if config.family != "gpt2" and (kind := name.split(".")[-2]) in heads:
            tensor = interleaved(tensor, heads[kind])
        found[name] = np.ascontiguousarray(tensor)
    return found


def interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of queries or keys, from rotated halves beside each other to pairs (llama.cpp's order)."""
    half = weight.shape[0] // n_heads // 2
    order = [
        h * 2 * half + i + part * half for h in range(n_heads) for i in range(half) for part in (0, 1)
    ]
    return weight[order]


def halves(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo `interleaved`."""
    half = weight.shape[0] // n_heads // 2
    order = [
        h * 2 * half + 2 * i + part for h in range(n_heads) for part in (0, 1) for i in range(half)
    ]
    return weight[order]
