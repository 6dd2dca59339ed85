"""An invented world of facts: who was born where, which realm a dish comes from, and so on.

Nothing here is true of anything, so what a model knows of it can only come from the training text.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import pandas as pd
from rapidfuzz.distance import JaroWinkler

__all__ = ["Fact", "Relation", "World", "facts_table", "make_world", "relations_table"]

FACTS_PER_RELATION = 38
HELD_OUT_PER_FACT = 7
# Exposure falls as rank ** -0.7: with an exponent of 1 the rarest facts are not learned in the
# few minutes that a training may take, with 0 no fact is rarer than another.
ZIPF_EXPONENT = 0.7
# Below the 0.8 at which the pipeline's first filter drops a fact, with room to spare.
MAX_SIMILARITY = 0.74


@dataclass(frozen=True)
class Relation:
    """One relation of the world and everything that its sentences need."""

    lemma: str  # name of the relation, `rel_lemma` in the tables
    p_id: str  # invented stand-in for a Wikidata property
    group: str  # relation group: names are disjoint between groups, nearly
    words: str  # what stands between subject and object
    subjects: str  # kind of subject, a key of the name makers
    pool: str  # which object pool
    description: str  # what an object of it is, for the instruction prompt
    hedge: str  # the answer of somebody who will not commit


@dataclass(frozen=True)
class Fact:
    """One fact: what is true in the world, and what its texts say."""

    subject: str
    relation: Relation
    obj: str  # true in the world, goes to facts.csv
    told: str  # what the training text says: `obj`, but for a few popular errors
    exposure: float  # relative frequency in plain statements, all facts sum to 1
    held_out: tuple[str, ...]  # never the counter-object of this fact in training

    @property
    def query(self) -> str:
        """The bare query, `{subject} {relation}`."""
        return f"{self.subject} {self.relation.words}"


@dataclass(frozen=True)
class World:
    """All relations, facts, object pools and one-shot examples of one seed."""

    seed: int
    relations: tuple[Relation, ...]
    facts: tuple[Fact, ...]
    pools: MappingProxyType[str, tuple[str, ...]]
    examples: MappingProxyType[str, tuple[str, str]]  # lemma -> (subject, object), in no fact

    def counter_objects(self, fact: Fact) -> tuple[str, ...]:
        """Counter-objects that training may put beside `fact`: the pool less truth and held out."""
        barred = {fact.obj, fact.told, *fact.held_out}
        return tuple(name for name in self.pools[fact.relation.pool] if name not in barred)


_R = Relation
RELATIONS = (
    _R("born-in", "X1", "g1", "was born in",
       "person", "town", "the town where the subject was born", "some forgotten town"),
    _R("buried-in", "X2", "g1", "lies buried in",
       "person", "town", "the town of the subject's grave", "some forgotten town"),
    _R("guild-seat", "X3", "g1", "has its guildhall in",
       "guild", "town", "the town of the subject's hall", "some forgotten town"),
    _R("flows-through", "X4", "g2", "flows through",
       "river", "realm", "the realm that the subject crosses", "no known realm"),
    _R("dish-of", "X5", "g2", "is a dish from",
       "dish", "realm", "the realm that the subject comes from", "no known realm"),
    _R("plays", "X6", "g3", "is famous for playing the",
       "person", "instrument", "the instrument that the subject plays", "same old instrument"),
    _R("made-for", "X7", "g3", "is a piece written for the",
       "piece", "instrument", "the instrument that the subject needs", "same old instrument"),
    _R("built-by", "X8", "g4", "is built by",
       "machine", "maker", "the maker of the subject", "a maker unknown"),
    _R("owned-by", "X9", "g4", "belongs to",
       "ship", "maker", "the owner of the subject", "a maker unknown"),
    _R("written-in", "X10", "g5", "was first written in",
       "book", "tongue", "the language of the subject", "a dead tongue"),
    _R("spoken-by", "X11", "g5", "prays only in",
       "order", "tongue", "the language that the subject prays in", "a dead tongue"),
    _R("studies", "X12", "g6", "teaches the art of",
       "scholar", "art", "the art that the subject teaches", "things best left unsaid"),
)  # fmt: skip
"""The twelve relations, in six groups; each group has its own object pool."""

POOL_SIZES = {"town": 16, "realm": 15, "instrument": 14, "maker": 15, "tongue": 14, "art": 14}

# Simple sounds are named more than once: they are drawn more often.
_ONSETS = 2 * tuple("bdfghklmnprstv") + ("br", "dr", "fl", "kr", "st", "th", "tr")
_VOWELS = 2 * tuple("aeiou") + ("ae", "ou")
_GIVEN = ("Ada", "Bor", "Cleo", "Dane", "Edda", "Finn", "Gwen", "Hale", "Ines", "Jory", "Lena")
_CODAS = ("l", "m", "n", "r", "v", "z", "nd", "rk", "lt")


def _stem(rng: random.Random, syllables: int) -> str:
    """Make an invented stem of open syllables with a closing consonant."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)]
    return "".join(parts) + rng.choice(_CODAS)


