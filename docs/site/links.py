"""Check a built site: `python docs/site/links.py build/docs`. Links lead somewhere, nothing comes from elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src",
          "embed": "src", "object": "data"}  # fmt: skip
"""What a browser fetches without being asked, and `link`, except to pages."""
PAGE_LINKS = {"next", "prev", "search", "index", "author", "help", "license"}
IN_STYLES = re.compile(r"""(?:url\(|@import)\s*["']?([^"')\s;]+)""")


@dataclass
class Page(HTMLParser):
    """What a page refers to, with the line it does so at, and the places in it."""

    links: list[tuple[int, str]] = field(default_factory=list)
    loads: list[tuple[int, str]] = field(default_factory=list)
    places: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        line, _ = self.getpos()
        self.places |= {given[name] for name in ("id", "name") if name in given and (name == "id" or tag == "a")}
        loads = given.get(LOADED.get(tag, ""))
        if tag == "link" and given.get("rel") not in PAGE_LINKS:
            loads = given.get("href")
        self.loads += [(line, loads)] if loads else []
        self.loads += [(line, url) for url in IN_STYLES.findall(given.get("style", ""))]
        self.links += [(line, given["href"])] if tag in ("a", "area", "link") and "href" in given else []


def read(file: Path) -> Page:
    page = Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def faults(folder: Path) -> Iterator[str]:
    """What is wrong with a site, a line each: `page:line: what`."""
    pages = {file.resolve(): read(file) for file in sorted(folder.rglob("*.html"))}
    for file, page in pages.items():
        for line, url in page.links + page.loads:
            if why := broken(url, file, pages):
                yield f"{file}:{line}: {url} {why}"
        yield from (f"{file}:{line}: {url} is loaded from elsewhere" for line, url in page.loads if is_remote(url))
    for file in sorted(folder.rglob("*.css")):
        for url in IN_STYLES.findall(file.read_text(encoding="utf-8")):
            if is_remote(url):
                yield f"{file}: {url} is loaded from elsewhere"


def is_remote(url: str) -> bool:
    return url.startswith("//") or urlsplit(url).scheme not in ("", "data")


def broken(url: str, file: Path, pages: dict[Path, Page]) -> str:
    """Why a link inside the site leads nowhere; empty if it leads somewhere, or outside."""
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return ""
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if not target.exists():
        return "is not there"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
        return f"has no place #{parts.fragment}"
    return ""


if __name__ == "__main__":
    found = list(faults(Path(sys.argv[1])))
    print("\n".join(found) if found else f"{sys.argv[1]}: all links lead somewhere, nothing is loaded from elsewhere")
    sys.exit(1 if found else 0)
