"""Families beyond the paper's five: exact by both engines, exact by hooks, or refused with a reason."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ccm.cli.parser import main
from ccm.decoding import hooked
from ccm.decoding import shared as decoding
from ccm.decoding.engines import ENGINES
from ccm.decoding.results import merge
from ccm.decoding.trial import check_shared
from ccm.errors import AssumptionBroken, BadInput, CcmError
from ccm.experiment.effects import measure_effects
from ccm.method.ablation import Ablation
from ccm.method.statistics import STATISTICS
from ccm.models.bridge import Tokens
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import CHECKPOINT, MODELS, spec_for
from tests.architectures import D_MODEL, D_VOCAB, FAMILIES, N_LAYERS, SHARED, Tiny, tiny_folder
from tests.tolerance import ENTROPY

HOOKED = tuple(tiny for tiny in FAMILIES if not tiny.refused)
BOTH = tuple(tiny for tiny in HOOKED if not tiny.shared)
ABLATION = Ablation("some", (1, 5, 40), (2.0, -2.0, 1.0))
BY_NAME = {tiny.name: tiny for tiny in FAMILIES}


def each(families: tuple[Tiny, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("tiny", families, ids=lambda tiny: tiny.name)


@functools.cache
def loaded(tiny: Tiny) -> LoadedModel:
    """The model, loaded once; read-only."""
    return load(spec_for(str(tiny_folder(tiny))))


def plain(tiny: Tiny, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as transformers alone loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder(tiny), dtype=dtype)


def some_prompts() -> list[list[int]]:
    """Of unlike lengths, two of one, two that begin alike; none is a trial's."""
    draw = np.random.default_rng(7)
    prompts = [[0, *draw.integers(1, 300, n).tolist()] for n in (1, 4, 4, 9, 40)]
    return [*prompts, [*prompts[-1][:21], 5, 6, 7]]


@torch.inference_mode()
def greedy(model: Any, prompt: Tokens, n: int = 4) -> tuple[int, ...]:
    """Continue a prompt by its whole text each time; no cache that could be wrong."""
    tokens, found = torch.tensor([prompt]), list[int]()
    while len(found) < n:
        found.append(int(model(input_ids=tokens, use_cache=False).logits[0, -1].argmax()))
        if found[-1] == 0:  # EOS
            return tuple(found[:-1])
        tokens = torch.cat([tokens, torch.tensor([found[-1:]])], dim=1)
    return tuple(found)


# --- before any weight is read ----------------------------------------------------------------------


@each(tuple(tiny for tiny in FAMILIES if tiny.name not in ("t5", "mamba", "mixtral", "qwen2-moe")))
def test_dimensions_are_the_models_own(tiny: Tiny) -> None:
    spec = spec_for(str(tiny_folder(tiny)))
    found = (spec.n_layers, spec.d_model, spec.d_mlp, spec.d_vocab)
    assert found == (N_LAYERS, D_MODEL, tiny.d_mlp, D_VOCAB)
    if tiny in HOOKED:
        assert loaded(tiny).spec == spec
        assert loaded(tiny).W_out.shape == (tiny.d_mlp, D_MODEL)


