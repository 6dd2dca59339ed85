"""The prompt templates, and the pure steps from the model's answers to probing prompts.

Method 4: ask for the parametric object, filter, choose counter-objects, build the prompts.
Nothing here runs a model; `ccm.experiment.probing` passes the model's answers in.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from ccm.errors import a_few, listed
from ccm.method.facts import Fact, Relation

# An answer ends at the first of these (Method 4.2); `\n` both as a newline and spelled out.
SPLITTER = re.compile(r'"|\.|\n|\\n|,|\(|\[|\]|\<')
HOLDS_SPLITTER = 'the object holds one of " . , ( [ ] < or a line break, where every answer ends'
MAX_SIMILARITY = 0.8  # Jaro-Winkler, from which subject and object count as the same name
N_COUNTER_OBJECTS = 3


def answer_object(text: str) -> str:
    """Return the object an answer names: the text up to the first splitter match, stripped.

    >>> answer_object(" Rome. Paris is")
    'Rome'
    """
    return SPLITTER.split(text, maxsplit=1)[0].strip()


def same_name(name: str) -> str:
    """Return a name stripped and in lower case; two spellings with one result are the same object."""
    return name.strip().lower()


def holds_splitter(name: str) -> bool:
    """Return whether an object holds a splitter, before which every answer that names it ends.

    >>> holds_splitter("St. Louis"), holds_splitter("Saint Louis")
    (True, False)
    """
    return SPLITTER.search(name.strip()) is not None


@dataclass(frozen=True)
class SplitObjects:
    """Objects that no answer can name: they are never recalled, and never matched."""

    count: int  # facts or prompts with such an object
    of: int  # all facts or prompts
    names: tuple[str, ...]  # distinct, in the first spelling of each


def split_objects(names: Sequence[str]) -> SplitObjects:
    """Find the objects that hold a splitter, among those of facts or of prompts."""
    held = [name for name in names if holds_splitter(name)]
    spelling: dict[str, str] = {}
    for name in held:
        spelling.setdefault(same_name(name), name)
    return SplitObjects(len(held), len(names), tuple(spelling.values()))


def never_recalled(found: Mapping[str, Any]) -> str:
    """Say which facts no answer can recall (`SplitObjects` as a mapping)."""
    return (
        f"{found['count']:,} of {found['of']:,} facts can never be recalled, since {HOLDS_SPLITTER}: "
        f"{a_few(found['names'])}"
    )


def never_matched(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Say which prompts name an object that no answer can match (`SplitObjects` by column)."""
    some = [
        f"{column} of {found['count']:,} of {found['of']:,} prompts ({a_few(found['names'])})"
        for column, found in columns.items()
        if found["count"]
    ]
    return f"{listed(some)} can never be matched, since {HOLDS_SPLITTER}"


# --- parametric prompts -----------------------------------------------------------------------


Turns = Sequence[Mapping[str, str]]  # `role` and `content` of each message of a conversation
Chat = Callable[[Turns], str]  # a tokenizer's own markup of them, up to where the next answer begins


def _instruction(subject: str, relation: Relation) -> str:
    what = relation.description.replace("the subject", subject)
    return (
        f"Complete the following statement directly and concisely with {what}. "
        "Give nothing else and end the output with a period."
    )


def _instructed(fact: Fact, relation: Relation) -> str:
    return f"{_instruction(fact.subject, relation)}\n\n{fact.query}"


def _llama2(fact: Fact, relation: Relation) -> str:
    shown = f"{relation.example_query} [/INST]{relation.example_object}.\n"
    example = shown if relation.example_query else "[/INST]"
    instruction = _instruction(fact.subject, relation)
    return f"<s>[INST] <<SYS>>\n{instruction}\n<</SYS>>\n\n{example}{fact.query}"


def _own(fact: Fact, relation: Relation, chat: Chat) -> str:
    """Instruction, example and query as turns: the answer begins with the query."""
    turns = []
    if relation.example_query:
        shown = f"{relation.example_query} {relation.example_object}."
        turns = [
            {"role": "user", "content": _instruction(relation.example_subject, relation)},
            {"role": "assistant", "content": shown},
        ]
    asked = {"role": "user", "content": _instruction(fact.subject, relation)}
    return chat([*turns, asked]) + fact.query


