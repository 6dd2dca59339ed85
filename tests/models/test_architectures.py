"""Families beyond the paper's five: exact by both engines, exact by hooks, or refused with a reason."""

import functools
import json
import re
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import ccm
from ccm.cli.parser import main
from ccm.decoding import hooked
from ccm.decoding import shared as decoding
from ccm.decoding.engines import ENGINES
from ccm.decoding.results import merge
from ccm.decoding.trial import check_shared
from ccm.errors import AssumptionBroken, BadInput, CcmError
from ccm.method.ablation import Ablation
from ccm.method.statistics import STATISTICS
from ccm.models.bridge import Tokens
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import CHECKPOINT, MODELS, spec_for
from tests.architectures import D_MODEL, D_VOCAB, FAMILIES, N_LAYERS, SHARED, Tiny, tiny_folder
from tests.effects import measure_effects
from tests.tolerance import ENTROPY

pytestmark = pytest.mark.whole_runs

HOOKED = tuple(tiny for tiny in FAMILIES if not tiny.refused)
BY_HOOKS = tuple(tiny for tiny in HOOKED if tiny.shared or tiny.broken)
BOTH = tuple(tiny for tiny in HOOKED if tiny not in BY_HOOKS)
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


@each(BY_HOOKS)
def test_the_shared_engine_says_what_it_cannot_run(tiny: Tiny) -> None:
    why = tiny.shared or tiny.broken
    message = rf"^{tiny.name}: {SHARED} \({why}.*\)\. Use --engine hooked\.$"
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


def ablate_command(tiny: Tiny, inputs: Path, out: Path) -> list[str]:
    """`ccm ablate` of the first and the last neuron, by whatever engine computes the model."""
    try:
        width = spec_for(str(tiny_folder(tiny))).d_mlp
    except CcmError:  # as the command will say
        width = tiny.d_mlp
    stats = dict.fromkeys(STATISTICS, np.linspace(-1, 1, width))
    np.savez(out.with_suffix(".npz"), **{**stats, "std": np.ones(width)})
    return [
        *("ablate", "--model", str(tiny_folder(tiny)), "--stats", str(out.with_suffix(".npz"))),
        *("--prompts", str(inputs / "prompts.csv"), "--neurons", f"0,{width - 1}", "--out", str(out)),
    ]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What stands on stderr, but for progress."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("ccm: ")]


