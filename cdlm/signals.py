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
    logits: Float[Tensor, "b n v"] | None
    """The very tensor of the step before, no copy; without a vocabulary axis (v = 0) while no row has a past."""


@dataclass(frozen=True)
class Glance:
    """What the signals of one step are made from; intermediate results are computed once."""

    z: Float[Tensor, "b n d"]
    t: Float[Tensor, " b"]
    rho: float
    prediction: Prediction
    open: Bool[Tensor, "b n"]
    span: Bool[Tensor, "b n"]
    """Positions that are generated, frozen ones included."""
    first: Bool[Tensor, " b"]
    """Rows at their first step."""
    past: Past

    @cached_property
    def tokens(self) -> Int[Tensor, "b n"]:
        return most_likely(self.prediction.logits)

    @cached_property
    def top(self) -> Float[Tensor, "b n 2"]:
        return self.prediction.logits.topk(2, -1).values

    @cached_property
    def logsumexp(self) -> Float[Tensor, "b n"]:
        return self.prediction.logits.logsumexp(-1)

    @cached_property
    def entropy(self) -> Float[Tensor, "b n"]:
        # Row by row, so that what is in between stays in the cache and no second copy of the logits is made.
        logs = (row.log_softmax(-1) for row in self.prediction.logits)
        return torch.stack([-(log.exp() * log).sum(-1) for log in logs])

    @cached_property
    def kl(self) -> Float[Tensor, "b n"]:
        logits, before = self.prediction.logits, self.past.logits
        assert before is not None
        if before.shape[-1] == 0:
            return torch.full_like(logits[..., 0], torch.inf)
        pairs = ((p.log_softmax(-1), q.log_softmax(-1)) for p, q in zip(logits, before, strict=True))
        kl = torch.stack([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
        return torch.where(self.first[:, None], torch.inf, kl)

    @cached_property
    def score(self) -> Float[Tensor, "b n d"]:
        """(x0 - z) / t**2 at open positions, zero elsewhere."""
        t = self.t.to(self.z.dtype)[:, None, None]
        return (self.prediction.x0 - self.z) / t.square() * self.open[..., None]

    def mean(self, values: Float[Tensor, "b n"], over: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, " b"]:
        """Mean over the open positions of each row, or over others, in float32."""
        over = self.open if over is None else over
        return torch.where(over, values, 0).sum(1).float() / over.sum(1)


def most_likely(logits: Float[Tensor, "*b n v"]) -> Int[Tensor, "*b n"]:
    """The argmax; of equals, the first."""
    return logits.max(-1).indices  # the same as argmax, and on CPUs twice as fast


def _switches(glance: Glance) -> Int[Tensor, " b"]:
    assert glance.past.tokens is not None
    return ((glance.tokens != glance.past.tokens) & glance.open).sum(1)


def _score_cosine(glance: Glance) -> Float[Tensor, " b"]:
    assert glance.past.score is not None
    now, before = glance.score.flatten(1), glance.past.score.flatten(1)
    return ((now * before).sum(1) / (now.norm(dim=1) * before.norm(dim=1))).float()


SIGNALS: Mapping[str, Callable[[Glance], Tensor]] = MappingProxyType(
    {
        "logits": lambda glance: glance.prediction.logits,
        "x0": lambda glance: glance.prediction.x0,
        "z": lambda glance: glance.z,
        "score": lambda glance: glance.score,
        "tokens": lambda glance: glance.tokens,
        "top1": lambda glance: glance.top[..., 0],
        "top2": lambda glance: glance.top[..., 1],
        "logsumexp": lambda glance: glance.logsumexp,
        "entropy": lambda glance: glance.entropy,
        "switches": _switches,
        "mean_entropy": lambda glance: glance.mean(glance.entropy),
        "mean_kl": lambda glance: glance.mean(glance.kl),
        "margin": lambda glance: glance.mean(glance.top[..., 0] - glance.top[..., 1]),
        "span_margin": lambda glance: glance.mean(glance.top[..., 0] - glance.top[..., 1], glance.span),
        "z_norm": lambda glance: glance.mean(glance.z.norm(dim=-1)) / glance.rho,
        "x0_norm": lambda glance: glance.mean(glance.prediction.x0.norm(dim=-1)) / glance.rho,
        "score_cosine": _score_cosine,
    }
)
"""The signals that a criterion may list in its `needs`; docs/write-a-criterion.md says what each is."""


def check_signals(names: Iterable[str], known: Iterable[str] = SIGNALS) -> frozenset[str]:
    """The names as a set; an error for one that is not among the known ones."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise CdlmError(f"there is no signal {unknown[0]!r} here: use some of {', '.join(known)}")
    return frozenset(names)


def first_past(needs: frozenset[str], z: Float[Tensor, "b n d"], beside: Past | None) -> Past:
    """The past of rows that have none, of one form with that of the rows `beside` which they join."""
    vocabulary = 0 if beside is None or beside.logits is None else beside.logits.shape[-1]
    dtype = z.dtype if beside is None or beside.logits is None else beside.logits.dtype
    return Past(
        torch.full(z.shape[:2], -1, device=z.device) if "switches" in needs else None,
        torch.full_like(z, torch.nan) if "score_cosine" in needs else None,
        z.new_empty((*z.shape[:2], vocabulary), dtype=dtype) if "mean_kl" in needs else None,
    )


def observe(needs: frozenset[str], glance: Glance) -> tuple[dict[str, Tensor], Past]:
    """The signals asked for, and what the next step needs of this one."""
    signals = {name: SIGNALS[name](glance) for name in sorted(needs)}
    past = Past(
        glance.tokens if "switches" in needs else None,
        glance.score if "score_cosine" in needs else None,
        glance.prediction.logits if "mean_kl" in needs else None,
    )
    return signals, past
