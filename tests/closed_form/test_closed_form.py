"""The pipeline is held to a model whose answers are known by arithmetic (`organism.closed_form`)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccm.decoding import hooked
from ccm.decoding.activations import collect
from ccm.decoding.results import Completions, Work, merge
from ccm.decoding.shared import decode, decode_sets
from ccm.experiment.beyond_paper import set_effects
from ccm.experiment.fact_files import read_fact_folder
from ccm.method.ablation import PLAIN, Ablation, plan
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.facts import FactSet
from ccm.method.neurons import (
    NeuronMeasures,
    controls,
    measure,
    processed_W_out,
    processed_W_U,
    select,
    spectrum,
)
from ccm.method.prompts import (
    ParametricAnswer,
    answer_object,
    counter_candidates,
    counter_objects,
    filter_answers,
    parametric_prompt,
    probing_prompts,
)
from ccm.method.scores import (
    conversion_ratio,
    global_transition_score,
    q_value,
    transition_counts,
    transition_scores,
)
from ccm.method.sources import SOURCES, knowledge_source
from ccm.method.statistics import ActivationStatistics
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import spec_for
from tests.closed_form.build import build
from tests.closed_form.truth import DECOYS, PLANTED, POSITIONS, SABOTEURS, ClosedFormTruth, Outcome
from tests.closed_form.world import BASIS, D_MLP, NULL, Architecture, Case
from tests.effects import measure_effects
from tests.tolerance import ENTROPY, LOG_PROBABILITY, MEASURE, PERCENT, STATISTIC

ARCHITECTURES: tuple[Architecture, ...] = ("gpt2", "llama")

# Counted by hand from the kinds. 2 hedge_recall facts x 3 counter-objects: ND to PK. 2 hedge_copy
# facts x 3: ND to CK. The inhibitor fires on counter-objects of context sign +; 2 of its facts
# recall an object of that sign too (1 such counter-object each, all lowered: ND to CK), 2 recall
# one of sign - (2 each, PK raised: PK to CK). 3 promote facts recall an object of sign +, with 2
# counter-objects of sign -: CK to PK.
AFTER_MEAN = {
    ("CK", "CK"): 24, ("CK", "PK"): 6,
    ("ND", "CK"): 8, ("ND", "ND"): 28, ("ND", "PK"): 6,
    ("PK", "CK"): 4, ("PK", "PK"): 20,
}  # fmt: skip
GTS = {
    "mean_ablation": Fraction(24, 96),
    "median_ablation": Fraction(24, 96),
    "mode_ablation": Fraction(24, 96),
    # The keeper is on at rest, so mu - 3 sigma lifts the hedge above 4 everywhere: copies become ND.
    "mean_minus_sigma_ablation": Fraction(40, 96),
    "mean_plus_sigma_ablation": Fraction(17, 96),
}
# By which saboteurs a control set holds. 9 doubt facts x 3, and 2 block facts: 3 cases of sign -.
GTS_OF_CONTROL = {
    frozenset[str](): Fraction(0),
    frozenset({"blocker"}): Fraction(3, 96),
    frozenset({"doubter"}): Fraction(27, 96),
    frozenset({"blocker", "doubter"}): Fraction(30, 96),
}


@dataclass(frozen=True)
class Held:
    """A closed-form checkpoint with its truth, loaded; read-only."""

    known: ClosedFormTruth
    model: LoadedModel
    prompts: tuple[list[int], ...]
    plain: Completions
    statistics: ActivationStatistics
    n_positions: int

    @property
    def measures(self) -> NeuronMeasures:
        m = self.model
        return measure(m.W_U, m.W_out, m.final_norm, self.known.null_dims)

    def sources(self, done: Completions) -> list[str]:
        return [
            knowledge_source(text, case.counter_object or "", case.fact.object)
            for text, case in zip(done.texts, self.known.cases, strict=True)
        ]

    def check(self, ablation: Ablation, expected: Outcome, done: Completions | None = None) -> None:
        """Compare every source, then counts, GTS, CR and TS, with the truth."""
        done = hooked.decode(self.model, self.prompts, ablation) if done is None else done
        before, after = self.sources(self.plain), self.sources(done)
        pairs = zip(self.known.cases, zip(before, after, strict=True), strict=True)
        truth = zip(expected.before, expected.after, strict=True)
        wrong = [(c.text, p, t) for (c, p), t in zip(pairs, truth, strict=True) if p != t]
        assert not wrong, f"{ablation.name}: {len(wrong)} sources differ, first {wrong[0]}"
        counts = transition_counts(before, after)
        gts = global_transition_score(counts)
        assert Fraction(gts.count, gts.total) == expected.gts
        for i, source in enumerate(SOURCES):
            cr = conversion_ratio(counts, source)
            assert Fraction(cr.count, cr.total) == expected.cr(source), source
            for j, to in enumerate(SOURCES):
                score = transition_scores(counts)[i, j]
                PERCENT.assert_close(score, 100 * float(expected.ts(source, to)), what=f"TS {i}{j}")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Held:
    """One checkpoint an architecture; read-only."""
    folder = tmp_path_factory.mktemp("closed_form") / request.param
    known = build(folder, architecture=request.param)
    spec = replace(spec_for(str(folder)), null_space_dims=known.null_dims, min_rho=known.min_rho)
    model = load(spec)
    prompts = tuple(model.encode(case.text) for case in known.cases)
    statistics, n_positions = collect(model, prompts)
    return Held(known, model, prompts, hooked.decode(model, prompts), statistics, n_positions)


def values(ablation: Ablation) -> Mapping[int, float]:
    return dict(zip(ablation.neurons, ablation.values, strict=True))


# --- weights and measures -----------------------------------------------------------------------


def test_null_space_is_the_known_one(held: Held) -> None:
    W_U = processed_W_U(held.model.W_U, held.model.final_norm).double().numpy()
    assert held.known.null_space.shape == (32, 5)
    np.testing.assert_allclose(held.known.null_space.T @ W_U, 0, atol=1e-5)
    visible = np.delete(BASIS, list(NULL), axis=1)
    assert np.linalg.norm(visible.T @ W_U, axis=1).min() > 0.5
    V0 = spectrum(torch.from_numpy(W_U))[1][:, -5:].numpy()
    np.testing.assert_allclose(np.linalg.svd(V0.T @ held.known.null_space)[1], 1, atol=1e-5)


def test_measures_are_the_formulas(held: Held) -> None:
    found, known = held.measures, held.known
    MEASURE.of("rho").assert_close(found.rho, known.rho, scale=1.0)
    MEASURE.of("norm").assert_close(found.norm, known.norm)
    # LogitVar is exactly 0 for the pure ones, so 1e-9 stands in for a relative margin there.
    MEASURE.of("logit_var").assert_close(found.logit_var, known.logit_var, scale=known.logit_var + 1e-5)
    MEASURE.of("singular value").assert_close(
        found.singular_values, known.singular_values, scale=known.singular_values[0]
    )


@pytest.mark.parametrize(
    ("name", "rho", "logit_var"),
    [  # 70 words; a leak of squared share 1 - rho^2 to axes of m words: m (1 - rho^2) / 69
        ("null_plus", Fraction(1), Fraction(0)),
        ("null_graded", Fraction(1), Fraction(0)),
        ("inhibitor", Fraction(24, 25), 2 * Fraction(49, 625) / 69),
        ("promoter", Fraction(24, 25), 2 * Fraction(49, 625) / 69),
        ("keeper", Fraction(40, 41), 8 * Fraction(81, 1681) / 69),
        ("quiet", Fraction(12, 13), 2 * Fraction(25, 169) / 69),
        ("spread", Fraction(97, 100), 12 * Fraction(591, 10000) / 69),
        ("blocker", Fraction(0), Fraction(2, 69)),
        ("doubter", Fraction(0), Fraction(8, 69)),
    ],
)
def test_measures_by_hand(held: Held, name: str, rho: Fraction, logit_var: Fraction) -> None:
    i = {**PLANTED, **SABOTEURS, **DECOYS}[name]
    MEASURE.of("rho").assert_close(held.measures.rho[i], float(rho), scale=1.0, what=name)
    MEASURE.of("logit_var").assert_close(
        held.measures.logit_var[i], float(logit_var), scale=float(logit_var) + 1e-5, what=name
    )


def test_selection_finds_the_planted_and_needs_both_criteria(held: Held) -> None:
    found, planted = held.measures, set(held.known.planted)
    assert set(select(found, 6, held.known.min_rho)) == planted
    assert DECOYS["quiet"] in select(found, 6, 0.0)  # without rho
    assert DECOYS["spread"] in np.argsort(-found.rho)[:6]  # without LogitVar


def test_every_step_of_the_processing_is_needed(held: Held) -> None:
    norm, stored, known = held.model.final_norm, held.model.W_U, held.known
    W_out = processed_W_out(held.model.W_out, norm).double()
    folded = stored * norm.gain[:, None]
    wrong = {
        "gain": processed_W_U(stored, replace(norm, gain=torch.ones_like(norm.gain))),
        "mean over words": folded - folded.mean(0, keepdim=True) * norm.centred,
    }
    if norm.centred:
        wrong["mean over d_model"] = processed_W_U(stored, replace(norm, centred=False))

    def error(W_U: torch.Tensor) -> float:
        V0 = spectrum(W_U)[1][:, -known.null_dims :]
        rho = (W_out @ V0).norm(dim=1) / W_out.norm(dim=1)
        return float(np.abs(rho.numpy() - known.rho).max())

    assert error(processed_W_U(stored, norm)) < 1e-4
    for left_out, W_U in wrong.items():
        assert error(W_U) > 0.1, f"without {left_out} rho is off by {error(W_U)} only"


def test_output_weights_need_centring_with_layer_norm(held: Held) -> None:
    raw = held.model.W_out.double().norm(dim=1).numpy()
    excess = (raw / held.known.norm).max()
    assert excess > 1.5 if held.model.final_norm.centred else excess < 1.001


# --- facts and prompts --------------------------------------------------------------------------


def parametric_answers(held: Held, world: FactSet) -> list[ParametricAnswer]:
    asked = [parametric_prompt("bare", f, world.relations[f.relation]) for f in world.facts]
    done = hooked.decode(held.model, [held.model.encode(text) for text in asked])
    return [
        ParametricAnswer(row, fact, prompt, text, answer_object(text), tokens[0])
        for row, (fact, prompt, text, tokens) in enumerate(
            zip(world.facts, asked, done.texts, done.tokens, strict=True)
        )
    ]


def test_bare_query_gives_the_fact_and_a_period(held: Held) -> None:
    queries = [held.model.encode(fact.query) for fact in held.known.facts]
    done = hooked.decode(held.model, queries)
    assert [t.strip() for t in done.texts] == [f"{fact.object}." for fact in held.known.facts]
    entropies = [held.known.entropy(Case(fact, None), {}) for fact in held.known.facts]
    ENTROPY.assert_close(done.first.entropy, entropies, what="bare query")


def test_prompts_are_the_known_cases(held: Held) -> None:
    world = read_fact_folder(held.known.folder, "closed form")
    assert len(world.facts) == 32
    answers = parametric_answers(held, world)
    kept = filter_answers(answers, world.relations)
    assert kept == answers, "the filters drop nothing"
    candidates = counter_candidates(kept)
    made = [
        prompt
        for answer in kept
        for own in [candidates[answer.fact.relation]]
        for prompt in probing_prompts(
            answer,
            world.relations[answer.fact.relation],
            counter_objects(answer, own, [0.0] * len(own)),
            0.0,
        )
    ]
    known = {(c.text, c.counter_object, c.fact.object) for c in held.known.cases}
    assert {(p.text, p.counter_object, p.parametric_object) for p in made} == known
    assert len(made) == len(known) == 96


# --- sources and scores -------------------------------------------------------------------------


def test_sources_before(held: Held) -> None:
    expected = held.known.sources({})
    assert {s: expected.count(s) for s in SOURCES} == {"CK": 30, "ND": 42, "PK": 24}
    held.check(PLAIN, Outcome(expected, expected), held.plain)
    assert {text.strip()[-1] for text in held.plain.texts} == {"."}
    assert {len(tokens) for tokens in held.plain.tokens} == {2}, "answer, period, then EOS"


def test_statistics_are_the_formulas(held: Held) -> None:
    assert held.n_positions == POSITIONS * len(held.known.cases)
    for name, i in {**PLANTED, **SABOTEURS}.items():
        mean, std = held.known.moments(i)
        STATISTIC.of("mean").assert_close(held.statistics.mean[i], mean, scale=1.0, what=name)
        STATISTIC.of("std").assert_close(held.statistics.std[i], std, scale=1.0, what=name)
    # By hand: the keeper is 1 but at both relation tokens of 4 of 32 facts; the inhibitor fires once
    # in 6 of 96 prompts.
    assert held.known.moments(PLANTED["keeper"])[0] == pytest.approx(1 - 4 / 32 * 2 / 9)
    assert held.known.moments(PLANTED["inhibitor"])[0] == pytest.approx(6 / 96 / 9)


@pytest.mark.parametrize("name", ABLATION_VALUES)
def test_sources_after(held: Held, name: str) -> None:
    ablation = plan(name, held.known.planted, ABLATION_VALUES[name], held.statistics)
    expected = held.known.outcome(values(ablation))
    assert expected.gts == GTS[name]
    done = hooked.decode(held.model, held.prompts, ablation)
    held.check(ablation, expected, done)
    entropies = [held.known.entropy(case, values(ablation)) for case in held.known.cases]
    ENTROPY.assert_close(done.first.entropy, entropies, what=name)
    margins = [held.known.margin(case, values(ablation)) for case in held.known.cases]
    assert min(margins) > 0.2, "known by a wide margin, not by rounding"


def test_scores_by_hand(held: Held) -> None:
    mean = {i: held.known.moments(i)[0] for i in held.known.planted}
    expected = held.known.outcome(mean)
    assert dict(expected.counts) == AFTER_MEAN
    assert expected.gts == Fraction(1, 4)
    assert expected.cr("CK") == Fraction(12, 66)
    assert expected.cr("PK") == Fraction(12, 72)
    assert expected.cr("ND") == 0
    assert expected.ts("ND", "CK") == Fraction(8, 42)
    assert expected.ts("CK", "ND") == 0


def test_log_probabilities(held: Held) -> None:
    cases, words = held.known.cases, held.known.words
    targets = [[words.index(c.counter_object or ""), words.index(c.fact.object)] for c in cases]
    ablation = plan("mean", held.known.planted, ABLATION_VALUES["mean_ablation"], held.statistics)
    for one in (PLAIN, ablation):
        done = hooked.decode(
            held.model, held.prompts, one, targets=torch.tensor(targets), max_new_tokens=1
        )
        expected = [
            held.known.log_probs(c, values(one))[t] for c, t in zip(cases, targets, strict=True)
        ]
        LOG_PROBABILITY.assert_close(done.first.log_probs, expected, what=one.name)


# --- the shared decode, and effects on entropy --------------------------------------------------


def test_the_shared_decode_gives_every_source_and_entropy_at_once(held: Held) -> None:
    """The three prompts of a fact share their first words, and all sets one pass."""
    sets = [
        plan(name, held.known.planted, value, held.statistics)
        for name, value in ABLATION_VALUES.items()
    ]
    for full in (True, False):
        flags = [full] * (1 + len(sets))
        work = Work()
        decoded = merge(list(decode_sets(held.model, held.prompts, sets, full=flags, work=work)))
        for i, ablation in enumerate([PLAIN, *sets]):
            done = decoded.completions(i)
            held.check(ablation, held.known.outcome(values(ablation)), done)
            entropies = [held.known.entropy(case, values(ablation)) for case in held.known.cases]
            ENTROPY.assert_close(done.first.entropy, entropies, what=ablation.name)
        steps = work.nodes - work.prompts  # each ran one position
        assert work.forward_tokens - steps < sum(map(len, held.prompts)), "no prefix was shared"


def test_statistics_of_the_shared_decode_are_the_formulas(held: Held) -> None:
    statistics, n_positions = collect(held.model, held.prompts, decode)
    assert n_positions == POSITIONS * len(held.known.cases)
    for name, i in {**PLANTED, **SABOTEURS}.items():
        mean, std = held.known.moments(i)
        STATISTIC.of("mean").assert_close(statistics.mean[i], mean, scale=1.0, what=name)
        STATISTIC.of("std").assert_close(statistics.std[i], std, scale=1.0, what=name)


def test_effects_on_entropy_are_the_formulas(held: Held) -> None:
    """Total, direct and norm only at every prompt; their mean changes are before less after."""
    known, name = held.known, "mean_ablation"
    pure = Ablation("control_000", tuple(sorted(known.pure)), (0.0,) * 3)
    sets = [plan("entropy", known.planted, ABLATION_VALUES[name], held.statistics), pure]
    found = measure_effects(held.model, held.prompts, sets[:1], sets[1:])
    before = np.asarray([known.entropy(case, {}) for case in known.cases])
    ENTROPY.assert_close(found.plain, before, what="plain")
    table = set_effects(found, {name: [a.name for a in sets]}).set_index("set")
    for ablation, got in zip(sets, (found.own[:, 0], found.others[:, 0]), strict=True):
        v = values(ablation)
        for i, (effect, how) in enumerate(
            {"total": (v, None), "direct": (v, {}), "norm_only": ({}, v)}.items()
        ):
            after = np.asarray([known.entropy(case, *how) for case in known.cases])
            ENTROPY.assert_close(got[:, i], after, what=f"{effect} of {ablation.name}")
            change = float((before - after).mean())
            ENTROPY.assert_close(table.loc[ablation.name, effect], change, what=effect)
            assert effect == "direct" or abs(change) > 0.01, "no sign to be seen"


# --- what null-space neurons can and cannot do --------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(held_at=st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_pure_null_space_neurons_flip_nothing_at_any_value(held: Held, held_at: list[float]) -> None:
    """Without unembedding bias they move the norm's scale only, and a scale has no argmax."""
    ablation = Ablation("pure", tuple(sorted(held.known.pure)), tuple(held_at))
    done = hooked.decode(held.model, held.prompts, ablation)
    assert done.texts == held.plain.texts


