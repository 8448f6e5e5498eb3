"""Convert published weights."""

from __future__ import annotations

from pathlib import Path

from cdlm.continuous.published import LAYOUTS
from cdlm.core.progress import to_stderr
from cdlm.runs.convert import convert as write_converted


def convert(layout: str, source: Path, out: Path, *, tokenizer: str | None = None, quiet: bool = False) -> None:
    """Convert published weights to a model folder, or a model folder to its published format.

    Args:
        layout: plaid, ssd or langflow.
        source: folder of the published files; or a model folder, which is written in the published format.
        out: folder to write, a new one.
        tokenizer: tokenizer.json, folder or Hub id; by default that of source.
        quiet: print errors only.
    """
    write_converted(LAYOUTS.find(layout)(), source, out, tokenizer)
    if not quiet:
        to_stderr(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")
