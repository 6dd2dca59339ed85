"""Checks and hashes of a checkpoint folder's files, without reading a tensor or loading a library.

The files that transformers would load are checked and hashed: `model.safetensors` if there is one, else
the shards that the index names. Files that it would load only with other packages installed, or with a
person's consent (adapters, code), are refused or left out.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ccm.errors import BadInput

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
GENERATION = "generation_config.json"
# Any one of these holds a whole tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# All files that transformers reads for a tokenizer.
TOKENIZER_FILES = (
    *(*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("merges.txt", "chat_template.jinja"),
)
LFS = b"version https://git-lfs.github.com/spec/"


def weight_files_of(folder: Path) -> list[Path]:
    """List the weight files that transformers loads from a folder, whether they exist or not."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    try:
        named = read_object(folder / INDEX)["weight_map"].values()
        return sorted({folder / str(name) for name in named})
    except (KeyError, AttributeError) as error:
        raise BadInput(
            f"{folder / INDEX}: not an index of weights ({error}). Download it again."
        ) from error


def check_folder(folder: Path) -> Path:
    """Check that a folder is a checkpoint of one whole model, with weights in safetensors.

    Returns:
        The folder.

    Raises:
        BadInput: no configuration, no weights in safetensors, an adapter, or a file that is not JSON.
    """
    if not (folder / CONFIG).is_file():
        raise BadInput(f"{folder}: not a checkpoint folder (no {CONFIG}). {_no_config(folder)}")
    if (folder / ADAPTER).is_file():
        raise BadInput(
            f"{folder}: a model with a PEFT adapter beside it ({ADAPTER}), which would be added on top "
            "or not, depending on whether peft is installed. If its weights are merged already, remove "
            f"{ADAPTER} and the adapter_model file; if not, merge it (merge_and_unload) and save."
        )
    for name in (GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_object(folder / name)
    if not weight_files_of(folder):
        raise BadInput(f"{folder}: {_no_weights(folder)}")
    return folder


def _no_config(folder: Path) -> str:
    """Say what to do with a folder that has no configuration."""
    if (folder / ADAPTER).is_file():
        return (
            "It is a PEFT adapter: merge it into its base model (merge_and_unload) and give the folder "
            "that save_pretrained writes then."
        )
    if inside := _files(folder, f"*/{CONFIG}", f"snapshots/*/{CONFIG}"):
        some = ", ".join(str(folder / Path(path).parent) for path in inside[:3])
        return f"Give one within it: {some}{', ...' if inside[3:] else ''}."
    if _files(folder, "*.safetensors"):
        return f"It has weights: fetch the {CONFIG} that belongs to them."
    if gguf := _files(folder, "*.gguf"):
        return f"Give the file itself: --model {folder / gguf[0]}."
    return "Give the folder that save_pretrained wrote."


def _files(folder: Path, *patterns: str) -> list[str]:
    """List the files below a folder that any of the patterns fits, by their paths from there."""
    found = (path for pattern in patterns for path in folder.glob(pattern))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _no_weights(folder: Path) -> str:
    """Say what the folder holds instead of weights in safetensors, and what to do with it."""
    if other := _files(folder, "*.safetensors"):
        return (
            f"no {WEIGHTS} and no {INDEX}, only {other[0]}. Call it {WEIGHTS} if it holds the whole "
            "model, or fetch the index that belongs to its shards."
        )
    if gguf := _files(folder, "*.gguf"):
        file = gguf[0]
        return f"no *.safetensors weights, only {file}. Give the file itself: --model {folder / file}."
    if pickled := _files(folder, "*.bin", "*.pt", "*.pth", "*.ckpt"):
        return (
            f"no *.safetensors weights, only {pickled[0]}. Pickled weights are never loaded; convert "
            "them with save_pretrained(..., safe_serialization=True)."
        )
    return f"no *.safetensors weights. Fetch {WEIGHTS}, or {INDEX} with all its shards."


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a checkpoint.

    Raises:
        BadInput: not a JSON object. The message says so if the file is empty or a git-lfs pointer.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not an object")
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error}). {advice(path)}") from error
    return found


def advice(path: Path) -> str:
    """Say what to do about a file that is not what its name says."""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(LFS))
    except OSError:
        start = b"?"
    if start == LFS:
        return "It is a pointer of git-lfs, not the file itself: run `git lfs pull` in its repository."
    return "It is empty: download it again." if not start else "Download it again."


def hash_of(paths: Iterable[Path]) -> str:
    """Compute one SHA-256 over files in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        with path.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def hashes(folder: Path) -> dict[str, str | None]:
    """Compute the SHA-256 of everything that is read from a checkpoint folder.

    Returns:
        Hashes of the weights, config.json, the tokenizer's files (with their names) and the generation
        config, by their keys in a run's identity; None if there is no generation config.
    """
    tokenizer = hashlib.sha256()
    for name in sorted(TOKENIZER_FILES):
        if (folder / name).is_file():
            tokenizer.update(f"{name} {hash_of([folder / name])}\n".encode())
    return {
        "weights_sha256": hash_of(weight_files_of(folder)),
        "config_sha256": hash_of([folder / CONFIG]),
        "tokenizer_sha256": tokenizer.hexdigest(),
        "generation_config_sha256": (
            hash_of([folder / GENERATION]) if (folder / GENERATION).is_file() else None
        ),
    }
