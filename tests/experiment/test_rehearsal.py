"""The dress rehearsal: the five architectures, every stage on small ones, and the projection."""

import math
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ccm.cli.parser import main
from ccm.decoding.results import Completions, FirstToken
from ccm.decoding.shared import decode
from ccm.errors import BadInput
from ccm.experiment import run as story
from ccm.experiment.config import RunConfig
from ccm.experiment.effects import SAMPLED
from ccm.experiment.fact_files import read_fact_folder
from ccm.experiment.files import read_json, write_json
from ccm.experiment.folder import RunFolder
from ccm.experiment.plan import Plan
from ccm.experiment.rehearsal import rehearse as rehearsal
from ccm.experiment.rehearsal.profiler import Profiler
from ccm.experiment.rehearsal.projection import (
    PUBLISHED_FACTS,
    Projection,
    Rehearsal,
    Stage,
    duration,
    project,
    rehearsal_table,
)
from ccm.experiment.rehearsal.rehearse import RehearsalConfig, ask_one_who_knows, choose_facts, rehearse
from ccm.experiment.results import read_results
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.facts import FactSet
from ccm.method.prompts import probing_text, same_name
from ccm.models import memory
from ccm.models.load import assemble, load
from ccm.models.model import LoadedModel
from ccm.models.random import (
    Architecture,
    StandInTokenizer,
    architecture_of,
    n_parameters,
    random_model,
    read_tokenizer,
)
from ccm.models.specs import CHECKPOINT, MODELS, PUBLISHED, spec_for
from ccm.reporting.rerun import command_of
from tests.needs import FACTS, NO_GPU
from tests.toys import ToyConfig, toy_folder

pytestmark = pytest.mark.whole_runs

PARAMETERS = {  # the well-known totals
    "gpt2-small": 124_439_808,
    "EleutherAI_pythia-1.4b": 1_414_647_808,
    "Phi-1_5": 1_418_270_720,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Meta-Llama-3-8B": 8_030_261_248,
}
N_PROMPTS, N_CONTROLS, D_VOCAB = 7, 3, 640
REST = rehearsal.REST
IN_RUN = ("load", "measures", "prompts", "activation_stats", "ablations", REST, "scores")


def changed(architecture: Architecture, **options: int) -> Architecture:
    """The same family with some numbers changed."""
    return replace(architecture, options={**architecture.options, **options})


def small(name: str) -> Architecture:
    """A published architecture with 2 layers of 4 heads, and d_model 32."""
    architecture = architecture_of(name)
    if architecture.kind == "GPT2Config":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 48}
    if "num_key_value_heads" in architecture.options:
        sizes["num_key_value_heads"] = 2
    return changed(architecture, vocab_size=D_VOCAB, bos_token_id=0, eos_token_id=0, **sizes)


def read_rehearsal(path: Path) -> Rehearsal:
    """Read back what `ccm rehearse --out` wrote."""
    given = read_json(path)
    stages, published = tuple(Stage(**s) for s in given["stages"]), Projection(**given["published"])
    return Rehearsal(**{**given, "stages": stages, "published": published})


def config(name: str = "gpt2-small", seed: int = 123, **own: Any) -> RehearsalConfig:
    run = RunConfig(name, device="cpu", ablation_values=("all",), controls=N_CONTROLS, seed=seed)
    return RehearsalConfig(run, prompts=N_PROMPTS, **own)


@pytest.fixture(scope="module")
def facts() -> FactSet:
    """The organism's facts; read-only."""
    return read_fact_folder(CHECKPOINT, "the organism's")


@pytest.fixture(scope="module")
def done(facts: FactSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Rehearsal, Path]:
    """A rehearsal of GPT-2, made small, and what it kept; read-only."""
    folder = tmp_path_factory.mktemp("rehearsal") / "kept"
    small_one = small("gpt2-small")
    return rehearse(config(hooked=True, keep=folder), architecture=small_one, facts=facts), folder


# --- the architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_have_the_published_number_of_parameters(name: str) -> None:
    assert n_parameters(architecture_of(name).config()) == PARAMETERS[name]


