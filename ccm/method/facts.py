"""Facts and the relations they name (Method 3)."""

from collections.abc import Mapping
from dataclasses import dataclass

from ccm.errors import BadInput


@dataclass(frozen=True, slots=True)
class Fact:
    """One (subject, relation, object) statement."""

    subject: str
    relation: str  # rel_lemma: the relation's name, joins with `Relation.name`
    words: str  # the words between subject and object
    object: str  # the true object

    @property
    def query(self) -> str:
        """`"{subject} {words}"`: what the model is asked to complete."""
        return f"{self.subject} {self.words}"


@dataclass(frozen=True, slots=True)
class Relation:
    """What prompts and filters need to know about a relation."""

    name: str
    group: str  # relations of one group may share names without being dropped (Method 4.3c)
    description: str  # "the name of the country ..."; "the subject" stands for the subject
    example_query: str  # one-shot example; empty where the table has none
    example_subject: str
    example_object: str


@dataclass(frozen=True)
class FactSet:
    """Facts in file order with the relations they name."""

    name: str
    facts: tuple[Fact, ...]
    relations: Mapping[str, Relation]


def fact_set(name: str, facts: tuple[Fact, ...], relations: Mapping[str, Relation]) -> FactSet:
    """Join facts with their relations.

    Args:
        name: What to call the set.
        facts: The facts, in file order.
        relations: Every relation by its name.

    Raises:
        BadInput: a fact names a relation that the relations table does not have.
    """
    for fact in facts:
        if fact.relation not in relations:
            raise BadInput(
                f"relation {fact.relation!r} of fact {fact.query!r} is not in the relations table. "
                "Add a row for it."
            )
    return FactSet(name=name, facts=facts, relations=relations)
