"""Randomness keyed by what it is for: no result depends on the batch, the device or the history of a process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a pure function of non-negative integers such as (seed, purpose, index)."""
    # The length is a part of the key, since the hash does not tell (1,) from (1, 0).
    state = np.random.SeedSequence([len(key), *key]).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 32 | int(state[1]))


def row_normal(seed: int, indices: Sequence[int], *shape: int) -> Float[Tensor, "b ..."]:
    """Standard normal numbers [b, *shape]: sample i draws the same ones in any batch, order or batch size.

    Drawn on the CPU in float32, so that a run on a GPU starts from the noise of a run on a CPU.
    """
    return torch.stack([torch.randn(shape, generator=generator(seed, index)) for index in indices])


NORMAL, UNIFORM = 1, 2
"""What the numbers of a step are for: the last word of their key."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Random numbers of one step of the rows in flight: row r's depend on the seed, its index and its step alone.

    Drawn on the CPU, like the noise that a row starts from.
    """

    seed: int
    index: Int[Tensor, " b"]
    """Number of each row's sample."""
    step: Int[Tensor, " b"]
    """Steps that each row has taken, those of its earlier blocks included."""

    def normal(self, like: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Standard normal numbers in the shape and type of `like`."""
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in self._each(NORMAL)]).to(like)

    def uniform(self, like: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Numbers in [0, 1) in the shape of `like`, float64."""
        numbers = [torch.rand(like.shape[1:], generator=g, dtype=torch.float64) for g in self._each(UNIFORM)]
        return torch.stack(numbers).to(like.device)

    def _each(self, purpose: int) -> list[torch.Generator]:
        pairs = zip(self.index.tolist(), self.step.tolist(), strict=True)
        return [generator(self.seed, index, step, purpose) for index, step in pairs]
