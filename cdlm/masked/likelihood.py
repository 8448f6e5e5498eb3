"""How likely a text is to a masked diffusion model: the bound on its negative log likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import BOUND, LikelihoodSettings, Nats, Progress, Text, in_batches, stratified_error
from cdlm.core.rng import generator

if TYPE_CHECKING:
    from cdlm.masked.model import MaskedModel

NELBO = 0x6E65
"""Purpose of noise: a word of its key."""
PIECE = 2**22
"""Logits that are summed over at a time, so that no second copy of all of them is made."""


def nats(
    model: MaskedModel, text: Text, settings: LikelihoodSettings, progress: Progress | None = None
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
        draws = nelbo(model, part, settings.levels, settings.seed)
        return Nats({"masked": draws.mean(1)}, stratified_error(draws), scorable(model, part).sum(1))

    return {BOUND: in_batches(score, text, BOUND, settings, model.device, progress)}


@torch.no_grad()
def nelbo(model: MaskedModel, text: Text, levels: int = 8, seed: int = 0) -> Float[Tensor, "b levels"]:
    """Draws of the bound on -ln p(text) in nats, summed over the positions that are scored; their mean is the bound.

    The bound is an integral over the share of masked tokens, the integral of 1/t times the cross-entropy of what is
    masked. Over the number k of masked positions out of L it is exactly

        L * mean over k in 1..L of (cross-entropy of k positions drawn at random) / k

    (LLaDA, arXiv 2502.09992, eq. 6), which needs no least share and has less variance than masking each on its own.
    What is given is never masked. Probabilities are those of the model's logits as they are: a model that can predict
    the mask itself pays for that, as in LLaDA's published evaluation.

    Args:
        text: where it holds the mask itself there is nothing to predict, see `scorable`.
        levels: draws of each row, >= 1: one k from each of so many equal parts of 1..L.
    """
    if levels < 1:
        raise CdlmError(f"the bound needs levels >= 1, got {levels}")
    open_ = scorable(model, text)
    size, keys = open_.sum(1), text.key.tolist()
    draws = []
    for level in range(levels):
        u, order = _noise([(seed, NELBO, *row, level) for row in keys], text)
        hidden = ((level + u) / levels * size).long().clamp(max=size - 1) + 1
        rank = order.masked_fill(~open_, torch.inf).argsort(1).argsort(1)
        lost = _cross_entropy(model, text, open_ & (rank < hidden[:, None]))
        draws.append(lost * size / hidden.clamp(min=1))
    return torch.stack(draws, 1)


def scorable(model: MaskedModel, text: Text) -> Bool[Tensor, "b n"]:
    """The positions to score without those where the text holds the mask itself, which the model never predicts."""
    return text.target & (text.tokens != model.constants.mask_id)


def _cross_entropy(model: MaskedModel, text: Text, masked: Bool[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Cross-entropy of what is masked in one call, summed over each row, in nats, float64."""
    tokens, length = text.tokens, text.tokens.shape[1]
    row, place = masked.nonzero(as_tuple=True)
    seen = (place - 1).clamp(min=0) if model.constants.shift else place
    logits = model.logits(tokens.masked_fill(masked, model.constants.mask_id), text.valid, row * length + seen)
    if int(tokens.max()) >= logits.shape[-1]:
        raise CdlmError(
            f"the model gave logits of {logits.shape[-1]} tokens, and the text holds token {int(tokens.max())}: it is"
            " of another vocabulary"
        )
    sums = torch.zeros(len(masked), dtype=fine(masked.device), device=masked.device)
    size = max(1, PIECE // logits.shape[-1])
    for z, wanted, part in zip(logits.split(size), tokens[masked].split(size), row.split(size), strict=True):
        sums.index_add_(0, part, refined(z.logsumexp(-1) - z.gather(1, wanted[:, None]).squeeze(1)))
    return sums


def _noise(keys: list[tuple[int, ...]], text: Text) -> tuple[Float[Tensor, " b"], Float[Tensor, "b n"]]:
    """A number of each row and one of each of its positions, in [0, 1)."""
    numbers = [
        torch.rand(1 + size, generator=generator(*key), dtype=torch.float64)
        for key, size in zip(keys, text.sizes, strict=True)
    ]
    u = torch.stack([part[0] for part in numbers]).to(text.tokens.device, fine(text.tokens.device))
    return u, text.spread([part[1:].to(u.dtype) for part in numbers])
