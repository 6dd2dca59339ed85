"""Loading: sizes, tokens, processed weights, and every model whose last layer is not the method's."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccm.cli.parser import main
from ccm.errors import AssumptionBroken, BadInput, NotAvailable
from ccm.experiment.config import RunConfig
from ccm.experiment.plan import make_plan
from ccm.experiment.results import read_results
from ccm.method.neurons import measure, processed_W_out, processed_W_U
from ccm.models.assumptions import broken_assumption, check_assumptions
from ccm.models.devices import device_for, dtype_for
from ccm.models.download import download
from ccm.models.load import check_precision, load
from ccm.models.model import LoadedModel
from ccm.models.random import architecture_of
from ccm.models.specs import CHECKPOINT, DTYPES, MAX_NEW_TOKENS, MODELS, PUBLISHED, spec_for
from tests.exact import margins
from tests.made_runs import make_run
from tests.tolerance import MEASURE
from tests.toys import (
    FAMILIES,
    GROUPED,
    MERGED_WORDS,
    ToyConfig,
    build_tokenizer,
    token_prompts,
    toy_folder,
    word_prompts,
)

each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)


@functools.cache
def loaded(config: ToyConfig) -> LoadedModel:
    """The toy, loaded once; read-only."""
    return load(spec_for(str(toy_folder(config))))


def fresh(config: ToyConfig = FAMILIES[0]) -> LoadedModel:
    """A model of the caller's own, to break."""
    return load(spec_for(str(toy_folder(config))))


# --- what is read off a checkpoint ------------------------------------------------------------------


@each_toy
def test_sizes_and_special_tokens(config: ToyConfig) -> None:
    model = loaded(config)
    spec = model.spec
    sizes = (spec.n_layers, spec.d_model, spec.d_mlp, spec.d_vocab, model.n_ctx)
    assert sizes == (config.n_layers, config.d_model, config.d_mlp, config.d_vocab, config.n_ctx)
    assert (model.bos, model.eos) == (config.bos_id, frozenset({config.eos_id}))
    assert model.W_U.shape == (config.d_model, config.d_vocab)
    assert model.W_out.shape == (config.d_mlp, config.d_model)
    assert model.final_norm.centred == (config.family not in GROUPED)
    assert model.source == str(toy_folder(config))
    before_load = spec_for(str(toy_folder(config)))
    assert before_load == spec, "config.json gave other sizes than the weights"
    assert not model.W_U.requires_grad
    assert not model.W_out.requires_grad


@each_toy
def test_the_matrices_reproduce_the_logits(config: ToyConfig) -> None:
    model, prompt = loaded(config), torch.tensor(token_prompts(1, config, seed=2, min_len=6))
    seen: list[torch.Tensor] = []
    hook = ("ln_final.hook_in", lambda x, hook: seen.append(x.detach().clone()))
    with torch.inference_mode(), model.bridge.hooks(fwd_hooks=[hook]):
        logits = model.bridge(prompt, attention_mask=torch.ones_like(prompt), return_type="logits")
    ours = model.final_norm(seen[0].float()) @ model.W_U + model.b_U
    margins(model).log_prob.assert_close(ours.log_softmax(-1), logits.log_softmax(-1), what=config.id)
    assert bool(model.b_U.any()) == (config.family == "phi")
    check_assumptions(model)
    assert not model.broken_assumption


@each_toy
def test_processed_weights_are_those_of_transformer_lens(config: ToyConfig) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    theirs = TransformerBridge.boot_transformers(str(toy_folder(config)), device="cpu")
    theirs.enable_compatibility_mode()
    model = loaded(config)
    W_U = processed_W_U(model.W_U, model.final_norm)
    W_out = processed_W_out(model.W_out, model.final_norm)
    for name, ours, wanted in (("W_U", W_U, theirs.W_U), ("W_out", W_out, theirs.W_out[-1])):
        MEASURE.of(name).assert_close(
            ours, wanted.detach(), scale=float(wanted.detach().abs().max()), what=config.id
        )


