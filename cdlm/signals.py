"""Statistics of a step, each computed only when a criterion or a recorder asks for it by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.errors import CdlmError
from cdlm.types import Prediction


class Past(NamedTuple):
    """What the step before leaves behind; a part is None when no signal needs it."""

    tokens: Int[Tensor, "b n"] | None
    score: Float[Tensor, "b n d"] | None


@dataclass(frozen=True)
class Glance:
    """What the signals of one step are made from; intermediate results are computed once."""

    z: Float[Tensor, "b n d"]
    t: Float[Tensor, " b"]
    rho: float
    prediction: Prediction
    open: Bool[Tensor, "b n"]
    past: Past

    @cached_property
    def tokens(self) -> Int[Tensor, "b n"]:
        return self.prediction.argmax()

    @cached_property
    def top(self) -> Float[Tensor, "b n 2"]:
        return self.prediction.logits.topk(2, -1).values

    @cached_property
    def logsumexp(self) -> Float[Tensor, "b n"]:
        return self.prediction.logits.logsumexp(-1)

    @cached_property
    def score(self) -> Float[Tensor, "b n d"]:
        """(x0 - z) / t**2 at open positions, zero elsewhere."""
        t = self.t.to(self.z.dtype)[:, None, None]
        return (self.prediction.x0 - self.z) / t.square() * self.open[..., None]

    def over_open(self, values: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
        """Mean over the open positions of each row."""
        return (values * self.open).sum(1) / self.open.sum(1)


def entropy(glance: Glance) -> Float[Tensor, "b n"]:
    """Entropy of each position's distribution, nats. Row by row, so that what is in between stays in the cache."""
    logs = (row.log_softmax(-1) for row in glance.prediction.logits)
    return torch.stack([-(log.exp() * log).sum(-1) for log in logs])


def switches(glance: Glance) -> Int[Tensor, " b"]:
    """Open positions whose argmax differs from the step before; at a row's first step, all of them."""
    assert glance.past.tokens is not None
    return ((glance.tokens != glance.past.tokens) & glance.open).sum(1)


def z_norm(glance: Glance) -> Float[Tensor, " b"]:
    """Mean norm of z over open positions, in units of the embedding norm."""
    return glance.over_open(glance.z.norm(dim=-1)) / glance.rho


def x0_norm(glance: Glance) -> Float[Tensor, " b"]:
    """Mean norm of x0 over open positions, in units of the embedding norm."""
    return glance.over_open(glance.prediction.x0.norm(dim=-1)) / glance.rho


def score_cosine(glance: Glance) -> Float[Tensor, " b"]:
    """Cosine between this step's score and the one before, over all open positions; NaN at a row's first step."""
    assert glance.past.score is not None
    now, before = glance.score.flatten(1), glance.past.score.flatten(1)
    return (now * before).sum(1) / (now.norm(dim=1) * before.norm(dim=1))


SIGNALS: Mapping[str, Callable[[Glance], Tensor]] = MappingProxyType(
    {
        "tokens": lambda glance: glance.tokens,
        "top1": lambda glance: glance.top[..., 0],
        "top2": lambda glance: glance.top[..., 1],
        "logsumexp": lambda glance: glance.logsumexp,
        "entropy": entropy,
        "switches": switches,
        "z_norm": z_norm,
        "x0_norm": x0_norm,
        "score_cosine": score_cosine,
    }
)
"""The signals that a criterion may list in its `needs`."""


def check_signals(names: Iterable[str]) -> frozenset[str]:
    """The names as a set; an error for one that does not exist."""
    unknown = sorted(set(names) - set(SIGNALS))
    if unknown:
        raise CdlmError(f"there is no signal {unknown[0]!r}: use some of {', '.join(SIGNALS)}")
    return frozenset(names)


def first_past(needs: frozenset[str], z: Float[Tensor, "b n d"]) -> Past:
    """The past of rows that have none: no token, no direction."""
    return Past(
        torch.full(z.shape[:2], -1, device=z.device) if "switches" in needs else None,
        torch.full_like(z, torch.nan) if "score_cosine" in needs else None,
    )


def observe(needs: frozenset[str], glance: Glance) -> tuple[dict[str, Tensor], Past]:
    """The signals asked for, and what the next step needs of this one."""
    signals = {name: SIGNALS[name](glance) for name in sorted(needs)}
    past = Past(
        glance.tokens if "switches" in needs else None,
        glance.score if "score_cosine" in needs else None,
    )
    return signals, past
