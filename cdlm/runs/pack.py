"""A model alone, as small as it can be shared: half precision, no checkpoints, no folders of this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, get_args

import torch
import yaml
from torch import Tensor

from cdlm.core import plain_yaml
from cdlm.core.checks import check_choice
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_new_folder, replacing, write_text
from cdlm.core.tensors import specs_of, write_tensors
from cdlm.models import hub
from cdlm.models.lora import is_adapter
from cdlm.runs import caches
from cdlm.runs.train import without_folders
from cdlm.sampling.texts import save_tokenizer

WeightType = Literal["fp16", "bf16", "fp32"]
"""Of weights in a file. They are float32 again when the model is loaded."""
TYPES: dict[WeightType, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def pack(run: str | Path, out: str | Path, dtype: WeightType = "fp16") -> None:
    """Copy a model to a new folder: its weights, rounded, its settings, tokenizer and card, and nothing else.

    Args:
        run: run folder, name of a model that comes with cdlm, or Hub id.
        out: the new folder; it appears whole or not at all.
        dtype: of the weights in the file.

    Raises:
        CdlmError: there is no such model, it is an adapter or of another library, a weight is too large for the type,
            or `out` is there already.
    """
    check_choice("a packed model", get_args(WeightType), dtype=dtype)
    source, out = hub.locate(run), Path(out)
    check_new_folder(out)
    if is_adapter(source) or hub.is_foreign(source):
        kind = "an adapter" if is_adapter(source) else "a model of another library"
        raise CdlmError(f"{source} holds {kind}, expected a model of this toolkit: name one")
    folder = hub.read(source)
    weights = {name: _rounded(name, value, TYPES[dtype]) for name, value in folder.weights.items()}
    with replacing(out) as new:
        new.mkdir()
        for name in ("config.json", "README.md"):
            if (source / name).exists():
                shutil.copyfile(source / name, new / name)
        save_tokenizer(folder.tokenizer, new)
        if (source / "config.yaml").exists():
            write_text(new / "config.yaml", _shared(source / "config.yaml"))
        write_tensors(
            new / "model.safetensors", specs_of(weights), {k: (lambda v=value: v) for k, value in weights.items()}
        )


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    found = value.to(dtype)
    if not torch.isfinite(found).all():
        most = value.abs().max()
        raise CdlmError(f"a weight of {name} is too large for {dtype}, the largest is {most:.3g}: take bf16")
    return found


def _shared(file: Path) -> str:
    """The settings of a run without what only this machine has: paths of folders, and the cache."""
    values = without_folders(plain_yaml.read_mapping(file, "settings of a run"))
    return yaml.safe_dump(values | {"cache": caches.DEFAULT}, sort_keys=False, allow_unicode=True)
