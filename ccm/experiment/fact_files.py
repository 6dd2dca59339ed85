"""Files of facts and relations: where they are, how they are read and checked.

A facts table has the columns of the released `pararel_statements.csv` (one row per fact), a relations
table those of `relation_groups.xlsx` (one row per relation). The folders of the organism and of the
facts of the world hold both as CSV.
"""

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ccm.errors import BadInput, NotAvailable
from ccm.method.facts import Fact, FactSet, Relation, fact_set
from ccm.models.checkpoint_folder import hash_of

FACT_COLUMNS = ("statement_subject", "statement_relation", "statement_object", "rel_lemma")
RELATION_COLUMNS = ("relation", "relation_group_id", "object_generation_description")
EXAMPLE_COLUMNS = ("generation_statement_1", "generation_subject_1", "generation_object_1")

DATA_VARIABLE = "CCM_DATA_DIR"
WORLD = Path(__file__).resolve().parent / "world"


@dataclass(frozen=True, slots=True)
class ReleasedFile:
    """A data file of the paper's authors; a folder may hold it under either of its names."""

    name: str  # here, and in the cache
    published_as: str  # in the authors' repository
    sha256: str

    @property
    def names(self) -> str:
        """Both names, for messages."""
        return f"{self.name} (or {self.published_as})"


STATEMENTS = ReleasedFile(
    "pararel_statements.csv",
    "raw_pararel_with_correctly_reformatted_statements.csv",
    "5d16f8ae464000f46af6bb55c22d6c87aaed2fcd20347f2761b9e21ca6bef66b",
)
GROUPS = ReleasedFile(
    "relation_groups.xlsx",
    "relation_groups_by_row_with_rel_gen_desc.xlsx",
    "0e094930c06da69fcb90cb2ae271e20b6a70d43bb5e926ba96da3faa73d44102",
)
RELEASED = (STATEMENTS, GROUPS)
REPOSITORY = "https://raw.githubusercontent.com/Zineddine-Tighidet/Context-Copying-Modulation"
COMMIT = "0e64fbc988c243264794bd8985b0c555fa8e234e"
REPOSITORY_FOLDER = "input_data/knowledge-probing-data"


