"""Convert published weights."""

from __future__ import annotations

from pathlib import Path

from cdlm.continuous.published import LAYOUTS
from cdlm.continuous.published.elf import ELFLayout
from cdlm.core.errors import CdlmError
from cdlm.core.progress import to_stderr
from cdlm.runs.convert import convert as write_converted


def convert(
    layout: str,
    source: Path,
    out: Path,
    *,
    tokenizer: str | None = None,
    encoder: str | None = None,
    quiet: bool = False,
) -> None:
    """Convert published weights to a model folder, or a model folder to its published format.

    Args:
        layout: plaid, ssd, langflow or elf.
        source: folder of the published files; or a model folder, which is written in the published format.
        out: folder to write, a new one.
        tokenizer: tokenizer.json, folder or Hub id; by default that of source, or of the encoder.
        encoder: of elf: folder or Hub id of the encoder that the weights were trained with.
        quiet: print errors only.
    """
    kind = LAYOUTS.find(layout)
    if encoder is not None and kind is not ELFLayout:
        raise CdlmError(f"{layout} has no encoder: leave out --encoder")
    made = kind() if encoder is None else ELFLayout(encoder)
    write_converted(made, source, out, tokenizer or encoder)
    if not quiet:
        to_stderr(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")
