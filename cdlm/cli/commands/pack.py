"""Copy a model without what belongs to its training."""

from __future__ import annotations

from pathlib import Path

from cdlm.core.files import check_new_folder
from cdlm.core.progress import to_stderr
from cdlm.evaluation.judge import Judge, read_name
from cdlm.models import shipped
from cdlm.runs.pack import TYPES, WeightType
from cdlm.runs.pack import pack as packed


def pack(run: str, out: Path, *, dtype: WeightType = "fp16", quiet: bool = False) -> None:
    """Copy a model to a new folder as it can be shared: weights in half precision, settings, tokenizer and card.

    Args:
        run: run folder, name of a model that comes with cdlm, Hub id, or folder of a judge.
        out: folder to write, a new one.
        dtype: of the weights in the file: fp16, bf16 or fp32. They are float32 again when the model is loaded.
        quiet: print errors only.
    """
    if read_name(shipped.place_of(run)) is not None:
        check_new_folder(out)
        Judge.load(run, dtype=TYPES[dtype]).save(out)
    else:
        packed(run, out, dtype)
    if not quiet:
        to_stderr(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")
