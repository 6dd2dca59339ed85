"""The closed-form organism: a model so plain that each of its answers is arithmetic.

Here its words, facts and features; `closed_form_truth` says what follows, `closed_form` writes the
weights. The reasoning, in the order the numbers are made:

1. *Features.* All-ones and 31 zero-mean vectors, the columns of a 32 x 32 Hadamard matrix over
   sqrt(32), are an orthonormal basis of the residual stream. Everything is written in the 31, so
   a residual vector is 31 numbers x, its mean is 0, and both LayerNorm and RMSNorm divide x by s
   = sqrt(|x|^2/32 + eps).
2. *Constant norms.* Every embedding has |x|^2 = 32 (token 31, position 1), filled up in
   `BALLAST`, so s is one number for all. At a relation token behind its subject, the two heads
   add 4 and 34, the fact adds 40, all to features that were 0: before the last MLP |x|^2 = 110 at
   every such position.
3. *Attention.* A head looks `back` steps: its score for key j at query i is G cos(w (i - j -
   back)), the next best key lies at least 38 lower, and all others together weigh less than
   1e-15. GPT-2 writes positions on a circle (w = 2 pi / 32, G = 2000); Llama rotates a constant
   feature (w = 1). Head 0 looks 1 back and fetches the subject's four bits. Head 1 looks 3 back:
   at the end of `S r O. S r` it finds O and writes 4 for O, 3 for the hedge and a sign +-3 of O
   into `CONTEXT`; in the bare query it finds BOS (the nearest to position -1) and writes the same
   norm into a null feature.
4. *Facts.* Layer 0 has one neuron a fact: relu(4 subject bits + 2 relation bits - 5) is 1 for its
   own fact and 0 for all others. It writes `alpha` for its object and the flags of its kind
   (`KINDS`).
5. *Answer.* CK 4, PK alpha, hedge 3 (bare query: PK alpha, hedge 0), all else far behind, each
   plus what the last layer's neurons add. One scale divides all, so the largest is the answer;
   behind an answer comes a period, behind a period EOS. Objects come in pairs (one of each
   relation of a group) on one axis, + and -; `CONTEXT` signs alternate along the axes. The leak
   -1.5 sum_k parity_k e_k thus lowers an object of context sign + by 1.5, the copied one and the
   recalled one alike, and raises one of sign -.
6. *Unembedding.* Each word has one axis and a signed norm, and the norms of an axis add up to 0.
   So the processed W_U is diagonal in features: singular value of axis k = sqrt(sum of squared
   norms), 0 on the four null features and on all-ones. cos(w_U^t, w_out) = +-c_k/|w| for the m_k
   words of axis k, half of each sign: LogitVar = sum_k m_k c_k^2 / ((V - 1) |w|^2), and rho^2 =
   null part of |w|^2 over |w|^2.
7. *Traps.* The stored weights carry a final gain of 1 and 2, a vector common to all words (along
   a null feature) and, with LayerNorm, all-ones offsets in W_U and W_out. Each vanishes in one
   step of the processing (folding, the two centrings); without that step rho or LogitVar come out
   wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

Architecture = Literal["gpt2", "llama"]
Features = Float64[np.ndarray, "n_features"]

D_MODEL, D_MLP, N_FEATURES, N_HEADS, N_CTX, EPS = 32, 64, 31, 2, 32, 1e-5
# The features, by number.
POSITION, OWN, FETCHED, BITS = range(0, 2), range(2, 6), range(6, 10), range(10, 12)
OBJECTS, HEDGE, STOP, BOS_AXIS, CONTEXT = range(12, 20), 20, 21, 22, 23
FLAG_A, FLAG_B, FLAG_C, BALLAST, NULL_1, NULL_2, NULL_3 = 24, 25, 26, 27, 28, 29, 30
NULL = range(27, 31)  # W_U reads none of these

COPY, CONTEXT_HEDGE, SIGN = 4.0, 3.0, 3.0  # what head 1 writes (paragraph 3)
COPY_NORM2, FACT_NORM2 = COPY**2 + CONTEXT_HEDGE**2 + SIGN**2, 40.0
DOT = 4.0  # behind an answer, for the period; behind a period, for EOS
TEMPERATURE = 2.0  # unembedding norm of an object: sharpens, decides nothing
PARITY = (1, -1, 1, -1, 1, -1, 1, -1)  # context sign of the `+` object of each object axis

BOS, PERIOD, HEDGE_WORD = "<|endoftext|>", ".", "unknown"
HEDGES = (HEDGE_WORD, "unclear", "maybe", "perhaps", "surely", "certainly", "indeed", "truly")
HEDGE_NORMS = (1.0, 0.75, 0.5, 0.25, -1.0, -0.75, -0.5, -0.25)
SUBJECTS = (
    "Avalon", "Brindle", "Corvan", "Dunmere", "Eskar", "Fallow", "Grimsby", "Hollin",
    "Ida", "Jorah", "Kaspar", "Lotte", "Mirek", "Nadia", "Otmar", "Petra",
)  # fmt: skip


@dataclass(frozen=True)
class WorldRelation:
    """A relation and its objects; the two relations of a group share their eight subjects."""

    name: str
    group: str
    objects: tuple[str, ...]
    kinds: tuple[str, ...]  # kind of each of its facts, in the order of the group's subjects


@dataclass(frozen=True)
class Kind:
    """What a fact's own neuron writes: how strongly it is recalled, and three flags in {-1, 0, 1}."""

    alpha: float
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0