def test_an_architecture_of_another_size_is_counted_otherwise() -> None:
    one_more = changed(architecture_of("gpt2-small"), n_positions=1025)
    assert n_parameters(one_more.config()) == PARAMETERS["gpt2-small"] + 768


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_agree_with_the_table_of_models(name: str) -> None:
    spec, found = MODELS[name], architecture_of(name).config()
    d_mlp = getattr(found, "intermediate_size", None) or 4 * found.hidden_size
    assert (found.num_hidden_layers, found.hidden_size, d_mlp, found.vocab_size) == (
        spec.n_layers,
        spec.d_model,
        spec.d_mlp,
        spec.d_vocab,
    )


@pytest.mark.parametrize(
    ("name", "theta", "part", "n_ctx"),
    [
        ("EleutherAI_pythia-1.4b", 1e4, 0.25, 2048),
        ("Phi-1_5", 1e4, 0.5, 2048),
        ("Mistral-7B-v0.1", 1e4, 1.0, 32768),
        ("Meta-Llama-3-8B", 5e5, 1.0, 8192),
    ],
)
def test_positions_are_rotated_as_published(name: str, theta: float, part: float, n_ctx: int) -> None:
    found = architecture_of(name).config()
    rope = found.rope_parameters
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (theta, part)
    assert found.max_position_embeddings == n_ctx


def test_random_weights_are_drawn_by_a_seed_of_their_own() -> None:
    cpu, made = torch.device("cpu"), small("gpt2-small").config()
    before = torch.get_rng_state()
    one, same, other = (random_model(made, cpu, torch.bfloat16, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    weight = "transformer.h.1.mlp.c_proj.weight"
    of = [m.get_parameter(weight) for m in (one, same, other)]
    assert torch.equal(of[0], of[1])
    assert not torch.equal(of[0], of[2])
    assert one.lm_head.weight is one.transformer.wte.weight
    embedded = one.transformer.wte.weight.float()
    assert abs(float(embedded.detach().std()) - made.initializer_range) < 0.001
    assert (one.transformer.ln_f.weight == 1).all()


# --- assembling what is in memory --------------------------------------------------------------------


def test_a_model_in_memory_is_the_model_read_from_its_folder() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = toy_folder(ToyConfig("neox"))
    spec = spec_for(str(folder))
    read = load(spec)
    cpu, tokenizer = torch.device("cpu"), AutoTokenizer.from_pretrained(folder)
    tokenizer.init_kwargs["add_bos_token"] = True  # else the bridge reads it again by itself
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer("Paris").input_ids)
    in_memory = AutoModelForCausalLM.from_pretrained(folder)
    made = assemble(spec, in_memory, tokenizer, cpu, torch.float32, source="memory")
    prompt = read.encode("Paris is the capital of")
    one, other = decode(read, [prompt]), decode(made, [prompt])
    assert (one.tokens, one.texts) == (other.tokens, other.texts)
    assert (read.spec, read.bos, read.eos) == (made.spec, made.bos, made.eos)
    # The bridge gives its own copy a pad token.
    assert made.tokenizer is tokenizer
    assert made.bridge.tokenizer is not tokenizer
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer("Paris").input_ids) == before


# --- every stage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_stage_of_every_family_runs(name: str, facts: FactSet) -> None:
    few_prompts, told = 3, list[str]()
    found = rehearse(config(name), architecture=small(name), facts=facts, say=told.append)
    by_name = {s.name: s for s in found.stages}
    assert tuple(s.name for s in found.stages if s.in_run) == IN_RUN
    # All but the model three times, the smaller run first and twice.
    assert Counter(told)["ablations, 3 prompts ..."] == 2
    for line in ("measures ...", "ablations, 3 prompts ...", f"ablations, {N_PROMPTS} prompts ..."):
        assert line in told, line
    assert told[:3] == ["load ...", "measures ...", "prompts, 4 facts ..."]
    for stage in found.stages:
        items = {"run": 1, "fact": 4, "prompt": N_PROMPTS}[stage.per]
        assert stage.items == items, stage
        assert stage.seconds > 0 or stage.name == "ablations", stage
        assert 0 <= stage.fixed_seconds <= stage.seconds, stage
        assert stage.peak_bytes > 1 << 20, stage
        grows = stage.in_run and stage.per == "prompt"
        assert stage.few_items == (few_prompts if grows else 0), stage
        assert (stage.few_seconds > 0) == grows or stage.name == "ablations", stage
        assert stage.most == (SAMPLED if stage.name == REST else None), stage
    assert (found.facts, found.prompts, found.few_prompts) == (4, N_PROMPTS, few_prompts)
    assert found.n_sets == 5 * (1 + 2 * N_CONTROLS)
    assert found.ablation_values == list(ABLATION_VALUES)
    assert found.weight_bytes == 4 * found.parameters
    assert len(found.entropy_neurons) == MODELS[name].n_entropy_neurons
    assert by_name["load"].per == by_name["measures"].per == "run"
    grid, plain = found.work["ablations"], found.work["plain pass, shared engine"]
    assert grid["prompts"] == plain["prompts"] == N_PROMPTS
    assert grid["forward_tokens"] >= plain["forward_tokens"] > N_PROMPTS * 9
    # No stand-in token ends an answer, so the plain run reads ten distributions for each prompt.
    assert plain["nodes"] <= grid["nodes"]
    assert 9 * N_PROMPTS < plain["nodes"] <= 10 * N_PROMPTS
    assert found.published.facts == PUBLISHED_FACTS == 4688
    assert found.published.prompts == MODELS[name].published_prompts


