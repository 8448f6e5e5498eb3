"""The site of the documents: its check of links can fail, and no page is left out. `make docs` builds the site."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = ROOT / "docs/site/links.py"
GOOD = '<a href="other.html#here">a</a> <a href="https://example.org/x">b</a> <img src="dot.png"> <p id="top">'


def said(folder: Path, body: str, style: str = "") -> tuple[int, str]:
    """Exit status and output of the check, of a site with such a page and such a style sheet."""
    (folder / "page.html").write_text(body)
    (folder / "other.html").write_text('<p id="here"> <a href="page.html">back</a>')
    (folder / "dot.png").write_bytes(b"")
    (folder / "site.css").write_text(style)
    done = subprocess.run([sys.executable, str(CHECK), str(folder)], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_site_that_is_whole_passes(tmp_path: Path) -> None:
    style = 'p { background: url("dot.png"); mask: url(data:image/svg+xml;utf8,x) }'
    status, _ = said(tmp_path, f'{GOOD} <a href="#top">c</a> <link rel="stylesheet" href="site.css?v=1">', style)
    assert status == 0


@pytest.mark.parametrize(
    ("body", "style", "fault"),
    [
        ('<a href="gone.html">a</a>', "", "gone.html is not there"),
        ('<a href="other.html#gone">a</a>', "", "other.html#gone has no place #gone"),
        ('<a href="#gone">a</a>', "", "has no place #gone"),
        ('<img src="gone.png">', "", "gone.png is not there"),
        ('<script src="https://example.org/a.js"></script>', "", "a.js is loaded from elsewhere"),
        ('<script src="//example.org/a.js"></script>', "", "a.js is loaded from elsewhere"),
        ('<link rel="stylesheet" href="https://example.org/a.css">', "", "a.css is loaded from elsewhere"),
        ('<link rel="preconnect" href="https://example.org/">', "", "is loaded from elsewhere"),
        ('<p style="background: url(https://example.org/a.png)">', "", "a.png is loaded from elsewhere"),
        ("", "@font-face { src: url('https://example.org/a.woff2') }", "a.woff2 is loaded from elsewhere"),
        ("", '@import "https://example.org/a.css";', "a.css is loaded from elsewhere"),
    ],
)
def test_each_fault_is_found_and_named(body: str, style: str, fault: str, tmp_path: Path) -> None:
    status, output = said(tmp_path, GOOD + body, style)
    assert status == 1
    assert [line for line in output.splitlines() if fault in line] == output.splitlines() != []


def test_every_page_is_in_the_index_of_its_folder() -> None:
    for index, pages in {
        "index.md": "*.md",
        "studies/README.md": "studies/*.md",
        "reference/README.md": "reference/*.md",
    }.items():
        place = ROOT / "docs" / index
        linked = set(re.findall(r"\]\(([^)#]+)\)", place.read_text(encoding="utf-8")))
        there = {page.relative_to(place.parent).as_posix() for page in (ROOT / "docs").glob(pages)} - {place.name}
        assert there <= linked, f"docs/{index} leaves out {there - linked}"
