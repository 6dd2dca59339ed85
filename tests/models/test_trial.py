"""Faults put into each way to run a model are found, and rounding is not taken for one."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ccm.decoding import trial as decoding_trial
from ccm.decoding.engines import ENGINES
from ccm.decoding.forward import run_body
from ccm.decoding.shared import decode_sets
from ccm.decoding.trial import check_shared
from ccm.errors import AssumptionBroken
from ccm.models import load as checkpoint
from ccm.models import trial
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import MODELS, spec_for
from ccm.models.trial import ACTIVATIONS, FINAL, LOG_PROBS, LONG, ordinary_tokens, plain_log_probs
from tests.toys import FAMILIES, ToyConfig, save_toy, token_prompts, toy_folder

TOY = FAMILIES[0]
Change = Callable[[torch.Tensor], torch.Tensor]
each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)


def toy(dtype: str = "float32", config: ToyConfig = TOY) -> LoadedModel:
    return load(spec_for(str(toy_folder(config))), dtype=dtype)


def late(x: torch.Tensor, size: float) -> torch.Tensor:
    """Changed from the 13th position on, as where distances are counted wrongly."""
    return torch.cat([x[:, : LONG // 2], x[:, LONG // 2 :] * (1 + size)], dim=1)


# --- the hooks --------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "everywhere": lambda x, size: x * (1 + size),
    "late positions": late,
    "steps": lambda x, size: x * (1 + size) if x.shape[1] == 1 else x,
    "first of a batch": lambda x, size: torch.cat([x[:1] * (1 + size), x[1:]]) if len(x) > 1 else x,
}


def break_bridge(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any, Any], None],
    calls: Counter[str] | None = None,
) -> None:
    """Let `change` at every bridge and twin that is made from now on."""
    boot = checkpoint._boot

    def broken(*given: Any) -> Any:
        bridge, twin, names = boot(*given)
        change(bridge, twin)
        return bridge, twin, names

    monkeypatch.setattr(checkpoint, "_boot", broken)


def changed(output: Any, change: Change) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def in_attention(fault: str, size: float) -> Callable[[Any, Any], None]:
    def change(bridge: Any, twin: Any) -> None:
        bridge.blocks[0].attn.register_forward_hook(
            lambda module, args, output: changed(output, lambda x: FAULTS[fault](x, size))
        )

    return change


@pytest.mark.parametrize("fault", FAULTS)
def test_hooks_that_compute_another_model_are_refused(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_bridge(monkeypatch, in_attention(fault, 1e-2))
    found = r"log-probabilities differ by 0\.\d+ nats, and rounding explains \de-0[345]"
    with pytest.raises(
        AssumptionBroken, match=rf"refused, decoded with the hooks .*\({found}\), so nothing"
    ):
        toy()


@pytest.mark.parametrize("fault", FAULTS)
def test_rounding_is_no_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_bridge(monkeypatch, in_attention(fault, 2e-7))
    assert toy().trial is not None


@pytest.mark.parametrize("size", [1e-2, 2e-7])
def test_weights_that_the_bridge_changes_are_seen(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin has the same ones, so that both would agree."""

    def change(bridge: Any, twin: Any) -> None:
        for parameter in twin.parameters():
            if parameter.ndim == 2:
                parameter.data *= 1 + size

    break_bridge(monkeypatch, change)
    if size < 1e-3:
        assert toy().trial is not None
        return
    with pytest.raises(AssumptionBroken, match="other numbers than transformers' own forward"):
        toy()


