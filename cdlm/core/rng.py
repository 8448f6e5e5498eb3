"""All randomness, keyed by what it is for: no result depends on the batch, the device or the history of a process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


NORMAL, UNIFORM, CHURN = 1, 2, 3
"""What the numbers of a step are for: the last word of their key."""


@dataclass(frozen=True, eq=False)
class StepNoise:
    """Random numbers of one step of the rows in flight: row r's depend on the seed, its index and its step alone.

    Drawn on the CPU, like the noise that a row starts from.
    """

    seed: int
    index: Sequence[int]
    """Number of each row's sample."""
    step: Sequence[int]
    """Steps that each row has taken, those of its earlier blocks included."""

    def normal(self, like: Float[Tensor, "b ..."], purpose: int = NORMAL) -> Float[Tensor, "b ..."]:
        """Standard normal numbers in the shape and type of `like`; of another purpose, others."""
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in self._each(purpose)]).to(like)

    def uniform(self, like: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Numbers in [0, 1) in the shape of `like`, float64 on the CPU."""
        return torch.stack([torch.rand(like.shape[1:], generator=g, dtype=torch.float64) for g in self._each(UNIFORM)])

    def _each(self, purpose: int) -> list[torch.Generator]:
        pairs = zip(self.index, self.step, strict=True)
        return [generator(self.seed, index, step, purpose) for index, step in pairs]


TOKENS, ORDER = 0x746F, 0x6F72
"""Purposes of noise: a word of its key."""


class Site(NamedTuple):
    """Positions that something is drawn for; the three have shapes that can be broadcast."""

    row: Int[Tensor, " ..."]
    """Index of the sample."""
    step: Int[Tensor, " ..."]
    place: Int[Tensor, " ..."]
    """Place in the sample, not counting padding before it."""

    def at(self, some: slice | Int[Tensor, " k"]) -> Site:
        """Some of the positions along the first axis, of a site whose parts have one shape."""
        return Site(self.row[some], self.step[some], self.place[some])


@dataclass(frozen=True)
class PositionNoise:
    """Random numbers of single positions, as decoding a masked model needs them.

    A number is a hash of the seed, its purpose, the sample, the step, the position and its place in a row of numbers.
    It does not depend on the batch, on what else is drawn, or on the device: the bits are the same on all of them.
    What is computed from the bits, logarithms, may differ between devices in the last bit.

    The hash is the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) at a counter. Each position has a
    start and a stride of its own, as the generators of that paper have when they are split.
    """

    seed: int

    def uniform(self, site: Site, purpose: int) -> Float[Tensor, " ..."]:
        """A number in [0, 1) for each position, float32."""
        return (_shifted(self._keys(site, purpose), 40) * 2.0**-24).float()

    def exponential(self, site: Site, purpose: int) -> Float[Tensor, " ..."]:
        """A standard exponential number for each position, float32."""
        return _exponential(self._keys(site, purpose))

    def token(
        self, site: Site, logits: Float[Tensor, "k v"], temperature: float, purpose: int = TOKENS
    ) -> Int[Tensor, " k"]:
        """A token of each of k positions from softmax(logits / temperature), temperature > 0.

        The token whose exponential number, divided by its probability, is smallest (the Gumbel-max trick). The small
        numbers decide, and these are exact to float32's relative precision: nothing is sharpened. Logits are taken
        relative to the largest, so that a small temperature does not make them too large to be exact.
        """
        start = self._keys(site, purpose)[:, None]
        stride = _mixed(start ^ _GOLDEN) | 1
        count = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
        # A few positions at a time: on a CPU what is made of them stays in the cache.
        size = max(1, (2**15 if logits.device.type == "cpu" else 2**24) // len(count))
        drawn = [
            (z.sub(z.amax(-1, keepdim=True)) / temperature - _exponential(_mixed(count * by + begin)).log_()).argmax(-1)
            for z, begin, by in zip(*(whole.split(size) for whole in (logits, start, stride)), strict=True)
        ]
        return torch.cat(drawn)

    def category(self, site: Site, log_p: Float[Tensor, "k v"]) -> Int[Tensor, " k"]:
        """A token of each of k positions, from log-probabilities."""
        return self.token(site, log_p, 1.0)

    def order(self, site: Site, score: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Scores whose largest are positions drawn one after the other, without replacement, from softmax(score)."""
        return score - self.exponential(site, ORDER).log_()

    def _keys(self, site: Site, purpose: int) -> Int[Tensor, " ..."]:
        start = int(np.random.SeedSequence([self.seed, purpose]).generate_state(1, np.uint64)[0])
        key = torch.full((), _signed(start), device=site.row.device)
        for word in site:
            key = _mixed(key + (word + 1) * _GOLDEN)
        return key


def _signed(word: int) -> int:
    """64 bits as torch counts them: int64 arithmetic wraps around."""
    return word - 2**64 if word >= 2**63 else word


_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mixed(bits: Int[Tensor, "*s"]) -> Int[Tensor, "*s"]:
    """A bijection of 64 bits in which every bit depends on all (the finaliser of SplitMix64)."""
    bits = (bits ^ _shifted(bits, 30)).mul_(_FIRST)
    bits.bitwise_xor_(_shifted(bits, 27)).mul_(_SECOND)
    return bits.bitwise_xor_(_shifted(bits, 31))


def _shifted(bits: Int[Tensor, "*s"], by: int) -> Int[Tensor, "*s"]:
    """Moved to the right, with zeros from the left."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _exponential(bits: Int[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Standard exponential numbers from 64 random bits each, float32: -log(1 - u), fine where u is small."""
    return _shifted(bits, 1).float().mul_(-(2.0**-63)).log1p_().neg_()
