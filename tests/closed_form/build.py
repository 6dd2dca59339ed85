"""Write the closed-form organism: a checkpoint whose weights are formulas, not training.

What it must answer, and why, stands in `tests.closed_form.world` (paragraphs 1 to 7 there). The
same features are written as a GPT-2 (LayerNorm, learned positions) or a Llama (RMSNorm, rotary
positions, gated MLP); both give the same truth up to the two position features.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from tests.closed_form.truth import PLANTED, ClosedFormTruth, truth
from tests.closed_form.world import (
    BASIS,
    BITS,
    BOS,
    BOS_AXIS,
    CONTEXT,
    CONTEXT_HEDGE,
    COPY,
    COPY_NORM2,
    D_MLP,
    D_MODEL,
    DOT,
    EMBED_SCALE,
    EPS,
    FACT_SCALE,
    FETCHED,
    HEDGE,
    LAST_SCALE,
    N_CTX,
    N_FEATURES,
    N_HEADS,
    NULL_1,
    NULL_2,
    OBJECTS,
    OWN,
    PARITY,
    PERIOD,
    POSITION,
    RELATIONS,
    SIGN,
    STOP,
    Architecture,
    embedding,
    fact_bits,
    fact_write,
    position,
)

D_HEAD = D_MODEL // N_HEADS
BACK = (1, 3)  # head 0 looks at the subject, head 1 at the context object
GAP = 2000.0
Matrix = Float64[np.ndarray, "_ _"]  # (features or d_model, the other)


def _moves() -> tuple[dict[int, dict[int, float]], ...]:
    """Per head: feature read at the key -> features written at the query (paragraph 3)."""
    fetch = {own: {fetched: 1.0} for own, fetched in zip(OWN, FETCHED, strict=True)}
    copy: dict[int, dict[int, float]] = {
        axis: {axis: COPY, CONTEXT: SIGN * parity} for axis, parity in zip(OBJECTS, PARITY, strict=True)
    }
    # Objects announce their period (STOP = DOT), which tells them from other words.
    copy[STOP] = {HEDGE: CONTEXT_HEDGE / DOT}
    copy[BOS_AXIS] = {NULL_1: float(np.sqrt(COPY_NORM2))}
    return fetch, copy


def _attention(architecture: Architecture) -> dict[str, Matrix]:
    """Layer 0's heads: `q`, `k`, `v` (feature, d_model) and `o` (d_model, feature)."""
    q, k, v = (np.zeros((N_FEATURES, D_MODEL)) for _ in range(3))
    o = np.zeros((D_MODEL, N_FEATURES))
    # sqrt(D_HEAD) undoes the attention's own division, EMBED_SCALE the norm's (paragraph 2).
    gap = GAP * np.sqrt(D_HEAD) * EMBED_SCALE
    for head, (back, moves) in enumerate(zip(BACK, _moves(), strict=True)):
        first = head * D_HEAD
        if architecture == "gpt2":
            turn = 2 * np.pi * back / N_CTX
            c, s = np.cos(turn), np.sin(turn)
            q[np.ix_(list(POSITION), [first, first + 1])] = gap * np.array([[c, -s], [s, c]])
            k[np.ix_(list(POSITION), [first, first + 1])] = EMBED_SCALE * np.eye(2)
        else:
            # Rotary dims j and j + D_HEAD/2 turn together, for j = 0 by 1 radian a position.
            q[POSITION[0], first] = gap * np.cos(back)
            q[POSITION[0], first + D_HEAD // 2] = -gap * np.sin(back)
            k[POSITION[0], first] = EMBED_SCALE
        for j, (read, written) in enumerate(moves.items()):
            v[read, first + j] = EMBED_SCALE
            for target, factor in written.items():
                o[first + j, target] = factor
    return {"q": q, "k": k, "v": v, "o": o}


def _fact_layer(known: ClosedFormTruth) -> tuple[Matrix, Matrix]:
    """Layer 0's MLP: read (feature, d_mlp) and write (d_mlp, feature) of neuron i for fact i."""
    read, write = np.zeros((N_FEATURES, D_MLP)), np.zeros((D_MLP, N_FEATURES))
    for i, fact in enumerate(known.facts):
        read[[*FETCHED, *BITS], i] = fact_bits(fact)
        write[i] = fact_write(fact)
    return FACT_SCALE * read, write


def _unembedding(known: ClosedFormTruth) -> tuple[Matrix, Float64[np.ndarray, "d_model"]]:
    """Stored W_U (d_vocab, d_model) and the final gain, with the traps of paragraph 7."""
    gain = np.where(np.arange(D_MODEL) % 3 == 0, 2.0, 1.0)
    W_U = BASIS @ known.unembedding + 0.5 * BASIS[:, [NULL_2]]
    if known.architecture == "gpt2":
        W_U = W_U + np.linspace(-1, 1, len(known.words))
    return (W_U / gain[:, None]).T, gain


def _gpt2(known: ClosedFormTruth) -> dict[str, Any]:
    heads, (read, write), back = _attention("gpt2"), _fact_layer(known), BASIS.T
    W_U, gain = _unembedding(known)
    last = known.write @ back + np.linspace(-0.5, 0.5, D_MLP)[:, None] * known.norm[:, None]
    state: dict[str, Any] = {
        "transformer.wte.weight": np.stack([embedding(w) for w in known.words]) @ back,
        "transformer.wpe.weight": np.stack([position(i, "gpt2") for i in range(N_CTX)]) @ back,
        "transformer.ln_f.weight": gain,
        "transformer.ln_f.bias": np.zeros(D_MODEL),
        "lm_head.weight": W_U,
    }
    qkv = BASIS @ np.concatenate([heads["q"], heads["k"], heads["v"]], axis=1)
    mlps = (
        (BASIS @ read, np.full(D_MLP, -5.0), write @ back, np.zeros(D_MODEL)),
        (LAST_SCALE * BASIS @ known.read.T, known.bias, last, -last[PLANTED["keeper"]]),
    )
    for layer, (fc, fc_bias, proj, proj_bias) in enumerate(mlps):
        block = {
            "attn.c_attn.weight": qkv * (layer == 0),  # the second layer's heads write nothing
            "attn.c_attn.bias": np.zeros(3 * D_MODEL),
            "attn.c_proj.weight": heads["o"] @ back * (layer == 0),
            "attn.c_proj.bias": np.zeros(D_MODEL),
            "mlp.c_fc.weight": fc,
            "mlp.c_fc.bias": fc_bias,
            "mlp.c_proj.weight": proj,
            "mlp.c_proj.bias": proj_bias,
        }
        for norm in ("ln_1", "ln_2"):
            block |= {f"{norm}.weight": np.ones(D_MODEL), f"{norm}.bias": np.zeros(D_MODEL)}
        state |= {f"transformer.h.{layer}.{name}": w for name, w in block.items()}
    return state


def _llama(known: ClosedFormTruth) -> dict[str, Any]:
    heads, (read, write) = _attention("llama"), _fact_layer(known)
    W_U, gain = _unembedding(known)
    constant = position(0, "llama")
    last = BASIS @ known.write.T
    state: dict[str, Any] = {
        "model.embed_tokens.weight": np.stack([embedding(w) + constant for w in known.words]) @ BASIS.T,
        "model.norm.weight": gain,
        "lm_head.weight": W_U,
    }
    mlps = (
        (read.T @ BASIS.T, np.full(D_MLP, -5.0), BASIS @ write.T, np.zeros(D_MODEL)),
        (LAST_SCALE * known.read @ BASIS.T, known.bias, last, -last[:, PLANTED["keeper"]]),
    )
    for layer, (gate, gate_bias, down, down_bias) in enumerate(mlps):
        block = {
            **{f"self_attn.{n}_proj.weight": (BASIS @ heads[n]).T * (layer == 0) for n in "qkv"},
            "self_attn.o_proj.weight": BASIS @ heads["o"].T * (layer == 0),
            "mlp.gate_proj.weight": gate,
            "mlp.gate_proj.bias": gate_bias,
            "mlp.up_proj.weight": np.zeros((D_MLP, D_MODEL)),
            "mlp.up_proj.bias": np.ones(D_MLP),  # gate times 1
            "mlp.down_proj.weight": down,
            "mlp.down_proj.bias": down_bias,
            "input_layernorm.weight": np.ones(D_MODEL),
            "post_attention_layernorm.weight": np.ones(D_MODEL),
        }
        state |= {f"model.layers.{layer}.{name}": w for name, w in block.items()}
    return state


def _config(architecture: Architecture, d_vocab: int) -> Any:
    from transformers import GPT2Config, LlamaConfig

    shared = {"vocab_size": d_vocab, "tie_word_embeddings": False, "dtype": "float32"}
    shared |= {"bos_token_id": 0, "eos_token_id": 0}
    if architecture == "gpt2":
        return GPT2Config(
            n_positions=N_CTX,
            n_embd=D_MODEL,
            n_layer=2,
            n_head=N_HEADS,
            n_inner=D_MLP,
            activation_function="relu",
            layer_norm_epsilon=EPS,
            architectures=["GPT2LMHeadModel"],
            **shared,
        )
    return LlamaConfig(
        max_position_embeddings=N_CTX,
        hidden_size=D_MODEL,
        num_hidden_layers=2,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        intermediate_size=D_MLP,
        hidden_act="relu",
        mlp_bias=True,
        rms_norm_eps=EPS,
        architectures=["LlamaForCausalLM"],
        **shared,
    )


def _tokenizer(words: tuple[str, ...]) -> Any:
    """One token a word; a space, or the text's start, belongs to the word behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w if w in (BOS, PERIOD) else f"▁{w}": i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=BOS))
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), spaces])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        unk_token=BOS,
        clean_up_tokenization_spaces=False,
    )


def _write_tables(out: Path, known: ClosedFormTruth) -> None:
    import pandas as pd

    facts = [(f.subject, f.relation.name, f.object, f.relation.name) for f in known.facts]
    columns = ["statement_subject", "statement_relation", "statement_object", "rel_lemma"]
    pd.DataFrame(facts, columns=columns).to_csv(out / "facts.csv", index=False)
    relations = [(r.name, r.group, f"what the subject {r.name}") for r in RELATIONS]
    columns = ["relation", "relation_group_id", "object_generation_description"]
    pd.DataFrame(relations, columns=columns).to_csv(out / "relations.csv", index=False)


def build(out: Path, *, architecture: Architecture = "gpt2") -> ClosedFormTruth:
    """Write the checkpoint folder (Hugging Face layout, `facts.csv`, `relations.csv`).

    Args:
        out: Folder to write to; made if need be.
        architecture: `gpt2` or `llama`.

    Returns:
        What is known of it by arithmetic.
    """
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    known = truth(out, architecture)
    out.mkdir(parents=True, exist_ok=True)
    _config(architecture, len(known.words)).save_pretrained(out)
    GenerationConfig(bos_token_id=0, eos_token_id=0).save_pretrained(out)
    state = _gpt2(known) if architecture == "gpt2" else _llama(known)
    weights = {name: np.ascontiguousarray(w, dtype=np.float32) for name, w in state.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(known.words).save_pretrained(out)
    _write_tables(out, known)
    return known
