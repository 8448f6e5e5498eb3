"""An autoregressive model on the shared backbone, and its objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cdlm.autoregressive.sampler import CausalModel, check_order
from cdlm.core.checks import check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import BOUND, LikelihoodSettings, Nats, Progress, Text, in_batches
from cdlm.core.types import Batch
from cdlm.models.system import Loss, System, SystemConfig, row_cross_entropy
from cdlm.models.transformer import Transformer
from cdlm.sampling.texts import Special


class AutoregressiveModel(System, CausalModel):
    """Each token is predicted from those before it, the first one from the end-of-text token alone.

    The network is that of the masked model with causal attention, and has the same parameters: its noise level is
    always 0. Trained with the mean cross-entropy of all tokens (Bengio et al., A Neural Probabilistic Language Model,
    JMLR 3, 2003, on a transformer as GPT-2), which is the exact negative log likelihood.
    """

    kind = "autoregressive"

    def __init__(self, network: nn.Module, embedding: nn.Embedding, eos_id: int, config: dict[str, Any]):
        super().__init__()
        self.network, self.embedding, self.eos_id, self.config = network, embedding, eos_id, config

    def logits(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        before = torch.cat([torch.full_like(tokens[:, :1], self.eos_id), tokens[:, :-1]], 1)
        level = torch.zeros(len(tokens), device=tokens.device)
        return self.run_network(self.embedding(before), level, None)  # padding comes last, where nothing sees it

    def forward(self, batch: Batch) -> Loss:
        """The mean cross-entropy of all tokens, in nats."""
        # The masking law says what is to be generated from what is given. Here each position has a task of its own, its
        # token given those before it, so one call trains them all, whatever the law says: so these models are trained.
        scored = torch.ones_like(batch.target) if batch.valid is None else batch.valid
        nats, count = row_cross_entropy(self.logits(batch.tokens), batch.tokens, scored)
        level = self.levels(torch.zeros(len(batch), device=nats.device))
        return Loss(nats.sum() / count.sum(), (nats / count).detach(), level, count)

    def nats(self, text: Text, settings: LikelihoodSettings, progress: Progress | None = None) -> dict[str, Nats]:
        """The negative log likelihood of what is scored given what stands before it: exact, so without noise, and under
        the name of the bound that the other systems have. See `Model.nats`; `levels` and `seed` change nothing.

        Raises:
            CdlmError: the settings ask for what only continuous models have, or text is given after what is scored.
        """
        if settings.ode is not None:
            raise CdlmError("an autoregressive model has no ODE: leave out ode_steps, its likelihood is exact without")
        if settings.read_out is not None:
            raise CdlmError("an autoregressive model has no noise levels: leave out read_out")
        check_order(text.target, text.valid)
        return {BOUND: in_batches(self._score, text, BOUND, settings, self.device, progress)}

    @torch.no_grad()
    def _score(self, text: Text) -> Nats:
        nats, count = row_cross_entropy(self.logits(text.tokens), text.tokens, text.target)
        return Nats({"autoregressive": nats.double()}, torch.zeros_like(nats, dtype=torch.float64), count)

    def levels(self, u: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """There is no noise: 0 at every u."""
        return torch.zeros_like(u, dtype=torch.float64)


@dataclass(frozen=True)
class Autoregressive(SystemConfig):
    """An autoregressive model on the backbone of the others, to compare them with.

    Args:
        dim: width of the token embeddings that feed it.
        gates: AdaLN-Zero gates on the branches, here constants that are learned.
    """

    dim: int = 64
    gates: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("Autoregressive", dim=self.dim)

    def build(self, vocab: int, special: Special | None = None) -> AutoregressiveModel:
        eos = None if special is None else special.eos_id
        if eos is None:
            raise CdlmError(
                "an autoregressive model predicts the first token from the end-of-text token, and the tokenizer has"
                " none: set its eos_token, or train one"
            )
        embedding = nn.Embedding(vocab, self.dim)
        network = Transformer(
            self.dim, vocab, width=self.width, depth=self.depth, heads=self.heads, mlp_ratio=self.mlp_ratio,
            gates=self.gates, causal=True,
        )  # fmt: skip
        config = {"system": "autoregressive", "vocab": vocab, "eos_id": eos, **asdict(self)}
        return AutoregressiveModel(network, embedding, eos, config)


SYSTEMS: Mapping[str, type[SystemConfig]] = MappingProxyType({"autoregressive": Autoregressive})
"""Autoregressive systems by their name in config.json."""
