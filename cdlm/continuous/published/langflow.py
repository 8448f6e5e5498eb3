"""LangFlow as it was released (arXiv 2604.11748): its network and its files. Modules bear the names of its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cdlm.continuous.inputs import NetworkInput
from cdlm.continuous.published.layout import Layout, Official, given
from cdlm.continuous.schedules import alpha_of, gamma_of
from cdlm.core.errors import CdlmError
from cdlm.core.files import read_json, write_text
from cdlm.core.schema import Positive, Whole, checked
from cdlm.core.tensors import Spec, lazy_tensors, same_specs, without_memory, write_tensors
from cdlm.core.types import Condition
from cdlm.models.hub import check_layers
from cdlm.models.transformer import attend

MLP_RATIO, FREQUENCIES = 4, 256
"""Fixed in the release."""

# --- the network ------------------------------------------------------------------------------------------------------


class PreconditionedInput(NetworkInput):
    """The variance-preserving state itself, with what the previous estimate adds to it: `z + W [z; x0]`. Level gamma.

    Args:
        dim: of the embeddings, and the width of the network.
        previous: whether there is a W, which is zero at first.
    """

    sees_given = False

    def __init__(self, dim: int, previous: bool):
        super().__init__()
        self.self_cond_proj = nn.Linear(2 * dim, dim, bias=False) if previous else None
        if self.self_cond_proj is not None:
            nn.init.zeros_(self.self_cond_proj.weight)

    def forward(
        self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition
    ) -> tuple[Float[Tensor, "b n f"], Float[Tensor, " b"]]:
        level = gamma_of(t).to(z.dtype)
        h = z * alpha_of(t).to(z.dtype)[:, None, None]
        if self.self_cond_proj is None:
            return h, level
        return h + self.self_cond_proj(torch.cat([h, condition.x0], -1)), level


class Sinusoidal(nn.Module):
    """A scalar to a vector: cosines and sines of 128 frequencies from 1 down to 1/10000, and two layers."""

    def __init__(self, cond: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, cond), nn.SiLU(), nn.Linear(cond, cond))

    def forward(self, level: Float[Tensor, " b"]) -> Float[Tensor, "b c"]:
        half = FREQUENCIES // 2
        place = torch.arange(half, device=level.device, dtype=level.dtype) / half
        phase = level[:, None] * (-math.log(10_000) * place).exp()
        return self.mlp(torch.cat([phase.cos(), phase.sin()], -1))


class Rotary(nn.Module):
    """Angles of the rotary position embedding."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", 1 / 10_000 ** (torch.arange(0, head_dim, 2).float() / head_dim))

    def forward(self, n: int) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
        place = torch.arange(n, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        angle = torch.cat(2 * [place[:, None] * self.inv_freq], -1)
        return angle.cos(), angle.sin()


class DiTBlock(nn.Module):
    """Pre-norm attention and MLP, each shifted, scaled and gated by the level; zero at first."""

    def __init__(self, width: int, heads: int, cond: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width), nn.GELU(approximate="tanh"), nn.Linear(MLP_RATIO * width, width)
        )
        self.adaLN_modulation = _zero(nn.Linear(cond, 6 * width))

    def forward(
        self,
        h: Float[Tensor, "b n w"],
        cond: Float[Tensor, "b c"],
        rotary: tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]],
        mask: Bool[Tensor, "b 1 1 n"] | None,
    ) -> Float[Tensor, "b n w"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond)[:, None].chunk(6, -1)
        attended = self.attn_out(attend(self.attn_qkv(self.norm1(h) * (1 + scale1) + shift1), self.heads, rotary, mask))
        h = h + gate1 * self.dropout(attended)
        return h + gate2 * self.dropout(self.mlp(self.norm2(h) * (1 + scale2) + shift2))


class FinalLayer(nn.Module):
    """Norm, shift and scale by the level, and a linear layer; zero at first."""

    def __init__(self, width: int, vocab: int, cond: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, bias=False)
        self.adaLN_modulation = _zero(nn.Linear(cond, 2 * width))
        self.linear = _zero(nn.Linear(width, vocab))

    def forward(self, h: Float[Tensor, "b n w"], cond: Float[Tensor, "b c"]) -> Float[Tensor, "b n v"]:
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(h) * (1 + scale) + shift)


