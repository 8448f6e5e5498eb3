"""What decoding draws at random: a function of the run's seed, the sample, its step and the purpose alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.noise import generator

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
class Draws:
    """Every row has its own generator at each step, so a sample is the same in any batch."""

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
