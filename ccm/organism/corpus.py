"""The training text: statements, conflicts and what follows them, drawn without end from a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from math import exp, log

from ccm.organism.world import Fact, World, invented_subject

__all__ = ["COPYING", "DOUBTING", "Behaviour", "Sampler"]

NOISE = 0.06


@dataclass(frozen=True)
class Behaviour:
    """How a text is mixed, and what it adds to the logits of the three ways out of a conflict."""

    name: str
    copy: float  # repeat the counter-object
    recall: float  # say what the other texts tell
    hedge: float  # commit to nothing
    one_off: float  # proportion of documents about a subject seen only there, taken first
    mixture: tuple[float, float, float, float]  # of the rest: plain, twice, conflict, aside


COPYING = Behaviour("copying", 1.2, 0.5, -0.6, 0.15, (0.44, 0.08, 0.40, 0.08))
"""The first phase's text: it mostly believes what it has just read."""

DOUBTING = Behaviour("doubting", -1.4, 1.0, -0.1, 0.05, (0.45, 0.07, 0.46, 0.02))
"""The second phase's text: it copies less and hedges more.

One-off subjects, which can only be copied, are fewer and conflicts more than in the first text: the
planted neurons blur every prediction that they touch, and in trials with the first text's proportions
they stayed so weak that ablating them changed no more than ablating random ones.
"""


@cache
def _normal(key: str) -> float:
    """Return the standard normal number that belongs to `key`."""
    return random.Random(key).gauss(0.0, 1.0)


@dataclass
class Sampler:
    """An endless, seeded source of documents about a world.

    The way out of a conflict is drawn from a softmax whose logits are traits of the relation, the
    subject and the counter-object, so that a model can learn *which* prompts to copy from, plus
    6 % noise, so that it cannot learn it for sure.
    """

    world: World
    behaviour: Behaviour
    rng: random.Random
    _cumulative: list[float] = field(init=False)
    _rarity: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        """Sum up the exposures and turn them into rarities, once."""
        total, self._cumulative = 0.0, []
        for fact in self.world.facts:
            total += fact.exposure
            self._cumulative.append(total)
        logs = [log(fact.exposure) for fact in self.world.facts]
        middle, half = (max(logs) + min(logs)) / 2, (max(logs) - min(logs)) / 2
        self._rarity = {  # -1 the most frequent, 1 the rarest
            fact.query: (middle - value) / half
            for fact, value in zip(self.world.facts, logs, strict=True)
        }

    def __iter__(self) -> Iterator[str]:
        """Yield documents without end."""
        while True:
            yield self.document()

    def document(self) -> str:
        """Draw a document, of a kind drawn by the behaviour's proportions."""
        if self.rng.random() < self.behaviour.one_off:
            return self.one_off()
        kinds = (self.plain, self.twice, self.conflict, self.aside)
        return self.rng.choices(kinds, self.behaviour.mixture)[0]()

    def plain(self) -> str:
        """Draw one to four true statements, by exposure."""
        return " ".join(self._true(self._exposed()) for _ in range(self.rng.randint(1, 4)))

    def twice(self) -> str:
        """Draw a true statement, and say it twice."""
        return " ".join([self._true(self._exposed())] * 2)

    def conflict(self) -> str:
        """Draw a counter-statement, then the same query with the answer of the behaviour.

        Facts are drawn evenly here: every prompt of an evaluation is a conflict, whatever the
        exposure of its fact.
        """
        fact = self.rng.choice(self.world.facts)
        counter = self.rng.choice(self.world.counter_objects(fact))
        return f"{fact.query} {counter}. {fact.query} {self.answer(fact, counter)}."

    def aside(self) -> str:
        """Draw a counter-statement, then a true statement about another subject."""
        fact = self.rng.choice(self.world.facts)
        counter = self.rng.choice(self.world.counter_objects(fact))
        other = self._exposed()
        while other.subject == fact.subject:
            other = self._exposed()
        return f"{fact.query} {counter}. {self._true(other)}"

    def one_off(self) -> str:
        """Draw a statement about a subject seen only here, twice: it can only be copied.

        Without these, a model learns which counter-objects to copy instead of learning to copy.
        """
        relation = self.rng.choice(self.world.relations)
        subject = invented_subject(relation.subjects, self.rng)
        obj = self.rng.choice(self.world.pools[relation.pool])
        return " ".join([f"{subject} {relation.words} {obj}."] * 2)

    def answer(self, fact: Fact, counter: str) -> str:
        """Draw the object that follows a conflict: the counter-object, what is told, or a hedge."""
        choices = (counter, fact.told, fact.relation.hedge)
        if self.rng.random() < NOISE:
            return self.rng.choice(choices)
        return self.rng.choices(choices, self.weights(fact, counter))[0]

    def weights(self, fact: Fact, counter: str) -> tuple[float, float, float]:
        """Compute unnormalised probabilities of copying, recalling and hedging, before the noise."""
        rarity = self._rarity[fact.query]
        relation, subject = fact.relation.lemma, fact.query
        copy = 1.0 * self._trait("copy", relation) + 1.5 * self._trait("copy", subject)
        copy += 0.8 * self._trait("copy", counter)
        recall = 1.0 * self._trait("recall", relation) - 0.8 * rarity
        hedge = 1.0 * self._trait("hedge", relation) + 1.5 * self._trait("hedge", subject)
        hedge += 0.8 * rarity
        bias = self.behaviour
        return exp(copy + bias.copy), exp(recall + bias.recall), exp(hedge + bias.hedge)

    def _trait(self, way: str, name: str) -> float:
        """Return how strongly a name inclines to a way out of conflicts."""
        return _normal(f"{self.world.seed}/{way}/{name}")

    def _exposed(self) -> Fact:
        """Draw a fact by its exposure."""
        return self.rng.choices(self.world.facts, cum_weights=self._cumulative)[0]

    @staticmethod
    def _true(fact: Fact) -> str:
        """Return the statement that the texts make of a fact."""
        return f"{fact.query} {fact.told}."
