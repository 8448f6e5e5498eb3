"""The files of a foreign checkpoint: settings, weights and tokenizer, read strictly and without running any code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import read_json
from cdlm.core.types import Constants
from cdlm.masked.checkpoints.family import Family, Settings
from cdlm.models.hub import same_tensors, shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_settings(folder: Path) -> Settings:
    """The folder's config.json."""
    return Settings(folder / "config.json", read_json(folder / "config.json", "a checkpoint"))


def load_weights(network: PreTrainedModel, family: Family, folder: Path, dtype: torch.dtype | None) -> None:
    """Give the network the folder's tensors, which must be exactly those of its architecture, and freeze them.

    Args:
        dtype: to convert them to; None: that of the embedding table in the files, which then stay mapped from disk.

    Raises:
        CdlmError: a tensor is missing, unknown, of another shape or not of floats, or a file cannot be read.
    """
    found = _tensors(folder)
    wanted = dict(shapes(network.state_dict()))
    if tied := bool(network.config.tie_word_embeddings):
        del wanted[HEAD]
        found.pop(family.official(HEAD), None)  # the official code ignores a head beside a tied table
    same_tensors(folder, {family.official(name): shape for name, shape in wanted.items()}, shapes(found))
    _check_types(folder, found)
    kind = dtype or found[family.official(TABLE)].dtype
    state = {name: found[family.official(name)].to(kind) for name in wanted}
    network.load_state_dict(state | {HEAD: state[TABLE]} if tied else state, assign=True)
    network.tie_weights()
    network.requires_grad_(False).eval()


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            found |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CdlmError(f"{file} cannot be read, it is missing or damaged ({error}); copy it again") from error
    return found


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    file = folder / INDEX
    if not file.exists():
        raise CdlmError(f"{folder} has neither {WEIGHTS} nor {INDEX}: copy the weights, or convert them to safetensors")
    try:
        names = sorted({str(name) for name in json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CdlmError(f"{file} is no index of weights ({error!r}); copy it again") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise CdlmError(f"{file} names {outside[0]!r}, expected files beside it; copy the folder again")
    return [folder / name for name in names]


def _check_types(folder: Path, found: Mapping[str, Tensor]) -> None:
    for name, value in found.items():
        if value.dtype not in FLOATS:
            raise CdlmError(
                f"tensor {name!r} of {folder} is {value.dtype}, expected floats: take the unquantised model"
            )


def read_tokenizer(folder: Path, family: Family, constants: Constants, rows: int) -> PreTrainedTokenizerFast | None:
    """The folder's tokenizer with the model's mask as its mask token; None if there is none.

    Raises:
        CdlmError: it cannot be read, has no mask or end token, or more tokens than the model's table has rows.
    """
    sets = family.tokenizer_files
    if not any((folder / name).exists() for name in {"tokenizer_config.json", *(n for files in sets for n in files)}):
        return None
    if not any(all((folder / name).exists() for name in files) for files in sets):
        wanted = ", or ".join(" and ".join(files) for files in sets)
        raise CdlmError(f"the tokenizer of {folder} is incomplete, expected {wanted}: copy the whole folder")
    try:
        tokenizer = family.tokenizer.from_pretrained(folder, local_files_only=True, clean_up_tokenization_spaces=False)
    except Exception as error:  # transformers and tokenizers each raise their own kinds
        line = first_line(error)
        raise CdlmError(f"the tokenizer of {folder} cannot be read ({line}); copy it again") from error
    _check_tokenizer(folder, tokenizer, constants, rows)
    return tokenizer


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, constants: Constants, rows: int) -> None:
    if len(tokenizer) > rows:
        raise CdlmError(f"the tokenizer of {folder} has {len(tokenizer)} tokens, the model {rows}: of another model")
    mask = tokenizer.added_tokens_decoder.get(constants.mask_id)
    if mask is None:
        raise CdlmError(
            f"the tokenizer of {folder} has no mask token: token {constants.mask_id}, the mask of config.json,"
            " is none of its added tokens"
        )
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": mask.content})
    if tokenizer.eos_token is None:
        raise CdlmError(f"the tokenizer of {folder} has no end token: set eos_token in its tokenizer_config.json")
    ends = [end for end in (constants.eos_id, constants.eot_id) if end is not None]
    for name, known in (("mask", [constants.mask_id]), ("eos", ends)):
        if known and (found := getattr(tokenizer, f"{name}_token_id")) not in known:
            raise CdlmError(
                f"the {name} token of {folder} is {found} in the tokenizer and {known[0]} in config.json:"
                " they are of different models"
            )
