"""A denoiser with a closed form: independent tokens of known frequencies and a known embedding table.

The posterior of a position given its noisy state is p(w) exp(-||z - e_w||^2 / 2 t^2), so no training is needed and
everything above the denoiser can be tested exactly, in float64.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from setups import diffusion
from torch import Tensor, nn

from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.sampler import DiffusionLoop
from cdlm.continuous.schedules import TimeWarp
from cdlm.core.rng import StepNoise
from cdlm.core.types import Condition, Prediction


def draws(rows: int = 1, step: int = 0) -> StepNoise:
    """Where the random numbers of a step come from."""
    return StepNoise(0, range(rows), [step] * rows)


def sigma_of(t: Tensor) -> Tensor:
    """Noise scale of the variance-preserving view."""
    return t * torch.rsqrt(1 + t.square())


class Oracle(Denoiser):
    def __init__(self, vocab: int = 7, dim: int = 5, seed: int = 0, t_min: float = 0.05, t_max: float = 20.0):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(vocab, dim, generator=generator, dtype=torch.float64)
        self.dim, self.rho, self.calls = dim, math.sqrt(dim), 0
        self.table = self.rho * nn.functional.normalize(table, dim=-1)
        self.frequencies = torch.rand(vocab, generator=generator, dtype=torch.float64).add(0.2)
        self.frequencies /= self.frequencies.sum()
        self.schedule = TimeWarp(t_min * self.rho, t_max * self.rho)

    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        self.calls += len(z)
        distance = (z[:, :, None] - self.table).square().sum(-1)  # no matrix product: bit for bit in any batch
        logits = self.frequencies.log() - distance / (2 * t.square())[:, None, None]
        return Prediction(logits, self.expect(logits))

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.table[tokens]

    def mix(self, weights: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        return (weights[..., None] * self.table).sum(-2)


class Call(NamedTuple):
    """What a denoiser was shown in one call, and the estimate that it gave."""

    prompted: bool
    shown: Tensor
    x0: Tensor


class SelfConditioned(Oracle):
    """An oracle that reads the prompt and its previous estimate as well, and remembers its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Call] = []

    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        told = 0.3 * condition.x0 + 0.2 * condition.clean.sum(1, keepdim=True)
        logits = super().denoise(z, t, condition).logits + (told[:, :, None] * self.table).sum(-1)
        made = Prediction(logits, self.expect(logits))
        self.seen.append(Call(bool(condition.clean.any()), condition.x0.detach().clone(), made.x0.detach().clone()))
        return made


def loop(
    denoiser: Denoiser, batch_size: int = 4, *, kind: type[DiffusionLoop] = DiffusionLoop, **settings: Any
) -> DiffusionLoop:
    """A run of the product's loop: `kind` may be a subclass that puts recorded noise in place of fresh noise."""
    return kind(denoiser, *diffusion(**settings), batch_size)
