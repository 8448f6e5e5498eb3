"""The pages of documents, as code blocks in the order in which a reader meets them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")))
_BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>.+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_LAUNCHER = re.compile(r"^(torchrun .* --no-python --|srun) ")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: from the root of the checkout.
        line: of its first line of code, from 0.
        language: behind the fence; commands stand in blocks without one.
        text: the code.
        why_not: why a test does not run it, in the comment `not run` before it.
    """

    page: str
    line: int
    language: str
    text: str
    why_not: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of every line `cdlm ...`, without launchers, comments and "..."; S is any seed."""
        if self.language not in ("", "bash"):
            return []
        lines = (_LAUNCHER.sub("", line) for line in self.text.replace("\\\n", " ").splitlines())
        parts = (part for line in lines for part in line.split("&&") if part.strip().startswith("cdlm "))
        words = ([word for word in shlex.split(part, comments=True)[1:] if word != "..."] for part in parts)
        return [["0" if word == "S" else word for word in one] for one in words]

    @property
    def script(self) -> bool:
        """Whether the shell has to run it: its commands stand in loops, or their output goes to a file."""
        shell = r"^for |^cdlm .* > \S+$"
        return self.language in ("", "bash") and re.search(shell, self.text, re.M) is not None

    def code(self) -> str:
        """The text, padded so that an error names the page's own line."""
        return "\n" * self.line + self.text


def blocks_of(page: str) -> list[Block]:
    """All blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("text")), found["language"], found["text"], found["why"])
        for found in _BLOCK.finditer(text)
    ]


def commands_of(page: str) -> list[list[str]]:
    """The words of every `cdlm` command of a page, also of blocks that are not run."""
    return [words for block in blocks_of(page) for words in block.commands]
