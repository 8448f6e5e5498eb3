"""LLaDA and Dream in training: an adapter beside the weights of the checkpoint, which stay as they are."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing
from cdlm.core.tensors import specs_of, write_tensors
from cdlm.core.types import Batch
from cdlm.masked.checkpoints.folder import read_settings, read_weights
from cdlm.masked.checkpoints.model import FAMILIES, ForeignModel
from cdlm.masked.model import MaskedModel
from cdlm.masked.objective import bound, hidden_of, shares
from cdlm.masked.system import Masked
from cdlm.models.foreign import INDEX, WEIGHTS
from cdlm.models.system import Loss, System, SystemConfig, levels_of
from cdlm.sampling.session import Model, Sampling


class TunedForeign(System, MaskedModel):
    """A foreign masked model as a system, whose adapter alone learns; see `System.adapt`. Its rows are whole ones.

    Trained with the bound of masked models, as LLaDA is (arXiv 2502.09992, eq. 3 and 5).

    Args:
        model: loaded; its network becomes that of the system.
        flat: weigh each masked token the same in training; see `cdlm.masked.system.Masked`.
    """

    whole_rows = True
    batch_size = 4

    def __init__(self, model: ForeignModel, flat: bool):
        super().__init__()
        self.model, self.network, self.constants, self.flat = model, model.network, model.constants, flat
        self.tokenizer, self.folder, self.vocab = model.tokenizer, model.folder, model.vocab
        self.config = {"checkpoint": str(model.network.config.model_type)}

    @property
    def defaults(self) -> Sampling:
        return self.model.defaults

    def check_weights(self) -> None:
        """Frozen weights may have any precision."""
        return

    def logits(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model.logits_with_gradient(tokens, valid, positions).float()

    def forward(self, batch: Batch) -> Loss:
        """The negative evidence lower bound over the positions to generate."""
        tokens, mask = batch.tokens, self.constants.mask_id
        t = self.levels(levels_of(batch).to(tokens.device))
        masked = hidden_of(batch, t) & (tokens != mask)
        row, place = masked.nonzero(as_tuple=True)
        seen = (place - 1).clamp(min=0) if self.constants.shift else place
        logits = self.logits(tokens.masked_fill(masked, mask), batch.valid, row * tokens.shape[1] + seen)
        nats = functional.cross_entropy(logits, tokens[masked], reduction="none")
        summed = nats.new_zeros(len(tokens)).index_add(0, row, nats)
        return bound(summed, masked.sum(1), t, batch, self.flat and self.training)

    def levels(self, u: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        return shares(u)


def is_flat(settings: SystemConfig, path: Path) -> bool:
    """Whether the settings of a system weigh each masked token the same; of an adapter no others are used.

    Raises:
        CdlmError: they are those of another system than `Masked`.
    """
    if not isinstance(settings, Masked):
        raise CdlmError(
            f"{path} is a masked model of another library: its adapter is trained as the system Masked, whose weight is"
            " used"
        )
    return settings.weight == "flat"


def write_checkpoint(model: Model, base: Path, out: Path) -> None:
    """Write a model, whose weights have changed since, in the format of the folder that it was loaded from.

    Args:
        base: that folder; its settings and the types of its tensors are kept.
        out: a new folder, which appears whole or not at all.
    """
    assert isinstance(model, ForeignModel)
    settings = read_settings(base)
    found, state = read_weights(base), model.network.state_dict()
    official = {name: FAMILIES[str(settings.values["model_type"])].official(name) for name in state}
    specs = {name: spec for name, spec in specs_of(found).items() if name in official.values()}
    lazy = {official[name]: (lambda v=value: v) for name, value in state.items() if official[name] in specs}
    with replacing(out) as folder:
        folder.mkdir()
        for file in base.iterdir():
            if file.is_file() and file.suffix in (".json", ".txt", ".jinja") and file.name not in (INDEX,):
                (folder / file.name).write_bytes(file.read_bytes())
        write_tensors(folder / WEIGHTS, specs, lazy, {"format": "pt"})
