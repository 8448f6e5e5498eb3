"""Run the tutorials without Jupyter, and store what their cells show.

    PYTHONPATH=tests:. python -m notebooks docs/tutorials/*.ipynb

Each notebook runs in an empty folder, which is also its home. What it stores is the same each time: no times, no
counters, no kernel of a machine.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

Cell = dict[str, Any]
Output = dict[str, Any]

DPI = 72
"""Of figures that are stored."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")


def read(path: Path) -> dict[str, Any]:
    """The notebook of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def source_of(cell: Cell) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    """The cells that run, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(path: Path, folder: Path) -> list[list[Output]]:
    """What each code cell of a notebook shows, run in order in an empty folder, which is its home too.

    Raises:
        AssertionError: a cell wrote to standard error, where warnings and bars go.
    """
    names = {"__name__": "tutorial"}
    with chdir(folder), patch.dict(os.environ, HOME=str(folder)):
        return [
            _shown(source_of(cell), names, f"{path.name}, code cell {number}")
            for number, cell in enumerate(code_cells(read(path)), 1)
        ]


def _shown(source: str, names: dict[str, Any], place: str) -> list[Output]:
    """Run a cell as Jupyter does: what it prints, the value of its last line, and the figures that it left open."""
    parsed = ast.parse(source, place)
    last = parsed.body.pop() if parsed.body and isinstance(parsed.body[-1], ast.Expr) else None
    printed, said, value = io.StringIO(), io.StringIO(), None
    with redirect_stdout(printed), redirect_stderr(said):
        # Text of this repository, run as a reader would run it: without the __future__ of this file.
        try:
            exec(compile(parsed, place, "exec", dont_inherit=True), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), place, "eval", dont_inherit=True), names)
        except SystemExit:  # a command that fails says why on standard error
            print("and ended the program", file=said)
    assert not said.getvalue(), f"{place} wrote to standard error: {said.getvalue()}"
    value = None if source.rstrip().endswith(";") else value
    stream = [{"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())}]
    return [*(stream if printed.getvalue() else []), *_result(value), *_figures()]


def _result(value: Any) -> list[Output]:
    if value is None:
        return []
    data: dict[str, Any] = {"text/plain": _lines(_ADDRESS.sub("", repr(value)))}
    if (html := getattr(value, "_repr_html_", lambda: None)()) is not None:
        data["text/html"] = _lines(html)
    if (png := getattr(value, "_repr_png_", lambda: None)()) is not None:
        data["image/png"] = _encoded(png)
    return [{"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"}]


def _figures() -> list[Output]:
    if "matplotlib.pyplot" not in sys.modules:
        return []
    from matplotlib import pyplot

    shown = []
    for number in pyplot.get_fignums():
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
        data = {"image/png": _encoded(picture.getvalue()), "text/plain": ["<Figure>"]}
        shown.append({"data": data, "metadata": {}, "output_type": "display_data"})
    pyplot.close("all")
    return shown


def _encoded(picture: bytes) -> str:
    return base64.b64encode(picture).decode() + "\n"


def _lines(text: str) -> list[str]:
    """Text as notebooks keep it, line by line."""
    return text.splitlines(keepends=True)


def stored(notebook: dict[str, Any], outputs: list[list[Output]]) -> str:
    """The file of a notebook with these outputs of its code cells."""
    shown = iter(outputs)
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        plain = {
            "cell_type": cell["cell_type"], "id": f"cell-{number}", "metadata": {},
            "source": _lines(source_of(cell)),
        }  # fmt: skip
        if cell["cell_type"] == "code":
            plain |= {"execution_count": None, "outputs": next(shown)}
        cells.append(plain)
    whole = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main(paths: list[str]) -> None:
    """Run each notebook and write it back with what it showed."""
    import matplotlib

    from cdlm.core.files import write_text

    matplotlib.use("agg")
    for path in map(Path, paths):
        with tempfile.TemporaryDirectory() as folder:
            outputs = run(path.absolute(), Path(folder))
        write_text(path, stored(read(path), outputs))


if __name__ == "__main__":
    main(sys.argv[1:])
