"""Run a notebook's code cells one after another; `python -m tests.notebook FILE` stores what they show.

Without a kernel: what a cell shows is what it prints, the value of its last line, and its figure.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

Output = dict[str, Any]
FIRST_LOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "first_look.ipynb"


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any]) -> list[list[Output]]:
    """Run every code cell in one namespace and return what each shows, as a notebook stores it."""
    mpl.use("Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    return [_shown("".join(cell["source"]), names, i) for i, cell in enumerate(code_cells(notebook), 1)]


def _shown(source: str, names: dict[str, Any], number: int) -> list[Output]:
    from matplotlib import pyplot as plt

    *body, last = ast.parse(source).body
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        else:
            exec(compile(ast.Module([last], []), "cell", "exec"), names)
    outputs: list[Output] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if plt.get_fignums():
        picture = io.BytesIO()
        plt.gcf().savefig(picture, format="png", dpi=80, bbox_inches="tight")
        plt.close("all")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    elif value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "to_html"):
            data["text/html"] = value.to_html().splitlines(keepends=True)
        shown = {"output_type": "execute_result", "execution_count": number}
        outputs.append({**shown, "data": data, "metadata": {}})
    return outputs


def texts(outputs: list[Output]) -> list[Any]:
    """What can be compared: pictures are drawn a little otherwise by every release."""
    return [
        output.get("text") or output["data"].get("text/plain") or sorted(output["data"])
        for output in outputs
    ]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    notebook = read(path)
    for i, (cell, outputs) in enumerate(zip(code_cells(notebook), run(notebook), strict=True), 1):
        cell["outputs"], cell["execution_count"] = outputs, i
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
