"""Fact tables that are read, tables that are refused, and the released files where they are here."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ccm import facts
from ccm.errors import BadInput, CcmError, NotAvailable
from ccm.facts import (
    CHECKSUMS,
    DATA_VARIABLE,
    EXAMPLE_COLUMNS,
    FACT_COLUMNS,
    RELATION_COLUMNS,
    Fact,
    Relation,
    fact_set,
    load_pararel,
    pararel_folder,
    read_fact_folder,
    read_facts,
    read_relations,
)

HEADER = ",".join(FACT_COLUMNS)
RELATION_HEADER = ",".join(RELATION_COLUMNS)
GOOD = f"{HEADER}\nParis,is the capital of,France,capital_of\n"
RELATIONS = f"{RELATION_HEADER}\ncapital_of,geo,the country\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: str | bytes, name: str = "facts.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# --- facts --------------------------------------------------------------------------------------------


def test_facts_are_read_by_column_name(write: Any) -> None:
    columns = "extra,rel_lemma,statement_object,statement_relation,statement_subject"
    path = write(f"{columns}\nx,capital_of, France ,is the capital of,Paris\ny,r,O,w,S\n")
    assert read_facts(path) == (
        Fact("Paris", "capital_of", "is the capital of", "France"),
        Fact("S", "r", "w", "O"),
    )
    assert read_facts(path)[0].query == "Paris is the capital of"


def test_none_and_na_are_names(write: Any) -> None:
    path = write(f"{HEADER}\nNone,NA,nan,null\n1944,007,1e3,TRUE\n")
    assert read_facts(path) == (
        Fact("None", "null", "NA", "nan"),
        Fact("1944", "TRUE", "007", "1e3"),
    )


def test_a_byte_order_mark_and_other_scripts(write: Any) -> None:
    path = write(b"\xef\xbb\xbf" + f"{HEADER}\nŁódź,lies in,日本,r\n".encode())
    assert read_facts(path) == (Fact("Łódź", "r", "lies in", "日本"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.replace("rel_lemma", "lemma"), "missing column 'rel_lemma' (found: statement_subject, "),
        (GOOD.replace("France", "  "), "empty cell in column 'statement_object', row 2."),
        (GOOD + "Rome,is the capital of,Italy\n", "empty cell in column 'rel_lemma', row 3."),
        (GOOD + GOOD.splitlines()[1], "row 3 is a duplicate (statement_subject='Paris', "),
        (GOOD + GOOD.splitlines()[1].replace("Paris", " Paris"), "row 3 is a duplicate"),
        (f"{HEADER}\n", "no rows. Give at least one."),
        ("", "cannot be read as a table (No columns"),
        (f'{HEADER}\n"Paris,a,b,c\n', "cannot be read as a table (Error tokenizing"),
        (GOOD + "a,b,c,d,e\n", "cannot be read as a table (Error tokenizing"),
        (f"{HEADER}\nS\xe3o,a,b,c\n".encode("latin-1"), "not UTF-8."),
        (f"{HEADER}\nParis,is the capital of,France,capital_of,extra\n", "rows are longer"),
    ],
    ids=[
        "missing column",
        "blank cell",
        "short row",
        "duplicate",
        "duplicate but for a space",
        "no rows",
        "empty file",
        "open quote",
        "one long row",
        "not UTF-8",
        "every row too long",
    ],
)
def test_tables_that_are_refused(content: str | bytes, message: str, write: Any) -> None:
    path = write(content)
    with pytest.raises(BadInput) as caught:
        read_facts(path)
    assert str(caught.value).startswith(f"{path}: {message}"), caught.value


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(BadInput, match=r"no such file. Give a CSV with the columns state"):
            read_facts(path)


def test_duplicates_are_kept_where_they_are_known(write: Any) -> None:
    path = write(GOOD + GOOD.splitlines()[1])
    assert len(read_facts(path, duplicates=True)) == 2


# --- relations ----------------------------------------------------------------------------------------


def test_relations_keep_file_order_and_need_no_example(write: Any) -> None:
    path = write(f"{RELATION_HEADER}\nz,2,last\na,1,first\n", "relations.csv")
    assert list(read_relations(path).items()) == [
        ("z", Relation("z", "2", "last", "", "", "")),
        ("a", Relation("a", "1", "first", "", "", "")),
    ]
    full = f"{RELATION_HEADER},{','.join(EXAMPLE_COLUMNS)}\na,g,d,Rome lies in,Rome,Italy\nb,g,d,,,\n"
    read = read_relations(write(full, "relations.csv"))
    assert read["a"] == Relation("a", "g", "d", "Rome lies in", "Rome", "Italy")
    assert read["b"] == Relation("b", "g", "d", "", "", "")


def test_a_workbook_reads_as_a_csv_does(tmp_path: Path) -> None:
    path = tmp_path / "groups.xlsx"
    rows = {"relation": ["a", "None"], "relation_group_id": [1, 2]}
    table = pd.DataFrame({**rows, "object_generation_description": ["x", "NA"]})
    table["generation_statement_1"] = ["q", None]
    table.to_excel(path, index=False)
    assert read_relations(path) == {
        "a": Relation("a", "1", "x", "q", "", ""),
        "None": Relation("None", "2", "NA", "", "", ""),
    }
    path.write_bytes(b"no workbook")
    with pytest.raises(BadInput, match="cannot be read as a table"):
        read_relations(path)


def test_a_relation_named_twice_is_refused(write: Any) -> None:
    path = write(RELATIONS + "capital_of,other,the capital\n", "relations.csv")
    with pytest.raises(BadInput, match=r"row 3 is a duplicate \(relation='capital_of'\)"):
        read_relations(path)


def test_a_folder_joins_facts_and_relations(write: Any) -> None:
    path = write(GOOD)
    write(RELATIONS, "relations.csv")
    held = read_fact_folder(path.parent, "mine")
    assert (held.name, [f.subject for f in held.facts], [*held.relations]) == (
        "mine",
        ["Paris"],
        ["capital_of"],
    )
    with pytest.raises(BadInput, match=r"^relation 'capital_of' of fact 'Paris is the capital of'"):
        fact_set("mine", held.facts, {})


# --- the released files -------------------------------------------------------------------------------


def test_a_data_folder_without_the_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    for name in CHECKSUMS:
        with pytest.raises(BadInput, match=f"^{DATA_VARIABLE}=.*: no {name} there"):
            pararel_folder()
        (tmp_path / name).write_text(GOOD)
    assert pararel_folder() == tmp_path
    with pytest.raises(BadInput, match=r"pararel_statements\.csv: SHA-256 .* expected 5d16f8ae4640"):
        load_pararel()
    monkeypatch.delenv(DATA_VARIABLE)
    assert pararel_folder() is None


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), ValueError("bad hash"), OSError("disk")]
)
def test_a_failed_download_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import pooch

    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(NotAvailable) as caught:
        load_pararel()
    message = str(caught.value)
    assert message.startswith("pararel_statements.csv: cannot be downloaded (")
    assert f"{type(error).__name__}: {error}" in message
    assert f"set {DATA_VARIABLE} to its folder" in message
    assert isinstance(caught.value, CcmError)


def test_a_download_asks_for_the_released_content(monkeypatch: pytest.MonkeyPatch) -> None:
    import pooch

    asked = {}

    def retrieve(url: str, known_hash: str, fname: str, path: Any) -> str:
        asked[fname] = (url, known_hash)
        return str(Path("nowhere") / fname)

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(BadInput, match="no such file"):
        load_pararel()
    assert {name: known for name, (_, known) in asked.items()} == dict(CHECKSUMS)
    assert all(url.startswith("https://") and url.endswith(name) for name, (url, _) in asked.items())


def test_the_released_facts() -> None:
    if not os.environ.get(DATA_VARIABLE):
        pytest.skip(f"needs {DATA_VARIABLE}: not set")
    held = load_pararel()
    assert held.name == "pararel"
    assert len(held.facts) == 4688
    assert len(held.relations) == 71
    assert len({relation.group for relation in held.relations.values()}) == 8
    assert {fact.relation for fact in held.facts} <= set(held.relations)
    path = facts.pararel_folder()
    assert path is not None
    with pytest.raises(BadInput, match="is a duplicate"):  # the released file holds 8
        read_facts(path / facts.STATEMENTS_FILE)
    assert len(held.facts) - len(set(held.facts)) == 8
