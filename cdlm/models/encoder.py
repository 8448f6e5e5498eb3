"""Encoders of other libraries: networks of transformers that turn tokens into hidden states."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor, nn

from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import read_json
from cdlm.core.tensors import read_tensors
from cdlm.models import hub
from cdlm.models.causal import FILES, in_one_line, opened
from cdlm.models.foreign import check_folder, foreign_tokenizer, only_errors, tokenizer_hash, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INCIDENTAL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Settings of a config.json that change no vector."""
PREFIX = "encoder:"
"""How a fingerprint of an encoder begins."""


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder in float32 and evaluation mode, which is read when it is first called.

    Args:
        source: its folder, or Hub id.
        dim: length of its vectors.
        fingerprint: that it must have.
    """

    source: str
    dim: int
    fingerprint: str

    def __deepcopy__(self, memo: Any) -> Encoder:
        return self

    def __reduce__(self) -> Any:
        return type(self), (self.source, self.dim, self.fingerprint)  # other processes read it themselves

    @cached_property
    def folder(self) -> Path:
        """Where it is, after a check that it is the right one.

        Raises:
            CdlmError: it is not there, or another one is.
        """
        path, found = _present(self.source), ""
        if path is not None:
            found = fingerprint_of(path)
        if path is None or found != self.fingerprint:
            what = "is not there" if path is None else f"is another one, of fingerprint {found[:24]}"
            raise CdlmError(
                f"the encoder {shown(self.source, 300)} {what}: copy the one that the model was trained with"
                f" (fingerprint {self.fingerprint[:24]}) to that place; sampling without a prompt needs no encoder"
            )
        return path

    @cached_property
    def network(self) -> PreTrainedModel:
        """The network, on the device of the last call."""
        _, network = open_encoder(str(self.folder), hub=False)
        return network.requires_grad_(False)

    @cached_property
    def length(self) -> int | None:
        """Tokens that it can read at once; None if there is no limit, as with relative positions."""
        limit = getattr(self.network.config, "max_position_embeddings", None)
        if limit is None or limit < 1:
            return None
        for name, part in self.network.named_modules():  # RoBERTa counts from behind its padding token
            if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
                return limit - part.padding_idx - 1
        return limit

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "b n"], seen: Bool[Tensor, "b n"]) -> Float32[Tensor, "b n d"]:
        """Its last hidden states; those of positions that are not seen mean nothing."""
        if self.length is not None and tokens.shape[1] > self.length:
            raise CdlmError(
                f"rows of {tokens.shape[1]} tokens are longer than the encoder {self.source} can read, {self.length}:"
                " lower length, or take another encoder"
            )
        if not seen.any():
            return torch.zeros(*tokens.shape, self.dim, device=tokens.device)
        if self.network.device != tokens.device:
            nn.Module.to(self.network, tokens.device)
        mask = seen | ~seen.any(1, keepdim=True)  # a row must have something to attend to
        with torch.autocast(tokens.device.type, enabled=False):
            # One id for all that is not seen: RoBERTa counts positions by the ids.
            said = self.network(input_ids=tokens.masked_fill(~seen, 0), attention_mask=mask.long())
        vectors = said.last_hidden_state
        if vectors.shape[-1] != self.dim:
            raise CdlmError(
                f"the encoder {self.source} gives vectors of {vectors.shape[-1]}, and {self.dim} were expected"
            )
        return vectors.float()


def _present(source: str) -> Path | None:
    """The folder of that path or of that Hub id in the local cache; None if there is none. Nothing is fetched."""
    from huggingface_hub import snapshot_download

    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, local_files_only=True, allow_patterns=FILES))
    except Exception:  # a path that is no Hub id, or an id that is not in the cache
        return None


def config_of(folder: Path) -> Any:
    """The configuration of an encoder, as transformers reads it.

    Raises:
        CdlmError: there is none, or not that of a network with hidden states of one size and a vocabulary.
    """
    from transformers import AutoConfig

    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the library raises of odd values
        raise CdlmError(f"{folder} holds no encoder of Hugging Face: {in_one_line(error)}") from error
    if not all(type(getattr(config, name, None)) is int for name in ("hidden_size", "vocab_size")):
        raise CdlmError(
            f"{folder / 'config.json'} has no hidden_size and vocab_size: expected an encoder of text, with one vector"
            " a token"
        )
    return config


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of an encoder.

    Raises:
        CdlmError: there is none, or it cannot be read.
    """
    if not (folder / "tokenizer.json").exists():
        raise CdlmError(
            f"{folder} has no tokenizer.json: take an encoder with a fast tokenizer, or save its tokenizer as one"
        )
    try:
        return foreign_tokenizer(folder)
    except CdlmError:
        raise
    except Exception as error:  # transformers and tokenizers each raise their own kinds
        raise CdlmError(f"the tokenizer of {folder} cannot be read ({first_line(error)}); copy it again") from error


def fingerprint_of(folder: Path) -> str:
    """A hash of all that decides an encoder's vectors: weights, settings and tokenizer.

    Raises:
        CdlmError: one of them is missing or cannot be read.
    """
    check_folder(folder)
    settings = read_json(folder / "config.json", "an encoder")
    weights = {name: value for file in weight_files(folder) for name, value in read_tensors(file).items()}
    kept = {name: value for name, value in settings.items() if name not in INCIDENTAL}
    parts = [hub.fingerprint_of(weights), kept, tokenizer_hash(tokenizer_of(folder))]
    return PREFIX + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_encoder(name: str, device: str = "cpu", hub: bool = True) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """Any network of Hugging Face that turns text into hidden states, from safetensors in float32, without its head.

    Of an encoder-decoder it is the encoder. The global random state is left as it was.

    Args:
        hub: what is neither a folder nor in the local cache is fetched.

    Raises:
        CdlmError: it cannot be found or read.
    """
    with torch.random.fork_rng(devices=[]), only_errors():  # a pooling head that is not there is drawn, and not used
        tokenizer, model, _ = opened(name, "an encoder", _Headless, torch.float32, hub)
    network: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    return tokenizer, network.to(device).eval()


class _Headless:
    """What `opened` takes for a class of transformers: the encoder alone where there is a class for it."""

    @staticmethod
    def from_pretrained(folder: Path, **settings: Any) -> Any:
        from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        return kind.from_pretrained(folder, **settings)