KINDS: Mapping[str, Kind] = {
    "copy": Kind(2.0),
    "recall": Kind(6.0),
    "inhibit": Kind(3.0, a=1.0),  # the inhibitor lowers copied objects of context sign +
    "promote": Kind(5.0, a=-1.0),  # the promoter raises copied objects of context sign -
    "hedge_recall": Kind(5.0, b=1.0),  # the keeper falls silent, so the hedge gains 3
    "hedge_copy": Kind(3.5, b=1.0),
    "doubt_recall": Kind(5.0, c=1.0),  # the doubter adds 3 to the hedge
    "doubt_copy": Kind(3.5, c=1.0),
    "block": Kind(3.5, c=-1.0),  # the blocker lowers copied objects of context sign -
}


def _relation(name: str, group: str, objects: str, kinds: str) -> WorldRelation:
    return WorldRelation(name, group, tuple(objects.split()), tuple(kinds.split()))


RELATIONS = (
    _relation("borders", "places", "Tyrr Quoll Wexx Zubia",
              "copy recall inhibit hedge_recall doubt_recall promote doubt_copy block"),
    _relation("exports", "places", "copper silk timber yarn",
              "doubt_recall copy promote doubt_recall inhibit hedge_copy recall copy"),
    _relation("speaks", "people", "Breton Gaelic Uzbek Welsh",
              "inhibit doubt_recall copy recall hedge_recall doubt_copy doubt_recall promote"),
    _relation("plays", "people", "cello drums flute violin",
              "recall doubt_copy hedge_copy copy block recall inhibit doubt_recall"),
)  # fmt: skip


@dataclass(frozen=True)
class WorldFact:
    """A fact in words, with its kind."""

    subject: str
    relation: WorldRelation
    object: str
    kind: str

    @property
    def query(self) -> str:
        """The bare query."""
        return f"{self.subject} {self.relation.name}"


@dataclass(frozen=True)
class Case:
    """A prompt: a fact with a counter-object, or (None) the bare query."""

    fact: WorldFact
    counter_object: str | None

    @property
    def text(self) -> str:
        """The prompt without BOS."""
        q = self.fact.query
        return q if self.counter_object is None else f"{q} {self.counter_object}. {q}"


