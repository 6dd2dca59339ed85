"""The shared decode, held to the hooked path set by set; its work, memory, stops and resume."""

import functools
import hashlib
import itertools
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ccm.decoding import batching, engine, hooked
from ccm.decoding import next_token as choosing
from ccm.decoding import shared as decoding
from ccm.decoding.activations import collect
from ccm.decoding.bounded import BoundedLists
from ccm.decoding.certificate import build_screen
from ccm.decoding.engines import ENGINES
from ccm.decoding.forward import RowCache, plan_rows, run_body
from ccm.decoding.prefill import MAX_SHARERS, prefill, shared_prefixes
from ccm.decoding.results import Batch, Completions, Decoded, Work, merge
from ccm.decoding.shared import decode, decode_sets
from ccm.decoding.tolerance import LEAST, tolerance
from ccm.decoding.tolerance import measure as measure_error
from ccm.errors import CcmError
from ccm.experiment.plan import find_facts
from ccm.experiment.probing import build_prompts
from ccm.method.ablation import PLAIN, Ablation, plan
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.neurons import controls, measure, select
from ccm.method.prompts import SPLITTER, answer_object
from ccm.method.sources import SOURCES, is_decided, knowledge_source
from ccm.method.statistics import ActivationStatistics
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import MAX_NEW_TOKENS, MODELS, spec_for
from tests.exact import forward, margins, margins_from, margins_of
from tests.strategies import toy_configs
from tests.toys import FAMILIES, GROUPED, ToyConfig, token_prompts, toy_folder

each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)
each_family = pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
# Not shrunk: every attempt decodes anew, and what was drawn says enough.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
few = settings(max_examples=20, deadline=None, phases=PHASES)
SMALL, METASPACE = ToyConfig("gpt2", tied=False), ToyConfig("llama")


@functools.cache
def loaded(config: ToyConfig) -> LoadedModel:
    """The toy, loaded once; read-only."""
    return load(spec_for(str(toy_folder(config))))


@dataclass(frozen=True)
class Run:
    """One shared decode with everything it leaves."""

    shards: tuple[Batch, ...]
    decoded: Decoded
    work: Work

    def tokens(self, index: int) -> tuple[tuple[int, ...], ...]:
        return self.decoded.completions(index).tokens

    @property
    def n_sets(self) -> int:
        return self.decoded.leaf.shape[1]


def run(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    ablations: Sequence[Ablation] = (),
    **options: Any,
) -> Run:
    work = Work()
    shards = tuple(decode_sets(model, prompts, ablations, work=work, **options))
    return Run(shards, merge(shards), work)


def random_sets(d_mlp: int, sizes: Sequence[int], size: float, seed: int = 0) -> list[Ablation]:
    """Neuron sets of these sizes at random values of this size."""
    rng = random.Random(seed)
    drawn = [tuple(sorted(rng.sample(range(d_mlp), n))) for n in sizes]
    return [
        Ablation(f"random {i}", neurons, tuple(rng.gauss(0, size) for _ in neurons))
        for i, neurons in enumerate(drawn)
    ]


def some_targets(n: int, d_vocab: int) -> torch.Tensor:
    """Two tokens asked for, per prompt."""
    return torch.tensor([[(7 * i + 3) % d_vocab, i % d_vocab] for i in range(n)]).reshape(n, 2)


# --- the hooked path, set by set --------------------------------------------------------------------


@dataclass
class Largest:
    """Largest differences met in a comparison, for its report."""

    entropy: float = 0.0
    log_prob: float = 0.0


def assert_agrees(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    ablations: Sequence[Ablation],
    *,
    objects: Sequence[tuple[str, str]] | None = None,
    memory_budget: int | None = None,
) -> Run:
    """Compare every set with a hooked run of its own; `objects` are the prompts' CK and PK names."""
    targets, within = some_targets(len(prompts), model.spec.d_vocab), margins(model)
    done = run(model, prompts, ablations, targets=targets, own_top=True, memory_budget=memory_budget)
    if objects is None:  # the plain answers and those of the last set: every source occurs
        texts = (done.decoded.completions(i).texts for i in (0, done.n_sets - 1))
        objects = [(answer_object(a), answer_object(b)) for a, b in zip(*texts, strict=True)]
    for i, ablation in enumerate([PLAIN, *ablations]):
        what = f"{model.spec.name}, {ablation.name} {ablation.neurons}"
        found = done.decoded.completions(i)
        wanted = hooked.decode(model, prompts, ablation, targets=targets)
        for p, (mine, its) in enumerate(zip(found.tokens, wanted.tokens, strict=True)):
            assert mine == its, f"{what}: prompt {list(prompts[p])}"
            text, (ck, pk) = wanted.texts[p], objects[p]
            assert found.texts[p] == text, what
            assert knowledge_source(found.texts[p], ck, pk) == knowledge_source(text, ck, pk), what
        within.entropy.assert_close(found.first.entropy, wanted.first.entropy, what=what)
        np.testing.assert_array_equal(found.first.asked[:, :2], targets, err_msg=what)
        within.log_prob.assert_close(found.first.log_probs[:, :2], wanted.first.log_probs, what=what)
        np.testing.assert_array_equal(found.first.top_tokens, wanted.first.top_tokens, err_msg=what)
        tops = wanted.first.top_log_probs
        within.log_prob.assert_close(found.first.top_log_probs, tops, what=what)
    return done


def paper_sets(
    model: LoadedModel, statistics: ActivationStatistics, n_controls: int, entropy: Sequence[int] = ()
) -> list[Ablation]:
    """The entropy-like set and controls, at each of the five ablation values."""
    measures = measure(model.W_U, model.W_out, model.final_norm, model.spec.null_space_dims)
    chosen = tuple(entropy) or select(measures, 6, 0.0)
    sets = [chosen, *controls(n_controls, model.spec.d_mlp, chosen, seed=123)]
    return [
        plan("entropy" if i == 0 else f"control_{i:03d}", neurons, value, statistics)
        for value in ABLATION_VALUES.values()
        for i, neurons in enumerate(sets)
    ]


@each_toy
def test_agrees_with_the_hooked_path_on_every_family(config: ToyConfig) -> None:
    model = loaded(config)
    prompts = [p for n in (1, 4, 17) for p in token_prompts(5, config, n, n, n)]
    random.Random(0).shuffle(prompts)
    ablations = paper_sets(model, collect(model, prompts)[0], n_controls=2)
    done = assert_agrees(model, prompts, ablations)
    changed = (done.decoded.leaf != done.decoded.leaf[:, :1]).mean()
    assert changed > 0.05, f"only {100 * changed:.0f} % of the cells differ from the plain run"


def draw_prompts(data: st.DataObject, d_vocab: int, max_len: int = 80) -> list[list[int]]:
    """Ragged prompts of few lengths, so that some share a batch; special tokens in any place."""
    lengths = data.draw(
        st.lists(st.integers(1, max_len), min_size=1, max_size=3, unique=True), label="lengths"
    )
    of = data.draw(st.lists(st.sampled_from(lengths), min_size=1, max_size=6), label="of prompts")
    rng = random.Random(data.draw(st.integers(0, 999), label="prompt seed"))
    return [rng.choices(range(d_vocab), k=n) for n in of]


def draw_sets(data: st.DataObject, d_mlp: int, max_sets: int = 4) -> list[Ablation]:
    sizes = data.draw(st.lists(st.integers(0, d_mlp), max_size=max_sets), label="set sizes")
    size = data.draw(st.sampled_from([0.01, 0.3, 3.0]), label="size of values")
    return random_sets(d_mlp, sizes, size, data.draw(st.integers(0, 999), label="set seed"))


# A byte: one prompt a part. The largest holds all prompts of a toy.
budgets = st.sampled_from([1, 300_000, 1 << 20, 1 << 30])


@given(st.data())
@few
def test_agrees_with_the_hooked_path_on_any_toy(data: st.DataObject) -> None:
    config = data.draw(toy_configs(), label="toy")
    config = replace(config, d_vocab=data.draw(st.sampled_from([320, 333, 512]), label="d_vocab"))
    prompts = draw_prompts(data, config.d_vocab)
    ablations = draw_sets(data, config.d_mlp)
    assert_agrees(loaded(config), prompts, ablations, memory_budget=data.draw(budgets, label="budget"))