def test_pure_null_space_neurons_change_entropy_through_the_scale_alone(held: Held) -> None:
    known, off = held.known, dict.fromkeys(held.known.pure, 0.0)
    ablation = Ablation("pure", tuple(sorted(known.pure)), (0.0,) * 3)
    done = hooked.decode(held.model, held.prompts, ablation, max_new_tokens=1)
    change = done.first.entropy - held.plain.first.entropy
    assert np.abs(change).min() > 0.01, "every prompt has one of the three active"
    assert change.min() < 0 < change.max()
    for case, entropy in zip(known.cases, done.first.entropy, strict=True):
        plain = known.log_probs(case, {})
        np.testing.assert_allclose(known.log_probs(case, off, scale_of={}), plain, atol=1e-12)
        ENTROPY.assert_close(float(entropy), known.entropy(case, {}, scale_of=off), what=case.text)


# --- controls -----------------------------------------------------------------------------------


def test_controls_change_only_what_their_saboteurs_do(held: Held) -> None:
    known = held.known
    sets = [
        *controls(20, D_MLP, known.planted, seed=123),
        (0, 1, 2, 3, SABOTEURS["blocker"], SABOTEURS["doubter"]),
    ]
    mean = ABLATION_VALUES["mean_ablation"]
    ablations = [plan(f"control {s}", s, mean, held.statistics) for s in sets]
    found, kinds = [], []
    for neurons, ablation in zip(sets, ablations, strict=True):
        kinds.append(frozenset(n for n, i in SABOTEURS.items() if i in neurons))
        expected = known.outcome(values(ablation))
        assert expected.gts == GTS_OF_CONTROL[kinds[-1]], sorted(kinds[-1])
        done = hooked.decode(held.model, held.prompts, ablation)
        held.check(ablation, expected, done)
        counts = transition_counts(held.sources(held.plain), held.sources(done))
        found.append(float(np.trace(counts) / counts.sum()))
    assert set(kinds) == set(GTS_OF_CONTROL), "every kind of control occurs"
    # Sets with the doubter flip more than the planted set, all others less: no ties.
    stronger = sum("doubter" in kind for kind in kinds)
    expected_q = 100 - 100 * stronger / len(sets)
    PERCENT.of("Q").assert_close(q_value(0.75, found), expected_q)
    assert 50 < expected_q < 100


