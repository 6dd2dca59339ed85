"""Loading a checkpoint into a `LoadedModel`.

`load` boots a TransformerLens bridge without weight processing: logits are then the checkpoint's own,
and the folded and centred matrices of Method 5 follow by formula (`ccm.method.neurons`).
"""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ccm.errors import AssumptionBroken, BadInput, reason_of
from ccm.models.assumptions import broken_assumption, check_parts
from ccm.models.checkpoint_folder import CONFIG, read_object
from ccm.models.devices import device_for, dtype_for
from ccm.models.download import cannot_load, download
from ccm.models.memory import check_memory, out_of_memory, weight_bytes
from ccm.models.model import LoadedModel
from ccm.models.quiet import quiet
from ccm.models.specs import ModelSpec
from ccm.models.tokenizer import Bos, read_tokenizer, special_tokens
from ccm.models.trial import check_hooks, plain_log_probs, trial_prompts
from ccm.models.weights import (
    check_weights,
    folder_of,
    n_parameters,
    unfinished,
    unused_parameters,
    weight_files,
)

_log = logging.getLogger(__name__)


def load(
    spec: ModelSpec,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    bos: Bos = "own",
) -> LoadedModel:
    """Load a model's weights and tokenizer, and check that hooks compute what transformers does.

    Args:
        spec: A row of `MODELS`, or `spec_for(folder)`.
        device: Where to run.
        dtype: Of weights and activations; norms, logits and softmax are float32 anyway.
        bos: What stands before every prompt; by default the tokenizer's own BOS token.

    Raises:
        NotAvailable: the weights are not here and cannot be downloaded (gated, offline), or do not fit
            the device.
        BadInput: weights or a tokenizer that are damaged or another model's, or a folder that
            TransformerLens cannot load.
        AssumptionBroken: the model has no last MLP to ablate, or the hooks compute another model.
    """
    device = device_for(device) if isinstance(device, str) else device
    dtype = dtype_for(dtype) if isinstance(dtype, str) else dtype
    check_precision(device, dtype)
    if unfinished(spec):
        download(spec)
    spec = check_weights(spec)
    # For a hub model, the cached snapshot, so that nothing asks the network.
    source = str(folder_of(spec))
    # First, because weights take minutes to read.
    tokenizer = read_tokenizer(Path(source), spec.d_vocab)
    needed = weight_bytes(spec, n_parameters(weight_files(spec)), dtype)
    for place in dict.fromkeys(
        (torch.device("cpu"), device)
    ):  # weights are read into the CPU's memory, and moved from there
        check_memory(spec.name, needed, place, dtype)
    loaded = _read_weights(spec, source, device, dtype)
    model = assemble(spec, loaded, tokenizer, device, dtype, source=source, bos=bos)
    if model.spec.d_mlp != spec.d_mlp:
        # Neuron sets were checked against the spec's.
        raise AssumptionBroken(
            f"{spec.name}: refused, its last MLP has {model.spec.d_mlp} neurons, and by its "
            f"config.json {spec.d_mlp}. Give the config.json that belongs to the weights."
        )
    for note in model.special_tokens["notes"]:
        _log.warning(note)
    if read_object(Path(source) / CONFIG).get("auto_map"):
        _log.warning(
            f"{spec.name}: its config.json names code of its own (auto_map), which was not run; "
            f"transformers' own {type(loaded).__name__} was."
        )
    return model


