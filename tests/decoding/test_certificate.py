"""The certificate, the shortlist and the low-rank rows, held to the ablated model itself in float64."""

import itertools
from dataclasses import MISSING, dataclass, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ccm.decoding import next_token
from ccm.decoding.certificate import (
    SHORTLIST,
    Nodes,
    Pairs,
    Screen,
    ablated_scale,
    build_screen,
    certified,
    changes,
    pair_tolerance,
    read_nodes,
    shortlisted,
)
from ccm.decoding.low_rank import (
    BLOCK,
    NATS,
    Dense,
    Room,
    best_and_lead,
    guessed_best_and_lead,
    low_rank_rows,
    low_rank_terms,
    pair_rows,
    read_dense,
    tolerances,
)
from ccm.decoding.tolerance import LEAST
from ccm.method.ablation import PLAIN, Ablation
from ccm.method.neurons import FinalNorm
from ccm.models.model import LoadedModel
from ccm.models.specs import MODELS
from tests.tolerance import LOG_PROBABILITY, Tolerance

U = 4e-6  # of paragraph 6
many = settings(max_examples=150, deadline=None)
some = settings(max_examples=50, deadline=None)
SCALE = Tolerance(
    "norm scale",
    rtol=1e-6,
    atol=0.0,
    reason="float64 sums of float32 numbers, rounded to float32 once at the end",
)
LOGIT = replace(
    LOG_PROBABILITY,
    name="logit",
    rtol=1e-5,
    reason="a float32 sum over d_model; relative to the largest number in it where one is given",
)


@dataclass(frozen=True)
class Shape:
    """What a random last layer looks like; everything else follows from the seed."""

    seed: int = 0
    d_model: int = 16
    d_vocab: int = 40
    d_mlp: int = 12
    n_nodes: int = 4
    n_sets: int = 12
    centred: bool = True
    norm_bias: float = 0.0  # sizes of normal draws
    unembedding_bias: float = 0.0
    x: float = 1.0
    change: float = 0.3  # of activations
    null: bool = False  # neurons write where W_U hardly reads
    remainder: float = 1.0  # of x at the first node, after neuron 0 took the rest of it away


@dataclass(frozen=True)
class Layer:
    """A last layer with residuals and neuron sets: all that screening reads; read-only."""

    model: LoadedModel
    x: Tensor  # (node, d_model)
    a: Tensor  # (node, d_mlp)
    sets: tuple[Ablation, ...]

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Every node with every set."""
        n, n_sets = len(self.x), len(self.sets)
        return torch.arange(n).repeat_interleave(n_sets), torch.arange(n_sets).repeat(n)

    def certified(self) -> Tensor:
        """Whether each pair is certified."""
        screen = build_screen(self.model.last_layer, self.sets, U)
        return certified(screen, read_nodes(screen, self.x, self.a)).reshape(-1)

    def screened(self) -> tuple[Screen, Nodes, Tensor, Tensor, Tensor, Tensor]:
        """Screen, nodes, then node, set, change and scale of every pair."""
        screen = build_screen(self.model.last_layer, self.sets, U)
        nodes = read_nodes(screen, self.x, self.a)
        node, sets = self.pairs
        c = changes(screen, nodes, node, sets)
        return screen, nodes, node, sets, c, ablated_scale(screen, nodes, node, sets, c)


def proved(
    screen: Screen, nodes: Nodes, node: Tensor, sets: Tensor, c: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """What the shortlist proves of pairs, and their tokens."""
    tau = pair_tolerance(screen, nodes, node, sets, c, scale)
    return shortlisted(Pairs(screen, nodes, node, sets, c, scale, tau))


def a_model(
    W_U: Tensor, W_out: Tensor, norm: FinalNorm, b_U: Tensor, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """A model that is nothing but its last matrices: screening reads no more."""
    spec = replace(MODELS["organism"], d_model=len(W_U), d_mlp=len(W_out), d_vocab=W_U.shape[1])
    cpu = torch.device("cpu")
    given = {"spec": spec, "device": cpu, "dtype": dtype, "source": "", "n_ctx": 1, "bos": 0}
    given |= {"eos": frozenset()}
    lacking = [f for f in fields(LoadedModel) if f.default is f.default_factory is MISSING]
    modules = [f.name for f in lacking if f.name not in given]
    model = LoadedModel(**given, **dict.fromkeys(modules))
    # In place of what the cached properties of the same names read off a bridge.
    vars(model).update(final_norm=norm, W_U=W_U.to(dtype), b_U=b_U, W_out=W_out.to(dtype))
    return model


def make(shape: Shape) -> Layer:
    """Draw a layer."""
    generator = torch.Generator().manual_seed(shape.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    d, n_mlp = shape.d_model, shape.d_mlp
    W_U = normal(d, shape.d_vocab)
    W_out = normal(n_mlp, d)
    x = normal(shape.n_nodes, d) * shape.x
    rest = normal(n_mlp)
    a = rest + shape.change * normal(shape.n_nodes, n_mlp)
    if shape.null:
        W_U[: d // 2] *= 1e-4
        W_out[:, d // 2 :] *= 1e-4
    gain = 1 + 0.3 * normal(d)
    bias = shape.norm_bias * normal(d) if shape.centred else torch.zeros(d)
    b_U = shape.unembedding_bias * normal(shape.d_vocab)
    values = rest + shape.change * normal(2, n_mlp)
    if shape.remainder < 1:
        # Neuron 0 points against the first residual, and the others hardly disturb what is left.
        # The odd factor keeps float32 from cancelling exactly, which would hide its rounding.
        W_out[0], a[0, 0], values[:, 0] = -x[0] / 3.7, 0.0, 3.7 * (1 - shape.remainder)
        W_out[1:] *= shape.remainder
    sets = []
    for i in range(shape.n_sets):
        size = int(torch.randint(1, n_mlp + 1, (), generator=generator))
        drawn = torch.randperm(n_mlp, generator=generator)[:size].tolist()
        if shape.remainder < 1 and i % 4:
            drawn = sorted({0, *drawn})
        # The later half of the sets has another ablation value.
        v = values[int(2 * i >= shape.n_sets), sorted(drawn)].tolist()
        sets.append(Ablation(f"set {i}", tuple(sorted(drawn)), tuple(v)))
    norm = FinalNorm(centred=shape.centred, eps=1e-5, gain=gain, bias=bias)
    return Layer(a_model(W_U, W_out, norm, b_U), x, a, tuple(sets))


def draw_shapes(remainders: tuple[float, ...] = (1.0, 0.3, 1e-2, 1e-3)) -> st.SearchStrategy[Shape]:
    """Shapes of every kind; vocabularies around the shortlist's length, too."""
    return st.builds(
        Shape,
        seed=st.integers(0, 2**20),
        d_model=st.sampled_from([4, 8, 16, 48]),
        d_vocab=st.sampled_from([2, 3, 4, SHORTLIST, SHORTLIST + 1, SHORTLIST + 2, 40, 150]),
        d_mlp=st.integers(1, 14),
        n_nodes=st.integers(1, 4),
        n_sets=st.integers(1, 16),
        centred=st.booleans(),
        norm_bias=st.sampled_from([0.0, 0.3, 3.0]),
        unembedding_bias=st.sampled_from([0.0, 0.3, 3.0]),
        x=st.sampled_from([0.01, 1.0, 30.0]),
        change=st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 10.0]),
        null=st.booleans(),
        remainder=st.sampled_from(remainders),
    )


