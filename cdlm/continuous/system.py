"""A diffusion language model in embedding space, as a choice of parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cdlm.continuous import likelihood
from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.embedding import Embedding, OutputPrior
from cdlm.continuous.inputs import ConcatenatedInput, NetworkInput
from cdlm.continuous.objectives import CrossEntropy, Objective
from cdlm.continuous.sampler import Diffusion, behind
from cdlm.continuous.schedules import Schedule
from cdlm.core.checks import MOST_STEPS, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import LikelihoodSettings, Nats, Progress, Text
from cdlm.core.trees import join, take
from cdlm.core.types import Batch, Condition, Prediction
from cdlm.models.system import Loss, System, SystemConfig
from cdlm.sampling.texts import Special


class ContinuousSystem(System, Denoiser):
    """A system whose states are z = e + t eps: what training, sampling and distillation know of it.

    Subclasses say where tokens lie (`embed`) and how the clean vectors are estimated (`denoise`).
    """

    schedule: Schedule
    objective: Objective
    guidance_dropout: float
    """Share of training rows that do not see their clean embeddings."""
    first_pass_steps: int = 0
    """Fewest steps that sampling will take, which the first passes of training are as far apart for; 0 is off."""

    def forward(self, batch: Batch) -> Loss:
        """The objective; in evaluation mode all rows get a first pass and no prompt is hidden."""
        return self.objective(self, batch)

    def levels(self, u: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        return self.schedule.t_of_u(u)

    @property
    def learned_schedule(self) -> nn.Module | None:
        return self.schedule if self.objective.fits_schedule else None

    def after_step(self) -> None:
        if self.objective.fits_schedule:
            self.schedule.after_step()

    def keep_space(self) -> None:
        """Freeze how noise is spread and where tokens lie: what a student has from its teacher and shares with it."""
        self.schedule.requires_grad_(False)

    @abstractmethod
    def draw(
        self, batch: Batch, t: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"], Condition]:
        """Clean vectors of a batch, a noisy state of them at t, and the condition beside it, without a first pass."""

    def noise(
        self, clean: Float[Tensor, "b n d"], t: Float[Tensor, " b"], batch: Batch,
        shown: Float[Tensor, "b n d"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Condition]:  # fmt: skip
        """A noisy state of each row, and the condition beside it, without a first pass.

        Args:
            shown: vectors that given positions show; by default their own.
        """
        device, rows = clean.device, len(t)
        eps = torch.randn(clean.shape, generator=batch.generator, device=device)
        z = clean + t.to(clean.dtype)[:, None, None] * eps
        kept = torch.rand(rows, 1, 1, generator=batch.generator, device=device) >= self.guidance_dropout * self.training
        given = (clean if shown is None else shown) * (~batch.target)[..., None] * kept
        return z, Condition(given, batch.target, torch.zeros_like(clean), batch.valid)

    def noisy(
        self, clean: Float[Tensor, "b n d"], t: Float[Tensor, " b"], batch: Batch,
        shown: Float[Tensor, "b n d"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Condition]:  # fmt: skip
        """The same, and the first rows get a first pass."""
        z, condition = self.noise(clean, t, batch, shown)
        return z, condition._replace(x0=self._first_pass(*self._noisier(clean, z, t, batch), condition))

    def first_rows(self, rows: int) -> int:
        """How many of so many rows get a first pass; in evaluation mode all, if the system does that at all."""
        # Levels are a random permutation of the rows, so the first rows are a random share.
        return round((self.self_conditioning if self.training else float(self.self_conditioning > 0)) * rows)

    @torch.no_grad()
    def _noisier(self, clean: Tensor, z: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """State and level of each row's first pass: with the same noise, by U(0, 1 / `first_pass_steps`) of the
        schedule's u above the row's own."""
        if not (self.first_pass_steps and self.training):
            return z, t
        step = torch.rand(len(t), generator=batch.generator, dtype=t.dtype, device=t.device) / self.first_pass_steps
        before = self.schedule.t_of_u((self.schedule.u_of_t(t) + step).clamp(max=1)).to(t).maximum(t)
        return clean + (before / t).to(z.dtype)[:, None, None] * (z - clean), before

    def _first_pass(self, z: Tensor, t: Tensor, condition: Condition) -> Float[Tensor, "b n d"]:
        rows = self.first_rows(len(t))
        if rows == 0:
            return condition.x0
        first = torch.arange(rows, device=z.device)
        with torch.no_grad():
            x0 = self.denoise(*take((z, t, condition), first)).x0
        return join(x0, condition.x0[rows:])


class EmbeddingDiffusion(ContinuousSystem):
    """Tokens are embedded, noised as z = e + t eps, and recovered by a network that sees all positions at once.

    softmax(logits) averages the embeddings to x0, and (x0 - z) / t**2 is the score (score interpolation: CDCD, arXiv
    2211.15089, section 3.1; categorical reparametrisation: Plaid, arXiv 2305.18619).

    Args:
        embedding, schedule, network: the parts. The network maps features and a level to v logits.
        network_input: how the state is shown to the network; by default CDCD's, with 3 d + 1 features.
        objective: what training minimises; by default cross-entropy.
        output_prior: what a position's own noisy state says about its token, in closed form; None leaves it out.
        self_conditioning: share of training rows that see an estimate of a first pass.
        first_pass_steps: the fewest steps that sampling will take: in training, the first pass is made at a level that
            lies up to one such step before the row's own, as in sampling (FastDiSS, arXiv 2604.05551). 0 makes it at
            the row's own.
        guidance_dropout: share of training rows that do not see their clean embeddings.
        unit_prior: sampling starts where the variance-preserving state is standard normal, at sqrt(1 + t_max**2),
            instead of at t_max.
        block: positions that are generated at a time, each block after those before it and blind for what follows;
            None generates all at once.
        sampling: how its paper samples it; by default `Diffusion` in such blocks.
        config: plain values that rebuild the system; saved beside the weights.
    """

    def __init__(
        self,
        embedding: Embedding,
        schedule: Schedule,
        network: nn.Module,
        *,
        network_input: NetworkInput | None = None,
        objective: Objective | None = None,
        output_prior: OutputPrior | None = None,
        self_conditioning: float = 0.5,
        first_pass_steps: int = 0,
        guidance_dropout: float = 0.1,
        unit_prior: bool = False,
        block: int | None = None,
        sampling: Diffusion | None = None,
        config: Mapping[str, Any],
    ):
        super().__init__()
        self.embedding, self.schedule, self.network = embedding, schedule, network
        self.network_input = network_input or ConcatenatedInput(embedding.dim, embedding.rho)
        self.objective = objective or CrossEntropy()
        self.output_prior, self.self_conditioning, self.guidance_dropout = (
            output_prior, self_conditioning, guidance_dropout,
        )  # fmt: skip
        self.first_pass_steps = first_pass_steps
        self.unit_prior, self.block = unit_prior, block
        self.config = dict(config)
        self.doubts = self.objective.doubts
        self._defaults = Diffusion(block=block) if sampling is None else sampling
        self.rho, self.dim, self.sees_given = embedding.rho, embedding.dim, self.network_input.sees_given

    @property
    def defaults(self) -> Diffusion:
        return self._defaults

    @property
    def prior_std(self) -> float:
        return (1 + self.schedule.t_max**2) ** 0.5 if self.unit_prior else self.schedule.t_max

    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        logits = self.logits(z, t, condition)
        return Prediction(logits, self.expect(logits))

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.embedding(tokens)

    def mix(self, weights: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        return self.embedding.mix(weights)

    def expect(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        return self.embedding.expect(logits)

    def draw(
        self, batch: Batch, t: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"], Condition]:
        clean = self.embed(batch.tokens)
        return clean, *self.noise(clean, t, batch)

    def keep_space(self) -> None:
        super().keep_space()
        self.embedding.requires_grad_(False)

    def nats(self, text: Text, settings: LikelihoodSettings, progress: Progress | None = None) -> dict[str, Nats]:
        return likelihood.nats(self, text, settings, progress)

    def after_step(self) -> None:
        super().after_step()
        if self.output_prior is not None and self.objective.fits_schedule:
            self.output_prior.after_step()

    def facts(self) -> dict[str, float]:
        """KL divergence in nats, of one embedding at the noisiest level from the prior."""
        return {"prior_mismatch": self.prior_nats(torch.tensor([self.schedule.t_max], dtype=torch.float64)).item()}

    def prior_nats(self, t_max: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """KL(N(e, t_max**2) || N(0, prior variance)) of one position, in nats: rho**2 / (2 t_max**2) where both
        variances are the same."""
        ratio = t_max.square() / (t_max.square() + 1) if self.unit_prior else torch.ones_like(t_max)
        return 0.5 * (ratio * (self.rho / t_max) ** 2 + self.dim * (ratio - 1 - ratio.log()))

    def logits(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Float[Tensor, "b n v"]:
        """One call of the network."""
        if self.self_conditioning == 0:  # it never learned to read an estimate
            condition = condition._replace(x0=torch.zeros_like(condition.x0))
        if self.block is not None:
            condition = _without_future(condition)
        features, level = self.network_input(z, t, condition)
        logits = self.run_network(features, level, condition.valid)
        if self.output_prior is None:
            return logits
        # A given position is only in play where the network does not know that it is given.
        own = self.output_prior(z, t, self.embedding)
        return logits + (own * condition.target[..., None].to(z.dtype) if self.sees_given else own)


def _without_future(condition: Condition) -> Condition:
    """The same, with everything behind the block that is generated taken for padding."""
    seen = ~(behind(condition.target) if condition.ahead is None else condition.ahead)
    return condition._replace(valid=seen if condition.valid is None else seen & condition.valid)


COMMITTING: Mapping[str, int | float | str] = {"steps": 64, "solver": "Ancestral()", "commit": "Threshold(0.9)"}
"""The sampler that systems recommend which commits help."""


@dataclass(frozen=True)
class ContinuousConfig(SystemConfig):
    """Settings of a system in embedding space."""

    @property
    def sampling(self) -> Diffusion:
        """The sampler of its paper."""
        return Diffusion()

    @property
    def committing(self) -> bool:
        """Whether commits were measured to save calls on it, trained with masks of random subsets (docs/calls.md)."""
        return False

    def check_first_pass(self, steps: int, share: float) -> None:
        """Raise unless `first_pass_steps` and the share of rows with a first pass go together."""
        check_whole(type(self).__name__, least=0, largest=MOST_STEPS, first_pass_steps=steps)
        if steps and not share:
            raise CdlmError(
                f"first_pass_steps={steps} moves a first pass, and there is none: raise self_conditioning above 0"
            )

    def preset(self, subsets: bool) -> dict[str, int | float | str]:
        return dict(COMMITTING) if self.committing and subsets else {}

    @abstractmethod
    def build(self, vocab: int, special: Special | None = None) -> ContinuousSystem: ...
