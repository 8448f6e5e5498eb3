"""The contract between models and everything that samples from them."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.continuous.schedules import Schedule
from cdlm.core.errors import CdlmError
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

    decodes: bool = False
    """Whether its predictions have no logits: tokens are read from an estimate, by `decode`."""
    guidance_range: tuple[float, float] | None = None
    """Scales of guidance that the network is told, which then cost no second call; None of one that is told none."""

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

    def given(self, tokens: Int[Tensor, "b n"], seen: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Clean vectors of the tokens at the positions that are `seen`, of nothing else; zero elsewhere."""
        return self.embed(tokens) * seen[..., None]

    def committed(self, tokens: Int[Tensor, "b n"], x0: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What the network is shown for tokens that are decided, where the estimate is x0."""
        return self.embed(tokens)

    def decode(self, x0: Float[Tensor, "b n d"], condition: Condition) -> Float[Tensor, "b n v"]:
        """Logits of an estimate, by a call; of a system that `decodes`."""
        raise CdlmError(f"the predictions of {self.name} say their tokens: there is nothing to decode")

    def probed(self, x0: Float[Tensor, "b n d"]) -> Float[Tensor, "b n v"]:
        """Logits of an estimate, without a call; of a system that was trained with a probe."""
        raise CdlmError(f"{self.name} was trained without a probe: use another read-out")

    @abstractmethod
    def mix(self, weights: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        """The state of weighted tokens; of weights that are probabilities, the mean embedding."""

    def expect(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        """Expected clean embedding under softmax(logits)."""
        return self.mix(logits.softmax(-1))
