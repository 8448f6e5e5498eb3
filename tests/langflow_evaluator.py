"""What LangFlow's released evaluator prints as NLL (arXiv 2604.11748), to compare with its recorded numbers.

It is no likelihood where there are two passes, see docs/likelihood.md.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.likelihood import Estimate, Walk, solve
from cdlm.core.likelihood import Nats, Ode, Text
from cdlm.core.types import Prediction


@dataclass(frozen=True, eq=False)
class CutEstimate(Estimate):
    """No derivative goes through the first pass. What is left is not the derivative of this function."""

    def __call__(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"]) -> Prediction:
        condition = self.condition
        if self.two_passes:
            condition = condition._replace(x0=self.denoiser.denoise(z, t, condition).x0.detach())
        return self.denoiser.denoise(z, t, condition)


def langflow_evaluator_score(
    denoiser: Denoiser, text: Text, walk: Walk, ode: Ode | None = None, two_passes: bool | None = None
) -> Nats:
    """The score of each row.

    It differs from `walk_nats` in three ways. The first pass is cut out of the trace, so that what is integrated is not
    the divergence of the field that moves the state: the result is too low. The prior term is ||y_1||^2 / 2 - D/2. And
    positions that are not scored stay in sight, with the noise of the first state.
    """
    solution = solve(CutEstimate.of(denoiser, text, two_passes), text, walk, ode or Ode())
    prior = 0.5 * (solution.length - text.target.sum(1) * walk.noise.shape[-1])
    terms = {"prior": prior, "reconstruction": solution.reconstruction, "flow": solution.trace}
    return Nats(terms, torch.full_like(prior, math.nan), text.target.sum(1))
