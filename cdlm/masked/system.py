"""A masked diffusion model on the shared backbone, and its objective."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cdlm.core.checks import check_choice, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.types import Batch, Constants
from cdlm.masked.model import LayeredModel
from cdlm.masked.objective import bound, hidden_of, shares
from cdlm.masked.sampler import Unmasking
from cdlm.models.system import Loss, System, SystemConfig, levels_of, row_cross_entropy
from cdlm.models.transformer import Transformer
from cdlm.policies.llada import LLaDA
from cdlm.sampling.texts import Special


class MaskedDiffusion(System, LayeredModel):
    """Tokens are masked, each with probability t, and recovered by a network that sees all positions at once.

    The network does not see t: it can count masks (MDLM, arXiv 2406.07524, section 3.5; LLaDA, arXiv 2502.09992). The
    mask itself is never predicted. Trained with the bound on the negative log likelihood, E_t[1/t sum CE over masked
    positions], which `weight="flat"` replaces in training by the mean over masked positions; evaluation is the bound.
    """

    whole_rows = True
    batch_size = 64

    def __init__(
        self, network: nn.Module, embedding: nn.Embedding, constants: Constants, *, flat: bool, config: dict[str, Any]
    ):
        super().__init__()
        self.network, self.embedding, self.constants, self.flat = network, embedding, constants, flat
        self.config, self.vocab = config, embedding.num_embeddings

    @property
    def defaults(self) -> Unmasking:
        """Drawn at temperature 1, one position a step in random order: samples of what it was trained on."""
        return Unmasking(LLaDA(remasking="random"), temperature=1.0)

    def logits(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        level = torch.zeros(len(tokens), device=tokens.device)
        logits = self.run_network(self.embedding(tokens), level, valid, positions)
        return logits.index_fill_(-1, torch.tensor([self.constants.mask_id], device=logits.device), -torch.inf)

    def hidden(self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        with self._precisely(tokens.device):
            h = self._transformer.input(self.embedding(tokens))
            return self._transformer.through(self._transformer.blocks, h, self._cond(len(tokens)), valid)

    def read(self, hidden: Float[Tensor, "k d"]) -> Float[Tensor, "k v"]:
        with self._precisely(hidden.device):
            logits = self._transformer.output(self._transformer.normed(hidden[None], self._cond(1))[0])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.index_fill(-1, torch.tensor([self.constants.mask_id], device=logits.device), -torch.inf)

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n e"]:
        return self.embedding(tokens)

    def last_block(self) -> nn.Module:
        return copy.deepcopy(self._transformer.blocks[-1]).requires_grad_(True)

    def through(
        self, block: nn.Module, hidden: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n d"]:
        with self._precisely(hidden.device):
            return self._transformer.through([block], hidden, self._cond(len(hidden)), valid)

    @property
    def _transformer(self) -> Transformer:
        assert isinstance(self.network, Transformer)
        return self.network

    def _cond(self, rows: int) -> Float[Tensor, "b c"]:
        """What stands for the noise level, which the network does not see."""
        return self._transformer.level(torch.zeros(rows, device=self.embedding.weight.device))

    def forward(self, batch: Batch) -> Loss:
        """The negative evidence lower bound over the positions to generate (MDLM, eq. 10; LLaDA, eq. 3)."""
        tokens = batch.tokens
        t = self.levels(levels_of(batch).to(tokens.device))
        masked = hidden_of(batch, t)
        logits = self.logits(tokens.masked_fill(masked, self.constants.mask_id), batch.valid)
        # The mask itself, which some text may hold, is nothing to predict.
        nats, hidden = row_cross_entropy(logits, tokens, masked & (tokens != self.constants.mask_id))
        return bound(nats, hidden, t, batch, self.flat and self.training)

    def levels(self, u: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        return shares(u)


@dataclass(frozen=True)
class Masked(SystemConfig):
    """Masked diffusion (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992) on the backbone of the continuous systems.

    Args:
        dim: width of the token embeddings that feed it.
        gates: AdaLN-Zero gates on the branches, here constants that are learned.
        weight: what training weighs a row by: "elbo" is the likelihood bound's 1 / t, "flat" counts each masked token
            the same, which has less variance. Validation is always the bound.
    """

    dim: int = 64
    gates: bool = False
    weight: Literal["elbo", "flat"] = "elbo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("Masked", dim=self.dim)
        check_choice("Masked", ("elbo", "flat"), weight=self.weight)

    def build(self, vocab: int, special: Special | None = None) -> MaskedDiffusion:
        mask = None if special is None else special.mask_id
        if mask is None or special is None:
            raise CdlmError("a masked model needs a tokenizer with a mask token: set its mask_token, or train one")
        embedding = nn.Embedding(vocab, self.dim)
        network = Transformer(
            self.dim, vocab, width=self.width, depth=self.depth, heads=self.heads, mlp_ratio=self.mlp_ratio,
            gates=self.gates,
        )  # fmt: skip
        return MaskedDiffusion(
            network,
            embedding,
            Constants(mask, special.eos_id),
            flat=self.weight == "flat",
            config={"system": "masked", "vocab": vocab, "mask_id": mask, "eos_id": special.eos_id, **asdict(self)},
        )


SYSTEMS: Mapping[str, type[SystemConfig]] = MappingProxyType({"masked": Masked})
"""Masked systems by their name in config.json."""