@each_toy
def test_measures_are_the_formulas(config: ToyConfig) -> None:
    model, dims = loaded(config), 5
    found = measure(model.W_U, model.W_out, model.final_norm, dims)
    W_U = model.W_U.double().numpy() * model.final_norm.gain.double().numpy()[:, None]
    W_out = model.W_out.double().numpy()
    if config.family not in GROUPED:
        W_U = W_U - W_U.mean(axis=0)
        W_out = W_out - W_out.mean(axis=1, keepdims=True)
    W_U = W_U - W_U.mean(axis=1, keepdims=True)
    U, singular_values, _ = np.linalg.svd(W_U, full_matrices=False)
    norms = np.sqrt((W_out**2).sum(axis=1))
    lengths = np.sqrt((W_U**2).sum(axis=0))
    cosines = (W_out / norms[:, None]) @ (W_U / lengths)
    rho = np.sqrt(((W_out @ U[:, -dims:]) ** 2).sum(axis=1)) / norms
    MEASURE.of("LogitVar").assert_close(found.logit_var, cosines.var(axis=1, ddof=1), what=config.id)
    MEASURE.of("norm").assert_close(found.norm, norms, what=config.id)
    MEASURE.of("rho").assert_close(found.rho, rho, what=config.id)
    MEASURE.of("singular value").assert_close(
        found.singular_values, singular_values, scale=singular_values[0], what=config.id
    )


# --- text to tokens ---------------------------------------------------------------------------------


@each_toy
def test_a_prompt_has_one_bos_in_front(config: ToyConfig) -> None:
    model = loaded(config)
    for text in (*word_prompts(20), "", "Łódź 1944\n\nthe", " leading space"):
        ids = model.encode(text)
        assert ids[0] == config.bos_id, f"{config.id}: {text!r}"
        assert ids.count(config.bos_id) == 1, f"{config.id}: {text!r} -> {ids}"
        assert model.decode(ids).strip() == text.strip()


@each_toy
def test_a_prompt_leaves_room_for_its_answer(config: ToyConfig) -> None:
    model = replace(loaded(config), n_ctx=40)
    allowed = 40 - (MAX_NEW_TOKENS - 1)
    own = len(loaded(config).encode("")) + (config.family in GROUPED)  # BOS, and "▁" where it leads
    text = "q" * (allowed - own)
    assert len(model.encode(text)) == allowed
    with pytest.raises(BadInput, match=rf"^prompt of {allowed + 1} tokens .*too long"):
        model.encode(text + "q")


@each_toy
def test_first_token_is_the_answers_own(config: ToyConfig) -> None:
    model = loaded(config)
    space = "▁" if config.family in GROUPED else "Ġ"
    for word in MERGED_WORDS:
        merged = build_tokenizer(config.family).token_to_id(space + word)
        for answer in (word, f" {word} ", f"{word} Rome", f"{word}."):
            assert model.first_token(answer) == merged, f"{config.id}: {answer!r}"
    for answer in ("Rome", "New York", "1944", "東京", "Łódź"):
        token = model.first_token(answer)
        after = model.encode(f"the {answer}")[len(model.encode("the"))]
        assert token == after, f"{config.id}: {answer!r} starts otherwise after a word"
        assert token not in {config.bos_id, config.eos_id}


@each_toy
def test_decode_leaves_special_tokens_out(config: ToyConfig) -> None:
    model = loaded(config)
    ids = model.encode("the capital of Paris")
    assert model.decode([*ids, config.eos_id]) == model.decode(ids[1:])
    assert model.decode([]) == ""


# --- models that are refused --------------------------------------------------------------------------


def hooked_module(model: LoadedModel, name: str) -> torch.nn.Module:
    block = model.bridge.blocks[model.spec.n_layers - 1]
    modules: dict[str, torch.nn.Module] = {
        "head": model.bridge.unembed.original_component,
        "norm": model.bridge.ln_final,
        "block": block,
        "mlp": block.mlp,
    }
    return modules[name]


