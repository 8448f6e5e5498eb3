"""The pages tell the truth: their examples run, and their tables name what exists."""

import re
from pathlib import Path

import pytest

from cdlm.continuous.grids import GRIDS
from cdlm.continuous.projections import PROJECTIONS
from cdlm.continuous.solvers import SOLVERS
from cdlm.data.masking import MASKINGS
from cdlm.halting import RULES
from cdlm.halting.signals import SIGNALS
from cdlm.masked.policies import POLICIES

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md", "docs/write-a-criterion.md", "docs/bring-your-model.md", "docs/masked.md", "docs/add-a-system.md",
    "docs/likelihood.md",
)  # fmt: skip
_BLOCK = re.compile(r"<!-- tested -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: str) -> list[str]:
    """The marked examples of a page, each padded so that an error names the page's own line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, found.start(1)) + found[1] for found in _BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page)
    assert blocks or page == "README.md", f"{page} has no tested example"
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)  # text of this repository, run as a reader would run it


@pytest.mark.parametrize("page", PAGES)
def test_no_mark_is_lost(page: str) -> None:
    """A mark that stands before anything but a closed python block would be skipped in silence."""
    assert (ROOT / page).read_text(encoding="utf-8").count("<!-- tested -->") == len(blocks_of(page))


def test_every_signal_is_described() -> None:
    page = (ROOT / "docs/write-a-criterion.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page.split("## Signals")[1].split("These are there")[0], re.MULTILINE)
    assert sorted(rows) == sorted(SIGNALS)


def test_the_methods_page_names_files_that_exist_and_every_part_that_has_a_name() -> None:
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    files = re.findall(r"`(cdlm/[\w/]+\.py)`", page)
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []
    # An implemented name stands beside its file; a planned one has no file.
    done = "\n".join(line for line in page.splitlines() if "`cdlm/" in line)
    rules = [line.split(" | ")[0] for line in page.split("## Halting")[1].split("## ")[0].splitlines()]
    assert [name for name in RULES if sum(f"`{name}`" in first for first in rules) != 1] == []
    assert page.count("`&`") == 1, "how rules are joined is told twice"
    for name in (*RULES, *SOLVERS, *GRIDS, *PROJECTIONS, *MASKINGS, *POLICIES):
        assert re.search(rf"`{name}\b", done), f"docs/methods.md does not say where {name} is"
