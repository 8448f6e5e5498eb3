"""The network of Plaid's released weights (arXiv 2305.18619, appendix), and their file format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cdlm.continuous.inputs import NetworkInput
from cdlm.continuous.published.layout import Layout, Official, given
from cdlm.continuous.published.tensors import read_state
from cdlm.continuous.schedules import gamma_of
from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError
from cdlm.core.files import read_json, write_text
from cdlm.core.schema import Positive, checked
from cdlm.core.tensors import Lazy, Spec
from cdlm.core.types import Condition
from cdlm.models.transformer import attend

BASE_WIDTH = 256
"""Width at which the released models' output has scale 1 (maximal update parametrisation, arXiv 2203.03466)."""


class SummedInput(NetworkInput):
    """The state at unit variance and the previous estimate, each through a matrix of its own, added up: `width`
    features. The level is gamma, float64.

    Given tokens are not distinguished: the network was trained without prompts.

    Args:
        dim: of the embeddings, whose norm is 1.
        width: of the network.
    """

    sees_given = False

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.dim = dim
        self.input, self.estimate = (nn.Linear(dim, width, bias=False) for _ in range(2))
        nn.init.zeros_(self.estimate.weight)

    def forward(
        self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition
    ) -> tuple[Float[Tensor, "b n f"], Float[Tensor, " b"]]:
        scale = torch.rsqrt(1 / self.dim + t.square()).to(z.dtype)
        read = self.input(z * scale[:, None, None]) + self.estimate(math.sqrt(self.dim) * condition.x0)
        return read, gamma_of(t)


