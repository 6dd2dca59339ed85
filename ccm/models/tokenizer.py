"""A checkpoint's tokenizer, read from tokenizer.json as it is, and its BOS and EOS tokens.

transformers rebuilds a tokenizer by the class that a configuration names, and loses what that class
does not know (a pre-tokenizer that splits digits, say). Here tokenizer.json is taken as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ccm.errors import BadInput
from ccm.models.checkpoint_folder import GENERATION, TOKENIZERS, advice, read_object
from ccm.models.quiet import quiet

# What stands before every prompt: a token id, the tokenizer's own BOS, or nothing.
Bos = int | Literal["own", "none"]

# Texts that different pre-tokenizers, normalizers and added tokens treat differently.
PROBES = (
    "born in 2023",
    " The capital of São Tomé is  São Tomé.",
    "It's 1,944 km, isn't it?\n\nNAÏVE ﬁne 東京 👍",
    "x = [1, 2]\t# don't",
)


def parse_bos(text: str) -> Bos:
    """Parse `own`, `none` or a token id.

    >>> parse_bos("none"), parse_bos("50256")
    ('none', 50256)

    Raises:
        BadInput: none of these.
    """
    if text == "own":
        return "own"
    if text == "none":
        return "none"
    # Nine digits at most, so that no number is too long to be read.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise BadInput(f"--bos {text!r}: unknown. Allowed: own, none, or a token id.")
    return int(text)


def check_tokenizer_files(folder: Path, option: str = "") -> None:
    """Check that a folder holds a tokenizer, before any weight is read.

    Args:
        folder: The checkpoint folder.
        option: The option that named it, for the message.

    Raises:
        BadInput: it holds none; transformers would make an empty one.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise BadInput(
            f"{_called(folder, option)}: no tokenizer (none of {', '.join(TOKENIZERS)}). Save it there "
            "with tokenizer.save_pretrained."
        )


def _called(folder: Path, option: str) -> str:
    return f"{option} {folder}".strip()


def read_tokenizer(folder: Path, d_vocab: int, option: str = "") -> Any:
    """Read a checkpoint's tokenizer from tokenizer.json as it is, or else from its vocabulary files.

    Args:
        folder: The checkpoint folder.
        d_vocab: Number of tokens of the model.
        option: The option that named the folder, for messages.

    Returns:
        A tokenizer of transformers.

    Raises:
        BadInput: there is no tokenizer; or it cannot be read, needs code of its own, encodes
            differently than tokenizer.json alone, or has more tokens than the model.
    """
    what = _called(folder, option)
    check_tokenizer_files(folder, option)
    whole = folder / "tokenizer.json"
    if whole.is_file():
        read_object(whole)
    try:
        found = _read(folder, whole=whole.is_file())
    except Exception as error:  # the libraries may raise anything
        reason = " ".join(str(error).split())[:120]
        hint = advice(whole) if whole.is_file() else "Save it with tokenizer.save_pretrained."
        raise BadInput(
            f"{what}: its tokenizer cannot be read ({type(error).__name__}: {reason}). {hint}"
        ) from error
    backend = getattr(found, "backend_tokenizer", None)
    # Added tokens without a row in the model do no harm until a text holds one.
    vocab = found.get_vocab() if backend is None else backend.get_vocab(with_added_tokens=False)
    largest = max(vocab.values(), default=-1)
    if largest < 0:
        raise BadInput(f"{what}: its tokenizer has no tokens. {advice(whole)}")
    if largest >= d_vocab:
        raise BadInput(
            f"{what}: its tokenizer has tokens up to {largest}, but the model has {d_vocab}. Give the "
            "tokenizer that belongs to it."
        )
    if whole.is_file():
        _check_same(found, whole)
    return found