# --- the same without the pipeline --------------------------------------------------------------


def test_truth_agrees_with_transformers_alone(held: Held) -> None:
    from transformers import AutoModelForCausalLM

    known = held.known
    model = AutoModelForCausalLM.from_pretrained(known.folder).eval()
    layers = model.transformer.h if known.architecture == "gpt2" else model.model.layers
    down = layers[1].mlp.c_proj if known.architecture == "gpt2" else layers[1].mlp.down_proj
    mean = {i: known.moments(i)[0] for i in known.planted}
    seen: list[torch.Tensor] = []

    def ablate(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        seen.append(args[0])
        replaced = args[0].clone()
        replaced[..., list(mean)] = torch.tensor(list(mean.values()))
        return (replaced,)

    ids = torch.tensor([list(p) for p in held.prompts])
    assert ids.shape == (96, 7)
    with torch.inference_mode():
        plain = model(ids).logits[:, -1].double()
        hook = down.register_forward_pre_hook(ablate)
        after = model(ids).logits[:, -1].double()
        hook.remove()
    assert [known.words[t] for t in plain.argmax(-1)] == [known.answer(c, {}) for c in known.cases]
    assert [known.words[t] for t in after.argmax(-1)] == [known.answer(c, mean) for c in known.cases]
    for ablated, logits in (({}, plain), (mean, after)):
        expected = np.stack([known.log_probs(case, ablated) for case in known.cases])
        LOG_PROBABILITY.assert_close(logits.log_softmax(-1), expected, what=known.architecture)
    activations = np.stack([known.activations(case) for case in known.cases])
    few_bits = 1e3 * np.finfo(np.float32).eps * np.abs(activations).max()
    np.testing.assert_allclose(seen[0][:, -1].numpy(), activations, rtol=0, atol=few_bits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_build_is_a_pure_function(
    architecture: Architecture, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same bytes twice, and the global random states as before."""
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    build(one, architecture=architecture)
    build(two, architecture=architecture)
    assert sorted(p.name for p in one.iterdir()) == [
        "config.json",
        "facts.csv",
        "generation_config.json",
        "model.safetensors",
        "relations.csv",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
