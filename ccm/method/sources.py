"""Which knowledge a completion shows (CK, PK, ND), and the log-ratios between them.

Method 8 (source) and Method 9 (tokens and ratios).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from ccm.method.prompts import SPLITTER, ProbingPrompt, answer_object, same_name

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
    more words counts, and CK if the two have the same words. The published rule tests for CK first, so
    that "New York City" is never PK beside a counter-object "New York".

    >>> knowledge_source(" Italy. Paris", counter_object="Italy", parametric_object="France")
    'CK'

    Args:
        text: The continuation; what follows the first splitter match does not count.
        counter_object: CK.
        parametric_object: PK.
        counter_first: CK wherever the first words are the counter-object's, as published.
    """
    counter, parametric = same_name(counter_object), same_name(parametric_object)
    answer = _words(answer_object(text))
    ck, pk = (_begins(_words(name), answer) for name in (counter, parametric))
    return _source(ck, pk, counter, parametric, counter_first)


# When a source is decided before its text ends. Let T be a whole text that begins with the text so
# far, and A(T) its answer: T up to the first splitter match, stripped, in lower case. An answer
# begins with an object o, [o] below, when A(T) + " " begins with o + " " (which compares words
# between single spaces). The source is a function of [counter] and [parametric] alone.
# 1. A splitter match in the text so far ends the answer: whatever follows it, A(T) is known.
# 2. Otherwise let u be the text so far, stripped on the left, in lower case. Every A(T) is then u and
#    something more, cut at a splitter and stripped on the right, provided that (a) no splitter match
#    begins in the text so far and ends behind it: only `\n` spelled out has two characters, so a text
#    that ends in a backslash is not decided; (b) the lower case of a beginning begins the lower case
#    of the whole: in Unicode only the capital sigma looks at what follows it, so a text that holds
#    one is not decided; (c) the text so far begins the text to come: a character that lacks bytes
#    reads as U+FFFD until they come, so a text that ends in one is not decided (tokens whose text is
#    provisional in other ways are the decoder's to leave out). While u is empty, anything may follow.
# 3. If u begins with o + " ", every A(T) + " " does, too: stripping takes only spaces behind o. [o]
#    is sure. If o begins with u, or is u but for spaces on its right, [o] holds where T ends in the
#    right way and perhaps not elsewhere. Else u and o differ at a place that stripping does not
#    reach, or u goes on behind o with something else than a space: [o] is impossible.
# 4. If every way to fill in what is only possible gives one source, it is the source of every T.
_UNFINISHED = ("\\", "\ufffd")  # 2 (a) and (c)
_LOOKS_AHEAD = "\u03a3"  # 2 (b)


@lru_cache(maxsize=1 << 16)
def is_decided(
    text: str, counter_object: str, parametric_object: str, *, counter_first: bool = False
) -> bool:
    """Return whether every continuation that begins with this text has the same source.

    >>> is_decided(" Rome", "Italy", "France"), is_decided(" Ital", "Italy", "France")
    (True, False)

    Args:
        text: A continuation so far, with more tokens to come.
        counter_object: CK.
        parametric_object: PK.
        counter_first: As for `knowledge_source`.
    """
    if SPLITTER.search(text):
        return True
    if text.endswith(_UNFINISHED) or _LOOKS_AHEAD in text:
        return False
    begun = text.lstrip().lower()
    counter, parametric = same_name(counter_object), same_name(parametric_object)
    outcomes = {
        _source(ck, pk, counter, parametric, counter_first)
        for ck in _may_begin(begun, counter)
        for pk in _may_begin(begun, parametric)
    }
    return len(outcomes) == 1


def _may_begin(begun: str, object_: str) -> tuple[bool, ...]:
    """Return whether answers with this beginning begin with an object: one value, or both."""
    if object_ and begun.startswith(f"{object_} "):
        return (True,)
    return (True, False) if object_.startswith(begun) or begun.rstrip() == object_ else (False,)


def _source(ck: bool, pk: bool, counter: str, parametric: str, counter_first: bool) -> Source:
    """Return the source of an answer, by which of the two objects it begins with."""
    if ck and pk:
        longer = parametric.count(" ") > counter.count(" ")
        return "PK" if longer and not counter_first else "CK"
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


NESTED_PAIRS = 20  # most pairs that are named


@dataclass(frozen=True)
class NestedObjects:
    """Prompts with one object that begins the other: an answer may name both (Method 8)."""

    prompts: int
    counter_begins: int  # those whose counter-object is the shorter: only there the two rules differ
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