def read_text_table(
    path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()
) -> pd.DataFrame:
    """Read a CSV or XLSX as text and check the columns and their cells."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file. Give a CSV with the columns {', '.join(columns)}.")
    try:
        if path.suffix == ".xlsx":
            table = pd.read_excel(path, dtype=str, keep_default_na=False)
        else:
            with warnings.catch_warnings():
                # pandas only warns of rows longer than the header, and shifts their columns.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                # "None" and "NA" are names like any other, so no cell is read as missing.
                table = pd.read_csv(
                    path, dtype=str, keep_default_na=False, encoding="utf-8", index_col=False
                )
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8. Save the file as UTF-8 and try again.") from error
    except pd.errors.ParserWarning as error:
        raise BadInput(f"{path}: rows are longer than the header. Quote cells with commas.") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())  # pandas breaks lines
        raise BadInput(f"{path}: cannot be read as a table ({reason}).") from error
    check_columns(path, table, columns)
    for column in optional:
        if column not in table.columns:
            table[column] = ""
    wanted = table[[*columns, *optional]]
    return pd.DataFrame({column: wanted[column].str.strip() for column in wanted.columns})


def check_columns(path: Path, table: pd.DataFrame, columns: tuple[str, ...]) -> None:
    """Refuse a table that lacks a column, has no rows, or has an empty cell in a needed column."""
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise BadInput(
            f"{path}: missing column {missing[0]!r} (found: {', '.join(map(str, table.columns))}). "
            f"Needed: {', '.join(columns)}."
        )
    if table.empty:
        raise BadInput(f"{path}: no rows. Give at least one.")
    for column in columns:
        empty = table.index[table[column].astype(str).str.strip() == ""]
        if len(empty):
            raise BadInput(
                f"{path}: empty cell in column {column!r}, row {int(empty[0]) + 2}. "
                "Fill it or remove the row."
            )


def check_distinct(path: Path, table: pd.DataFrame, columns: tuple[str, ...]) -> None:
    """Refuse a table in which two rows agree in `columns`."""
    twice = table.index[table.duplicated(list(columns))]
    if len(twice):
        row = table.loc[twice[0]]
        raise BadInput(
            f"{path}: row {int(twice[0]) + 2} is a duplicate "
            f"({', '.join(f'{c}={row[c]!r}' for c in columns)}). Remove one of the two."
        )


def read_facts(path: Path, *, duplicates: bool = False) -> tuple[Fact, ...]:
    """Read a facts table.

    Args:
        path: CSV with at least `FACT_COLUMNS`, UTF-8.
        duplicates: Accept repeated rows. Only the released file needs it: it holds 8.

    Raises:
        BadInput: no file, not UTF-8, a missing column, an empty cell, a duplicate row.
    """
    table = read_text_table(path, FACT_COLUMNS)
    if not duplicates:
        check_distinct(path, table, FACT_COLUMNS)
    return tuple(
        Fact(subject=s, relation=r, words=w, object=o)
        for s, w, o, r in table.itertuples(index=False, name=None)
    )


def read_relations(path: Path) -> dict[str, Relation]:
    """Read a relations table (CSV or XLSX), keyed by relation name, in file order.

    Raises:
        BadInput: as `read_facts`; also a relation named twice.
    """
    table = read_text_table(path, RELATION_COLUMNS, EXAMPLE_COLUMNS)
    check_distinct(path, table, ("relation",))
    return {row[0]: Relation(*row) for row in table.itertuples(index=False, name=None)}


def read_fact_folder(folder: Path, name: str) -> FactSet:
    """Read `facts.csv` and `relations.csv` of a folder (the organism's, or your own)."""
    return fact_set(name, read_facts(folder / "facts.csv"), read_relations(folder / "relations.csv"))


def load_world() -> FactSet:
    """Return the facts of the world that come with ccm: well known, with one answer each."""
    return read_fact_folder(WORLD, name="world")


def pararel_at_hand() -> bool:
    """Return whether ParaRel can be read without a download: from `CCM_DATA_DIR` or the cache."""
    return pararel_folder() is not None or all(_in_cache(file) for file in RELEASED)


def _cache() -> Path:
    import pooch

    return Path(pooch.os_cache("ccm"))


def _in_cache(file: ReleasedFile) -> bool:
    path = _cache() / file.name
    return path.is_file() and hash_of([path]) == file.sha256


def pararel_folder() -> Path | None:
    """Return the folder that `CCM_DATA_DIR` names, or None without it.

    Raises:
        BadInput: the variable is set, but the folder lacks one of the two files.
    """
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        return None
    folder = Path(value)
    for file in RELEASED:
        if not _found(folder, file):
            raise BadInput(
                f"{DATA_VARIABLE}={value}: no {file.names} there. Point it at the folder that holds "
                f"{' and '.join(f.names for f in RELEASED)}, or unset it to download them."
            )
    return folder


def _found(folder: Path, file: ReleasedFile) -> list[Path]:
    """List the paths of a released file in a folder: under none, one or both of its names."""
    return [path for name in (file.name, file.published_as) if (path := folder / name).is_file()]


def load_pararel() -> FactSet:
    """Return the 4,688 ParaRel facts (Method 3), from `CCM_DATA_DIR` or by download.

    Raises:
        BadInput: the files `CCM_DATA_DIR` points at are not the released ones (SHA-256).
        NotAvailable: they have to be downloaded and cannot be.
    """
    folder = pararel_folder()
    statements, groups = (
        _download(file) if folder is None else _checked(folder, file) for file in RELEASED
    )
    return fact_set("pararel", read_facts(statements, duplicates=True), read_relations(groups))


def _checked(folder: Path, file: ReleasedFile) -> Path:
    """Find a released file in a folder, under whichever name has the right checksum."""
    sums = {path: hash_of([path]) for path in _found(folder, file)}
    for path, found in sums.items():
        if found == file.sha256:
            return path
    path, found = next(iter(sums.items()))
    raise BadInput(
        f"{path}: SHA-256 {found[:12]}..., expected {file.sha256[:12]}.... It is not the released "
        f"{file.names}. Unset {DATA_VARIABLE} to download that; facts of your own: --facts FOLDER."
    )


def _download(file: ReleasedFile) -> Path:
    """Fetch one released file into the user's cache, checked against its checksum.

    A file in the cache with another checksum (cut off, or another file) is downloaded again.
    """
    import pooch

    url = f"{REPOSITORY}/{COMMIT}/{REPOSITORY_FOLDER}/{file.published_as}"
    cache = _cache()
    by_hand = (
        f"Download {url} by hand and set {DATA_VARIABLE} to its folder (there it may be called "
        f"{file.names}), or give facts of your own with --facts FOLDER."
    )
    if _in_cache(file):
        return cache / file.name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=cache).close()
    except OSError as error:
        raise NotAvailable(
            f"{cache}: cannot be written to ({type(error).__name__}: {error.strerror}), and that is "
            f"where {file.name} is downloaded to. Set XDG_CACHE_HOME to a folder of yours. {by_hand}"
        ) from error
    try:
        return Path(pooch.retrieve(url, known_hash=file.sha256, fname=file.name, path=cache))
    except Exception as error:  # pooch lets every kind of network error through
        # requests repeats the URL and adds more, none of which helps a user.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:80]
        if isinstance(error, ValueError) and "hash" in str(error):
            reason = f"what came is not the file with SHA-256 {file.sha256[:12]}...; a proxy's page?"
        raise NotAvailable(f"{file.name}: cannot be downloaded ({reason}). {by_hand}") from error
