"""Signals: statistics of a step, each computed only while a criterion or a recorder needs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cdlm.core.errors import CdlmError
from cdlm.core.trees import Ragged


class Where(NamedTuple):
    """Some positions of the rows, row by row from left to right."""

    flat: Int[Tensor, " k"]
    """Place of each among all positions of all rows."""
    counts: tuple[int, ...]
    """How many there are in each row."""
    shape: tuple[int, int]
    """Rows, and positions of a row."""
    open: bool = True
    """Whether all of them are open."""

    def plane(self, values: Shaped[Tensor, "k ..."], fill: float) -> Shaped[Tensor, "b n ..."]:
        """The values at their places, and `fill` everywhere else."""
        whole = values.new_full((self.shape[0] * self.shape[1], *values.shape[1:]), fill)
        return self.onto(whole, values)

    def onto(self, whole: Shaped[Tensor, "bn ..."], values: Shaped[Tensor, "k ..."]) -> Shaped[Tensor, "b n ..."]:
        """The values written over those of all positions of all rows."""
        return whole.index_copy_(0, self.flat, values).unflatten(0, self.shape)


class Past(NamedTuple):
    """What the step before leaves behind; a part is None when no signal needs it."""

    tokens: Int[Tensor, "b n"] | None
    score: Float[Tensor, "b n d"] | None
    logits: Float[Tensor, "b n v"] | Ragged | None
    """The very tensor of the step before, no copy; without a vocabulary axis (v = 0) while no row has a past. Of steps
    that have the logits of some positions alone, those."""
    scale: Float[Tensor, "b n 2"] | None = None
    """Of those logits: the largest, and the log of the sum of exp(logit - largest); as `StepStatistics.scale`."""
    known: Bool[Tensor, "b n"] | None = None
    """Positions that those logits are of; None where they are all."""
    top: Int[Tensor, "b n k"] | None = None
    """Tokens of the `TOP` largest of those logits; without any (k = 0) while no row has a past."""


class EmbeddingState(NamedTuple):
    """What a step of a continuous model has beside its logits."""

    z: Float[Tensor, "b n d"]
    t: Float[Tensor, " b"]
    rho: float
    x0: Float[Tensor, "b n d"]
    shown: Float[Tensor, "b n d"] | None = None
    """The estimate that the prediction was shown, of the step before where there was one; None of none."""
    again: bool = False
    """Whether what was shown was made at this very level, at a row's first step as well."""


class Sums(NamedTuple):
    """What one pass over the logits finds, as far as it is needed; p is their softmax."""

    peak: Float[Tensor, " k"]
    """Largest logit."""
    peaks: Float[Tensor, "k c"] | None
    """Largest logit of each chunk of the vocabulary."""
    total: Float[Tensor, " k"]
    """Sum of exp(logit - peak), from 1 to v."""
    below: Float[Tensor, " k"] | None
    """Mean over p of logit - peak, times the total."""
    drift: Float[Tensor, " k"] | None
    """Mean over p of logit - logit of the step before, times the total."""


ENTROPIES = frozenset({"entropy", "mean_entropy"})
DIVERGENCES = frozenset({"mean_kl", "max_jsd"})
"""Signals that compare a step's distributions with those of the step before."""
SUMMED = ENTROPIES | DIVERGENCES | {"logsumexp", "confidence", "min_confidence"}
"""Signals that are made from sums over the vocabulary."""
ROUNDING = 1e-5
"""Of probabilities, as a share: more than float32 loses in a sum over a vocabulary."""
RANKED = frozenset({"tokens", "switches", "top1", "top2", "margin", "span_margin", "max_jsd"})
"""Signals that are made from the largest logits."""
TOP = 10
"""Tokens of each of two distributions that `jsd` tells apart: the most likely ones."""


