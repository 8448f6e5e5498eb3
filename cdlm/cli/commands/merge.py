"""Merge an adapter into its base."""

from __future__ import annotations

from pathlib import Path

from cdlm import api
from cdlm.core.progress import to_stderr


def merge(adapter: str, out: Path, *, quiet: bool = False) -> None:
    """Add an adapter to the weights of its base, and write both as one plain model folder, in the format of the base.

    Args:
        adapter: folder or Hub id of an adapter, as cdlm train --lora writes it; it names its base.
        out: folder to write, a new one.
        quiet: print errors only.
    """
    api.merge(adapter, out)
    if not quiet:
        to_stderr(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")
