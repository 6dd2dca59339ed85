"""The notebook runs, and shows what is stored in it."""

from tests.notebook import FIRST_LOOK, code_cells, read, run, texts


def test_the_notebook_shows_what_it_stores() -> None:
    notebook = read(FIRST_LOOK)
    cells = code_cells(notebook)
    for cell, found in zip(cells, run(notebook), strict=True):
        assert texts(found) == texts(cell["outputs"]), "".join(cell["source"])
    assert sum("image/png" in o.get("data", {}) for cell in cells for o in cell["outputs"]) == 2


def test_the_notebook_holds_no_path_and_no_error() -> None:
    text = FIRST_LOOK.read_text(encoding="utf-8")
    assert '"output_type": "error"' not in text
    assert "/tmp/" not in text