@pytest.mark.parametrize("name", ["opt", "lfm2", "mpt", "falcon-parallel"])
def test_messages_count_the_models_own_neurons(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = BY_NAME[name]
    how = ["--neurons", str(tiny.d_mlp), "--facts", str(MODELS["organism"].folder)]
    assert main(["run", "--model", str(tiny_folder(tiny)), *how, "--out", str(tmp_path / "r")]) == 2
    assert f"0 to {tiny.d_mlp - 1}" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


# --- what is right ----------------------------------------------------------------------------------


@each(tuple(tiny for tiny in HOOKED if tiny.name != "xglm"))  # which overflows in float64
def test_hooks_compute_what_transformers_computes(tiny: Tiny) -> None:
    prompt = torch.tensor([some_prompts()[-2]])
    with torch.inference_mode():
        exact = plain(tiny, torch.float64)(input_ids=prompt, use_cache=False).logits.log_softmax(-1)
        own = plain(tiny)(input_ids=prompt, use_cache=False).logits.log_softmax(-1)
        mask = torch.ones_like(prompt)
        logits = loaded(tiny).bridge(prompt, attention_mask=mask, return_type="logits")
    rounding = float((own - exact).abs().max())
    assert 0 < rounding < 1e-2
    # Two largest roundings of 13,000 numbers each: one is seldom thrice the other.
    assert float((logits.log_softmax(-1) - exact).abs().max()) < 4 * rounding


@each(HOOKED)
def test_hooked_decoding_is_that_of_transformers(tiny: Tiny) -> None:
    prompts, model = some_prompts(), plain(tiny)
    found = hooked.decode(loaded(tiny), prompts, max_new_tokens=4)
    assert found.tokens == tuple(greedy(model, prompt) for prompt in prompts)


@each(BOTH)
def test_both_engines_agree(tiny: Tiny) -> None:
    model, prompts = loaded(tiny), some_prompts()
    done = merge(list(decoding.decode_sets(model, prompts, [ABLATION], own_top=True)))
    for i, wanted in enumerate(
        (hooked.decode(model, prompts), hooked.decode(model, prompts, ABLATION))
    ):
        assert done.completions(i).tokens == wanted.tokens
        ENTROPY.assert_close(done.completions(i).first.entropy, wanted.first.entropy, what=tiny.name)


@each(BOTH[:3])
def test_effects_do_not_depend_on_the_engine(tiny: Tiny) -> None:
    sets = [ABLATION, Ablation("other", (2, 3), (1.0, 1.0))]
    one, two = (
        measure_effects(loaded(tiny), some_prompts(), sets[:1], sets[1:], engine=ENGINES[engine])
        for engine in ("shared", "hooked")
    )
    for name in ("plain", "own", "others"):
        ENTROPY.assert_close(getattr(one, name), getattr(two, name), what=name)


# --- what is not ------------------------------------------------------------------------------------


@each(tuple(tiny for tiny in HOOKED if tiny.shared))
def test_the_shared_engine_says_what_it_cannot_run(tiny: Tiny) -> None:
    message = rf"^{tiny.name}: {SHARED} \({tiny.shared}.*\)\. Use --engine hooked\.$"
    for _ in range(2):
        with pytest.raises(AssumptionBroken, match=message):
            check_shared(loaded(tiny))
    with pytest.raises(AssumptionBroken, match=SHARED):
        list(decoding.decode_sets(loaded(tiny), some_prompts(), []))


@each(tuple(tiny for tiny in FAMILIES if tiny.refused))
def test_what_nothing_can_run_is_refused(tiny: Tiny) -> None:
    with pytest.raises(CcmError, match=tiny.refused) as caught:
        load(spec_for(str(tiny_folder(tiny))))
    assert isinstance(caught.value, (AssumptionBroken, BadInput))
    assert tiny.name in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_width_that_the_weights_do_not_have_is_refused() -> None:
    spec = replace(spec_for(str(tiny_folder(BY_NAME["opt"]))), d_mlp=128)
    with pytest.raises(AssumptionBroken, match=r"last MLP has 48 neurons, and by its config\.json 128"):
        load(spec)


# --- through the command line -----------------------------------------------------------------------

BY_HOOKS = tuple(tiny for tiny in HOOKED if tiny.shared)
PROMPTS = (
    "knowledge_probing_prompt,counter_knowledge_object,parametric_knowledge_object\n"
    "Rome lies in France. Rome lies in,France,Italy\nParis lies in,Italy,France\n"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few of the organism's facts, and what `ccm ablate` reads."""
    folder, facts = tmp_path_factory.mktemp("inputs"), (CHECKPOINT / "facts.csv").read_text()
    first, *others = facts.splitlines(keepends=True)
    (folder / "facts.csv").write_text("".join([first, *others[::16]]))
    shutil.copy(CHECKPOINT / "relations.csv", folder)
    (folder / "prompts.csv").write_text(PROMPTS)
    return folder


def refused(command: list[str], tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> bool:
    """Run a command that the shared engine cannot; what it said."""
    capsys.readouterr()
    assert main(command) == 2
    *_, last = capsys.readouterr().err.splitlines()
    return last.startswith(f"ccm: {tiny.name}: {SHARED} (") and last.endswith("Use --engine hooked.")


@each(BY_HOOKS)
def test_ablate_runs_by_hooks(
    tiny: Tiny, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = dict.fromkeys(STATISTICS, np.linspace(-1, 1, tiny.d_mlp))
    np.savez(tmp_path / "stats.npz", **{**stats, "std": np.ones(tiny.d_mlp)})
    out, last = tmp_path / "a.json", tiny.d_mlp - 1
    command = ["ablate", "--model", str(tiny_folder(tiny)), "--stats", str(tmp_path / "stats.npz")]
    command += ["--prompts", str(inputs / "prompts.csv"), "--neurons", f"0,{last}", "--out", str(out)]
    assert refused(command, tiny, capsys)
    assert not out.exists()
    assert main([*command, "--engine", "hooked"]) == 0
    results, model = json.loads(out.read_text())["results"], loaded(tiny)
    prompts = [model.encode(line.split(",")[0]) for line in PROMPTS.splitlines()[1:]]
    for name, ablation in (
        ("plain", Ablation("plain", (), ())),
        ("set_000", Ablation("set_000", (0, last), (-1.0, 1.0))),
    ):
        wanted = hooked.decode(model, prompts, ablation)
        assert results[name]["output_texts"] == list(wanted.texts)
        ENTROPY.assert_close(results[name]["entropies"], wanted.first.entropy, what=name)


@each(tuple(BY_NAME[name] for name in ("opt", "lfm2")))
def test_a_whole_run_by_hooks(
    tiny: Tiny, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with the shared engine says, before any work, that it cannot."""
    out, prompts = tmp_path / "run", tmp_path / "p.csv"
    how = ["--model", str(tiny_folder(tiny)), "--facts", str(inputs)]
    run = ["run", *how, "--max-prompts", "6", "--controls", "1", "--out", str(out)]
    assert refused(run, tiny, capsys)
    assert [path.name for path in out.iterdir()] == ["manifest.json"]
    assert main([*run, "--engine", "hooked"]) == 0, "what was left there is in the way"
    assert json.loads((out / "manifest.json").read_text())["complete"]
    effects = pd.read_parquet(out / "mean_ablation" / "effects.parquet")
    assert np.isfinite(effects.to_numpy()).all()
    listed = ["prompts", *how, "--out", str(prompts)]
    assert refused(listed, tiny, capsys)
    assert not prompts.exists()
    assert main([*listed, "--engine", "hooked"]) == 0
    assert main(["measure", "--model", str(tiny_folder(tiny))]) == 0  # which decodes nothing
