"""Signals: statistics of a step, each computed only while a criterion or a recorder needs it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.errors import CdlmError


class Past(NamedTuple):
    """What the step before leaves behind; a part is None when no signal needs it."""

    tokens: Int[Tensor, "b n"] | None
    score: Float[Tensor, "b n d"] | None
    logits: Float[Tensor, "b n v"] | None
    """The very tensor of the step before, no copy; without a vocabulary axis (v = 0) while no row has a past."""
    scale: Float[Tensor, "b n 2"] | None = None
    """Of those logits: the largest, and the log of the sum of exp(logit - largest); as `StepStatistics.scale`."""


class EmbeddingState(NamedTuple):
    """What a step of a continuous model has beside its logits."""

    z: Float[Tensor, "b n d"]
    t: Float[Tensor, " b"]
    rho: float
    x0: Float[Tensor, "b n d"]


class Sums(NamedTuple):
    """What one pass over the logits finds, as far as it is needed; p is their softmax."""

    peak: Float[Tensor, "*n"]
    """Largest logit."""
    peaks: Float[Tensor, "*n c"] | None
    """Largest logit of each chunk of the vocabulary."""
    total: Float[Tensor, "*n"]
    """Sum of exp(logit - peak), from 1 to v."""
    below: Float[Tensor, "*n"] | None
    """Mean over p of logit - peak, times the total."""
    drift: Float[Tensor, "*n"] | None
    """Mean over p of logit - logit of the step before, times the total."""


ENTROPIES = frozenset({"entropy", "mean_entropy"})
SUMMED = ENTROPIES | {"logsumexp", "mean_kl"}
"""Signals that are made from sums over the vocabulary."""
ROUNDING = 1e-5
"""Of probabilities, as a share: more than float32 loses in a sum over a vocabulary."""
RANKED = frozenset({"tokens", "switches", "top1", "top2", "margin", "span_margin"})
"""Signals that are made from the one or two largest logits."""


@dataclass(frozen=True)
class StepStatistics:
    """What the signals of one step are computed from; intermediate results are computed once.

    The cost lies in the sums over the vocabulary, most of it in reading the logits from memory. So the logits are read
    piece by piece, each piece once for all sums, and no intermediate tensor is larger than a piece (`chance_from`
    copies the positions that it sums).
    """

    logits: Float[Tensor, "b n v"]
    open: Bool[Tensor, "b n"]
    target: Bool[Tensor, "b n"]
    """Positions that are generated, frozen ones included."""
    first: Bool[Tensor, " b"]
    """Rows at their first step."""
    past: Past
    needs: frozenset[str] = SUMMED | RANKED
    """Signals that will be computed, so that one pass serves them all."""
    embedding: EmbeddingState | None = None
    """None in a model without embeddings; the signals of `SPATIAL` then do not exist."""
    held: Int[Tensor, "b n"] | None = None
    """Tokens of the targets that are no longer open, where the logits do not say them."""

    @cached_property
    def sums(self) -> Sums:
        before = self.past.logits
        known = before is not None and before.shape[-1] > 0
        return _sums(self.logits, before if known else None, self.needs)

    @cached_property
    def peaks(self) -> Float[Tensor, "b n c"]:
        peaks = None if self.needs.isdisjoint(SUMMED) else self.sums.peaks
        return chunk_maxima(self.logits) if peaks is None else peaks

    @cached_property
    def tokens(self) -> Int[Tensor, "b n"]:
        best = _argmax(self.logits, self.peaks)
        return best if self.held is None else torch.where(self.target & ~self.open, self.held, best)

    @cached_property
    def top(self) -> Float[Tensor, "b n 2"]:
        # The two largest logits lie in the two chunks with the largest maxima.
        best = self.peaks.topk(min(2, self.peaks.shape[-1]), -1).indices
        return _members(self.logits, best).topk(2, -1).values

    @cached_property
    def scale(self) -> Float[Tensor, "b n 2"]:
        return torch.stack([self.sums.peak, self.sums.total.log()], -1)

    @property
    def chance(self) -> Float[Tensor, "b n"]:
        """Probability of the most likely token."""
        return (-self.scale[..., 1]).exp()  # the scale is relative to the largest logit

    def chance_from(self, least: Float[Tensor, " b"], over: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """The same at the positions of `over` where it is at least `least`; elsewhere something smaller.

        The chunks' largest logits alone bound the probability from above, and where much is unsure that is enough.
        """
        if self.peaks.shape[-1] == 1 or not self.needs.isdisjoint(SUMMED):  # useless, or known
            return self.chance.where(over, 0)
        least_sum = (self.peaks - self.peaks.amax(-1, keepdim=True)).exp().sum(-1)
        bound = (1 / least_sum).where(over, 0)
        near = over & (bound >= least[:, None] * (1 - ROUNDING))
        for rows in _apart(self.logits):  # so that the last bit does not depend on the batch
            if bool(near[rows].any()):
                some = _sums(self.logits[rows][near[rows]][None], None, frozenset({"logsumexp"}))
                bound[rows] = bound[rows].masked_scatter(near[rows], 1 / some.total)
        return bound

    @cached_property
    def entropy(self) -> Float[Tensor, "b n"]:
        assert self.sums.below is not None
        return (self.scale[..., 1] - self.sums.below / self.sums.total).clamp(min=0)

    @cached_property
    def kl(self) -> Float[Tensor, "b n"]:
        assert self.past.scale is not None
        if self.sums.drift is None:
            return torch.full_like(self.sums.total, torch.inf)
        # Peaks and logs apart: both are near those of the step before, and the difference of near numbers is exact.
        peak, log = (self.scale - self.past.scale).unbind(-1)
        kl = self.sums.drift / self.sums.total - peak - log
        return torch.where(self.first[:, None], torch.inf, kl.clamp(min=0))

    @cached_property
    def score(self) -> Float[Tensor, "b n d"]:
        """(x0 - z) / t**2 at open positions, zero elsewhere."""
        z, t, _, x0 = self.here
        return (x0 - z) / t.to(z.dtype)[:, None, None].square() * self.open[..., None]

    @property
    def here(self) -> EmbeddingState:
        """The state in embedding space, where there is one."""
        assert self.embedding is not None
        return self.embedding

    @property
    def margin(self) -> Float[Tensor, "b n"]:
        """Distance of the two largest logits."""
        return self.top[..., 0] - self.top[..., 1]

    def mean_norm(self, vectors: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        """Mean norm over the open positions of each row, in embedding norms."""
        return self.mean(vectors.norm(dim=-1)) / self.here.rho

    def mean(self, values: Float[Tensor, "b n"], over: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, " b"]:
        """Mean over the open positions of each row, or over others, in float32."""
        over = self.open if over is None else over
        return torch.where(over, values, 0).sum(1).float() / over.sum(1)


def most_likely(logits: Float[Tensor, "*b n v"]) -> Int[Tensor, "*b n"]:
    """The argmax; of equals, the first."""
    return _argmax(logits, chunk_maxima(logits))


def chunk_maxima(logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n c"]:
    """Largest logit of each chunk of the vocabulary.

    A maximum is found four times faster than its place. With these, the place is searched for in one chunk only.
    """
    vocabulary = logits.shape[-1]
    width = _width(vocabulary)
    count = vocabulary // width
    whole = logits[..., : count * width].unflatten(-1, (count, width)).amax(-1)
    rest = logits[..., count * width :]
    return whole if rest.shape[-1] == 0 else torch.cat([whole, rest.amax(-1, keepdim=True)], -1)


def _width(vocabulary: int) -> int:
    return 64 if vocabulary >= 2048 else vocabulary  # a small vocabulary is one chunk


def _members(logits: Float[Tensor, "*n v"], chunks: Int[Tensor, "*n k"]) -> Float[Tensor, "*n kw"]:
    """The logits of some chunks of each position; minus infinity past the end of the vocabulary."""
    vocabulary = logits.shape[-1]
    width = _width(vocabulary)
    if width == vocabulary:
        return logits
    index = (chunks[..., None] * width + torch.arange(width, device=logits.device)).flatten(-2)
    return logits.gather(-1, index.clamp(max=vocabulary - 1)).masked_fill(index >= vocabulary, -torch.inf)


def _argmax(logits: Float[Tensor, "*n v"], peaks: Float[Tensor, "*n c"]) -> Int[Tensor, "*n"]:
    best = peaks.max(-1, keepdim=True).indices  # the same as argmax, and on CPUs twice as fast
    return best.squeeze(-1) * _width(logits.shape[-1]) + _members(logits, best).max(-1).indices


def _sums(logits: Float[Tensor, "b n v"], before: Float[Tensor, "b n v"] | None, needs: frozenset[str]) -> Sums:
    def whole(parts: Any) -> Any:
        return None if parts[0] is None else torch.cat(parts).unflatten(0, logits.shape[:2])

    pieces = _pieces(logits)
    pasts = [None] * len(pieces) if before is None else _pieces(before)
    sums = [_piece_sums(piece, past, needs) for piece, past in zip(pieces, pasts, strict=True)]
    return Sums(*map(whole, zip(*sums, strict=True)))


def _apart(logits: Float[Tensor, "b n v"]) -> list[slice]:
    """Rows whose sums are found together: on a CPU one by one, on a GPU about a piece."""
    together = 1 if logits.device.type == "cpu" else max(1, 2**24 // max(1, logits[0].numel()))
    return [slice(row, row + together) for row in range(0, len(logits), together)]


def _pieces(logits: Float[Tensor, "b n v"]) -> list[Float[Tensor, "k v"]]:
    # On a CPU a piece and what is made of it fit in the second cache, and no piece holds positions of two rows, so that
    # the last bit of a sum does not depend on the batch. A GPU wants few and large pieces.
    small = logits.device.type == "cpu"
    size = max(1, (2**17 if small else 2**24) // logits.shape[-1])
    rows = logits if small else logits.flatten(0, 1)[None]
    return [piece for row in rows for piece in row.split(size)]


def _piece_sums(logits: Float[Tensor, "k v"], before: Float[Tensor, "k v"] | None, needs: frozenset[str]) -> Sums:
    peaks = None if needs.isdisjoint(RANKED) else chunk_maxima(logits)
    peak = (logits if peaks is None else peaks).amax(-1)
    x = logits - peak[:, None]
    p = x.exp()
    total = p.sum(-1)
    # A token that is ruled out has p = 0 and a logit of minus infinity: nansum takes 0 * inf as the 0 that it is.
    below = None if needs.isdisjoint(ENTROPIES) else x.mul_(p).nansum(-1)
    drift = None if before is None else torch.sub(logits, before, out=x).mul_(p).nansum(-1)
    return Sums(peak, peaks, total, below, drift)


def _switches(statistics: StepStatistics) -> Int[Tensor, " b"]:
    assert statistics.past.tokens is not None
    return ((statistics.tokens != statistics.past.tokens) & statistics.open).sum(1)


def _score_cosine(statistics: StepStatistics) -> Float[Tensor, " b"]:
    assert statistics.past.score is not None
    now, before = statistics.score.flatten(1), statistics.past.score.flatten(1)
    return ((now * before).sum(1) / (now.norm(dim=1) * before.norm(dim=1))).float()


class Signal(NamedTuple):
    """How a signal is computed, and which models and recordings have it. `cdlm.core.types.Signals` has its shape."""

    compute: Callable[[StepStatistics], Tensor]
    spatial: bool = False
    """It describes a state in embedding space, which masked models do not have."""
    recorded: bool = False
    """Recordings hold it: one float32 a row and step."""


SIGNALS: Mapping[str, Signal] = MappingProxyType(
    {
        "logits": Signal(lambda step: step.logits),
        "x0": Signal(lambda step: step.here.x0, spatial=True),
        "z": Signal(lambda step: step.here.z, spatial=True),
        "score": Signal(lambda step: step.score, spatial=True),
        "tokens": Signal(lambda step: step.tokens),
        "top1": Signal(lambda step: step.top[..., 0]),
        "top2": Signal(lambda step: step.top[..., 1]),
        "logsumexp": Signal(lambda step: step.scale.sum(-1)),
        "entropy": Signal(lambda step: step.entropy),
        "switches": Signal(_switches),
        "mean_entropy": Signal(lambda step: step.mean(step.entropy), recorded=True),
        "mean_kl": Signal(lambda step: step.mean(step.kl), recorded=True),
        "margin": Signal(lambda step: step.mean(step.margin), recorded=True),
        "span_margin": Signal(lambda step: step.mean(step.margin, step.target), recorded=True),
        "z_norm": Signal(lambda step: step.mean_norm(step.here.z), spatial=True, recorded=True),
        "x0_norm": Signal(lambda step: step.mean_norm(step.here.x0), spatial=True, recorded=True),
        "score_cosine": Signal(_score_cosine, spatial=True, recorded=True),
    }
)
"""The signals that a criterion may list in its `needs`; docs/write-a-criterion.md explains each."""

SPATIAL = frozenset(name for name, signal in SIGNALS.items() if signal.spatial)
RECORDED = tuple(name for name, signal in SIGNALS.items() if signal.recorded)


def check_signals(names: Iterable[str], known: Collection[str] = SIGNALS) -> frozenset[str]:
    """The names as a set.

    Args:
        known: signals that a family of models has.

    Raises:
        CdlmError: there is no signal of a name, or none in this family.
    """
    unknown = sorted(set(names) - set(known))
    if unknown and not known:
        raise CdlmError(
            f"there is no signal {unknown[0]!r} here: an autoregressive model decides each token once, and its steps"
            " have nothing to halt by or to record"
        )
    if unknown and unknown[0] in SPATIAL:
        raise CdlmError(
            f"{unknown[0]!r} describes a state in embedding space, and a masked model has none: use a rule that reads"
            f" {', '.join(sorted(known))}"
        )
    if unknown:
        raise CdlmError(f"there is no signal {unknown[0]!r} here: use some of {', '.join(sorted(known))}")
    return frozenset(names)


def first_past(needs: frozenset[str], z: Float[Tensor, "b n d"], beside: Past | None) -> Past:
    """The past of rows that enter, in the form of the past of the rows `beside` them."""
    vocabulary = 0 if beside is None or beside.logits is None else beside.logits.shape[-1]
    dtype = z.dtype if beside is None or beside.logits is None else beside.logits.dtype
    return Past(
        torch.full(z.shape[:2], -1, device=z.device) if "switches" in needs else None,
        torch.full_like(z, torch.nan) if "score_cosine" in needs else None,
        z.new_empty((*z.shape[:2], vocabulary), dtype=dtype) if "mean_kl" in needs else None,
        z.new_empty((*z.shape[:2], 2), dtype=dtype) if "mean_kl" in needs else None,
    )


def observe(needs: frozenset[str], statistics: StepStatistics) -> tuple[dict[str, Tensor], Past]:
    """The signals in `needs`, and what the next step needs of this one."""
    signals = {name: SIGNALS[name].compute(statistics) for name in sorted(needs)}
    past = Past(
        statistics.tokens if "switches" in needs else None,
        statistics.score if "score_cosine" in needs else None,
        statistics.logits if "mean_kl" in needs else None,
        statistics.scale if "mean_kl" in needs else None,
    )
    return signals, past
