"""Tiny random checkpoints of all five families, saved as folders that load without a network.

A toy has the wiring of its family (norms, residual layout, attention groups, biases, tying) and
weights large enough that its greedy continuations depend on the prompt.
"""

import atexit
import functools
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

Family = Literal["gpt2", "neox", "phi", "mistral", "llama"]
GROUPED = ("mistral", "llama")  # grouped-query attention, RMSNorm, SwiGLU, a SentencePiece-like BPE
TYING = ("gpt2", "llama")  # families whose released models come with a tied unembedding, too

TEXT = "the capital of Italy is Rome and Paris lies in France on a small river 1944 São Łódź naïve"
MERGED_WORDS = ("the", "is", "of", "in", "and", "to", "capital", "Paris")
EOS_GAIN = 1.8  # so that some continuations end before their tenth token
BYTE_LEVEL_BOS, METASPACE_SPECIALS = "<|endoftext|>", ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class ToyConfig:
    """What fixes a toy to the last bit; what is left out takes the family's own form.

    Raises ValueError for a shape or a wiring that the family does not have.
    """

    family: Family
    d_model: int = 32
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 0  # 0: half the heads where the family groups them, else all of them
    d_mlp: int = 48  # neither d_model nor 4 d_model, so that a swapped axis cannot pass unseen
    d_vocab: int = 320  # more than any toy tokenizer has (as Phi's 51200): the rest decodes to ""
    tied: bool | None = None  # None: tied for GPT-2 only
    parallel: bool | None = None  # None: parallel for NeoX and Phi
    n_ctx: int = 1024  # long enough for an instruction prompt spelt out in bytes
    seed: int = 0

    def __post_init__(self) -> None:
        group = 2 if self.family in GROUPED else 1
        n_kv_heads = self.n_kv_heads or max(1, self.n_heads // group)
        tied = self.family == "gpt2" if self.tied is None else self.tied
        parallel = self.family in ("neox", "phi") if self.parallel is None else self.parallel
        object.__setattr__(self, "n_kv_heads", n_kv_heads)
        object.__setattr__(self, "tied", tied)
        object.__setattr__(self, "parallel", parallel)
        self._check()

    def _check(self) -> None:
        if self.family not in get_args(Family):
            raise ValueError(f"family={self.family!r}, allowed: {get_args(Family)}")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model={self.d_model} needs an even width per head: {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is no multiple of {self.n_kv_heads} kv heads")
        if self.family not in GROUPED and self.n_kv_heads != self.n_heads:
            raise ValueError(f"{self.family} has no grouped-query attention here")
        if self.tied and self.family not in TYING:
            raise ValueError(f"{self.family} is never tied here, only {TYING} are")
        if self.family != "neox" and self.parallel != (self.family == "phi"):
            raise ValueError(f"parallel={self.parallel} is not how {self.family} is wired")
        tokens = build_tokenizer(self.family).get_vocab_size()
        if self.d_vocab < tokens:
            raise ValueError(f"d_vocab={self.d_vocab}, allowed: at least the tokenizer's {tokens}")

    @property
    def id(self) -> str:
        """A readable pytest id: the family and its variant, without widths and seed."""
        parts: list[str] = [self.family]
        if self.family == "neox":
            parts.append("parallel" if self.parallel else "sequential")
        if self.family in GROUPED:
            parts.append("gqa" if self.n_kv_heads < self.n_heads else "mha")
        if self.family in TYING:
            parts.append("tied" if self.tied else "untied")
        return "-".join(parts)

    @property
    def bos_id(self) -> int:
        return 1 if self.family in GROUPED else 0

    @property
    def eos_id(self) -> int:
        return 2 if self.family in GROUPED else 0


def _merges(space: str) -> Iterator[tuple[str, str]]:
    """The merges that build each of MERGED_WORDS from the left, with the space in front of it."""
    for word in MERGED_WORDS:
        pieces = space + word
        for cut in range(1, len(pieces)):
            yield pieces[:cut], pieces[cut]


def _bpe(tokens: list[str], space: str, **options: Any) -> Tokenizer:
    merges = list(dict.fromkeys(_merges(space)))
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens + [a + b for a, b in merges]))}
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))


def _byte_level_bpe() -> Tokenizer:
    """As GPT-2, NeoX and Phi: `<|endoftext|>` is BOS and EOS, and encoding adds neither."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = _bpe([BYTE_LEVEL_BOS, *alphabet], space="Ġ")
    tokenizer.add_special_tokens([AddedToken(BYTE_LEVEL_BOS, special=True, normalized=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _metaspace_bpe() -> Tokenizer:
    """As Mistral and Llama 2: a space in front of the text, unknown characters as bytes, and a
    `<s>` that the post-processor puts in front of every encoded text."""
    letters = sorted(set("".join(MERGED_WORDS)) | set("abcdefghijklmnopqrstuvwxyz."))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*METASPACE_SPECIALS, *byte_tokens, "▁", *letters]
    tokenizer = _bpe(tokens, space="▁", unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in METASPACE_SPECIALS])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    space_back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*space_back, decoders.Strip(content=" ", left=1)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@functools.cache
def build_tokenizer(family: Family) -> Tokenizer:
    """The family's kind of BPE over bytes, with merges for a few words; read-only."""
    return _metaspace_bpe() if family in GROUPED else _byte_level_bpe()