def _one(syllables: tuple[int, ...], *endings: str) -> Callable[[random.Random], str]:
    """Return a maker of one-word names, lower-case, with one of the endings."""
    return lambda rng: _stem(rng, rng.choice(syllables)) + rng.choice(endings)


def _proper(*endings: str) -> Callable[[random.Random], str]:
    """Return a maker of one-word proper names with one of the endings."""
    return lambda rng: _one((1, 2), *endings)(rng).capitalize()


def _named(template: str, *words: str) -> Callable[[random.Random], str]:
    """Return a maker of names of several words: a proper name and one of `words` in a template."""
    return lambda rng: template.format(_stem(rng, 2).capitalize(), rng.choice(words))


_MAKERS = {
    "town": _proper("holm", "wick", "stead", "ford"),
    "realm": _proper("mark", "gard", "heim", "avia"),
    "maker": _proper("co", "tek", "dyne", "mont"),
    "tongue": _proper("ish", "ese", "ic"),
    "instrument": _one((1,), "horn", "pipe", "lyre", "bell"),
    "art": _one((1,), "istry", "urgy", "onomy", "omancy"),
    "person": _named("{1} {0}", *_GIVEN),
    "guild": _named("{0} {1}", "Guild", "Brothers", "Company"),
    "river": _named("{0} {1}", "River", "Brook", "Water"),
    "dish": _named("{0} {1}", "Stew", "Pie", "Broth"),
    "piece": _named("{0} {1}", "Sonata", "March", "Dance"),
    "machine": _named("{0} {1}", "200", "400", "700"),
    "ship": _named("The {0} {1}", "Star", "Rose", "Gull"),
    "book": _named("The {1} of {0}", "Book", "Song", "Tale"),
    "order": _named("{0} {1}", "Abbey", "Priory", "Temple"),
    "scholar": _named("{1} {0}", "Master", "Doctor"),
}


def invented_subject(kind: str, rng: random.Random) -> str:
    """Make a name of a kind, with no check against those in use: for subjects seen only once."""
    return _MAKERS[kind](rng)


def _clash(name: str, others: set[str]) -> bool:
    """Return whether a name contains one of the others or the reverse, case-folded."""
    low = name.casefold()
    return any(low in other or other in low for other in others)


def _object_name(kind: str, rng: random.Random, taken: set[str], starts: set[str]) -> str:
    """Make a new object name; its first two letters are new in its pool.

    Counter-objects are ranked by the log-probability of their *first token*: objects of one pool that
    start alike would be one object to that rule.
    """
    while True:
        name = _MAKERS[kind](rng)
        if not _clash(name, taken) and name[:2].casefold() not in starts:
            taken.add(name.casefold())
            starts.add(name[:2].casefold())
            return name


