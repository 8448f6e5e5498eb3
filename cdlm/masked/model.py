"""The contract between masked models and everything that decodes with them."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

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
    def logits(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        """One call of the network, [b n v], or with `positions` [k v].

        Unshifted, as the network gives them, in float32 or float64; the caller may write into the result.

        Args:
            valid: False on padding, which may stand on either side; None: there is none.
            positions: the places in `tokens.flatten()` that logits are wanted of. At a real vocabulary these are most
                of the memory and much of the work: compute no others.
        """

    def nats(self, text: Text, settings: LikelihoodSettings, progress: Progress | None = None) -> dict[str, Nats]:
        return likelihood.nats(self, text, settings, progress)


def at_positions(
    values: Shaped[Tensor, " ..."], tokens: Int[Tensor, "b n"], positions: Int[Tensor, " k"] | None
) -> Shaped[Tensor, " ..."]:
    """Of values of all positions [b n ...], hidden states or logits, those that are asked for [k ...].

    Args:
        positions: None asks for all of them, as they are.

    Raises:
        CdlmError: the values are not of the positions of these tokens.
    """
    if values.ndim != 3 or values.shape[:2] != tokens.shape:
        raise CdlmError(
            f"the model gave logits of shape {list(values.shape)}, expected {list(tokens.shape)} positions, each with"
            " the logits of a vocabulary"
        )
    return values if positions is None else values.flatten(0, 1)[positions]


LogitsFn = Callable[..., Tensor]
"""(tokens [b n], attention mask [b n] or None) -> logits [b n v]; or, with a third parameter called `positions`, places
in `tokens.flatten()`, -> logits [k v] of these."""


def takes_positions(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter `positions`."""
    try:
        return "positions" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some functions written in C nothing is known
        return False


def _check_called(function: LogitsFn, picks: bool) -> None:
    """Raise if a function cannot be called as a masked model is."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, **({"positions": None} if picks else {}))
    except TypeError as error:
        raise CdlmError(
            "logits_fn is called as logits_fn(tokens, attention_mask), and with positions=... if it has such a"
            f" parameter, and this one cannot be: {error}"
        ) from None


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
        self.picks = takes_positions(logits_fn)
        _check_called(logits_fn, self.picks)
        """Whether the function gives logits of the positions that it is asked for."""
        self._device = torch.device(resolve_device(device))

    @property
    def device(self) -> torch.device:
        return self._device

    def logits(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        asked = positions if self.picks else None
        found = self.logits_fn(tokens, valid) if asked is None else self.logits_fn(tokens, valid, positions=asked)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else shown(found)
            raise CdlmError(f"logits_fn must give floating-point logits [rows, positions, vocabulary], got {kind}")
        if asked is not None and (found.ndim != 2 or len(found) != len(asked)):
            raise CdlmError(
                f"logits_fn was asked for the logits of {len(asked)} positions, expected [{len(asked)}, vocabulary],"
                f" got {list(found.shape)}: select hidden states, hidden.flatten(0, 1)[positions], before the head, or"
                " leave out the parameter positions"
            )
        wanted = at_positions(found, tokens, positions) if asked is None else found
        return wanted.to(torch.promote_types(found.dtype, torch.float32), copy=wanted is found)  # theirs is not ours


class CachedModel(MaskedModel):
    """A masked model whose keys and values can be kept while a block is decoded."""

    @abstractmethod
    def fill(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> tuple[Float[Tensor, "*s v"], Cache]:  # fmt: skip
        """As `logits`, with the keys and values of every position."""

    @abstractmethod
    def partial(
        self,
        tokens: Int[Tensor, "b q"],
        slots: Int[Tensor, "b q"],
        cache: Cache,
        valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:
        """A call for some positions alone, [b q v], or with `positions` [k v].

        They attend to all n, with the cached keys and values of the others.

        Args:
            slots: place of each token in its row, which may differ between rows.
            cache: from `fill`; what stands at the slots is written over in it, for later calls too.
            valid: of the whole rows.
            positions: the places in `tokens.flatten()` that logits are wanted of.
        """


@runtime_checkable
class Refiner(Protocol):
    """A layer on top of a model, which says what it would say if some tokens more were given."""

    def __call__(
        self, hidden: Float[Tensor, "b n d"], tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None,
        positions: Int[Tensor, " k"],
    ) -> Float[Tensor, "k v"]:  # fmt: skip
        """Logits of some places in `tokens.flatten()`, as the network gives them.

        Args:
            hidden: of an earlier call of the model.
            tokens: as they are now.
        """
        ...


class LayeredModel(MaskedModel):
    """A masked model that can be called in parts. `read(hidden(tokens))` are its logits."""

    def refiner(self, folder: Path) -> Refiner:
        """The layer that `cdlm train-sampler` wrote for this model."""
        from cdlm.masked.joint import read_layer

        return read_layer(folder, self)

    @abstractmethod
    def hidden(self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """Hidden states after the last block, before the norm in front of the head."""

    @abstractmethod
    def read(self, hidden: Float[Tensor, "k d"]) -> Float[Tensor, "k v"]:
        """Logits of hidden states, float32 or more."""

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n e"]:
        """Vectors of tokens, as the network gets them."""

    @abstractmethod
    def last_block(self) -> nn.Module:
        """A copy of the last block, with gradients."""

    @abstractmethod
    def through(
        self, block: nn.Module, hidden: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n d"]:
        """Hidden states after such a block."""


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
