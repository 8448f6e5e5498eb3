"""Copy a model without what belongs to its training."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from cdlm.core.files import check_new_folder, replacing
from cdlm.core.progress import to_stderr
from cdlm.evaluation.judge import Judge, read_name
from cdlm.models import shipped
from cdlm.runs.pack import TYPES, WeightType, check_rounded
from cdlm.runs.pack import pack as packed


def pack(run: str, out: Path, *, dtype: WeightType = "fp16", quiet: bool = False) -> None:
    """Copy a model to a new folder as it can be shared: weights in half precision, settings, tokenizer and card.

    Args:
        run: run folder, name of a model that comes with cdlm, Hub id, or folder of a judge.
        out: folder to write, a new one.
        dtype: of the weights in the file: fp16, bf16 or fp32. They are float32 again when the model is loaded.
        quiet: print errors only.
    """
    source = shipped.place_of(run)
    if read_name(source) is not None:
        _pack_judge(source, out, TYPES[dtype])
    else:
        packed(run, out, dtype)
    if not quiet:
        to_stderr(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")


def _pack_judge(source: Path, out: Path, dtype: torch.dtype) -> None:
    check_new_folder(out)
    judge = Judge.load(source)
    check_rounded(judge.model.state_dict(), dtype)
    with replacing(out) as new:
        Judge.load(source, dtype=dtype).save(new)
        if (source / "README.md").exists():
            shutil.copyfile(source / "README.md", new / "README.md")
