"""Where a model's weights are, whether they are whole and the right ones, and which ones they are.

Nothing here reads a tensor or touches the network; all of it is done before any long work.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ccm.errors import BadInput
from ccm.models import MODELS, ModelSpec, spec_of_folder

OTHER_DIMENSIONS_VARIABLE = "CCM_ALLOW_OTHER_DIMENSIONS"
INDEX = "model.safetensors.index.json"
DIMENSIONS = ("architecture", "n_layers", "d_model", "d_mlp", "d_vocab")


def weight_files(spec: ModelSpec) -> list[Path]:
    """List the safetensors files of a model on this machine, without touching the network."""
    if spec.folder is not None:
        return _files(spec.folder)
    from huggingface_hub import try_to_load_from_cache

    for name in (INDEX, "model.safetensors"):
        found = try_to_load_from_cache(str(spec.hub_id), name)
        if isinstance(found, str):
            return _files(Path(found).parent)
    return []


def _files(folder: Path) -> list[Path]:
    """Files that the index names, there or not; without one, all there are."""
    if (folder / INDEX).is_file():
        try:
            named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadInput(
                f"{folder / INDEX}: not an index of weights ({error}). Download it again."
            ) from error
        return sorted({folder / str(name) for name in named})
    return sorted(folder.glob("*.safetensors"))


def check_weights(spec: ModelSpec) -> ModelSpec:
    """Check the weights that are here: every file whole, and of the architecture the name promises.

    Returns:
        The spec; that of the folder itself, where other dimensions are allowed for trying things out.

    Raises:
        BadInput: a file that is missing, cut off or no safetensors; another model's weights.
    """
    files = weight_files(spec)
    for path in files:
        _check_whole(path)
    return _check_architecture(spec, files[0].parent) if files else spec


def n_parameters(files: Sequence[Path]) -> int:
    """Count the parameters in safetensors files by their headers; tied ones are stored once.

    Older files hold masks, too, which are not counted: of no floating-point numbers, or 1 x 1 x n x n.

    Raises:
        BadInput: see `check_weights`.
    """
    tensors = [t for path in files for t in _check_whole(path).values()]
    numbers = [t["shape"] for t in tensors if str(t["dtype"]).startswith(("F", "BF"))]
    return sum(prod(shape) for shape in numbers if len(shape) < 4)


def _check_whole(path: Path) -> Mapping[str, Any]:
    """Hold a file's size to what its own header says, and return the header's tensors."""
    if not path.is_file():
        raise BadInput(f"{path}: missing, though the index names it. Download the model again.")
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
                f"{path}: no safetensors file, or its header is cut off. Download it again."
            ) from error
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise BadInput(f"{path}: cut off or damaged, {size} of {wanted} bytes. Download it again.")
    return tensors


def _check_architecture(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Hold a named model's config to the table."""
    if spec.name not in MODELS or not (folder / "config.json").is_file():
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
    """Commit of the weights where the hub's cache says it, else None."""
    files = weight_files(spec)
    if spec.folder is not None or not files or files[0].parent.parent.name != "snapshots":
        return None
    return files[0].parent.name


def weight_hash(files: Sequence[Path]) -> str:
    """SHA-256 over the weight files in name order."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        with path.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
