"""What follows for the closed-form organism: neurons, measures, answers, scores, all by arithmetic.

The numbered paragraphs of `tests.closed_form.world` give the reasoning; nothing here runs a
model or uses the code that is tested against it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from tests.closed_form.world import (
    BALLAST,
    BASIS,
    BITS,
    BOS_AXIS,
    CASES,
    CONTEXT,
    D_MLP,
    D_MODEL,
    FACTS,
    FLAG_A,
    FLAG_B,
    FLAG_C,
    HEDGE,
    N_FEATURES,
    NULL,
    NULL_1,
    NULL_2,
    NULL_3,
    OBJECTS,
    OWN,
    PARITY,
    SIGN,
    TEMPERATURE,
    Architecture,
    Case,
    Features,
    WorldFact,
    before_last_mlp,
    features,
    scale,
    vocabulary,
)

PLANTED: Mapping[str, int] = {
    "null_plus": 5, "null_minus": 11, "null_graded": 23,
    "inhibitor": 31, "keeper": 42, "promoter": 60,
}  # fmt: skip
LEAKY = ("inhibitor", "keeper", "promoter")
SABOTEURS: Mapping[str, int] = {"blocker": 17, "doubter": 50}
DECOYS: Mapping[str, int] = {"spread": 8, "quiet": 36}
MIN_RHO = 0.95
POSITIONS = 9  # BOS, `S r O . S r`, and the two tokens fed back: the answer and the period
SMALL = 1 / 512  # norm of what every other neuron writes


@dataclass(frozen=True)
class Neuron:
    """A last-layer neuron: relu(read . x + bias), x the residual where its |x|^2 is 110."""

    read: Features
    bias: float
    write: Features


def _leaky(leak: Features, rho: Fraction, null_axis: int) -> Features:
    """Add a null part to a leak such that the null part is `rho` of the norm."""
    null = float(rho) / np.sqrt(1 - float(rho) ** 2) * np.linalg.norm(leak)
    return np.asarray(leak + features({null_axis: float(null)}))


def neurons() -> tuple[Neuron, ...]:
    """Return the named neurons and 54 bystanders too small to flip anything.

    A condition 2 (flag + sign) - 3 is 1 where both hold and at most -1 otherwise: the slack keeps
    rounding from mattering, also at positions of another norm, where flags are 0.
    """
    sign = 2 / SIGN
    leak = features({axis: -1.5 * p for axis, p in zip(OBJECTS, PARITY, strict=True)})
    inhibit = _leaky(leak, Fraction(24, 25), NULL_1)
    promote = _leaky(leak, Fraction(24, 25), NULL_2)
    keep = _leaky(features({HEDGE: -3.0}), Fraction(40, 41), NULL_3)
    # High rho, but it leaks to an axis of 12 words: LogitVar above that of all planted ones.
    spread = SMALL * _leaky(features({BOS_AXIS: 1.0}), Fraction(97, 100), NULL_1)
    # LogitVar below the keeper's, but rho below the threshold.
    quiet = SMALL * _leaky(features({OBJECTS[0]: 1.0}), Fraction(12, 13), NULL_2)
    named = {
        "null_plus": Neuron(features({CONTEXT: sign}), -1.0, features({NULL_1: 6.0})),
        "null_minus": Neuron(features({CONTEXT: -sign}), -1.0, features({BALLAST: -4.0})),
        "null_graded": Neuron(features({BITS[0]: 0.5}), 1.0, features({NULL_2: 3.0})),
        "inhibitor": Neuron(features({FLAG_A: 2.0, CONTEXT: sign}), -3.0, inhibit),
        "promoter": Neuron(features({FLAG_A: -2.0, CONTEXT: -sign}), -3.0, promote),
        "keeper": Neuron(features({FLAG_B: -2.0}), 1.0, keep),
        "blocker": Neuron(features({FLAG_C: -2.0, CONTEXT: -sign}), -3.0, -leak),
        "doubter": Neuron(features({FLAG_C: 2.0}), -1.0, features({HEDGE: 3.0})),
        "spread": Neuron(features({OWN[0]: 0.5}), 0.25, spread),
        "quiet": Neuron(features({OWN[1]: 0.5}), 0.25, quiet),
    }
    place = {i: named[name] for name, i in {**PLANTED, **SABOTEURS, **DECOYS}.items()}
    mixes = ((1.0, 0.0), (12 / 13, 5 / 13), (0.8, 0.6), (0.6, 0.8))  # (visible, null) parts
    for i in range(D_MLP):
        visible, null = mixes[i % 4]
        write = SMALL * features({i % 27: visible, NULL[i // 4 % 4]: null})
        place.setdefault(i, Neuron(features({7 * i % 27: 0.5}), 0.25, write))
    return tuple(place[i] for i in range(D_MLP))


@dataclass(frozen=True)
class Outcome:
    """Sources before and after an ablation, with exact scores."""

    before: tuple[str, ...]
    after: tuple[str, ...]

    @cached_property
    def counts(self) -> Mapping[tuple[str, str], int]:
        """Number of prompts per (source before, source after); 0 for what is not there."""
        return Counter(zip(self.before, self.after, strict=True))

    @property
    def gts(self) -> Fraction:
        """Share of prompts whose source changed."""
        return Fraction(sum(n for (b, a), n in self.counts.items() if b != a), len(self.before))

    def ts(self, source: str, to: str) -> Fraction:
        """Among prompts that were `source`, the proportion that is `to` afterwards."""
        return Fraction(self.counts[source, to], self.before.count(source))

    def cr(self, source: str) -> Fraction:
        """Among prompts that were not `source`, the proportion that is `source` afterwards."""
        gained = sum(n for (b, a), n in self.counts.items() if b != source and a == source)
        return Fraction(gained, len(self.before) - self.before.count(source))


@dataclass(frozen=True)
class ClosedFormTruth:
    """What is known of the checkpoint by arithmetic; float64, in features, not residual axes."""

    folder: Path
    architecture: Architecture
    facts: tuple[WorldFact, ...]
    cases: tuple[Case, ...]  # every fact with each of the three other objects of its relation
    words: tuple[str, ...]  # in token order
    unembedding: Float64[np.ndarray, "n_features d_vocab"]  # folded and centred
    read: Float64[np.ndarray, "d_mlp n_features"]
    bias: Float64[np.ndarray, "d_mlp"]
    write: Float64[np.ndarray, "d_mlp n_features"]
    planted: tuple[int, ...]
    leaky: tuple[int, ...]  # of the planted: those that also write outside the null space
    pure: tuple[int, ...]  # of the planted: the others, which can flip nothing
    null_dims: int
    min_rho: float

    @property
    def null_space(self) -> Float64[np.ndarray, "d_model null"]:
        """Orthonormal basis of what the processed W_U does not read: all-ones and 4 features."""
        ones = np.full((D_MODEL, 1), 1 / np.sqrt(D_MODEL))
        return np.concatenate([ones, BASIS[:, list(NULL)]], axis=1)

    @property
    def singular_values(self) -> Float64[np.ndarray, "d_model"]:
        """Of the processed W_U, descending (paragraph 6)."""
        return np.sort(np.append(np.sqrt((self.unembedding**2).sum(1)), 0.0))[::-1]

    @property
    def norm(self) -> Float64[np.ndarray, "d_mlp"]:
        """|w_out| of every neuron."""
        return np.asarray(np.sqrt((self.write**2).sum(1)))

    @property
    def rho(self) -> Float64[np.ndarray, "d_mlp"]:
        """Share of every output weight that lies in the null space."""
        return np.asarray(np.sqrt((self.write[:, list(NULL)] ** 2).sum(1)) / self.norm)

    @property
    def logit_var(self) -> Float64[np.ndarray, "d_mlp"]:
        """LogitVar of every neuron (paragraph 6)."""
        words_of_axis = (self.unembedding != 0).sum(1)
        squares = (self.write**2 * words_of_axis).sum(1)
        return np.asarray(squares / ((len(self.words) - 1) * self.norm**2))

    def activations(self, case: Case) -> Float64[np.ndarray, "d_mlp"]:
        """Last-layer activations at the last prompt position."""
        before = before_last_mlp(case, self.architecture)
        return np.asarray(np.maximum(self.read @ before + self.bias, 0.0))

    def residual(self, case: Case, ablated: Mapping[int, float]) -> Features:
        """Final residual at the last prompt position, some neurons held at values."""
        a = self.activations(case)
        for i, value in ablated.items():
            a[i] = value
        # The MLP's bias takes the keeper's constant 1 away: only its silence shows.
        before = before_last_mlp(case, self.architecture)
        return np.asarray(before + a @ self.write - self.write[PLANTED["keeper"]])

    def log_probs(
        self,
        case: Case,
        ablated: Mapping[int, float],
        scale_of: Mapping[int, float] | None = None,
    ) -> Float64[np.ndarray, "d_vocab"]:
        """Log-probabilities of the next word, nats.

        Args:
            case: The prompt.
            ablated: Neurons with their values.
            scale_of: The ablation whose norm scale is used; its own if None. The direct effect of
                `ablated` is that against `scale_of={}`; norm-only is {} with `scale_of=ablated`.
        """
        x = self.residual(case, ablated)
        normed = x if scale_of is None else self.residual(case, scale_of)
        logits = x @ self.unembedding / scale(float(normed @ normed))
        logits -= logits.max()
        return np.asarray(logits - np.log(np.exp(logits).sum()))

    def entropy(
        self,
        case: Case,
        ablated: Mapping[int, float],
        scale_of: Mapping[int, float] | None = None,
    ) -> float:
        """Entropy of the next word, nats; arguments as `log_probs`."""
        log_probs = self.log_probs(case, ablated, scale_of)
        return float(-np.exp(log_probs) @ log_probs)

    def margin(self, case: Case, ablated: Mapping[int, float]) -> float:
        """How far the best word is ahead of the next before the norm, in the units of `KINDS`."""
        second, best = np.sort(self.residual(case, ablated) @ self.unembedding)[-2:]
        return float(best - second) / TEMPERATURE

    def answer(self, case: Case, ablated: Mapping[int, float]) -> str:
        """The greedy next word."""
        return self.words[int(np.argmax(self.residual(case, ablated) @ self.unembedding))]

    def sources(self, ablated: Mapping[int, float]) -> tuple[str, ...]:
        """Knowledge source of every case."""
        return tuple(
            "CK" if answer == case.counter_object else "PK" if answer == case.fact.object else "ND"
            for case in self.cases
            for answer in [self.answer(case, ablated)]
        )

    def outcome(self, ablated: Mapping[int, float]) -> Outcome:
        """Sources before and after holding neurons at values."""
        return Outcome(self.sources({}), self.sources(ablated))

    def moments(self, neuron: int) -> tuple[float, float]:
        """Mean and standard deviation of a planted neuron or saboteur over all cases' positions.

        They read flags, context sign and relation bits only, which are 0 but at the two relation
        tokens, the first of which sees no context object: relu(bias) there, the formula here.
        """
        rest = [max(float(self.bias[neuron]), 0.0)] * (POSITIONS - 2)
        values: list[float] = []
        for case in self.cases:
            seen = [self.activations(c)[neuron] for c in (Case(case.fact, None), case)]
            values += [*rest, *(float(a) for a in seen)]
        return float(np.mean(values)), float(np.std(values))


def truth(folder: Path, architecture: Architecture) -> ClosedFormTruth:
    """Return what is known of the checkpoint that `closed_form.build` writes to `folder`."""
    words, layer = vocabulary(), neurons()
    unembedding = np.zeros((N_FEATURES, len(words)))
    for t, (_, axis, norm) in enumerate(words):
        unembedding[axis, t] = TEMPERATURE * norm
    return ClosedFormTruth(
        folder=folder,
        architecture=architecture,
        facts=FACTS,
        cases=CASES,
        words=tuple(word for word, _, _ in words),
        unembedding=unembedding,
        read=np.stack([n.read for n in layer]),
        bias=np.array([n.bias for n in layer], dtype=np.float64),
        write=np.stack([n.write for n in layer]),
        planted=tuple(PLANTED.values()),
        leaky=tuple(PLANTED[name] for name in LEAKY),
        pure=tuple(i for name, i in PLANTED.items() if name not in LEAKY),
        null_dims=len(NULL) + 1,  # and all-ones
        min_rho=MIN_RHO,
    )
