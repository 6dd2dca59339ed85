"""`ccm tokens` shows what a run is given: the same ids, and how transformers differs."""

import json
import shutil
from pathlib import Path

import pytest

from ccm.cli.parser import main
from ccm.models.encoded_text import encode_text
from ccm.models.load import load
from ccm.models.specs import MODELS, spec_for
from ccm.models.tokenizer import Bos
from tests.toys import FAMILIES, ToyConfig, toy_folder

TEXT = "Paris lies in the capital of Italy 1944 São"


def copied(tmp_path: Path) -> Path:
    """The organism's folder, to change."""
    source = MODELS["organism"].folder
    assert source is not None
    return Path(shutil.copytree(source, tmp_path / "m"))


@pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
def test_ids_are_those_that_the_model_is_given(config: ToyConfig) -> None:
    folder = toy_folder(config)
    spec, model = spec_for(str(folder)), load(spec_for(str(folder)))
    encoded = encode_text(spec, folder, TEXT, "Rome")
    assert list(encoded.ids) == model.encode(TEXT)
    assert encoded.special.bos == model.bos
    assert set(encoded.special.eos) == model.eos
    assert encoded.answer[0][0] == model.first_token("Rome")
    assert "".join(encoded.texts[1:]).replace(" ", "").startswith("Paris")
    assert len(encoded.ids) == len(encoded.pieces) == len(encoded.texts)


@pytest.mark.parametrize(("bos", "first"), [("own", 0), ("none", None), (7, 7)])
def test_what_stands_in_front_is_shown(
    bos: Bos, first: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    own = MODELS["organism"]
    assert own.folder is not None
    encoded = encode_text(own, own.folder, "Ada was born in", bos=bos)
    assert encoded.special.bos == first
    assert main(["tokens", "--model", "organism", "--bos", str(bos), "Ada was born in"]) == 0
    shown = capsys.readouterr().out
    assert ("BOS (" in shown) == (first is not None)
    rows = [line.split() for line in shown.splitlines() if line.strip()[:1].isdigit()]
    ids = [int(row[1]) for row in rows[:-1]]
    assert ids == list(encoded.ids)
    assert rows[-1] == [str(len(ids)), "an", "answer", "begins", "here"]
    assert [int(row[0]) for row in rows] == list(range(len(ids) + 1))


def test_an_answer_that_changes_the_text_before_it_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ask = ["tokens", "--model", "organism", "--answer", "Vell"]
    assert main([*ask, "Ada was born in"]) == 0
    clean = capsys.readouterr().out
    assert "answer: 353 ' V', 295 'el', 76 'l'; where first tokens are compared, 353" in clean
    assert "would change" not in clean
    assert main([*ask, "Ada was born in "]) == 0
    assert "the last 1 tokens of the text would change before that answer" in capsys.readouterr().out


def test_transformers_own_tokenizer_stands_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tmp_path)
    ask = ["tokens", "--model", str(folder), "Ada was born in"]
    assert main(ask) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "transformers' own tokenizer gives the same, without BOS"
    )
    assert main([*ask, "--bos", "none"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "transformers' own tokenizer gives the same"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "NoSuchTokenizer"})
    )
    assert main(ask) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("transformers' own tokenizer ")


def test_a_folder_without_a_tokenizer_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    assert main(["tokens", "--model", str(folder), "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no tokenizer" in line
