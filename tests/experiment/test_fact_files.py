"""Fact tables that are read, tables that are refused, and the released files where they are here."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ccm.errors import BadInput, CcmError, NotAvailable
from ccm.experiment import fact_files as facts
from ccm.experiment.fact_files import (
    DATA_VARIABLE,
    EXAMPLE_COLUMNS,
    FACT_COLUMNS,
    GROUPS,
    RELATION_COLUMNS,
    RELEASED,
    STATEMENTS,
    ReleasedFile,
    load_pararel,
    pararel_folder,
    read_fact_folder,
    read_facts,
    read_relations,
)
from ccm.method.facts import Fact, Relation, fact_set
from tests.needs import FACTS

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

REPOSITORY = "https://raw.githubusercontent.com/Zineddine-Tighidet/Context-Copying-Modulation"
AT = "0e64fbc988c243264794bd8985b0c555fa8e234e/input_data/knowledge-probing-data"
THEIRS = {  # what the authors' repository calls the two files, and what is in them
    "pararel_statements.csv": (
        "raw_pararel_with_correctly_reformatted_statements.csv",
        "5d16f8ae464000f46af6bb55c22d6c87aaed2fcd20347f2761b9e21ca6bef66b",
    ),
    "relation_groups.xlsx": (
        "relation_groups_by_row_with_rel_gen_desc.xlsx",
        "0e094930c06da69fcb90cb2ae271e20b6a70d43bb5e926ba96da3faa73d44102",
    ),
}
BY_NAME = [[STATEMENTS.name, GROUPS.name], [STATEMENTS.published_as, GROUPS.published_as]]
MIXED = [[STATEMENTS.name, GROUPS.published_as], [STATEMENTS.published_as, GROUPS.name]]


@pytest.fixture
def small(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Released files of one fact and one relation; their contents, by name."""
    pd.read_csv(write(RELATIONS, "relations.csv")).to_excel(tmp_path / "groups.xlsx", index=False)
    contents = [GOOD.encode(), (tmp_path / "groups.xlsx").read_bytes()]
    files = tuple(
        replace(file, sha256=hashlib.sha256(content).hexdigest())
        for file, content in zip(RELEASED, contents, strict=True)
    )
    monkeypatch.setattr(facts, "RELEASED", files)
    return dict(zip([file.name for file in files], contents, strict=True))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv(DATA_VARIABLE, str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache to download to; no data folder is named."""
    import pooch

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path / "cache" / "ccm"


@pytest.mark.parametrize("names", BY_NAME + MIXED, ids=lambda names: "+".join(n[:14] for n in names))
def test_a_data_folder_may_use_either_name_of_a_file(
    names: list[str], small: dict[str, bytes], data: Path
) -> None:
    for name, content in zip(names, small.values(), strict=True):
        (data / name).write_bytes(content)
    assert pararel_folder() == data
    held = load_pararel()
    assert [fact.object for fact in held.facts] == ["France"]
    assert [*held.relations] == ["capital_of"]


def test_of_two_files_the_released_one_is_taken(small: dict[str, bytes], data: Path) -> None:
    for file in RELEASED:
        (data / file.name).write_bytes(b"another file")
        (data / file.published_as).write_bytes(small[file.name])
    assert load_pararel().facts[0].subject == "Paris"


@pytest.mark.parametrize("lacking", RELEASED, ids=lambda file: file.name)
def test_a_data_folder_without_a_file_is_refused(lacking: ReleasedFile, data: Path) -> None:
    for file in RELEASED:
        if file != lacking:
            (data / file.published_as).touch()
    with pytest.raises(BadInput) as caught:
        pararel_folder()
    message = str(caught.value)
    ours, (theirs, _) = lacking.name, THEIRS[lacking.name]
    assert message.startswith(f"{DATA_VARIABLE}={data}: no {ours} (or {theirs}) there. Point it at ")
    for ours, (theirs, _) in THEIRS.items():
        assert f"{ours} (or {theirs})" in message
    assert message.endswith("or unset it to download them.")


@pytest.mark.parametrize("names", BY_NAME, ids=["our names", "their names"])
def test_files_that_are_not_the_released_ones_are_refused(names: list[str], data: Path) -> None:
    for name in names:
        (data / name).write_text(GOOD)
    with pytest.raises(BadInput, match="It is not the released") as caught:
        load_pararel()
    message = str(caught.value)
    assert message.startswith(
        f"{data / names[0]}: SHA-256 {hashlib.sha256(GOOD.encode()).hexdigest()[:12]}"
    )
    assert f"expected {THEIRS[STATEMENTS.name][1][:12]}" in message
    assert all(name in message for name in (STATEMENTS.name, STATEMENTS.published_as, "--facts FOLDER"))


def test_without_the_variable_there_is_no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert pararel_folder() is None
    monkeypatch.setenv(DATA_VARIABLE, "")
    assert pararel_folder() is None


def test_a_download_asks_the_authors_repository_for_its_own_names(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pooch

    asked = {}

    def retrieve(url: str, known_hash: str, fname: str, path: Any) -> str:
        asked[fname] = (url, known_hash)
        assert path == cache
        return str(Path("nowhere") / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(BadInput, match="no such file"):
        load_pararel()
    assert asked == {
        name: (f"{REPOSITORY}/{AT}/{theirs}", known) for name, (theirs, known) in THEIRS.items()
    }


class Served:
    """Stands for the network: what is asked for, and what comes."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = {THEIRS[name][0]: content for name, content in contents.items()}
        self.asked: list[str] = []

    def __call__(self, url: str, output: str, pooch: Any) -> None:
        self.asked.append(url.rpartition("/")[2])
        Path(output).write_bytes(self.contents[self.asked[-1]])


@pytest.fixture
def served(small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Served:
    """The authors' repository with the two small files."""
    found = Served(small)
    monkeypatch.setattr("pooch.core.choose_downloader", lambda *args, **options: found)
    return found


@pytest.mark.parametrize("there", [None, b"", b"half", b"what another server sent"])
def test_what_the_cache_holds_is_used_only_if_it_is_whole(
    there: bytes | None, served: Served, small: dict[str, bytes], cache: Path
) -> None:
    if there is not None:
        cache.mkdir(parents=True)
        for name, content in small.items():
            (cache / name).write_bytes(content[:20] if there == b"half" else there)
    first = load_pararel()
    assert served.asked == [file.published_as for file in RELEASED], "not fetched anew"
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == small, "left beside them"
    assert load_pararel() == first
    assert len(served.asked) == 2, "asked again for what is there"


def test_a_page_that_came_instead_is_not_kept(served: Served, cache: Path) -> None:
    served.contents = dict.fromkeys(served.contents, b"<html>Please log in</html>")
    with pytest.raises(NotAvailable, match=r"what came is not the file with SHA-256 .*proxy"):
        load_pararel()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), ValueError("bad\nreply"), OSError(28, "No space left")]
)
def test_a_failed_download_says_what_to_do(
    error: Exception, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pooch

    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(NotAvailable) as caught:
        load_pararel()
    message, (theirs, _) = str(caught.value), THEIRS["pararel_statements.csv"]
    assert message.startswith("pararel_statements.csv: cannot be downloaded (")
    assert f"{type(error).__name__}: {' '.join(str(error).split())})" in message
    assert (
        f"Download {REPOSITORY}/{AT}/{theirs} by hand and set {DATA_VARIABLE} to its folder" in message
    )
    assert f"it may be called pararel_statements.csv (or {theirs})" in message
    assert "\n" not in message
    assert isinstance(caught.value, CcmError)


@pytest.mark.parametrize("half", [False, True], ids=["empty", "half a file"])
def test_a_cache_that_cannot_be_written_to_is_named_before_any_download(
    half: bool, served: Served, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    cache.mkdir(parents=True)
    if half:
        (cache / STATEMENTS.name).write_bytes(b"statement")

    def refuse(*args: Any, dir: Path, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(NotAvailable) as caught:
        load_pararel()
    message = str(caught.value)
    assert message.startswith(f"{cache}: cannot be written to (PermissionError: Permission denied)")
    assert "Set XDG_CACHE_HOME to a folder of yours. Download https://" in message
    assert "\n" not in message
    assert served.asked == []


def test_a_file_where_the_cache_should_be_is_named(served: Served, cache: Path) -> None:
    cache.parent.write_text("no folder")
    with pytest.raises(NotAvailable, match=f"^{re.escape(str(cache))}: cannot be written to \\("):
        load_pararel()
    assert served.asked == []


def test_a_whole_file_in_a_cache_that_is_read_only_will_do(
    served: Served, small: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    for name, content in small.items():
        (cache / name).write_bytes(content)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", None)
    assert len(load_pararel().facts) == 1
    assert served.asked == []


@FACTS.mark()
def test_the_released_facts() -> None:
    held = load_pararel()
    assert held.name == "pararel"
    assert len(held.facts) == 4688
    assert len(held.relations) == 71
    assert len({relation.group for relation in held.relations.values()}) == 8
    assert {fact.relation for fact in held.facts} <= set(held.relations)
    path = facts.pararel_folder()
    assert path is not None
    with pytest.raises(BadInput, match="is a duplicate"):  # the released file holds 8
        read_facts(facts._found(path, STATEMENTS)[0])
    assert len(held.facts) - len(set(held.facts)) == 8