@dataclass(frozen=True)
class StepStatistics:
    """What the signals of one step are computed from; intermediate results are computed once.

    The cost lies in the sums over the vocabulary, most of it in reading the logits from memory. So the logits are read
    piece by piece, each piece once for all sums, and what is made of a piece is written over what was made of the one
    before: nothing is as large as the logits.
    """

    logits: Float[Tensor, "*s v"]
    """Of all positions [b n v], or of those of `where` [k v], which may be all too."""
    open: Bool[Tensor, "b n"]
    target: Bool[Tensor, "b n"]
    """Positions that are generated, frozen ones included."""
    step: Int[Tensor, " b"]
    """Steps that each row has taken before."""
    past: Past
    needs: frozenset[str] = SUMMED | RANKED
    """Signals that will be computed, so that one pass serves them all."""
    embedding: EmbeddingState | None = None
    """None in a model without embeddings; the signals of `SPATIAL` then do not exist."""
    held: Int[Tensor, "b n"] | None = None
    """Tokens of the targets that are no longer open, where the logits do not say them; with `where`, of all positions
    that are not open."""
    where: Where | None = None
    """The positions that the logits are of; None of all. At others numbers are 0, and a divergence infinite."""

    @cached_property
    def flat(self) -> Float[Tensor, "k v"]:
        """The logits, one position after the other."""
        return self.logits.flatten(0, -2)

    @cached_property
    def sums(self) -> Sums:
        return self._sums_of(None, self.needs)

    @cached_property
    def peaks(self) -> Float[Tensor, "k c"]:
        peaks = None if self.needs.isdisjoint(SUMMED) else self.sums.peaks
        return chunk_maxima(self.flat) if peaks is None else peaks

    @cached_property
    def best(self) -> Int[Tensor, " k"]:
        """The most likely token of each position that the logits are of; of equals, the first."""
        return _argmax(self.flat, None if _width(self.flat.shape[-1]) == self.flat.shape[-1] else self.peaks)

    @cached_property
    def tokens(self) -> Int[Tensor, "b n"]:
        return self.placed(self.best)

    @cached_property
    def top(self) -> Float[Tensor, "b n 2"]:
        # The two largest logits lie in the two chunks with the largest maxima.
        best = self.peaks.topk(min(2, self.peaks.shape[-1]), -1).indices
        return self.plane(_members(self.flat, best).topk(2, -1).values)

    @cached_property
    def log_total(self) -> Float[Tensor, " k"]:
        """Log of the sum of exp(logit - largest logit)."""
        return self.sums.total.log()

    @cached_property
    def scale(self) -> Float[Tensor, "b n 2"]:
        return self.plane(torch.stack([self.sums.peak, self.log_total], -1), torch.nan)

    @property
    def chance(self) -> Float[Tensor, "b n"]:
        """Probability of the most likely token."""
        return self.plane(1 / self.sums.total)  # the total is relative to the largest logit

    def chance_from(self, least: Float[Tensor, " b"], over: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """The same at the positions of `over` where it is at least `least`; elsewhere something smaller.

        The chunks' largest logits alone bound the probability from above, and where much is unsure that is enough.
        """
        if self.peaks.shape[-1] == 1 or not self.needs.isdisjoint(SUMMED):  # useless, or known
            return self.chance.where(over, 0)
        least_sum = (self.peaks - self.peaks.amax(-1, keepdim=True)).exp().sum(-1)
        bound = self.plane(1 / least_sum).where(over, 0)
        near = (over & (bound >= least[:, None] * (1 - ROUNDING))).flatten().nonzero().squeeze(1)
        if not len(near):
            return bound
        some = self._sums_of(near, frozenset({"logsumexp"}))
        return bound.flatten().index_copy(0, near, 1 / some.total).view(over.shape)

    @cached_property
    def entropy(self) -> Float[Tensor, "b n"]:
        assert self.sums.below is not None
        return self.plane((self.log_total - self.sums.below / self.sums.total).clamp(min=0))

    @cached_property
    def kl(self) -> Float[Tensor, "b n"]:
        before = self.past.scale
        assert before is not None
        if self.sums.drift is None:
            return before.new_full(self.open.shape, torch.inf)
        # Peaks and logits apart: both are near those of the step before, and the difference of near numbers is exact.
        peak, log = (self.scale - before).unbind(-1)
        kl = (self.plane(self.sums.drift / self.sums.total) - peak - log).clamp(min=0)
        return torch.where(self._new | kl.isnan(), torch.inf, kl)

    @cached_property
    def jsd(self) -> Float[Tensor, "b n"]:
        """Jensen-Shannon divergence from the step before in nats, from 0 to ln 2, of distributions in which all tokens
        that are not among the `TOP` most likely of either step are one; so it is at most that of the whole ones.
        Infinite where there is nothing before."""
        past, ids = self.past, self.past.top
        assert ids is not None
        assert past.scale is not None
        before = past.logits.values if isinstance(past.logits, Ragged) else past.logits
        if before is None or before.numel() == 0 or ids.shape[-1] == 0:
            return past.scale.new_full(self.open.shape, torch.inf)
        union = torch.cat([self.most, self.pick(ids)], -1).sort(-1).values
        fresh = torch.ones_like(union, dtype=torch.bool)
        fresh[:, 1:] = union[:, 1:] != union[:, :-1]  # a token that is in both counts once
        place = self._before()
        scale = self.pick(past.scale).nan_to_num()  # of nothing before: the divergence is infinite, whatever comes out
        rows = torch.arange(len(union), device=union.device) if place is None else place
        now = self.flat.gather(1, union) - (self.sums.peak + self.log_total)[:, None]
        then = before.flatten(0, -2)[rows[:, None], union] - scale.sum(-1, keepdim=True)
        jsd = self.plane(_jsd(*(_with_rest(logs.exp() * fresh) for logs in (now, then))), torch.inf)
        return torch.where(self._new | jsd.isnan(), torch.inf, jsd)

    @cached_property
    def most(self) -> Int[Tensor, "k m"]:
        """The `TOP` most likely tokens of each position that the logits are of, or all where there are fewer."""
        vocabulary = self.flat.shape[-1]
        width, count = _width(vocabulary), min(TOP, vocabulary)
        if width == vocabulary:
            return self.flat.topk(count, -1).indices
        chunks = self.peaks.topk(min(TOP, self.peaks.shape[-1]), -1).indices  # they hold the largest logits
        # A few positions at a time: nothing is as large as the logits.
        size = max(1, (2**16 if self.flat.device.type == "cpu" else 2**24) // (TOP * width))
        pieces = zip(self.flat.split(size), chunks.split(size), strict=True)
        best = torch.cat([_members(logits, some).topk(count, -1).indices for logits, some in pieces])
        return (chunks.gather(1, best // width) * width + best % width).clamp(max=vocabulary - 1)

    @property
    def _new(self) -> Bool[Tensor, "b n"]:
        """Positions whose distribution at the step before is not known."""
        first = (self.step == 0)[:, None].expand_as(self.open)
        return first if self.past.known is None else first | ~self.past.known

    @cached_property
    def score(self) -> Float[Tensor, "b n d"]:
        """(x0 - z) / t**2 at open positions, zero elsewhere."""
        z, t, x0 = self.here.z, self.here.t, self.here.x0
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

    def plane(self, values: Shaped[Tensor, "k ..."], fill: float = 0.0) -> Shaped[Tensor, "b n ..."]:
        """Values of the positions that the logits are of, at their places, and `fill` elsewhere: 0, so that a sum over
        values times `open` is one over the open positions."""
        return values.unflatten(0, self.open.shape) if self.where is None else self.where.plane(values, fill)

    def placed(self, tokens: Int[Tensor, " k"]) -> Int[Tensor, "b n"]:
        """A token of each position that the logits are of, at its place, and what is held elsewhere."""
        if self.where is None:
            found = tokens.view(self.open.shape)
            return found if self.held is None else torch.where(self.target & ~self.open, self.held, found)
        assert self.held is not None
        if self.where.open:
            return self.where.onto(self.held.flatten().clone(), tokens)
        return torch.where(self.open, self.where.onto(self.held.flatten().clone(), tokens), self.held)

    def pick(self, values: Shaped[Tensor, "b n ..."]) -> Shaped[Tensor, "k ..."]:
        """What `plane` has put at its place."""
        return values.flatten(0, 1) if self.where is None else values.flatten(0, 1)[self.where.flat]

    def kept(self) -> Past:
        """Of the logits, what the divergences of the next step need."""
        top = self.plane(self.most) if "max_jsd" in self.needs else None
        if self.where is None:
            return Past(None, None, self.logits, self.scale, None, top)
        known = torch.zeros_like(self.open).flatten().index_fill_(0, self.where.flat, True).view(self.open.shape)
        return Past(None, None, Ragged(self.flat, self.where.counts), self.scale, known, top)

    def _sums_of(self, some: Int[Tensor, " m"] | None, needs: frozenset[str]) -> Sums:
        """The sums of some positions that the logits are of, or of all."""
        before = self.past.logits
        values = before.values if isinstance(before, Ragged) else before
        if values is None or values.numel() == 0 or "mean_kl" not in needs:
            return _sums(self.flat, some, None, None, needs)
        return _sums(self.flat, some, values.flatten(0, -2), self._before(), needs)

    def _before(self) -> Int[Tensor, " k"] | None:
        """Of each position that the logits are of, its place among those of the step before; of one that was not there,
        anywhere. None where they are the same."""
        known = self.past.known
        return None if known is None else self.pick(known.flatten().cumsum(0).view_as(known)).sub_(1).clamp_(min=0)


def _with_rest(p: Float[Tensor, "k u"]) -> Float[Tensor, "k w"]:
    """Probabilities of some tokens, and of all others together."""
    return torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp(min=0)], -1)


def _jsd(p: Float[Tensor, "k u"], q: Float[Tensor, "k u"]) -> Float[Tensor, " k"]:
    """Jensen-Shannon divergence in nats: (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2."""
    m = (p + q) / 2
    parts = torch.special.xlogy(p, p) + torch.special.xlogy(q, q) - 2 * torch.special.xlogy(m, m)
    return (parts.sum(-1) / 2).clamp(0, math.log(2))


def most_likely(logits: Float[Tensor, "*b n v"]) -> Int[Tensor, "*b n"]:
    """The argmax; of equals, the first."""
    return _argmax(logits, None if _width(logits.shape[-1]) == logits.shape[-1] else chunk_maxima(logits))


def chunk_maxima(logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n c"]:
    """Largest logit of each chunk of the vocabulary.

    A maximum is found four times faster than its place. With these, the place is searched for in one chunk only.
    """
    vocabulary = logits.shape[-1]
    width = _width(vocabulary)
    if width == vocabulary:
        return logits.amax(-1, keepdim=True)
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


def _argmax(logits: Float[Tensor, "*n v"], peaks: Float[Tensor, "*n c"] | None) -> Int[Tensor, "*n"]:
    """The argmax, by the largest logit of each chunk; None where there is one chunk."""
    if peaks is None:
        return logits.max(-1).indices  # the same as argmax, and on CPUs twice as fast
    best = peaks.max(-1, keepdim=True).indices
    return best.squeeze(-1) * _width(logits.shape[-1]) + _members(logits, best).max(-1).indices


def positions_at_a_time(logits: Float[Tensor, "*s v"]) -> int:
    """Positions of a piece of the logits. On a CPU a piece and what is made of it fit in the second cache; a GPU wants
    few and large ones."""
    vocabulary = logits.shape[-1]
    if logits.device.type != "cpu":
        return max(1, 2**24 // vocabulary)
    # The last bit of a sum must not depend on the batch. It does where torch shares a long sum among threads, which it
    # does for a piece of one position.
    return 1 if vocabulary >= 2**15 else 2**17 // vocabulary


def _sums(
    logits: Float[Tensor, "k v"], some: Int[Tensor, " m"] | None, before: Float[Tensor, "l v"] | None,
    place: Int[Tensor, " k"] | None, needs: frozenset[str],
) -> Sums:  # fmt: skip
    """The sums of `some` of the logits, or of all.

    Args:
        before: logits of the step before.
        place: of each position among these; None if they are of the same positions.
    """
    count, size = len(logits) if some is None else len(some), positions_at_a_time(logits)
    # All room is taken before the loop: what is kept of each piece, between what is not, would leave holes in memory.
    ranked, entropies = not needs.isdisjoint(RANKED), not needs.isdisjoint(ENTROPIES)
    apart = entropies or before is not None  # p is needed beside the logits that it came from
    buffer = logits.new_empty(1 + apart + (place is not None), min(size, count), logits.shape[-1])
    peak, total, below, drift = logits.new_empty(4, count)
    chunks = -(-logits.shape[-1] // _width(logits.shape[-1]))
    peaks = logits.new_empty(count, chunks) if ranked and chunks > 1 else None
    for begin in range(0, count, size):
        piece = slice(begin, min(begin + size, count))
        room = buffer[:, : piece.stop - begin]
        x, p = room[0], room[int(apart)]
        here = logits[piece] if some is None else logits[some[piece]]
        if peaks is None:
            torch.amax(here, -1, out=peak[piece])
        else:
            peaks[piece] = chunk_maxima(here)
            torch.amax(peaks[piece], -1, out=peak[piece])
        torch.sub(here, peak[piece, None], out=x)
        torch.exp(x, out=p)
        torch.sum(p, -1, out=total[piece])
        # A token that is ruled out has p = 0 and a logit of minus infinity: nansum takes 0 * inf as the 0 that it is.
        if entropies:
            below[piece] = x.mul_(p).nansum(-1)
        if before is not None:
            past = before[piece] if place is None else torch.index_select(before, 0, place[piece], out=room[-1])
            drift[piece] = torch.sub(here, past, out=x).mul_(p).nansum(-1)
    if ranked and peaks is None:
        peaks = peak[:, None]
    return Sums(peak, peaks, total, below if entropies else None, None if before is None else drift)


def _switches(statistics: StepStatistics) -> Int[Tensor, " b"]:
    assert statistics.past.tokens is not None
    return ((statistics.tokens != statistics.past.tokens) & statistics.open).sum(1)


def _score_cosine(statistics: StepStatistics) -> Float[Tensor, " b"]:
    assert statistics.past.score is not None
    now, before = statistics.score.flatten(1), statistics.past.score.flatten(1)
    return ((now * before).sum(1) / (now.norm(dim=1) * before.norm(dim=1))).float()


def _residual(statistics: StepStatistics) -> Float[Tensor, " b"]:
    here = statistics.here
    if here.shown is None:
        return torch.full_like(statistics.mean(here.x0[..., 0]), torch.inf)
    residual = statistics.mean((here.x0 - here.shown).square().sum(-1) / here.rho**2)
    return residual if here.again else torch.where(statistics.step == 0, torch.inf, residual)


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
        "logsumexp": Signal(lambda step: step.plane(step.sums.peak + step.log_total)),
        "confidence": Signal(lambda step: step.chance),
        "entropy": Signal(lambda step: step.entropy),
        "switches": Signal(_switches),
        "mean_entropy": Signal(lambda step: step.mean(step.entropy), recorded=True),
        "mean_kl": Signal(lambda step: step.mean(step.kl), recorded=True),
        "max_jsd": Signal(lambda step: step.jsd.masked_fill(~step.open, 0).amax(1).float(), recorded=True),
        "min_confidence": Signal(lambda step: step.chance.masked_fill(~step.open, 1).amin(1).float(), recorded=True),
        "margin": Signal(lambda step: step.mean(step.margin), recorded=True),
        "span_margin": Signal(lambda step: step.mean(step.margin, step.target), recorded=True),
        "z_norm": Signal(lambda step: step.mean_norm(step.here.z), spatial=True, recorded=True),
        "x0_norm": Signal(lambda step: step.mean_norm(step.here.x0), spatial=True, recorded=True),
        "score_cosine": Signal(_score_cosine, spatial=True, recorded=True),
        "residual": Signal(_residual, spatial=True, recorded=True),
    }
)
"""The signals that a criterion may list in its `needs`; docs/write-a-criterion.md explains each."""

SPATIAL = frozenset(name for name, signal in SIGNALS.items() if signal.spatial)
RECORDED = tuple(name for name, signal in SIGNALS.items() if signal.recorded)
WATCHED = ("confidence", "entropy")
"""What a run that is watched keeps of each open position, beside what is recorded of each row."""


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
    if unknown and set(known) <= SPATIAL and unknown[0] in SIGNALS:
        raise CdlmError(
            f"{unknown[0]!r} is about tokens, and the steps of this model say none: set read_out (--read-out) to"
            f" Probe() or Decoder(), or use a rule that reads {', '.join(sorted(known))}"
        )
    if unknown and unknown[0] in SPATIAL:
        raise CdlmError(
            f"{unknown[0]!r} describes a state in embedding space, and a masked model has none: use a rule that reads"
            f" {', '.join(sorted(known))}"
        )
    if unknown:
        raise CdlmError(f"there is no signal {unknown[0]!r} here: use some of {', '.join(sorted(known))}")
    return frozenset(names)


def first_past(needs: frozenset[str], z: Float[Tensor, "b n d"], beside: Past | None, ragged: bool = False) -> Past:
    """The past of rows that enter, in the form of the past of the rows `beside` them.

    Args:
        ragged: their steps have the logits of some positions alone.
    """
    before = None if beside is None else beside.logits
    vocabulary = before.shape[-1] if isinstance(before, Tensor) else 0
    dtype = z.dtype if beside is None or beside.scale is None else beside.scale.dtype
    divergence, nothing = not needs.isdisjoint(DIVERGENCES), z.new_empty((0, 0), dtype=dtype)
    logits = Ragged(nothing, (0,) * len(z)) if ragged else z.new_empty((*z.shape[:2], vocabulary), dtype=dtype)
    size = 0 if beside is None or beside.top is None else beside.top.shape[-1]
    return Past(
        torch.full(z.shape[:2], -1, device=z.device) if "switches" in needs else None,
        torch.full_like(z, torch.nan) if "score_cosine" in needs else None,
        logits if divergence else None,
        z.new_empty((*z.shape[:2], 2), dtype=dtype) if divergence else None,
        torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device) if divergence and ragged else None,
        torch.zeros((*z.shape[:2], size), dtype=torch.int64, device=z.device) if "max_jsd" in needs else None,
    )


def observe(needs: frozenset[str], statistics: StepStatistics) -> tuple[dict[str, Tensor], Past]:
    """The signals in `needs`, and what the next step needs of this one."""
    signals = {name: SIGNALS[name].compute(statistics) for name in sorted(needs)}
    kept = Past(None, None, None) if needs.isdisjoint(DIVERGENCES) else statistics.kept()
    return signals, kept._replace(
        tokens=statistics.tokens if "switches" in needs else None,
        score=statistics.score if "score_cosine" in needs else None,
    )
