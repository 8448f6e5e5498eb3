"""How a prediction becomes the clean estimate that drives the state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cdlm.core.checks import Settings, check_number
from cdlm.core.devices import refined
from cdlm.core.parsing import Registry
from cdlm.core.rng import StepNoise

if TYPE_CHECKING:
    from cdlm.continuous.denoiser import Denoiser


class Projection(Settings, ABC):
    """From logits to a clean estimate."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, logits: Float[Tensor, "b n v"], draws: StepNoise) -> Float[Tensor, "b n d"]:
        """`draws` is where random numbers of this step come from."""


@dataclass(frozen=True)
class Expectation(Projection):
    """The mean embedding under softmax(logits): what interpolates the score (CDCD, arXiv 2211.15089, section 3.1)."""

    def __call__(self, denoiser: Denoiser, logits: Float[Tensor, "b n v"], draws: StepNoise) -> Float[Tensor, "b n d"]:
        return denoiser.expect(logits)


@dataclass(frozen=True)
class Greedy(Projection):
    """The embedding of the most likely token (SSD-LM, section 3.3; CDCD calls it clamping and finds it harmful)."""

    def __call__(self, denoiser: Denoiser, logits: Float[Tensor, "b n v"], draws: StepNoise) -> Float[Tensor, "b n d"]:
        return denoiser.embed(logits.argmax(-1))


@dataclass(frozen=True)
class Drawn(Projection):
    """The embedding of one token drawn from the nucleus (SSD-LM, section 3.3, "sampling").

    Args:
        top_p: mass of the nucleus in [0, 1]: tokens before which less than `top_p` is reached, at least one.
    """

    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_number("Drawn", least=0, most=1, top_p=self.top_p)

    def __call__(self, denoiser: Denoiser, logits: Float[Tensor, "b n v"], draws: StepNoise) -> Float[Tensor, "b n d"]:
        kept = nucleus(logits, self.top_p)
        # Gumbel-max in float64: in float32 the noise has a largest value, and rare tokens are lost.
        gumbel = -(-draws.uniform(logits).clamp(min=1e-300).log()).log()
        scores = refined(logits).masked_fill(~kept, -torch.inf)
        scores = scores + gumbel.to(scores)
        return denoiser.embed(scores.argmax(-1))


@dataclass(frozen=True)
class MultiHot(Projection):
    """Every token of the nucleus at full weight: on SSD-LM's simplex +K for each, -K for the others (section 3.3).

    Args:
        top_p: see `Drawn`; 0 is greedy.
    """

    top_p: float = 0.2

    def __post_init__(self) -> None:
        check_number("MultiHot", least=0, most=1, top_p=self.top_p)

    def __call__(self, denoiser: Denoiser, logits: Float[Tensor, "b n v"], draws: StepNoise) -> Float[Tensor, "b n d"]:
        return denoiser.mix(nucleus(logits, self.top_p).to(logits.dtype))


@dataclass(frozen=True)
class Uneven(Projection):
    """The nucleus with the gaps between its logits: on SSD-LM's simplex K for the most likely token, less by the gap
    for each other one of it, and -K for the rest, which is also the least (its release calls it "uneven").

    Args:
        top_p: see `Drawn`; 0 is greedy.
    """

    top_p: float = 0.2

    def __post_init__(self) -> None:
        check_number("Uneven", least=0, most=1, top_p=self.top_p)

    def __call__(self, denoiser: Denoiser, logits: Float[Tensor, "b n v"], draws: StepNoise) -> Float[Tensor, "b n d"]:
        gap = logits.amax(-1, keepdim=True) - logits
        edge = 2 * denoiser.rho / math.sqrt(denoiser.dim)  # 2 K: from weight 0 to weight 1
        return denoiser.mix((1 - gap / edge).clamp(min=0) * nucleus(logits, self.top_p))


def nucleus(logits: Float[Tensor, "*b n v"], top_p: float) -> Bool[Tensor, "*b n v"]:
    """The most likely tokens, each with less than `top_p` before it; the first is always one of them."""
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    kept[..., 1:] = ordered.cumsum(-1)[..., :-1] < top_p
    return torch.zeros_like(kept).scatter_(-1, order, kept)


PROJECTIONS: Registry[Projection] = Registry("projection", Projection, Expectation, Greedy, Drawn, MultiHot, Uneven)
