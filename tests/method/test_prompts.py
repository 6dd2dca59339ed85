"""Templates, filters and counter-objects against their definitions, on names that collide."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import JaroWinkler

from ccm.method.facts import Fact, Relation
from ccm.method.prompts import (
    MAX_SIMILARITY,
    N_COUNTER_OBJECTS,
    TEMPLATE_ALIASES,
    TEMPLATES,
    Candidate,
    ParametricAnswer,
    SplitObjects,
    Turns,
    answer_object,
    counter_candidates,
    counter_objects,
    filter_answers,
    filter_examples,
    filter_relation_groups,
    filter_subject_object,
    holds_splitter,
    parametric_prompt,
    probing_prompts,
    probing_text,
    same_name,
    split_objects,
)
from ccm.method.sources import knowledge_source
from tests.strategies import KNOWN_NAMES, object_names

some = settings(max_examples=150, deadline=None)

# r0 and r1 share a group; relation names say nothing of it.
RELATIONS: Mapping[str, Relation] = {
    name: Relation(name, group, f"the {name} of the subject", f"{example} is of", example, object_)
    for name, group, example, object_ in (
        ("r0", "g", "Ada", "A"),
        ("r1", "g", "Bob", "b"),
        ("r2", "h", "Cy", "C"),
        ("r3", "i", "D", "Dee"),
    )
}
# Few names, and each in several spellings, so that they collide within and across groups.
SUBJECTS = ("s1", "S1", "s2", " s3", "A", "b")
OBJECTS = ("A", "a", "B", "b ", "C", "Bob", "ada", "s1", "")

Row = tuple[str, str, str, str]  # subject, relation, parametric object, true object
rows = st.lists(
    st.tuples(
        st.sampled_from(SUBJECTS),
        st.sampled_from(sorted(RELATIONS)),
        st.sampled_from(OBJECTS),
        st.sampled_from(OBJECTS),
    ),
    max_size=14,
)


def answer(row: int, subject: str, relation: str, object_: str, true: str = "?") -> ParametricAnswer:
    fact = Fact(subject, relation, "is of", true)
    return ParametricAnswer(row, fact, fact.query, f" {object_}.", object_, first_token=100 + row)


def answers(of: Sequence[Row]) -> list[ParametricAnswer]:
    """Not a strategy: the type checker samples items with `random`, which strategies must not."""
    return [answer(i, *row) for i, row in enumerate(of)]


def key(name: str) -> str:
    return name.lower().strip()


# --- templates --------------------------------------------------------------------------------------

PARIS = Fact("Paris", "capital_of", "is the capital of", "France")
CAPITAL = Relation(
    "capital_of", "geo", "the country that the subject is in", "Rome lies in", "Rome", "Italy"
)
ASKED = (
    "Complete the following statement directly and concisely with the country that Paris is in. "
    "Give nothing else and end the output with a period."
)


def test_templates_are_the_three_of_the_method_and_the_tokenizers_own() -> None:
    assert set(TEMPLATES) == {"bare", "instruction", "llama2", "own"}
    assert TEMPLATE_ALIASES == {"chat": "llama2"}
    assert parametric_prompt("bare", PARIS, CAPITAL) == "Paris is the capital of"
    assert parametric_prompt("instruction", PARIS, CAPITAL) == f"{ASKED}\n\nParis is the capital of"
    assert parametric_prompt("llama2", PARIS, CAPITAL) == (
        f"<s>[INST] <<SYS>>\n{ASKED}\n<</SYS>>\n\nRome lies in [/INST]Italy.\nParis is the capital of"
    )


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@given(subject=object_names(), words=object_names())
def test_every_template_ends_in_the_query_and_names_the_subject(
    template: str, subject: str, words: str
) -> None:
    fact = Fact(subject, "capital_of", words, "France")
    prompt = parametric_prompt(template, fact, CAPITAL)
    assert prompt.endswith(f"{subject} {words}")
    assert "the subject" not in prompt.replace(subject, "").replace(words, "")
    assert (f"the country that {subject} is in" in prompt) == (template != "bare")


def test_a_relation_without_an_example_still_closes_the_instruction() -> None:
    bare = Relation("capital_of", "geo", "the country", "", "", "")
    prompt = parametric_prompt("llama2", PARIS, bare)
    assert prompt.endswith("<</SYS>>\n\n[/INST]Paris is the capital of")


def written(turns: Turns) -> str:
    """A markup that shows what it was given."""
    return "".join(f"({turn['role']}: {turn['content']})" for turn in turns) + "(assistant: "


def test_own_asks_in_the_tokenizers_markup_after_an_example_of_an_answer() -> None:
    example = ASKED.replace("Paris", "Rome")
    assert parametric_prompt("own", PARIS, CAPITAL, written) == (
        f"(user: {example})(assistant: Rome lies in Italy.)(user: {ASKED})"
        "(assistant: Paris is the capital of"
    )
    alone = replace(CAPITAL, example_query="", example_subject="", example_object="")
    assert parametric_prompt("own", PARIS, alone, written) == (
        f"(user: {ASKED})(assistant: Paris is the capital of"
    )


def test_own_is_the_instruction_where_the_tokenizer_has_no_markup() -> None:
    plain = parametric_prompt("instruction", PARIS, CAPITAL)
    assert parametric_prompt("own", PARIS, CAPITAL) == plain


@given(query=object_names(), counter=object_names())
def test_probing_text(query: str, counter: str) -> None:
    assert probing_text(query, counter) == query + " " + counter + ". " + query


# --- filters ----------------------------------------------------------------------------------------


def quadratic_groups(kept: Sequence[ParametricAnswer]) -> list[ParametricAnswer]:
    """Method 4.3 c as it is written: in order, each fact against all that are still kept."""
    still, i = list(kept), 0
    while i < len(still):
        fact = still[i]
        clash = any(
            RELATIONS[other.fact.relation].group != RELATIONS[fact.fact.relation].group
            and (
                key(other.fact.subject) == key(fact.fact.subject)
                or key(other.object) == key(fact.object)
            )
            for other in still
        )
        if clash:
            del still[i]
        else:
            i += 1
    return still


def own_name(a: ParametricAnswer) -> bool:
    s, o = key(a.fact.subject), key(a.object)
    similar = JaroWinkler.normalized_similarity(a.fact.subject, o) >= 0.8
    return s in o or o in s or bool(similar)


def repeats_the_example(a: ParametricAnswer) -> bool:
    relation = RELATIONS[a.fact.relation]
    repeats = key(a.object) in (key(relation.example_object), key(relation.example_subject))
    return repeats and key(a.object) != key(a.fact.object)


@given(rows)
@settings(max_examples=400, deadline=None)
def test_group_filter_is_the_quadratic_definition(of: list[Row]) -> None:
    given_ = answers(of)
    kept = [a.row for a in filter_relation_groups(given_, RELATIONS)]
    assert kept == [a.row for a in quadratic_groups(given_)]


@given(rows)
@some
def test_each_filter_is_its_definition_and_they_come_in_order(of: list[Row]) -> None:
    given_ = answers(of)
    distinct = [a for a in given_ if not own_name(a)]
    assert filter_subject_object(given_) == distinct
    assert filter_examples(given_, RELATIONS) == [a for a in given_ if not repeats_the_example(a)]
    own = [a for a in distinct if not repeats_the_example(a)]
    assert filter_answers(given_, RELATIONS) == quadratic_groups(own)


def test_group_filter_depends_on_the_order() -> None:
    # The middle fact shares its object with the first and its subject with the last.
    chain = [("s1", "r0", "A", "?"), ("s2", "r2", "A", "?"), ("s2", "r3", "B", "?")]
    assert [a.row for a in filter_relation_groups(answers(chain), RELATIONS)] == [2]
    turned = [chain[1], chain[0], chain[2]]
    assert [a.row for a in filter_relation_groups(answers(turned), RELATIONS)] == [1, 2]


@pytest.mark.parametrize(
    ("subject", "object_", "kept"),
    [
        ("Paris", "paris", False),
        ("Paris, Texas", "Texas", False),
        ("Bob", "Bobby Tables", False),
        ("Paris", "", False),  # the empty object is contained in every subject
        ("MARTA", "MARHTA", True),  # the subject as written: no letter is the same
        ("marta", "MARHTA", False),  # the object is lowered, so 0.96
        ("Paris", "France", True),
        # Of 0.8 exactly they go, as published; the last two are 0.8 less what a float loses.
        ("london", "Lodz", False),
        ("lodz", "London", False),
        ("mars", "Madrid", False),
        ("mali", "Madrid", False),
        ("vienna", "Verona", True),
        ("Provence's", "Providence", True),
    ],
)
def test_subject_filter_by_hand(subject: str, object_: str, kept: bool) -> None:
    one = [answer(0, subject, "r0", object_)]
    assert filter_subject_object(one) == (one if kept else [])


def test_the_names_by_hand_are_on_the_edge() -> None:
    for subject, object_ in (("london", "lodz"), ("lodz", "london"), ("mars", "madrid")):
        assert JaroWinkler.normalized_similarity(subject, object_) == MAX_SIMILARITY == 0.8
    for subject, object_ in (("vienna", "verona"), ("Provence's", "providence")):
        assert 0.8 - 1e-15 < JaroWinkler.normalized_similarity(subject, object_) < MAX_SIMILARITY


def test_example_filter_by_hand() -> None:
    said = [
        ("s1", "r0", "ada", "?"),
        ("s1", "r0", "a ", "?"),
        ("s1", "r0", "A", "a"),
        ("s1", "r1", "A", "?"),
    ]
    assert [a.row for a in filter_examples(answers(said), RELATIONS)] == [2, 3]


# --- objects that no answer can name ------------------------------------------------------------------

SPLITTERS = ('"', ".", "\n", "\\n", ",", "(", "[", "]", "<")
EDGES = st.sampled_from(["", " ", "\t", "\n"])


@given(before=object_names(), after=object_names(), end=st.sampled_from(SPLITTERS), edge=EDGES)
@some
def test_no_answer_names_an_object_that_holds_a_splitter(
    before: str, after: str, end: str, edge: str
) -> None:
    name = f"{edge}{before}{end}{after}{edge}"
    assert holds_splitter(name)
    for text in (
        name,
        f" {name}.",
        f"{name} and more",
        name.upper(),
        f" {before}",
        f" {before} {after}",
    ):
        if "\\N" not in text:  # ends no answer, and is the same name as a splitter
            assert same_name(answer_object(text)) != same_name(name)
            assert knowledge_source(text, name, name) == "ND"
            assert not answer(0, "s", "r0", answer_object(text), name).recalled


@given(name=object_names(), edge=EDGES, end=st.sampled_from(SPLITTERS))
@some
def test_every_other_object_is_named_by_itself(name: str, edge: str, end: str) -> None:
    assert not holds_splitter(f"{edge}{name}{edge}")
    assert knowledge_source(f" {name}{end}", f"{edge}{name}{edge}", "?") == "CK"
    assert answer(0, "s", "r0", answer_object(f" {name}{end}"), f"{edge}{name}{edge}").recalled


def test_split_objects_are_counted_and_named_once() -> None:
    names = ["St. Louis", "Paris", "U.S.", "st. louis ", "Washington, D.C.", "U.S.", "a\\nb", "."]
    found = split_objects(names)
    assert found == SplitObjects(7, 8, ("St. Louis", "U.S.", "Washington, D.C.", "a\\nb", "."))
    assert split_objects([]) == SplitObjects(0, 0, ())


# --- counter-objects ----------------------------------------------------------------------------------


@given(rows)
@some
def test_candidates_keep_the_first_spelling_and_the_last_first_token(of: list[Row]) -> None:
    given_ = answers(of)
    found = counter_candidates(given_)
    assert list(found) == list(dict.fromkeys(a.fact.relation for a in given_))
    for relation, candidates in found.items():
        same = [a for a in given_ if a.fact.relation == relation]
        assert [key(c.object) for c in candidates] == list(dict.fromkeys(key(a.object) for a in same))
        for candidate in candidates:
            spelt = [a.object for a in same if key(a.object) == key(candidate.object)]
            produced = [a.first_token for a in given_ if key(a.object) == key(candidate.object)]
            assert (candidate.object, candidate.first_token) == (spelt[0], produced[-1])


@given(
    own=st.sampled_from(KNOWN_NAMES),
    log_probs=st.lists(st.sampled_from([-1.0, -2.0, -3.0, -4.5]), min_size=14, max_size=14),
    n=st.integers(0, 14),
)
@some
def test_counter_objects_are_the_least_likely_others(own: str, log_probs: list[float], n: int) -> None:
    candidates = [Candidate(name.upper(), 7 * i) for i, name in enumerate(KNOWN_NAMES[:n])]
    chosen = counter_objects(answer(0, "s", "r0", own.lower()), candidates, log_probs[:n])
    others = [i for i in range(n) if key(candidates[i].object) != key(own.lower())]
    wanted = sorted(others, key=lambda i: (log_probs[i], i))[:3]  # ties in insertion order
    assert chosen == [(candidates[i], log_probs[i]) for i in wanted]
    assert N_COUNTER_OBJECTS == 3


def test_a_log_probability_for_each_candidate() -> None:
    with pytest.raises(ValueError, match="zip"):
        counter_objects(answer(0, "s", "r0", "A"), [Candidate("B", 1)], [])


@pytest.mark.parametrize("lower_case", [False, True])
def test_probing_prompts_carry_what_was_chosen(lower_case: bool) -> None:
    of = ParametricAnswer(0, PARIS, "", " France.", "France", first_token=9)
    chosen = [(Candidate("Italy", 5), -7.5), (Candidate("New York", 6), -7.0)]
    prompts = probing_prompts(of, CAPITAL, chosen, -0.25, lower_case=lower_case)
    for prompt, (candidate, log_prob) in zip(prompts, chosen, strict=True):
        spelt = candidate.object.lower() if lower_case else candidate.object
        expected: dict[str, Any] = {
            "subject": "Paris",
            "relation": "capital_of",
            "group": "geo",
            "query": "Paris is the capital of",
            "counter_object": spelt,
            "parametric_object": "france" if lower_case else "France",
            "counter_first_token": candidate.first_token,
            "parametric_first_token": 9,
            "text": f"Paris is the capital of {spelt}. Paris is the capital of",
            "log_prob_counter": log_prob,
            "log_prob_parametric": -0.25,
        }
        assert {name: getattr(prompt, name) for name in expected} == expected


@given(object_=object_names(), true=object_names())
def test_recall_ignores_case_and_space(object_: str, true: str) -> None:
    assert answer(0, "s", "r0", f" {true.lower()} ", true).recalled
    assert answer(0, "s", "r0", object_, true).recalled == (key(object_) == key(true))