shapes = draw_shapes()


# --- the ablated model itself, in float64 -----------------------------------------------------------


def exact_scale(norm: FinalNorm, x: Tensor) -> Tensor:
    """s of float64 residuals."""
    x = x - x.mean(-1, keepdim=True) if norm.centred else x
    return (x.pow(2).mean(-1) + norm.eps).sqrt()


def exact_logits(model: LoadedModel, x: Tensor) -> Tensor:
    """Logit rows of float64 residuals, as the model's definition has them."""
    norm, scale = model.final_norm, exact_scale(model.final_norm, x)
    x = x - x.mean(-1, keepdim=True) if norm.centred else x
    x = x / scale[..., None] * norm.gain.double() + norm.bias.double()
    return x @ model.W_U.double() + model.b_U.double()


def moved(layer: Layer) -> Tensor:
    """The ablated residual of every pair, float64: the activations are replaced, no more."""
    rows = []
    for node, of in zip(*layer.pairs, strict=True):
        ablation = layer.sets[of]
        neurons = list(ablation.neurons)
        change = torch.tensor(ablation.values, dtype=torch.float64) - layer.a[node, neurons].double()
        rows.append(layer.x[node].double() + change @ layer.model.W_out[neurons].double())
    return torch.stack(rows)


def lead_of(logits: Tensor, token: Tensor) -> Tensor:
    """How far a token leads all others, per row; negative where it does not."""
    own = logits.gather(-1, token[:, None])
    return (own - logits.scatter(-1, token[:, None], -torch.inf).amax(-1, keepdim=True))[:, 0]


# --- the certificate never lies ---------------------------------------------------------------------


@given(shape=shapes)
@many
def test_what_is_certified_keeps_its_argmax(shape: Shape) -> None:
    layer = make(shape)
    screen, nodes, node, *_ = layer.screened()
    sure = certified(screen, nodes).reshape(-1)
    plain, logits = exact_logits(layer.model, layer.x.double()), exact_logits(layer.model, moved(layer))
    token = nodes.likely[node, 0]
    assert torch.equal(plain.argmax(-1)[node][sure], token[sure]), "certified against a wrong argmax"
    lead, tolerance = lead_of(logits, token)[sure], pair_tolerance(*layer.screened())[sure]
    # More than the tolerance is promised; half of it is left for the rounding of its own sum.
    assert (lead > 0.5 * tolerance).all(), f"certified, but it leads by {float(lead.min()):.3g} only"


@given(shape=shapes, size=st.integers(1, 4), data=st.data())
@many
def test_at_the_flip_nothing_is_certified(shape: Shape, size: int, data: st.DataObject) -> None:
    shape = replace(shape, n_nodes=1, n_sets=1, d_mlp=max(size, shape.d_mlp), remainder=1.0)
    layer = make(shape)
    neurons = sorted(data.draw(st.permutations(range(shape.d_mlp)), label="neurons")[:size])
    signs = data.draw(st.lists(st.sampled_from([-1, 1]), min_size=size, max_size=size), label="signs")
    direction = torch.tensor([signs], dtype=torch.float32)
    layer = replace(layer, sets=(Ablation("some", tuple(neurons), (0.0,) * size),))
    limits = flip_and_limit(layer, direction)
    assume(limits is not None)
    assert limits is not None
    flip, limit = limits
    assert limit <= flip, f"certified up to {limit:.6g} times the change that flips it, {flip:.6g}"


