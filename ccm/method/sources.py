"""Which knowledge a completion shows (CK, PK, ND), and the log-ratios between them.

Method 8 (source) and section 9 (tokens and ratios).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from ccm.method.prompts import ProbingPrompt, answer_object, same_name

Source = Literal["CK", "ND", "PK"]
SOURCES: tuple[Source, ...] = get_args(Source)  # the order of the paper's tables
RATIOS = (("CK", "PK"), ("ND", "CK"), ("ND", "PK"))


def _words(object_: str) -> list[str]:
    return same_name(object_).split(" ")


def _begins(first: Sequence[str], words: Sequence[str]) -> bool:
    return list(words[: len(first)]) == list(first)


@lru_cache(maxsize=1 << 16)  # many sets give a prompt the same answer
def knowledge_source(
    text: str, counter_object: str, parametric_object: str, *, counter_first: bool = False
) -> Source:
    """Classify a continuation (Method 8): CK or PK if its first words are that object's, else ND.

    A continuation may begin with both objects, where one object begins the other. Then the object of
    more words counts, and CK where the two have the same words. The published rule asks for CK first,
    so that "New York City" is never PK beside a counter-object "New York".

    >>> knowledge_source(" Italy. Paris", counter_object="Italy", parametric_object="France")
    'CK'

    Args:
        text: The continuation; what follows the first splitter match does not count.
        counter_object: CK.
        parametric_object: PK.
        counter_first: CK wherever the first words are the counter-object's, as published.
    """
    answer, counter, parametric = map(_words, (answer_object(text), counter_object, parametric_object))
    ck, pk = _begins(counter, answer), _begins(parametric, answer)
    if ck and pk:
        return "PK" if len(parametric) > len(counter) and not counter_first else "CK"
    return "CK" if ck else "PK" if pk else "ND"


def knowledge_sources(
    texts: Sequence[str], prompts: Sequence[ProbingPrompt], *, counter_first: bool = False
) -> list[Source]:
    """Classify the continuation of every prompt; see `knowledge_source`."""
    return [
        knowledge_source(
            text, prompt.counter_object, prompt.parametric_object, counter_first=counter_first
        )
        for text, prompt in zip(texts, prompts, strict=True)
    ]


NESTED_PAIRS = 20  # at most so many pairs are named


@dataclass(frozen=True)
class NestedObjects:
    """Prompts of which one object begins the other: an answer may name both (Method 8)."""

    prompts: int
    counter_begins: int  # of them, where the counter-object is the shorter: only there rules differ
    pairs: tuple[tuple[str, str], ...]  # (CK, PK), distinct, the first `NESTED_PAIRS`


def nested_objects(prompts: Sequence[ProbingPrompt]) -> NestedObjects:
    """Find the prompts whose objects differ, but one is the first words of the other."""
    pairs, shorter, nested = dict[tuple[str, str], tuple[str, str]](), 0, 0
    for prompt in prompts:
        counter, parametric = _words(prompt.counter_object), _words(prompt.parametric_object)
        if counter == parametric or not (_begins(counter, parametric) or _begins(parametric, counter)):
            continue
        nested += 1
        shorter += len(counter) < len(parametric)
        pair = prompt.counter_object, prompt.parametric_object
        pairs.setdefault((same_name(pair[0]), same_name(pair[1])), pair)
    return NestedObjects(nested, shorter, tuple(pairs.values())[:NESTED_PAIRS])


def log_ratios(
    log_probs: dict[Source, Float[np.ndarray, "prompt"]],
) -> dict[str, Float[np.ndarray, "prompt"]]:
    """Compute log(P_CK/P_PK), log(P_ND/P_CK) and log(P_ND/P_PK), in nats (Method 9).

    Args:
        log_probs: Log-probability of each source's first token, nats, one number per prompt.

    Returns:
        Log-ratios by their names: `CK/PK`, `ND/CK`, `ND/PK`.
    """
    return {f"{a}/{b}": log_probs[a] - log_probs[b] for a, b in RATIOS}  # type: ignore[index]
