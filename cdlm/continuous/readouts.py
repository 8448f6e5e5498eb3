"""How the tokens of a step are read, where the estimate of the clean vectors does not say them (ELF).

The tokens that a row leaves with are always decoded, by one call. These are about the steps before: what a halting rule
can see of them, and what that costs.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from cdlm.continuous.denoiser import Denoiser
from cdlm.core.checks import Settings, check_whole
from cdlm.core.parsing import Registry
from cdlm.core.types import Condition


class ReadOut(Settings):
    """What is asked at a step besides the estimate."""

    reads: ClassVar[bool] = True
    """Whether steps have a distribution over tokens, and with it every signal."""
    exact: ClassVar[bool] = False
    """Whether that is the one which the row would be read out by."""
    every: int = 1
    """Steps from one reading to the next. Between two a rule is not asked."""

    @property
    def calls(self) -> int:
        """Of the network, for one reading."""
        return int(self.exact)

    @abstractmethod
    def logits(self, denoiser: Denoiser, x0: Float[Tensor, "b n d"], condition: Condition) -> Float[Tensor, "b n v"]:
        """The distribution over tokens, at an estimate."""


@dataclass(frozen=True)
class NoReadOut(ReadOut):
    """Steps have an estimate alone. Rules read distances and angles, such as `FixedPoint`, or count steps."""

    reads: ClassVar[bool] = False

    def logits(self, denoiser: Denoiser, x0: Float[Tensor, "b n d"], condition: Condition) -> Float[Tensor, "b n v"]:
        return x0.new_empty((*x0.shape[:2], 0))


@dataclass(frozen=True)
class Decoder(ReadOut):
    """The estimate is decoded at every k-th step, by a call each. A row that ends at such a step needs no other.

    Args:
        every: k.
    """

    exact: ClassVar[bool] = True
    every: int = 1

    def __post_init__(self) -> None:
        check_whole("Decoder", every=self.every)

    def logits(self, denoiser: Denoiser, x0: Float[Tensor, "b n d"], condition: Condition) -> Float[Tensor, "b n v"]:
        return denoiser.decode(x0, condition)


@dataclass(frozen=True)
class Probe(ReadOut):
    """A linear map of the estimate that was trained beside the model: no call. It serves signals alone."""

    def logits(self, denoiser: Denoiser, x0: Float[Tensor, "b n d"], condition: Condition) -> Float[Tensor, "b n v"]:
        return denoiser.probed(x0)


READ_OUTS: Registry[ReadOut] = Registry("read-out", ReadOut, Decoder, Probe, NoReadOut)
