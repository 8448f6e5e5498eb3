"""Copy a model without what belongs to its training."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from cdlm.cli.groups import flat_settings
from cdlm.continuous.sampler import DiffusionSettings
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_new_folder, replacing
from cdlm.core.progress import to_stderr
from cdlm.evaluation.judge import Judge, read_name
from cdlm.masked.sampler import UnmaskingSettings
from cdlm.models import shipped
from cdlm.runs.pack import TYPES, WeightType, check_rounded
from cdlm.runs.pack import pack as packed

DIFFUSION, UNMASKING = DiffusionSettings(), UnmaskingSettings()


def pack(
    run: str,
    out: Path,
    *,
    dtype: WeightType = "fp16",
    steps: int | None = None,
    diffusion: DiffusionSettings = DIFFUSION,
    unmasking: UnmaskingSettings = UNMASKING,
    quiet: bool = False,
) -> None:
    """Copy a model to a new folder as it can be shared: weights in half precision, settings, tokenizer and card.

    Settings of a sampler are what the copy recommends from then on, in place of what the run does.

    Args:
        run: run folder, name of a model that comes with cdlm, Hub id, or folder of a judge.
        out: folder to write, a new one.
        dtype: of the weights in the file: fp16, bf16 or fp32. They are float32 again when the model is loaded.
        steps: of the sampler.
        quiet: print errors only.
    """
    source, sampling = shipped.place_of(run), flat_settings(diffusion, unmasking, steps=steps)
    if read_name(source) is None:
        packed(run, out, dtype, sampling)
    elif sampling:
        raise CdlmError(f"{source} is a judge, which is not sampled: leave out {', '.join(sorted(sampling))}")
    else:
        _pack_judge(source, out, TYPES[dtype])
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
