"""The contract between masked models and everything that decodes with them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import check_object, shown
from cdlm.core.devices import resolve_device
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import LikelihoodSettings, Nats, Progress, Text
from cdlm.core.types import Constants
from cdlm.masked import likelihood
from cdlm.sampling.session import Model, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Cache = Any
"""Keys and values of whole rows: a nest of row-first tensors, so that rows can be dropped, added and reordered."""


class MaskedModel(Model):
    """`tokens -> logits`, row by row: no row sees another. Decoding sees nothing else of a model."""

    constants: Constants
    ends = True
    whole_rows = False
    batch_size = 4
    vocab: int | None = None
    """Tokens that it knows; None if that is not known before it is called."""

    @property
    def defaults(self) -> Sampling:
        """One position a step: Dream's sampler where logits are shifted, else LLaDA's, at temperature 0."""
        from cdlm.masked.sampler import Unmasking
        from cdlm.policies.dream import Dream
        from cdlm.policies.llada import LLaDA

        return Unmasking(Dream() if self.constants.shift else LLaDA())

    @property
    def mask_id(self) -> int:  # type: ignore[override]  # every masked model has one; here it follows from constants
        return self.constants.mask_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.constants.end_ids if self.ends else ()

    @abstractmethod
    def logits(self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n v"]:
        """One call of the network. `valid` is False on padding, which may stand on either side; None: there is none.

        Unshifted, as the network gives them, in float32 or float64; the caller may write into the result.
        """

    def nats(self, text: Text, settings: LikelihoodSettings, progress: Progress | None = None) -> dict[str, Nats]:
        return likelihood.nats(self, text, settings, progress)


LogitsFn = Callable[[Tensor, Tensor | None], Tensor]
"""(tokens [b n], attention mask [b n] or None) -> logits [b n v]."""


class Function(MaskedModel):
    """A masked model that is a plain function; its logits may be of any precision and are read as float32 or more."""

    batch_size = 64
    reads_names = True

    def __init__(
        self, logits_fn: LogitsFn, constants: Constants, tokenizer: PreTrainedTokenizerFast | None = None,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        if not callable(logits_fn) or isinstance(logits_fn, type):
            raise CdlmError(f"a function of tokens was expected, got {shown(logits_fn)}")
        check_object("a function of tokens", Constants, constants=constants)
        self.logits_fn, self.constants, self.tokenizer = logits_fn, constants, tokenizer
        self._device = torch.device(resolve_device(device))

    @property
    def device(self) -> torch.device:
        return self._device

    def logits(self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n v"]:
        found = self.logits_fn(tokens, valid)
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim != 3:
            raise CdlmError(
                "logits_fn must give floating-point logits [rows, positions, vocabulary], got"
                f" {list(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
            )
        return found.to(torch.promote_types(found.dtype, torch.float32), copy=True)  # theirs is not ours to write into


class CachedModel(MaskedModel):
    """A masked model whose keys and values can be kept while a block is decoded."""

    @abstractmethod
    def fill(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n v"], Cache]:
        """As `logits`, with the keys and values of every position."""

    @abstractmethod
    def partial(
        self,
        tokens: Int[Tensor, "b q"],
        slots: Int[Tensor, "b q"],
        cache: Cache,
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b q v"]:
        """A call for some positions alone. They attend to all n, with the cached keys and values of the others.

        Args:
            slots: place of each token in its row, which may differ between rows.
            cache: from `fill`; what stands at the slots is overwritten.
            valid: of the whole rows.
        """


def as_masked_model(model: LogitsFn | MaskedModel, constants: Constants | None) -> MaskedModel:
    """A masked model, or a function from tokens to logits with its constants, as a masked model.

    Raises:
        CdlmError: it is neither, a function comes without constants, or a model with some.
    """
    if isinstance(model, MaskedModel):
        if constants is not None:
            raise CdlmError("the model knows its own constants: leave them out")
        return model
    if isinstance(model, Model | type) or not callable(model):
        raise CdlmError(f"decode needs a masked model or a function of tokens, got a {type(model).__name__}")
    if constants is None:
        raise CdlmError("a model that is a function needs its constants: Constants(mask_id), the token of the mask")
    return Function(model, constants)
