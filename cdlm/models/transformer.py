"""The transformer that every system shares."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cdlm.core.rng import generator


class LevelEmbedding(nn.Module):
    """A scalar, such as ln t, to a vector: random Fourier features and two layers (CDCD, section 4.3)."""

    def __init__(self, width: int, scale: float = 0.5, features: int = 64):
        super().__init__()
        self.frequencies: Tensor  # fixed, drawn from its own key: a part of the architecture, kept in the checkpoint
        self.register_buffer("frequencies", torch.randn(features, generator=generator(0, features)).mul_(scale))
        self.layers = nn.Sequential(nn.Linear(2 * features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, level: Float[Tensor, " b"]) -> Float[Tensor, "b c"]:
        phase = 2 * math.pi * level.float()[:, None] * self.frequencies
        return self.layers(torch.cat([phase.cos(), phase.sin()], -1))


def rotate(
    x: Float[Tensor, "b h n k"], cos: Float[Tensor, "n k"], sin: Float[Tensor, "n k"]
) -> Float[Tensor, "b h n k"]:
    """Rotary position embedding, rotate-half form (arXiv 2104.09864)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attend(
    qkv: Float[Tensor, "b n w3"],
    heads: int,
    rotary: tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]],
    mask: Bool[Tensor, "b 1 1 n"] | None,
    causal: bool = False,
) -> Float[Tensor, "b n w"]:
    """Attention of all positions to all that `mask` leaves, from queries, keys and values side by side.

    Args:
        causal: of each position to itself and those before it; without a mask.
    """
    b, n, w = qkv.shape
    q, k, v = qkv.view(b, n, 3, heads, w // 3 // heads).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, *rotary).to(v.dtype), rotate(k, *rotary).to(v.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).reshape(b, n, w // 3)


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP; the level scales and shifts after each norm and, if `gates`, scales each branch."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, cond: int, gates: bool, causal: bool = False):
        super().__init__()
        self.heads, self.parts, self.causal = heads, 6 if gates else 4, causal
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * width, width)
        )
        self.modulation = nn.Linear(cond, self.parts * width)  # zero at first (AdaLN-Zero, arXiv 2212.09748)

    def forward(
        self,
        h: Float[Tensor, "b n w"],
        cond: Float[Tensor, "b c"],
        rotary: tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]],
        mask: Bool[Tensor, "b 1 1 n"] | None,
    ) -> Float[Tensor, "b n w"]:
        shift1, scale1, shift2, scale2, *gates = self.modulation(cond)[:, None].chunk(self.parts, -1)
        gate1, gate2 = gates or (1.0, 1.0)
        h = h + gate1 * self.attention_out(
            attend(self.qkv(self.norm1(h) * (1 + scale1) + shift1), self.heads, rotary, mask, self.causal)
        )
        return h + gate2 * self.mlp(self.norm2(h) * (1 + scale2) + shift2)


class Transformer(nn.Module):
    """Features of each position and a level for each row in, `outputs` numbers for each position out.

    Args:
        inputs, outputs: features per position.
        width, depth, heads, mlp_ratio: sizes of the transformer; width must be a multiple of 2 * heads.
        cond: width of the level embedding.
        gates: AdaLN-Zero branch gates; without them the network is the one of CDCD, section 4.
        causal: a position sees itself and those before it; by default it sees all. Padding then comes last, where no
            other position sees it, and `valid` is not needed.
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int, depth: int, heads: int, mlp_ratio: int = 4, cond: int = 128,
        gates: bool = True, causal: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.head_dim, self.causal = width // heads, causal
        self.level = LevelEmbedding(cond)
        self.input = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, mlp_ratio, cond, gates, causal) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(cond, 2 * width)
        self.output = nn.Linear(width, outputs)
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        if self.output.weight.is_meta:  # the weights are read, not drawn
            return
        for name, parameter in self.named_parameters():
            if name.startswith(("modulation", "output.bias")) or ".modulation." in name:
                nn.init.zeros_(parameter)
            elif name == "output.weight":
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim == 2:
                std = 1 / math.sqrt(parameter.shape[1])
                branch_end = name.endswith(("attention_out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=std / math.sqrt(2 * depth) if branch_end else std)  # as GPT-2 does

    def forward(
        self,
        features: Float[Tensor, "b n f"],
        level: Float[Tensor, " b"],
        valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s o"]:
        """Outputs of every position [b n o], or of some [k o], given by their places among all of all rows."""
        cond = self.level(level)
        h = self.normed(self.through(self.blocks, self.input(features), cond, valid), cond)
        return self.output(h if positions is None else h.flatten(0, 1)[positions])

    def through(
        self, blocks: Iterable[nn.Module], h: Float[Tensor, "b n w"], cond: Float[Tensor, "b c"],
        valid: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b n w"]:  # fmt: skip
        """Hidden states after some blocks."""
        rotary = self._rotary(h.shape[1], h.device)
        mask = None if valid is None or self.causal else valid[:, None, None, :]
        for block in blocks:
            h = block(h, cond, rotary, mask)
        return h

    def normed(self, h: Float[Tensor, "b n w"], cond: Float[Tensor, "b c"]) -> Float[Tensor, "b n w"]:
        """What the output layer reads of the last hidden states."""
        shift, scale = self.modulation(cond)[:, None].chunk(2, -1)
        return self.norm(h) * (1 + scale) + shift

    def _rotary(self, n: int, device: torch.device) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
        half = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        angle = torch.arange(n, device=device, dtype=torch.float32)[:, None] * 10_000.0**-half
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()
