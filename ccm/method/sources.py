"""Which knowledge a completion shows (CK, PK, ND), and the log-ratios between them.

Method 8 (source) and section 9 (tokens and ratios).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from ccm.decoding.results import FirstToken
from ccm.method.prompts import ProbingPrompt, answer_object, same_name
from ccm.models.model import LoadedModel

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
    """Classify a continuation: CK or PK if its first words are that object's, else ND.

    Both are where one object begins the other: then the one of more words is what the answer names,
    and CK where they are the same. The published rule asks for CK first, so that "New York City" is
    never PK beside a counter-object "New York".

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
    """Classify every continuation, as `knowledge_source` does one."""
    return [
        knowledge_source(
            text, prompt.counter_object, prompt.parametric_object, counter_first=counter_first
        )
        for text, prompt in zip(texts, prompts, strict=True)
    ]


NESTED_PAIRS = 20  # as many are named


@dataclass(frozen=True)
class NestedObjects:
    """Prompts of which one object begins the other: an answer may name both (Method 8)."""

    prompts: int
    counter_begins: int  # of them, where the counter-object is the shorter: only there rules differ
    pairs: tuple[tuple[str, str], ...]  # (CK, PK), distinct, the first `NESTED_PAIRS`


def nested_objects(prompts: Sequence[ProbingPrompt]) -> NestedObjects:
    """Find the prompts whose two objects are unlike, and one of them the first words of the other."""
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