OWN = "own"
TEMPLATES: Mapping[str, Callable[..., str]] = {
    "bare": lambda fact, relation: fact.query,
    "instruction": _instructed,
    OWN: _own,
    "llama2": _llama2,
}
TEMPLATE_ALIASES = {"chat": "llama2"}  # its earlier name


def parametric_prompt(template: str, fact: Fact, relation: Relation, chat: Chat | None = None) -> str:
    """Return the prompt that asks a model for a fact's object (Method 4.1).

    Args:
        template: A key of `TEMPLATES`: `bare` is the query alone, `instruction` is GPT-2's, `llama2`
            that of the other four models, `own` the same question in the tokenizer's own markup.
        fact: The fact.
        relation: Its relation.
        chat: The tokenizer's markup; None if it has none: `own` is then `instruction`.
    """
    if template != OWN:
        return TEMPLATES[template](fact, relation)
    return _instructed(fact, relation) if chat is None else _own(fact, relation, chat)


@dataclass(frozen=True, slots=True)
class ParametricAnswer:
    """What the model itself says about a fact."""

    row: int  # row of the fact in its file, so that filters can be checked against row numbers
    fact: Fact
    prompt: str  # the parametric prompt
    text: str  # the continuation
    object: str  # parametric object, in the case the model generated
    first_token: int  # the first new token, as generated

    @property
    def recalled(self) -> bool:
        """Whether the parametric object is the true one."""
        return same_name(self.object) == same_name(self.fact.object)


# --- filters (Method 4.3) -----------------------------------------------------------------------


def filter_subject_object(answers: Sequence[ParametricAnswer]) -> list[ParametricAnswer]:
    """Drop facts whose subject and parametric object share a name (Method 4.3a).

    One contains the other, in lower case, or their Jaro-Winkler similarity is >= 0.8. For the latter
    the subject is as written and the object in lower case, as in the released code, because which rows
    stay depends on it. An empty parametric object is contained in every subject, so it is dropped too.
    """
    from rapidfuzz.distance import JaroWinkler

    def distinct(answer: ParametricAnswer) -> bool:
        subject, object_ = same_name(answer.fact.subject), same_name(answer.object)
        if subject in object_ or object_ in subject:
            return False
        return JaroWinkler.normalized_similarity(answer.fact.subject, object_) < MAX_SIMILARITY

    return [a for a in answers if distinct(a)]


def filter_examples(
    answers: Sequence[ParametricAnswer], relations: Mapping[str, Relation]
) -> list[ParametricAnswer]:
    """Drop facts whose answer merely repeats the one-shot example and is wrong (Method 4.3b)."""

    def own(answer: ParametricAnswer) -> bool:
        relation = relations[answer.fact.relation]
        example = {same_name(relation.example_object), same_name(relation.example_subject)}
        return same_name(answer.object) not in example or answer.recalled

    return [a for a in answers if own(a)]


def filter_relation_groups(
    answers: Sequence[ParametricAnswer], relations: Mapping[str, Relation]
) -> list[ParametricAnswer]:
    """Drop facts, in order, whose subject or object another relation group still uses (Method 4.3c).

    Order matters: a dropped fact no longer counts for those after it. Instead of comparing each fact
    with all others, the kept facts are counted by (name, group) and by name, and a dropped fact is
    subtracted again: a name occurs elsewhere if its total exceeds its count in the fact's own group.
    """
    group = {name: r.group for name, r in relations.items()}
    in_group: Counter[tuple[str, str, str]] = Counter()
    in_all: Counter[tuple[str, str]] = Counter()

    def names(answer: ParametricAnswer) -> list[tuple[str, str]]:
        return [("subject", same_name(answer.fact.subject)), ("object", same_name(answer.object))]

    def count(answer: ParametricAnswer, step: int) -> None:
        for name in names(answer):
            in_group[(*name, group[answer.fact.relation])] += step
            in_all[name] += step

    for answer in answers:
        count(answer, +1)
    kept = []
    for answer in answers:
        own = group[answer.fact.relation]
        if any(in_all[name] > in_group[(*name, own)] for name in names(answer)):
            count(answer, -1)
        else:
            kept.append(answer)
    return kept


