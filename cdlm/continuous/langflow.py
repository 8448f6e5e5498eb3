"""LangFlow: cross-entropy under noise levels spread evenly over information (arXiv 2604.11748)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdlm.continuous.embedding import OwnPosition, TokenEmbedding
from cdlm.continuous.levels import gamma_of, t_of_gamma
from cdlm.continuous.system import ContinuousConfig, EmbeddingDiffusion
from cdlm.continuous.warping import Schedule
from cdlm.errors import CdlmError
from cdlm.system import Special
from cdlm.transformer import Transformer


class Gumbel(Schedule):
    """gamma = mu - beta ln(-ln q): where the posterior entropy H exp(-exp(-(gamma - mu) / beta)) changes, levels are
    drawn. mu, beta and H are fitted to the loss as a function of gamma.

    Args:
        mu, beta, entropy: first values, in gamma = ln(sigma^2 / alpha^2) and nats.
        cutoff: q runs from `cutoff` to 1 - `cutoff`, since the ends lie at infinity.
        delay: optimiser steps before the fit starts: an untrained model is equally wrong at every level.
    """

    def __init__(self, mu: float, beta: float, entropy: float, cutoff: float = 1e-5, delay: int = 0):
        super().__init__()
        self.mu, self.beta = nn.Parameter(torch.tensor(mu)), nn.Parameter(torch.tensor(beta))
        self.entropy = nn.Parameter(torch.tensor(entropy))
        self.cutoff, self.delay = cutoff, delay
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def t_min(self) -> float:
        return self.t_of_u(torch.zeros(1)).item()

    @property
    def t_max(self) -> float:
        return self.t_of_u(torch.ones(1)).item()

    def t_of_u(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        mu, beta = self._place()
        q = self.cutoff + (1 - 2 * self.cutoff) * u.double().to(mu.device)
        return t_of_gamma(mu - beta * (-q.log()).log())

    def u_of_t(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (self._quantile(t) - self.cutoff) / (1 - 2 * self.cutoff)

    def density(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        _, beta = self._place()
        q = self._quantile(t)
        return -q * q.log() / beta * 2 / t.double() / (1 - 2 * self.cutoff)

    def fit(self, t: Float[Tensor, " b"], nats: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """Mean squared error of the modelled entropy, zero before the delay is over."""
        expected = self.entropy.double() * self._quantile(t, learned=True)
        return (expected - nats.double()).square().mean() * (self.steps >= self.delay)

    @torch.no_grad()
    def after_step(self) -> None:
        self.steps += 1
        self.beta.clamp_(min=0.05)  # a step function would never be left again

    def _place(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        return self.mu.detach().double(), self.beta.detach().double()

    def _quantile(self, t: Float[Tensor, " b"], learned: bool = False) -> Float[Tensor, " b"]:
        mu, beta = (self.mu.double(), self.beta.double()) if learned else self._place()
        return (-(-(gamma_of(t.double()) - mu) / beta).exp()).exp()


@dataclass(frozen=True)
class LangFlow(ContinuousConfig):
    """Cross-entropy under a learned Gumbel schedule, with the own-position term. `langflow_owt.yaml` has the published
    size.

    Args:
        width, depth, heads, mlp_ratio: the transformer.
        dim: embedding dimension, in the paper the width; every embedding has norm sqrt(dim).
        gates: AdaLN-Zero gates on the branches.
        own_position_warmup: optimiser steps until the closed-form term of a position's own state counts in full.
        fit_delay: optimiser steps before the schedule is fitted.
        self_conditioning: share of training rows with a first pass.
        guidance_dropout: share of training rows whose prompt is hidden.
    """

    dim: int = 64
    gates: bool = True
    own_position_warmup: int = 500
    fit_delay: int = 200
    self_conditioning: float = 0.25
    guidance_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim < 1:
            raise CdlmError(f"dim must be >= 1, got {self.dim}")
        for name in ("own_position_warmup", "fit_delay"):
            if getattr(self, name) < 0:
                raise CdlmError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("self_conditioning", "guidance_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise CdlmError(f"{name} is a share of rows in [0, 1], got {getattr(self, name)}")

    def build(self, vocab: int, special: Special | None = None) -> EmbeddingDiffusion:
        embedding = TokenEmbedding(vocab, self.dim)
        return EmbeddingDiffusion(
            embedding,
            # At 0.4 embedding norms half the tokens of a large vocabulary can be told from their noisy state alone.
            Gumbel(2 * math.log(0.4 * embedding.rho), 1.0, math.log(vocab), delay=self.fit_delay),
            Transformer(
                3 * self.dim + 1, vocab, width=self.width, depth=self.depth, heads=self.heads,
                mlp_ratio=self.mlp_ratio, gates=self.gates,
            ),
            own_position=OwnPosition(self.own_position_warmup),
            self_conditioning=self.self_conditioning,
            guidance_dropout=self.guidance_dropout,
            unit_prior=True,
            config={"system": "langflow", "vocab": vocab, **asdict(self)},
        )  # fmt: skip
