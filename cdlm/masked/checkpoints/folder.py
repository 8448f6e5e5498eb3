"""The files of a foreign checkpoint: settings, weights and tokenizer, read strictly and without running any code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import read_json
from cdlm.core.tensors import Spec, read_tensors, same_specs, specs_of
from cdlm.core.types import Constants
from cdlm.masked.checkpoints.family import Family, Settings
from cdlm.models.foreign import check_tokenizer, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_settings(folder: Path) -> Settings:
    """The folder's config.json."""
    return Settings(folder / "config.json", read_json(folder / "config.json", "a checkpoint"))


def read_stops(folder: Path, constants: Constants, rows: int) -> tuple[int, ...]:
    """Further stop tokens that the folder's generation_config.json names as ends; none without the file.

    Nothing else of it is read. Its other settings are mostly no choice of anybody: transformers writes the defaults of
    Dream's class, which sample otherwise than its authors, and those of the autoregressive model that Dream began as.

    Raises:
        CdlmError: its ends are no tokens of the model.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return ()
    settings = Settings(file, read_json(file, "a checkpoint"))
    found = settings.values.get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    for end in ends:
        if type(end) is not int or not 0 <= end < rows or end == constants.mask_id:
            raise settings.wrong("eos_token_id", f"one or a list of the {rows} tokens, without the mask")
    return tuple(dict.fromkeys(end for end in ends if end not in constants.end_ids))


def check_sizes(settings: Settings, family: Family, specs: Mapping[str, Spec]) -> None:
    """Raise if config.json asks for more layers than there are tensors, or for wider ones than any of them: such a
    network is not built."""
    for name, what, most in (
        (family.layers, "the number of tensors", len(specs)),
        (family.width, "the largest size of a tensor", max(max(spec.shape, default=0) for spec in specs.values())),
    ):
        if settings.count(name) > most:
            raise settings.wrong(name, f"at most {most}, {what} in the weights: copy both again")


def load_weights(network: PreTrainedModel, family: Family, folder: Path, dtype: torch.dtype | None) -> None:
    """Give the network the folder's tensors, which must be exactly those of its architecture, and freeze them.

    Args:
        dtype: to convert them to; None: that of the embedding table in the files, which then stay mapped from disk.

    Raises:
        CdlmError: a tensor is missing, unknown, of another shape or not of floats, or a file cannot be read.
    """
    found = read_weights(folder)
    wanted = specs_of(network.state_dict())
    if tied := bool(network.config.tie_word_embeddings):
        del wanted[HEAD]
        found.pop(family.official(HEAD), None)  # the official code ignores a head beside a tied table
    same_specs(folder, {family.official(name): spec for name, spec in wanted.items()}, specs_of(found))
    kind = dtype or found[family.official(TABLE)].dtype
    state = {name: found[family.official(name)].to(kind) for name in wanted}
    network.load_state_dict(state | {HEAD: state[TABLE]} if tied else state, assign=True)
    network.tie_weights()
    network.requires_grad_(False).eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors, mapped from disk."""
    return {name: value for file in weight_files(folder) for name, value in read_tensors(file).items()}


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
    check_tokenizer(folder)
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
