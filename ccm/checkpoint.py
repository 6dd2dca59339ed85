"""How a checkpoint becomes something the rest can run, and what the method reads off it.

`load` boots a TransformerLens bridge without weight processing: logits are then the checkpoint's own,
and the folded and centred matrices of Method 5 follow by formula (`ccm.neurons`).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ccm.errors import BadInput, NotAvailable, PremiseBroken
from ccm.models import MAX_NEW_TOKENS, ModelSpec, device_for, dtype_for
from ccm.weights import check_weights, weight_files


@dataclass(frozen=True)
class FinalNorm:
    """The norm between the last residual stream and the unembedding, in float32.

    LayerNorm: (x - mean(x)) / sqrt(var(x) + eps) * gain + bias; RMSNorm: no mean, no bias.
    """

    centred: bool  # True for LayerNorm
    eps: float
    gain: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"]  # zeros for RMSNorm

    def scale(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
        """Return the divisor s(x) (TransformerLens calls it `hook_scale`)."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Normalise residual vectors."""
        scale = self.scale(x)
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x / scale * self.gain + self.bias


@dataclass
class LoadedModel:
    """A checkpoint ready to run, with what the method reads off it."""

    spec: ModelSpec
    bridge: Any  # transformer_lens TransformerBridge: hooks, the reference path
    body: Any  # the same weights as a plain transformers model without its head: the fast path
    mlp: Any  # `body`'s last MLP
    mlp_out: Any  # `body`'s last down-projection; its input is `hook_post`
    norm: Any  # `body`'s final norm; its input is the final residual
    tokenizer: Any  # transformers fast tokenizer
    device: torch.device
    dtype: torch.dtype
    source: str  # folder or hub id the weights came from
    n_ctx: int
    bos: int  # the one token in front of every prompt
    eos: frozenset[int]  # decoding stops at any of these
    splitting_tokens: Bool[Tensor, "d_vocab"] | None = None  # filled by `ccm.decoding` when needed

    @property
    def hook_post(self) -> str:
        """Name of the hook after the last layer's MLP non-linearity."""
        return f"blocks.{self.spec.n_layers - 1}.mlp.hook_post"

    @cached_property
    def final_norm(self) -> FinalNorm:
        """The norm before the unembedding."""
        module = self.bridge.ln_final
        weight: Tensor | None = getattr(module, "weight", None)
        gain = torch.ones(self.spec.d_model, device=self.device)  # OLMo's norm has no weight
        gain = gain if weight is None else weight.detach().float().to(self.device)
        if getattr(self.bridge.cfg, "rmsnorm_uses_offset", False):
            gain = gain + 1.0
        bias = getattr(module, "bias", None)
        return FinalNorm(
            centred=not bool(self.bridge.cfg.uses_rms_norm),
            eps=float(self.bridge.cfg.eps),
            gain=gain,
            bias=torch.zeros_like(gain) if bias is None else bias.detach().float().to(self.device),
        )

    @cached_property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding as stored (not folded, not centred), in the model's dtype."""
        weight: Tensor = self._head.weight
        return weight.detach().T.to(self.device)

    @cached_property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """The unembedding's own bias, float32; zeros where the model has none."""
        bias: Tensor | None = self._head.bias
        if bias is None:
            return torch.zeros(self.W_U.shape[1], device=self.device)
        return bias.detach().float().to(self.device)

    @cached_property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """The last MLP's output weights, a row per neuron, in the model's dtype."""
        return self.output_weights(self.spec.n_layers - 1)

    def output_weights(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """A layer's MLP output weights, a row per neuron, in the model's dtype.

        A view of the weights where they lie on the model's device, else a copy that nothing keeps.

        Raises:
            AttributeError: the layer's MLP has no one output matrix (experts).
        """
        module = self.bridge.blocks[layer].mlp.out.original_component
        weight: Tensor = module.weight.detach().to(self.device)
        # transformers' Conv1D (GPT-2) stores [in, out], nn.Linear [out, in].
        return weight if type(module).__name__ == "Conv1D" else weight.T

    @property
    def _head(self) -> Any:
        return self.bridge.unembed.original_component

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` with exactly one BOS in front.

        Raises:
            BadInput: more tokens than the model's context leaves room for.
        """
        ids = [self.bos, *self.tokenizer.encode(text, add_special_tokens=False)]
        # The last generated token is never fed back.
        room = self.n_ctx - (MAX_NEW_TOKENS - 1)
        if len(ids) > room:
            raise BadInput(
                f"prompt of {len(ids)} tokens ({text[:40]!r}...): too long. Allowed: {room}, the "
                f"context of {self.spec.name} ({self.n_ctx}) less its answer. Shorten it."
            )
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens."""
        return str(
            self.tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def first_token(self, answer: str) -> int:
        """Id of the first token of `answer` when it follows a space (Method 9).

        The answer is encoded after a word and the word's tokens are taken off, so that neither a
        BOS that `encode` adds nor a token that is a bare space can be mistaken for it (defect 7).
        """
        word = self.tokenizer.encode("is", add_special_tokens=False)
        both = self.tokenizer.encode(f"is {answer.strip()}", add_special_tokens=False)
        if not answer.strip() or both[: len(word)] != word or len(both) == len(word):
            raise BadInput(f"answer {answer!r} has no token of its own. Use another object name.")
        return int(both[len(word)])


def load(
    spec: ModelSpec, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32"
) -> LoadedModel:
    """Load a model's weights and tokenizer and check that the method's premise holds for it.

    Args:
        spec: A row of `MODELS`, or `spec_for(folder)`.
        device: Where to run.
        dtype: Of weights and activations; norms, logits and softmax are float32 anyway.

    Raises:
        NotAvailable: the weights are not here and cannot be had (not downloaded, gated, offline).
        BadInput: weights that are damaged or another model's, a folder that TransformerLens cannot
            load.
        PremiseBroken: see `check_premise`.
    """
    device = device_for(device) if isinstance(device, str) else device
    dtype = dtype_for(dtype) if isinstance(dtype, str) else dtype
    check_precision(device, dtype)
    if not weight_files(spec):
        download(spec)
    spec = check_weights(spec)
    # Of the hub's models, the cached snapshot: nothing to ask the network for.
    source = str(weight_files(spec)[0].parent if spec.folder is None else spec.folder)
    loaded = _read_weights(spec, source, device, dtype)
    return assemble(spec, loaded, _tokenizer(source), device, dtype, source=source)


def check_precision(device: torch.device, dtype: torch.dtype) -> None:
    """See that float32 products on a GPU are float32's: TF32 keeps ten bits of 23.

    The slack of the shared decode's certificate, and with it that no result depends on the batch, rests
    on them.

    Raises:
        BadInput: TF32 is switched on.
    """
    override = os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0")
    precision = torch.get_float32_matmul_precision()
    if (device.type, dtype) == ("cuda", torch.float32) and (precision, override) != ("highest", "0"):
        raise BadInput(
            f"float32 matmul precision {precision!r}, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE={override}: "
            "products would be TF32's. Use torch.set_float32_matmul_precision('highest') and unset the "
            "variable, or --dtype bfloat16."
        )


def assemble(
    spec: ModelSpec,
    loaded: Any,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    source: str,
) -> LoadedModel:
    """Make what the rest runs of a transformers model and its tokenizer, without copying a weight.

    Args:
        spec: What the model is called; its dimensions are read off the model.
        loaded: A causal language model of transformers on its device, in its dtype; taken over.
        tokenizer: Its fast tokenizer; the bridge gets a copy, because it changes what it is given.
        device: Where the weights are.
        dtype: Theirs.
        source: Where they came from, for messages; nothing is read from there.

    Raises:
        BadInput, NotAvailable: TransformerLens does not know the architecture.
        PremiseBroken: see `check_premise`.
    """
    bridge, twin, names = _boot(spec, loaded, tokenizer, source, device, dtype)
    config = bridge.original_model.config
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    if bos is None:
        raise PremiseBroken(f"{spec.name}: its tokenizer has no BOS token to put before a prompt.")
    generation = getattr(bridge.original_model, "generation_config", None)
    model = LoadedModel(
        spec=replace(
            spec,
            n_layers=int(bridge.cfg.n_layers),
            d_model=int(bridge.cfg.d_model),
            d_mlp=int(bridge.cfg.d_mlp),
            d_vocab=int(bridge.cfg.d_vocab),
        ),
        bridge=bridge.requires_grad_(False),  # again: it made parameters of its own
        body=twin.base_model,
        mlp=twin.get_submodule(names["mlp"]),
        mlp_out=twin.get_submodule(names["mlp_out"]),
        norm=twin.get_submodule(names["norm"]),
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        source=source,
        n_ctx=int(bridge.cfg.n_ctx),
        bos=int(bos),
        eos=_eos(tokenizer.eos_token_id, config.eos_token_id, getattr(generation, "eos_token_id", 0)),
    )
    check_premise(model)
    return model


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def _tokenizer(source: str) -> Any:
    """Load the checkpoint's tokenizer as it is.

    Raises:
        BadInput: a folder without one, for which transformers would make up an empty tokenizer.
    """
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise BadInput(
            f"{folder}: no tokenizer (none of {', '.join(TOKENIZER_FILES)}). Save it there with "
            "tokenizer.save_pretrained."
        )
    return AutoTokenizer.from_pretrained(source, use_fast=True)


def _eos(*found: int | list[int] | None) -> frozenset[int]:
    ids: set[int] = set()
    for value in found:
        if value is not None:
            ids.update([value] if isinstance(value, int) else value)
    return frozenset(ids)


def _read_weights(spec: ModelSpec, source: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Read a checkpoint's weights, once and all of them, into a transformers model on the device."""
    import warnings

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    with warnings.catch_warnings():
        # Deprecations inside the libraries are nothing a user can act on.
        warnings.simplefilter("ignore")
        try:
            loaded, report = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            if report["missing_keys"]:
                raise ValueError(f"no weights for {sorted(report['missing_keys'])[0]}")
            return loaded.to(device)
        except Exception as error:  # whatever the library raises, the next step is one of these
            raise _cannot_load(spec, source, error) from error


def _boot(
    spec: ModelSpec,
    loaded: Any,
    tokenizer: Any,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, Any, dict[str, str]]:
    """Make a bridge and a plain twin of a loaded model that share every weight.

    Returns:
        The bridge, the twin, and the twin's names of the last down-projection and the final norm.
    """
    import copy
    import warnings

    with warnings.catch_warnings():
        # Deprecations inside the libraries are nothing a user can act on.
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge import TransformerBridge

        try:
            loaded = loaded.eval().requires_grad_(False)
            # The bridge wraps the modules it is given, so the twin is copied first: new modules
            # around the same tensors.
            shared = {id(t): t for t in [*loaded.parameters(), *loaded.buffers()]}
            twin = copy.deepcopy(loaded, shared)
            _fuse_gelu(twin)
            names = {id(module): name for name, module in loaded.named_modules()}
            bridge = TransformerBridge.boot_transformers(
                source,
                hf_model=loaded,
                tokenizer=copy.deepcopy(tokenizer),
                device=str(device),
                dtype=dtype,
            )
        except Exception as error:  # whatever the libraries raise, the next step is one of these
            raise _cannot_load(spec, source, error) from error
    try:
        last = bridge.blocks[int(bridge.cfg.n_layers) - 1]
        found = {
            "mlp": names[id(last.mlp.original_component)],
            "mlp_out": names[id(last.mlp.out.original_component)],
            "norm": names[id(bridge.ln_final.original_component)],
        }
    except (AttributeError, KeyError, IndexError) as error:
        raise PremiseBroken(
            f"{spec.name}: refused, it has no last MLP with one output matrix before a final norm "
            f"({type(error).__name__}: {error})."
        ) from error
    return bridge, twin, found


# No pickles, no other frameworks' weights, no code.
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "tokenizer.model"]


def download(spec: ModelSpec) -> None:
    """Download the weights of a published model into the hub's cache; the token is the stored one.

    Raises:
        NotAvailable: no network, or no access to a gated model.
    """
    from huggingface_hub import HfApi, snapshot_download

    hub = HfApi()
    try:
        # Asked once first: the download would try for half a minute.
        hub.model_info(str(spec.hub_id), timeout=5)
        if spec.gated:
            hub.auth_check(str(spec.hub_id))
        snapshot_download(str(spec.hub_id), allow_patterns=DOWNLOADED)
    except Exception as error:  # offline, timed out, gated, gone: the next step is the same
        raise _cannot_load(spec, str(spec.hub_id), error) from error


def _fuse_gelu(model: Any) -> None:
    """Replace GPT-2's GELU, which is written out in seven operations, by the same one fused."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "NewGELUActivation":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, torch.nn.GELU(approximate="tanh"))


def _cannot_load(spec: ModelSpec, source: str, error: Exception) -> BadInput | NotAvailable:
    """Say what to do where the libraries' own errors do not."""
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if spec.folder is not None:
        return BadInput(
            f"{source}: TransformerLens cannot load it ({reason}). Allowed: decoder-only checkpoints "
            "of the GPT-2, GPT-NeoX, Phi, Mistral and Llama families and others that it knows."
        )
    gate = (
        " The model is gated: ask for access on its page, then set HF_TOKEN or log in."
        if spec.gated
        else ""
    )
    return NotAvailable(
        f"{spec.name}: weights of {source} are not in the cache and cannot be downloaded "
        f"({reason}).{gate} Or give a local folder with --model-path {spec.name}=DIR."
    )


def check_premise(model: LoadedModel, rtol: float = 2e-3) -> None:
    """Refuse a model for which ablating last-layer neurons is more than a change of its last residual.

    Method 12 needs: logits = norm(x) W_U + b_U with x the final residual, and a change of
    neuron i's activation by d moves x by exactly d W_out[i]. Both are measured on two tokens, so a
    post-norm, a soft cap, a second head, a scaled unembedding or a mixture of experts shows itself
    whatever the library calls it.

    Raises:
        PremiseBroken: with the part that fails.
    """
    name, cfg = model.spec.name, model.bridge.cfg
    if model.hook_post not in model.bridge.hook_dict:
        raise PremiseBroken(f"{name}: refused, it has no {model.hook_post} to ablate.")
    if cfg.d_mlp is None or tuple(model.W_out.shape) != (model.spec.d_mlp, model.spec.d_model):
        raise PremiseBroken(f"{name}: refused, its last MLP is not one d_mlp x d_model matrix.")
    seen: dict[str, Tensor] = {}
    neurons = torch.tensor([0, model.spec.d_mlp - 1], device=model.device)

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x.detach().clone()

    def push(a: Tensor, hook: Any) -> Tensor:
        a = a.clone()
        a[..., neurons] += push_by
        return a

    tokens = torch.tensor(
        [[model.bos, min(model.bos + 1, model.spec.d_vocab - 1)]], device=model.device
    )
    residual = "ln_final.hook_in"
    with torch.inference_mode():
        mask = torch.ones_like(tokens)
        with model.bridge.hooks(fwd_hooks=[(residual, keep)]):
            logits = model.bridge(tokens, attention_mask=mask, return_type="logits")[0].float()
        x = seen[residual][0].float()
        if not (torch.isfinite(logits).all() and torch.isfinite(x).all()):
            raise PremiseBroken(f"{name}: refused, its logits are not finite. Check its weights.")
        # As large as the residual itself, or a change of its size would drown in the margin.
        moves = model.W_out[neurons].float().sum(0)
        push_by = _span(x) / _span(moves)
        with model.bridge.hooks(fwd_hooks=[(model.hook_post, push), (residual, keep)]):
            model.bridge(tokens, attention_mask=mask, return_type="logits")
        moved = seen[residual][0].float() - x
        expected = push_by * moves
        ours = model.final_norm(x) @ model.W_U.float() + model.b_U
    slack = rtol if model.dtype == torch.float32 else 0.1
    if not torch.allclose(moved, expected.expand_as(moved), rtol=slack, atol=slack * _span(x) / 10):
        raise PremiseBroken(
            f"{name}: refused, a change of a last-layer activation does not move the final residual "
            "by its output weight (post-norm, experts, or a layer after it)."
        )
    if not torch.allclose(ours, logits, rtol=slack, atol=slack * _span(logits)):
        raise PremiseBroken(
            f"{name}: refused, its logits are not norm(residual) W_U + b_U (a soft cap, a scale, or "
            "another norm)."
        )


def _span(x: Tensor) -> float:
    return float(x.abs().max())
