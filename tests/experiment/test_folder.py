"""Files are whole or not there, read back as they were written, and never another run's."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccm.errors import BadInput
from ccm.experiment.files import (
    read_json,
    read_statistics,
    to_json,
    write_json,
    write_statistics,
    write_table,
)
from ccm.experiment.folder import FORMAT, MANIFEST, RunFolder, read_manifest
from ccm.experiment.writing import write_atomically
from ccm.method.statistics import STATISTICS, ActivationStatistics

IDENTITY = {"model": "toy", "seed": 123, "values": ("mean_ablation",), "threshold": 0.1}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- writing ------------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomically(path, lambda p: p.write_text("one"))
    write_atomically(path, lambda p: p.write_text("two"))
    assert contents(tmp_path) == {"a/b/file.txt": b"two"}
    assert path.stat().st_mode & 0o777 == 0o644, "results hidden from the group"


@pytest.mark.parametrize("error", [ValueError("half"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_what_was_there(
    error: BaseException, old: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_bytes(old)

    def fail(p: Path) -> None:
        p.write_text("half a file")
        assert p.parent == path.parent, "another file system: the rename would not be atomic"
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, fail)
    assert contents(tmp_path) == ({} if old is None else {"file.txt": old})


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(p: Path) -> None:
        p.write_text("new")
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new"


# --- JSON ---------------------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner),
    max_leaves=12,
)


@given(values)
def test_json_keeps_every_digit(value: Any) -> None:
    text = to_json(value)
    assert text.endswith("\n")
    assert json.loads(text) == value


@dataclass(frozen=True)
class Inner:
    x: float
    names: tuple[str, ...]


def test_json_of_our_types() -> None:
    value = {
        "dataclass": Inner(math.nan, ("Łódź",)),
        "array": np.array([[1.5, math.nan], [math.inf, 0.1]]),
        "numbers": [np.float64(0.1), np.int64(7), np.bool_(True), np.float32(0.5), -math.inf],
        3: (1, None),
    }
    text = to_json(value)
    assert json.loads(text) == {
        "dataclass": {"x": None, "names": ["Łódź"]},
        "array": [[1.5, None], [None, 0.1]],
        "numbers": [0.1, 7, True, 0.5, None],
        "3": [1, None],
    }
    assert "Łódź" in text
    assert "NaN" not in text


def test_json_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 0.1})
    assert read_json(tmp_path / "a.json") == {"x": 0.1}
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "none.json"):
        with pytest.raises(BadInput, match=f"{name}: cannot be read as JSON"):
            read_json(tmp_path / name)


def test_a_value_that_is_no_json_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert contents(tmp_path) == {}


# --- statistics and tables ----------------------------------------------------------------------------


@given(data=st.data(), n=st.integers(1, 5), positions=st.integers(1, 2**40))
def test_statistics_come_back_to_the_last_bit(
    data: st.DataObject, n: int, positions: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    columns = st.lists(st.floats(allow_nan=False), min_size=n, max_size=n)
    drawn = {name: np.array(data.draw(columns, label=name)) for name in STATISTICS}
    path = tmp_path_factory.mktemp("statistics") / "stats.safetensors"
    write_statistics(path, ActivationStatistics(**drawn), positions)
    again, count = read_statistics(path)
    assert count == positions
    for name, values_ in drawn.items():
        np.testing.assert_array_equal(getattr(again, name), values_, strict=True, err_msg=name)


def test_tables_come_back(tmp_path: Path) -> None:
    table = pd.DataFrame({"text": ["a", "Łódź\n"], "x": [0.1, math.nan], "n": [1, 2]}, index=[5, 9])
    write_table(tmp_path / "t.parquet", table)
    read = pd.read_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(read, table.reset_index(drop=True))


# --- whose folder -------------------------------------------------------------------------------------


def test_a_new_folder_says_which_run_it_holds(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "run", IDENTITY)
    assert [*contents(folder.path)] == [MANIFEST]
    assert read_json(folder.path / MANIFEST)["complete"] is False
    (tmp_path / "empty").mkdir()
    assert RunFolder(tmp_path / "empty", IDENTITY).has(MANIFEST)


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run", IDENTITY)
    first.time("decode", 1.25)
    first.note(prompts=np.int64(3), complete=True)
    again = RunFolder(tmp_path / "run", dict(reversed(IDENTITY.items())))
    again.time("decode", 0.5)
    assert again.manifest["timings_s"] == {"decode": 1.75}
    assert (again.manifest["prompts"], again.manifest["complete"]) == (3, True)
    assert read_json(tmp_path / "run" / MANIFEST) == again.manifest
    assert again.has(MANIFEST)
    assert not again.has("scores.json")


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {**IDENTITY, "seed": 124},
    "threshold": {**IDENTITY, "threshold": 0.1 + 2e-16},
    "more": {**IDENTITY, "more": True},
    "model": {name: value for name, value in IDENTITY.items() if name != "model"},
}


@pytest.mark.parametrize("key", OTHERS)
def test_another_run_is_refused_and_nothing_is_written(key: str, tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", IDENTITY)
    (tmp_path / "run" / "prompts.parquet").write_bytes(b"results")
    before = contents(tmp_path)
    with pytest.raises(BadInput, match=rf"run: holds another run \({key} is .* there, "):
        RunFolder(tmp_path / "run", OTHERS[key])
    assert contents(tmp_path) == before


def test_a_run_that_left_only_its_manifest_may_be_replaced(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", IDENTITY).note(started=True)
    taken = RunFolder(tmp_path / "run", OTHERS["seed"])
    assert taken.manifest["identity"]["seed"] == 124
    assert "started" not in taken.manifest
    assert RunFolder(tmp_path / "run", OTHERS["seed"]).manifest["identity"]["seed"] == 124


def test_a_folder_of_other_files_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / MANIFEST).write_text("{")
    before = contents(tmp_path)
    cases = {
        tmp_path: "not empty and holds no run. Nothing was written",
        tmp_path / "notes.txt": "is a file. Give a folder",
        tmp_path / "broken": "cannot be read as JSON",
    }
    for path, message in cases.items():
        with pytest.raises(BadInput) as caught:
            RunFolder(path, IDENTITY)
        assert str(caught.value).startswith(str(path))
        assert message in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("manifest", ["[]", '{"identity": []}'])
def test_a_manifest_of_another_shape_is_refused(manifest: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(BadInput):
        RunFolder(tmp_path, IDENTITY)


@pytest.mark.parametrize(("number", "said"), [(None, "none"), (0, "0"), (2, "2"), ("1", "1")])
def test_a_folder_of_another_format_is_refused(number: Any, said: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", IDENTITY)
    assert folder.manifest["format"] == FORMAT == 1
    manifest = {k: v for k, v in folder.manifest.items() if k != "format"}
    write_json(folder.path / MANIFEST, manifest if number is None else {**manifest, "format": number})
    before = contents(tmp_path)
    for read in (lambda: RunFolder(folder.path, IDENTITY), lambda: read_manifest(folder.path, "")):
        with pytest.raises(BadInput) as caught:
            read()
        assert str(caught.value) == (
            f"{folder.path}: a run folder of format {said}, and this version of ccm reads format 1. "
            "Run again in a new folder."
        )
    assert contents(tmp_path) == before


def test_cells(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", IDENTITY)
    plain = {folder.cell(value, "plain") for value in ("mean_ablation", "mode_ablation")}
    assert plain == {tmp_path / "run" / "plain.parquet"}
    cell = folder.cell("mean_ablation", "control_007")
    assert cell == tmp_path / "run" / "mean_ablation" / "control_007.parquet"
