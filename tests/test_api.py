"""The Python API: what `import ccm` offers, on the organism."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ccm
import ccm.reporting.report
from ccm.errors import AssumptionBroken, BadInput
from ccm.models.model import LoadedModel
from ccm.models.specs import CHECKPOINT, PUBLISHED
from tests.made_runs import make_run
from tests.tolerance import ENTROPY

N_PROMPTS, N_CONTROLS = 12, 2
TEXTS = ["Ada was born in", "Ada", "The guildhall of"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ccm.Run:
    """A short run of the organism; read-only."""
    out = tmp_path_factory.mktemp("api") / "run"
    values = "mean_ablation,mode_ablation"
    few = {"max_prompts": N_PROMPTS, "controls": N_CONTROLS, "matched_controls": 0}
    return ccm.run("organism", ablation_values=values, out=out, **few)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """The organism; read-only."""
    return ccm.load("organism")


def plain() -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(CHECKPOINT),
        AutoTokenizer.from_pretrained(CHECKPOINT),
    )


def bridge_of(loaded: Any, tokenizer: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    loaded.config.architectures = [type(loaded).__name__]
    return TransformerBridge.boot_transformers(
        str(CHECKPOINT), hf_model=loaded, tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )


# --- models -----------------------------------------------------------------------------------------


def test_measure_marks_the_entropy_neurons(model: LoadedModel) -> None:
    table = ccm.measure(model)
    assert [*table] == ["neuron_idx", "logitvar", "norm", "rho", "entropy_neuron"]
    assert table["entropy_neuron"].sum() == 6
    assert ccm.measure(model, k=3)["entropy_neuron"].sum() == 3
    pd.testing.assert_frame_equal(ccm.measure("organism"), table)


@pytest.mark.parametrize("kind", ["transformers", "bridge"])
def test_a_model_in_memory_is_run_and_left_as_it_is(kind: str, model: LoadedModel) -> None:
    loaded, tokenizer = plain()
    given = loaded if kind == "transformers" else bridge_of(loaded, tokenizer)
    modules = [type(m) for m in given.modules()]
    weights = {name: (p.data_ptr(), p.requires_grad) for name, p in given.named_parameters()}
    found = ccm.load(given, tokenizer=tokenizer if kind == "transformers" else None)
    assert found.W_out.data_ptr() in {pointer for pointer, _ in weights.values()}, "weights were copied"
    wanted = ccm.ablate(model, TEXTS, {"mine": [29, 97]})
    pd.testing.assert_frame_equal(ccm.ablate(found, TEXTS, {"mine": [29, 97]}), wanted)
    assert [type(m) for m in given.modules()] == modules
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in given.named_parameters()} == weights
    pd.testing.assert_frame_equal(
        ccm.measure(found), ccm.measure(model, k=6, min_rho=0.0, null_space_dims=2)
    )


@pytest.mark.parametrize("how", ["folded", "hooked"])
def test_a_bridge_that_computes_something_else_is_refused(how: str) -> None:
    bridge = bridge_of(*plain())
    if how == "folded":
        bridge.enable_compatibility_mode()
    else:
        bridge.blocks[1].hook_out.add_hook(lambda x, hook: x.flip(-1))
    with pytest.raises(AssumptionBroken, match=r"^the bridge gives other numbers than the model"):
        ccm.load(bridge)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: plain()[0], r"^GPT2LMHeadModel: no tokenizer\. Give ccm\.load\(model, tokenizer="),
        (lambda: torch.nn.Linear(2, 2), "^Linear: no tokenizer"),
    ],
)
def test_what_is_no_model_in_memory_is_refused(given: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ccm.load(given())
    with pytest.raises(BadInput, match=r"^Linear: not a model"):
        ccm.load(torch.nn.Linear(2, 2), tokenizer=plain()[1])


# --- ablations --------------------------------------------------------------------------------------


def test_ablating_a_runs_prompts_gives_its_cells(model: LoadedModel, run: ccm.Run) -> None:
    chosen = run.results.entropy_neurons
    table = ccm.ablate(model, run.prompts(), {"entropy": chosen}, value="mode_ablation")
    assert [*table["set"].unique()] == ["plain", "entropy"]
    assert len(table) == 2 * N_PROMPTS
    for name, cell in (("plain", run.results.plain), ("entropy", run.results.ablated["mode_ablation"])):
        mine = table[table["set"] == name]
        assert mine["prompt"].tolist() == [*range(N_PROMPTS)]
        assert mine["source"].tolist() == cell["source"].tolist()
        ENTROPY.assert_close(mine["entropy"].to_numpy(), cell["entropy"].to_numpy(), what=name)


def test_texts_have_no_source(model: LoadedModel) -> None:
    table = ccm.ablate(model, TEXTS, [29, 97], engine="hooked")
    assert [*table] == ["set", "prompt", "text", "tokens", "entropy"]
    assert table["text"].tolist() == ccm.ablate(model, TEXTS, [29, 97])["text"].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": []}, "^no prompts"),
        ({"sets": {"mine": [384]}}, "^set 'mine': neuron 384 is out of range"),
        ({"sets": {"plain": [1]}}, "^a set is named 'plain'"),
        ({"value": "mean"}, "^ablation value 'mean': unknown"),
        ({"value": "all"}, "^ablation value 'all': one is needed"),
        ({"engine": "warp"}, r"^engine 'warp': unknown\. Allowed: auto, shared, hooked"),
        ({"protocol": "x"}, "^protocol 'x': unknown"),
    ],
)
def test_ablations_that_cannot_be(given: dict[str, Any], message: str, model: LoadedModel) -> None:
    with pytest.raises(BadInput, match=message):
        ccm.ablate(model, **{"prompts": TEXTS, "sets": [1], **given})


# --- runs -------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_file(run: ccm.Run) -> None:
    table = run.scores()
    written = json.loads((run.path / "scores.json").read_text())
    for value, scored in written["ablations"].items():
        own = table[(table["ablation_value"] == value) & (table["set"] == "entropy")]
        gts = own[own["quantity"] == "gts"].iloc[0]
        assert (gts["count"], gts["n"], gts["value"]) == tuple(
            scored["entropy"]["gts"][key] for key in ("count", "total", "percent")
        )
    assert [*table["set"].unique()] == ["plain", "entropy", "control_000", "control_001"]
    assert not table.duplicated(["ablation_value", "set", "quantity", "source_from", "source_to"]).any()


def test_transitions_are_counts_of_all_prompts(run: ccm.Run) -> None:
    table = run.transitions()
    assert len(table) == 2 * (1 + N_CONTROLS) * 9
    sums = table.groupby(["ablation_value", "set"])["count"].sum()
    assert set(sums) == {N_PROMPTS}


def test_a_run_reads_back(run: ccm.Run) -> None:
    again = ccm.read_run(run.path)
    pd.testing.assert_frame_equal(again.scores(), run.scores())
    pd.testing.assert_frame_equal(again.prompts(), run.prompts())
    assert again.prompts()["source"].tolist() == run.results.plain["source"].tolist()
    assert np.isfinite(again.neurons()["rho"]).all()
    assert repr(again) == f"Run(organism, {N_PROMPTS} prompts, {run.path})"


def test_the_report_goes_where_it_is_told(
    run: ccm.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ccm.reporting.report, "draw", lambda entries, out, processes: iter(()))
    page = run.report(tmp_path / "page")
    assert page == tmp_path / "page" / "report.html"
    assert page.is_file()


def test_options_of_a_run_are_checked(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^option 'contols': unknown\. Allowed: model, "):
        ccm.run("organism", contols=3, out=tmp_path / "run")
    with pytest.raises(BadInput, match=r"^--controls 'many': not a whole number"):
        ccm.run("organism", controls="many", out=tmp_path / "run")
    with pytest.raises(BadInput, match=r"^seed: beside a RunConfig\."):
        ccm.run(ccm.RunConfig(), seed=3, out=tmp_path / "run")
    with pytest.raises(BadInput, match=r"^a shard of a run has no scores of its own\."):
        ccm.run("organism", shard="1/2", out=tmp_path / "run")
    with pytest.raises(BadInput, match=r"reach rho"):
        ccm.run("organism", min_rho=0.9999, out=tmp_path / "high")
    assert not (tmp_path / "high" / "prompts.parquet").exists()
    assert not (tmp_path / "run").exists()


def test_compare_is_with_the_paper(run: ccm.Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"of which the paper printed nothing"):
        ccm.compare(run)
    with pytest.raises(BadInput, match=r"'book': unknown\. Allowed: paper"):
        ccm.compare(run, "book")
    make_run(tmp_path / "run", model=PUBLISHED[0], d_model=768, d_mlp=3072)
    table = ccm.compare(tmp_path / "run", out=tmp_path / "report")
    assert set(table["model"]) == {PUBLISHED[0]}
    assert {"ablation_value", "quantity", "paper", "ours", "margin", "verdict"} <= {*table}
    assert (tmp_path / "report" / "tolerance_report.md").is_file()