def flip_and_limit(layer: Layer, direction: Tensor) -> tuple[float, float] | None:
    """Size of change at which the exact argmax flips, and up to which it is certified, or None.

    Both by bisection in float32 steps; the certificate's region is one interval from 0.
    """
    screen = build_screen(layer.model.last_layer, layer.sets, U)
    nodes = read_nodes(screen, layer.x, layer.a)
    token = nodes.likely[:, 0]
    W = layer.model.W_out[list(layer.sets[0].neurons)].double()

    def stays(size: float) -> bool:
        x = layer.x.double() + (size * direction).double() @ W
        return bool(lead_of(exact_logits(layer.model, x), token) > 0)

    def sure(size: float) -> bool:
        # Replaced by 0, so that what changes is the activation itself.
        return bool(certified(screen, replace(nodes, a=-size * direction))[0, 0])

    top = next((size for size in (2.0**i for i in range(-8, 24)) if not stays(size)), None)
    if top is None or not stays(0.0):
        return None

    def edge(holds: "type[bool] | object", high: float) -> float:
        low = 0.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)  # type: ignore[operator]
        return low

    # The flip between `top` and its half is the first one that these steps can see.
    return edge(stays, top) if top else 0.0, edge(sure, 2.0**24)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer_norm"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_with_two_tokens_and_one_neuron_the_certificate_gives_nothing_away(
    centred: bool, sign: int
) -> None:
    flipped = 0
    for seed in range(20):
        layer = make(Shape(seed, d_vocab=2, d_mlp=1, n_nodes=1, n_sets=1, centred=centred))
        layer = replace(layer, sets=(Ablation("one", (0,), (0.0,)),))
        limits = flip_and_limit(layer, torch.tensor([[float(sign)]]))
        if limits is None:  # this sign pushes the winner further up
            continue
        flipped += 1
        flip, limit = limits
        assert 0.98 * flip < limit <= flip, f"certified to {limit:.6g}, it flips at {flip:.6g}"
    assert flipped >= 5


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer_norm"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_what_lifts_the_winner_alone_is_certified_at_any_size(centred: bool, sign: int) -> None:
    lifted = 0
    for seed in range(20):
        layer = make(Shape(seed, d_vocab=2, d_mlp=1, n_nodes=1, n_sets=1, centred=centred))
        layer = replace(layer, sets=(Ablation("one", (0,), (0.0,)),))
        direction = torch.tensor([[float(sign)]])
        if flip_and_limit(layer, direction) is not None:
            continue
        lifted += 1
        screen = build_screen(layer.model.last_layer, layer.sets, U)
        nodes = read_nodes(screen, layer.x, layer.a)
        for size in (1.0, 10.0, 100.0):
            assert certified(screen, replace(nodes, a=-size * direction)).all(), (seed, size)
    assert lifted >= 5


# --- the shortlist ----------------------------------------------------------------------------------


@given(shape=shapes)
@many
def test_what_the_shortlist_proves_is_the_argmax(shape: Shape) -> None:
    check_shortlist(make(shape))


def check_shortlist(layer: Layer) -> Tensor:
    """Check every proof; returns, per pair, whether it was proved and whether that was a flip."""
    screen, nodes, node, sets, c, scale = layer.screened()
    settled, token = proved(screen, nodes, node, sets, c, scale)
    logits = exact_logits(layer.model, moved(layer))
    lead = lead_of(logits, token)[settled]
    assert (lead > 0).all(), (
        f"'proved' for {int((lead <= 0).sum())} of {len(lead)} pairs whose argmax is another token; "
        f"the worst lies {-float(lead.min()):.3g} below it"
    )
    assert (token[:, None] == nodes.likely[node]).any(-1).all(), "a token that is not in the shortlist"
    return torch.stack([settled, settled & (token != nodes.likely[node, 0])])


