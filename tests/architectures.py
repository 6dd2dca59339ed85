"""Tiny random checkpoints of families beyond the paper's five, with what is to be said of each.

Widths differ from one another and from their usual multiples, so that one taken for another is seen.
"""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.toys import BYTE_LEVEL_BOS, build_tokenizer

D_MODEL, D_MLP, D_VOCAB, N_LAYERS = 32, 48, 320, 2
TOKENS = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
COMMON = {
    **TOKENS,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT = {
    **TOKENS,
    "n_embd": D_MODEL,
    "n_layer": N_LAYERS,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": D_MLP,
}
FALCON = {
    **TOKENS,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "ffn_hidden_size": D_MLP,
}
OPT = {
    **TOKENS,
    "hidden_size": D_MODEL,
    "word_embed_proj_dim": D_MODEL,
    "ffn_dim": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
BART = {
    **TOKENS,
    "d_model": D_MODEL,
    **{
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", N_LAYERS), ("attention_heads", 4), ("ffn_dim", D_MLP))
    },
}
DELTA = {
    f"linear_{what}": n
    for what, n in (
        ("key_head_dim", 8),
        ("value_head_dim", 8),
        ("num_key_heads", 2),
        ("num_value_heads", 2),
    )
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SHARED = "the shared engine cannot run it"
POST_NORM = "a change of a last-layer activation does not move the final residual"
OTHER_HEAD = "its logits are not norm"
NO_MLP = "refused, it has no last MLP with one output matrix"
OTHER_NUMBERS = r"refused, decoded with the hooks .* other numbers than transformers' own .* nats"
UNKNOWN = r"TransformerLens cannot load it \(model_type '\w+'; ValueError: Could not determine"
NO_DECODER = "not a decoder-only language model that can be read"


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint, and what is to become of it."""

    name: str
    kind: str  # of its configuration class
    options: Mapping[str, Any] = field(hash=False)
    head: str = ""  # its class, where it is not the family's causal language model
    shared: str = ""  # why the shared engine cannot run it
    broken: str = ""  # which assumption of LogitVar, rho and the shared engine it breaks
    refused: str = ""  # why nothing can
    d_mlp: int = D_MLP


FAMILIES: tuple[Tiny, ...] = (
    # Exact by both engines: the paper's five, and others.
    Tiny("gpt2", "GPT2", GPT),
    Tiny("gpt-neox", "GPTNeoX", {**COMMON, "num_key_value_heads": None}),
    Tiny("phi", "Phi", {**COMMON, "num_key_value_heads": None}),
    Tiny("mistral", "Mistral", COMMON),
    Tiny("llama", "Llama", COMMON),
    Tiny("smollm3", "SmolLM3", COMMON),
    Tiny("gptj", "GPTJ", {**GPT, "rotary_dim": 4}),
    Tiny("codegen", "CodeGen", {**GPT, "rotary_dim": 4}),
    Tiny("gpt-bigcode", "GPTBigCode", GPT),
    Tiny("gpt-neo", "GPTNeo", {**TOKENS, "hidden_size": D_MODEL, "num_layers": N_LAYERS,
         "num_heads": 4, "intermediate_size": D_MLP, "max_position_embeddings": 256,
         "attention_types": [[["global", "local"], 1]], "window_size": 16}),
    Tiny("stablelm", "StableLm", COMMON),
    Tiny("olmo", "Olmo", COMMON),
    Tiny("gemma", "Gemma", {**COMMON, "head_dim": 8}),
    Tiny("phi3", "Phi3", COMMON),
    Tiny("qwen2", "Qwen2", COMMON),
    Tiny("qwen2-windows", "Qwen2", {**COMMON, "use_sliding_window": True, "sliding_window": 16,
         "max_window_layers": 1}),
    Tiny("qwen3", "Qwen3", {**COMMON, "head_dim": 8}),
    Tiny("falcon-sequential", "Falcon", {**FALCON, "parallel_attn": False, "multi_query": False}),
    # Likewise, with the last MLP at all positions.
    Tiny("opt", "OPT", OPT),
    Tiny("bloom", "Bloom", {**TOKENS, "hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4},
         d_mlp=4 * D_MODEL),
    Tiny("mpt", "Mpt", {**TOKENS, "d_model": D_MODEL, "n_heads": 4, "n_layers": N_LAYERS,
         "max_seq_len": 256, "expansion_ratio": 2}, d_mlp=4 * D_MODEL),
    Tiny("falcon-parallel", "Falcon", FALCON),
    Tiny("xglm", "XGLM", {**TOKENS, "d_model": D_MODEL, "ffn_dim": D_MLP, "num_layers": N_LAYERS,
         "attention_heads": 4, "max_position_embeddings": 256}),
    # Exact under hooks only.
    Tiny("qwen3.5", "Qwen3_5Text", {**COMMON, **HYBRID, **DELTA, "head_dim": 8},
         shared="ValueError: Cannot get conv state"),
    Tiny("lfm2", "Lfm2", {**COMMON, "layer_types": ["conv", "full_attention"]},
         shared="ValueError: Cannot get conv state", d_mlp=256),  # it adjusts what it is told
    Tiny("jamba", "Jamba", {**COMMON, "num_experts": 1, "mamba_d_state": 4, "attn_layer_period": 2,
         "use_mamba_kernels": False, "attn_layer_offset": 1}, shared="ValueError: Cannot get conv"),
    Tiny("falcon-h1", "FalconH1", {**COMMON, "mamba_d_ssm": 32, "mamba_n_heads": 4,
         "mamba_d_head": 8, "mamba_d_state": 4, "head_dim": 8}, shared="ValueError: Cannot get conv"),
    # The hooks are wrong.
    Tiny("falcon-alibi", "Falcon", {**FALCON, "alibi": True}, refused=OTHER_NUMBERS),
    Tiny("falcon-alibi-sequential", "Falcon", {**FALCON, "alibi": True, "parallel_attn": False,
         "multi_query": False}, refused=OTHER_NUMBERS),
    # Another last layer: exact under hooks only, and not to be measured.
    Tiny("olmo2", "Olmo2", COMMON, broken=POST_NORM),
    Tiny("gemma2", "Gemma2", {**COMMON, "head_dim": 8}, broken=POST_NORM),
    Tiny("gemma3", "Gemma3Text", {**COMMON, "head_dim": 8, "sliding_window": 16}, broken=POST_NORM),
    Tiny("cohere", "Cohere", COMMON, broken=OTHER_HEAD),
    Tiny("cohere2", "Cohere2", {**COMMON, "sliding_window": 16}, broken=OTHER_HEAD),
    Tiny("granite", "Granite", {**COMMON, "logits_scaling": 3.0}, broken=OTHER_HEAD),
    # No last MLP to ablate.
    Tiny("mixtral", "Mixtral", {**COMMON, "num_local_experts": 2}, refused=NO_MLP),
    Tiny("qwen2-moe", "Qwen2Moe", {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 16},
         refused=NO_MLP),
    Tiny("mamba", "Mamba", {**TOKENS, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS,
         "state_size": 4}, refused=NO_MLP),
    Tiny("opt-post-norm", "OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
         refused=NO_MLP),
    # What TransformerLens, or a decoder, is not.
    Tiny("falcon-new", "Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
         refused=r"cannot load it \(model_type 'falcon'; RuntimeError"),
    Tiny("gemma3n", "Gemma3nText", {**COMMON, "head_dim": 8, "intermediate_size": [64, D_MLP],
         "vocab_size_per_layer_input": D_VOCAB, "laurel_rank": 8, "hidden_size_per_layer_input": 8,
         "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]}, refused=UNKNOWN),
    Tiny("biogpt", "BioGpt", COMMON, refused=UNKNOWN),
    Tiny("xlnet", "XLNet", {**TOKENS, "d_model": D_MODEL, "n_layer": N_LAYERS, "n_head": 4,
         "d_inner": D_MLP}, head="XLNetLMHeadModel", refused=UNKNOWN),
    Tiny("bert", "Bert", COMMON, head="BertForMaskedLM", refused="refused, it is no decoder"),
    Tiny("t5", "T5", {**TOKENS, "d_model": D_MODEL, "d_kv": 8, "d_ff": D_MLP,
         "num_layers": N_LAYERS, "num_heads": 4}, head="T5ForConditionalGeneration",
         refused=NO_DECODER),
    Tiny("bart", "Bart", BART, head="BartForConditionalGeneration",
         refused=r"ValueError: no weights for lm_head\.weight"),
)  # fmt: skip


def save(tiny: Tiny, folder: Path) -> Path:
    """Write a tiny checkpoint and its tokenizer; the global random state stays as it was."""
    import transformers

    config = getattr(transformers, f"{tiny.kind}Config")(**tiny.options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config
        model = getattr(transformers, tiny.head)(config) if tiny.head else made(config)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data.copy_((1.0 if parameter.ndim == 1 else 0.0) + 0.4 * noise)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer("gpt2"), bos_token=BYTE_LEVEL_BOS, eos_token=BYTE_LEVEL_BOS
    ).save_pretrained(folder)
    return folder


@functools.cache
def tiny_folder(tiny: Tiny) -> Path:
    """The checkpoint, written once per process and removed at its exit; read-only."""
    root = Path(tempfile.mkdtemp(prefix="ccm-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return save(tiny, root / tiny.name)
