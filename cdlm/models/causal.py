"""Autoregressive models of other libraries: how networks of transformers are opened, and one as a guide of others."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError
from cdlm.core.tensors import check_values
from cdlm.models import shipped
from cdlm.models.foreign import check_folder, only_errors
from cdlm.models.hub import fingerprint_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""Of a Hub repository, all that a model and its tokenizer may be made of."""


@dataclass(frozen=True)
class Causal:
    """A causal language model for inference: what follows a place depends on the tokens up to there alone.

    It goes to the device of the tokens that it is called with.

    Args:
        path: where it was loaded from.
        digest: a hash of its weights.
    """

    path: str
    digest: str
    network: PreTrainedModel = field(repr=False, compare=False)
    tokenizer: PreTrainedTokenizerFast = field(repr=False, compare=False)

    @classmethod
    def load(cls, path: str) -> Causal:
        """Open a folder, or a model in the local cache of the Hub, from safetensors in the precision of its files.

        Nothing is fetched, and no code of the model's author is run.

        Raises:
            CdlmError: it cannot be found or read.
        """
        from transformers import AutoModelForCausalLM

        place = str(shipped.place_of(path))
        if not Path(place).is_dir() and path.count("/") != 1:
            raise CdlmError(f"there is no folder {shown(path)}: give that of a causal language model, or its Hub id")
        tokenizer, network, _ = opened(place, "a causal language model", AutoModelForCausalLM, "auto", hub=False)
        return cls(path, fingerprint_of(network.state_dict()), network.requires_grad_(False).eval(), tokenizer)

    def __repr__(self) -> str:
        return repr(self.path)

    def __reduce__(self) -> Any:
        return type(self).load, (self.path,)  # other processes open it themselves

    @property
    def vocab(self) -> int:
        """Tokens that it can read."""
        return int(self.network.config.vocab_size)

    @property
    def length(self) -> int | None:
        """Tokens that it can read at once; None if there is no limit."""
        return getattr(self.network.config, "max_position_embeddings", None)

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "b n"], positions: Int[Tensor, " k"]) -> Float[Tensor, "k v"]:
        """Logits of the token that follows each of some places in `tokens.flatten()`, float32 or more."""
        if self.network.device != tokens.device:
            nn.Module.to(self.network, tokens.device)
        row, place = positions // tokens.shape[1], positions % tokens.shape[1]
        some, at = place.unique(return_inverse=True)
        if "logits_to_keep" in inspect.signature(self.network.forward).parameters:
            logits = self.network(input_ids=tokens, use_cache=False, logits_to_keep=some).logits[row, at]
        else:
            logits = self.network(input_ids=tokens, use_cache=False).logits[row, place]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


# --- how they are opened ----------------------------------------------------------------------------------------------


Opened = tuple["PreTrainedTokenizerFast", "PreTrainedModel", dict[str, str]]
"""With the revision of what came from the Hub."""


def opened(source: str, what: str, kind: Any, dtype: torch.dtype | str, hub: bool = True) -> Opened:
    """What is in a folder or on the Hub, or the reason why not in one line.

    Args:
        what: it is, for messages.
        kind: a class of transformers, such as `AutoModelForCausalLM`.
        dtype: of the weights; "auto" is that of the files.
        hub: what is neither a folder nor in the local cache is fetched.
    """
    try:
        read = partial(_read, kind, source, dtype)
        return _local_first(source, read) if hub else read(True)
    except CdlmError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the Hub client each raise their own kinds
        train = " or train one (`cdlm train-judge`)" if what == "a causal language model" else ""
        advice = (
            "Copy the folder again,"
            if Path(source).is_dir()
            else f"Without network, pass a folder downloaded elsewhere (`hf download {source} --local-dir FOLDER`)"
        )
        raise CdlmError(
            f"expected {what} with safetensors weights at {source!r}, got: {in_one_line(error)} {advice}{train}"
        ) from error


def in_one_line(error: Exception) -> str:
    """What another library says, short."""
    said = " ".join(str(error).split())
    if "ignore_mismatched_sizes" in said:
        return "weights of other shapes than config.json asks for."
    return said[:300] if " " in said else f"{type(error).__name__} {said}"


def _local_first(source: str, read: Callable[[bool], Opened]) -> Opened:
    """From the folder or the local cache if it is there, and only otherwise from the Hub."""
    try:
        return read(True)
    except OSError:
        if Path(source).is_dir():
            raise
    _reach_hub(source)
    return read(False)


def _reach_hub(name: str) -> None:
    """Ask once whether the model is there: the loaders themselves retry for most of a minute without network."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # a network, a name or an access problem: all mean that nothing can be loaded
        raise OSError(f"the Hub does not give {name!r} ({type(error).__name__}).") from error


def _read(kind: Any, source: str, dtype: torch.dtype | str, local: bool) -> Opened:
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer

    folder, origin = Path(source), dict[str, str]()
    if not folder.is_dir():
        # Only files at the top, and no weights of other libraries.
        found = snapshot_download(source, local_files_only=local, allow_patterns=FILES, ignore_patterns=["*/*"])
        folder, origin = Path(found), {"revision": Path(found).name}
    if not (folder / "config.json").exists():
        raise OSError(f"no config.json in {folder}.")  # a copy in the cache that was not finished
    check_folder(folder)
    tokenizer = with_offsets(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    with only_errors():  # and no bar in a notebook
        model, info = kind.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    check_values(folder, complete(model, info).state_dict())
    return tokenizer, model, origin


def with_offsets(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The tokenizer, if it is a fast one."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"a tokenizer without character offsets ({type(tokenizer).__name__}).")
    return tokenizer


def complete(model: PreTrainedModel, info: Mapping[str, Any]) -> PreTrainedModel:
    """Refuse weights that transformers would fill with random numbers, and layers that it would leave out; a pooling
    head is never used."""
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(f"weights without {missing[0]}.")
    layers = {_layer(name) for name in model.state_dict()} - {None}
    stacks = {stack for stack, _ in filter(None, layers)}
    more = {name: layer for name in info["unexpected_keys"] if (layer := _layer(name)) and layer[0] in stacks}
    if left := sorted(name for name, layer in more.items() if layer not in layers):
        raise ValueError(f"more layers in the weights than in config.json, such as {left[0]}.")
    return model


def _layer(name: str) -> tuple[str, str] | None:
    """Of the name of a tensor, the stack of layers and the number in it."""
    found = re.match(r"(.*?\.)(\d+)\.", name)
    return found and (found[1], found[2])
