"""How the documents of a training text are divided: for the generator, for its judge, and for nobody.

A judge that read the generator's own training text rewards copying. So it gets documents of its own. Documents that
neither of them reads are real text like the training text; a validation split may be of another kind, as in a text that
is sorted by subject.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cdlm.core.checks import check_number
from cdlm.core.errors import CdlmError
from cdlm.data.sources import Source, Split

Part = Literal["generator", "judge", "unread"]


@dataclass(frozen=True)
class Division:
    """Shares of the training documents, each in [0, 1); the generator gets the rest.

    The content of a document decides where it goes, by its SHA-256: so the order of a text does not matter, and two
    equal documents are never on two sides.

    Args:
        judge: for the judge.
        unread: for nobody to train on.
    """

    judge: float = 0.0
    unread: float = 0.0

    def __post_init__(self) -> None:
        check_number("a division", least=0, below=1, judge=self.judge, unread=self.unread)
        if self.judge + self.unread >= 1:
            raise CdlmError(
                f"shares of {self.judge} for the judge and {self.unread} for nobody leave the generator no text: their"
                " sum must be below 1"
            )

    def has(self, part: Part) -> bool:
        """Whether a part gets any documents."""
        return part == "generator" or (self.judge if part == "judge" else self.unread) > 0

    def part_of(self, document: str) -> Part:
        """Where a document goes."""
        digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self.judge:
            return "judge"
        return "unread" if place < self.judge + self.unread else "generator"


@dataclass(frozen=True)
class Share(Source):
    """One part of the training documents of a source, as a source whose training split it is."""

    source: Source
    division: Division
    part: Part

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of the part in the order of the source; the validation split is not divided."""
        if split == "valid":
            yield from self.source.documents("valid")
            return
        seen = found = 0
        for document in self.source.documents("train"):
            seen += 1
            if self.division.part_of(document) == self.part:
                found += 1
                yield document
        if not found:
            raise CdlmError(
                f"none of {seen} training documents fell to the {self.part}'s part (equal ones go together): give more"
                " text, divide it into more documents (sample_by line or paragraph), or set judge_share and"
                " unread_share to 0"
            )

    def fingerprint(self) -> str:
        """A hash of the source, the division and the part."""
        parts = f"share {self.source.fingerprint()} {self.division} {self.part}"
        return hashlib.sha256(parts.encode()).hexdigest()