def test_published_prompts_are_the_sums_of_figure_5() -> None:
    assert {name: MODELS[name].published_prompts for name in PUBLISHED} == {
        "gpt2-small": 9986 + 666 + 32,
        "EleutherAI_pythia-1.4b": 6274 + 101 + 360,
        "Phi-1_5": 3801 + 1131 + 1578,
        "Mistral-7B-v0.1": 2604 + 69 + 462,
        "Meta-Llama-3-8B": 9343 + 32 + 211,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary run with the same options; read-only."""
    out = tmp_path_factory.mktemp("ordinary") / "run"
    story.run(replace(config().run, model="organism", max_prompts=N_PROMPTS), out)
    return out


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_kept_is_what_a_run_leaves_behind(done: tuple[Rehearsal, Path], whole: Path) -> None:
    found, folder = done
    assert names(folder) == names(whole)
    mine, its = (read_json(path / "manifest.json") for path in (folder, whole))
    assert mine.keys() == its.keys() | {"rehearsal"}
    for part in ("timings_s", "facts", "effects", "work", "special_tokens", "weights"):
        assert mine[part].keys() == its[part].keys(), part
    assert mine["done"] == its["done"]
    assert mine["sets"].keys() == its["sets"].keys()
    assert mine["complete"] is True
    hashes = {"config_sha256", "tokenizer_sha256", "generation_config_sha256"}  # there are no files
    assert mine["identity"].keys() == its["identity"].keys() - hashes
    assert mine["identity"]["weights_sha256"] == "random weights, seed 123"
    nowhere = {"revision": None, "files": [], "converted": None}
    assert mine["weights"] == {"source": "random weights, seed 123", **nowhere}
    assert mine["sets"]["entropy"] == found.entropy_neurons
    results = read_results(folder)
    assert len(results.prompts) == results.scores["n_prompts"] == N_PROMPTS
    assert results.values == tuple(ABLATION_VALUES)


@pytest.mark.parametrize("tokenizer", [None, "a folder"])
def test_the_report_of_what_is_kept_says_how_to_rehearse_again(
    tokenizer: str | None, done: tuple[Rehearsal, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_json(done[1] / "manifest.json")
    assert manifest["rehearsal"] == {"prompts": N_PROMPTS, "tokenizer": None, "hooked": True}
    manifest["rehearsal"]["tokenizer"] = tokenizer
    seen: list[RehearsalConfig] = []

    def caught(config: RehearsalConfig) -> None:
        seen.append(config)
        raise BadInput("seen")

    monkeypatch.setattr(rehearsal, "rehearse", caught)
    program, *words = shlex.split(command_of(manifest))
    assert program == "ccm"
    assert main(words) == 2
    assert seen == [config(hooked=True, tokenizer=None if tokenizer is None else Path(tokenizer))]


def test_what_is_measured_of_a_run_is_what_its_manifest_says(done: tuple[Rehearsal, Path]) -> None:
    found, folder = done
    timings = read_json(folder / "manifest.json")["timings_s"]
    measured = {s.name: s.seconds for s in found.stages if s.in_run}
    measured["ablations"] = max(measured["ablations"] + measured.pop(REST), timings["ablations"])
    assert measured["measures"] >= timings["measures"] - 1e-3  # the longer of both runs
    for stage in timings.keys() - {"measures"}:
        assert measured[stage] == pytest.approx(timings[stage], abs=1e-3), stage


def test_the_steps_of_a_rehearsal_are_those_of_a_run(
    facts: FactSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def recorded(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            called.append(name)
            return step(*args, **options)

        return call

    steps = {n: f for n, f in vars(story).items() if n.endswith("_step") or n == "write_scores"}
    assert len(steps) >= 8
    for name, step in steps.items():
        for module in (story, rehearsal):
            if name in vars(module):
                monkeypatch.setattr(module, name, recorded(name, step))
    story.run(RunConfig(max_prompts=3, controls=0), tmp_path / "run")
    ordinary, called[:] = [*called], []
    assert sorted(ordinary) == sorted(steps), "every step once"
    run = replace(config().run, controls=0, ablation_values=("mean_ablation",))
    rehearse(replace(config(), run=run), architecture=small("gpt2-small"), facts=facts)
    assert ordinary[0] == "load_step"
    # The model is built once; all else is as in a run, twice of few prompts and then of all.
    assert called == 3 * ordinary[1:]


def test_the_hooked_pass_is_for_comparison_only(done: tuple[Rehearsal, Path]) -> None:
    found, _ = done
    beside = [s.name for s in found.stages if not s.in_run]
    assert beside == ["plain pass, shared engine", "plain pass, hooked engine"]
    assert not set(beside) & set(found.published.stages)


def test_the_same_seed_gives_the_same_work(done: tuple[Rehearsal, Path], facts: FactSet) -> None:
    found, _ = done
    again = rehearse(config(), architecture=small("gpt2-small"), facts=facts)
    for name in ("first_prompt_tokens", "entropy_neurons", "mean_prompt_tokens"):
        assert getattr(again, name) == getattr(found, name), name
    for stage, work in again.work.items():
        assert work == found.work[stage], stage
    other = rehearse(config(seed=5), architecture=small("gpt2-small"), facts=facts)
    assert other.entropy_neurons != found.entropy_neurons
    assert other.first_prompt_tokens != found.first_prompt_tokens


# --- prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 7, 12, 13, 60, 200, 900])
def test_chosen_facts_contradict_each_other(n: int, facts: FactSet) -> None:
    chosen = choose_facts(facts, n)
    assert n <= 3 * len(chosen.facts) < n + 12
    assert set(chosen.facts) <= set(facts.facts)
    assert len(set(chosen.facts)) == len(chosen.facts)
    assert [facts.facts.index(f) for f in chosen.facts] == sorted(map(facts.facts.index, chosen.facts))
    objects: dict[str, set[str]] = {}
    for fact in chosen.facts:
        objects.setdefault(fact.relation, set()).add(same_name(fact.object))
    assert min(map(len, objects.values())) >= 4, "three others of every relation"
    assert len(objects) == min(len(facts.relations), math.ceil(math.ceil(n / 3) / 4))
    assert (chosen.relations, chosen.name) == (facts.relations, facts.name)


def test_all_facts_can_be_asked(facts: FactSet) -> None:
    with pytest.raises(BadInput, match=r"^--prompts 999999: out of range") as caught:
        choose_facts(facts, 999999)
    most = int(str(caught.value).split(" to ")[1].split(",")[0])
    assert len(choose_facts(facts, most).facts) == most / 3
    with pytest.raises(BadInput, match=rf"Allowed: 3 .those of one fact. to {most}, of the organism's"):
        choose_facts(facts, most + 1)


def test_prompts_contradict_true_objects_with_others_of_the_relation(
    done: tuple[Rehearsal, Path], facts: FactSet
) -> None:
    table = pd.read_parquet(done[1] / "prompts.parquet")
    truth = {(f.subject, f.relation): f.object for f in facts.facts}
    objects = {r: {f.object for f in facts.facts if f.relation == r} for r in facts.relations}
    assert len(table) == N_PROMPTS
    for row in table.to_dict("records"):
        own, other = row["parametric_knowledge_object"], row["counter_knowledge_object"]
        assert own == truth[row["statement_subject"], row["rel_lemma"]]
        assert other in objects[row["rel_lemma"]] - {own}
        assert row["knowledge_probing_prompt"] == probing_text(row["statement_query"], other)
    assert read_json(done[1] / "manifest.json")["facts"]["recalled"] == 4


def test_every_fact_is_asked_and_its_answer_given(
    facts: FactSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose_facts(facts, 12)
    asked = list[int]()
    nonsense, none = np.full((4, 1), -1.0), np.full((4, 2), 0)
    tops, residual = np.tile(nonsense, 2), np.tile(nonsense, 7)
    first = FirstToken(nonsense[:, 0], none[:, :1], nonsense, none, tops, residual)

    def ask(model: Any, tokens: Sequence[Any]) -> Completions:
        asked.append(len(tokens))
        return Completions(((1,),) * 4, ("?",) * 4, first)

    monkeypatch.setattr(rehearsal, "ask_and_store", lambda folder, plan_: ask)
    folder, plan_, model = (Mock(spec=kind) for kind in (RunFolder, Plan, LoadedModel))
    plan_.facts, model.first_token = chosen, len
    answers = ask_one_who_knows(folder, plan_)(model, [[1]] * 4)
    assert [text.strip(" .") for text in answers.texts] == [f.object for f in chosen.facts]
    assert answers.first.top_tokens[:, 0].tolist() == [len(f.object) for f in chosen.facts]
    assert answers.first.residual is residual
    assert asked == [4]


def texts_of(facts: FactSet, n: int) -> list[tuple[str, str]]:
    """Queries of chosen facts with probing prompts made of them, each with the next fact's object."""
    chosen = choose_facts(facts, n).facts
    return [
        (f.query, probing_text(f.query, other.object))
        for f, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True)
    ]