def changed(output: Any, f: Any) -> Any:
    return (f(output[0]), *output[1:]) if isinstance(output, tuple) else f(output)


def test_an_unbroken_model_passes() -> None:
    assert broken_assumption(fresh()) == ""


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("head", lambda z: 4.0 * torch.tanh(z / 4.0), "its logits are not norm"),
        ("head", lambda z: 1.05 * z, "its logits are not norm"),
        ("head", lambda z: z + torch.linspace(0, 1, z.shape[-1]), "its logits are not norm"),
        ("norm", lambda x: x * 1.05, "its logits are not norm"),
        ("block", lambda x: 0.5 * x, "a change of a last-layer activation"),
        ("block", lambda x: x + 0.5 * x.flip(-1), "a change of a last-layer activation"),
        ("mlp", lambda x: x / x.norm(dim=-1, keepdim=True), "a change of a last-layer activation"),
    ],
    ids=["soft cap", "scaled logits", "extra bias", "another gain", "scaled", "after it", "post-norm"],
)
def test_a_broken_premise_is_refused(where: str, change: Any, message: str) -> None:
    model = fresh()
    module = hooked_module(model, where)
    module.register_forward_hook(lambda module, args, output: changed(output, change))
    model.broken_assumption = broken_assumption(model)
    with pytest.raises(AssumptionBroken, match=f"^{model.spec.name}: refused, {message}"):
        check_assumptions(model)


@pytest.mark.parametrize("massive", [False, True], ids=["scaled a little", "post-norm"])
def test_a_broken_premise_is_refused_whatever_the_size_of_the_residual(massive: bool) -> None:
    model = fresh()
    if massive:  # as at the first position of trained models
        model.bridge.original_model.get_input_embeddings().weight.data[model.bos, 3] = 3000.0
    module = hooked_module(model, "mlp" if massive else "block")

    def change(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True) if massive else 0.9 * x

    module.register_forward_hook(lambda module, args, output: changed(output, change))
    assert broken_assumption(model).startswith("a change of a last-layer activation")


def test_unembedding_or_output_weights_of_another_shape_are_refused() -> None:
    model = fresh()
    model.__dict__["W_out"] = model.W_out[:-1]
    with pytest.raises(AssumptionBroken, match="its last MLP is not one d_mlp x d_model matrix"):
        broken_assumption(model)
    lacking = replace(fresh(), spec=replace(model.spec, n_layers=9))
    with pytest.raises(AssumptionBroken, match=r"it has no blocks\.8\.mlp\.hook_post to ablate"):
        broken_assumption(lacking)