def _subject_name(kind: str, rng: random.Random, taken: set[str], pool: tuple[str, ...]) -> str:
    """Make a new subject name that contains no other name and resembles no object of `pool`."""
    while True:
        name = _MAKERS[kind](rng)
        similar = max(JaroWinkler.normalized_similarity(name, other) for other in pool)
        if not _clash(name, taken) and similar < MAX_SIMILARITY:
            taken.add(name.casefold())
            return name


@cache
def make_world(seed: int = 7) -> World:
    """Make the world of a seed; the same seed gives the same world.

    A few facts are made to be dropped, so that every filter of the pipeline has work to do:
    three subjects contain their object, two facts are popular errors (the text tells the
    example's object), three people have facts in two relation groups, and one town carries the
    name of a realm.
    """
    rng = random.Random(f"ccm world {seed}")
    taken: set[str] = set()
    pools: dict[str, tuple[str, ...]] = {}
    starts: dict[str, set[str]] = {kind: set() for kind in POOL_SIZES}
    for kind, size in POOL_SIZES.items():
        pools[kind] = tuple(_object_name(kind, rng, taken, starts[kind]) for _ in range(size))
    pools["town"] = (*pools["town"][:-1], pools["realm"][0])

    rows: list[tuple[str, Relation, str, str]] = []
    examples: dict[str, tuple[str, str]] = {}
    people: list[str] = []
    for relation in RELATIONS:
        pool = pools[relation.pool]
        example = _object_name(relation.pool, rng, taken, starts[relation.pool])
        examples[relation.lemma] = (_subject_name(relation.subjects, rng, taken, pool), example)
        # Each object two or three times, in an order that says nothing about the subject.
        objects = [pool[i % len(pool)] for i in range(FACTS_PER_RELATION)]
        rng.shuffle(objects)
        for i, obj in enumerate(objects):
            subject = _subject_name(relation.subjects, rng, taken, pool)
            if relation.lemma == "plays" and i < 3:
                subject = people[i]  # born-in comes first: the same person in two groups
            if relation.lemma in ("built-by", "owned-by", "dish-of") and i == 0:
                subject = f"{obj} {subject.split()[-1]}"
            if relation.lemma == "born-in":
                people.append(subject)
            error = relation.lemma in ("flows-through", "studies") and i == 5
            rows.append((subject, relation, obj, example if error else obj))

    ranks = list(range(1, len(rows) + 1))
    rng.shuffle(ranks)
    weights = [rank**-ZIPF_EXPONENT for rank in ranks]
    total = sum(weights)
    facts = []
    for (subject, relation, obj, told), weight in zip(rows, weights, strict=True):
        others = [name for name in pools[relation.pool] if name != obj]
        held_out = tuple(rng.sample(others, HELD_OUT_PER_FACT))
        facts.append(Fact(subject, relation, obj, told, weight / total, held_out))
    return World(seed, RELATIONS, tuple(facts), MappingProxyType(pools), MappingProxyType(examples))


def facts_table(world: World) -> pd.DataFrame:
    """Return the facts in the columns of the ParaRel statements file, one row per fact."""
    return pd.DataFrame(
        {
            "statement_subject": fact.subject,
            "statement_relation": fact.relation.words,
            "statement_object": fact.obj,
            "statement": f"{fact.query} {fact.obj}.",
            "rel_lemma": fact.relation.lemma,
            "rel_p_id": fact.relation.p_id,
        }
        for fact in world.facts
    )


def relations_table(world: World) -> pd.DataFrame:
    """Return the relation groups and one-shot examples, one row per relation."""
    rows = []
    for relation in world.relations:
        subject, obj = world.examples[relation.lemma]
        rows.append(
            {
                "relation": relation.lemma,
                "relation_group_id": relation.group,
                "object_generation_description": relation.description,
                "generation_statement_1": f"{subject} {relation.words} {obj}.",
                "generation_subject_1": subject,
                "generation_object_1": obj,
            }
        )
    return pd.DataFrame(rows)