@given(st.text(max_size=60), st.integers(3, 60_000), st.integers(0, 2))
def test_the_stand_in_tokenizer_stays_in_the_vocabulary(text: str, d_vocab: int, bos: int) -> None:
    tokenizer = StandInTokenizer(d_vocab, bos)
    ids = tokenizer.encode(text)
    assert all(0 <= i < d_vocab and i != bos for i in ids)
    assert bool(ids) == bool(text)
    assert len(ids) <= len(text)


def test_prompts_of_a_fact_share_their_beginning_and_keep_their_length(facts: FactSet) -> None:
    tokenizer = StandInTokenizer(50257, 0)
    for query, text in texts_of(facts, 60):
        ids, beginning = tokenizer.encode(text), tokenizer.encode(query)
        assert ids[: len(beginning)] == beginning
        assert len(ids) > 2 * len(beginning)
    assert tokenizer.decode([5, 7]) != tokenizer.decode([57]) != tokenizer.decode([7, 5])
    assert len(tokenizer.encode("headquartered")) == 3
    assert tokenizer.encode("is") != tokenizer.encode(" is")


@FACTS.mark()
def test_pararel_prompts_come_to_four_characters_a_token() -> None:
    texts = [text for _, text in texts_of(rehearsal.rehearsal_facts(), 600)]
    tokenizer = StandInTokenizer(50257, 0)
    assert 3.9 < sum(map(len, texts)) / sum(len(tokenizer.encode(t)) for t in texts) < 4.3


