"""How a prediction drives the state: temperatures, classifier-free guidance, and control by the gradient of the model's
own log-probabilities, without training (Plaid, arXiv 2305.18619, section 6.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.projections import Expectation, Projection
from cdlm.core.checks import Settings, check_number, check_object
from cdlm.core.errors import CdlmError
from cdlm.core.rng import StepNoise
from cdlm.core.types import Condition, Prediction


@dataclass(frozen=True)
class Term:
    """A token that is wanted, or unwanted, somewhere in the sample.

    Args:
        token: its id.
        weight: of its log-probability; 2 in the paper.
        position: a position of the row, counted from the end if negative; "any" of the positions to generate (the mean
            of their probabilities counts) or "all" of them (the sum of their log-probabilities).
        complement: the token is unwanted: 1 - p in place of p.
    """

    token: int
    weight: float = 2.0
    position: int | Literal["any", "all"] = "any"
    complement: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.token, int) or self.token < 0:
            raise CdlmError(f"a Term needs the id of a token, a whole number >= 0, got {self.token!r}")
        if not isinstance(self.weight, int | float) or not math.isfinite(self.weight):
            raise CdlmError(f"the weight of a Term is a number, got {self.weight!r}")
        if not isinstance(self.position, int) and self.position not in ("any", "all"):
            raise CdlmError(f'the position of a Term is a whole number, "any" or "all", got {self.position!r}')

    def score(self, logits: Float[Tensor, "b n v"], open_: Bool[Tensor, "b n"]) -> Float[Tensor, " b"]:
        """The weighted log-probability of each row; `open_` says which positions are to be generated."""
        n, v = logits.shape[1:]
        if self.token >= v:
            raise CdlmError(f"{self!r} asks for a token of another vocabulary: this one has {v}")
        if isinstance(self.position, int):
            if not -n <= self.position < n:
                raise CdlmError(f"{self!r} asks for a position that rows of {n} do not have")
            return self.weight * self._log_p(logits[:, self.position])
        each = self._log_p(logits)
        if self.position == "all":
            return self.weight * torch.where(open_, each, 0).sum(1)
        return self.weight * (each.masked_fill(~open_, -torch.inf).logsumexp(1) - open_.sum(1).to(each).log())

    def _log_p(self, logits: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
        if not self.complement:
            return logits.log_softmax(-1)[..., self.token]
        # Not ln(1 - p): where p rounds to 1, this still has its gradient.
        own = torch.arange(logits.shape[-1], device=logits.device) == self.token
        return logits.masked_fill(own, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)


@dataclass(frozen=True)
class Control:
    """Terms of the same kind for all rows of a run.

    With L the sum of the terms' scores, the estimate moves by `t^2 dL/dz`: the score of p(z | what is wanted) in place
    of that of p(z). It costs no call of the network, but a pass back through it.
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms or not all(isinstance(term, Term) for term in self.terms):
            raise CdlmError(
                f"a Control is of one Term or more, such as Control((Term(5), Term(9))), got {self.terms!r}"
            )

    def predict(
        self,
        ask: Callable[[Tensor], Prediction],
        z: Float[Tensor, "b n d"],
        t: Float[Tensor, " b"],
        open_: Bool[Tensor, "b n"],
    ) -> tuple[Prediction, Float[Tensor, "b n d"]]:
        """The prediction at z, and by how much the estimate moves."""
        with torch.enable_grad():
            state = z.detach().requires_grad_()
            made = ask(state)
            wanted = torch.stack([term.score(made.logits, open_) for term in self.terms]).sum()
            (slope,) = torch.autograd.grad(wanted, state)
        return Prediction(made.logits.detach(), made.x0.detach()), slope * t.square().to(z.dtype)[:, None, None]


@dataclass(frozen=True)
class Guidance(Settings):
    """How a prediction drives the state: temperatures, classifier-free guidance, and control by single tokens.

    Args:
        softmax_temperature: > 0, divides the logits before the expected embedding is taken; below 1 sharpens.
        score_temperature: > 0, divides the score, `x0 = z + (x0 - z) / temperature`; below 1 sharpens (CDCD, 6.4).
        projection: how the logits become the estimate, by default as their mean embedding.
        scale: g of `x0 = x0_uncond + g (x0_cond - x0_uncond)`; 1 is off, others cost a second call a step. A network
            that is told the scale, such as ELF's, needs none.
        control: tokens that are wanted or unwanted, whatever the model was trained for; it comes last, after the score
            temperature.

    The plain prediction, not the steered one, feeds self-conditioning, the statistics and the final tokens.
    """

    softmax_temperature: float = 1.0
    score_temperature: float = 1.0
    scale: float = 1.0
    projection: Projection = field(default_factory=Expectation)
    control: Control | None = None

    def __post_init__(self) -> None:
        check_object("Guidance", Projection, projection=self.projection)
        if self.control is not None:
            check_object("Guidance", Control, control=self.control)
        softmax, score = self.softmax_temperature, self.score_temperature
        hint = "1 leaves the model as it is"
        check_number("Guidance", above=0.0, softmax_temperature=softmax, score_temperature=score, hint=hint)
        check_number("Guidance", scale=self.scale, hint="1 switches it off")

    @property
    def calls(self) -> int:
        """Denoiser calls for one prediction, of a network that is not told the scale."""
        return 1 if self.scale == 1 else 2

    @property
    def settings(self) -> dict[str, float | str]:
        """The same as plain values."""
        names = {
            "softmax_temperature": "softmax_temperature",
            "score_temperature": "score_temperature",
            "guidance": "scale",
        }
        plain: dict[str, float | str] = {name: float(getattr(self, field)) for name, field in names.items()}
        if self.projection != Expectation():
            plain["projection"] = repr(self.projection)
        return plain if self.control is None else {**plain, "control": repr(self.control)}

    def predict(
        self,
        denoiser: Denoiser,
        z: Float[Tensor, "b n d"],
        t: Float[Tensor, " b"],
        condition: Condition,
        draws: StepNoise,
    ) -> tuple[Prediction, Float[Tensor, "b n d"]]:
        """The conditional prediction, and the clean estimate that drives the state."""
        plain, pushed = self._ask(denoiser, z, t, condition)
        x0 = self._estimate(denoiser, plain, draws)
        if self.scale != 1 and condition.guidance is None:
            other = denoiser.denoise(z, t, condition._replace(clean=condition.clean * 0))
            free = self._estimate(denoiser, other, draws)
            x0 = free + self.scale * (x0 - free)
        if self.score_temperature != 1:
            x0 = z + (x0 - z) / self.score_temperature
        return plain, x0 if pushed is None else x0 + pushed

    def _ask(self, denoiser: Denoiser, z: Tensor, t: Tensor, condition: Condition) -> tuple[Prediction, Tensor | None]:
        if self.control is None:
            return denoiser.denoise(z, t, condition), None
        return self.control.predict(lambda state: denoiser.denoise(state, t, condition), z, t, condition.target)

    def _estimate(self, denoiser: Denoiser, prediction: Prediction, draws: StepNoise) -> Float[Tensor, "b n d"]:
        if self.softmax_temperature == 1 and self.projection == Expectation():
            return prediction.x0
        return self.projection(denoiser, prediction.logits / self.softmax_temperature, draws)
