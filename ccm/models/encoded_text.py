"""The encoding of a text before it is run: its tokens, BOS in front, and where an answer begins."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from ccm.errors import reason_of
from ccm.models.checkpoint_folder import CONFIG, GENERATION, read_object
from ccm.models.specs import ModelSpec
from ccm.models.tokenizer import Bos, SpecialTokens, read_tokenizer, special_tokens


@dataclass(frozen=True)
class EncodedText:
    """A text as it is given to a model."""

    special: SpecialTokens
    ids: tuple[int, ...]  # BOS included
    pieces: tuple[str, ...]  # of the ids, as the vocabulary writes them
    texts: tuple[str, ...]  # of the ids, decoded
    answer: tuple[tuple[int, str], ...]  # the answer's tokens, with their texts
    merged: int  # how many last tokens of the text an answer would change
    plain: tuple[int, ...] | str  # ids by transformers' own tokenizer, or why it fails


def encode_text(
    spec: ModelSpec, folder: Path, text: str, answer: str = "", bos: Bos = "own"
) -> EncodedText:
    """Encode a text as a run does; no weight is read.

    Args:
        spec: The model.
        folder: Its checkpoint folder.
        text: The text.
        answer: What may follow the text; a space is put between them unless the text ends in one.
        bos: As for `ccm.models.load.load`.

    Raises:
        BadInput: there is no tokenizer, or it has more tokens than the model.
    """
    tokenizer = read_tokenizer(folder, spec.d_vocab)
    config, generation = (
        SimpleNamespace(**read_object(folder / name)) if (folder / name).is_file() else None
        for name in (CONFIG, GENERATION)
    )
    special = special_tokens(spec.name, tokenizer, config, generation, spec.d_vocab, bos)
    own = tokenizer.encode(text, add_special_tokens=False)
    space = "" if text[-1:].isspace() else " "
    both = tokenizer.encode(f"{text}{space}{answer.strip()}", add_special_tokens=False)
    alike = next((i for i, (a, b) in enumerate(zip(own, both, strict=False)) if a != b), len(own))
    ids = own if special.bos is None else [special.bos, *own]
    return EncodedText(
        special=special,
        ids=tuple(ids),
        pieces=tuple(map(str, tokenizer.convert_ids_to_tokens(ids))),
        texts=tuple(tokenizer.decode([i]) for i in ids),
        answer=tuple((i, tokenizer.decode([i])) for i in both[alike:]) if answer.strip() else (),
        merged=len(own) - alike if answer.strip() else 0,
        plain=_by_transformers(folder, text),
    )


def _by_transformers(folder: Path, text: str) -> tuple[int, ...] | str:
    """Encode as transformers does by default, including special tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        return tuple(tokenizer(text)["input_ids"])
    except Exception as error:  # the library may raise anything
        return reason_of(error)
