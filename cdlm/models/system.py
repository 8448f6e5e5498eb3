"""What training knows of a system: a loss, groups of parameters, and noise levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cdlm.core.checks import MOST_FEATURES, MOST_LAYERS, Settings, check_whole
from cdlm.core.devices import fine
from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.core.types import Batch
from cdlm.models import lora
from cdlm.models.hub import Pretrained
from cdlm.sampling.texts import Special, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Loss:
    """One training batch."""

    total: Float[Tensor, ""]
    """What to differentiate."""
    nats: Float[Tensor, " b"]
    """The family's loss of each row in nats per generated token, float32, detached."""
    t: Float[Tensor, " b"]
    count: Int[Tensor, " b"]
    """Generated tokens of each row."""


class System(Pretrained, ABC):
    """A model that can be trained: parts, and an objective over a noise level u in [0, 1], where 1 is all noise."""

    network: nn.Module
    """The backbone, a `Transformer`."""

    @abstractmethod
    def forward(self, batch: Batch) -> Loss:
        """The loss of a masked batch, at its noise levels or at stratified ones."""

    @abstractmethod
    def levels(self, u: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Noise levels at u, as the family measures them."""

    @property
    def learned_schedule(self) -> nn.Module | None:
        """A noise schedule that learns, with an average and a learning rate of its own; None if nothing does."""
        return None

    def prepare(self, tokenizer: PreTrainedTokenizerFast, batches: Iterable[Batch], cache: Path, fresh: bool) -> None:
        """Called before training begins or goes on, with the text that it will read.

        Args:
            tokenizer: of the run.
            batches: endless, in the order of training, with all valid positions as targets.
            cache: folder for what can be made again.
            fresh: whether the weights are untrained.

        Raises:
            CdlmError: the system cannot be trained on this text.
        """
        return

    def after_step(self) -> None:
        """Called after each optimiser step."""
        return

    def facts(self) -> dict[str, float]:
        """What is worth logging once, before the first step."""
        return {}

    @property
    def adapter(self) -> lora.Adapter | None:
        """The adapter that is trained in place of all else; None of a system that is trained itself."""
        found = self._modules.get("lora")
        return found if isinstance(found, lora.Adapter) else None

    def adapt(self, settings: lora.LoraSettings, base: str, weights: str, seed: int) -> None:
        """Freeze all weights and put an untrained adapter beside them, in place; see `cdlm.models.lora`."""
        settled = settings.settled(self.network)
        self.requires_grad_(False)
        lora.adapt(self.network, settled, seed)
        self.add_module("lora", lora.Adapter(settled, base, weights, self.network))

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> None:
        """Write the folder of the model; or, of a system with an adapter, the adapter and its map alone."""
        if self.adapter is None:
            if lora.lora_parameters(self.network):
                raise CdlmError(f"{self.name} is a model with an adapter: merge the two first, with cdlm merge")
            return super().save_pretrained(folder, card)
        lora.write_adapter(Path(folder), self.network, self.adapter)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, Path(folder))
        if card is not None:
            write_text(Path(folder) / "README.md", card)

    @property
    def blocks(self) -> nn.Module:
        """The hidden layers of the network, one child each."""
        return self.network.get_submodule("blocks")

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`matrices`: hidden 2-D weights (what Muon is for); `schedule`: the noise schedule's own; `rest`."""
        if self.adapter is not None:
            return {"matrices": lora.lora_parameters(self.network), "schedule": [], "rest": []}
        schedule = [] if self.learned_schedule is None else list(self.learned_schedule.parameters())
        matrices = [p for name, p in self.blocks.named_parameters() if p.ndim == 2 and "modulation" not in name]
        taken = {id(p) for p in schedule + matrices}
        return {
            "matrices": matrices,
            "schedule": schedule,
            "rest": [p for p in self.parameters() if id(p) not in taken],
        }

    def averaged_parameters(self) -> list[Tensor]:
        """All but the schedule's, which averages itself."""
        groups = self.parameter_groups()
        return [*groups["matrices"], *groups["rest"]]

    def run_network(
        self, features: Float[Tensor, "b n f"], level: Float[Tensor, " b"], valid: Bool[Tensor, "b n"] | None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        """The network in its precision; the result is at least float32.

        Args:
            positions: see `Transformer.forward`; a network that is asked for all need not know of it.
        """
        some = () if positions is None else (positions,)
        with self._precisely(features.device):
            logits = self.network(features, level, valid, *some)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _precisely(self, device: torch.device) -> AbstractContextManager[Any]:
        """In this the network computes in its precision."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")


def levels_of(batch: Batch) -> Float[Tensor, " b"]:
    """The batch's own noise levels u, or stratified ones."""
    return stratified(len(batch), batch.generator, batch.tokens.device) if batch.u is None else batch.u


def stratified(
    rows: int, generator: torch.Generator | None, device: torch.device | str = "cpu"
) -> Float[Tensor, " rows"]:
    """One u in [0, 1) per row, evenly spaced with a random offset, in random order (low discrepancy)."""
    offset = torch.rand(1, generator=generator, dtype=fine(device), device=device)
    order = torch.randperm(rows, generator=generator, device=device)
    return (offset + order / rows) % 1


def row_cross_entropy(
    logits: Float[Tensor, "b n v"], tokens: Int[Tensor, "b n"], scored: Bool[Tensor, "b n"]
) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
    """Summed cross-entropy of each row's scored positions in nats, and their number."""
    nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
    return torch.where(scored, nats, 0).sum(1), scored.sum(1)


@dataclass(frozen=True)
class SystemConfig(Settings, ABC):
    """A system's settings: plain values that rebuild it."""

    width: int = 128
    """Features of a position in the transformer, a multiple of 2 * heads."""
    depth: int = 3
    """Layers of the transformer."""
    heads: int = 4
    """Attention heads of a layer."""
    mlp_ratio: int = 4
    """Width of a layer's MLP over that of the transformer."""

    @abstractmethod
    def build(self, vocab: int, special: Special | None = None) -> System:
        """A freshly initialised system over `vocab` tokens. Draws from torch's global generator: seed it first."""

    def preset(self, subsets: bool) -> dict[str, int | float | str]:
        """Flat settings of the sampler that a trained model is to recommend; by default none.

        Args:
            subsets: whether its masks gave any subset of the positions, as commits do.
        """
        return {}

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_whole(name, largest=MOST_FEATURES, width=self.width, heads=self.heads, mlp_ratio=self.mlp_ratio)
        check_whole(name, largest=MOST_LAYERS, depth=self.depth)
        if self.width % (2 * self.heads):
            raise CdlmError(
                f"width must be a multiple of 2 * heads, got width={self.width} and heads={self.heads}:"
                f" try width={max(1, self.width // (2 * self.heads)) * 2 * self.heads}"
            )
