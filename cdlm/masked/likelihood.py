"""How likely a text is to a masked diffusion model: the bound on its negative log likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import BOUND, LikelihoodSettings, Nats, Progress, Text, in_batches, stratified_error
from cdlm.core.rng import generator
from cdlm.models.system import row_cross_entropy

if TYPE_CHECKING:
    from cdlm.masked.system import MaskedDiffusion

NELBO = 0x6E65
"""Purpose of noise: a word of its key."""


def nats(
    system: MaskedDiffusion, text: Text, settings: LikelihoodSettings, progress: Progress | None = None
) -> dict[str, Nats]:
    """The bound of each row; see `Model.nats`.

    Raises:
        CdlmError: the settings ask for what only continuous models have.
    """
    if settings.ode is not None:
        raise CdlmError("a masked model has no ODE: leave out ode_steps, its bound is computed without")
    if settings.read_out is not None:
        raise CdlmError("a masked model has no noise levels: leave out read_out")

    def score(part: Text) -> Nats:
        draws = nelbo(system, part, settings.levels, settings.seed)
        return Nats({"masked": draws.mean(1)}, stratified_error(draws), scorable(system, part).sum(1))

    return {BOUND: in_batches(score, text, BOUND, settings, next(system.parameters()).device, progress)}


@torch.no_grad()
def nelbo(system: MaskedDiffusion, text: Text, levels: int = 8, seed: int = 0) -> Float[Tensor, "b levels"]:
    """Draws of the bound on -ln p(text) in nats, summed over the positions that are scored; their mean is the bound.

    The bound is an integral over the share of masked tokens, the integral of 1/t times the cross-entropy of what is
    masked. Over the number k of masked positions out of L it is exactly

        L * mean over k in 1..L of (cross-entropy of k positions drawn at random) / k

    (LLaDA, arXiv 2502.09992, eq. 6), which needs no least share and has less variance than masking each on its own.

    Args:
        text: where it holds the mask itself there is nothing to predict, see `scorable`.
        levels: draws of each row, >= 1: one k from each of so many equal parts of 1..L.
    """
    if levels < 1:
        raise CdlmError(f"the bound needs levels >= 1, got {levels}")
    tokens, open_ = text.tokens, scorable(system, text)
    size, keys = open_.sum(1), text.key.tolist()
    draws = []
    for level in range(levels):
        u, order = _noise([(seed, NELBO, *row, level) for row in keys], tokens)
        hidden = ((level + u) / levels * size).long().clamp(max=size - 1) + 1
        rank = order.masked_fill(~open_, torch.inf).argsort(1).argsort(1)
        masked = open_ & (rank < hidden[:, None])
        logits = system.logits(tokens.masked_fill(masked, system.constants.mask_id), text.valid)
        lost, _ = row_cross_entropy(logits, tokens, masked)
        draws.append(lost.double() * size / hidden.clamp(min=1))
    return torch.stack(draws, 1)


def scorable(system: MaskedDiffusion, text: Text) -> Bool[Tensor, "b n"]:
    """The positions to score without those where the text holds the mask itself, which the model never predicts."""
    return text.target & (text.tokens != system.constants.mask_id)


def _noise(keys: list[tuple[int, ...]], like: Int[Tensor, "b n"]) -> tuple[Float[Tensor, " b"], Float[Tensor, "b n"]]:
    made = [generator(*key) for key in keys]
    numbers = torch.stack([torch.rand(1 + like.shape[1], generator=g, dtype=torch.float64) for g in made])
    return numbers[:, 0].to(like.device), numbers[:, 1:].to(like.device)
