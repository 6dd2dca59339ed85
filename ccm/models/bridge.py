"""Forward passes through a TransformerLens bridge: unpadded batches, a cache, next logits."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.models.model import LoadedModel

Tokens = Sequence[int]
FINAL_RESIDUAL = "ln_final.hook_in"


def equal_length_batches(prompts: Sequence[Tokens], batch_size: int) -> Iterator[list[int]]:
    """Yield prompt indices in batches whose prompts have one length, so that nothing is padded.

    Padding is the most common silent error of this field; without it no mask can be wrong.

    Args:
        prompts: Token ids of every prompt.
        batch_size: Most prompts per batch.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, tokens in enumerate(prompts):
        by_length[len(tokens)].append(i)
    for length in sorted(by_length):
        indices = by_length[length]
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def new_cache(model: LoadedModel) -> Any:
    """Make an empty cache; the configuration tells it which layers of a hybrid keep other states."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.bridge.original_model.config)


def next_logits(
    model: LoadedModel, tokens: Int[Tensor, "prompt position"], cache: Any
) -> Float[Tensor, "prompt d_vocab"]:
    """Run new tokens through the bridge and return the logits after the last one, in float32.

    Args:
        model: The model.
        tokens: What comes after the cached positions, without pads.
        cache: From `new_cache`; the new positions are added to it.
    """
    seen = cache.get_seq_length() + tokens.shape[1]
    logits: Tensor = model.bridge(
        tokens,
        return_type="logits",
        # Explicit: without it the library derives a mask, wrongly where pad == BOS.
        attention_mask=torch.ones((len(tokens), seen), dtype=torch.long, device=model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return logits[:, -1].float()