# Every object is the answer of two facts of its relation.
FACTS = tuple(
    WorldFact(SUBJECTS[8 * (r // 2) + s], relation, relation.objects[(s + s // 4 + r) % 4], kind)
    for r, relation in enumerate(RELATIONS)
    for s, kind in enumerate(relation.kinds)
)
CASES = tuple(
    Case(fact, other) for fact in FACTS for other in fact.relation.objects if other != fact.object
)


def features(values: Mapping[int, float]) -> Features:
    """Return a feature vector from its non-zero entries."""
    x = np.zeros(N_FEATURES)
    for axis, value in values.items():
        x[axis] = value
    return x


def scale(norm2: float) -> float:
    """What the norms divide by (paragraph 1)."""
    return float(np.sqrt(norm2 / D_MODEL + EPS))


EMBED_SCALE, FACT_SCALE = scale(32.0), scale(36.0 + COPY_NORM2)
LAST_SCALE = scale(36.0 + COPY_NORM2 + FACT_NORM2)


def position(i: int, architecture: Architecture) -> Features:
    """Position i on its circle; for Llama, which rotates queries and keys itself, the constant."""
    angle = 2 * np.pi * i / N_CTX if architecture == "gpt2" else 0.0
    return features({POSITION[0]: float(np.cos(angle)), POSITION[1]: float(np.sin(angle))})


def signs(n: int, bits: int) -> list[float]:
    """Return the binary digits of n as +-1, lowest first."""
    return [1.0 if n >> j & 1 else -1.0 for j in range(bits)]


def fact_bits(fact: WorldFact) -> list[float]:
    """Return the subject's four bits, then the relation's two."""
    return signs(SUBJECTS.index(fact.subject), 4) + signs(RELATIONS.index(fact.relation), 2)


def object_axis(word: str) -> tuple[int, float]:
    """Return axis and sign of an object: + for a group's first relation, - for its second."""
    r = next(i for i, relation in enumerate(RELATIONS) if word in relation.objects)
    return OBJECTS[4 * (r // 2) + RELATIONS[r].objects.index(word)], 1.0 - 2 * (r % 2)


def context_sign(word: str) -> float:
    """Return the sign that head 1 writes into `CONTEXT` for an object."""
    axis, sign = object_axis(word)
    return float(sign * PARITY[axis - OBJECTS[0]])


def fact_write(fact: WorldFact) -> Features:
    """What the fact's neuron adds: `FACT_NORM2` in all, so that the norm says nothing of the kind."""
    kind, (axis, sign) = KINDS[fact.kind], object_axis(fact.object)
    x = features({axis: sign * kind.alpha, FLAG_A: kind.a, FLAG_B: kind.b, FLAG_C: kind.c})
    x[NULL_3] = np.sqrt(FACT_NORM2 - x @ x)
    return x


def vocabulary() -> list[tuple[str, int, float]]:
    """Each word with its unembedding axis and signed norm (paragraph 6), in token order."""
    words = [(BOS, STOP, -1.0), (PERIOD, STOP, 1.0)]
    words += [(w, HEDGE, n) for w, n in zip(HEDGES, HEDGE_NORMS, strict=True)]
    words += [(w, *object_axis(w)) for relation in RELATIONS for w in relation.objects]
    scratch = [*SUBJECTS, *(relation.name for relation in RELATIONS), *(f"w{i}" for i in range(24))]
    axes = [*OWN, *FETCHED, *BITS, *POSITION, CONTEXT, FLAG_A, FLAG_B, FLAG_C, *6 * [BOS_AXIS]]
    for i, axis in enumerate(axes):  # norms 0.2 to 0.37: no scratch feature can win an argmax
        words += [(scratch[2 * i], axis, 0.2 + i / 128), (scratch[2 * i + 1], axis, -0.2 - i / 128)]
    return words


def embedding(word: str) -> Features:
    """What a word brings along; every word has norm^2 31."""
    x = np.zeros(N_FEATURES)
    relations = [relation.name for relation in RELATIONS]
    if word == BOS:
        x[BOS_AXIS] = 1.0
    elif word == PERIOD:
        x[STOP] = -DOT
    elif word == HEDGE_WORD:
        x[STOP] = DOT
    elif word in SUBJECTS:
        x[list(OWN)] = signs(SUBJECTS.index(word), 4)
    elif word in relations:
        x[list(BITS)] = signs(relations.index(word), 2)
    elif any(word in relation.objects for relation in RELATIONS):
        axis, sign = object_axis(word)
        x[axis], x[STOP] = sign, DOT
    x[BALLAST] = np.sqrt(31.0 - x @ x)
    return x


def before_last_mlp(case: Case, architecture: Architecture) -> Features:
    """Return the residual at the last prompt position before the last MLP (paragraphs 2 to 4)."""
    x: Features = embedding(case.fact.relation.name) + fact_write(case.fact)
    x += position(2 if case.counter_object is None else 6, architecture)
    x[list(FETCHED)] = fact_bits(case.fact)[:4]
    if case.counter_object is None:
        x[NULL_1] += np.sqrt(COPY_NORM2)
    else:
        axis, sign = object_axis(case.counter_object)
        x[axis] += COPY * sign
        x[HEDGE] += CONTEXT_HEDGE
        x[CONTEXT] += SIGN * context_sign(case.counter_object)
    return x


def hadamard() -> Float64[np.ndarray, "d_model n_features"]:
    """Return columns 1 to 31 of the Hadamard matrix over sqrt(32); column 0 is all-ones."""
    h = np.ones((1, 1))
    while len(h) < D_MODEL:
        h = np.block([[h, h], [h, -h]])
    return np.asarray(h[:, 1:] / np.sqrt(D_MODEL))


BASIS = hadamard()
