"""The tiny bidirectional transformer, float64, whose decoding was recorded in tests/golden/masked."""

import math
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from cdlm.masked.model import Cache, CachedModel, Constants, at_positions

GOLDEN = Path(__file__).parent / "golden" / "masked"
HEADS = 4


class Tiny(CachedModel):
    """Layers of attention and MLP with weightless layer norms; learned positions, no causal mask.

    Args:
        running: positions count real tokens, as Dream's sampler has it, instead of all.
    """

    def __init__(self, file: Path, constants: Constants, running: bool = False):
        weights = {name: value.double() for name, value in load_file(file).items()}
        self.weights, self.constants, self.running = weights, constants, running
        self.layers = len({name.split(".")[1] for name in weights if name.startswith("layer.")})
        self.calls, self.rows = 0, 0

    def logits(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        return self.fill(tokens, valid, positions)[0]

    def fill(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> tuple[Float[Tensor, "*s v"], Cache]:  # fmt: skip
        place = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits, cache = self._run(tokens, place, None, valid)
        return at_positions(logits, tokens, positions), cache

    def partial(
        self,
        tokens: Int[Tensor, "b q"],
        slots: Int[Tensor, "b q"],
        cache: Cache,
        valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:
        return at_positions(self._run(tokens, slots, cache, valid)[0], tokens, positions)

    def _run(self, tokens: Tensor, slots: Tensor, cache: Cache, valid: Tensor | None) -> tuple[Tensor, Cache]:
        self.calls, self.rows = self.calls + 1, self.rows + len(tokens)
        place = slots
        if self.running and valid is not None:
            place = torch.where(valid, valid.cumsum(1) - 1, 1).gather(1, slots)
        h, kept = self.weights["embed"][tokens] + self.weights["pos"][place], []
        for layer in range(self.layers):
            weight = {name: self.weights[f"layer.{layer}.{name}"] for name in ("wq", "wk", "wv", "wo", "w1", "w2")}
            x = _norm(h)
            q, k, v = ((x @ weight[name]).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("wq", "wk", "wv"))
            if cache is not None:
                k, v = (_written(old, new, slots) for old, new in zip(cache[layer], (k, v), strict=True))
            kept.append((k, v))
            score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if valid is not None:
                score = score.masked_fill(~valid[:, None, None], -math.inf)
            h = h + (score.softmax(-1) @ v).transpose(1, 2).flatten(2) @ weight["wo"]
            h = h + torch.nn.functional.silu(_norm(h) @ weight["w1"]) @ weight["w2"]
        return _norm(h) @ self.weights["head"] + self.weights["bias"], tuple(kept)


def _norm(h: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6)


def _written(old: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    at = slots[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
    return old.scatter_(2, at, new)
