"""The contract between models and everything that samples from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from cdlm.continuous.control import Control
from cdlm.continuous.projections import Expectation, Projection
from cdlm.continuous.warping import Schedule
from cdlm.errors import CdlmError
from cdlm.noise import Draws
from cdlm.types import Condition, Prediction


class Denoiser(ABC):
    """`(z, t, condition) -> Prediction`, row by row: no row sees another."""

    rho: float
    """Norm of every embedding."""
    dim: int
    schedule: Schedule
    """Says which noise levels the denoiser knows and how to space them."""
    sees_given: bool = True
    """Whether the network tells given positions apart. If not, their state has to be held at their embedding."""

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


@dataclass(frozen=True)
class Steering:
    """How a prediction drives the state: temperatures, classifier-free guidance, and control by single tokens.

    Args:
        softmax_temperature: > 0, divides the logits before the expected embedding is taken; below 1 sharpens.
        score_temperature: > 0, divides the score, `x0 = z + (x0 - z) / temperature`; below 1 sharpens (CDCD, 6.4).
        projection: how the logits become the estimate, by default as their mean embedding.
        guidance: scale g of `x0 = x0_uncond + g (x0_cond - x0_uncond)`; 1 is off, others cost a second call a step.
        control: tokens that are wanted or unwanted, whatever the model was trained for; it comes last, after the score
            temperature.

    The plain prediction, not the steered one, feeds self-conditioning, the statistics and the final tokens.
    """

    softmax_temperature: float = 1.0
    score_temperature: float = 1.0
    guidance: float = 1.0
    projection: Projection = field(default_factory=Expectation)
    control: Control | None = None

    def __post_init__(self) -> None:
        for name in ("softmax_temperature", "score_temperature"):
            if not getattr(self, name) > 0:
                raise CdlmError(f"{name} must be > 0, got {getattr(self, name)}: 1 leaves the model as it is")

    @property
    def calls(self) -> int:
        """Denoiser calls for one prediction."""
        return 1 if self.guidance == 1 else 2

    @property
    def settings(self) -> dict[str, float | str]:
        """The same as plain values."""
        names = ("softmax_temperature", "score_temperature", "guidance")
        plain: dict[str, float | str] = {name: float(getattr(self, name)) for name in names}
        if self.projection != Expectation():
            plain["projection"] = repr(self.projection)
        return plain if self.control is None else {**plain, "control": repr(self.control)}

    def predict(
        self, denoiser: Denoiser, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition, draws: Draws
    ) -> tuple[Prediction, Float[Tensor, "b n d"]]:
        """The conditional prediction, and the clean estimate that drives the state."""
        plain, pushed = self._ask(denoiser, z, t, condition)
        x0 = self._estimate(denoiser, plain, draws)
        if self.guidance != 1:
            other = denoiser.denoise(z, t, condition._replace(clean=condition.clean * 0))
            free = self._estimate(denoiser, other, draws)
            x0 = free + self.guidance * (x0 - free)
        if self.score_temperature != 1:
            x0 = z + (x0 - z) / self.score_temperature
        return plain, x0 if pushed is None else x0 + pushed

    def _ask(self, denoiser: Denoiser, z: Tensor, t: Tensor, condition: Condition) -> tuple[Prediction, Tensor | None]:
        if self.control is None:
            return denoiser.denoise(z, t, condition), None
        return self.control.predict(lambda state: denoiser.denoise(state, t, condition), z, t, condition.noised)

    def _estimate(self, denoiser: Denoiser, prediction: Prediction, draws: Draws) -> Float[Tensor, "b n d"]:
        if self.softmax_temperature == 1 and self.projection == Expectation():
            return prediction.x0
        return self.projection(denoiser, prediction.logits / self.softmax_temperature, draws)
