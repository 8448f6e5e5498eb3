"""The space of a frozen encoder: tokens to normalised contextual vectors (ELF, arXiv 2605.10938, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor, nn

from cdlm.continuous.vector_cache import VectorCache
from cdlm.core.checks import check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_places
from cdlm.models import hub
from cdlm.models.encoder import PREFIX, Encoder, config_of, fingerprint_of, tokenizer_of
from cdlm.models.foreign import tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENOUGH = 50_000
"""Tokens that mean and standard deviation are estimated on."""


class EncoderSpace(nn.Module):
    """Tokens as contextual vectors of a frozen encoder, normalised: (e - mean) / std, with one mean and one standard
    deviation for all dimensions.

    The encoder is any network of Hugging Face that gives one vector a token: an encoder (BERT, RoBERTa, MiniLM), the
    encoder of an encoder-decoder (T5), or a causal model (GPT-2), whose vectors depend on what stands before alone. It
    is no part of this module: neither its weights nor its mode are, copies share it, and it is read when vectors are
    first asked for. A trained model samples without it.

    Args:
        source: folder of the encoder, or its Hub id.
        dim: length of a vector.
        fingerprint: of the encoder, from `open`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, source: str, dim: int, fingerprint: str):
        super().__init__()
        check_whole("an encoder's space", dim=dim)
        self.source, self.dim, self.fingerprint = source, dim, fingerprint
        self.encoder = Encoder(source, dim, fingerprint)
        self.cache: VectorCache | None = None
        self.register_buffer("mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("std", torch.ones((), dtype=torch.float32))

    @classmethod
    def open(cls, folder: str) -> EncoderSpace:
        """The space of the encoder in a folder, or on the Hub, whose files are then fetched. Not yet fitted.

        Only safetensors are read, and no code of the model's author is run.

        Raises:
            CdlmError: there is no such folder, or it holds no encoder with a fast tokenizer.
        """
        path = hub.locate(folder)
        return cls(folder, config_of(path).hidden_size, fingerprint_of(path))

    def forward(self, tokens: Int[Tensor, "b n"], seen: Bool[Tensor, "b n"]) -> Float32[Tensor, "b n d"]:
        """Normalised vectors; zero where `seen` is false.

        Args:
            tokens: ids of the run's tokenizer, without tokens that the encoder's own may put around a text.
            seen: positions that are read. The others change nothing, wherever they are.

        Raises:
            CdlmError: the encoder is not there or is another one, or the rows are longer than it can read.
        """
        if self.cache is None:
            vectors = self.encoder(tokens, seen)
        else:
            vectors = self.cache.through(self.encoder, tokens, seen)
        normal = (vectors - self.mean.float()) / self.std.float()
        return normal.masked_fill(~seen[..., None], 0.0)

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Estimate mean and standard deviation over the first `ENOUGH` tokens, or all if there are fewer.

        Args:
            batches: of tokens and `seen`, as `forward` takes them. No more are taken than are needed.

        Raises:
            CdlmError: no token is seen, or all vectors are one number.
        """
        count, total, squares = 0, 0.0, 0.0
        for tokens, seen in batches:
            vectors = self.encoder(tokens, seen)[seen].cpu().double()
            count, total, squares = (
                count + len(vectors),
                total + vectors.sum().item(),
                squares + vectors.square().sum().item(),
            )
            if count >= ENOUGH:
                break
        if not count:
            raise CdlmError("an encoder's space is fitted on text, got none: give batches in which tokens are seen")
        mean = total / count / self.dim
        variance = squares / count / self.dim - mean**2
        if not 0 < variance < math.inf:
            raise CdlmError(f"the vectors of the encoder {self.source} have variance {variance}: take another encoder")
        self.mean.fill_(mean)
        self.std.fill_(math.sqrt(variance))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raise unless a tokenizer is the encoder's own.

        Raises:
            CdlmError: it is another one, or has more tokens than the encoder knows.
        """
        own = tokenizer_of(self.encoder.folder)
        if tokenizer_hash(tokenizer) != tokenizer_hash(own):
            raise CdlmError(
                f"the run has a tokenizer of {len(tokenizer)} tokens, and the encoder {self.source} one of its own with"
                f" {len(own)}: set tokenizer: {self.source} in the run"
            )
        known = config_of(self.encoder.folder).vocab_size
        if len(tokenizer) > known:
            raise CdlmError(
                f"the tokenizer of the encoder {self.source} has {len(tokenizer)} tokens, and its weights know {known}:"
                " copy both again"
            )

    def use_cache(self, folder: Path) -> None:
        """Keep vectors on disk from now on, as float16: `dim` * 2 bytes a token.

        Whether a row is there already or not, its vectors pass through float16. Several processes may use one folder.

        Raises:
            CdlmError: it cannot be written.
        """
        cache = VectorCache(folder / f"{self.fingerprint.removeprefix(PREFIX)[:32]}.sqlite", self.dim)
        check_places(cache.file)
        self.cache = cache