def check_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Check that float32 products on a GPU are not in TF32, which keeps ten bits of 23.

    The tolerance of the shared decode's certificate rests on float32 products, and so does the promise
    that no result depends on the batch.

    Raises:
        BadInput: TF32 is switched on.
    """
    override = os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0")
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by torch's newer interface, which the older one cannot read
        precision = "set by fp32_precision"
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
    bos: Bos = "own",
) -> LoadedModel:
    """Make a `LoadedModel` of a transformers model and its tokenizer, without copying a weight.

    Args:
        spec: Names of the model; its dimensions are read off the model itself.
        loaded: A causal language model of transformers on its device, in its dtype; it is changed.
        tokenizer: Its fast tokenizer; the bridge gets a copy, because it changes what it is given.
        device: Where the weights are.
        dtype: Their dtype.
        source: Where they came from, for messages; nothing is read from there.
        bos: As for `load`.

    Raises:
        BadInput, NotAvailable: TransformerLens does not know the architecture, or a special token is
            none of the model's.
        AssumptionBroken: the model has no last MLP to ablate, or the hooks compute another model.
    """
    prompts, truth = _truth(spec, loaded, tokenizer, device, dtype)
    bridge, twin, names = _boot(spec, loaded, tokenizer, source, device, dtype)
    original = bridge.original_model
    special = special_tokens(
        spec.name,
        tokenizer,
        original.config,
        getattr(original, "generation_config", None),
        int(bridge.cfg.d_vocab),
        bos,
    )
    model = LoadedModel(
        spec=replace(
            spec,
            n_layers=int(bridge.cfg.n_layers),
            d_model=int(bridge.cfg.d_model),
            d_mlp=_inputs(twin.get_submodule(names["mlp_out"])),  # not every configuration has it
            d_vocab=int(bridge.cfg.d_vocab),
        ),
        bridge=bridge.requires_grad_(False),  # again, because it made parameters of its own
        body=twin.base_model,
        mlp=twin.get_submodule(names["mlp"]),
        mlp_out=twin.get_submodule(names["mlp_out"]),
        norm=twin.get_submodule(names["norm"]),
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        source=source,
        n_ctx=int(bridge.cfg.n_ctx),
        bos=special.bos,
        eos=frozenset(special.eos),
        special_tokens=special.as_dict(),
    )
    check_parts(model)
    model.trial = check_hooks(model, twin, prompts, truth)
    model.broken_assumption = broken_assumption(model)
    return model


def _inputs(linear: Any) -> int:
    """Return a linear map's input size; transformers' Conv1D (GPT-2) stores [in, out]."""
    return int(linear.weight.shape[0 if type(linear).__name__ == "Conv1D" else 1])


def _truth(
    spec: ModelSpec, loaded: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[tuple[int, ...], ...], torch.Tensor]:
    """Draw the prompts of the trial, and run them before anything is wrapped around the model."""
    d_vocab = int(loaded.get_input_embeddings().weight.shape[0])
    prompts = trial_prompts(tokenizer, loaded.config, d_vocab)
    try:
        return prompts, plain_log_probs(loaded.eval(), prompts, device)
    except Exception as error:  # the library may raise anything
        if out_of_memory(error):
            raise
        raise AssumptionBroken(
            f"{spec.name}: refused, transformers itself cannot run it in {str(dtype)[6:]} "
            f"({reason_of(error)})."
        ) from error


def _read_weights(spec: ModelSpec, source: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Read all of a checkpoint's weights into a transformers model on the device."""
    from transformers import AutoModelForCausalLM

    with quiet():
        try:
            loaded, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            if report["missing_keys"]:
                raise ValueError(f"no weights for {sorted(report['missing_keys'])[0]}")
            unused = unused_parameters(weight_files(spec), sorted(report["unexpected_keys"]))
            if unused:
                raise BadInput(
                    f"{source}: config.json has no place for {len(unused)} of the weights ({unused[0]} "
                    "first), so this would be another model. Give the config.json that belongs to them."
                )
            return loaded.to(device)
        except BadInput:
            raise
        except Exception as error:  # whatever the library raises, the next step is one of these
            if out_of_memory(error):
                raise
            raise cannot_load(spec, source, error) from error


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
        The bridge, the twin, and the twin's names of the last MLP, its down-projection and the final
        norm.
    """
    import copy

    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        try:
            loaded = loaded.eval().requires_grad_(False)
            # The bridge wraps the modules it is given, so the twin is copied first: new modules
            # around the same tensors.
            shared = {id(t): t for t in [*loaded.parameters(), *loaded.buffers()]}
            twin = copy.deepcopy(loaded, shared)
            _fuse_gelu(twin)
            names = {id(module): name for name, module in loaded.named_modules()}
            # The bridge looks the architecture up by this; a configuration may name another, or none.
            loaded.config.architectures = [type(loaded).__name__]
            own = copy.deepcopy(tokenizer)
            # Otherwise the bridge would read the tokenizer again, and ask whether to trust its code.
            own.init_kwargs["add_bos_token"] = True
            bridge = TransformerBridge.boot_transformers(
                source,
                hf_model=loaded,
                tokenizer=own,
                device=str(device),
                dtype=dtype,
                trust_remote_code=False,
            )
        except Exception as error:  # whatever the libraries raise, the next step is one of these
            if out_of_memory(error):
                raise
            raise cannot_load(spec, source, error) from error
    try:
        last = bridge.blocks[int(bridge.cfg.n_layers) - 1]
        found = {
            "mlp": names[id(last.mlp.original_component)],
            "mlp_out": names[id(last.mlp.out.original_component)],
            "norm": names[id(bridge.ln_final.original_component)],
        }
    except (AttributeError, KeyError, IndexError) as error:
        raise AssumptionBroken(
            f"{spec.name}: refused, it has no last MLP with one output matrix before a final norm "
            f"({type(error).__name__}: {error})."
        ) from error
    return bridge, twin, found


def _fuse_gelu(model: Any) -> None:
    """Replace GPT-2's GELU, written out in seven operations, by the same function in one."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "NewGELUActivation":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, torch.nn.GELU(approximate="tanh"))