@pytest.mark.parametrize(
    ("what", "name"), [(FINAL, "FINAL_RESIDUAL"), (ACTIVATIONS, "hook_post")], ids=["x", "a"]
)
def test_hooks_that_read_something_else_are_refused(
    what: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == FINAL:
        monkeypatch.setattr(trial, name, "blocks.0.hook_in")
    else:
        monkeypatch.setattr(LoadedModel, name, "blocks.0.mlp.hook_post")
    with pytest.raises(AssumptionBroken, match=rf"\({what} differ by [\d.]+ of their length, and"):
        toy()


@pytest.mark.parametrize("fault", ["raises", "raises in a step", "no number"])
def test_hooks_that_do_not_run_are_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        if fault == "no number":
            return x * float("nan")
        if fault == "raises" or x.shape[1] == 1:
            raise KeyError("no such layer. All layers there are: 0, 1")
        return x

    def change(bridge: Any, twin: Any) -> None:
        bridge.blocks[0].attn.register_forward_hook(lambda m, args, out: changed(out, fail))

    break_bridge(monkeypatch, change)
    said = "log-probabilities are no numbers" if fault == "no number" else "KeyError: 'no such layer"
    with pytest.raises(AssumptionBroken, match=rf"\({said}\)") as caught:
        toy()
    assert "All layers" not in str(caught.value)


def test_what_transformers_itself_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    monkeypatch.setattr(checkpoint, "plain_log_probs", fail)
    with pytest.raises(
        AssumptionBroken, match=r"transformers itself cannot run it in bfloat16 \(RuntimeE"
    ):
        toy("bfloat16")


@pytest.mark.parametrize("where", ["load.plain_log_probs", "trial.next_logits"])
def test_memory_that_runs_out_is_no_premise(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"ccm.models.{where}", full)
    with pytest.raises(torch.OutOfMemoryError):
        toy()


@pytest.mark.parametrize(
    ("dtype", "way_out"), [("float32", "Check its weights"), ("float16", "Use --dty")]
)
def test_logits_that_are_no_numbers_are_refused(
    dtype: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = plain_log_probs
    monkeypatch.setattr(checkpoint, "plain_log_probs", lambda *given: real(*given) / 0.0)
    with pytest.raises(AssumptionBroken, match=rf"its logits are not finite\. {way_out}"):
        toy(dtype)


# --- what rounding explains -------------------------------------------------------------------------


@each_toy
def test_allowed_is_more_than_float32_loses_and_not_much_more(config: ToyConfig) -> None:
    """Against float64; of either kind of sum, on any processor."""
    from transformers import AutoModelForCausalLM

    found = toy(config=config).trial
    assert found is not None
    exact = AutoModelForCausalLM.from_pretrained(toy_folder(config), dtype=torch.float64)
    with torch.inference_mode():
        wanted = torch.cat(
            [exact(torch.tensor([p]), use_cache=False).logits[0].log_softmax(-1) for p in found.prompts]
        )
    lost = float((found.plain[LOG_PROBS] - wanted).abs().max())
    assert 3 * lost < found.allowed[LOG_PROBS] < 300 * lost
    for what in (FINAL, ACTIVATIONS):  # a float32 has 6e-8 of its own
        assert 3e-6 < found.allowed[what] < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_toy
def test_lower_precision_is_held_to_its_own_rounding(dtype: str, config: ToyConfig) -> None:
    model = toy(dtype, config)
    check_shared(model)
    exact = toy(config=config).trial
    assert model.trial is not None
    assert exact is not None
    for what, allowed in exact.allowed.items():
        assert model.trial.allowed[what] > 20 * allowed


# --- the fast path ----------------------------------------------------------------------------------


def wrong_body(fault: str, size: float) -> Callable[..., Any]:
    """`run_body` with a fault."""

    def run(model: Any, tokens: Any, cache: Any = None, positions: Any = None, **how: Any) -> Any:
        past = 0 if cache is None else cache.get_seq_length()
        if fault == "raises":
            raise ValueError("no conv state. Layers: many")
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if fault == "positions" and positions is not None:
            positions = positions + 1
        x, a = run_body(model, tokens, cache, positions, **how)
        hit = {
            "x": True,
            "a": True,
            "steps": past and tokens.shape[1] == 1,
            "watching": not how.get("last_only", False),
            "prefixes": past and tokens.shape[1] > 1,
            "one row": len(tokens) > 1,
        }.get(fault, False)
        if hit and fault == "one row":
            x = torch.cat([x[:1] * (1 + size), x[1:]])
        elif hit:
            x, a = (x, a * (1 + size)) if fault == "a" else (x + size * x.flip(-1), a)
        return x, a

    return run


@pytest.mark.parametrize(
    ("fault", "size", "message"),
    [
        ("x", 1e-2, "log-probabilities differ by"),
        ("x", float("nan"), "log-probabilities are no numbers"),
        ("one row", 1e-2, "final residuals differ by 0.01 of their length"),  # a norm takes it away
        ("a", 1e-2, "last-layer activations differ by 0.01 of their length"),
        ("steps", 1e-2, "log-probabilities differ by"),
        ("watching", 1e-2, "log-probabilities differ by"),
        ("prefixes", 1e-2, "log-probabilities differ by"),
        ("positions", 0.0, "log-probabilities differ by"),
        ("raises", 0.0, r"ValueError: no conv state\)"),
    ],
)
def test_a_fast_path_that_computes_another_model_is_refused(
    fault: str, size: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy()
    monkeypatch.setattr(decoding_trial, "run_body", wrong_body(fault, size))
    ENGINES["hooked"].check(model)
    for _ in range(2):  # it is not forgotten
        with pytest.raises(
            AssumptionBroken, match=rf"cannot run it \({message}.*\. Use --engine hooked\.$"
        ):
            ENGINES["shared"].check(model)
    with pytest.raises(AssumptionBroken, match="the shared engine cannot run it"):
        list(decode_sets(model, token_prompts(3, TOY), []))


@pytest.mark.parametrize("fault", ["x", "a", "steps", "prefixes", "watching", "one row"])
def test_rounding_is_no_fault_of_the_fast_path(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    monkeypatch.setattr(decoding_trial, "run_body", wrong_body(fault, 2e-7))
    check_shared(model)


def test_memory_that_runs_out_is_no_fault_of_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    monkeypatch.setattr(decoding_trial, "run_body", wrong_body("memory", 0.0))
    with pytest.raises(torch.OutOfMemoryError):
        check_shared(model)


# --- what it costs, and what it runs on -------------------------------------------------------------


def test_few_tokens_are_run_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 50 for each of five ways to run them, and what shares no prefix; a run has millions."""
    run = Counter[str]()
    read = checkpoint._read_weights

    def counting(*given: Any) -> Any:
        loaded = read(*given)
        loaded.get_input_embeddings().register_forward_hook(
            lambda module, args, output: run.update(tokens=args[0].numel())
        )
        return loaded

    monkeypatch.setattr(checkpoint, "_read_weights", counting)
    model = toy()
    assert 100 < run["tokens"] < 300
    run.clear()
    check_shared(model)
    assert 50 < run["tokens"] < 200
    run.clear()
    check_shared(model)
    assert not run


def test_the_organism_passes() -> None:
    check_shared(load(MODELS["organism"]))


def test_short_contexts_are_kept_to(tmp_path: Path) -> None:
    model = load(spec_for(str(save_toy(ToyConfig("gpt2", n_ctx=12), tmp_path / "short"))))
    check_shared(model)
    assert model.trial is not None
    assert max(map(len, model.trial.prompts)) == 12


def test_rows_that_no_text_reaches_may_hold_anything(tmp_path: Path) -> None:
    """Vocabularies are filled up to a round number, and some leave those rows as memory was."""
    import safetensors.torch

    config = ToyConfig("llama", tied=False)
    folder = save_toy(config, tmp_path / "padded")
    held = safetensors.torch.load_file(folder / "model.safetensors")
    model = load(spec_for(str(folder)))
    n = len(model.tokenizer)
    assert n < config.d_vocab
    held["model.embed_tokens.weight"][n:] = float("nan")
    safetensors.torch.save_file(held, folder / "model.safetensors", {"format": "pt"})
    prompts = [model.encode("the capital of Italy is"), model.encode("Paris")]
    whole = [shard.texts for shard in decode_sets(model, prompts)]
    assert [shard.texts for shard in decode_sets(load(spec_for(str(folder))), prompts)] == whole


def test_ordinary_tokens() -> None:
    class Tokenizer:
        all_special_ids = (0, 5, 900)

        def __len__(self) -> int:
            return 8

    assert ordinary_tokens(Tokenizer(), 320).tolist() == [1, 2, 3, 4, 6, 7]
    assert ordinary_tokens(Tokenizer(), 4).tolist() == [1, 2, 3]
    assert ordinary_tokens(Tokenizer(), 1).tolist() == [0], "none but special ones"
    assert ordinary_tokens(object(), 3).tolist() == [0, 1, 2]
