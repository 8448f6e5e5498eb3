"""Folders of other libraries' models, whose safetensors files are looked at before anything is built from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from msgspec import Meta

from cdlm.core.errors import CdlmError
from cdlm.core.files import read_json
from cdlm.core.schema import checked
from cdlm.core.tensors import FLOATS, Spec, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ATTENTION = (None, "eager", "sdpa")
"""What a config.json may ask for: transformers may fetch others from the Hub."""
COUNTED = re.compile(r"layers?$|^n_layers?$|labels$|experts$")
"""Settings that say how often something is built; each time has a tensor of its own."""
LAYERS = frozenset({"num_hidden_layers", "num_layers", "n_layer", "n_layers"})


class Index(TypedDict):
    """An index of weights in several files; it may say more."""

    weight_map: dict[str, str]
    """The file of each tensor."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Links are followed, since the cache of the Hub is made of them.

    Raises:
        CdlmError: there are none, or the index names a place that is not beside it.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    file = folder / INDEX
    if not file.exists():
        raise CdlmError(f"{folder} has neither {WEIGHTS} nor {INDEX}: copy the weights, or convert them to safetensors")
    index = checked(read_json(file, "a checkpoint"), Index, str(file), "it is no index of weights; copy it again")
    names = sorted(set(index["weight_map"].values()))
    if outside := [name for name in names if Path(name).name != name or "\0" in name]:
        raise CdlmError(f"{file} names {outside[0]!r}, expected files beside it; copy the folder again")
    return [folder / name for name in names]


def read_specs(folder: Path) -> dict[str, Spec]:
    """Shape and type of each of the folder's tensors; nothing of their content is read.

    Raises:
        CdlmError: a file is missing or damaged, or a tensor is in two of them.
    """
    specs: dict[str, Spec] = {}
    for file in weight_files(folder):
        more = read_header(file).specs
        if twice := specs.keys() & more.keys():
            raise CdlmError(f"{file} has tensor {min(twice)!r}, and so has a file before it: copy the folder again")
        specs |= more
    if not specs:
        raise CdlmError(f"{folder} has weights without a tensor: copy it again")
    return specs


class TokenizerSettings(TypedDict, total=False):
    """What is used of a tokenizer_config.json; it says more."""

    model_max_length: Annotated[int, Meta(gt=0)] | Annotated[float, Meta(gt=0)] | None
    bos_token: str | dict[str, Any] | None
    eos_token: str | dict[str, Any] | None
    unk_token: str | dict[str, Any] | None
    sep_token: str | dict[str, Any] | None
    pad_token: str | dict[str, Any] | None
    mask_token: str | dict[str, Any] | None
    clean_up_tokenization_spaces: bool | None


def check_tokenizer(folder: Path) -> None:
    """Raise if the settings of a folder's tokenizer are there and are of other kinds: the library takes them as they
    are. A place that they name is not looked at."""
    file = folder / "tokenizer_config.json"
    if file.exists():
        checked(read_json(file, "a tokenizer"), TokenizerSettings, str(file), "copy it again")


def foreign_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, of the class that the folder names; no code of its author is run.

    One without an end-of-text token that separates texts, as BERT's does with [SEP], ends a text with that token.

    Raises:
        CdlmError: its settings are of other kinds.
        Exception: the library cannot read it.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    with only_errors():  # a config.json of a model that transformers does not know is no concern of a tokenizer
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """64 hex digits that depend on how text becomes ids and on the special ids, not on names or on earlier calls."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting_of_last_call in ("truncation", "padding"):
        backend.pop(setting_of_last_call, None)
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id]
    return hashlib.sha256(json.dumps([backend, special], sort_keys=True).encode()).hexdigest()


_ONE = Lock()


def import_transformers() -> None:
    """Import transformers, one thread at a time: when its import ends, another module stands in its place, and a thread
    that has waited for it outside of this function is left with the first, which is empty."""
    with _ONE:
        import_module("transformers")


@contextmanager
def only_errors() -> Iterator[None]:
    """Silence the warnings and the progress of transformers, for the block."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def check_folder(folder: Path) -> None:
    """Raise unless transformers can open a folder with nothing but what is in it, in the memory that its files need.

    Names of code in `auto_map` are not looked at by anything, and need no check.

    Raises:
        CdlmError: config.json asks for quantised weights, for attention from elsewhere or for more layers than there
            are tensors, the weights are not floats, or the folder holds an adapter of another model.
    """
    if (folder / "adapter_config.json").exists():
        raise CdlmError(f"{folder} holds an adapter, which names another model: merge the two, and give the folder")
    check_tokenizer(folder)
    config, specs = read_json(folder / "config.json", "a model of transformers"), read_specs(folder)
    for name, value in _settings(config):
        _check_setting(folder / "config.json", name, value, len(specs))
    for name, (shape, dtype) in specs.items():
        matrix = name.endswith("weight") or (name.endswith("bias") and len(shape) == 1)  # others may be masks
        if matrix and dtype not in FLOATS:
            kind = str(dtype).removeprefix("torch.")
            raise CdlmError(f"tensor {name!r} of {folder} is {kind}, expected floats: take the unquantised model")


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings by name, those of parts included."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict):
            yield from _settings(value)


def _check_setting(file: Path, name: str, value: Any, tensors: int) -> None:
    if name == "quantization_config" and value is not None:
        raise CdlmError(f"{file} has a {name}: take the unquantised model, or a GGUF file of it")
    if name.endswith(("attn_implementation", "experts_implementation")) and value not in ATTENTION:
        raise CdlmError(f"{file} has {name} {value!r}, expected eager or sdpa, which need no other code: delete it")
    if isinstance(value, int) and COUNTED.search(name):
        if value > tensors:
            raise CdlmError(f"{file} has {name} {value}, and the weights are {tensors} tensors: copy both again")
        if name in LAYERS and value < 1:
            raise CdlmError(f"{file} has {name} {value}, expected a layer or more: copy it again")
