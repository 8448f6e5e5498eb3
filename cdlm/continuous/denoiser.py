"""The contract between models and everything that samples from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from cdlm.continuous.warping import Schedule
from cdlm.errors import CdlmError
from cdlm.types import Condition, Prediction


class Denoiser(ABC):
    """`(z, t, condition) -> Prediction`, row by row: no row sees another."""

    rho: float
    """Norm of every embedding."""
    dim: int
    schedule: Schedule
    """Says which noise levels the denoiser knows and how to space them."""

    @abstractmethod
    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        """One call of the network, at noise level t (float64) of each row."""

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Clean embeddings."""

    @abstractmethod
    def expect(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        """Expected clean embedding under softmax(logits)."""


@dataclass(frozen=True)
class Steering:
    """How a prediction drives the state: temperatures and classifier-free guidance.

    Args:
        softmax_temperature: > 0, divides the logits before the expected embedding is taken; below 1 sharpens.
        score_temperature: > 0, divides the score, `x0 = z + (x0 - z) / temperature`; below 1 sharpens (CDCD, 6.4).
        guidance: scale g of `x0 = x0_uncond + g (x0_cond - x0_uncond)`; 1 is off, others cost a second call a step.

    The plain prediction, not the steered one, feeds self-conditioning, the statistics and the final tokens.
    """

    softmax_temperature: float = 1.0
    score_temperature: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("softmax_temperature", "score_temperature"):
            if not getattr(self, name) > 0:
                raise CdlmError(f"{name} must be > 0, got {getattr(self, name)}: 1 leaves the model as it is")

    @property
    def calls(self) -> int:
        """Denoiser calls for one prediction."""
        return 1 if self.guidance == 1 else 2

    def predict(
        self, denoiser: Denoiser, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition
    ) -> tuple[Prediction, Float[Tensor, "b n d"]]:
        """The conditional prediction, and the clean estimate that drives the state."""
        plain = denoiser.denoise(z, t, condition)
        x0 = self._estimate(denoiser, plain)
        if self.guidance != 1:
            free = self._estimate(denoiser, denoiser.denoise(z, t, condition._replace(clean=condition.clean * 0)))
            x0 = free + self.guidance * (x0 - free)
        if self.score_temperature != 1:
            x0 = z + (x0 - z) / self.score_temperature
        return plain, x0

    def _estimate(self, denoiser: Denoiser, prediction: Prediction) -> Float[Tensor, "b n d"]:
        if self.softmax_temperature == 1:
            return prediction.x0
        return denoiser.expect(prediction.logits / self.softmax_temperature)