def test_a_tokenizer_folder_is_used_with_or_without_its_configuration(
    facts: FactSet, tmp_path: Path
) -> None:
    folder = toy_folder(ToyConfig("gpt2"))
    shutil.copy(folder / "tokenizer.json", tmp_path)
    assert read_tokenizer(tmp_path, D_VOCAB).encode("Paris") == [
        *read_tokenizer(folder, D_VOCAB).encode("Paris")
    ]
    for i, where in enumerate((folder, tmp_path)):
        kept = tmp_path / f"kept_{i}"
        own = config(tokenizer=where, keep=kept)
        found = rehearse(own, architecture=small("gpt2-small"), facts=facts)
        first = pd.read_parquet(kept / "prompts.parquet")["knowledge_probing_prompt"][0]
        assert found.tokenizer == where.name
        assert found.first_prompt_tokens == [0, *read_tokenizer(folder, D_VOCAB).encode(first)]


# --- projection and report ---------------------------------------------------------------------------

STAGES = (
    Stage("build", 2.0, 1, "run", 1),
    Stage("answers", 6.0, 1, "fact", 4, few_items=1, few_seconds=3.0),  # 2 and 1 for each
    Stage("grid", 8.0, 1, "prompt", 10, few_items=4, few_seconds=5.0),  # 3 and 0.5 for each
    Stage("beside", 99.0, 1, "prompt", 10, in_run=False),
)


