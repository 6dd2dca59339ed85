"""The dress rehearsal: the five architectures, every stage on small ones, and the projection."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from ccm.experiment.fact_files import read_fact_folder
from ccm.experiment.folder import read_json, write_json
from ccm.experiment.rehearsal import rehearse as rehearsal
from ccm.experiment.rehearsal.profiler import Meter
from ccm.experiment.rehearsal.projection import (
    PUBLISHED_FACTS,
    PUBLISHED_PROMPTS,
    Rehearsal,
    Stage,
    duration,
    project,
    read_rehearsal,
    rehearsal_table,
)
from ccm.experiment.rehearsal.rehearse import choose_facts, rehearse
from ccm.experiment.rehearsal.stages import RehearsalConfig, build_prompts, repeat
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.facts import FactSet
from ccm.method.prompts import same_name
from ccm.models import memory
from ccm.models.load import assemble, load
from ccm.models.random import (
    Architecture,
    StandInTokenizer,
    architecture_of,
    n_parameters,
    random_model,
    read_tokenizer,
)
from ccm.models.specs import CHECKPOINT, MODELS, PUBLISHED, spec_for
from tests.needs import FACTS, NO_GPU
from tests.toys import ToyConfig, toy_folder

PARAMETERS = {  # the well-known totals
    "gpt2-small": 124_439_808,
    "EleutherAI_pythia-1.4b": 1_414_647_808,
    "Phi-1_5": 1_418_270_720,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Meta-Llama-3-8B": 8_030_261_248,
}
N_PROMPTS, N_CONTROLS, D_VOCAB = 7, 3, 640
IN_RUN = ("build", "measures", "parametric answers", "activation statistics", "ablation grid")
IN_RUN = (*IN_RUN, "effects, entropy set", "effects, controls", "tables and scores")


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
    return architecture.with_options(vocab_size=D_VOCAB, bos_token_id=0, eos_token_id=0, **sizes)


def config(name: str = "gpt2-small", **changes: Any) -> RehearsalConfig:
    few = RehearsalConfig(name, prompts=N_PROMPTS, controls=N_CONTROLS, device="cpu")
    return replace(few, **changes)


@pytest.fixture(scope="module")
def facts() -> FactSet:
    """The organism's facts; read-only."""
    return read_fact_folder(CHECKPOINT, "the organism's")


@pytest.fixture(scope="module")
def done(facts: FactSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Rehearsal, Path]:
    """A rehearsal of GPT-2, made small, and what it kept; read-only."""
    folder = tmp_path_factory.mktemp("rehearsal") / "kept"
    small_one = small("gpt2-small")
    return rehearse(config(hooked=True), architecture=small_one, facts=facts, keep=folder), folder


# --- the architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_have_the_published_number_of_parameters(name: str) -> None:
    assert n_parameters(architecture_of(name).config()) == PARAMETERS[name]


def test_an_architecture_of_another_size_is_counted_otherwise() -> None:
    one_more = architecture_of("gpt2-small").with_options(n_positions=1025)
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
    told: list[str] = []
    found = rehearse(config(name), architecture=small(name), facts=facts, say=told.append)
    by_name = {s.name: s for s in found.stages}
    assert tuple(s.name for s in found.stages if s.in_run) == IN_RUN
    assert told == [f"{name} ..." for name in by_name]
    for stage in found.stages:
        items = {"run": 1, "fact": 3, "prompt": N_PROMPTS}[stage.per]
        assert stage.items == items, stage
        assert stage.seconds > 0, stage
        assert 0 <= stage.fixed_seconds <= stage.seconds, stage
        assert stage.peak_bytes > 1 << 20, stage
    assert (found.facts, found.prompts, found.n_sets) == (3, N_PROMPTS, 5 * (1 + N_CONTROLS))
    assert found.ablation_values == list(ABLATION_VALUES)
    assert found.weight_bytes == 4 * found.parameters
    assert len(found.entropy_neurons) == MODELS[name].n_entropy_neurons
    grid, plain = found.work["ablation grid"], found.work["plain pass"]
    assert grid["prompts"] == plain["prompts"] == N_PROMPTS
    assert grid["forward_tokens"] >= plain["forward_tokens"] > N_PROMPTS * 9
    # No stand-in token ends an answer, so the plain run reads ten distributions a prompt.
    assert plain["nodes"] <= grid["nodes"]
    assert 9 * N_PROMPTS < plain["nodes"] <= 10 * N_PROMPTS
    assert found.published.facts == PUBLISHED_FACTS == 4688
    assert found.published.prompts == PUBLISHED_PROMPTS[name]


def test_published_prompts_are_the_sums_of_figure_5() -> None:
    assert PUBLISHED_PROMPTS == {
        "gpt2-small": 9986 + 666 + 32,
        "EleutherAI_pythia-1.4b": 6274 + 101 + 360,
        "Phi-1_5": 3801 + 1131 + 1578,
        "Mistral-7B-v0.1": 2604 + 69 + 462,
        "Meta-Llama-3-8B": 9343 + 32 + 211,
    }


