"""The contract between models and everything that samples from them."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from cdlm.continuous.schedules import Schedule
from cdlm.core.types import Condition, Prediction
from cdlm.sampling.session import Model, Sampling


class Denoiser(Model):
    """`(z, t, condition) -> Prediction`, row by row: no row sees another."""

    rho: float
    """Norm of every embedding."""
    dim: int
    schedule: Schedule
    """Says which noise levels the denoiser knows and how to space them."""
    sees_given: bool = True
    """Whether the network tells given positions apart. If not, their state has to be held at their embedding."""

    doubts: bool = False
    """Whether its logits at given positions say how likely the given token is."""
    self_conditioning: float = 0.0
    """Share of training rows that saw an estimate of a first pass; above 0, a prediction takes two calls."""

    @property
    def defaults(self) -> Sampling:
        from cdlm.continuous.sampler import Diffusion

        return Diffusion()

    @property
    def prior_std(self) -> float:
        """Standard deviation of the state that sampling starts from, at t_max."""
        return self.schedule.t_max

    @abstractmethod
    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        """One call of the network, at noise level t (float64) of each row."""

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Clean embeddings."""

    @abstractmethod
    def mix(self, weights: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        """The state of weighted tokens; of weights that are probabilities, the mean embedding."""

    def expect(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        """Expected clean embedding under softmax(logits)."""
        return self.mix(logits.softmax(-1))