def test_a_projection_scales_what_is_not_fixed() -> None:
    found = project(STAGES, facts=8, prompts=100)
    assert found.stages == {"build": 2.0, "answers": 2 + 8.0, "grid": 3 + 50.0}
    assert found.total == 65.0


def test_a_projection_to_what_was_measured_is_what_was_measured() -> None:
    found = project(STAGES, facts=4, prompts=10)
    assert found.stages == {s.name: s.seconds for s in STAGES if s.in_run}


seconds = st.floats(0, 1e5)


@given(
    fixed=seconds,
    each=seconds,
    few=st.integers(1, 100),
    more=st.integers(1, 1000),
    full=st.integers(1, 10**6),
)
def test_a_straight_line_is_projected_exactly(
    fixed: float, each: float, few: int, more: int, full: int
) -> None:
    one, two = (Stage("grid", fixed + each * n, 1, "prompt", n) for n in (few, few + more))
    found = two.beside(one)
    assert found.projected(full) == pytest.approx(fixed + each * full, rel=1e-6, abs=1e-6 * full)
    assert found.fixed_seconds == pytest.approx(fixed, abs=1e-6 * (1 + two.seconds))


def test_a_projection_is_neither_below_nor_above_what_growth_allows() -> None:
    ten = Stage("grid", 8.0, 1, "prompt", 10)
    slower = ten.beside(Stage("grid", 9.0, 1, "prompt", 5))  # noise: the smaller run took longer
    assert (slower.per_item, slower.fixed_seconds) == (0.0, 8.0)
    assert slower.projected(10**6) == 8.0
    steep = ten.beside(Stage("grid", 3.0, 1, "prompt", 5))  # a line that begins below 0
    assert (steep.per_item, steep.fixed_seconds) == (0.8, 0.0)
    assert steep.projected(1000) == 800.0
    between = ten.beside(Stage("grid", 6.0, 1, "prompt", 5))
    assert 8.0 < between.projected(1000) == 404.0 < 800.0