def with_tokenizer(model: Any, folder: Path) -> Path:
    import transformers

    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer("gpt2"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    folder = with_tokenizer(transformers.T5ForConditionalGeneration(config), tmp_path / "tiny-t5")
    with pytest.raises((AssumptionBroken, BadInput), match=r"tiny-t5/config\.json: not a decoder"):
        load(spec_for(str(folder)))


# --- the hub ------------------------------------------------------------------------------------------


def test_published_models_are_looked_for_where_they_are() -> None:
    assert {name: (MODELS[name].hub_id, MODELS[name].gated) for name in PUBLISHED} == {
        "gpt2-small": ("openai-community/gpt2", False),
        "EleutherAI_pythia-1.4b": ("EleutherAI/pythia-1.4b", False),
        "Phi-1_5": ("microsoft/phi-1_5", False),
        "Mistral-7B-v0.1": ("mistralai/Mistral-7B-v0.1", False),
        "Meta-Llama-3-8B": ("meta-llama/Meta-Llama-3-8B", True),
    }


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_gate_that_the_hub_puts_before_any_model_is_named(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from httpx import Request, Response
    from huggingface_hub.errors import GatedRepoError

    def gated(*given: Any, **options: Any) -> None:
        request = Request("GET", "https://huggingface.co")
        raise GatedRepoError("403 Client Error.", response=Response(403, request=request))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *given, **options: None)
    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", lambda *given, **options: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(NotAvailable, match=r"The model is gated: ask for access .* set HF_TOKEN") as e:
        download(MODELS[model])
    assert str(e.value).startswith(f"{model}: ")
    assert "\n" not in str(e.value)


# --- names, folders, devices --------------------------------------------------------------------------


def test_known_names_and_their_paths() -> None:
    spec = spec_for("gpt2-small")
    assert spec == MODELS["gpt2-small"]
    folder = toy_folder(FAMILIES[0])
    assert spec_for("gpt2-small", {"gpt2-small": folder}) == replace(spec, folder=folder)
    assert spec_for("mine", {"mine": folder}).folder == folder


def test_unknown_name_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^model 'gpt5': unknown, .*Allowed: organism, smollm2-135m, "):
        spec_for("gpt5")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not a checkpoint folder"),
        ({"model.safetensors": ""}, "not a checkpoint folder"),
        (
            {"config.json": '{"model_type": "gpt2"}'},
            r"no \*\.safetensors weights\. Fetch model.safetens",
        ),
        (
            {"config.json": "{}", "pytorch_model.bin": "x"},
            r"only pytorch_model.bin. Pickled weights are",
        ),
        ({"config.json": "{", "model.safetensors": ""}, "config.json: not JSON"),
        ({"config.json": "[]", "model.safetensors": ""}, "config.json: not JSON .a list"),
        ({"config.json": "{}", "model.safetensors": ""}, "config.json: not a decoder-only"),
        (
            {"config.json": '{"model_type": "gpt2"}', "model.safetensors": "no weights"},
            "no safetensors file",
        ),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        load(spec_for(str(tmp_path)))
    assert str(caught.value).startswith(str(tmp_path))


def test_devices() -> None:
    assert device_for("cpu") == torch.device("cpu")
    assert device_for("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "", "cuda:x", "mps"):
        with pytest.raises(BadInput, match=f"^device '{name}': (unknown|not supported). Allowed: auto"):
            device_for(name)
    with pytest.raises(NotAvailable, match=r"^device 'cuda:64': \d+ CUDA devices found"):
        device_for("cuda:64")


def test_dtypes() -> None:
    assert [dtype_for(name) for name in DTYPES] == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(BadInput, match=r"^dtype 'float8': unknown. Allowed: float32, bfloat16"):
        dtype_for("float8")


@pytest.mark.parametrize(("precision", "override"), [("high", "0"), ("highest", "1")])
def test_float32_on_a_gpu_is_float32(
    precision: str, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    check_precision(cuda, torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", override)
    with pytest.raises(BadInput, match=r"^float32 matmul precision .*TF32"):
        check_precision(cuda, torch.float32)
    check_precision(cuda, torch.bfloat16)
    check_precision(cpu, torch.float32)


def test_a_precision_that_torch_cannot_name_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> str:
        raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    with pytest.raises(BadInput, match=r"^float32 matmul precision 'set by fp32_precision'"):
        check_precision(torch.device("cuda"), torch.float32)


def test_a_new_model_is_one_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = MODELS["Phi-1_5"]
    row = replace(of, name="mine", display_name="Mine", hub_id="me/mine", n_layers=3)
    monkeypatch.setitem(MODELS, "mine", row)  # type: ignore[arg-type]
    assert spec_for("mine") == row
    assert main(["models"]) == 0
    assert "hub: me/mine" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"Allowed: .*, mine"):
        spec_for("yours")
    built = architecture_of("mine").config()
    assert (built.num_hidden_layers, built.hidden_size) == (3, of.d_model)
    make_run(tmp_path / "run", model="mine")
    assert read_results(tmp_path / "run").display_name == "Mine"
    chosen = RunConfig(model="mine", neurons="published", facts=str(CHECKPOINT))
    toy = toy_folder(ToyConfig("phi"))
    with pytest.raises(
        BadInput, match="wrong architecture for mine, n_layers is 2 there and should be 3"
    ):
        make_plan(replace(chosen, model_paths={"mine": toy}))