def test_what_is_kept_is_a_run_folder(done: tuple[Rehearsal, Path]) -> None:
    found, folder = done
    manifest = read_json(folder / "manifest.json")
    assert manifest["complete"] is True
    assert manifest["identity"]["weights"] == "random"
    assert manifest["sets"]["entropy"] == found.entropy_neurons
    prompts = pd.read_parquet(folder / "prompts.parquet")
    assert len(prompts) == N_PROMPTS
    assert len([*folder.rglob("control_*.parquet")]) == 5 * N_CONTROLS
    for value in ABLATION_VALUES:
        assert len(pd.read_parquet(folder / value / "entropy.parquet")) == N_PROMPTS
    scores = read_json(folder / "scores.json")
    assert set(scores["ablations"]) == set(ABLATION_VALUES)
    assert scores["n_prompts"] == N_PROMPTS
    assert not (folder / "shards").exists()


def test_the_hooked_pass_is_for_comparison_only(done: tuple[Rehearsal, Path]) -> None:
    found, _ = done
    names = [s.name for s in found.stages if not s.in_run]
    assert names == ["plain pass, shared engine", "plain pass, hooks"]
    assert not set(names) & set(found.published.stages)


def test_the_same_seed_gives_the_same_work(done: tuple[Rehearsal, Path], facts: FactSet) -> None:
    found, _ = done
    again = rehearse(config(), architecture=small("gpt2-small"), facts=facts)
    for name in ("first_prompt_tokens", "entropy_neurons", "work", "mean_prompt_tokens"):
        assert getattr(again, name) == getattr(found, name), name
    other = rehearse(config(seed=5), architecture=small("gpt2-small"), facts=facts)
    assert other.entropy_neurons != found.entropy_neurons
    assert other.first_prompt_tokens != found.first_prompt_tokens


# --- prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 7, 60])
def test_prompts_contradict_true_objects_with_others_of_the_relation(n: int, facts: FactSet) -> None:
    answers, candidates = choose_facts(facts, n)
    prompts = build_prompts(answers, candidates, facts, n, seed=1)
    assert len(answers) == math.ceil(n / 3)
    assert len(prompts) == n
    truth = {(f.subject, f.relation): f.object for f in facts.facts}
    objects = {r: {f.object for f in facts.facts if f.relation == r} for r in facts.relations}
    for prompt in prompts:
        assert prompt.parametric_object == truth[prompt.subject, prompt.relation]
        assert prompt.counter_object in objects[prompt.relation] - {prompt.parametric_object}
        assert prompt.text == f"{prompt.query} {prompt.counter_object}. {prompt.query}"
    own = [p.counter_object for p in prompts if p.query == prompts[0].query]
    assert len({same_name(o) for o in own}) == 3
    again, other = (build_prompts(answers, candidates, facts, n, seed=s) for s in (1, 2))
    assert again == prompts
    assert other != prompts


def test_facts_are_chosen_over_all_relations(facts: FactSet) -> None:
    answers, _ = choose_facts(facts, 90)
    assert {a.fact.relation for a in answers} == set(facts.relations)


@given(st.text(max_size=60), st.integers(3, 60_000), st.integers(0, 2))
def test_the_stand_in_tokenizer_stays_in_the_vocabulary(text: str, d_vocab: int, bos: int) -> None:
    tokenizer = StandInTokenizer(d_vocab, bos)
    ids = tokenizer.encode(text)
    assert all(0 <= i < d_vocab and i != bos for i in ids)
    assert bool(ids) == bool(text)
    assert len(ids) <= len(text)


def test_prompts_of_a_fact_share_their_beginning_and_keep_their_length(facts: FactSet) -> None:
    answers, candidates = choose_facts(facts, 60)
    tokenizer = StandInTokenizer(50257, 0)
    for prompt in build_prompts(answers, candidates, facts, 60, seed=1):
        ids, query = tokenizer.encode(prompt.text), tokenizer.encode(prompt.query)
        assert ids[: len(query)] == query
        assert len(ids) > 2 * len(query)
    assert tokenizer.decode([5, 7]) != tokenizer.decode([57]) != tokenizer.decode([7, 5])
    assert len(tokenizer.encode("headquartered")) == 3
    assert tokenizer.encode("is") != tokenizer.encode(" is")


