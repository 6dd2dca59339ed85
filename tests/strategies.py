"""Hypothesis strategies in the words of the domain, each with its bounds."""

from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from tests.toys import GROUPED, TYING, Family, ToyConfig

Source = Literal["CK", "PK", "ND"]

# Names that a careless comparison gets wrong: accents, scripts, case that changes the length ("ß",
# "İ"), an apostrophe, digits, a name that begins another one, several words.
KNOWN_NAMES = (
    "Paris",
    "Par",
    "New York",
    "New York City",
    "São Tomé",
    "Łódź",
    "İzmir",
    "Straße",
    "ΟΔΟΣ",
    "Санкт-Петербург",
    "東京",
    "Côte d'Ivoire",
    "1944",
    "of the",
)


@st.composite
def toy_configs(
    draw: st.DrawFn, families: tuple[Family, ...] = get_args(Family), max_layers: int = 3
) -> ToyConfig:
    """Toys of a width of 8 to 32, 1 to `max_layers` layers, and any wiring their family has.

    Few distinct weights on purpose (seeds 0 to 2): `toy_folder` keeps what it has written.
    """
    family = draw(st.sampled_from(families), label="family")
    n_heads = draw(st.sampled_from([1, 2, 4]), label="n_heads")
    head_dim = draw(st.sampled_from([d for d in (2, 4, 8, 16) if 8 <= d * n_heads <= 32]))
    divisors = [n for n in (1, 2, 4) if n_heads % n == 0]
    return ToyConfig(
        family=family,
        d_model=n_heads * head_dim,
        n_layers=draw(st.integers(1, max_layers), label="n_layers"),
        n_heads=n_heads,
        n_kv_heads=draw(st.sampled_from(divisors)) if family in GROUPED else n_heads,
        d_mlp=draw(st.integers(8, 64), label="d_mlp"),
        tied=draw(st.booleans(), label="tied") if family in TYING else False,
        parallel=draw(st.booleans(), label="parallel") if family == "neox" else None,
        n_ctx=128,
        seed=draw(st.integers(0, 2), label="seed"),
    )


def neuron_sets(
    d_mlp: int, min_size: int = 0, max_size: int | None = None
) -> st.SearchStrategy[tuple[int, ...]]:
    """Distinct neurons of a layer, in any order; the empty set too unless `min_size` forbids it."""
    largest = d_mlp if max_size is None else min(max_size, d_mlp)
    neurons = st.integers(0, d_mlp - 1)
    return st.lists(neurons, min_size=min_size, max_size=largest, unique=True).map(tuple)


def ragged_prompts(
    d_vocab: int, min_len: int = 1, max_len: int = 20, max_prompts: int = 6
) -> st.SearchStrategy[list[list[int]]]:
    """1 to `max_prompts` prompts of any token ids (special ones too) and of unequal lengths."""
    prompt = st.lists(st.integers(0, d_vocab - 1), min_size=min_len, max_size=max_len)
    return st.lists(prompt, min_size=1, max_size=max_prompts)


def sources(min_size: int = 0, max_size: int = 60) -> st.SearchStrategy[list[Source]]:
    """The knowledge sources of a run's prompts; often only one or two of the three occur."""
    present = st.lists(st.sampled_from(get_args(Source)), min_size=1, max_size=3, unique=True)
    return present.flatmap(
        lambda kinds: st.lists(st.sampled_from(kinds), min_size=min_size, max_size=max_size)
    )


def object_names(max_words: int = 3) -> st.SearchStrategy[str]:
    """Objects as the splitter leaves them: words of letters and digits with single spaces.

    Any script; so lower() may change a name's length, and lower() after upper() its letters.
    """
    word = st.text(st.characters(categories=["Lu", "Ll", "Lo", "Nd"]), min_size=1, max_size=8)
    names = st.lists(word, min_size=1, max_size=max_words).map(" ".join)
    known = [name for name in KNOWN_NAMES if len(name.split(" ")) <= max_words]
    return st.sampled_from(known) | names


@st.composite
def activation_matrices(
    draw: st.DrawFn, min_positions: int = 1, max_positions: int = 40, max_neurons: int = 6
) -> npt.NDArray[np.float32]:
    """Finite float32 activations (positions, neurons), every neuron of another kind.

    A neuron is `offset + scale * x`, where x is constant, one of nine values (ties), or anything
    in [-1, 1]; so there are spreads from 1e-6 to 1e4, and means far above the spread.
    """
    n_positions = draw(st.integers(min_positions, max_positions), label="positions")
    shapes = [
        st.just([0.0] * n_positions),
        st.lists(st.integers(-4, 4), min_size=n_positions, max_size=n_positions),
        st.lists(st.floats(-1, 1, width=32), min_size=n_positions, max_size=n_positions),
    ]
    columns = []
    for neuron in range(draw(st.integers(1, max_neurons), label="neurons")):
        x = draw(st.one_of(shapes), label=f"shape of neuron {neuron}")
        offset = draw(st.sampled_from([0.0, -0.17, 1.0, 1e3, -1e4]), label="offset")
        scale = draw(st.sampled_from([1e-6, 1e-2, 1.0, 1e4]), label="scale")
        columns.append(offset + scale * np.asarray(x, dtype=np.float64))
    return np.stack(columns, axis=1).astype(np.float32)


@st.composite
def chunkings(draw: st.DrawFn, n: int) -> tuple[slice, ...]:
    """The rows 0 to n in order, cut into chunks, none of them empty; no chunk for no row."""
    cuts = draw(st.sets(st.integers(1, n - 1)), label="cuts") if n > 1 else set()
    edges = [0, *sorted(cuts), n]
    return tuple(slice(a, b) for a, b in pairwise(edges) if b > a)