@each(BY_HOOKS)
def test_ablate_falls_back_on_hooks_and_says_so(
    tiny: Tiny, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = ablate_command(tiny, inputs, tmp_path / "a.json"), tmp_path / "a.json"
    assert main([*command, "--engine", "shared"]) == 2
    assert re.search(rf"^ccm: {tiny.name}: {SHARED} .*Use --engine hooked\.$", said(capsys)[-1])
    assert not out.exists()
    assert main(command) == 0
    why = rf"^ccm: {tiny.name}: {SHARED} \({tiny.shared or tiny.broken}.*Decoding by hooks, one pass"
    assert len([line for line in said(capsys) if re.search(why, line)]) == 1
    written, model = json.loads(out.read_text()), loaded(tiny)
    assert written["engine"] == "hooked"
    prompts = [model.encode(line.split(",")[0]) for line in PROMPTS.splitlines()[1:]]
    for name, ablation in (
        ("plain", Ablation("plain", (), ())),
        ("set_000", Ablation("set_000", (0, model.spec.d_mlp - 1), (-1.0, 1.0))),
    ):
        wanted, results = hooked.decode(model, prompts, ablation), written["results"][name]
        assert results["output_texts"] == list(wanted.texts)
        ENTROPY.assert_close(results["entropies"], wanted.first.entropy, what=name)


@each(tuple(BY_NAME[name] for name in ("jamba", "lfm2")))
def test_a_whole_run_falls_back_on_hooks(
    tiny: Tiny, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with the shared engine, asked for by name, says before any work that it cannot."""
    out, prompts = tmp_path / "run", tmp_path / "p.csv"
    how = ["--model", str(tiny_folder(tiny)), "--facts", str(inputs)]
    run = ["run", *how, "--max-prompts", "6", "--controls", "1", "--out"]
    assert main([*run, str(tmp_path / "other"), "--engine", "shared"]) == 2
    assert re.search(rf"^ccm: {tiny.name}: {SHARED} .*Use --engine hooked\.$", said(capsys)[-1])
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["manifest.json"]
    assert main([*run, str(out)]) == 0
    assert len([line for line in said(capsys) if "Decoding by hooks" in line]) == 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["complete"], manifest["engine"]) == (True, "hooked")
    effects = pd.read_parquet(out / "mean_ablation" / "effects.parquet")
    assert np.isfinite(effects.to_numpy()).all()
    assert main(["prompts", *how, "--out", str(prompts)]) == 0
    assert main(["measure", "--model", str(tiny_folder(tiny))]) == 0  # which decodes nothing


@each(tuple(tiny for tiny in HOOKED if tiny.broken))
def test_what_breaks_an_assumption_is_neither_measured_nor_run(
    tiny: Tiny, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_folder(tiny))]
    out = ["--facts", str(inputs), "--out", str(tmp_path / "out")]
    for command in (["measure", *model], ["prompts", *model, *out], ["run", *model, *out]):
        assert main(command) == 2
        (line,) = said(capsys)
        assert re.search(rf"^ccm: {tiny.name}: refused, {tiny.broken}.* `ccm ablate` runs it", line)
    with pytest.raises(AssumptionBroken, match=tiny.broken):
        ccm.measure(loaded(tiny))


# --- the table of architectures ---------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN = "| checkpoint | class | verdict | why |\n| --- | --- | --- | --- |\n"
EXACT, HOOKS, REFUSED = "exact", "by hooks", "refused"
WHY = re.compile(rf"{SHARED} \((.*)\)\. Decoding|refused, (.*)$|(cannot .*|not a decoder.*)$")
MEASURED = re.compile(r"[\d.e-]+ nats, and rounding explains \de-\d+")  # by how much depends on kernels


def verdict(tiny: Tiny, inputs: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What becomes of `ccm ablate`, and why it is not what both engines say alike."""
    command = ablate_command(tiny, inputs, out)
    capsys.readouterr()
    code, lines = main(command), said(capsys)
    if code:
        assert (code, out.exists()) == (2, False), lines
        return REFUSED, reason(lines[-1])
    mine = json.loads(out.read_text())
    out.unlink()
    assert main([*command, "--engine", "hooked"]) == 0
    its = json.loads(out.read_text())
    for name, found in mine["results"].items():
        assert found["output_texts"] == its["results"][name]["output_texts"]
    if mine["engine"] == "shared":
        return EXACT, ""
    (line,) = [line for line in lines if "Decoding by hooks" in line]
    return HOOKS, reason(line)


def reason(line: str) -> str:
    """The part of a message that says why, the same on every machine."""
    found = WHY.search(line)
    assert found is not None, line
    text = next(filter(None, found.groups())).partition(". ")[0].partition(", so nothing")[0]
    text = MEASURED.sub("more nats than rounding explains", text).strip(" .")
    return text if len(text) <= 160 else text[:157] + "..."


def releases() -> str:
    names = ("torch", "transformers", "transformer_lens")
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in names)


def test_the_page_of_architectures_says_what_is_found_here(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """Made anew by `pytest tests/models/test_architectures.py -k page --snapshot-update`."""
    found = {
        tiny.name: (tiny.kind, *verdict(tiny, inputs, tmp_path / f"{tiny.name}.json", capsys))
        for tiny in FAMILIES
    }
    by_verdict = sorted(found, key=lambda name: ((EXACT, HOOKS, REFUSED).index(found[name][1]), name))
    table = "".join(f"| {' | '.join((name, *found[name]))} |\n" for name in by_verdict)
    for tiny in FAMILIES:
        expected = REFUSED if tiny.refused else HOOKS if tiny in BY_HOOKS else EXACT
        assert found[tiny.name][1] == expected, tiny.name
    text = PAGE.read_text()
    before, _, after = text.partition(BEGIN)
    old, _, after = after.partition("\n\n")
    if request.config.option.update_snapshots:
        made_with = re.sub(r"\(made with .*?\)", f"(made with {releases()})", before)
        PAGE.write_text(f"{made_with}{BEGIN}{table}\n{after}")
        return
    shown = [[cell.strip() for cell in row.strip("|").split("|")] for row in old.splitlines()]
    assert {row[0]: row[2] for row in shown} == {name: found[name][1] for name in found}
    if releases() in before:  # other releases give other reasons
        assert old + "\n" == table