class PlaidBlock(nn.Module):
    """Pre-norm attention and MLP without biases; each branch is multiplied by `scale`."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, scale: float):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_ratio * width, width, bias=False),
        )

    def forward(
        self,
        h: Float[Tensor, "b n w"],
        rotary: tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]],
        mask: Bool[Tensor, "b 1 1 n"] | None,
    ) -> Float[Tensor, "b n w"]:
        h = h + self.scale * self.attention_out(attend(self.qkv(self.norm1(h)), self.heads, rotary, mask))
        return h + self.scale * self.mlp(self.norm2(h))


class ReleasedTransformer(nn.Module):
    """Features of `width` numbers a position and gamma of each row in, logits out; no causal mask.

    Args:
        vocab, width, depth, heads, mlp_ratio: sizes of the transformer; width must be a multiple of 2 * heads.
        base_width: the output is computed of `base_width / width` times the last state.
    """

    def __init__(
        self, vocab: int, *, width: int, depth: int, heads: int, mlp_ratio: int = 4, base_width: int = BASE_WIDTH
    ):
        super().__init__()
        self.output_scale = base_width / width
        self.level = nn.Linear(64, width, bias=False)
        self.blocks = nn.ModuleList(PlaidBlock(width, heads, mlp_ratio, 1 / math.sqrt(depth)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.output = nn.Linear(width, vocab)
        self.frequencies: Tensor  # of the rotary positions; a part of the published weights
        half = torch.arange(0, width // heads, 2, dtype=torch.float32) / (width // heads)
        self.register_buffer("frequencies", 1 / 10_000.0**half)
        self._initialise()

    def _initialise(self) -> None:
        for parameter in self.blocks.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
        for parameter in (self.level.weight, self.output.weight, self.output.bias):
            nn.init.zeros_(parameter)

    def forward(
        self,
        features: Float[Tensor, "b n f"],
        level: Float[Tensor, " b"],
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n o"]:
        h = features + self.level(_waves(level).to(features.dtype))[:, None]
        angle = torch.arange(features.shape[1], device=h.device)[:, None] * self.frequencies
        angle = torch.cat([angle, angle], -1)
        mask = None if valid is None else valid[:, None, None, :]
        for block in self.blocks:
            h = block(h, (angle.cos(), angle.sin()), mask)
        return self.output(self.norm(h) * self.output_scale)


def _waves(gamma: Float[Tensor, " b"]) -> Float[Tensor, "b 64"]:
    """Sines and cosines of gamma at 32 frequencies from e^-5 to e^5, float64: the fastest turns 148 times a unit."""
    phase = refined(gamma)[:, None] * torch.linspace(-5, 5, 32, dtype=fine(gamma.device), device=gamma.device).exp()
    return torch.cat([phase.sin(), phase.cos()], -1)


Found = Mapping[str, Mapping[str, tuple[Spec, Lazy]]]
"""Of each file of the archive: what stands in it, by its names."""

WHOLE = {
    "embedding.weight": ("embedding_matrix", "matrix"),
    "schedule.w1": ("noise_schedule", "W1"),
    "schedule.b1": ("noise_schedule", "b1"),
    "schedule.w2": ("noise_schedule", "W2"),
    "network_input.input.weight": ("model", "input_linear.weight"),
    "network_input.estimate.weight": ("model", "selfcond_linear.weight"),
    "network.level.weight": ("model", "gamma_linear.weight"),
    "network.frequencies": ("model", "rotary_emb.inv_freq"),
    "network.norm.weight": ("model", "output_norm.weight"),
    "network.output.weight": ("model", "output_linear.weight"),
    "network.output.bias": ("model", "output_linear.bias"),
}
"""File and name there of our tensors; those of the schedule have an axis more there."""
ENDS = ("gamma_0", "gamma_1")
"""Our schedule.gamma, in the file gamma_bounds."""
IN_BLOCK = {
    "norm1": "rmsnorm1", "qkv": "attn_qkv", "attention_out": "attn_out", "norm2": "rmsnorm2", "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}  # fmt: skip
OURS = "cdlm.json"
SAID = ("system", "vocab", "network", "width", "depth", "heads", "mlp_ratio", "dim", "base_width")
"""Settings that the archive says."""
TRAINING = ("objective.moments", "output_prior.steps")
"""Tensors that it has not: how training was going."""
FRESH = {"settings": {"output_prior_warmup": 0}, "tensors": {"objective.moments": [[0.0, 1.0], [0.0, 1.0]]}}
FILES = ("noise_schedule", "gamma_bounds", "embedding_matrix", "model")
UNITS = {"W1": (-1, 1), "W2": (1, -1)}


class Training(TypedDict):
    """What `OURS` holds."""

    length: Positive
    settings: dict[str, Any]
    tensors: dict[str, Any]


def _places(depth: int) -> dict[str, tuple[str, str]]:
    """File and name there of each of our tensors."""
    blocks = {
        f"network.blocks.{i}.{ours}.weight": ("model", f"blocks.{i}.{theirs}.weight")
        for i in range(depth)
        for ours, theirs in IN_BLOCK.items()
    }
    return {**WHOLE, **blocks}


@dataclass(frozen=True)
class PlaidLayout(Layout):
    """Plaid's archive: noise_schedule.pt, gamma_bounds.pt, embedding_matrix.pt and model.pt, as Ishaan Gulrajani and
    Tatsunori Hashimoto released them (arXiv 2305.18619, github.com/igul222/plaid, release v1.0.0). Their repository
    names no licence: ask them before you pass on the weights.

    The archive does not say how it was trained. What we write says it in cdlm.json beside it.
    """

    length: int = 1024
    """Positions that the model was trained on, if nothing says it."""

    def read(self, folder: Path) -> Official:
        found = {file: read_state(folder / f"{file}.pt") for file in FILES}
        depth = len({name.split(".")[1] for name in found["model"] if name.startswith("blocks.")})
        places = _places(max(1, depth))
        _check_names(folder, found, [*places.values(), *(("gamma_bounds", end) for end in ENDS)])
        tensors = {ours: _ours(found[file][name], name in UNITS) for ours, (file, name) in places.items()}
        ends = [found["gamma_bounds"][end][1] for end in ENDS]
        gamma = Spec((2,), found["gamma_bounds"][ENDS[0]][0].dtype)
        tensors["schedule.gamma"] = gamma, lambda: torch.stack([end().reshape(()) for end in ends])
        ours = (
            read_json(folder / OURS, "what we wrote") if (folder / OURS).exists() else {**FRESH, "length": self.length}
        )
        checked(ours, Training, str(folder / OURS), "copy it again, or delete it")
        try:
            tensors |= {name: given(torch.tensor(value)) for name, value in ours["tensors"].items()}
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CdlmError(f"{folder / OURS} cannot be read ({error!r}); copy it again, or delete it") from error
        return Official({**ours["settings"], **_config(folder, found, depth)}, ours["length"], tensors)

    def write(self, official: Official, folder: Path) -> None:
        config, tensors = official.config, official.tensors
        _check_system(official)
        low_high = tensors["schedule.gamma"][1]()
        states: dict[str, dict[str, Tensor]] = {file: {} for file in FILES}
        states["gamma_bounds"] = {end: low_high[i].clone() for i, end in enumerate(ENDS)}
        for ours, (file, name) in _places(config["depth"]).items():
            content = tensors[ours][1]()
            states[file][name] = content.reshape(UNITS[name]) if name in UNITS else content
        for file, state in states.items():
            with (folder / f"{file}.pt").open("wb") as opened:
                torch.save(state, opened)
        settings = {name: value for name, value in config.items() if name not in SAID}
        training = {name: tensors[name][1]().tolist() for name in TRAINING if name in tensors}
        ours = {"length": official.length, "settings": settings, "tensors": training}
        write_text(folder / OURS, json.dumps(ours, indent=2) + "\n")


def _ours(there: tuple[Spec, Lazy], flat: bool) -> tuple[Spec, Lazy]:
    (shape, dtype), content = there
    return (Spec((math.prod(shape),), dtype), lambda: content().reshape(-1)) if flat else there


def _check_names(folder: Path, found: Found, wanted: list[tuple[str, str]]) -> None:
    for file in FILES:
        names = {name for place, name in wanted if place == file}
        for what, odd in (("misses", names - found[file].keys()), ("has an unknown", found[file].keys() - names)):
            if odd:
                raise CdlmError(
                    f"{folder / file}.pt {what} tensor {min(odd)!r} ({len(odd)} in all): it is not Plaid's archive, or"
                    " not all of it; copy it again"
                )


def _config(folder: Path, found: Found, depth: int) -> dict[str, Any]:
    shapes = {name: spec.shape for file in FILES for name, (spec, _) in found[file].items()}
    matrix, read, inner = shapes["matrix"], shapes["input_linear.weight"], shapes["blocks.0.mlp.fc1.weight"]
    half = shapes["rotary_emb.inv_freq"]
    if not (len(matrix) == len(read) == len(inner) == 2 and len(half) == 1) or 0 in (*matrix, *read, *inner, *half):
        raise CdlmError(
            f"{folder} is not Plaid's archive: expected matrices and rotary frequencies, got shapes {matrix} (matrix),"
            f" {read} (input_linear), {inner} (mlp.fc1) and {half} (inv_freq)"
        )
    width = read[0]
    return {
        "system": "plaid", "vocab": matrix[0], "network": "released", "width": width, "depth": depth,
        "heads": width // (2 * half[0]), "mlp_ratio": inner[0] // width, "dim": matrix[1], "base_width": BASE_WIDTH,
    }  # fmt: skip


def _check_system(official: Official) -> None:
    config = official.config
    if config.get("system") != "plaid" or config.get("network") != "released":
        raise CdlmError(
            "only a Plaid on the released network has Plaid's format, and this one is"
            f" {config.get('system')} on network={config.get('network')}: train one with network=released"
        )
    if config["base_width"] != BASE_WIDTH:
        raise CdlmError(f"Plaid's format has base_width {BASE_WIDTH}, and this one {config['base_width']}: train it so")
    if "output_prior.steps" in official.tensors:
        steps, warmup = int(official.tensors["output_prior.steps"][1]()), config["output_prior_warmup"]
        if steps < warmup:
            raise CdlmError(
                f"Plaid's format has the own-position term in full, and this one is at {steps} of {warmup} steps:"
                " train it on"
            )
