"""GGUF files: what one holds, and the checkpoint folder that is made of it, once.

transformers reads the file and dequantizes every tensor to float32; what it would silently leave out
(tensors without a place, scaled rotary embeddings) is refused. The folder is an ordinary checkpoint
folder, so that no later step needs to know of GGUF.
"""

import json
import logging
import re
import tempfile
from collections import defaultdict
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from ccm.errors import BadInput, a_few, reason_of
from ccm.models.cache import made_once, models_cache
from ccm.models.checkpoint_folder import advice, hash_of, read_object
from ccm.models.quiet import quiet

CONVERTED = "converted.json"  # in the folder: what it was made of, and how
MAGIC = b"GGUF"
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    architecture: str
    types: dict[str, str]  # quantization types, joined by commas, by kind of tensor (`attn_q`, say)
    n_parameters: int
    tokenizer: str  # llama.cpp's name of how its tokenizer splits text into words


def checkpoint_of(path: Path, *, anew: bool = False) -> Path:
    """Return the checkpoint folder of a GGUF file, which is made in the model cache if missing.

    Args:
        path: The file.
        anew: Make it again, because the existing one is damaged.

    Raises:
        BadInput: no GGUF file, a damaged one, a part of one, or one that cannot be read without loss.
        NotAvailable: the cache cannot be written to.
    """
    _check_start(path)
    digest = hash_of([path])
    folder = converted_folder(digest)
    if folder.is_dir() and not anew:
        return folder
    header = read_header(path)
    return made_once(
        folder.name,
        lambda partial: convert(path, header, digest, partial),
        needed=4 * header.n_parameters + (32 << 20),
        anew=anew,
    )


def converted_folder(digest: str) -> Path:
    """Return the path of a GGUF file's checkpoint, made or not, from the file's SHA-256."""
    return models_cache() / f"gguf-{digest[:16]}"


def conversion(folder: Path) -> dict[str, Any] | None:
    """Return what a checkpoint folder was converted from, for manifests; None if it was not."""
    path = folder / CONVERTED
    return read_object(path) if path.is_file() else None


def _check_start(path: Path) -> None:
    """Check that a file is a GGUF file, and not one of several parts.

    Raises:
        BadInput: it is not, or is one of several parts.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}). Give a GGUF file.") from error
    if start != MAGIC:
        raise BadInput(
            f"{path}: no GGUF file (it begins with {start!r}, not {MAGIC!r}). {advice(path)}"
        )
    if part := PART.search(path.name):
        _, parts = part.groups()
        stem = path.name[: part.start()]
        names = [f"{stem}-{i:05d}-of-{parts}.gguf" for i in range(1, int(parts) + 1)]
        missing = [name for name in names if not (path.parent / name).is_file()]
        lacking = f"; {a_few(missing)} not there" if missing else ""
        raise BadInput(
            f"{path}: one of {int(parts)} parts of a split GGUF{lacking}. Join all of them first with "
            "llama.cpp's `llama-gguf-split --merge` and give the one file that it writes."
        )


def read_header(path: Path) -> GgufHeader:
    """Read what a GGUF file holds, except the weights themselves.

    Raises:
        BadInput: cut off, damaged, of an architecture that transformers does not read, with fewer
            tokens than its tokenizer, or with scaled rotary embeddings, which would be left out.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
    except Exception as error:  # the library may raise anything
        raise BadInput(
            f"{path}: cut off or damaged ({reason_of(error)}). Download it again."
        ) from error
    known = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
    if architecture not in known:
        raise BadInput(
            f"{path}: architecture {architecture!r}, which transformers does not read from GGUF. "
            f"Allowed: {', '.join(known)}; any other as a folder that save_pretrained wrote."
        )
    _check_vocabulary(path, reader)
    _check_rotary(path, reader, architecture)
    types = defaultdict[str, set[str]](set)
    for tensor in reader.tensors:
        kind = re.sub(r"^blk\.\d+\.|\.(weight|bias)$", "", tensor.name)
        types[kind].add(tensor.tensor_type.name)
    return GgufHeader(
        architecture=architecture,
        types={kind: ", ".join(sorted(names)) for kind, names in types.items()},
        n_parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        tokenizer=str(_field(reader, "tokenizer.ggml.pre") or _field(reader, "tokenizer.ggml.model")),
    )


def _field(reader: Any, name: str) -> Any:
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def _check_vocabulary(path: Path, reader: Any) -> None:
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    rows = [int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"]
    if tokens is None or not rows:
        what = "tokenizer" if tokens is None else "token embedding"
        raise BadInput(f"{path}: no {what} in it. Give a file of a whole model.")
    if len(tokens.data) > rows[0]:
        raise BadInput(
            f"{path}: its tokenizer has {len(tokens.data)} tokens, but the model {rows[0]}. Give the "
            "file as it was published."
        )


def _check_rotary(path: Path, reader: Any, architecture: str) -> None:
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    factors = [t.name for t in reader.tensors if t.name.startswith("rope_")]
    if factors or scaling not in (None, "none"):
        raise BadInput(
            f"{path}: scaled rotary embeddings ({factors[0] if factors else scaling}), which "
            "transformers leaves out when it reads GGUF: all results would differ. Give the "
            "original checkpoint folder."
        )


def _check_all_have_a_place(path: Path, header: GgufHeader, config: Any) -> None:
    """Check that transformers' model has as many parameters as the file: it would drop the others."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    places = sum(p.numel() for p in built.parameters())  # tied ones are counted once
    if places != header.n_parameters:
        raise BadInput(
            f"{path}: transformers makes a model of {places:,} numbers of it, but it holds "
            f"{header.n_parameters:,}, so this would be another model. Give the original "
            "checkpoint folder."
        )


@quiet()
def convert(path: Path, header: GgufHeader, digest: str, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a checkpoint folder.

    Args:
        path: The file.
        header: Its header.
        digest: Its SHA-256.
        folder: An empty folder.

    Raises:
        BadInput: transformers cannot read it, or not all of it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # Alone in a folder, because transformers would also read what lies beside it.
    with tempfile.TemporaryDirectory(prefix="ccm-gguf-") as alone:
        (Path(alone) / "model.gguf").symlink_to(path.resolve())
        options: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
        try:
            # First without the weights, which take long to read.
            _check_all_have_a_place(
                path, header, AutoConfig.from_pretrained(alone, trust_remote_code=False, **options)
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, trust_remote_code=False, **options)
            types = ", ".join(sorted(set(", ".join(header.types.values()).split(", "))))
            _log.warning(f"{path.name}: dequantizing {types} to float32, once, into the model cache")
            with redirect_stderr(StringIO()):  # a progress bar that nothing else switches off
                model, report = AutoModelForCausalLM.from_pretrained(
                    alone,
                    dtype=torch.float32,
                    output_loading_info=True,
                    trust_remote_code=False,
                    **options,
                )
            if report["missing_keys"]:
                raise ValueError(f"no weights for {sorted(report['missing_keys'])[0]}")
        except BadInput:
            raise
        except Exception as error:  # the library may raise anything
            raise BadInput(
                f"{path}: transformers cannot read it (architecture {header.architecture!r}; "
                f"{reason_of(error)}). Give the original checkpoint folder."
            ) from error
    # A model whose configuration says that it is quantized cannot be saved; this one no longer is.
    config = model.config
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    config._name_or_path = ""  # the temporary folder
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = {
        "from": path.name,
        "gguf_sha256": digest,
        **asdict(header),
        "dtype": "float32",
        "versions": {name: version(name) for name in ("transformers", "gguf")},
    }
    (folder / CONVERTED).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
