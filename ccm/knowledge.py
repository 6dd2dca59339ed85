"""Which knowledge a completion shows (CK, PK, ND), and the log-ratios between them.

Method 8 (source) and section 9 (tokens and ratios).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from ccm.completions import FirstToken
from ccm.loaded import LoadedModel
from ccm.prompts import ProbingPrompt, answer_object, same_name

Source = Literal["CK", "ND", "PK"]
SOURCES: tuple[Source, ...] = get_args(Source)  # the order of the paper's tables
RATIOS = (("CK", "PK"), ("ND", "CK"), ("ND", "PK"))


def _names(text: str, object_: str) -> bool:
    """Whether the first words of an answer are the object's words."""
    words = same_name(object_).split(" ")
    return same_name(answer_object(text)).split(" ")[: len(words)] == words


@lru_cache(maxsize=1 << 16)  # many sets give a prompt the same answer
def knowledge_source(text: str, counter_object: str, parametric_object: str) -> Source:
    """Classify a continuation: CK if it names the counter-object, else PK, else ND.

    >>> knowledge_source(" Italy. Paris", counter_object="Italy", parametric_object="France")
    'CK'
    """
    if _names(text, counter_object):
        return "CK"
    if _names(text, parametric_object):
        return "PK"
    return "ND"


def knowledge_sources(texts: Sequence[str], prompts: Sequence[ProbingPrompt]) -> list[Source]:
    """Classify every continuation."""
    return [
        knowledge_source(text, prompt.counter_object, prompt.parametric_object)
        for text, prompt in zip(texts, prompts, strict=True)
    ]


@dataclass(frozen=True)
class AnswerTokens:
    """The token that stands for each kind of answer, per prompt."""

    CK: Int[np.ndarray, "prompt"]
    ND: Int[np.ndarray, "prompt"]
    PK: Int[np.ndarray, "prompt"]


def object_tokens(
    model: LoadedModel, prompts: Sequence[ProbingPrompt], *, released: bool = False
) -> Int[np.ndarray, "prompt 2"]:
    """First token of each prompt's counter- and parametric object after a space.

    Args:
        model: For its tokenizer.
        prompts: The probing prompts.
        released: Use `encode(" " + decode(id))[0]` of the generated first token instead, BOS and all
            (defect 7).
    """
    if released:

        def token(name: str, generated: int) -> int:
            text = " " + str(model.tokenizer.decode([generated]))
            return int(model.tokenizer.encode(text)[0])

    else:

        def token(name: str, generated: int) -> int:
            return model.first_token(name)

    pairs = [
        (
            token(p.counter_object, p.counter_first_token),
            token(p.parametric_object, p.parametric_first_token),
        )
        for p in prompts
    ]
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2)


def answer_tokens(
    sources: Sequence[Source], objects: Int[np.ndarray, "prompt 2"], first: FirstToken
) -> AnswerTokens:
    """Name the CK, PK and ND token of each prompt (Method 9).

    The class the prompt belongs to takes the most likely token; the other defined class its object's
    first token; ND, where it is not the class itself, the best token that is neither.
    """
    best = first.top_tokens[:, 0]
    source = np.asarray(sources)
    ck = np.where(source == "CK", best, objects[:, 0])
    pk = np.where(source == "PK", best, objects[:, 1])
    taken = (first.top_tokens == ck[:, None]) | (first.top_tokens == pk[:, None])
    # Two tokens are excluded at most, so one of the top three is free.
    free = first.top_tokens[np.arange(len(source)), (~taken).argmax(1)]
    nd = np.where(source == "ND", best, free)
    return AnswerTokens(CK=ck, ND=nd, PK=pk)


def answer_log_probs(
    tokens: AnswerTokens, first: FirstToken
) -> dict[Source, Float[np.ndarray, "prompt"]]:
    """Look up the log-probability of each answer token among those that were read, nats.

    Raises:
        ValueError: a token that was neither asked for nor among the top ones.
    """
    ids = np.concatenate([first.asked, first.top_tokens], axis=1)
    values = np.concatenate([first.log_probs, first.top_log_probs], axis=1)
    found: dict[Source, Float[np.ndarray, "prompt"]] = {}
    for source in SOURCES:
        match = ids == getattr(tokens, source)[:, None]
        if not match.any(1).all():
            raise ValueError(f"the {source} token of prompt {int(match.any(1).argmin())} was not read")
        found[source] = values[np.arange(len(ids)), match.argmax(1)]
    return found


def log_ratios(
    log_probs: dict[Source, Float[np.ndarray, "prompt"]],
) -> dict[str, Float[np.ndarray, "prompt"]]:
    """Return log(P_CK/P_PK), log(P_ND/P_CK) and log(P_ND/P_PK), nats, keyed `CK/PK` and so on."""
    return {f"{a}/{b}": log_probs[a] - log_probs[b] for a, b in RATIOS}  # type: ignore[index]