FAMILIES: tuple[ToyConfig, ...] = (
    ToyConfig("gpt2"),
    ToyConfig("neox"),
    ToyConfig("phi"),
    ToyConfig("mistral"),
    ToyConfig("llama"),
    ToyConfig("gpt2", tied=False),
    ToyConfig("neox", parallel=False),
    ToyConfig("mistral", n_kv_heads=4),
    ToyConfig("llama", n_kv_heads=4, tied=True),
)
"""One toy of each family in its own form, in the order of the paper's models, then the variants."""


def _hf_config(config: ToyConfig) -> Any:
    """The `transformers` configuration that a released model of the family has, made small."""
    import transformers  # slow to import, and only needed to write a checkpoint

    options: dict[str, Any] = {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id}
    options |= {"vocab_size": config.d_vocab, "tie_word_embeddings": config.tied}
    if config.family == "gpt2":
        options |= {"n_embd": config.d_model, "n_layer": config.n_layers, "n_inner": config.d_mlp}
        options |= {"n_head": config.n_heads, "n_positions": config.n_ctx}
        return transformers.GPT2Config(**options)
    options |= {"hidden_size": config.d_model, "intermediate_size": config.d_mlp}
    options |= {"num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads}
    options |= {"max_position_embeddings": config.n_ctx}
    # Half the head is rotated (Pythia: a quarter), an even number of dimensions whatever the width.
    part = 0.5 if config.d_model // config.n_heads % 4 == 0 else 1.0
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part}
    if config.family == "neox":
        options["use_parallel_residual"] = config.parallel
        return transformers.GPTNeoXConfig(rope_parameters=rope, **options)
    if config.family == "phi":
        return transformers.PhiConfig(rope_parameters=rope, **options)
    grouped = transformers.MistralConfig if config.family == "mistral" else transformers.LlamaConfig
    return grouped(num_key_value_heads=config.n_kv_heads, **options)


def _fill(model: Any, config: ToyConfig) -> None:
    """Overwrite every parameter: unit embeddings, gains around 1, weights that keep the scale."""
    families = get_args(Family)  # Mistral and Llama have the same shapes: keep their weights apart
    seed = config.seed * len(families) + families.index(config.family)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            is_gain = ("norm" in name or "ln_" in name) and name.endswith("weight")
            value = is_gain + 0.3 * noise
        elif any(part in name for part in ("embed", "wte", "lm_head")):
            value = noise
        else:
            d_in = parameter.shape[0 if config.family == "gpt2" else 1]  # GPT-2 stores (in, out)
            value = 2.5 * noise / d_in**0.5
        parameter.data.copy_(value)
    model.get_output_embeddings().weight.data[config.eos_id] *= EOS_GAIN


def save_toy(config: ToyConfig, folder: Path) -> Path:
    """Write the checkpoint and its tokenizer as `save_pretrained` does; returns the folder.

    The weights come from a generator of their own: the global random state is as before.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):  # the constructor draws weights we overwrite
        model = transformers.AutoModelForCausalLM.from_config(_hf_config(config))
    _fill(model, config)
    model.save_pretrained(folder)
    tokenizer = build_tokenizer(config.family)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokenizer.id_to_token(config.bos_id),
        eos_token=tokenizer.id_to_token(config.eos_id),
        model_max_length=config.n_ctx,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="ccm-toys-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def toy_folder(config: ToyConfig) -> Path:
    """The toy's checkpoint, written once per process and removed at its exit; read-only."""
    return save_toy(config, Path(tempfile.mkdtemp(prefix=f"{config.id}-", dir=_root())))


def word_prompts(n: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 12 words."""
    rng, words = random.Random(seed), TEXT.split()
    return [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(n)]


def token_prompts(
    n: int, config: ToyConfig, seed: int = 0, min_len: int = 1, max_len: int = 20
) -> list[list[int]]:
    """Token ids, BOS first, `min_len` to `max_len` long with it; no special token after it."""
    rng = random.Random(seed)
    ordinary = range(config.eos_id + 1, config.d_vocab)
    lengths = [rng.randint(min_len, max_len) for _ in range(n)]
    return [[config.bos_id, *rng.choices(ordinary, k=length - 1)] for length in lengths]