def test_what_only_a_first_run_pays_for_hides_no_growth(
    facts: FactSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([9.0, 2.0, 5.0])  # the first of few prompts, the second, and the one of all

    def run(folder: RunFolder, *_: Any) -> Any:
        seconds = next(times)
        folder.note(first_prompt_tokens=[1], entropy_neurons=[2])
        items = N_PROMPTS if seconds == 5.0 else 3
        return [[1]], {"ablations": Stage("ablations", seconds, 1, "prompt", items)}

    monkeypatch.setattr(rehearsal, "_run", run)
    monkeypatch.setattr(rehearsal, "_plain_passes", lambda *_, **__: {})
    (found,) = rehearse(config(), architecture=small("gpt2-small"), facts=facts).stages
    assert (found.seconds, found.few_seconds, found.few_items) == (5.0, 2.0, 3)


def test_of_what_is_done_once_the_longer_time_counts() -> None:
    one, two = Stage("measures", 2.0, 5, "run", 1), Stage("measures", 3.0, 4, "run", 1)
    assert two.beside(one) == one.beside(two) == two
    assert (two.projected(10**6), two.fixed_seconds) == (3.0, 3.0)


def test_a_smaller_run_that_did_no_less_tells_nothing() -> None:
    capped = Stage("effects", 6.0, 1, "prompt", 20, most=20)
    found = capped.beside(replace(capped, seconds=5.0))
    assert found == capped
    assert [found.projected(n) for n in (10, 20, 10**6)] == [3.0, 6.0, 6.0]


def test_a_stage_of_few_prompts_grows_no_further() -> None:
    sampled = Stage("effects", 6.0, 1, "prompt", 10, few_items=2, few_seconds=2.0, most=20)
    assert [sampled.projected(n) for n in (10, 20, 10**6)] == [6.0, 11.0, 11.0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04123, "0.041 s"),
        (9.994, "9.99 s"),
        (10.0, "10.0 s"),
        (599.9, "599.9 s"),
        (600.0, "10 min"),
        (7140.0, "119 min"),
        (7200.0, "2 h 0 min"),
        (9420.0, "2 h 37 min"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_table_tells_measured_from_projected(done: tuple[Rehearsal, Path]) -> None:
    found, _ = done
    text = rehearsal_table(found)
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("stage"))
    measured, projected = header.index("measured on") + 11, header.index("projected")
    assert measured < projected
    rows = {s.name: next(line for line in lines if line.startswith(s.name + " ")) for s in found.stages}
    for stage in found.stages:
        row = rows[stage.name]
        assert duration(stage.seconds) in row[measured:projected]
        says = duration(found.published.stages[stage.name]) if stage.in_run else "-"
        assert row.endswith(" " + says)
    assert any(line.startswith("a whole run") for line in lines)
    for said in (
        "4,688 facts and 10,684 prompts",
        f"runs, of 3 and of {N_PROMPTS} prompts",
        "Random weights decode all 10 tokens",
        "3 controls and 3 matched ones each",
        "stand-in",
    ):
        assert said in text, said
    assert max(map(len, lines)) <= 120


def test_a_report_reads_back_as_it_was(done: tuple[Rehearsal, Path], tmp_path: Path) -> None:
    found, _ = done
    path = tmp_path / "report.json"
    write_json(path, found)
    assert read_rehearsal(path) == found


def test_a_profiler_sees_the_highest_memory_of_each_stage() -> None:
    told: list[str] = []
    profiler = Profiler(torch.device("cpu"), say=told.append)
    with profiler("before"):
        pass
    with profiler("large", "prompt", 2):
        torch.ones(1 << 26).sum()  # 256 MiB, gone at the end
    with profiler("after"):
        pass
    before, large, after = (profiler.stages[s].peak_bytes for s in ("before", "large", "after"))
    assert large - before > 200 << 20
    assert large - after > 200 << 20
    assert (profiler.stages["large"].per, profiler.stages["large"].items) == ("prompt", 2)
    assert told == ["before ...", "large, 2 prompts ...", "after ..."]


def test_a_stage_that_fails_is_no_stage(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {"model": "made"})
    profiler = Profiler(torch.device("cpu"), folder)
    with profiler("works"):
        pass
    with pytest.raises(KeyError), profiler("fails"):
        raise KeyError
    assert [*profiler.stages] == folder.manifest["done"] == ["works"]


# --- refusals ----------------------------------------------------------------------------------------


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("built before the input was checked")

    monkeypatch.setattr(rehearsal, "build", refuse)
    monkeypatch.delenv("CCM_DATA_DIR", raising=False)


def empty(tmp_path: Path) -> list[str]:
    return ["--tokenizer", str(tmp_path)]


def too_many_tokens(tmp_path: Path) -> list[str]:
    from tokenizers import Tokenizer, models

    vocab = {str(i): i for i in range(50258)}
    Tokenizer(models.WordLevel(vocab, unk_token="0")).save(str(tmp_path / "tokenizer.json"))
    return ["--tokenizer", str(tmp_path)]


def not_a_tokenizer(tmp_path: Path) -> list[str]:
    (tmp_path / "tokenizer.json").write_text("{}")
    return ["--tokenizer", str(tmp_path)]


def not_empty(tmp_path: Path) -> list[str]:
    (tmp_path / "file").touch()
    return ["--keep", str(tmp_path)]


def there_already(tmp_path: Path) -> list[str]:
    (tmp_path / "file").touch()
    return ["--out", str(tmp_path / "file")]


def given_as(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda tmp_path: list(arguments)


no_cuda = NO_GPU.mark()


@pytest.mark.usefixtures("nothing_built")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (given_as("--model", "gpt3"), "model 'gpt3': unknown. Allowed: gpt2-small, EleutherAI"),
        (
            given_as("--model", "organism"),
            "model 'organism': is none of the published models: use `ccm run`",
        ),
        (
            given_as("--model", str(CHECKPOINT)),
            f"model '{CHECKPOINT}': is none of the published models: use `ccm run`",
        ),
        (given_as("--prompts", "2"), "--prompts 2: out of range. Allowed: 3 (those of one fact) to"),
        (given_as("--prompts", "100000"), "--prompts 100000: out of range. Allowed: 3"),
        (
            given_as("--controls", "-1"),
            "controls -1: out of range. Allowed: 0 and more, for --controls",
        ),
        (given_as("--seed", "-1"), "seed -1: out of range. Allowed: 0 to 4294967295"),
        (
            given_as("--ablation-value", "mean"),
            "ablation value 'mean': unknown. Allowed: mean_",
        ),
        (given_as("--dtype", "float8"), "dtype 'float8': unknown. Allowed: float32"),
        (given_as("--device", "tpu"), "device 'tpu': unknown. Allowed: auto"),
        pytest.param(
            given_as("--device", "cuda"), "device 'cuda': 0 CUDA devices found", marks=no_cuda
        ),
        (empty, "--tokenizer {tmp}: no tokenizer (none of tokenizer.json"),
        (not_a_tokenizer, "--tokenizer {tmp}: its tokenizer cannot be read ("),
        (too_many_tokens, "--tokenizer {tmp}: its tokenizer has tokens up to 50257, but the model has"),
        (not_empty, "--keep {tmp}: not an empty folder. Nothing was written"),
        (there_already, "--out {tmp}/file: exists already. Nothing was written"),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(
    more: Callable[[Path], list[str]],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["rehearse", "--model", "gpt2-small", "--device", "cpu", *more(tmp_path)]
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ccm: " + message.format(tmp=tmp_path))
    assert len(printed.err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("nothing_built")
def test_a_model_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 16 << 30)
    assert main(["rehearse", "--model", "Meta-Llama-3-8B", "--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("ccm: Meta-Llama-3-8B in float32: needs 34.")
    assert "GiB on cpu, free 16 GiB. Use --dtype bfloat16 or a machine with more memory." in printed


# --- the command -------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_a_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CCM_DATA_DIR", raising=False)
    small_one = small("Phi-1_5")
    monkeypatch.setattr(rehearsal, "architecture_of", lambda name: small_one)
    out = tmp_path / "report.json"
    few = ["--prompts", "3", "--controls", "0", "--ablation-value", "mean_ablation", "--device", "cpu"]
    assert main(["rehearse", "--model", "Phi-1_5", *few, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    found = read_rehearsal(out)
    assert printed.out == rehearsal_table(found) + "\n"
    assert printed.err.startswith("rehearsal: load ...\n")
    assert (found.model, found.prompts, found.n_sets) == ("Phi-1_5", 3, 1)
    assert found.facts_name == "the organism's"
    assert [*tmp_path.iterdir()] == [out]


def test_options_are_those_of_a_run_with_defaults_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[RehearsalConfig] = []

    def caught(config: RehearsalConfig) -> None:
        seen.append(config)
        raise BadInput("seen")

    monkeypatch.setattr(rehearsal, "rehearse", caught)
    given_ = [
        "--controls",
        "7",
        "--matched-controls",
        "2",
        "--memory-budget",
        "1G",
        "--dtype",
        "bfloat16",
    ]
    values = ["--ablation-value", "mode_ablation, mean_ablation", "--device", "cpu", "--seed", "5"]
    for more in ([], [*given_, *values, "--prompts", "9", "--hooked", "--keep", "x"]):
        assert main(["rehearse", "--model", "gpt2-small", *more]) == 2
    plain, told = seen
    everything = RunConfig("gpt2-small", device="auto", ablation_values=("all",))
    assert plain == RehearsalConfig(everything, prompts=256)
    assert told.run == RunConfig(
        "gpt2-small",
        device="cpu",
        dtype="bfloat16",
        ablation_values=("mode_ablation", "mean_ablation"),
        controls=7,
        matched_controls=2,
        seed=5,
        memory_budget=1 << 30,
    )
    assert (told.prompts, told.hooked, told.keep, told.tokenizer) == (9, True, Path("x"), None)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["rehearse", "--help"])
    told_help = " ".join(capsys.readouterr().out.split())
    for said in (
        "one of the five published models",
        "(default: all)",
        "(default: auto)",
        "(default: 100)",
    ):
        assert said in told_help, said