@each_family
def test_decoding_under_one_set_is_the_same_function(config: ToyConfig) -> None:
    model, sets = loaded(config), (PLAIN, *random_sets(config.d_mlp, [7], 2.0))
    prompts = token_prompts(6, config, seed=8)
    targets = some_targets(len(prompts), config.d_vocab)
    for ablation in sets:
        found = decode(model, prompts, ablation, targets=targets, max_new_tokens=4)
        wanted = hooked.decode(model, prompts, ablation, targets=targets, max_new_tokens=4)
        assert found.tokens == wanted.tokens
        assert found.texts == wanted.texts
        for f in fields(wanted.first):
            mine, its = getattr(found.first, f.name), getattr(wanted.first, f.name)
            # Asked for are the plain run's top tokens, too.
            mine = mine[:, :2] if f.name in ("asked", "log_probs") else mine
            of = margins(model).entropy if f.name == "entropy" else margins(model).log_prob
            of.of(f.name).assert_close(mine.astype(float), its.astype(float))


def test_top_tokens_are_the_plain_runs_unless_asked_for() -> None:
    model, prompts = loaded(SMALL), token_prompts(7, SMALL)
    ablations = random_sets(SMALL.d_mlp, [9, 20], 3.0)
    own, plain = (run(model, prompts, ablations, own_top=own) for own in (True, False))
    assert own.decoded.top_tokens.shape == (7, 3, 3)
    assert plain.decoded.top_tokens.shape == (7, 1, 3)
    np.testing.assert_array_equal(own.decoded.top_tokens[:, :1], plain.decoded.top_tokens)
    assert plain.decoded.completions(1).first.top_tokens.shape == (7, 0)
    for i in range(3):
        assert own.tokens(i) == plain.tokens(i)
        # The plain run's top tokens are asked of every set.
        np.testing.assert_array_equal(plain.decoded.asked, plain.decoded.top_tokens[:, 0])
    differ = own.decoded.top_tokens[:, 1:] != own.decoded.top_tokens[:, :1]
    assert differ.any(), "no set has top tokens of its own"


# --- the trained organism ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Organism:
    """The embedded organism with probing prompts of a few lengths; read-only."""

    model: LoadedModel
    prompts: list[list[int]]
    objects: list[tuple[str, str]]  # CK and PK
    ablations: list[Ablation]  # planted neurons and 10 controls, each at five values


@pytest.fixture(scope="module")
def organism() -> Organism:
    """Read-only."""
    model = load(MODELS["organism"])
    built = build_prompts(model, find_facts(None, MODELS["organism"]), "bare", engine=ENGINES["hooked"])
    encoded = [(model.encode(p.text), p) for p in built.prompts]
    chosen = [(tokens, p) for tokens, p in encoded if len(tokens) in (20, 24, 29, 35)][:80]
    prompts = [tokens for tokens, _ in chosen]
    measures = measure(model.W_U, model.W_out, model.final_norm, model.spec.null_space_dims)
    planted = select(measures, model.spec.n_entropy_neurons, model.spec.min_rho)
    ablations = paper_sets(model, collect(model, prompts)[0], n_controls=10, entropy=planted)
    objects = [(p.counter_object, p.parametric_object) for _, p in chosen]
    assert len(prompts) == 80
    return Organism(model, prompts, objects, ablations)


def test_agrees_with_the_hooked_path_on_the_organism(organism: Organism) -> None:
    done = assert_agrees(organism.model, organism.prompts, organism.ablations, objects=organism.objects)
    sources = [
        [
            knowledge_source(text, ck, pk)
            for text, (ck, pk) in zip(done.decoded.completions(i).texts, organism.objects, strict=True)
        ]
        for i in range(done.n_sets)
    ]
    assert set(sources[0]) == set(SOURCES), "a source never occurs"
    assert sources[1] != sources[0], "the planted neurons change nothing"
    work = done.work
    settled = work.certified + work.shortlisted
    assert settled > 0.9 * (settled + work.low_rank), f"hardly anything is settled early: {work}"


# --- a result does not depend on its batch ----------------------------------------------------------


def assert_same(model: LoadedModel, a: Decoded, row: int, b: Decoded, other: int, what: str) -> None:
    """Compare one prompt's results under all sets in two runs."""
    for i in range(a.leaf.shape[1]):
        mine, its = a.leaves[a.leaf[row, i]], b.leaves[b.leaf[other, i]]
        assert mine == its, f"{what}, set {i}: {mine}, elsewhere {its}"
    # Only the shape of the batch differs.
    within = margins(model)
    within.entropy.assert_close(a.entropy[row], b.entropy[other], what=what)
    within.log_prob.assert_close(a.log_probs[row], b.log_probs[other], what=what)
    np.testing.assert_array_equal(a.asked[row], b.asked[other], err_msg=what)
    np.testing.assert_array_equal(a.top_tokens[row], b.top_tokens[other], err_msg=what)
    within.log_prob.assert_close(a.top_log_probs[row], b.top_log_probs[other], what=what)


@given(st.data())
@settings(few, max_examples=12)
def test_a_result_does_not_depend_on_the_batch(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(FAMILIES), label="toy")
    model, prompts = loaded(config), draw_prompts(data, config.d_vocab)
    check_invariance(model, prompts, draw_sets(data, config.d_mlp), data)


def check_invariance(
    model: LoadedModel,
    prompts: list[list[int]],
    ablations: list[Ablation],
    data: st.DataObject,
) -> None:
    order = data.draw(st.permutations(range(len(prompts))), label="order")
    budget = data.draw(budgets, label="budget")
    targets = some_targets(len(prompts), model.spec.d_vocab)
    mixed = run(
        model,
        [prompts[i] for i in order],
        ablations,
        targets=targets[list(order)],
        memory_budget=budget,
        own_top=True,
    )
    for row, i in enumerate(order):
        alone = run(model, [prompts[i]], ablations, targets=targets[i : i + 1], own_top=True)
        what = f"{model.spec.name}, prompt {prompts[i]}"
        assert_same(model, mixed.decoded, row, alone.decoded, 0, what)


