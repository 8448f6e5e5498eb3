"""How a state is shown to a network: as features of each position, and a level of each row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdlm.continuous.schedules import alpha_of
from cdlm.core.types import Condition


class NetworkInput(nn.Module, ABC):
    """(z, t, condition) -> what the network reads."""

    sees_given: bool = True
    """Whether given tokens are marked apart from noisy ones. A network that does not know the difference sees a given
    token as its embedding under as much noise as all others."""

    @abstractmethod
    def forward(
        self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition
    ) -> tuple[Float[Tensor, "b n f"], Float[Tensor, " b"]]:
        """Features of the network, and its level as a float32."""


class ConcatenatedInput(NetworkInput):
    """The noisy state at unit variance, the clean embedding if given, the previous estimate, and which of both it is
    (CDCD, section 4.1): 3 d + 1 features. The level is ln t in units of the embedding norm.

    Args:
        dim, rho: of the embeddings.
    """

    def __init__(self, dim: int, rho: float):
        super().__init__()
        self.rho, self.unit = rho, math.sqrt(dim) / rho

    def forward(
        self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition
    ) -> tuple[Float[Tensor, "b n f"], Float[Tensor, " b"]]:
        open_ = condition.target[..., None].to(z.dtype)
        scale = self.unit * alpha_of(self.unit * t)
        scaled = z * scale.to(z.dtype)[:, None, None] * open_
        others = (self.unit * condition.clean, self.unit * condition.x0 * open_, open_)
        return torch.cat([scaled, *others], -1), (t / self.rho).log().float()