@FACTS.mark()
def test_pararel_prompts_come_to_four_characters_a_token() -> None:
    facts = rehearsal.rehearsal_facts()
    answers, candidates = choose_facts(facts, 600)
    texts = [p.text for p in build_prompts(answers, candidates, facts, 600, seed=1)]
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
    answers, candidates = choose_facts(facts, N_PROMPTS)
    first = build_prompts(answers, candidates, facts, N_PROMPTS, seed=123)[0].text
    for where in (folder, tmp_path):
        found = rehearse(config(tokenizer=where), architecture=small("gpt2-small"), facts=facts)
        assert found.tokenizer == where.name
        assert found.first_prompt_tokens == [0, *read_tokenizer(folder, D_VOCAB).encode(first)]


# --- projection and report ---------------------------------------------------------------------------

STAGES = (
    Stage("build", 2.0, 1, "run", 1),
    Stage("answers", 6.0, 1, "fact", 4, fixed_seconds=2.0),
    Stage("grid", 8.0, 1, "prompt", 10, fixed_seconds=3.0),
    Stage("beside", 99.0, 1, "prompt", 10, in_run=False),
)


def test_a_projection_scales_what_is_not_fixed() -> None:
    found = project(STAGES, facts=8, prompts=100)
    assert found.stages == {"build": 2.0, "answers": 2 + 8.0, "grid": 3 + 50.0}
    assert found.total == 65.0


def test_a_projection_to_what_was_measured_is_what_was_measured() -> None:
    found = project(STAGES, facts=4, prompts=10)
    assert found.stages == {s.name: s.seconds for s in STAGES if s.in_run}


def test_a_stage_of_few_prompts_grows_no_further() -> None:
    sampled = Stage("effects", 6.0, 1, "prompt", 10, fixed_seconds=1.0, most=20)
    assert [sampled.projected(n) for n in (10, 20, 10**6)] == [6.0, 11.0, 11.0]


def test_more_is_fixed_than_was_measured_only_by_noise() -> None:
    assert Stage("grid", 1.0, 1, "prompt", 10, fixed_seconds=1.5).projected(10**6) == 1.0


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
    for said in ("4,688 facts and 10,684 prompts", "Random weights decode all 10 tokens", "stand-in"):
        assert said in text, said
    assert max(map(len, lines)) <= 120


def test_a_report_reads_back_as_it_was(done: tuple[Rehearsal, Path], tmp_path: Path) -> None:
    found, _ = done
    path = tmp_path / "report.json"
    write_json(path, found)
    assert read_rehearsal(path) == found
    for wrong in ({}, {"stages": [{"name": "grid"}]}, []):
        path.write_text(json.dumps(wrong))
        with pytest.raises(BadInput, match=r".*report.json: not the report of a rehearsal"):
            read_rehearsal(path)


def test_a_meter_sees_the_highest_memory_of_each_stage() -> None:
    meter = Meter(torch.device("cpu"), lambda text: None)
    with meter.stage("before"):
        pass
    with meter.stage("large", "prompt", 2):
        torch.ones(1 << 26).sum()  # 256 MiB, gone at the end
    with meter.stage("after"):
        pass
    before, large, after = (s.peak_bytes for s in meter.stages)
    assert large - before > 200 << 20
    assert large - after > 200 << 20
    meter.fix(1e9)
    assert meter.stages[-1].fixed_seconds == meter.stages[-1].seconds
    assert (meter.stages[1].per, meter.stages[1].items) == ("prompt", 2)


def test_a_stage_that_fails_is_no_stage() -> None:
    meter = Meter(torch.device("cpu"), lambda text: None)
    with pytest.raises(KeyError), meter.stage("fails"):
        raise KeyError
    assert meter.stages == []


def test_repeated_completions_are_the_same_ones_again() -> None:
    first = FirstToken(
        entropy=np.array([0.5, 1.0]),
        asked=np.array([[1], [2]]),
        log_probs=np.array([[-1.0], [-2.0]]),
        top_tokens=np.array([[3], [4]]),
        top_log_probs=np.array([[-0.1], [-0.2]]),
    )
    found = repeat(Completions(((1,), (2, 3)), ("a", "b"), first), 3)
    assert found.texts == ("a", "b") * 3
    assert found.tokens == ((1,), (2, 3)) * 3
    assert found.first.entropy.tolist() == [0.5, 1.0] * 3
    assert found.first.top_tokens.tolist() == [[3], [4]] * 3


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
        (given_as("--model", "organism"), "model 'organism': has no published architecture"),
        (given_as("--model", str(CHECKPOINT)), f"model '{CHECKPOINT}': has no published architecture"),
        (given_as("--prompts", "2"), "--prompts 2: out of range. Allowed: 3 (those of one fact) to"),
        (given_as("--prompts", "100000"), "--prompts 100000: out of range. Allowed: 3"),
        (given_as("--controls", "-1"), "-1 controls: out of range. Allowed: 0 and more"),
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
    assert printed.err.startswith("rehearsal: build ...\n")
    assert (found.model, found.prompts, found.n_sets) == ("Phi-1_5", 3, 1)
    assert found.facts_name == "the organism's"
    assert [*tmp_path.iterdir()] == [out]
