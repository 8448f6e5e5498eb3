"""A model alone, as small as it can be shared: half precision, no checkpoints, no folders of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cdlm.core import plain_yaml
from cdlm.core.checks import check_choice
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_new_folder, read_json, reading, replacing, write_text
from cdlm.core.tensors import specs_of, write_tensors
from cdlm.models import hub
from cdlm.models.lora import is_adapter
from cdlm.runs import caches
from cdlm.runs.config import as_yaml, outline
from cdlm.runs.train import without_folders
from cdlm.sampling.texts import save_tokenizer

WeightType = Literal["fp16", "bf16", "fp32"]
"""Of weights in a file. They are float32 again when the model is loaded."""
TYPES: dict[WeightType, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def pack(
    run: str | Path,
    out: str | Path,
    dtype: WeightType = "fp16",
    sampling: Mapping[str, int | float | str] | None = None,
) -> None:
    """Copy a model to a new folder: its weights, rounded, its settings, tokenizer and card, and nothing else.

    Args:
        run: run folder, name of a model that comes with cdlm, or Hub id.
        out: the new folder; it appears whole or not at all.
        dtype: of the weights in the file.
        sampling: flat settings of the sampler that the copy is to recommend, such as {"policy": "Threshold(0.9)"}; by
            default it recommends what the run does.

    Raises:
        CdlmError: there is no such model, it cannot be loaded or sampled like that, it is an adapter or of another
            library, a weight is too large for the type, or `out` is there already.
    """
    check_choice("a packed model", get_args(WeightType), dtype=dtype)
    source, out = hub.locate(run), Path(out)
    check_new_folder(out)
    if is_adapter(source) or hub.is_foreign(source):
        kind = "an adapter" if is_adapter(source) else "a model of another library"
        raise CdlmError(f"{source} holds {kind}, expected a model of this toolkit: name one")
    folder, config = hub.read(source), read_json(source / "config.json", "a model")
    if sampling:
        if folder.student is not None:
            raise CdlmError(f"{source} is a student, which is sampled as it was distilled: leave out the sampler")
        folder, config = replace(folder, sampling=dict(sampling)), {**config, "sampling": dict(sampling)}
    hub.load_weights(outline(folder.config, source / "config.json"), folder)  # what cannot be loaded is not shared
    check_rounded(folder.weights, TYPES[dtype])
    weights = {k: v.to(TYPES[dtype]) if v.is_floating_point() else v for k, v in folder.weights.items()}
    with replacing(out) as new:
        new.mkdir()
        write_text(new / "config.json", json.dumps(without_folders(config), indent=2) + "\n")
        if (card := source / "README.md").exists():
            with reading(card):
                text = card.read_text(encoding="utf-8")
            write_text(new / "README.md", _without_places(text, config))
        save_tokenizer(folder.tokenizer, new)
        if (source / "config.yaml").exists():
            write_text(new / "config.yaml", _shared(source / "config.yaml"))
        write_tensors(
            new / "model.safetensors", specs_of(weights), {k: (lambda v=value: v) for k, value in weights.items()}
        )


def check_rounded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise if one of the weights, which are finite, is too large for a type.

    Raises:
        CdlmError: it is; the message names a type that is wide enough.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value.to(dtype)).all():
            wide = "fp32" if dtype == torch.bfloat16 else "bf16"
            most = value.abs().max()
            raise CdlmError(f"a weight of {name} is too large for {dtype}, the largest is {most:.3g}: take {wide}")


def _shared(file: Path) -> str:
    """The settings of a run without what only this machine has: paths of folders, and the cache."""
    values = without_folders(plain_yaml.read_mapping(file, "settings of a run"))
    return as_yaml(values | {"cache": caches.DEFAULT})


def _without_places(text: str, config: Any) -> str:
    """A text about a configuration with no more than the name of each file that has an absolute path there."""
    for place in sorted(_places(config), key=len, reverse=True):  # a folder after what lies in it
        for written in (place, json.dumps(place)[1:-1]):
            text = text.replace(written, Path(place).name)
    return text


def _places(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        config = list(config.values())
    if isinstance(config, list):
        for part in config:
            yield from _places(part)
    elif without_folders(config) != config:
        yield config
