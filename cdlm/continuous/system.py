"""A diffusion language model in embedding space, as a choice of parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.embedding import TokenEmbedding, expected_embedding
from cdlm.continuous.levels import alpha_of
from cdlm.continuous.warping import Schedule
from cdlm.system import Loss, System, row_cross_entropy, stratified
from cdlm.types import Condition, Prediction, join, take


class EmbeddingDiffusion(System, Denoiser):
    """Tokens are embedded, noised as z = e + t eps, and recovered by a network that sees all positions at once.

    Trained with cross-entropy, which interpolates the score: softmax(logits) averages the table to x0, and
    (x0 - z) / t**2 is the score (CDCD, arXiv 2211.15089, section 3.1). Per position the network reads four things
    (section 4.1): the scaled noisy state, the clean embedding if given, the previous estimate, and which of both it is.

    Args:
        embedding, schedule, network: the parts. The network maps 3 d + 1 features and a level to v logits.
        own_position: add the closed-form term z . e_w / t**2, what a position's own noisy state says about its token.
        self_conditioning: share of training rows that see an estimate of a first pass.
        guidance_dropout: share of training rows that do not see their clean embeddings.
        config: plain values that rebuild the system; saved beside the weights.
    """

    def __init__(
        self,
        embedding: TokenEmbedding,
        schedule: Schedule,
        network: nn.Module,
        *,
        own_position: bool = False,
        self_conditioning: float = 0.5,
        guidance_dropout: float = 0.1,
        config: Mapping[str, Any],
    ):
        super().__init__()
        self.embedding, self.schedule, self.network = embedding, schedule, network
        self.own_position, self.self_conditioning, self.guidance_dropout = (
            own_position, self_conditioning, guidance_dropout,
        )  # fmt: skip
        self.config = dict(config)
        self.rho, self.dim = embedding.rho, embedding.weight.shape[1]

    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        table = self.embedding.table()
        logits = self._logits(z, t, condition, table)
        return Prediction(logits, expected_embedding(logits, table))

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.embedding(tokens)

    def expect(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        return expected_embedding(logits, self.embedding.table())

    def forward(
        self,
        tokens: Int[Tensor, "b n"],
        noised: Bool[Tensor, "b n"],
        valid: Bool[Tensor, "b n"] | None,
        generator: torch.Generator,
        u: Float[Tensor, " b"] | None = None,
    ) -> Loss:
        """Cross-entropy (CDCD, sections 3 and 4) and the schedule's own regression; in evaluation mode all rows get a
        first pass and no prompt is hidden."""
        u = stratified(len(tokens), generator) if u is None else u
        t = self.schedule.t_of_u(u).detach()
        table = self.embedding.table()
        e = F.embedding(tokens, table)
        z = e + t.to(e.dtype)[:, None, None] * torch.randn(e.shape, generator=generator, device=e.device)
        kept = torch.rand(len(t), 1, 1, generator=generator, device=e.device) >= self.guidance_dropout * self.training
        condition = Condition(e * (~noised)[..., None] * kept, noised, torch.zeros_like(e), valid)
        condition = condition._replace(x0=self._first_pass(z, t, condition))
        logits = self._logits(z, t, condition, table)
        nats, count = row_cross_entropy(logits, tokens, noised)
        fit = self.schedule.fit(t, (nats / count).detach())
        return Loss(nats.sum() / count.sum() + fit.to(nats.dtype), (nats / count).detach(), t, count)

    def levels(self, u: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        return self.schedule.t_of_u(u)

    @property
    def own_schedule(self) -> nn.Module:
        return self.schedule

    def after_step(self) -> None:
        self.schedule.after_step()

    def facts(self) -> dict[str, float]:
        """KL divergence in nats, of one embedding at the noisiest level from the prior: rho**2 / (2 t_max**2)."""
        return {"prior_mismatch": 0.5 * (self.rho / self.schedule.t_max) ** 2}

    def _first_pass(self, z: Tensor, t: Tensor, condition: Condition) -> Float[Tensor, "b n d"]:
        # Levels are a random permutation of the rows, so the first rows are a random share.
        share = self.self_conditioning if self.training else float(self.self_conditioning > 0)
        rows = round(share * len(t))
        if rows == 0:
            return condition.x0
        first = torch.arange(rows, device=z.device)
        with torch.no_grad():
            x0 = self.denoise(*take((z, t, condition), first)).x0
        return join(x0, condition.x0[rows:])

    def _logits(
        self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition, table: Float[Tensor, "v d"]
    ) -> Float[Tensor, "b n v"]:
        open_ = condition.noised[..., None].to(z.dtype)
        scaled = z * alpha_of(t).to(z.dtype)[:, None, None] * open_
        features = torch.cat([scaled, condition.clean, condition.x0 * open_, open_], -1)
        level = (t / self.rho).log().float()
        logits = self.run_network(features, level, condition.valid)
        if self.own_position:
            logits = logits + open_ * (z / t.square().to(z.dtype)[:, None, None]) @ table.T
        return logits