@pytest.mark.parametrize("remainder", [0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer_norm"])
def test_proofs_hold_where_a_neuron_cancels_most_of_the_residual(
    remainder: float, centred: bool
) -> None:
    n_proved = 0
    for seed in range(10):
        shape = Shape(seed, 32, 40, 12, n_nodes=1, n_sets=100, centred=centred, remainder=remainder)
        n_proved += int(check_shortlist(make(shape))[0].sum())
    assert n_proved > 20, "nothing was proved, so nothing was tested"


def with_rival(layer: Layer, by: float) -> Layer:
    """The layer with a token that trails the best one of the first node by so many nats.

    Its unembedding is another one: it differs by as much as any two do, off the residual.
    """
    screen = build_screen(layer.model.last_layer, layer.sets, U)
    nodes = read_nodes(screen, layer.x, layer.a)
    best, s = int(nodes.likely[0, 0]), float(nodes.scale[0])
    norm, W_U = layer.model.final_norm, layer.model.W_U.clone()
    x = nodes.x[0].double() * norm.gain.double()  # z = x W_U / s
    x = x / x.norm()
    rival = (best + 1) % W_U.shape[1]
    off = W_U[:, rival].double() - x * (x @ W_U[:, rival].double())
    trail = by * s / float((nodes.x[0].double() * norm.gain.double()).norm())
    own = x * (x @ W_U[:, best].double() - trail)
    W_U[:, rival] = (own + off).float()
    return replace(layer, model=a_model(W_U, layer.model.W_out, norm, layer.model.b_U))


@pytest.mark.parametrize("remainder", [1.0, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("d_vocab", [SHORTLIST, 40])
def test_rounding_that_a_cancelled_residual_magnifies_proves_nothing(
    remainder: float, d_vocab: int
) -> None:
    # Rounding moves a logit by 1e-7 of s / s': more than a tolerance that only knows s.
    wrong, n_proved = [], 0
    for seed in range(80):
        shape = Shape(seed, 32, d_vocab, 4, n_nodes=1, n_sets=1, x=30.0, remainder=remainder)
        layer = make(shape)
        value = float(layer.a[0, 0]) if remainder == 1 else 3.7 * (1 - remainder)
        layer = replace(layer, sets=(Ablation("one", (0,), (value,)),))
        layer = with_rival(layer, by=1.5 * float(tau_0(layer)[0]))
        screen, nodes, node, sets, c, scale = layer.screened()
        sure, token = proved(screen, nodes, node, sets, c, scale)
        exact = exact_logits(layer.model, moved(layer)).argmax(-1)
        n_proved += int(sure[0])
        if sure[0] and token[0] != exact[0]:
            wrong.append(seed)
        if certified(screen, nodes)[0, 0]:
            assert nodes.likely[0, 0] == exact[0], f"seed {seed} was certified"
    assert not wrong, (
        f"{len(wrong)} of {n_proved} proofs name another token than float64: seeds {wrong}"
    )
    assert remainder < 1 or n_proved > 60, "a rival further off than the tolerance is no near tie"


# --- the tolerance, on both sides of it ---------------------------------------------------------------


def lengths_multiplied(layer: Layer) -> tuple[float, float]:
    """M and B of paragraph 4, from the weights."""
    norm, W_U = layer.model.final_norm, layer.model.W_U.double()
    beta = norm.bias.double() @ W_U + layer.model.b_U.double()
    return float((W_U * norm.gain.double()[:, None]).norm(dim=0).max()), float(beta.abs().max())


def tau_0(layer: Layer, u: float = U) -> Tensor:
    """The least lead that is no near tie where nothing changes, per node: u (M |x^| / s + B)."""
    (M, B), x = lengths_multiplied(layer), layer.x.double()
    s = exact_scale(layer.model.final_norm, x)
    x = x - x.mean(-1, keepdim=True) if layer.model.final_norm.centred else x
    return u * (M * x.norm(dim=-1) / s + B)


def changing_nothing(layer: Layer) -> Layer:
    """One node under the empty set, and under sets that hold neurons where they are."""
    sets = [replace(s, values=tuple(layer.a[0, list(s.neurons)].tolist())) for s in layer.sets]
    return replace(layer, sets=(PLAIN, *sets))


@given(shape=shapes)
@some
def test_a_gap_is_certified_above_the_tolerance_and_not_below(shape: Shape) -> None:
    layer = changing_nothing(make(replace(shape, n_nodes=1)))
    screen = build_screen(layer.model.last_layer, layer.sets, U)
    nodes = read_nodes(screen, layer.x, layer.a)
    edge = tau_0(layer)
    for times, sure in ((0.99, False), (1.01, True)):
        found = certified(screen, replace(nodes, gap=(times * edge).float()))
        assert (found == sure).all(), f"at {times} of tau_0"


@given(shape=shapes)
@some
def test_a_gap_is_certified_above_what_the_neurons_can_do_and_not_below(shape: Shape) -> None:
    """Paragraph 4's own line, with every number in float64."""
    layer = make(replace(shape, n_nodes=1, n_sets=1))
    screen, nodes, _, _, c, _ = layer.screened()
    (M, B), norm = lengths_multiplied(layer), layer.model.final_norm
    W = layer.model.W_out[list(layer.sets[0].neurons)].double()
    W = W - W.mean(-1, keepdim=True) if norm.centred else W
    P = (W * norm.gain.double()) @ layer.model.W_U.double()
    beta = norm.bias.double() @ layer.model.W_U.double() + layer.model.b_U.double()
    h, mid, size = (P.amax(-1) - P.amin(-1)) / 2, (P.amax(-1) + P.amin(-1)) / 2, W.norm(dim=-1)
    q = h + (beta.max() - beta.min() + U * B) * size / shape.d_model**0.5 + U * M * size
    change, s = c[0].double(), exact_scale(norm, layer.x.double())[0]
    tilt = change * (mid - P[:, nodes.likely[0, 0]])
    edge = tau_0(layer)[0] + (tilt + change.abs() * q).sum() / s
    # What float32 rounds: two sums over the neurons, of terms that may cancel.
    margin = 0.01 * tau_0(layer)[0] + 1e-5 * ((tilt.abs() + change.abs() * q).sum() / s + edge)
    for gap, sure in ((edge - margin, False), (edge + margin, True)):
        assert bool(certified(screen, replace(nodes, gap=gap[None].float()))[0, 0]) == sure


@given(shape=shapes)
@some
def test_the_tolerance_of_a_pair_is_the_line_that_defines_it(shape: Shape) -> None:
    layer = make(shape)
    screen, nodes, node, sets, c, scale = layer.screened()
    M, B = lengths_multiplied(layer)
    neurons = screen.slots[sets]
    lengths = nodes.x.double().norm(dim=-1)[node] + (
        c.double().abs() * screen.W.norm(dim=-1)[neurons]
    ).sum(-1)
    wanted = U * (M * lengths / scale.double() + B)
    found = pair_tolerance(screen, nodes, node, sets, c, scale)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(nodes.tolerance.double(), tau_0(layer), rtol=1e-4, atol=0.0)
    unchanged = pair_tolerance(screen, nodes, node, sets, torch.zeros_like(c), nodes.scale[node])
    torch.testing.assert_close(unchanged, nodes.tolerance[node])


@pytest.mark.parametrize("offset", [0.0, 64.0])
def test_a_neuron_that_moves_all_tokens_alike_is_reckoned_with_its_rounding(offset: float) -> None:
    """There h = R = 0, so that q is the tolerance's own part: u B |w| / sqrt(d) + u M |w|."""
    layer = make(Shape(d_vocab=12, centred=False))
    W_U, m = layer.model.W_U[:, :1].repeat(1, 12), layer.model
    layer = replace(layer, model=a_model(W_U, m.W_out, m.final_norm, torch.full((12,), offset)))
    screen = build_screen(layer.model.last_layer, layer.sets, U)
    (M, B), size = lengths_multiplied(layer), layer.model.W_out[screen.selected].double().norm(dim=-1)
    wanted = U * B * size / 16**0.5 + U * M * size
    torch.testing.assert_close((screen.q - screen.half).double(), wanted, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("u", [2.0**-23, 4e-6, 1e-4])
def test_a_lead_below_the_tolerance_is_not_certified(u: float) -> None:
    layer = changing_nothing(make(Shape(n_nodes=1)))
    screen = build_screen(layer.model.last_layer, layer.sets, u)
    nodes = read_nodes(screen, layer.x, layer.a)
    edge = tau_0(layer, u=u)
    torch.testing.assert_close(nodes.tolerance.double(), edge, rtol=1e-4, atol=0.0)
    for times, sure in ((0.99, False), (1.01, True)):
        assert (certified(screen, replace(nodes, gap=(times * edge).float())) == sure).all()


@given(shape=shapes)
@some
def test_the_shortlist_proves_a_lead_above_the_tolerance_and_none_below(shape: Shape) -> None:
    """Paragraph 5's bound in float64, and a tolerance on either side of the lead over it."""
    layer = make(shape)
    screen, nodes, node, sets, c, scale = layer.screened()
    neurons, likely, wide = screen.slots[sets], nodes.likely[node], c.double()
    after, s, beta = scale.double(), nodes.scale[node].double(), screen.beta.double()
    P = screen.P.double()[neurons]  # (pair, k, d_vocab)
    logits = (nodes.sz[node].double() + (wide[:, :, None] * P).sum(1)) / after[:, None] + beta
    own = logits.gather(-1, likely).sort(-1, descending=True).values
    reach = (wide * screen.mid.double()[neurons] + wide.abs() * screen.half.double()[neurons]).sum(-1)
    tilt = ((after - s)[:, None] * beta).amax(-1)
    bound = (s * nodes.beyond[node].double() + reach + tilt) / after
    lead = own[:, 0] - torch.maximum(own[:, 1], bound)
    sizes = nodes.sz[node].abs().amax(-1) + (c[:, :, None] * screen.P[neurons]).abs().sum(1).amax(-1)
    margin = 1e-5 * ((sizes.double() + s * beta.abs().max()) / after + beta.abs().max() + 1e-3)
    for by, sure in ((-margin, True), (margin, False)):
        found, _ = shortlisted(Pairs(screen, nodes, node, sets, c, scale, (lead + by).float()))
        assert (found == sure).all()


def test_a_rival_is_settled_above_the_tolerance_and_left_below() -> None:
    """At c = 0, with a runner-up that really trails by so much; certificate and shortlist alike."""
    seen = []
    for seed, times in itertools.product(range(30), (0.6, 0.9, 1.1, 1.9)):
        layer = make(Shape(seed, 32, 40, 4, n_nodes=1, n_sets=2, x=30.0))
        layer = changing_nothing(with_rival(layer, times * float(tau_0(layer)[0])))
        gap = exact_logits(layer.model, layer.x.double()).sort(-1, descending=True).values
        lead = float((gap[0, 0] - gap[0, 1]) / tau_0(layer)[0])  # the rival may lengthen M
        if abs(lead - 1) < 0.03:  # float32 rounds a logit by some hundredths of the tolerance
            continue
        screen, nodes, node, sets, c, scale = layer.screened()
        assert (c == 0).all()
        assert (certified(screen, nodes) == (lead > 1)).all(), f"seed {seed}: {lead:.3f} of tau_0"
        assert (proved(screen, nodes, node, sets, c, scale)[0] == (lead > 1)).all()
        seen.append(lead)
    assert sum(0.8 < lead < 1 for lead in seen) > 10
    assert sum(1 < lead < 1.2 for lead in seen) > 10


def test_certificate_and_shortlist_settle_most_pairs_and_leave_some() -> None:
    certain = flips = left = total = 0
    for seed in range(20):
        layer = make(Shape(seed, change=0.3 if seed % 2 else 0.03, centred=seed % 3 > 0))
        screen, nodes, node, sets, c, scale = layer.screened()
        sure = certified(screen, nodes).reshape(-1)
        settled, token = proved(screen, nodes, node, sets, c, scale)
        assert settled[sure].all(), "what is certified is the weaker claim of the two"
        assert (token[sure] == nodes.likely[node, 0][sure]).all()
        certain += int(sure.sum())
        flips += int((settled & (token != nodes.likely[node, 0])).sum())
        left += int((~settled).sum())
        total += len(node)
    shares = f"{certain} certified, {flips} flips proved, {left} left of {total}"
    assert certain > 0.1 * total, shares
    assert flips > 0.04 * total, shares
    assert 0 < left < 0.6 * total, shares


@pytest.mark.parametrize("d_vocab", [2, 3, SHORTLIST, SHORTLIST + 1])
def test_equal_logits_are_neither_certified_nor_proved(d_vocab: int) -> None:
    for seed in range(10):
        layer = make(Shape(seed, d_vocab=d_vocab, change=1e-3))
        W_U = layer.model.W_U[:, :1].repeat(1, d_vocab)  # all tokens alike
        layer = replace(
            layer, model=a_model(W_U, layer.model.W_out, layer.model.final_norm, layer.model.b_U)
        )
        screen, nodes, node, sets, c, scale = layer.screened()
        assert not certified(screen, nodes).any()
        assert not proved(screen, nodes, node, sets, c, scale)[0].any()


# --- scale and rows ---------------------------------------------------------------------------------


@given(shape=shapes)
@many
def test_the_ablated_scale_is_the_ablated_residuals(shape: Shape) -> None:
    layer = make(shape)
    screen, nodes, node, sets, c, scale = layer.screened()
    # Of the readings as given: centring x and c in float32 is the readings' rounding, not this sum's.
    neurons = screen.slots[sets]
    x = nodes.x[node].double() + (c.double()[:, :, None] * screen.W[neurons]).sum(1)
    wanted = (x.pow(2).mean(-1) + screen.eps).sqrt()
    # Against x itself the float64 sum has 1e-16 of |x|^2 to lose: nothing of what is left here.
    SCALE.assert_close(scale, wanted, what=str(shape))
    direct = exact_scale(layer.model.final_norm, moved(layer))
    size = nodes.scale[node] + (c.abs() * screen.reach[neurons]).sum(-1)
    SCALE.assert_close(scale, direct, scale=direct + size, what=f"{shape}, from the weights")


@given(shape=shapes)
@many
def test_low_rank_rows_are_the_ablated_models_rows(shape: Shape) -> None:
    layer = make(shape)
    screen, nodes, node, sets, c, scale = layer.screened()
    n, n_sets = len(layer.x), len(layer.sets)
    wanted = exact_logits(layer.model, moved(layer))
    # A row is as exact as the numbers it is the difference of: x and what the neurons add to it.
    size = nodes.scale[node] + (c.abs() * screen.reach[screen.slots[sets]]).sum(-1)
    magnified = (size / scale).clamp_min(1)[:, None].expand_as(wanted)

    def close(rows: Tensor, what: str) -> None:
        LOGIT.assert_close(rows / magnified, wanted / magnified, what=f"{what}, {shape}")

    close(pair_rows(Pairs(screen, nodes, node, sets, c, scale, scale)), "pairs")
    # As first tokens are read: nodes that share a set, and a constant subtracted from each row.
    of_sets = scale.view(n, n_sets).T.contiguous()
    dense = Dense(screen, nodes, slice(0, n_sets), c.view(n, n_sets, -1).permute(1, 2, 0), of_sets)
    shift = torch.linspace(-2, 2, of_sets.numel()).view_as(of_sets)
    weights, directions = low_rank_terms(dense, shift)
    room = torch.empty(len(weights), *nodes.sz.shape)
    grouped = NATS * low_rank_rows(nodes.sz, weights, of_sets, directions, room)
    grouped += (shift / of_sets)[..., None]
    close(grouped.transpose(0, 1).reshape(n * n_sets, -1), "a group a set")


@given(shape=shapes, data=st.data())
@many
def test_changes_of_a_whole_group_are_those_of_its_pairs(shape: Shape, data: st.DataObject) -> None:
    layer = make(shape)
    screen, nodes, _, _, c, scale = layer.screened()
    n, n_sets = len(layer.x), len(layer.sets)
    c, scale = c.view(n, n_sets, -1), scale.view(n, n_sets)
    covered: list[int] = []
    for group in screen.groups:
        covered += range(n_sets)[group.sets]
        start = data.draw(st.integers(group.sets.start, group.sets.stop - 1), label="first set")
        part = slice(start, group.sets.stop)
        found = read_dense(screen, nodes, group, part)
        assert torch.equal(found.c, c[:, part].permute(1, 2, 0)), f"{part} of {shape}"
        SCALE.assert_close(found.scale, scale[:, part].T, what=f"{part} of {shape}")
    assert covered == list(range(n_sets)), "groups hold every set once, in order"


@given(shape=shapes)
@many
def test_the_scale_moves_by_no_more_than_the_neurons_reach(shape: Shape) -> None:
    layer = make(shape)
    screen, _, node, sets, c, _ = layer.screened()
    norm = layer.model.final_norm
    by = (exact_scale(norm, moved(layer)) - exact_scale(norm, layer.x.double())[node]).abs()
    reach = (c.abs() * screen.reach[screen.slots[sets]]).sum(-1).double()
    assert (by <= reach * (1 + 1e-5) + 1e-9).all(), f"{float((by - reach).max()):.3g} further"


# --- plan and readings ------------------------------------------------------------------------------


@given(shape=shapes)
@many
def test_plain_readings_are_what_they_are_called(shape: Shape) -> None:
    layer = make(shape)
    screen = build_screen(layer.model.last_layer, layer.sets, U)
    nodes = read_nodes(screen, layer.x, layer.a)
    logits = exact_logits(layer.model, layer.x.double())
    ranked = logits.sort(-1, descending=True).values
    m = min(SHORTLIST, shape.d_vocab)
    assert nodes.likely.shape == (shape.n_nodes, m)
    LOGIT.assert_close(logits.gather(-1, nodes.likely).float(), ranked[:, :m], what="likely")
    LOGIT.assert_close(nodes.gap, ranked[:, 0] - ranked[:, 1], what="gap")
    if shape.d_vocab > SHORTLIST:
        LOGIT.assert_close(nodes.beyond, ranked[:, SHORTLIST], what="beyond")
    else:
        assert (nodes.beyond == -torch.inf).all(), "nothing lies beyond a shortlist of all tokens"
    SCALE.assert_close(nodes.scale, exact_scale(layer.model.final_norm, layer.x.double()))
    assert (nodes.tolerance > 0).all()


@given(shape=shapes)
@many
def test_the_tolerance_covers_the_rounding_of_both_sides_and_no_more_than_it_must(shape: Shape) -> None:
    layer = make(shape)
    screen, nodes, node, sets, c, scale = layer.screened()
    tau = pair_tolerance(screen, nodes, node, sets, c, scale)
    rows = pair_rows(Pairs(screen, nodes, node, sets, c, scale, tau))
    off = (rows.double() - exact_logits(layer.model, moved(layer))).abs().amax(-1)
    assert (2 * off <= tau).all(), f"rounding moved a logit by {float((off / tau).max()):.3g} slacks"
    # What is multiplied, at its largest; above a few 1e-6 of that, far too much is a near tie.
    M = (layer.model.W_U * layer.model.final_norm.gain[:, None]).norm(dim=0).max()
    lengths = nodes.x.norm(dim=-1)[node] + (c.abs() * screen.W.norm(dim=-1)[screen.slots[sets]]).sum(-1)
    largest = M * lengths / scale + screen.beta.abs().max()
    assert (tau <= 1e-5 * largest).all(), f"{float((tau / largest).max()):.3g} of what is multiplied"
    assert (tau > 0.99 * nodes.tolerance[node] * (nodes.scale[node] / scale).clamp(max=1)).all()


@given(shape=shapes)
@many
def test_the_plan_knows_each_neurons_range_over_the_vocabulary(shape: Shape) -> None:
    layer = make(shape)
    screen = build_screen(layer.model.last_layer, layer.sets, U)
    norm, neurons = layer.model.final_norm, screen.selected.tolist()
    assert neurons == sorted({i for ablation in layer.sets for i in ablation.neurons})
    W = layer.model.W_out[neurons].double()
    W = W - W.mean(-1, keepdim=True) if norm.centred else W
    P = (W * norm.gain.double()) @ layer.model.W_U.double()
    beta = norm.bias.double() @ layer.model.W_U.double() + layer.model.b_U.double()
    spread = P.amax(-1) - P.amin(-1)
    reach = W.norm(dim=-1) / shape.d_model**0.5
    for name, found, wanted in (
        ("P", screen.P, P),
        ("half", screen.half, spread / 2),
        ("mid", screen.mid, (P.amax(-1) + P.amin(-1)) / 2),
        ("reach", screen.reach, reach),
        ("beta", screen.beta, beta),
    ):
        LOGIT.assert_close(found, wanted, scale=wanted.abs() + 1, what=name)
    bound = spread / 2 + (beta.max() - beta.min()) * reach
    assert (screen.q >= bound * (1 - 1e-5)).all(), "less than a neuron can do"
    M = (layer.model.W_U.double() * norm.gain.double()[:, None]).norm(dim=0).max()
    tolerance = 1e-5 * (M * shape.d_model**0.5 + beta.abs().max()) * reach
    assert (screen.q <= bound * (1 + 1e-5) + tolerance).all(), "more than a neuron can do"


@given(shape=shapes, data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_set_is_the_same_alone_and_beside_larger_ones(shape: Shape, data: st.DataObject) -> None:
    layer = make(shape)
    i = data.draw(st.integers(0, len(layer.sets) - 1), label="set")
    alone = replace(layer, sets=layer.sets[i : i + 1])
    together, by_itself = layer.screened(), alone.screened()
    here = together[3] == i
    c, scale = together[4][here], together[5][here]
    size = len(layer.sets[i].neurons)
    assert torch.equal(c[:, :size], by_itself[4]), "changes"
    assert (c[:, size:] == 0).all(), "an absent neuron changes"
    SCALE.assert_close(scale, by_itself[5])
    assert torch.equal(layer.certified()[here], alone.certified()), "certified"
    assert len(c) == len(layer.x)


def test_a_neuron_at_its_own_activation_and_an_empty_set_change_nothing() -> None:
    layer = make(Shape(n_nodes=1))
    own = Ablation("own", (3, 5), tuple(layer.a[0, [3, 5]].tolist()))
    other = Ablation("other", (1, 3, 7), (2.0, -2.0, 2.0))
    layer = replace(layer, sets=(PLAIN, own, other))
    screen, nodes, node, sets, c, scale = layer.screened()
    assert (c[:2] == 0).all()
    assert (c[2] != 0).all()
    SCALE.assert_close(scale[:2], nodes.scale.repeat(2).double())
    assert certified(screen, nodes)[0, :2].all(), "nothing changes, and it is not certain"
    rows = pair_rows(Pairs(screen, nodes, node, sets, c, scale, scale))
    plain = exact_logits(layer.model, layer.x.double())
    LOGIT.assert_close(rows[:2], plain.repeat(2, 1))


def test_no_set_at_all_can_be_planned() -> None:
    layer = replace(make(Shape(n_nodes=2)), sets=(PLAIN,))
    screen, nodes, _, _, c, _ = layer.screened()
    assert c.shape == (2, 1)
    assert certified(screen, nodes).all()


def test_a_constant_on_all_logits_loosens_and_tightens_nothing() -> None:
    layer = make(Shape(unembedding_bias=0.3))
    model = layer.model
    lifted = replace(layer, model=a_model(model.W_U, model.W_out, model.final_norm, model.b_U + 64.0))
    a, b = (
        build_screen(model.last_layer, layer.sets, U),
        build_screen(lifted.model.last_layer, layer.sets, U),
    )
    rounding = (b.offset_noise - a.offset_noise) * a.reach  # of larger numbers
    LOGIT.assert_close(b.q, (a.q + rounding).double(), scale=a.q + 1, what="q")
    assert torch.equal(layer.certified(), lifted.certified())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_replacement_values_are_what_a_hook_would_write(dtype: torch.dtype) -> None:
    layer = make(Shape())
    m = layer.model
    screen = build_screen(
        a_model(m.W_U, m.W_out, m.final_norm, m.b_U, dtype).last_layer,
        layer.sets,
        LEAST[dtype],
    )
    for row, ablation in enumerate(layer.sets):
        written = torch.tensor(ablation.values, dtype=dtype).float()
        np.testing.assert_array_equal(screen.values[row, : len(written)], written)
        k = screen.present.shape[1]
        assert screen.present[row].tolist() == [float(i < len(written)) for i in range(k)]
    longest = (m.W_U.to(dtype).float() * m.final_norm.gain[:, None]).norm(dim=0).max()
    assert screen.noise == pytest.approx(LEAST[dtype] * float(longest), rel=1e-5)


# --- the first token of whole rows -------------------------------------------------------------------


@some
@given(st.data())
def test_the_best_of_a_row_and_its_lead(data: st.DataObject) -> None:
    """Against a full sort, at any length, with ties within a block and across blocks."""
    d_vocab = data.draw(st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7]))
    rows = torch.from_numpy(
        np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(2, 3, d_vocab))
    )
    rows = (rows * data.draw(st.sampled_from([1.0, 4.0]))).round(decimals=data.draw(st.integers(0, 3)))
    place, lead = best_and_lead(rows)
    ordered = rows.sort(-1, descending=True).values
    assert torch.equal(rows.gather(-1, place[..., None])[..., 0], ordered[..., 0])
    if d_vocab == 1:
        assert (lead == torch.inf).all()
    else:
        assert torch.equal(lead, ordered[..., 0] - ordered[..., 1])
    before, guess = rows.clone(), torch.full((3,), data.draw(st.integers(0, d_vocab - 1)))
    guess[0] = place[0, 0]
    guessed, its_lead = guessed_best_and_lead(rows, guess)
    assert torch.equal(rows, before)
    assert torch.equal(its_lead, lead)
    assert torch.equal(guessed[lead > 0], place[lead > 0]), "without a lead, any of the best"


@given(shape=shapes)
@some
def test_tolerances_of_all_nodes_are_those_of_pairs(shape: Shape) -> None:
    layer = make(shape)
    screen, nodes, node, sets, c, scale = layer.screened()
    wanted = pair_tolerance(screen, nodes, node, sets, c, scale).view(len(layer.x), -1)
    for group in screen.groups:
        found = tolerances(read_dense(screen, nodes, group, group.sets))
        torch.testing.assert_close(found.T, wanted[:, group.sets], rtol=1e-5, atol=1e-12)


@given(shape=shapes)
@some
def test_rows_of_first_tokens_and_their_tolerances_are_in_bits(shape: Shape) -> None:
    layer = make(shape)
    screen, nodes, *_ = layer.screened()
    room, top = Room(2 * 3, screen.P.shape[1], nodes.x.device), nodes.likely[:, :1]
    seen = 0
    for of, at, rows, _, tau in next_token._all_rows(screen, nodes, 3, 2, room):
        (group,) = (g for g in screen.groups if g.sets.start <= of.start < g.sets.stop)
        wanted = tolerances(read_dense(screen, nodes, group, of))[:, at]
        torch.testing.assert_close(tau * NATS, wanted, rtol=1e-5, atol=1e-12)
        # The constant that is subtracted is the row's own value there.
        assert not rows.gather(-1, top[at].expand(len(rows), -1, 1)).abs().gt(tau[..., None]).any()
        seen += tau.numel()
    assert seen == len(nodes.scale) * len(screen.slots)