def _read(folder: Path, *, whole: bool) -> Any:
    """Read tokenizer.json and the special tokens of tokenizer_config.json, whose class is ignored.

    Without tokenizer.json there are vocabulary files, which only that class can read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if whole and not (folder / "tokenizer_config.json").is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    kind = PreTrainedTokenizerFast if whole else AutoTokenizer
    with quiet():
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _check_same(found: Any, whole: Path) -> None:
    """Check that what was read encodes as tokenizer.json itself does."""
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(whole))
    raw.no_truncation()
    raw.no_padding()
    for text in PROBES:
        ours = list(found.encode(text, add_special_tokens=False))
        its = list(raw.encode(text, add_special_tokens=False).ids)
        if ours != its:
            raise BadInput(
                f"{whole.parent}: {text!r} is {its[:8]} by tokenizer.json and {ours[:8]} with the "
                "files beside it. Save the tokenizer that is meant with tokenizer.save_pretrained."
            )


@dataclass(frozen=True)
class SpecialTokens:
    """The token before every prompt and the tokens that end an answer, and where each was found."""

    bos: int | None
    bos_from: str
    eos: Mapping[int, tuple[str, ...]]  # id: the places that name it
    notes: tuple[str, ...] = ()  # where the places disagree, for people

    def as_dict(self) -> dict[str, Any]:
        """Return the entries of a run's manifest."""
        return {
            "bos": {"id": self.bos, "from": self.bos_from},
            "eos": [{"id": id_, "from": list(places)} for id_, places in self.eos.items()],
            "notes": list(self.notes),
        }


def special_tokens(
    name: str, tokenizer: Any, config: Any, generation: Any, d_vocab: int, bos: Bos = "own"
) -> SpecialTokens:
    """Find a model's BOS and EOS tokens, and say where its files disagree.

    Decoding stops at any EOS that the tokenizer, config.json or generation_config.json names. BOS is
    the tokenizer's, whether the tokenizer adds it by itself or not. Without one, prompts have none.

    Args:
        name: Of the model, for messages.
        tokenizer: Its tokenizer.
        config: Its configuration.
        generation: Its generation config, or None.
        d_vocab: Its number of tokens.
        bos: What to take as BOS.

    Raises:
        BadInput: an id is not a token of the model.
    """
    first, bos_from, notes = _bos(name, tokenizer, config, bos)
    named = {
        "tokenizer": _ids(tokenizer.eos_token_id),
        "config.json": _ids(getattr(config, "eos_token_id", None)),
        GENERATION: _ids(getattr(generation, "eos_token_id", None)),
    }
    every = sorted(set().union(*named.values()))
    places = {i: tuple(place for place, ids in named.items() if i in ids) for i in every}
    said = [ids for ids in named.values() if ids]
    if any(ids != said[0] for ids in said):
        listed = ", ".join(f"{i} ({' and '.join(where)})" for i, where in places.items())
        notes.append(f"{name}: its files disagree on EOS; any of these ends an answer: {listed}")
    found = [("EOS", i, " and ".join(where)) for i, where in places.items()]
    for kind, id_, where in [("BOS", first, bos_from), *found]:
        if id_ is not None and not 0 <= id_ < d_vocab:
            way_out = "Give another with --bos." if where == "--bos" else "Correct it there."
            raise BadInput(
                f"{name}: {kind} is token {id_} ({where}), but the model has {d_vocab}. {way_out}"
            )
    return SpecialTokens(bos=first, bos_from=bos_from, eos=places, notes=tuple(notes))


def _bos(name: str, tokenizer: Any, config: Any, bos: Bos) -> tuple[int | None, str, list[str]]:
    """Return the BOS token, where it was found, and notes for people."""
    if bos != "own":
        return (None if bos == "none" else bos), "--bos", []
    first, other = tokenizer.bos_token_id, getattr(config, "bos_token_id", None)
    use_it = f"config.json names {other} (--bos {other} takes it)"
    if first is None:
        note = f"{name}: its tokenizer has no BOS token, so prompts begin without one"
        return None, "the tokenizer has none", [note + (f"; {use_it}" if other is not None else "")]
    notes = [f"{name}: BOS is {first}, the tokenizer's; {use_it}"] if other not in (None, first) else []
    return int(first), "tokenizer", notes


def _ids(found: int | list[int] | None) -> frozenset[int]:
    """Turn one id, several or none into a set."""
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
