"""All randomness, keyed by what it is for: no result depends on the batch, the device or the history of a process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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
class StepNoise:
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


TOKENS, ORDER = 0x746F, 0x6F72
"""Purposes of noise: a word of its key."""


class Site(NamedTuple):
    """Positions of some rows that something is drawn for."""

    row: Int[Tensor, " b"]
    """Index of each sample."""
    step: Int[Tensor, " b"]
    at: Bool[Tensor, "b q"]
    """k positions in all."""


@dataclass(frozen=True)
class PositionNoise:
    """Random numbers of single positions, as decoding a masked model needs them.

    Every row has its own generator at each step, so a sample is the same in any batch.
    """

    seed: int

    def uniform(self, site: Site, purpose: int, *tail: int) -> Float[Tensor, "k ..."]:
        """Numbers in [0, 1) for the k positions, row by row from left to right, float64."""
        rows = zip(site.row.tolist(), site.step.tolist(), site.at.sum(1).tolist(), strict=True)
        parts = [
            torch.rand(count, *tail, generator=generator(self.seed, purpose, row, step), dtype=torch.float64)
            for row, step, count in rows
        ]
        return torch.cat(parts).to(site.at.device)

    def gumbel(self, site: Site, purpose: int, *tail: int) -> Float[Tensor, "k ..."]:
        """Standard Gumbel noise, float64: coarser numbers would sharpen what is drawn with it."""
        tiny = torch.finfo(torch.float64).tiny
        return -(-self.uniform(site, purpose, *tail).clamp(min=tiny).log()).log()

    def token(self, site: Site, logits: Float[Tensor, "k v"], temperature: float) -> Int[Tensor, " k"]:
        """A token of each position from softmax(logits / temperature), temperature > 0 (Gumbel-max)."""
        noise = self.gumbel(site, TOKENS, logits.shape[-1])
        return (logits.double() + temperature * noise).argmax(-1)

    def category(self, site: Site, log_p: Float[Tensor, "k v"]) -> Int[Tensor, " k"]:
        """A token of each position, from log-probabilities."""
        return self.token(site, log_p, 1.0)

    def order(self, site: Site, score: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Scores whose largest are positions drawn one after the other, without replacement, from softmax(score)."""
        return score.double() + self.gumbel(site, ORDER)