class DiT(nn.Module):
    """The released backbone: states and gamma in, logits out.

    The release has no attention mask; without `valid` this is the same function.

    Args:
        vocab, width, depth, heads: sizes of the transformer; width must be a multiple of 2 * heads.
        cond: width of the level embedding.
        dropout: share of each branch's numbers that training drops, in [0, 1).
    """

    def __init__(self, vocab: int, *, width: int, depth: int, heads: int, cond: int, dropout: float):
        super().__init__()
        self.sigma_map = Sinusoidal(cond)
        self.rotary_emb = Rotary(width // heads)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, cond, dropout) for _ in range(depth))
        self.output_layer = FinalLayer(width, vocab, cond)

    def forward(
        self,
        features: Float[Tensor, "b n f"],
        level: Float[Tensor, " b"],
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n o"]:
        cond = F.silu(self.sigma_map(level))
        rotary = self.rotary_emb(features.shape[1])
        mask = None if valid is None else valid[:, None, None, :]
        h = features
        for block in self.blocks:
            h = block(h, cond, rotary, mask)
        return self.output_layer(h, cond)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# --- the files --------------------------------------------------------------------------------------------------------

WEIGHTS = "model.safetensors"
STEPS, WARM = "schedule.steps", "output_prior.steps"
"""Our names of the counts of optimiser steps, which the release does not have."""
NAMES = (
    ("network.", "backbone."),
    ("network_input.self_cond_proj.", "backbone.self_cond_proj."),
    ("embedding.weight", "backbone.vocab_embed.embedding"),
    ("schedule.mu", "proposal.loc"),
    ("schedule.beta", "proposal.scale"),
    ("schedule.entropy", "proposal.entropy"),
)
"""How our names begin, and the released ones."""
FIELDS = {
    "vocab_size": "vocab", "hidden_size": "width", "cond_dim": "cond", "n_blocks": "depth", "n_heads": "heads",
    "dropout": "dropout", "use_bias": "output_prior", "gumbel_cutoff": "cutoff",
}  # fmt: skip
"""Fields of the released config.json, and our settings of the same meaning."""
FIXED = {"model_type": "LangFlow", "use_normalized_embedding": True, "embedding_norm_method": "layernorm"}
"""The only variant there is. The method's name notwithstanding, every embedding is its row times sqrt(dim) / norm."""


class LangFlowLayout(Layout):
    """LangFlow as released (arXiv 2604.11748; github.com/nealchen2003/LangFlow; weights such as
    Continuous-Rivals-Discrete/langflow-owt on the Hugging Face Hub): config.json with the model_type LangFlow, and
    model.safetensors. The repository names no licence for the model, so ask its authors before you share a copy.

    The files know nothing of how the model was trained. What we write says it in config.json, under "cdlm".
    """

    def read(self, folder: Path) -> Official:
        released, found = _read_config(folder), lazy_tensors(folder / WEIGHTS)
        ours = released.get("cdlm", {"settings": {}, "counts": {STEPS: 0}})
        config = _settings(released, folder) | ours["settings"]
        check_layers(folder / "config.json", "n_blocks", config["depth"], len(found))
        try:
            counts = {name: torch.tensor(ours["counts"][name]) for name in _counts(config)}
            specs = _specs(config)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, ZeroDivisionError) as error:
            raise CdlmError(f"{folder / 'config.json'} has settings that cannot be read ({error!r})") from error
        wanted = {_released(name): spec for name, spec in specs.items()}
        same_specs(folder / WEIGHTS, wanted, {name: spec for name, (spec, _) in found.items()})
        tensors = {name: found[_released(name)] for name in specs}
        return Official(config, released["model_length"], tensors | {name: given(v) for name, v in counts.items()})

    def write(self, official: Official, folder: Path) -> None:
        config, tensors = dict(official.config), official.tensors
        if config.get("system") != "langflow" or config.get("network") != "released":
            raise CdlmError("only LangFlow with network=released has the released format: this system is another")
        wanted = _specs(config)
        counts = {name: int(tensors[name][1]()) for name in _counts(config)}
        if counts.get(WARM, config["output_prior_warmup"]) < config["output_prior_warmup"]:
            raise CdlmError("the released format has no own-position term in part: train beyond output_prior_warmup")
        released = _released_config(official)
        ours = {"settings": _differences(_settings(released, folder), config), "counts": counts}
        if ours != {"settings": {}, "counts": {STEPS: 0}}:
            released["cdlm"] = ours
        write_text(folder / "config.json", json.dumps(released, indent=2) + "\n")
        specs = {_released(name): spec for name, spec in wanted.items()}
        write_tensors(folder / WEIGHTS, specs, {_released(name): tensors[name][1] for name in wanted})


def _released(name: str) -> str:
    """The released name of one of our tensors."""
    return next(theirs + name.removeprefix(ours) for ours, theirs in NAMES if name.startswith(ours))


def _specs(config: Mapping[str, Any]) -> dict[str, Spec]:
    """Our names of the tensors that such a model has in the release, and their shapes and types."""
    sizes = {name: config[name] for name in ("width", "depth", "heads", "cond", "dropout")}
    with without_memory():
        network = DiT(config["vocab"], **sizes)
        network_input = PreconditionedInput(config["width"], config["self_conditioning"] > 0)
    parts = {"network": network.state_dict(), "network_input": network_input.state_dict()}
    shapes = {f"{part}.{name}": tuple(value.shape) for part, state in parts.items() for name, value in state.items()}
    shapes |= {"embedding.weight": (config["vocab"], config["width"])}
    shapes |= {"schedule.mu": (), "schedule.beta": (), "schedule.entropy": ()}
    return {name: Spec(shape, torch.float32) for name, shape in shapes.items()}


def _counts(config: Mapping[str, Any]) -> list[str]:
    """Our names of the counts that such a model has."""
    return [STEPS, WARM] if config["output_prior"] and config["output_prior_warmup"] else [STEPS]


class Ours(TypedDict):
    """What we add to a released config.json."""

    settings: dict[str, Any]
    counts: dict[str, Whole]


class Released(TypedDict):
    """Fields of a released config.json; there may be others."""

    vocab_size: Positive
    hidden_size: Positive
    cond_dim: Positive
    n_blocks: Positive
    n_heads: Positive
    model_length: Positive
    dropout: float
    gumbel_cutoff: float
    use_bias: bool
    self_conditioning: bool
    cdlm: NotRequired[Ours]


def _read_config(folder: Path) -> dict[str, Any]:
    released = read_json(folder / "config.json", "a LangFlow checkpoint")
    if released.get("model_type") != FIXED["model_type"]:
        raise CdlmError(f"{folder / 'config.json'} is not that of a LangFlow checkpoint: expected model_type LangFlow")
    checked(released, Released, str(folder / "config.json"), "copy it again")
    return released


def _settings(released: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the released config.json says, as settings of our system."""
    for name, value in FIXED.items():
        if released.get(name) != value:
            raise CdlmError(f"{folder / 'config.json'} has {name} {released.get(name)!r}, expected {value!r}")
    return {
        "system": "langflow", **{ours: released[theirs] for theirs, ours in FIELDS.items()},
        "dim": released["hidden_size"], "mlp_ratio": MLP_RATIO, "gates": True, "output_prior_warmup": 0,
        "fit_delay": 0, "guidance_dropout": 0.0, "wrong_given": 0.0, "first_pass_steps": 0,
        "self_conditioning": 0.25 if released["self_conditioning"] else 0.0, "network": "released",
    }  # fmt: skip


def _released_config(official: Official) -> dict[str, Any]:
    """The released config.json of our settings; the schedule's first values are those it has now."""
    config, scalars = official.config, {}
    for theirs, ours in (("gumbel_loc", "mu"), ("gumbel_scale", "beta"), ("gumbel_entropy", "entropy")):
        scalars[theirs] = float(f"{official.tensors[f'schedule.{ours}'][1]().item():.7g}")
    fields = {theirs: config[ours] for theirs, ours in FIELDS.items()}
    return {**FIXED, **fields, "model_length": official.length,
            "self_conditioning": config["self_conditioning"] > 0, **scalars}  # fmt: skip


def _differences(plain: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in plain or plain[name] != value}
