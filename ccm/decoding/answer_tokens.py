"""Which tokens stand for a prompt's CK, ND and PK answer, and how likely they are (Method 9)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from ccm.decoding.results import FirstToken
from ccm.method.prompts import ProbingPrompt
from ccm.method.sources import SOURCES, Source
from ccm.models.model import LoadedModel

AnswerTokens = dict[Source, Int[np.ndarray, "prompt"]]  # what stands for each kind of answer


def object_tokens(
    model: LoadedModel, prompts: Sequence[ProbingPrompt], *, released: bool = False
) -> Int[np.ndarray, "prompt 2"]:
    """Find the first token, after a space, of each prompt's counter-object and parametric object.

    Args:
        model: For its tokenizer.
        prompts: The probing prompts.
        released: Use `encode(" " + decode(id))[0]` of the generated first token instead, BOS and all
            (defect 7).
    """

    def token(name: str, generated: int) -> int:
        if not released:
            return model.first_token(name)
        text = " " + str(model.tokenizer.decode([generated]))
        return int(model.tokenizer.encode(text)[0])

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
    """Choose the CK, PK and ND token of each prompt (Method 9).

    The class that the prompt belongs to takes the most likely token; the other object's class takes
    that object's first token; ND, if it is not the prompt's class, the best token that is neither.
    """
    best = first.top_tokens[:, 0]
    source = np.asarray(sources)
    ck = np.where(source == "CK", best, objects[:, 0])
    pk = np.where(source == "PK", best, objects[:, 1])
    taken = (first.top_tokens == ck[:, None]) | (first.top_tokens == pk[:, None])
    # Two tokens are excluded at most, so one of the top three is free.
    free = first.top_tokens[np.arange(len(source)), (~taken).argmax(1)]
    nd = np.where(source == "ND", best, free)
    return {"CK": ck, "ND": nd, "PK": pk}


def answer_log_probs(
    tokens: AnswerTokens, first: FirstToken
) -> dict[Source, Float[np.ndarray, "prompt"]]:
    """Look up the log-probability of each answer token among those that were read, nats.

    Raises:
        ValueError: a token was neither asked for nor among the top ones.
    """
    ids = np.concatenate([first.asked, first.top_tokens], axis=1)
    values = np.concatenate([first.log_probs, first.top_log_probs], axis=1)
    found: dict[Source, Float[np.ndarray, "prompt"]] = {}
    for source in SOURCES:
        match = ids == tokens[source][:, None]
        if not match.any(1).all():
            raise ValueError(f"the {source} token of prompt {int(match.any(1).argmin())} was not read")
        found[source] = values[np.arange(len(ids)), match.argmax(1)]
    return found
