"""A published model without its checkpoint: real architecture, random weights, stand-in tokenizer.

The cost of a run depends on shapes, not on what the weights know. So a model can be built from its
published dimensions alone, with nothing downloaded, and the cost can be measured on it.
"""

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ccm.errors import BadInput, allowed
from ccm.models.load import assemble, check_precision
from ccm.models.model import LoadedModel
from ccm.models.specs import CHECKPOINT, FAMILIES, MODELS
from ccm.models.tokenizer import Bos, read_tokenizer

# Letters of a token at most: ParaRel prompts then have 4.1 characters per token, about as many as with
# the published tokenizers; with the organism's own 600 tokens they have 1.7.
LETTERS = 6
WORDS = re.compile(r" ?\w+| ?[^\w\s]+|\s+")


@dataclass(frozen=True)
class Architecture:
    """A transformers configuration that is written in this package, not read from a file."""

    kind: str  # name of a transformers configuration class
    options: Mapping[str, Any]

    def config(self) -> Any:
        """Build the configuration object of transformers."""
        import transformers

        return getattr(transformers, self.kind)(**self.options)


def architecture_of(name: str) -> Architecture:
    """Look up a published model's architecture, with its default `initializer_range`.

    Raises:
        BadInput: a model that is not one of the published ones.
    """
    described = [known for known, spec in MODELS.items() if spec.config]
    if name not in described:
        known = name in MODELS or Path(name).is_dir()
        what = "is none of the published models: use `ccm run`"
        raise BadInput(f"model {name!r}: {what if known else 'unknown'}. {allowed(described)}.")
    spec = MODELS[name]
    family = FAMILIES[spec.architecture]
    named = {getattr(family, what): getattr(spec, what) for what in ("d_model", "n_layers", "d_mlp")}
    return Architecture(family.config, {**named, "vocab_size": spec.d_vocab, **spec.config})


def _build(config: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Build a transformers model directly on its device and in its dtype, so that nothing is copied."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def n_parameters(config: Any) -> int:
    """Count the parameters of a configuration, tied ones once, without allocating any."""
    return sum(p.numel() for p in _build(config, "meta", torch.float32).parameters())


def random_model(config: Any, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Build a transformers model with random weights; the global random state stays as it was.

    Args:
        config: A transformers configuration.
        device: Where the weights are drawn and stay.
        dtype: Dtype of the weights.
        seed: Seed of the weights.
    """
    cuda = device.type == "cuda"
    index = torch.cuda.current_device() if cuda and device.index is None else device.index
    with torch.random.fork_rng(devices=[index] if cuda else []):
        torch.manual_seed(seed)
        return _build(config, device, dtype)


def build(
    name: str,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokenizer: Path | None = None,
    seed: int = 123,
) -> LoadedModel:
    """Build a published model with random weights, ready to run; nothing is downloaded.

    Args:
        name: Name of a published model.
        config: Its transformers configuration, or a smaller one of its family.
        device: Where to draw the weights and to run.
        dtype: Of weights and activations.
        tokenizer: A folder with tokenizer.json; None for the stand-in.
        seed: Seed of the weights.

    Raises:
        BadInput: a tokenizer that cannot be used with the model.
    """
    # The bridge needs a tokenizer of transformers, whatever encodes the prompts.
    check_precision(device, dtype)
    given = read_tokenizer(tokenizer or CHECKPOINT, int(config.vocab_size), "--tokenizer")
    loaded = random_model(config, device, dtype, seed)
    spec = MODELS[name]
    # A bare tokenizer.json names no BOS; a published model has one.
    bos: Bos = "own" if given.bos_token_id is not None else int(config.bos_token_id)
    model = assemble(spec, loaded, given, device, dtype, source=str(spec.hub_id), bos=bos)
    model.source = f"random weights, seed {seed}"
    if tokenizer is None:
        assert model.bos is not None
        model.tokenizer = StandInTokenizer(int(config.vocab_size), model.bos)
    return model


class StandInTokenizer:
    """Cuts text into tokens about as long as a real tokenizer's, with the same shared prefixes.

    Words, with the space before them, are cut into pieces of at most `LETTERS` letters; a piece's id is
    its hash, spread over the whole vocabulary. Ids have distinct, meaningless texts that end no answer,
    so that every continuation is decoded to its last token.

    >>> tokenizer = StandInTokenizer(50257, bos=0)
    >>> len(tokenizer.encode("Paris is the capital of Italy. Paris is the capital of"))
    14
    """

    def __init__(self, d_vocab: int, bos: int) -> None:
        """Set the vocabulary's size and the one token without text."""
        self.d_vocab = d_vocab
        self.bos_token_id = self.eos_token_id = bos

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Encode a text, without the special token."""
        ids = []
        for word in WORDS.findall(text):
            space, letters = word[: len(word) - len(word.lstrip())], word.lstrip() or word
            pieces = [letters[i : i + LETTERS] for i in range(0, len(letters), LETTERS)]
            for i, piece in enumerate(pieces):
                ids.append(self._id((space if i == 0 else "") + piece))
        return ids

    def _id(self, piece: str) -> int:
        hashed = zlib.crc32(piece.encode("utf-8")) % (self.d_vocab - 1)
        return hashed + (hashed >= self.bos_token_id)

    def decode(self, tokens: Iterable[int], **options: Any) -> str:
        """Return a text that tells continuations apart."""
        return "".join(f" t{t}" for t in tokens if t != self.bos_token_id)

    def batch_decode(self, rows: Iterable[Iterable[int]], **options: Any) -> list[str]:
        """Decode several rows."""
        return [self.decode(row) for row in rows]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the name of each token."""
        return [f"t{i}" for i in ids]
