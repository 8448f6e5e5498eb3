"""The files that tables need from outside: found, and stood in for in the small version."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing, write_text
from cdlm.data.stories import stories

DOCUMENTS = 800
"""Of a stand-in."""


@dataclass(frozen=True)
class Data:
    """Where the files are.

    Args:
        folder: of the real ones.
        stand_ins: folder for those that are made up; None makes none up.
    """

    folder: Path | None
    stand_ins: Path | None = None

    def find(self, table: str, needed: Mapping[str, str]) -> dict[str, Path]:
        """The place of each file.

        Args:
            needed: what each file is, by its name.

        Raises:
            CdlmError: one is not there, and nothing can stand in for it.
        """
        return {name: self._place(table, name, what) for name, what in needed.items()}

    def described(self, places: Mapping[str, Path]) -> dict[str, dict[str, object]]:
        """The hash of each file, and whether it is a stand-in."""
        return {
            name: {"sha256": digest_of(place), "stand_in": place.parent == self.stand_ins}
            for name, place in places.items()
        }

    def _place(self, table: str, name: str, what: str) -> Path:
        if self.folder is not None and (self.folder / name).exists():
            return self.folder / name
        write = STAND_INS.get(Path(name).suffix)
        if self.stand_ins is None or write is None:
            where = "--data or CDLM_DATA" if self.folder is None else f"{self.folder}, given with --data or CDLM_DATA"
            raise CdlmError(f"{table} needs {name} ({what}): put it into a folder and name that with {where}")
        self.stand_ins.mkdir(parents=True, exist_ok=True)
        write(self.stand_ins / name)
        return self.stand_ins / name


def _write_stories(file: Path) -> None:
    """A small text file of stories in alphabetical order, as real files are often sorted; another for another name."""
    texts = sorted(stories(DOCUMENTS, zlib.crc32(file.name.encode())))
    write_text(file, "".join(f"{json.dumps({'text': text}) if file.suffix == '.jsonl' else text}\n" for text in texts))


def _write_model(file: Path) -> None:
    from rebuild.tiny_gguf import write_gguf  # it imports torch

    with replacing(file) as temporary:  # another build may be reading it
        write_gguf(temporary)


STAND_INS: dict[str, Callable[[Path], None]] = {
    ".txt": _write_stories, ".jsonl": _write_stories, ".gguf": _write_model,
}  # fmt: skip
"""What writes a stand-in, by the ending of its name."""


def digest_of(place: Path) -> str:
    """SHA-256 of a file's content; of a folder, of all its files and their names."""
    if not place.is_dir():
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(path for path in place.rglob("*") if path.is_file())
    parts = "".join(f"{path.relative_to(place).as_posix()} {digest_of(path)}\n" for path in files)
    return hashlib.sha256(parts.encode()).hexdigest()