@each_toy
def test_how_much_is_worked_on_at_once_changes_nothing(
    config: ToyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = loaded(config), token_prompts(9, config, seed=2)
    ablations = random_sets(config.d_mlp, [5, 0, 12, 5], 1.0)
    whole = run(model, prompts, ablations, own_top=True)
    for tokens, pairs, row_bytes in ((1, 1, 1), (9, 3, 1 << 14), (1 << 20, 1 << 20, 1 << 30)):
        sizes = choosing.AtOnce(tokens, pairs, row_bytes, d_vocab=config.d_vocab)
        monkeypatch.setattr(decoding, "at_once", lambda model, sizes=sizes: sizes)
        again = run(model, prompts, ablations, own_top=True)
        for i in range(len(prompts)):
            assert_same(model, again.decoded, i, whole.decoded, i, f"{config.id}, {sizes}")
        assert again.work == whole.work
    monkeypatch.undo()
    monkeypatch.setattr(batching, "MAX_BATCH", 4)
    again = run(model, prompts, ablations, own_top=True)
    assert [len(shard.prompts) for shard in again.shards] == [4, 4, 1]
    for i in range(len(prompts)):
        assert_same(model, again.decoded, i, whole.decoded, i, f"{config.id}, 4 prompts a part")


def test_an_ablation_that_lifts_a_token_beyond_exp_has_an_entropy(tmp_path: Path) -> None:
    """Rows are taken relative to the plain argmax; float32's exp ends 88 nats above it."""
    model = edited_head(tmp_path / "steep", SMALL, lambda head: 40 * head)
    prompts = token_prompts(5, SMALL, seed=4, min_len=3, max_len=6)
    ablations = random_sets(SMALL.d_mlp, [12], 1e4)
    done = run(model, prompts, ablations)
    plain, wanted = (hooked.decode(model, prompts, a) for a in (PLAIN, ablations[0]))
    targets = torch.from_numpy(plain.first.top_tokens[:, :1])
    fall = hooked.decode(model, prompts, ablations[0], targets=targets).first.log_probs
    assert fall.min() < -100, "nothing is lifted that far: exp holds it"
    margins(model).entropy.assert_close(done.decoded.entropy[:, 1], wanted.first.entropy)


# --- ties -------------------------------------------------------------------------------------------


def edited_head(
    folder: Path, config: ToyConfig, edit: Callable[[torch.Tensor], torch.Tensor]
) -> LoadedModel:
    """The toy with another unembedding, rows (d_vocab, d_model), in a folder of its own."""
    from safetensors.torch import load_file, save_file

    assert not config.tied
    shutil.copytree(toy_folder(config), folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = edit(weights["lm_head.weight"].clone()).contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    return load(spec_for(str(folder)))


def paired(head: torch.Tensor) -> torch.Tensor:
    """Every odd token is the even one before it."""
    head[1::2] = head[::2]
    return head


def nearly_paired(head: torch.Tensor) -> torch.Tensor:
    """Every odd token is the even one before it, but for the last bit of a few weights."""
    head[1::2] = head[::2]
    signs = torch.randint(-1, 2, head[1::2].shape, generator=torch.Generator().manual_seed(0))
    head[1::2] *= 1 + signs * 1.2e-7
    return head


@pytest.mark.parametrize("config", [SMALL, METASPACE], ids=lambda config: config.id)
@pytest.mark.parametrize("later", [True, False], ids=["settled later", "settled at once"])
def test_equal_logits_go_to_the_lowest_id(
    config: ToyConfig, later: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not later:
        settle_at_once(monkeypatch)
    model = edited_head(tmp_path / "paired", config, paired)
    assert torch.equal(model.W_U[:, 0], model.W_U[:, 1])
    prompts = token_prompts(12, config, seed=4, min_len=3, max_len=4)
    ablations = random_sets(config.d_mlp, [6, 15], 1.5)
    done = run(model, prompts, ablations)
    for i, ablation in enumerate([PLAIN, *ablations]):
        odd = [t for tokens in done.tokens(i) for t in tokens if t % 2]
        assert not odd, f"{ablation.name}: odd tokens {odd} never come first"
        assert done.tokens(i) == hooked.decode(model, prompts, ablation).tokens, ablation.name
    decisions, nodes, prefixes = counted(model, prompts, done)
    # Every choice, and the list of likely first tokens of each prompt's plain run.
    asked = decisions + len(prompts)
    assert done.work.certified == done.work.shortlisted == 0, "a tie was settled without a referee"
    if later:  # wrong paths may have been taken before, whose work counts, too
        assert done.work.repeated <= len(prompts)
        assert done.work.refereed >= asked, "a tie that no referee saw"
        return
    assert done.work.refereed == asked, "a tie that no referee saw"
    assert done.work.full_rows == nodes + asked
    # Every node holds a tie, and each is run by itself once, whatever the number of its sets.
    assert done.work.forward_tokens == fed(prompts, nodes) + prefixes


@given(st.data())
@settings(few, max_examples=6)
def test_near_ties_do_not_depend_on_the_batch(near_ties: LoadedModel, data: st.DataObject) -> None:
    prompts = draw_prompts(data, SMALL.d_vocab, max_len=20)
    check_invariance(near_ties, prompts, draw_sets(data, SMALL.d_mlp, max_sets=3), data)


@pytest.fixture(scope="module")
def near_ties(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A toy whose tokens come in pairs that only rounding tells apart; read-only."""
    return edited_head(tmp_path_factory.mktemp("near") / "toy", SMALL, nearly_paired)


def test_without_the_referee_near_ties_would_depend_on_the_batch(
    near_ties: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = token_prompts(16, SMALL, seed=6, min_len=5, max_len=9)
    ablations = random_sets(SMALL.d_mlp, [6, 15], 0.5)

    def differing() -> int:
        mixed = run(near_ties, prompts, ablations).decoded
        pairs = ((mixed, i, run(near_ties, [p], ablations).decoded) for i, p in enumerate(prompts))
        return sum(
            mixed.leaves[mixed.leaf[i, s]] != alone.leaves[alone.leaf[0, s]]
            for mixed, i, alone in pairs
            for s in range(3)
        )

    assert differing() == 0
    monkeypatch.setattr(choosing.Referee, "settle", lambda *args: None)
    # Kernels that batches do not move leave nothing to see.
    seen = differing() > 0 or measure_error(near_ties, prompts).largest == 0
    assert seen, "these near ties are none: the test above cannot fail"


def test_the_reference_settles_near_ties_as_exact_arithmetic_does(
    near_ties: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = token_prompts(24, SMALL, seed=6, min_len=5, max_len=9)
    ablations = random_sets(SMALL.d_mlp, [6, 15], 0.5)
    done = run(near_ties, prompts, ablations, own_top=True)
    for i, ablation in enumerate([PLAIN, *ablations]):
        found, wanted = done.decoded.completions(i), hooked.decode(near_ties, prompts, ablation)
        assert found.tokens == wanted.tokens, ablation.name
        np.testing.assert_array_equal(found.first.top_tokens, wanted.first.top_tokens)
        exact = forward(near_ties.source, prompts, ablations=[ablation] * len(prompts)).logits
        last = exact[range(len(prompts)), [len(p) - 1 for p in prompts]]
        np.testing.assert_array_equal(wanted.first.top_tokens[:, 0], last.argmax(-1))
    monkeypatch.setattr(hooked, "NEAR", -1.0)
    unsettled = hooked.decode(near_ties, prompts)
    moved = unsettled.first.top_tokens != done.decoded.completions(0).first.top_tokens
    assert moved.any(), "float32 has all of them right: nothing was settled"


def test_prompts_that_float32_has_wrong_are_decoded_once_more(
    near_ties: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = token_prompts(40, SMALL, seed=6, min_len=5, max_len=9)
    ablations = random_sets(SMALL.d_mlp, [6, 15], 0.5)
    read: list[list[int]] = []

    def at_last(indices: Sequence[int], *nodes: Any) -> dict[str, np.ndarray]:
        read.append(sorted(indices))
        return {"of": np.asarray(indices)}

    options: dict[str, Any] = {"targets": some_targets(40, SMALL.d_vocab), "max_new_tokens": 1}
    later = run(near_ties, prompts, ablations, at_last=at_last, **options)
    (batch,) = later.shards
    assert 0 < later.work.repeated < 40, "all are right, or all are wrong: neither tells anything"
    # What is read beside the decode depends on no choice, so it is read once.
    assert read == [list(range(40))]
    np.testing.assert_array_equal(batch.at_last["of"], batch.prompts)
    assert set(batch.leaf.ravel().tolist()) == set(range(len(batch.leaves))), "a leaf that none chose"
    assert batch.texts == tuple(near_ties.decode(leaf) for leaf in batch.leaves)
    settle_at_once(monkeypatch)
    at_once = run(near_ties, prompts, ablations, **options)
    assert at_once.work.repeated == 0
    for i in range(3):
        mine, its = later.decoded.completions(i), at_once.decoded.completions(i)
        assert (mine.tokens, mine.texts) == (its.tokens, its.texts)
        for name in ("asked", "top_tokens"):
            np.testing.assert_array_equal(getattr(mine.first, name), getattr(its.first, name))
        within = margins(near_ties)
        within.entropy.assert_close(mine.first.entropy, its.first.entropy)
        for name in ("log_probs", "top_log_probs"):
            within.log_prob.assert_close(getattr(mine.first, name), getattr(its.first, name))


def settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every step wait for its near ties, as a step of observed activations does."""
    monkeypatch.setattr(engine, "Referee", lambda *args, later: choosing.Referee(*args, later=False))


# --- what it costs, counted exactly -----------------------------------------------------------------


def steps_of(model: LoadedModel, tokens: tuple[int, ...], max_new_tokens: int, full: bool) -> int:
    """How many tokens were chosen for a continuation, the EOS that is not in it included."""
    may_change = bool(tokens) and bool(decoding._provisional_tokens(model)[tokens[-1]])
    if not full and not may_change and SPLITTER.search(model.decode(tokens)):
        return len(tokens)
    return min(len(tokens) + 1, max_new_tokens)


def counted(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    done: Run,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    full: Sequence[bool] | None = None,
) -> tuple[int, int, int]:
    """Choices, distinct prefixes (prompts included) and their lengths, from the results alone."""
    decisions = nodes = lengths = 0
    for p, prompt in enumerate(prompts):
        prefixes: set[tuple[int, ...]] = set()
        for s in range(done.n_sets):
            tokens = done.decoded.leaves[done.decoded.leaf[p, s]]
            steps = steps_of(model, tokens, max_new_tokens, full is None or full[s])
            decisions += steps
            prefixes |= {tokens[:i] for i in range(steps)}
        nodes += len(prefixes)
        lengths += sum(len(prompt) + len(prefix) for prefix in prefixes)
    return decisions, nodes, lengths


def fed(prompts: Sequence[Sequence[int]], nodes: int) -> int:
    """Positions run: shared prefixes once, the rest of prompts, one for a node that is no prompt."""
    groups = shared_prefixes(prompts)
    once = {tuple(prompts[members[0]][:length]) for members, length in groups}
    own = sum(len(prompts[i]) - length for members, length in groups for i in members)
    return sum(map(len, once)) + own + nodes - len(prompts)


def check_work(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    done: Run,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    full: Sequence[bool] | None = None,
) -> None:
    decisions, nodes, _ = counted(model, prompts, done, max_new_tokens=max_new_tokens, full=full)
    work = done.work
    first = len(prompts) * done.n_sets  # these are read off the rows that are there
    later = work.certified + work.shortlisted + work.low_rank
    wanted = {
        "prompts": len(prompts),
        "full_rows": work.nodes + work.refereed,
        "first_rows": (len(prompts) + work.repeated) * done.n_sets,
        "halved": 0,
        "peak_bytes": 0,
    }
    assert {name: getattr(work, name) for name in wanted} == wanted
    if work.repeated:  # the paths that float64 did not take are not known here
        assert work.nodes > nodes
        assert later >= decisions - first
    else:
        assert work.nodes == nodes
        assert later == decisions - first
    # Near ties by chance are rare; those on purpose are counted exactly with the ties.
    many = 0.01 * decisions + 2 * done.n_sets  # a node's near tie may be one for every set
    many *= tolerance(model, prompts) / LEAST[torch.float32]  # and what is near, this machine says
    assert work.refereed <= many, f"{work.refereed} of {decisions} choices are near ties"
    if work.repeated:
        return
    alone = work.forward_tokens - fed(prompts, nodes)
    assert (alone > 0) == (work.refereed > 0), f"{alone} tokens more than there are positions"
    assert alone <= work.refereed * (max(map(len, prompts)) + max_new_tokens), f"{alone} tokens more"


@given(st.data())
@few
def test_work_is_counted_exactly(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(FAMILIES), label="toy")
    model, prompts = loaded(config), draw_prompts(data, config.d_vocab, max_len=12)
    ablations = draw_sets(data, config.d_mlp)
    steps = data.draw(st.integers(1, MAX_NEW_TOKENS), label="max_new_tokens")
    full = [data.draw(st.booleans(), label="full") for _ in range(len(ablations) + 1)]
    budget = data.draw(budgets, label="budget")
    done = run(model, prompts, ablations, max_new_tokens=steps, full=full, memory_budget=budget)
    check_work(model, prompts, done, max_new_tokens=steps, full=full)


def test_controls_cost_rows_and_hardly_any_forwards(organism: Organism) -> None:
    model, prompts = organism.model, organism.prompts
    measured = [run(model, prompts, organism.ablations[:n]) for n in (0, 5, 10)]
    for done in measured:
        check_work(model, prompts, done)
    none, some, twice = (done.work for done in measured)
    plain = measured[0].tokens(0)
    back = sum(steps_of(model, tokens, MAX_NEW_TOKENS, True) - 1 for tokens in plain)
    assert none.refereed == 0
    assert none.forward_tokens == fed(prompts, len(prompts) + back), "no sets cost as much as plain"
    own = some.forward_tokens - none.forward_tokens
    assert 0 < own < 0.3 * none.forward_tokens, f"{own} tokens for five sets"
    grown = twice.forward_tokens - none.forward_tokens
    assert grown < 1.6 * own, f"twice the sets took {grown} tokens more, {own} before"


def test_sets_that_agree_share_every_node() -> None:
    model, prompts = loaded(SMALL), token_prompts(10, SMALL)
    one = random_sets(SMALL.d_mlp, [8], 2.0)
    once, often = run(model, prompts, one), run(model, prompts, one * 9)
    assert often.work.forward_tokens == once.work.forward_tokens
    assert often.work.nodes == once.work.nodes
    assert often.decoded.leaves == once.decoded.leaves, "a continuation is there twice"
    # The plain run changes nothing, so every choice of it is certain; the rest is the set's own.
    plain = run(model, prompts).work
    assert plain.shortlisted == plain.low_rank == 0, "the plain run needed more than its own argmax"
    for name in ("certified", "shortlisted", "low_rank"):
        own = getattr(once.work, name) - getattr(plain, name)
        assert getattr(often.work, name) == getattr(plain, name) + 9 * own, name


# --- the stop at a splitter -------------------------------------------------------------------------


def ends_answer(model: LoadedModel, token: int) -> bool:
    """Whether a token's own text, as it would stand in a completion, holds a splitter match."""
    return SPLITTER.search(model.decode([token])) is not None


def is_byte(model: LoadedModel, token: int) -> bool:
    """Whether a token is one byte of a fallback, whose text depends on the bytes around it."""
    piece = model.tokenizer.convert_ids_to_tokens(token)
    return re.fullmatch(r"<0x[0-9A-F]{2}>", piece or "") is not None


def likely_ends(config: ToyConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make splitters, special tokens and bytes that go wrong together likely answers."""
    tokens = tokenizer_of(config)
    gpt2 = [".", ",", "\\", "n", "a", "Ġ", "Ċ", "Ã", "("]
    llama = [".", "<s>", "<unk>", "<0x2E>", "<0x0A>", "<0xC3>", "a", "b", "▁"]
    chosen = [tokens[t] for t in (llama if config.family in GROUPED else gpt2)]

    def edit(head: torch.Tensor) -> torch.Tensor:
        head[chosen] *= 2.2
        return head

    return edit


def tokenizer_of(config: ToyConfig) -> dict[str, int]:
    vocabulary: dict[str, int] = loaded(config).tokenizer.get_vocab()
    return vocabulary


@pytest.mark.parametrize("config", [SMALL, METASPACE], ids=lambda config: config.id)
def test_stopping_at_a_splitter_changes_no_source(config: ToyConfig, tmp_path: Path) -> None:
    model = edited_head(tmp_path / "ends", config, likely_ends(config))
    prompts = token_prompts(60, config, seed=12, min_len=3, max_len=5)
    ablations = random_sets(config.d_mlp, [4, 10, 20], 1.0)
    check_stops(model, prompts, ablations)


def test_stopping_at_a_splitter_changes_no_source_of_the_organism(organism: Organism) -> None:
    check_stops(organism.model, organism.prompts, organism.ablations, organism.objects)


def test_stopping_at_the_decision_changes_no_source_of_the_organism(organism: Organism) -> None:
    """And takes fewer nodes than stopping at the end of the answer."""
    whole = run(organism.model, organism.prompts, organism.ablations)
    flags = [True, True] + [False] * (len(organism.ablations) - 1)
    answered = run(organism.model, organism.prompts, organism.ablations, full=flags)
    for counter_first in (False, True):

        def decided(prompt: int, text: str, first: bool = counter_first) -> bool:
            return is_decided(text, *organism.objects[prompt], counter_first=first)

        stopped = run(organism.model, organism.prompts, organism.ablations, full=flags, decided=decided)
        assert stopped.work.nodes < answered.work.nodes
        for i, full in enumerate(flags):
            done, wanted = stopped.decoded.completions(i), whole.decoded.completions(i)
            assert not full or done.tokens == wanted.tokens
            for mine, its, objects in zip(done.texts, wanted.texts, organism.objects, strict=True):
                assert its.startswith(mine)
                mine_is, its_is = (
                    knowledge_source(text, *objects, counter_first=counter_first)
                    for text in (mine, its)
                )
                assert mine_is == its_is, f"{mine!r} of {its!r}: {objects}"
        np.testing.assert_array_equal(stopped.decoded.entropy, whole.decoded.entropy)


def check_stops(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    ablations: Sequence[Ablation],
    objects: Sequence[tuple[str, str]] | None = None,
) -> None:
    whole = run(model, prompts, ablations)
    flags = [i == 1 for i in range(len(ablations) + 1)]  # one full set among those that stop
    stopped = run(model, prompts, ablations, full=flags)
    for i, full in enumerate(flags):
        if full:
            assert stopped.tokens(i) == whole.tokens(i), "a full set was cut"
            continue
        cut = 0
        done, wanted = stopped.decoded.completions(i), whole.decoded.completions(i)
        for p, (mine, its) in enumerate(zip(done.tokens, wanted.tokens, strict=True)):
            what = f"{model.spec.name}, set {i}, prompt {p}: {done.texts[p]!r} of {wanted.texts[p]!r}"
            assert mine == its[: len(mine)], f"{what}: no prefix"
            early = [t for t in mine[:-1] if ends_answer(model, t) and not is_byte(model, t)]
            assert not early, f"{what}: it went on after {early}"
            if len(mine) < len(its):
                cut += 1
                assert SPLITTER.search(done.texts[p]), f"{what}: cut without a splitter"
            assert answer_object(done.texts[p]) == answer_object(wanted.texts[p]), what
            own = answer_object(wanted.texts[p])
            begun = own.rpartition(" ")[0] or own  # an object that begins the one that is named
            pairs = [objects[p] if objects else (own, "a"), (begun, own), (own, begun)]
            for (ck, pk), counter_first in itertools.product(pairs, (False, True)):
                cut_short, in_full = (
                    knowledge_source(text, ck, pk, counter_first=counter_first)
                    for text in (done.texts[p], wanted.texts[p])
                )
                assert cut_short == in_full, what
        # The organism ends by itself after its full stop: stopping spares it the EOS alone.
        few_cut = f"{cut} of {len(prompts)} answers were cut: nothing was tested"
        assert cut > 0.1 * len(prompts) or objects, few_cut
    check_work(model, prompts, stopped, full=flags)
    np.testing.assert_array_equal(stopped.decoded.entropy, whole.decoded.entropy)
    np.testing.assert_array_equal(stopped.decoded.log_probs, whole.decoded.log_probs)
    saved = whole.work.forward_tokens - stopped.work.forward_tokens
    assert saved > 0, "stopping saved nothing"


@each_family
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_token_that_follows_changes_the_text_of_what_is_decided(
    config: ToyConfig, data: st.DataObject
) -> None:
    """Unless it ends in a byte or in half a character, a text begins that of whatever follows it."""
    model = loaded(config)
    often = [*"\\n.", "Ġ", "Ã", "▁", "<0xC3>", "<0x2E>", "a"]
    vocabulary = tokenizer_of(config)
    special = [model.bos, *(vocabulary[t] for t in often if t in vocabulary)]
    any_token = st.sampled_from(special) | st.integers(0, config.d_vocab - 1)
    tokens = st.lists(any_token.filter(lambda i: i not in model.eos), min_size=1, max_size=5)
    before, after = data.draw(tokens, label="before"), data.draw(tokens, label="after")
    text = model.decode(before)
    if not (decoding._provisional_tokens(model)[before[-1]] or text.endswith("\ufffd")):
        assert model.decode([*before, *after]).startswith(text)


@each_family
def test_bytes_and_special_tokens_are_marked(config: ToyConfig) -> None:
    model = loaded(config)
    marked = set(decoding._provisional_tokens(model).nonzero()[:, 0].tolist())
    bytes_ = {i for t, i in tokenizer_of(config).items() if t.startswith("<0x")}
    assert bytes_ | {*model.tokenizer.all_special_ids} <= marked
    # Behind any other token a text stays what it is; `skip_special_tokens` leaves no text of these.
    assert all(i in bytes_ or not model.decode([i]) for i in marked)


# --- memory -----------------------------------------------------------------------------------------


def test_a_budget_cuts_parts_and_one_prompt_always_fits() -> None:
    model, prompts = loaded(SMALL), token_prompts(7, SMALL, seed=7)
    ablations = random_sets(SMALL.d_mlp, [5, 9], 2.0)
    whole = run(model, prompts, ablations)
    assert len(whole.shards) == 1
    single = run(model, prompts, ablations, memory_budget=1)
    assert [len(shard.prompts) for shard in single.shards] == [1] * 7
    some = run(model, prompts, ablations, memory_budget=1 << 18)
    assert 1 < len(some.shards) < 7
    for other in (single, some):
        for i in range(7):
            assert_same(model, other.decoded, i, whole.decoded, i, f"{len(other.shards)} parts")
        seen = np.concatenate([shard.prompts for shard in other.shards])
        assert sorted(seen) == list(range(7)), "a prompt twice or never"
        lengths = [len(prompts[i]) for i in seen]
        assert lengths == sorted(lengths), "shorter prompts come first"
        assert replace(other.work, forward_tokens=0) == replace(whole.work, forward_tokens=0)


def test_a_budget_of_tiny_batches_is_said_with_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    model, prompts = loaded(SMALL), token_prompts(12, SMALL, seed=7)
    ablations = random_sets(SMALL.d_mlp, [5, 9], 2.0)
    screen = build_screen(model.last_layer, [PLAIN, *ablations], u=0.0)
    sizes = decoding._engine(model, screen, None, max_new_tokens=MAX_NEW_TOKENS)
    size = sizes.prompt_bytes(max(map(len, prompts)))
    for budget, rooms in ((1, [1]), (3 * size, [3]), (8 * size - 1, [7]), (8 * size, []), (None, [])):
        caplog.clear()
        run(model, prompts, ablations, memory_budget=budget)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == len(rooms), said
        for line, room in zip(said, rooms, strict=True):
            assert f"room for {room} prompts at a time under 3 sets" in line
            assert f"Give --memory-budget {-(-8 * size >> 20)}M or more" in line
    caplog.clear()
    run(model, prompts[:3], ablations, memory_budget=3 * size)
    assert not caplog.records, "all prompts are in one batch"


def test_a_batch_that_would_outgrow_its_budget_is_cut_before_it_takes_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sets that all go their own ways: more continuations than are reckoned with."""
    model, prompts = loaded(SMALL), token_prompts(12, SMALL, seed=7)
    ablations = random_sets(SMALL.d_mlp, [20] * 40, 8.0)
    whole = run(model, prompts, ablations)
    grown = list[tuple[int, int]]()
    check = engine.Engine._check_budget

    def told(self: Any, batch: Any, nodes: int) -> None:
        check(self, batch, nodes)
        if len(batch) > 1:
            grown.append((nodes * self.node_bytes(max(map(len, batch))), self.budget))

    monkeypatch.setattr(engine.Engine, "_check_budget", told)
    lengths = max(map(len, prompts))
    screen = build_screen(model.last_layer, [PLAIN, *ablations], u=0.0)
    sizes = decoding._engine(model, screen, None, max_new_tokens=MAX_NEW_TOKENS)
    budget = len(prompts) * sizes.prompt_bytes(lengths) // 2
    parts = run(model, prompts, ablations, memory_budget=budget)
    assert parts.work.halved > 0, "no batch outgrew its budget: nothing was tested"
    assert grown
    assert all(needed <= allowed == budget for needed, allowed in grown)
    for i in range(len(prompts)):
        assert_same(model, parts.decoded, i, whole.decoded, i, f"{len(parts.shards)} parts")


def test_a_batch_takes_some_seconds_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = loaded(SMALL), token_prompts(9, SMALL, seed=7)
    whole = run(model, prompts)
    tokens = sum(map(len, prompts)) / len(prompts) + MAX_NEW_TOKENS
    parameters = sum(p.numel() for p in model.body.parameters())
    work = parameters * tokens + batching.PER_ENTRY * SMALL.d_vocab
    monkeypatch.setattr(batching, "MAX_WORK", 4.5 * work)
    parts = run(model, prompts)
    assert [len(shard.prompts) for shard in parts.shards] == [4, 4, 1]
    for i in range(len(prompts)):
        assert_same(model, parts.decoded, i, whole.decoded, i, "parts of four")
    sets = random_sets(SMALL.d_mlp, [6] * 40, 1.0)
    more = run(model, prompts, sets)
    least = 4.5 * work / (work + 40 * batching.PER_ENTRY * SMALL.d_vocab)
    assert len(more.shards[0].prompts) == max(1, int(least)) < 4, "sets are work, too"
    monkeypatch.setattr(batching, "MAX_WORK", 1.0)
    assert len(run(model, prompts).shards) == 9, "one prompt at least"


def fails_above(
    monkeypatch: pytest.MonkeyPatch, limit: int, error: Callable[[], Exception]
) -> list[int]:
    """Let parts of more than `limit` prompts fail; returns the sizes tried, as they come."""
    whole, tried = engine.Engine.run, list[int]()

    def failing(self: Any, asked: engine.Asked, *args: Any) -> Batch:
        tried.append(len(asked.prompts))
        if len(asked.prompts) > limit:
            raise error()
        return whole(self, asked, *args)

    monkeypatch.setattr(engine.Engine, "run", failing)
    return tried


def full_of(text: str) -> Callable[[], Exception]:
    return lambda: RuntimeError(text)


NO_MEMORY = (
    lambda: torch.OutOfMemoryError("CUDA out of memory."),
    full_of("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError,
)


@pytest.mark.parametrize(
    ("limit", "error"),
    [(1, NO_MEMORY[0]), (3, NO_MEMORY[1]), (3, NO_MEMORY[2])],
    ids=["1-cuda", "3-cpu", "3-python"],
)
def test_a_part_that_runs_out_of_memory_is_halved(
    limit: int, error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = loaded(SMALL), token_prompts(7, SMALL, seed=7)
    ablations = random_sets(SMALL.d_mlp, [5, 9], 2.0)
    whole = run(model, prompts, ablations)
    tried = fails_above(monkeypatch, limit, error)
    halved = run(model, prompts, ablations)
    failed = sum(size > limit for size in tried)
    assert halved.work.halved == failed > 1
    assert max(len(shard.prompts) for shard in halved.shards) <= limit
    for i in range(7):
        assert_same(model, halved.decoded, i, whole.decoded, i, f"at most {limit} prompts a part")
    assert replace(halved.work, halved=0) == whole.work, "a part that failed was counted"


def test_a_prompt_that_does_not_fit_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[0, 5, 6, 7], [0, 5]]
    fails_above(monkeypatch, 0, NO_MEMORY[0])
    with pytest.raises(CcmError, match=r"^prompt 1 under 3 sets does not fit the memory of cpu"):
        run(loaded(SMALL), prompts, random_sets(SMALL.d_mlp, [2, 3], 1.0))


def test_other_errors_are_not_mistaken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fails_above(monkeypatch, 0, full_of("size mismatch"))
    with pytest.raises(RuntimeError, match=r"^size mismatch$"):
        run(loaded(SMALL), token_prompts(4, SMALL))
    assert tried == [4]


def test_rows_of_a_part_that_failed_are_not_observed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = loaded(SMALL), token_prompts(8, SMALL, seed=3, min_len=2)
    wanted: list[torch.Tensor] = []
    decode(model, prompts, observe=wanted.append)
    rows: list[torch.Tensor] = []
    whole, failed = engine.run_body, []

    def failing(model: LoadedModel, tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
        if not failed and len(tokens) > 1 and tokens.shape[1] == 1:  # the first step after the prompts
            failed.append(len(tokens))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(model, tokens, *args, **options)

    monkeypatch.setattr(engine, "run_body", failing)
    decode(model, prompts, observe=rows.append)
    assert failed, "nothing failed"
    assert sum(map(len, rows)) == sum(map(len, wanted)), "rows of the failed part were seen twice"


# --- resuming ---------------------------------------------------------------------------------------


def assert_same_bits(a: Batch, b: Batch) -> None:
    assert a.leaves == b.leaves
    for f in fields(a):
        if f.name != "leaves":
            left, right = getattr(a, f.name), getattr(b, f.name)
            np.testing.assert_array_equal(left, right, strict=True, err_msg=f.name)


@given(st.data())
@settings(few, max_examples=12)
def test_what_is_left_is_decoded_to_the_last_bit_as_before(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(FAMILIES), label="toy")
    model, prompts = loaded(config), draw_prompts(data, config.d_vocab, max_len=15)
    ablations = draw_sets(data, config.d_mlp)
    options = {"memory_budget": data.draw(budgets, label="budget"), "own_top": True}
    whole = run(model, prompts, ablations, **options)
    keep = [data.draw(st.booleans(), label="shard is there") for _ in whole.shards]
    done = {int(i) for s, there in zip(whole.shards, keep, strict=True) if there for i in s.prompts}
    work = Work()
    left = list(decode_sets(model, prompts, ablations, done=done, work=work, **options))
    missing = [shard for shard, there in zip(whole.shards, keep, strict=True) if not there]
    assert len(left) == len(missing), "a shard that was there already"
    for mine, its in zip(left, missing, strict=True):
        assert_same_bits(mine, its)
    assert work.prompts == len(prompts) - len(done)


def test_halves_are_resumed_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = loaded(SMALL), token_prompts(12, SMALL, seed=7)
    ablations = random_sets(SMALL.d_mlp, [5, 9], 2.0)
    monkeypatch.setattr(batching, "MAX_BATCH", 6)
    with monkeypatch.context() as context:
        fails_above(context, 3, NO_MEMORY[0])
        first, second, *_ = run(model, prompts, ablations).shards
    assert len(first.prompts) == len(second.prompts) == 3
    *_, last = run(model, prompts, ablations).shards
    assert len(last.prompts) == 6
    # The half that is missing, and after it the next part as it would have been.
    left = list(decode_sets(model, prompts, ablations, done=set(first.prompts.tolist())))
    assert [len(shard.prompts) for shard in left] == [3, 6]
    assert_same_bits(left[0], second)
    assert_same_bits(left[1], last)


def test_shards_come_one_by_one() -> None:
    work = Work()
    shards = decode_sets(loaded(SMALL), token_prompts(5, SMALL), memory_budget=1, work=work)
    assert isinstance(shards, Iterator)
    for n, shard in enumerate(shards, 1):
        assert len(shard.prompts) == 1
        assert work.prompts == n, "work is counted when its shard is there, no sooner"
    assert n == 5


# --- the observer -----------------------------------------------------------------------------------


def in_order(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of a multiset, sorted along a random direction."""
    joined = torch.cat(list(rows))
    direction = torch.randn(joined.shape[1], 1, generator=torch.Generator().manual_seed(1))
    return joined[(joined.double() @ direction.double())[:, 0].argsort()]


@each_toy
def test_the_observer_sees_the_rows_of_the_hooked_path(config: ToyConfig) -> None:
    model = loaded(config)
    prompts = token_prompts(12, config, seed=9, max_len=9)
    third = next(t[2] for t in hooked.decode(model, prompts).tokens if len(t) > 2)
    model = replace(model, eos=model.eos | {third})  # so that some end early
    for budget in (None, 1):
        mine: list[torch.Tensor] = []
        its: list[torch.Tensor] = []
        found = decode(model, prompts, observe=mine.append, memory_budget=budget)
        wanted = hooked.decode(model, prompts, observe=its.append)
        assert found.tokens == wanted.tokens
        assert sum(map(len, mine)) == sum(map(len, its)), f"{config.id}: rows"
        assert {rows.dtype for rows in mine} == {torch.float32}
        a, b = in_order(mine), in_order(its)
        margins(model).a.assert_close(a, b, what=config.id)


@pytest.mark.parametrize("text_only", [False, True])
def test_words_that_prompts_share_are_observed_for_each_of_them(text_only: bool) -> None:
    model = loaded(SMALL)
    begin, *others = token_prompts(4, SMALL, seed=9, min_len=5, max_len=7)
    prompts = [begin, [*begin[:4], 9, 11], [*begin, 12], *others]
    assert max(length for _, length in shared_prefixes(prompts)) >= 4, "nothing is shared"
    mine: list[torch.Tensor] = []
    its: list[torch.Tensor] = []
    decode(model, prompts, observe=mine.append, text_only=text_only)
    hooked.decode(model, prompts, observe=its.append, text_only=text_only)
    assert sum(map(len, mine)) == sum(map(len, its))
    a, b = in_order(mine), in_order(its)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.abs().max())))


@each_toy
def test_bos_is_not_observed_where_only_text_is_wanted(config: ToyConfig) -> None:
    model = replace(loaded(config), bos=1)
    first, *others = ([1, *p[1:]] for p in token_prompts(9, config, seed=9, min_len=2, max_len=9))
    prompts = [first, [*first[:-1], 5], [*first, 7, 8], *others]
    all_rows: list[torch.Tensor] = []
    text: list[torch.Tensor] = []
    its: list[torch.Tensor] = []
    decode(model, prompts, observe=all_rows.append)
    decode(model, prompts, observe=text.append, text_only=True)
    hooked.decode(model, prompts, observe=its.append, text_only=True)
    assert sum(map(len, text)) == sum(map(len, all_rows)) - len(prompts) == sum(map(len, its))
    margins(model).a.assert_close(in_order(text), in_order(its), what=config.id)
    seen: list[torch.Tensor] = []
    hooked.decode(model, [[1]], observe=seen.append, max_new_tokens=1)
    (bos,) = torch.cat(seen)
    nearest = [float((torch.cat(rows) - bos).abs().amax(1).min()) for rows in (all_rows, text)]
    assert nearest[0] < 1e-4 * float(bos.abs().max()) < nearest[1], "BOS is still among them"
    without: list[torch.Tensor] = []
    decode(replace(model, bos=None), prompts, observe=without.append, text_only=True)
    assert sum(map(len, without)) == sum(map(len, all_rows)), "without a BOS, all is text"


def test_statistics_of_both_paths_agree() -> None:
    model = loaded(SMALL)
    prompts = token_prompts(20, SMALL, seed=9)
    (mine, n), (its, m) = collect(model, prompts, decode), collect(model, prompts)
    assert n == m
    for name in ("mean", "std", "min", "max"):
        margins(model).a.of(name).assert_close(getattr(mine, name), getattr(its, name))


def test_near_ties_are_not_observed_twice(near_ties: LoadedModel) -> None:
    prompts = token_prompts(6, SMALL, seed=2)
    rows: list[torch.Tensor] = []
    done = decode(near_ties, prompts, observe=rows.append)
    back = sum(steps_of(near_ties, tokens, MAX_NEW_TOKENS, True) - 1 for tokens in done.tokens)
    assert sum(map(len, rows)) == sum(map(len, prompts)) + back


def test_observing_an_ablated_run_is_refused() -> None:
    model, seen = loaded(SMALL), list[torch.Tensor]()
    ablations = random_sets(SMALL.d_mlp, [3], 1.0)
    with pytest.raises(ValueError, match=r"^activations are observed in the plain run only"):
        list(decode_sets(model, [[0, 1]], ablations, observe=seen.append))
    with pytest.raises(ValueError, match=r"^activations are observed in the plain run only"):
        decode(model, [[0, 1]], ablations[0], observe=seen.append)
    assert not seen


# --- weights, hooks, precision, premise -------------------------------------------------------------


def fingerprint(model: LoadedModel) -> tuple[str, dict[str, int]]:
    """Hash of the weights, and the modules that hold hooks."""
    digest = hashlib.sha256()
    for root in (model.bridge.original_model, model.body):
        for name, tensor in root.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
    held = {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.body.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    }
    return digest.hexdigest(), held


@each_toy
def test_weights_and_hooks_are_as_before(config: ToyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = loaded(config), token_prompts(5, config)
    before = fingerprint(model)
    assert before[1] == {}
    for _ in run(model, prompts, random_sets(config.d_mlp, [4, 8], 2.0)).shards:
        assert fingerprint(model) == before

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        decode(model, prompts, observe=fail)
    monkeypatch.setattr(model.body, "forward", fail)
    with pytest.raises(RuntimeError, match="stop here"):
        decode(model, prompts)
    monkeypatch.undo()
    assert fingerprint(model) == before, "a run that failed left its hooks behind"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_family
def test_lower_precisions_run_and_stay_close(config: ToyConfig, dtype: torch.dtype) -> None:
    prompts = token_prompts(12, config, seed=1)
    ablations = random_sets(config.d_mlp, [6, 12], 1.0)
    full, low = loaded(config), load(spec_for(str(toy_folder(config))), dtype=dtype)
    wanted, found = run(full, prompts, ablations), run(low, prompts, ablations)
    # These round each of some ten operations a layer to 1 in 2048, or in 256, and toy logits span 50.
    within = margins_of(low.source, dtype, times=3)
    within.entropy.assert_close(found.decoded.entropy, wanted.decoded.entropy, what=config.id)
    assert found.work.refereed == 0, "no referee can repair what rounding did to the residual"
    # The hooked path in the same precision rounds alike.
    for i, ablation in enumerate([PLAIN, *ablations]):
        its = hooked.decode(low, prompts, ablation)
        within.entropy.assert_close(found.decoded.completions(i).first.entropy, its.first.entropy)
        exact = forward(low.source, prompts, ablations=[ablation] * len(prompts)).logits
        for row, chosen in enumerate(zip(found.tokens(i), its.tokens, strict=True)):
            logits = exact[row, len(prompts[row]) - 1]
            for tokens in chosen:
                token = tokens[0] if tokens else next(iter(low.eos))
                behind = float(logits.max() - logits[token])
                assert behind < within.lead, f"prompt {row}, {ablation.name}: {behind:.2g} nats behind"


@each_toy
def test_an_ablation_changes_no_key_and_no_value(config: ToyConfig) -> None:
    from transformers.cache_utils import DynamicCache

    model = loaded(config)
    tokens = torch.tensor(token_prompts(3, config, min_len=9, max_len=9))
    neurons = list(range(0, config.d_mlp, 3))

    def replaced(a: torch.Tensor, hook: Any) -> torch.Tensor:
        a = a.clone()
        a[..., neurons] = 2.5
        return a

    def caches(hooks: list[tuple[str, Any]]) -> tuple[Any, torch.Tensor]:
        cache, rows = DynamicCache(), []
        with torch.inference_mode(), model.bridge.hooks(fwd_hooks=hooks):
            for part in tokens.split([6, 1, 1, 1], dim=1):  # a prompt, then token by token
                mask = torch.ones((3, cache.get_seq_length() + part.shape[1]), dtype=torch.long)
                options = {"past_key_values": cache, "use_cache": True, "attention_mask": mask}
                rows.append(model.bridge(part, return_type="logits", **options)[:, -1])
        return cache, torch.stack(rows)

    (plain, logits), (ablated, moved) = caches([]), caches([(model.hook_post, replaced)])
    assert (logits - moved).abs().max() > 0.1, "the ablation has no effect, so nothing was tested"
    assert len(plain.layers) == config.n_layers
    for layer, (a, b) in enumerate(zip(plain.layers, ablated.layers, strict=True)):
        assert a.keys.shape[2] == 9
        assert torch.equal(a.keys, b.keys), f"{config.id}: keys of layer {layer}"
        assert torch.equal(a.values, b.values), f"{config.id}: values of layer {layer}"


# --- the transformer's two tensors ------------------------------------------------------------------


@each_toy
def test_the_body_gives_the_bridges_residual_and_activations(config: ToyConfig) -> None:
    model = loaded(config)
    prompts = token_prompts(3, config, min_len=7, max_len=7)
    tokens, seen = torch.tensor(prompts), dict[str, torch.Tensor]()

    def keep(name: str, as_name: str) -> tuple[str, Any]:
        def hook(x: torch.Tensor, hook: Any) -> None:
            seen[as_name] = x.detach().clone()

        return name, hook

    hooks = [keep("ln_final.hook_in", "x"), keep(model.hook_post, "a")]
    with torch.inference_mode(), model.bridge.hooks(fwd_hooks=hooks):
        logits = model.bridge(tokens, attention_mask=torch.ones_like(tokens), return_type="logits")
    with torch.inference_mode():
        x, a = run_body(model, tokens)
        last_x, last_a = run_body(model, tokens, last_only=True)
    assert last_x.shape == (3, 1, config.d_model)
    assert last_a.shape == (3, 1, config.d_mlp)
    ours = model.final_norm(x) @ model.W_U + model.b_U
    exact = forward(model.source, prompts)
    off = margins_from(forward(model.source, prompts, torch.float32), exact)
    off.x.assert_close(x, exact.x, what="the body")
    off.a.assert_close(a, exact.a, what="the body")
    off.x.assert_close(last_x, exact.x[:, -1:], what="the last position only")
    off.a.assert_close(last_a, exact.a[:, -1:], what="the last position only")
    off.logits.assert_close(ours, exact.logits, what="the body")
    off.x.assert_close(seen["x"], exact.x, what="the bridge")
    off.a.assert_close(seen["a"], exact.a, what="the bridge")
    off.logits.assert_close(logits, exact.logits, what="the bridge")


@each_toy
def test_rows_of_one_cache_go_on_as_each_prefix_would_alone(config: ToyConfig) -> None:
    """Prefixes of several lengths, shared and not, that branch, end and move."""
    model = loaded(config)
    stems = [token_prompts(1, config, n, n, n)[0] for n in (4, 9)]
    # One suffix after several prefixes and none, in one batch; then one of its own.
    prompts = [[5], *([*stems[0], i] for i in (3, 7)), *([*stems[1], i] for i in (8, 6))]
    prompts.append(token_prompts(1, config, 11, 80, 80)[0])
    shared = [0, 4, 4, 9, 9, 0]
    begun, cache = (RowCache(config.n_layers) for _ in range(2))
    cache.reserve(len(prompts), 80 + 3)

    times = list[int]()

    def forward(
        tokens: torch.Tensor,
        window: Any,
        positions: torch.Tensor | None,
        of_each: torch.Tensor | None = None,
    ) -> Any:
        times.extend([] if of_each is None else of_each.tolist())
        return run_body(model, tokens, window, positions, last_only=True)

    with torch.inference_mode():
        x, a = prefill(prompts, shared, begun, cache, forward, model.device, at_once=12)
        assert times == [2, 2], "how many prompts begin with each prefix"
        check_alone(model, prompts, x, a)
        for step, parents in enumerate(([0, 0, 0, 1, 3, 3, 4, 5, 5], [1, 4, 4, 8], [0, 1, 2, 3, 3, 3])):
            held = branch(cache, torch.tensor(parents), 80 + step)
            assert sorted(held.tolist()) == list(range(len(parents)))
            prompts = [[*prompts[parents[i]], 3 + int(i) + step] for i in held]
            positions = torch.tensor([len(p) - 1 for p in prompts])
            last = torch.tensor([p[-1:] for p in prompts])
            window = cache.window(slice(0, len(prompts)), 0, 80 + step)
            x, a = run_body(model, last, window, positions)
            check_alone(model, prompts, x[:, -1], a[:, -1])


def check_alone(
    model: LoadedModel, prompts: Sequence[Sequence[int]], x: torch.Tensor, a: torch.Tensor
) -> None:
    for row, prompt in enumerate(prompts):
        alone = run_body(model, torch.tensor([list(prompt)]))
        for mine, its, of in zip((x, a), alone, (margins(model).x, margins(model).a), strict=True):
            of.assert_close(mine[row], its[0, -1], what=f"{model.spec.name}, {prompt}")


def branch(cache: RowCache, parents: torch.Tensor, past: int) -> torch.Tensor:
    """Give every branch a row; returns which one each row holds."""
    rows = plan_rows(parents, BoundedLists(exact=True), len(parents))
    cache.move(rows.moved, rows.source, past, len(parents))
    return rows.branch


@given(st.lists(st.integers(0, 7), min_size=1, max_size=24).map(sorted), st.integers(1, 30))
def test_branches_hold_what_their_parents_held(parents: list[int], past: int) -> None:
    cache = RowCache(2)
    cache.reserve(8, 30)
    random_ = torch.Generator().manual_seed(past)
    rows = [torch.randn(4, 8, 3, 30, 5, generator=random_)[i] for i in range(4)]
    for layer in range(2):
        cache.write(layer, slice(0, 8), 0, rows[layer], rows[2 + layer])
    held = branch(cache, torch.tensor(parents), past)
    source = torch.tensor(parents)[held]
    for layer in range(2):
        for buffer, before in ((cache.keys, rows[layer]), (cache.values, rows[2 + layer])):
            assert torch.equal(buffer[layer][: len(parents), :, :past], before[source][:, :, :past])


def brute_force(prompts: Sequence[Sequence[int]]) -> int:
    """Most tokens that any way to cut the sorted prompts spares."""
    ordered = sorted(map(list, prompts))
    best = 0
    for cuts in itertools.product((False, True), repeat=len(ordered) - 1):
        runs: list[list[list[int]]] = [[ordered[0]]]
        for cut, prompt in zip(cuts, ordered[1:], strict=True):
            if cut:
                runs.append([])
            runs[-1].append(prompt)
        spared = 0
        for members in runs:
            prefix = 0
            while all(len(p) - 1 > prefix and p[prefix] == members[0][prefix] for p in members):
                prefix += 1
            spared += (len(members) - 1) * prefix if prefix > 1 else 0
        best = max(best, spared)
    return best


@given(st.lists(st.lists(st.integers(1, 2), max_size=6).map(lambda p: [0, *p]), min_size=1, max_size=8))
def test_shared_prefixes_spare_the_most_tokens_there_are_to_spare(prompts: list[list[int]]) -> None:
    groups = shared_prefixes(prompts)
    assert sorted(i for members, _ in groups for i in members) == list(range(len(prompts)))
    for members, length in groups:
        prefix = prompts[members[0]][:length]
        assert length != 1
        assert all(prompts[i][:length] == prefix and len(prompts[i]) > length for i in members)
    assert sum((len(m) - 1) * n for m, n in groups) == brute_force(prompts)


def test_no_prefix_has_more_sharers_than_allowed() -> None:
    groups = shared_prefixes([[0, 1, 2, i] for i in range(40)])
    assert max(len(members) for members, _ in groups) == MAX_SHARERS
    assert all(length == 3 for _, length in groups)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Memory that is taken and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_family
def test_what_a_mask_hides_is_no_nan(config: ToyConfig, nan_in_new_memory: None) -> None:
    """A row begins later than its neighbours: what lies before it must be cleared, masked or not."""
    assert torch.empty(3).isnan().all()
    model = loaded(config)
    # Prefixes of two lengths, and none, before suffixes of one length.
    stems = [token_prompts(1, config, n, n, n)[0] for n in (4, 7)]
    prompts = [[3], *([*stem, 5] for stem in stems), *([*stem, 7, 8] for stem in stems)]
    prompts += token_prompts(2, config, seed=1, min_len=9, max_len=12)
    done = run(model, prompts, random_sets(config.d_mlp, [5, 9], 1.0))
    for i in range(3):
        assert np.isfinite(done.decoded.entropy[:, i]).all(), i
    assert done.tokens(0) == hooked.decode(model, prompts).tokens


@each_toy
def test_shared_prefixes_change_nothing_but_the_work(
    config: ToyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(config)
    stems = token_prompts(3, config, seed=9, min_len=6, max_len=12)
    endings = token_prompts(9, config, seed=8, min_len=2, max_len=5)
    prompts = [[*stems[i % 3], *ending[1:]] for i, ending in enumerate(endings)]
    ablations = random_sets(config.d_mlp, [5, 9], 1.0)
    shared = run(model, prompts, ablations)
    monkeypatch.setattr(batching, "shared_prefixes", lambda prompts: [([i], 0) for i in range(9)])
    whole = run(model, prompts, ablations)
    for i in range(9):
        assert_same(model, shared.decoded, i, whole.decoded, i, config.id)
    spared = 2 * sum(map(len, stems))
    assert shared.work.forward_tokens == whole.work.forward_tokens - spared


def test_completions_of_the_shared_decode_have_the_hooked_paths_types() -> None:
    found = decode(loaded(SMALL), token_prompts(3, SMALL))
    wanted = hooked.decode(loaded(SMALL), token_prompts(3, SMALL))
    assert isinstance(found, Completions)
    for f in fields(wanted.first):
        mine, its = getattr(found.first, f.name), getattr(wanted.first, f.name)
        assert mine.dtype == its.dtype, f.name
        assert len(mine) == len(its), f.name
