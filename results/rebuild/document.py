"""The JSON file of a table: sealed with a hash over its content, so that a number changed by hand is seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import write_json

FORMAT = 1
SEAL = "sha256"


class NotThere(CdlmError):
    """The table was not built."""


def digest(content: Any) -> str:
    """SHA-256 of plain data, in JSON with sorted keys and without spaces, UTF-8."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its format and its hash."""
    whole = {"format": FORMAT, **{key: value for key, value in content.items() if key != SEAL}}
    return {**whole, SEAL: digest(whole)}


def write(content: Mapping[str, Any], file: Path) -> None:
    """Seal the content and put it at `file` in one move."""
    write_json(file, sealed(content))


def read(file: Path) -> dict[str, Any]:
    """The content of a table's file.

    Raises:
        NotThere: there is none.
        CdlmError: it is truncated, of another format, of another table, or changed since it was written.
    """
    name, again = file.stem, f"rebuild it with python results/build.py run {file.stem}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotThere(f"{file.name} is not there: {again}") from error
    except OSError as error:
        raise CdlmError(f"{file.name} cannot be read ({error.strerror or error}): check the file") from error
    except ValueError as error:
        raise CdlmError(f"{file.name} is truncated or no JSON ({first_line(error)}): {again}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CdlmError(f"{file.name} is not a table of results, it names no format: {again}")
    if content["format"] != FORMAT:
        raise CdlmError(f"{file.name} has format {content['format']!r}, this version reads format {FORMAT}: {again}")
    if content.get(SEAL) != digest({key: value for key, value in content.items() if key != SEAL}):
        raise CdlmError(f"{file.name} was changed after it was written, its hash does not fit: {again}")
    if content.get("table") != name:
        raise CdlmError(f"{file.name} holds the table {content.get('table')!r}: name it so, or {again}")
    return content
