"""How many tokens to commit at each step of a fixed schedule."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def even(masks: Int[Tensor, " b"], steps: Int[Tensor, " b"], step: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """An even split of `masks` over `steps`, what is left over going to the first ones (LLaDA, arXiv 2502.09992)."""
    return masks // steps + (step < masks % steps)


def falling(
    masks: Int[Tensor, " b"], steps: Int[Tensor, " b"], step: Int[Tensor, " b"], eps: float
) -> Int[Tensor, " b"]:
    """The floor of `masks * (1 - s / t)`, of the masks that are left, between neighbours t > s of `steps` + 1 times
    from 1 to `eps`; all of them in the last step (Dream, arXiv 2508.15487, as published: the floor makes the first
    steps commit too few, and the last too many)."""
    share = transfer_share(steps, step, eps)
    return torch.where(step >= steps - 1, masks, (masks.float() * share).long())


def transfer_share(steps: Int[Tensor, " b"], step: Int[Tensor, " b"], eps: float) -> Float[Tensor, " b"]:
    """1 - s / t of the step, and 1 in the last one; float32, in which the published schedule is rounded."""
    shares = []
    for total, now in zip(steps.tolist(), step.tolist(), strict=True):
        times = torch.linspace(1, eps, total + 1)
        shares.append(1 - times[now + 1] / times[now] if now < total - 1 else torch.tensor(1.0))
    return torch.stack(shares).to(step.device)


def best(score: Float[Tensor, "b q"], candidates: Bool[Tensor, "b q"], count: Int[Tensor, " b"]) -> Bool[Tensor, "b q"]:
    """The `count` candidates of each row with the largest score, or all if there are fewer; of equals, the first."""
    order = ranked(score, candidates)
    place = torch.arange(score.shape[1], device=score.device) < count[:, None]
    return torch.zeros_like(candidates).scatter(1, order, place) & candidates


def ranked(score: Float[Tensor, "b q"], candidates: Bool[Tensor, "b q"]) -> Int[Tensor, "b q"]:
    """Positions by falling score, of equals the first first; those that are no candidates come last."""
    return score.masked_fill(~candidates, -torch.inf).sort(dim=1, descending=True, stable=True).indices
