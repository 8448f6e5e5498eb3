"""How many tokens to commit at each step of a fixed schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.devices import refined


def even(masks: Int[Tensor, " b"], steps: Int[Tensor, " b"], step: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """An even split of `masks` over `steps`, what is left over going to the first ones (LLaDA, arXiv 2502.09992)."""
    return masks // steps + (step < masks % steps)


def gaussian(
    masks: Int[Tensor, " b"], steps: Int[Tensor, " b"], center: Float[Tensor, " b"], std: Float[Tensor, " b"], most: int
) -> Int[Tensor, "b most"]:
    """`masks` shared among the steps of each row, `most` at most, by a bell over their share of the steps.

    Its top is at 1 / center and its width 1 / std. What the floors leave over goes to the steps that lost most, of
    equals to the first. (EDIT, arXiv 2512.00670; as published a sum is truncated, which may lose one token.)
    """
    place = torch.arange(most, device=masks.device)
    there = place < steps[:, None]
    share = refined(place) / steps[:, None]
    weight = (-0.5 * ((share - 1 / center[:, None]) * std[:, None]) ** 2).exp() * there
    wanted = masks[:, None] * weight / weight.sum(1, keepdim=True)
    whole = wanted.floor().long()
    lost = (wanted - whole).masked_fill(~there, -1.0)
    order = lost.sort(dim=1, descending=True, stable=True).indices
    return whole.scatter_add(1, order, (place < (masks - whole.sum(1))[:, None]).long())


def falling(
    masks: Int[Tensor, " b"], shares: Float[Tensor, "b s"], steps: Int[Tensor, " b"], step: Int[Tensor, " b"]
) -> Int[Tensor, " b"]:
    """The floor of `masks` times the share of the step, of the masks that are left, and all of them in the last step
    (Dream, arXiv 2508.15487, as published: the floor makes the first steps commit too few, and the last too many)."""
    share = transfer_share(shares, step)
    return torch.where(step >= steps - 1, masks, (masks.float() * share).long())


def transfer_shares(steps: Sequence[int], most: int, eps: float) -> Float[Tensor, "b s"]:
    """Of rows that take so many steps, `most` at most, at each step 1 - s / t, between neighbours t > s of `steps` + 1
    times from 1 to `eps`, and 1 from the last step on; float32, in which the published schedule is rounded."""
    shares = torch.ones(len(steps), most)
    for row, total in zip(shares, steps, strict=True):
        times = torch.linspace(1, eps, total + 1)
        row[: total - 1] = (1 - times[1:] / times[:-1])[:-1]
    return shares


def transfer_share(shares: Float[Tensor, "b s"], step: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The share of each row's step."""
    return shares.gather(1, step.clamp(max=shares.shape[1] - 1)[:, None]).squeeze(1)


def best(score: Float[Tensor, "b q"], candidates: Bool[Tensor, "b q"], count: Int[Tensor, " b"]) -> Bool[Tensor, "b q"]:
    """The `count` candidates of each row with the largest score, or all if there are fewer; of equals, the first."""
    order = ranked(score, candidates)
    place = torch.arange(score.shape[1], device=score.device) < count[:, None]
    return torch.zeros_like(candidates).scatter(1, order, place) & candidates


def ranked(score: Float[Tensor, "b q"], candidates: Bool[Tensor, "b q"]) -> Int[Tensor, "b q"]:
    """Positions by falling score, of equals the first first; those that are no candidates come last."""
    return score.masked_fill(~candidates, -torch.inf).sort(dim=1, descending=True, stable=True).indices
