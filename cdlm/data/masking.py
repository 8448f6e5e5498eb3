"""Masking laws: which positions of a training row are to be generated and which are given as clean context.

Every law maps the valid positions of a batch to a mask of the same shape, True where a position is to be generated
(noised, or replaced by the mask token). L below is the number of valid positions of a row; padding is never chosen,
and a row with L >= 1 always has at least one position to generate.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.errors import CdlmError


class Masking(ABC):
    """A random law of masks, independent over rows and a pure function of its arguments and the generator's state."""

    @abstractmethod
    def __call__(self, valid: Bool[Tensor, "b n"], generator: torch.Generator) -> Bool[Tensor, "b n"]:
        """Draw one mask a row; `generator` lives on the device of `valid`."""


@dataclass(frozen=True)
class Prefix(Masking):
    """The first k valid positions are given, k uniform over {0, ..., L-1} (CDCD, arXiv 2211.15089, section 4.1)."""

    def __call__(self, valid: Bool[Tensor, "b n"], generator: torch.Generator) -> Bool[Tensor, "b n"]:
        clean = _uniform_below(valid.sum(1), generator)
        return valid & (_index_among_valid(valid) >= clean[:, None])


@dataclass(frozen=True)
class RandomSubset(Masking):
    """A uniformly random subset of k valid positions is given, k uniform over {0, ..., L-1} (CDCD, section 4.1).

    The size is uniform, so this is not independent coin flips, which would give nearly half of every long row.
    """

    def __call__(self, valid: Bool[Tensor, "b n"], generator: torch.Generator) -> Bool[Tensor, "b n"]:
        clean = _uniform_below(valid.sum(1), generator)
        return valid & (_random_rank(valid, generator) >= clean[:, None])


@dataclass(frozen=True)
class Span(Masking):
    """K spans are to be generated, the rest is given.

    K is uniform over {1, ..., max_spans}; 2K distinct cut points are drawn uniformly from {0, ..., L} and sorted, and
    the spans are [c1, c2), [c3, c4), ... With probability `unconditional` the whole row is generated instead. K is
    held to (L+1)/2 on short rows, which have only L+1 cut points. About half of a row is generated on average.
    """

    max_spans: int = 5
    unconditional: float = 0.1

    def __post_init__(self) -> None:
        if self.max_spans < 1:
            raise CdlmError(f"Span: max_spans must be at least 1, got {self.max_spans}; give a positive integer")
        if not 0 <= self.unconditional <= 1:
            raise CdlmError(f"Span: unconditional is a probability in [0, 1], got {self.unconditional}")

    def __call__(self, valid: Bool[Tensor, "b n"], generator: torch.Generator) -> Bool[Tensor, "b n"]:
        length = valid.sum(1)
        spans = 1 + _uniform_below(((length + 1) // 2).clamp(max=self.max_spans), generator)
        points = torch.arange(valid.shape[1] + 1, device=valid.device) <= length[:, None]
        cut = _random_rank(points, generator) < 2 * spans[:, None]
        inside = cut.cumsum(1) % 2 == 1
        chosen = inside.gather(1, _index_among_valid(valid).clamp(min=0))
        everything = _uniform(valid.shape[0], generator) < self.unconditional
        return valid & (chosen | everything[:, None])


@dataclass(frozen=True)
class Unconditional(Masking):
    """Every valid position is to be generated; nothing is given."""

    def __call__(self, valid: Bool[Tensor, "b n"], generator: torch.Generator) -> Bool[Tensor, "b n"]:
        return valid.clone()


@dataclass(frozen=True)
class Mixture(Masking):
    """Each row follows one of several laws, chosen with probability proportional to its weight."""

    parts: tuple[tuple[float, Masking], ...]

    def __post_init__(self) -> None:
        if not self.parts or any(weight <= 0 for weight, _ in self.parts):
            weights = [weight for weight, _ in self.parts]
            raise CdlmError(f"Mixture: expected one or more laws with positive weights, got weights {weights}")

    def __call__(self, valid: Bool[Tensor, "b n"], generator: torch.Generator) -> Bool[Tensor, "b n"]:
        weights = torch.tensor([weight for weight, _ in self.parts], device=valid.device)
        edges = (weights / weights.sum()).cumsum(0)[:-1]
        choice = torch.bucketize(_uniform(valid.shape[0], generator), edges, right=True)
        masks = torch.stack([law(valid, generator) for _, law in self.parts])
        return masks[choice, torch.arange(valid.shape[0], device=valid.device)]


def mixed() -> Mixture:
    """Prefix or random subset, half and half: the law CDCD found best (arXiv 2211.15089, section 6)."""
    return Mixture(((0.5, Prefix()), (0.5, RandomSubset())))


def _uniform(rows: int, generator: torch.Generator) -> Float[Tensor, " b"]:
    return torch.rand(rows, generator=generator, device=generator.device)


def _uniform_below(bound: Int[Tensor, " b"], generator: torch.Generator) -> Int[Tensor, " b"]:
    """A uniform integer in {0, ..., bound-1} for each row; 0 where bound is 0."""
    return (_uniform(bound.shape[0], generator) * bound).long()


def _index_among_valid(valid: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """0, 1, 2, ... over the valid positions of a row; meaningless on padding."""
    return valid.cumsum(1) - 1


def _random_rank(eligible: Bool[Tensor, "b n"], generator: torch.Generator) -> Int[Tensor, "b n"]:
    """The place of each eligible position in a uniformly random order; ineligible ones come after all others."""
    score = torch.rand(eligible.shape, generator=generator, device=generator.device)
    return score.masked_fill(~eligible, 2.0).argsort(1).argsort(1)
