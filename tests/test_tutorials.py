"""The tutorials run, and what they have stored is clean."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import notebooks
import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
PLACE = re.compile(r"""(?<![\w./~:<])/(?:[\w.+-]+/)+[\w.+-]*|\b[A-Za-z]:\\\w|\btmp\w{6,}""")
"""An absolute path, or the name of a temporary folder."""

names = pytest.mark.parametrize("path", TUTORIALS, ids=[path.stem for path in TUTORIALS])


def texts_of(output: dict[str, Any]) -> list[str]:
    """What a stored output says in words."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    return ["".join(said) for kind, said in data.items() if kind.startswith("text/")]


@names
def test_every_cell_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, without a warning; a cell that shows something stored shows something now."""
    matplotlib.use("agg")
    monkeypatch.delenv("CDLM_CACHE", raising=False)
    shown = notebooks.run(path, tmp_path)
    stored = [cell["outputs"] for cell in notebooks.code_cells(notebooks.read(path))]
    assert [kinds(outputs) for outputs in shown] == [kinds(outputs) for outputs in stored]


def kinds(outputs: list[dict[str, Any]]) -> list[list[str]]:
    """The kinds of a cell's outputs; their numbers may differ between machines."""
    return [sorted(output.get("data", {"stream": ""})) for output in outputs]


@names
def test_the_stored_outputs_are_clean(path: Path) -> None:
    """No place of a machine, nothing on standard error, no error, small pictures, and at least one output."""
    outputs = [output for cell in notebooks.code_cells(notebooks.read(path)) for output in cell["outputs"]]
    assert outputs
    for output in outputs:
        assert output["output_type"] in ("stream", "execute_result", "display_data")
        assert output.get("name", "stdout") == "stdout"
        assert len(output.get("data", {}).get("image/png", "")) < 100_000
        for text in texts_of(output):
            assert not PLACE.search(text), text


@names
def test_the_file_is_as_it_is_stored(path: Path) -> None:
    """Whoever edits a tutorial stores it again with `python -m notebooks`: no times, counters and kernels."""
    notebook = notebooks.read(path)
    outputs = [cell["outputs"] for cell in notebooks.code_cells(notebook)]
    assert path.read_text(encoding="utf-8") == notebooks.stored(notebook, outputs)


@names
def test_a_tutorial_is_short_and_the_index_names_it(path: Path) -> None:
    assert 15 <= len(notebooks.read(path)["cells"]) <= 30
    assert f"(tutorials/{path.name})" in (FOLDER.parent / "tutorials.md").read_text(encoding="utf-8")


@names
def test_links_lead_to_files(path: Path) -> None:
    words = "\n".join(map(notebooks.source_of, notebooks.read(path)["cells"]))
    found = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", words)]
    assert found
    assert [link for link in found if not (FOLDER / link).exists()] == []


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("/home/me/run", True), ("C:\\Users", True), ("saved to /tmp/a", True), ("tmpg_0ap3_a/samples", True),
        ("nats/token", False), ("runs/toy", False), ("</td>", False), ("1 / 2", False), ("https://a.org/b/c", False),
    ],
)  # fmt: skip
def test_places_of_a_machine_are_found(text: str, bad: bool) -> None:
    assert bool(PLACE.search(text)) == bad


def test_a_cell_shows_what_jupyter_shows(tmp_path: Path) -> None:
    sources = ["x = 2\nprint(x)\nx + 1", "import matplotlib.pyplot as plt\nfigure, axis = plt.subplots()", "x;", "None"]
    cells = [{"cell_type": "code", "source": [source], "outputs": []} for source in sources]
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps({"cells": cells}))
    first, second, third, fourth = notebooks.run(file, tmp_path)
    assert [output["output_type"] for output in first] == ["stream", "execute_result"]
    assert texts_of(first[1]) == ["3"]
    assert [output["output_type"] for output in second] == ["display_data"]
    assert third == fourth == []


def test_what_is_written_to_standard_error_is_not_stored(tmp_path: Path) -> None:
    source = "import sys\nprint('a bar', file=sys.stderr)"
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps({"cells": [{"cell_type": "code", "source": [source], "outputs": []}]}))
    with pytest.raises(AssertionError, match="a bar"):
        notebooks.run(file, tmp_path)


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    source = "from cdlm.cli.main import main\nmain(['evaluate', 'nowhere', 'nothing.txt'])"
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps({"cells": [{"cell_type": "code", "source": [source], "outputs": []}]}))
    with pytest.raises(AssertionError, match=r"nothing\.txt"):
        notebooks.run(file, tmp_path)
