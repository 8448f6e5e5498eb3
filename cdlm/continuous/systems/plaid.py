"""Plaid: likelihood-based diffusion in a small embedding space (arXiv 2305.18619)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cdlm.continuous.embedding import OutputPrior, TokenEmbedding
from cdlm.continuous.grids import Warped
from cdlm.continuous.inputs import ConcatenatedInput, NetworkInput
from cdlm.continuous.objectives import Variational
from cdlm.continuous.published.plaid import BASE_WIDTH, ReleasedTransformer, SummedInput
from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.schedules import Schedule, t_of_gamma
from cdlm.continuous.solvers import Ancestral
from cdlm.continuous.system import ContinuousConfig, EmbeddingDiffusion
from cdlm.core.checks import check_choice, check_number, check_whole
from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError
from cdlm.models.transformer import Transformer
from cdlm.sampling.texts import Special


class LearnedGamma(Schedule):
    """gamma(u) = gamma_0 + (gamma_1 - gamma_0) g~(u), both ends and the monotone g~ learned (sections 3.1 and 4.3).

    g(u) = W2+ tanh(W1+ (u - 1/2) + b1) with positive weights, rescaled to run from 0 to 1. All float64.
    """

    def __init__(self, gamma_min: float = -3.0, gamma_max: float = 6.0, units: int = 1024):
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor([gamma_min, gamma_max]))
        self.w1, self.b1 = nn.Parameter(torch.randn(units)), nn.Parameter(torch.randn(units))
        self.w2 = nn.Parameter(torch.randn(units))

    @property
    def t_min(self) -> float:
        return t_of_gamma(refined(self.gamma[0].detach())).item()

    @property
    def t_max(self) -> float:
        return t_of_gamma(refined(self.gamma[1].detach())).item()

    def t_of_u(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        low, high = refined(self.gamma)
        return t_of_gamma(low + (high - low) * self.shape(u)[0])

    def u_of_t(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        wanted, low, high = refined(t), torch.zeros_like(refined(t)), torch.ones_like(refined(t))
        for _ in range(60):  # bisection: g~ rises
            middle = (low + high) / 2
            below = self.t_of_u(middle) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def density(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return 1 / self.slope(self.u_of_t(t))

    def slope(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        low, high = refined(self.gamma)
        _, rate = self.shape(u)
        return self.t_of_u(u) * (high - low) * rate / 2

    def learn(
        self, u: Float[Tensor, " b"], scale: Callable[[], Float[Tensor, " b"]]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        low, high = refined(self.gamma)
        shape, rate = self.shape(u)
        for part in (shape, rate):
            if part.requires_grad:
                part.register_hook(lambda gradient: gradient * scale())
        t = t_of_gamma(low + (high - low) * shape)
        return t, t * (high - low) * rate / 2

    def fit(self, t: Float[Tensor, " b"], nats: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        return torch.zeros((), dtype=fine(t.device), device=t.device)  # the objective's own gradient trains it

    def after_step(self) -> None:
        return

    def shape(self, u: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """g~ and its derivative at u, which may lie outside [0, 1]."""
        w1, b1, w2 = F.softplus(refined(self.w1)), refined(self.b1), 0.01 * F.softplus(refined(self.w2))
        points = torch.cat([u.to(w1), w1.new_tensor([0.0, 1.0])])
        bent = torch.tanh((points[:, None] - 0.5) * w1 + b1)
        height = bent @ w2
        rate = (1 - bent.square()) @ (w1 * w2)
        rise = height[-1] - height[-2]
        return (height[:-2] - height[-2]) / rise, rate[:-2] / rise


@dataclass(frozen=True)
class Plaid(ContinuousConfig):
    """The variational bound as the objective, and a learned schedule, on the shared backbone (as RePlaid, arXiv
    2605.18530) or on the network of the released weights. `plaid_1b.yaml` has the published size.

    Args:
        network: "shared" sees prompts as prompts; "released" is blind for them, as it was published: it takes given
            tokens for noisy ones, and in sampling their state is held at their embedding.
        dim: embedding dimension; every embedding has norm 1.
        gamma_min: the schedule's first end of least noise, in ln(sigma^2 / alpha^2); it is learned.
        gamma_max: the schedule's first end of most noise; it is learned.
        gates: AdaLN-Zero gates on the branches, of the shared backbone.
        base_width: of the released network, the width at which its output has scale 1.
        output_prior_warmup: optimiser steps until the closed-form term of a position's own state counts in full.
        self_conditioning: share of training rows with a first pass.
        guidance_dropout: share of training rows whose prompt is hidden.
    """

    network: Literal["shared", "released"] = "shared"
    dim: int = 16
    gamma_min: float = -3.0
    gamma_max: float = 6.0
    gates: bool = True
    base_width: int = BASE_WIDTH
    output_prior_warmup: int = 500
    self_conditioning: float = 0.25
    guidance_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("Plaid", ("shared", "released"), network=self.network)
        check_whole("Plaid", dim=self.dim, base_width=self.base_width)
        check_number("Plaid", gamma_min=self.gamma_min)
        check_number("Plaid", above=self.gamma_min, gamma_max=self.gamma_max)
        check_whole("Plaid", least=0, output_prior_warmup=self.output_prior_warmup)
        check_number("Plaid", least=0, most=1, self_conditioning=self.self_conditioning)
        check_number("Plaid", least=0, most=1, guidance_dropout=self.guidance_dropout)
        if self.network == "released" and not self.gates:
            raise CdlmError("gates are of the shared network, the released one has none: leave the setting out")
        if self.network == "shared" and self.base_width != BASE_WIDTH:
            raise CdlmError(f"base_width is of the released network, got {self.base_width}: leave it out")

    @property
    def sampling(self) -> Diffusion:
        return Diffusion(solver=Ancestral(), grid=Warped())

    def build(self, vocab: int, special: Special | None = None) -> EmbeddingDiffusion:
        embedding = TokenEmbedding(vocab, self.dim, init_std=0.25, rho=1.0)
        schedule = LearnedGamma(self.gamma_min, self.gamma_max)
        network, network_input = self._network(vocab, embedding.rho)
        return EmbeddingDiffusion(
            embedding, schedule, network,
            network_input=network_input,
            objective=Variational(),
            output_prior=OutputPrior(self.output_prior_warmup),
            self_conditioning=self.self_conditioning,
            guidance_dropout=self.guidance_dropout,
            unit_prior=True,
            sampling=self.sampling,
            config={"system": "plaid", "vocab": vocab, **asdict(self)},
        )  # fmt: skip

    def _network(self, vocab: int, rho: float) -> tuple[nn.Module, NetworkInput]:
        size: dict[str, Any] = {
            "width": self.width, "depth": self.depth, "heads": self.heads, "mlp_ratio": self.mlp_ratio,
        }  # fmt: skip
        if self.network == "released":
            return ReleasedTransformer(vocab, **size, base_width=self.base_width), SummedInput(self.dim, self.width)
        return Transformer(3 * self.dim + 1, vocab, **size, gates=self.gates), ConcatenatedInput(self.dim, rho)
