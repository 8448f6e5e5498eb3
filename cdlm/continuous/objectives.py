"""What training minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError
from cdlm.core.types import Batch
from cdlm.models.system import Loss, levels_of, row_cross_entropy

if TYPE_CHECKING:
    from cdlm.continuous.system import EmbeddingDiffusion


class Objective(nn.Module, ABC):
    """A loss of a system on a batch."""

    doubts: bool = False
    """Whether it teaches to tell which given tokens are wrong."""
    fits_schedule: bool = True
    """Whether the schedule and the weight of the output prior go on while it is trained on."""

    @abstractmethod
    def forward(self, system: Any, batch: Batch) -> Loss: ...

    def read_out(self, system: Any, batch: Batch) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
        """What teaches the tokens alone: summed cross-entropy of each row in nats at drawn levels, and its tokens."""
        t = system.schedule.t_of_u(levels_of(batch)).detach()
        z, condition = system.noisy(system.embed(batch.tokens), t, batch)
        return row_cross_entropy(system.logits(z, t, condition), batch.tokens, batch.target)


class CrossEntropy(Objective):
    """Cross-entropy at levels drawn from the schedule, and the schedule's own regression (CDCD, sections 3 and 4).

    Args:
        wrong: in training, share of the given positions that show another position's token of the batch. All given
            positions that the network sees then count in the loss too, beside what is reported, so that it learns which
            of them to doubt: a sampler that commits tokens gives it wrong ones (DSL, arXiv 2605.12836, trains so).
    """

    def __init__(self, wrong: float = 0.0):
        super().__init__()
        self.wrong, self.doubts = wrong, wrong > 0

    def forward(self, system: EmbeddingDiffusion, batch: Batch) -> Loss:
        u = levels_of(batch)
        t = system.schedule.t_of_u(u).detach()
        shown = system.embed(self._shown(batch)) if self.wrong and system.training else None
        z, condition = system.noisy(system.embed(batch.tokens), t, batch, shown)
        logits = system.logits(z, t, condition)
        nats, count = row_cross_entropy(logits, batch.tokens, batch.target)
        fit = system.schedule.fit(t, (nats / count).detach())
        total = nats.sum()
        if shown is not None:
            seen = condition.clean.any(-1) if batch.valid is None else condition.clean.any(-1) & batch.valid
            total = total + row_cross_entropy(logits, batch.tokens, seen)[0].sum()
        return Loss(total / count.sum() + fit.to(nats.dtype), (nats / count).detach(), t, count)

    def _shown(self, batch: Batch) -> Int[Tensor, "b n"]:
        """The tokens with some others among them, drawn from the valid positions of the batch."""
        tokens, generator, device = batch.tokens, batch.generator, batch.tokens.device
        pool = tokens.flatten() if batch.valid is None else tokens[batch.valid]
        others = pool[torch.randint(len(pool), tokens.shape, generator=generator, device=device)]
        return torch.where(torch.rand(tokens.shape, generator=generator, device=device) < self.wrong, others, tokens)


class Variational(Objective):
    """The bound on the negative log likelihood in nats per token (Plaid, arXiv 2305.18619, sections 3 and 4).

    Three terms: how far the noisiest state is from the prior, the squared error of the clean estimate over all levels,
    and the cross-entropy at the least noise. In training a share of the rows makes the last term, the other rows make
    the error; the shares follow the deviations of both, averaged with `decay` and over processes. In evaluation, and
    where levels are given, every row makes both.

    The schedule's ends are trained on the bound. Its shape, which the bound does not depend on, is trained on the
    variance of the estimate: the gradient of each row is multiplied by twice its loss (section 4.3).

    Raises:
        CdlmError: in training, for a batch of a single row.
    """

    def __init__(self, decay: float = 0.997):
        super().__init__()
        self.decay = decay
        self.moments: Tensor  # means and mean squares of the two terms
        self.register_buffer("moments", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))

    def forward(self, system: EmbeddingDiffusion, batch: Batch) -> Loss:
        if not system.training or batch.u is not None:
            return self._evaluate(system, batch)
        rows, made = len(batch), list[Tensor]()
        if rows < 2:
            raise CdlmError("the variational bound is trained on 2 rows or more at a time, got 1: raise batch_size")
        last, u = self._levels(batch)
        t, slope = system.schedule.learn(u, lambda: 2 * made[0])
        clean = system.embed(batch.tokens)
        cut = torch.arange(rows, device=u.device) < system.first_rows(rows)  # the estimate of these is not a function
        t, slope = (torch.where(cut, x.detach(), x) for x in (t, slope))  # of z alone, so they teach the network only
        clean = torch.where(cut[:, None, None], clean.detach(), clean)
        z, condition = system.noisy(clean, t, batch)
        logits = system.logits(z, t, condition)
        nats, count = row_cross_entropy(logits, batch.tokens, batch.target)
        squares = squared_error(system.expect(logits), clean, batch.target)
        error = (slope / t**3).to(squares.dtype) * squares / count
        made.append(refined(torch.where(last, 0, error.detach())))
        read_out = nats / count
        self._remember(read_out[last].detach(), error[~last].detach())
        prior = system.prior_nats(system.schedule.t_of_u(torch.ones_like(u[:1])))
        total = read_out[last].mean() + error[~last].mean() + prior.squeeze().to(error.dtype)
        return Loss(total, torch.where(last, read_out, error).detach(), t.detach(), count)

    def _evaluate(self, system: EmbeddingDiffusion, batch: Batch) -> Loss:
        u = levels_of(batch)
        t, slope = system.schedule.t_of_u(u), system.schedule.slope(u)
        clean = system.embed(batch.tokens)
        z, condition = system.noisy(clean, t, batch)
        x0 = system.expect(system.logits(z, t, condition))
        error = (slope / t**3).to(x0.dtype) * squared_error(x0, clean, batch.target)
        low = system.schedule.t_of_u(torch.zeros_like(u))
        z, condition = system.noisy(clean, low, batch)
        nats, count = row_cross_entropy(system.logits(z, low, condition), batch.tokens, batch.target)
        prior = system.prior_nats(system.schedule.t_of_u(torch.ones_like(u)))
        whole = (error + nats) / count + prior.to(nats.dtype)
        return Loss((whole * count).sum() / count.sum(), whole.detach(), t.detach(), count)

    def _levels(self, batch: Batch) -> tuple[Bool[Tensor, " b"], Float[Tensor, " b"]]:
        """Rows at the least noise, and u of all: evenly spaced over the others, all in random order."""
        rows, generator, device = len(batch), batch.generator, batch.tokens.device
        deviation = (self.moments[:, 1] - self.moments[:, 0].square()).clamp(min=1e-12).sqrt()
        share = (deviation[0] / deviation.sum()).item()
        low = min(max(1, round(rows * share)), rows - 1)
        offset = torch.rand(1, generator=generator, dtype=fine(device), device=device)
        even = (offset + torch.arange(rows - low, device=device)) / (rows - low)
        order = torch.randperm(rows, generator=generator, device=device)
        u = torch.cat([torch.zeros(low, dtype=fine(device), device=device), even])[order]
        return order < low, u

    @torch.no_grad()
    def _remember(self, *terms: Float[Tensor, " _"]) -> None:
        for moments, values in zip(self.moments, terms, strict=True):
            if len(values):
                fresh = torch.stack([values.mean(), values.square().mean()]).to(moments)
                moments.lerp_(_mean_of_processes(fresh), 1 - self.decay)


def _mean_of_processes(x: Tensor) -> Tensor:
    """So that a buffer stays the same in each process of a training run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x.div_(torch.distributed.get_world_size()))
    return x


class Seeded(Objective):
    """Another objective whose dropout is a function of the batch's generator; torch's global one stays as it was."""

    def __init__(self, inner: Objective):
        super().__init__()
        self.inner = inner

    def forward(self, system: EmbeddingDiffusion, batch: Batch) -> Loss:
        if not system.training:
            return self.inner(system, batch)
        device = batch.tokens.device
        seed = torch.randint(2**62, (1,), generator=batch.generator, device=device).item()
        devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
        with torch.random.fork_rng(devices, device_type=kind):
            torch.manual_seed(int(seed))
            return self.inner(system, batch)


def squared_error(
    x0: Float[Tensor, "b n d"], clean: Float[Tensor, "b n d"], target: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """||x0 - e||^2, summed over each row's positions to generate."""
    return ((x0 - clean).square().sum(-1) * target).sum(1)
