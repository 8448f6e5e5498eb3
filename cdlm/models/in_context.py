"""A transformer that is told its conditions by tokens in front of the text, as ELF's (arXiv 2605.10938)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = 4
"""Of each condition."""
FREQUENCIES = 256
"""Features of a scalar before its two layers."""


class ScalarTokens(nn.Module):
    """A scalar of each row as tokens: learnt ones, to which all the same function of the scalar is added."""

    def __init__(self, width: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(TOKENS, width).mul_(0.02))
        self.layers = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.layers[0], self.layers[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, scalar: Float[Tensor, " b"]) -> Float[Tensor, "b k w"]:
        return self.tokens + self.layers(sinusoid(scalar))[:, None]


def sinusoid(scalar: Float[Tensor, " b"], features: int = FREQUENCIES) -> Float[Tensor, "b f"]:
    """Cosines, then sines, of a scalar at frequencies from 1 down to 1 / 10,000; the scalar is not scaled."""
    half = features // 2
    steps = torch.arange(half, dtype=torch.float32, device=scalar.device) / half
    phase = scalar.float()[:, None] * (-math.log(10_000) * steps).exp()
    return torch.cat([phase.cos(), phase.sin()], -1)


def rotate_pairs(
    x: Float[Tensor, "b h n k"], cos: Float[Tensor, "n j"], sin: Float[Tensor, "n j"]
) -> Float[Tensor, "b h n k"]:
    """Rotary position embedding of neighbouring pairs (arXiv 2104.09864)."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Attention(nn.Module):
    """Attention of all positions to all; queries and keys are normalised in each head, the arithmetic is float32."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm, self.key_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b m w"], rotary: tuple[Float[Tensor, "m j"], Float[Tensor, "m j"]],
        mask: Bool[Tensor, "b 1 1 m"] | None,
    ) -> Float[Tensor, "b m w"]:  # fmt: skip
        b, m, w = x.shape
        qkv = self.qkv(x).view(b, m, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
            q, k = rotate_pairs(self.query_norm(q), *rotary), rotate_pairs(self.key_norm(k), *rotary)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).reshape(b, m, w))


class SwiGLU(nn.Module):
    """A gated MLP with int(4 width 2 / 3) hidden features (arXiv 2002.05202)."""

    def __init__(self, width: int, mlp_ratio: int):
        super().__init__()
        hidden = int(mlp_ratio * width * 2 / 3)
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b m w"]) -> Float[Tensor, "b m w"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class InContextBlock(nn.Module):
    """Pre-norm attention and a gated MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.RMSNorm(width, eps=1e-6), SwiGLU(width, mlp_ratio)

    def forward(
        self, h: Float[Tensor, "b m w"], rotary: tuple[Float[Tensor, "m j"], Float[Tensor, "m j"]],
        mask: Bool[Tensor, "b 1 1 m"] | None,
    ) -> Float[Tensor, "b m w"]:  # fmt: skip
        h = h + self.attention(self.norm1(h), rotary, mask)
        return h + self.mlp(self.norm2(h))


class Asked(nn.Module):
    """What a call is told besides the text: time and guidance as tokens, and whether tokens are wanted.

    Those of the mode are learnt, and zero vectors where an estimate of the vectors is wanted.
    """

    def __init__(self, width: int):
        super().__init__()
        self.time, self.guidance = ScalarTokens(width), ScalarTokens(width)
        self.mode = nn.Parameter(torch.randn(TOKENS, width).mul_(0.02))

    def forward(self, level: Float[Tensor, "b 3"]) -> Float[Tensor, "b k w"]:
        time, guidance, decode = level.unbind(-1)
        return torch.cat([self.time(time), self.guidance(guidance), decode[:, None, None] * self.mode], 1)


class InContextTransformer(nn.Module):
    """Vectors of each position in, vectors and logits out.

    Args:
        dim: of the vectors: a noisy one and an estimate of a position come in side by side, a clean one goes out.
        vocab: logits of a position.
        bottleneck: features between the input and the transformer.
        width, depth, heads, mlp_ratio: sizes of the transformer.
    """

    def __init__(
        self, dim: int, vocab: int, *, bottleneck: int, width: int, depth: int, heads: int, mlp_ratio: int = 4
    ):
        super().__init__()
        self.head_dim = width // heads
        self.input = nn.Sequential(
            nn.Linear(2 * dim, dim), nn.Linear(dim, bottleneck, bias=False), nn.Linear(bottleneck, width)
        )
        self.blocks = nn.ModuleList(InContextBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm, self.output = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, dim)
        self.tokens = nn.Sequential(nn.Linear(width, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, vocab))
        self._initialise()
        self.asked = Asked(width)

    def _initialise(self) -> None:
        if self.output.weight.is_meta:  # the weights are read, not drawn
            return
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.zeros_(self.output.weight)  # the first estimate is 0

    def forward(
        self, features: Float[Tensor, "b n f"], level: Float[Tensor, "b 3"], valid: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n w"]:
        """Hidden states of every position, for one of the two heads.

        Args:
            features: a noisy vector and an estimate, side by side.
            level: time in [0, 1], where 1 is clean; guidance scale; 1 if the tokens are wanted, 0 if the vectors.
            valid: False on padding.
        """
        asked = self.asked(level)
        h = torch.cat([asked.to(features.dtype), self.input(features)], 1)
        rotary = self._rotary(asked.shape[1], features.shape[1], h.device)
        mask = None if valid is None else F.pad(valid, (asked.shape[1], 0), value=True)[:, None, None]
        for block in self.blocks:
            h = block(h, rotary, mask)
        return h[:, asked.shape[1] :]

    def vectors(self, hidden: Float[Tensor, "b n w"]) -> Float[Tensor, "b n d"]:
        """The estimate of the clean vectors."""
        return self.output(self.norm(hidden))

    def _rotary(self, before: int, n: int, device: torch.device) -> tuple[Float[Tensor, "m j"], Float[Tensor, "m j"]]:
        """Angles of the text's positions; what comes before the text is not rotated."""
        frequencies = 10_000 ** (-torch.arange(0, self.head_dim, 2, device=device) / self.head_dim)
        angles = torch.outer(torch.arange(n, device=device), frequencies)
        angles = torch.cat([angles.new_zeros(before, len(frequencies)), angles])
        return angles.cos(), angles.sin()