def filter_answers(
    answers: Sequence[ParametricAnswer], relations: Mapping[str, Relation]
) -> list[ParametricAnswer]:
    """Apply the three filters in their order (Method 4.3)."""
    kept = filter_examples(filter_subject_object(answers), relations)
    return filter_relation_groups(kept, relations)


# --- counter-objects and probing prompts (Method 4.4, 4.5) ----------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """An object of a relation that may contradict another fact of it."""

    object: str  # first spelling seen
    first_token: int  # first new token of the last fact that was answered with it


def counter_candidates(answers: Sequence[ParametricAnswer]) -> dict[str, list[Candidate]]:
    """List the distinct parametric objects of each relation, in order of first occurrence."""
    spelling: dict[str, dict[str, str]] = defaultdict(dict)
    token: dict[str, int] = {}
    for answer in answers:
        key = same_name(answer.object)
        spelling[answer.fact.relation].setdefault(key, answer.object)
        token[key] = answer.first_token
    return {
        relation: [Candidate(object_, token[key]) for key, object_ in objects.items()]
        for relation, objects in spelling.items()
    }


def counter_objects(
    answer: ParametricAnswer, candidates: Sequence[Candidate], log_probs: Sequence[float]
) -> list[tuple[Candidate, float]]:
    """Choose the 3 other objects whose first token is least likely under the fact's own prompt.

    Args:
        answer: The fact to contradict.
        candidates: All objects of its relation, its own included, in insertion order.
        log_probs: Log-probability of each candidate's first token, nats. Ties keep the order.

    Returns:
        Up to 3 (candidate, log-probability), least likely first.
    """
    own = same_name(answer.object)
    others = [
        (candidate, float(log_prob))
        for candidate, log_prob in zip(candidates, log_probs, strict=True)
        if same_name(candidate.object) != own
    ]
    return sorted(others, key=lambda pair: pair[1])[:N_COUNTER_OBJECTS]


@dataclass(frozen=True, slots=True)
class ProbingPrompt:
    """A prompt whose context contradicts what the model knows (Method 4.5)."""

    subject: str
    relation: str
    group: str
    query: str
    counter_object: str  # CK
    parametric_object: str  # PK
    counter_first_token: int  # as generated; only the released protocol reads it
    parametric_first_token: int
    text: str
    log_prob_counter: float = -inf  # first-token log-probabilities under the parametric prompt, nats
    log_prob_parametric: float = -inf


def probing_text(query: str, counter_object: str) -> str:
    """Return `"{query} {counter object}. {query}"`.

    >>> probing_text("Paris is the capital of", "Italy")
    'Paris is the capital of Italy. Paris is the capital of'
    """
    return f"{query} {counter_object}. {query}"


def probing_prompts(
    answer: ParametricAnswer,
    relation: Relation,
    chosen: Sequence[tuple[Candidate, float]],
    log_prob_parametric: float,
    *,
    lower_case: bool = False,
) -> list[ProbingPrompt]:
    """Build one probing prompt per counter-object.

    Args:
        answer: The fact.
        relation: Its relation.
        chosen: From `counter_objects`.
        log_prob_parametric: Of the fact's own first token, nats.
        lower_case: Store objects in lower case as the released code does (defect 11).
    """

    def stored(name: str) -> str:
        return name.lower() if lower_case else name

    return [
        ProbingPrompt(
            subject=answer.fact.subject,
            relation=answer.fact.relation,
            group=relation.group,
            query=answer.fact.query,
            counter_object=stored(candidate.object),
            parametric_object=stored(answer.object),
            counter_first_token=candidate.first_token,
            parametric_first_token=answer.first_token,
            text=probing_text(answer.fact.query, stored(candidate.object)),
            log_prob_counter=log_prob,
            log_prob_parametric=log_prob_parametric,
        )
        for candidate, log_prob in chosen
    ]
