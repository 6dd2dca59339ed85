"""Sources, answer tokens and log-ratios, each against its definition written a second time."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ccm.decoding.answer_tokens import AnswerTokens, answer_log_probs, answer_tokens, object_tokens
from ccm.decoding.results import N_TOP, FirstToken, read_first_token
from ccm.method.prompts import ProbingPrompt, answer_object
from ccm.method.sources import (
    NESTED_PAIRS,
    RATIOS,
    SOURCES,
    Source,
    is_decided,
    knowledge_source,
    knowledge_sources,
    log_ratios,
    nested_objects,
)
from ccm.models.load import load
from ccm.models.specs import spec_for
from tests.strategies import object_names
from tests.tolerance import LOG_PROBABILITY
from tests.toys import MERGED_WORDS, ToyConfig, build_tokenizer, toy_folder

some = settings(max_examples=150, deadline=None)
# Everything an answer ends at; two of them are two characters long or start like one.
ENDS = ('"', ".", "\n", "\\n", ",", "(", "[", "]", "<")
TAILS = st.text(st.sampled_from([*'".\n\\,([]<', "n", " ", "a", "B"]), max_size=8)
SPACES = st.sampled_from(["", " ", "  ", "\t"])


def cut(text: str) -> str:
    """The text up to its first end, character by character."""
    for i in range(len(text)):
        if any(text.startswith(end, i) for end in ENDS):
            return text[:i].strip()
    return text.strip()


def names(text: str, name: str) -> bool:
    """Method 8: the first n space-separated words equal the object, n being its word count."""
    wanted = name.lower().strip().split(" ")
    return cut(text).lower().strip().split(" ")[: len(wanted)] == wanted


def published_source(text: str, ck: str, pk: str) -> str:
    return "CK" if names(text, ck) else "PK" if names(text, pk) else "ND"


def longest_source(text: str, ck: str, pk: str) -> str:
    """Of the objects that a text names, the one of most words; CK where they are as long."""
    named = [(source, name) for source, name in (("CK", ck), ("PK", pk)) if names(text, name)]
    most = max((len(name.strip().split(" ")) for _, name in named), default=0)
    longest = [source for source, name in named if len(name.strip().split(" ")) == most]
    return longest[0] if longest else "ND"


def begins(a: str, b: str) -> bool:
    """Whether one object is the first words of the other, and not all of them."""
    return a.lower().strip() != b.lower().strip() and f"{b.lower().strip()} ".startswith(
        f"{a.lower().strip()} "
    )


# --- the source -------------------------------------------------------------------------------------


@given(object_=object_names(), space=SPACES, tail=TAILS)
@some
def test_an_answer_ends_at_the_first_splitter(object_: str, space: str, tail: str) -> None:
    text = space + object_ + tail
    assert answer_object(text) == cut(text)
    for end in ENDS:
        assert answer_object(f"{space}{object_}{end}{tail}") == object_.strip()


@pytest.mark.parametrize("kept", ["\\", "n", ")", ">", ";", ":", "-", "'", "|", "\t", "\\N"])
def test_other_characters_end_no_answer(kept: str) -> None:
    assert answer_object(f"New{kept}York") == f"New{kept}York"


@given(ck=object_names(2), pk=object_names(2), data=st.data())
@some
def test_source_is_the_definition(ck: str, pk: str, data: st.DataObject) -> None:
    named = data.draw(st.sampled_from([ck, pk, f"{ck} {pk}", f"the {ck}", "Nowhere"]), label="named")
    named = data.draw(st.sampled_from([named, named.upper(), named.lower(), named.title()]))
    text = data.draw(SPACES) + named + data.draw(st.sampled_from(["", " and", "s"])) + data.draw(TAILS)
    assert knowledge_source(text, ck, pk, counter_first=True) == published_source(text, ck, pk)
    assert knowledge_source(text, ck, pk) == longest_source(text, ck, pk)


@given(ck=object_names(2), pk=object_names(2), tail=TAILS, data=st.data())
@some
def test_both_rules_agree_where_no_object_begins_the_other(
    ck: str, pk: str, tail: str, data: st.DataObject
) -> None:
    assume(not begins(ck, pk))
    text = " " + data.draw(st.sampled_from([ck, pk, f"{ck} {pk}", f"{pk} {ck}", "Nowhere"])) + tail
    assert knowledge_source(text, ck, pk) == knowledge_source(text, ck, pk, counter_first=True)


@given(short=object_names(2), more=object_names(2), tail=TAILS)
@some
def test_the_longer_object_wins_where_an_answer_names_both(short: str, more: str, tail: str) -> None:
    long, end = f"{short} {more}", f". {tail}"
    for text in (f" {long}{end}", f" {long} indeed{end}", f"{long.upper().lower()}{end}"):
        if not names(text, long):  # upper() may spell it otherwise
            continue
        assert knowledge_source(text, short, long) == "PK"
        assert knowledge_source(text, long, short) == "CK"
        for ck, pk in ((short, long), (long, short)):
            assert knowledge_source(text, ck, pk, counter_first=True) == "CK"
    for counter_first in (False, True):  # the longer one is not named
        text = f" {short}{end}"
        assert knowledge_source(text, short, long, counter_first=counter_first) == "CK"
        assert knowledge_source(text, long, short, counter_first=counter_first) == "PK"


@given(object_=object_names(), tail=TAILS)
@some
def test_equal_objects_are_ck(object_: str, tail: str) -> None:
    for counter_first in (False, True):
        text = f" {object_}.{tail}"
        assert knowledge_source(text, object_, f" {object_} ", counter_first=counter_first) == "CK"


@given(objects=st.lists(st.tuples(object_names(2), object_names(2)), max_size=6), more=st.data())
@some
def test_nested_objects_are_counted(objects: list[tuple[str, str]], more: st.DataObject) -> None:
    """Also with pairs that are made to begin one another, in either order."""
    for i, (a, b) in enumerate(objects):
        objects[i] = more.draw(st.sampled_from([(a, b), (a, f"{a} {b}"), (f"{a} {b}", a), (a, a)]))
    found = nested_objects([probing(ck, pk) for ck, pk in objects])
    nested = [(ck, pk) for ck, pk in objects if begins(ck, pk) or begins(pk, ck)]
    assert found.prompts == len(nested)
    assert found.counter_begins == sum(begins(ck, pk) for ck, pk in nested)
    keys = [(ck.lower().strip(), pk.lower().strip()) for ck, pk in nested]
    assert list(found.pairs) == [nested[keys.index(k)] for k in dict.fromkeys(keys)]


def test_a_few_pairs_are_named() -> None:
    prompts = [probing("New York", f"New York {i}") for i in range(30)] * 2
    prompts.append(probing("NEW YORK ", "new york 0"))  # another spelling of the first
    found = nested_objects(prompts)
    assert (found.prompts, found.counter_begins) == (61, 61)
    assert found.pairs == tuple(("New York", f"New York {i}") for i in range(NESTED_PAIRS))
    assert nested_objects([probing("New", "Newark"), probing("York", "New York")]).prompts == 0


@pytest.mark.parametrize(
    ("text", "ck", "pk", "source"),
    [
        (" Italy. Paris", "Italy", "France", "CK"),
        (" France, where", "Italy", "France", "PK"),
        (" Spain", "Italy", "France", "ND"),
        (" FRANCE", "italy", " france ", "PK"),
        (" New York City", "New York", "New York City", "PK"),  # the longer, where both match
        (" New York City", "New York City", "New York", "CK"),
        (" New York", "New York", "New York City", "CK"),
        (" New York, City", "New York", "New York City", "CK"),
        (" New York City", "New Delhi", "New York City", "PK"),
        (" New", "New York", "Old", "ND"),  # a part of the name is not the name
        (" Newark", "New", "Old", "ND"),  # nor is a longer word
        (" in Italy", "Italy", "France", "ND"),
        (" New  York", "New York", "Old", "ND"),  # words are separated by single spaces
        ("", "Italy", "France", "ND"),
        (".Italy", "Italy", "France", "ND"),
        ("\\nItaly", "Italy", "France", "ND"),
        (" Łódź]", "łÓDŹ", "France", "CK"),
    ],
)
def test_sources_by_hand(text: str, ck: str, pk: str, source: str) -> None:
    assert knowledge_source(text, counter_object=ck, parametric_object=pk) == source


def probing(ck: str, pk: str, first: tuple[int, int] = (0, 0)) -> ProbingPrompt:
    return ProbingPrompt("s", "r", "g", "s is", ck, pk, *first, f"s is {ck}. s is")


def test_sources_go_with_their_prompts() -> None:
    prompts = [probing("Italy", "France"), probing("France", "Italy"), probing("a", "b")]
    assert knowledge_sources([" Italy"] * 3, prompts) == ["CK", "PK", "ND"]
    nested = [probing("New York", "New York City")]
    assert knowledge_sources([" New York City."], nested) == ["PK"]
    assert knowledge_sources([" New York City."], nested, counter_first=True) == ["CK"]
    with pytest.raises(ValueError, match="zip"):
        knowledge_sources([" Italy"], prompts)
    assert SOURCES == ("CK", "ND", "PK")


# --- the tokens -------------------------------------------------------------------------------------


def reading(logits: np.ndarray, asked: np.ndarray) -> FirstToken:
    return read_first_token(torch.from_numpy(logits).float(), torch.from_numpy(asked))


@given(data=st.data(), seed=st.integers(0, 999), n=st.integers(1, 6), d_vocab=st.integers(3, 7))
@some
def test_answer_tokens_and_ratios_are_the_definition(
    data: st.DataObject, seed: int, n: int, d_vocab: int
) -> None:
    """A vocabulary so small that the CK, the PK and the most likely token often coincide."""
    rng = np.random.default_rng(seed)
    logits = rng.choice([0.0, 1.0, 2.5, -3.0], size=(n, d_vocab)) + rng.choice([0, 0.125], size=(n, 1))
    objects = rng.integers(0, d_vocab, size=(n, 2))
    kinds: list[Source] = [data.draw(st.sampled_from(SOURCES), label="source") for _ in range(n)]
    first = reading(logits, objects)
    tokens = answer_tokens(kinds, objects, first)
    found = answer_log_probs(tokens, first)
    ratios = log_ratios(found)
    for i, kind in enumerate(kinds):
        order = sorted(range(d_vocab), key=lambda t: (-logits[i, t], t))
        ck = order[0] if kind == "CK" else int(objects[i, 0])
        pk = order[0] if kind == "PK" else int(objects[i, 1])
        nd = order[0] if kind == "ND" else next(t for t in order if t not in (ck, pk))
        what = f"prompt {i}, {kind}, logits {logits[i]}, objects {objects[i]}"
        assert (tokens["CK"][i], tokens["PK"][i], tokens["ND"][i]) == (ck, pk, nd), what
        log_probs = logits[i] - np.log(np.exp(logits[i]).sum())
        for source, token in (("CK", ck), ("PK", pk), ("ND", nd)):
            LOG_PROBABILITY.assert_close(found[source][i], log_probs[token], what=what)
        for name, (a, b) in {"CK/PK": (ck, pk), "ND/CK": (nd, ck), "ND/PK": (nd, pk)}.items():
            LOG_PROBABILITY.assert_close(ratios[name][i], logits[i, a] - logits[i, b], what=what)
        if kind == "ND":
            continue
        assert nd not in (ck, pk), what
    assert set(ratios) == {f"{a}/{b}" for a, b in RATIOS}


@given(seed=st.integers(0, 999), d_vocab=st.integers(1, 9))
@some
def test_first_readings_are_the_softmax(seed: int, d_vocab: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, size=(4, d_vocab)).astype(np.float64)  # ties on purpose
    asked = rng.integers(0, d_vocab, size=(4, 2))
    found = reading(logits, asked)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(found.asked, asked)
    np.testing.assert_allclose(found.entropy, -(p * np.log(p)).sum(axis=1), atol=1e-12)
    np.testing.assert_allclose(found.log_probs, np.log(np.take_along_axis(p, asked, 1)), atol=1e-12)
    top = np.argsort(-logits, axis=1, kind="stable")[:, :N_TOP]
    np.testing.assert_array_equal(found.top_tokens, top)
    np.testing.assert_allclose(found.top_log_probs, np.log(np.take_along_axis(p, top, 1)), atol=1e-12)


def test_a_token_that_was_not_read_is_an_error() -> None:
    first = reading(np.array([[3.0, 2.0, 1.0, 0.0, -1.0]] * 2), np.array([[3], [0]]))
    tokens: AnswerTokens = {"CK": np.array([3, 3]), "ND": np.array([0, 0]), "PK": np.array([1, 1])}
    with pytest.raises(ValueError, match=r"^the CK token of prompt 1 was not read"):
        answer_log_probs(tokens, first)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_object_tokens_of_both_protocols(family: str) -> None:
    config = ToyConfig(family)  # type: ignore[arg-type]
    model = load(spec_for(str(toy_folder(config))))
    space = "▁" if family == "llama" else "Ġ"
    ids = {word: build_tokenizer(config.family).token_to_id(space + word) for word in MERGED_WORDS}
    prompts = [
        probing("Paris", "capital city", (ids["Paris"], ids["capital"])),
        probing("the", "Paris", (ids["the"], ids["Paris"])),
    ]
    wanted = [[ids["Paris"], ids["capital"]], [ids["the"], ids["Paris"]]]
    np.testing.assert_array_equal(object_tokens(model, prompts), wanted)
    released = object_tokens(model, prompts, released=True)
    # Released: BOS where the tokenizer adds one, else the bare space before a token that has its own.
    bare = config.bos_id if family == "llama" else build_tokenizer("gpt2").token_to_id("Ġ")
    np.testing.assert_array_equal(released, np.full((2, 2), bare))
    assert object_tokens(model, []).shape == (0, 2)


# --- decided before the text ends ---------------------------------------------------------------------

# Spaces of several kinds, both halves of a splitter, letters whose lower case is longer or looks ahead.
TRICKY = [*"abAB  \t\n.\\nΣσςİI", "\u00a0", "\u3000", "\ufffd", "東", "京"]
tricky_texts = st.text(st.sampled_from(TRICKY), max_size=7)
tricky_objects = st.text(st.sampled_from([*"abAB  ΣσİI東", "\u00a0"]), max_size=4).map(str.strip)


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_what_is_decided_does_not_change_whatever_follows(data: st.DataObject) -> None:
    counter, parametric = data.draw(tricky_objects), data.draw(tricky_objects)
    begun = [name[:n] for name in (counter, parametric) for n in range(1, len(name) + 1)]
    starts = st.sampled_from(["", *begun]).map(lambda start: f" {start}")
    text = data.draw(starts | tricky_texts) + data.draw(tricky_texts | st.just(""))
    counter_first = data.draw(st.booleans())
    if not is_decided(text, counter, parametric, counter_first=counter_first):
        return
    source = knowledge_source(text, counter, parametric, counter_first=counter_first)
    ends = [name[n:] for name in (counter, parametric) for n in range(len(name) + 1)]
    for more in (*ends, data.draw(tricky_texts), data.draw(tricky_texts)):
        assert source == knowledge_source(text + more, counter, parametric, counter_first=counter_first)


@pytest.mark.parametrize(
    ("text", "counter", "parametric", "decided"),
    [
        ("", "Italy", "France", False),
        (" ", "Italy", "France", False),
        (" I", "Italy", "France", False),
        (" Italy", "Italy", "France", False),  # Italyx would be neither
        (" Italy ", "Italy", "France", True),
        (" ITALY and", "Italy", "France", True),
        (" Italy\t", "Italy", "France", False),  # Italy if it ends here, and ND if not
        (" Italy\ta", "Italy", "France", True),
        (" Italy.", "Italy", "France", True),
        (" Italians", "Italy", "France", True),
        (" the", "Italy", "France", True),
        (" the", "the Netherlands", "France", False),
        (" The Hague", "the Netherlands", "France", True),
        (" New York ", "New York", "New York City", False),
        (" New York C", "New York", "New York City", False),
        (" New York City ", "New York", "New York City", True),
        (" New York B", "New York", "New York City", True),
        (" new york ", "New York City", "New York", False),
        (" Ital\ufffd", "Paris", "France", False),
        (" \\", "Italy", "France", False),
        (" ΟΔΟΣ", "Italy", "France", False),
        (" x", "", "", True),
    ],
)
def test_when_a_source_is_decided(text: str, counter: str, parametric: str, decided: bool) -> None:
    assert is_decided(text, counter, parametric) is decided


def test_the_published_rule_decides_earlier() -> None:
    """It asks for the counter-object first, and looks no further."""
    assert is_decided(" New York ", "New York", "New York City", counter_first=True)


@some
@given(object_names(), object_names(), st.text(max_size=12))
def test_texts_of_any_characters(counter: str, parametric: str, text: str) -> None:
    for n in range(len(text) + 1):
        if is_decided(text[:n], counter, parametric):
            assert knowledge_source(text[:n], counter, parametric) == knowledge_source(
                text, counter, parametric
            )
