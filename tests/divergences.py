"""Divergences by their definitions, token by token."""

import math

import torch
from torch import Tensor

from cdlm.halting.signals import TOP


def coarse_jsd(now: Tensor, before: Tensor, top: int = TOP) -> Tensor:
    """The divergence of Jensen and Shannon in which all but the most likely tokens of either are one."""
    p, q = now.double().softmax(-1).flatten(0, -2), before.double().softmax(-1).flatten(0, -2)
    values = []
    for one, two in zip(p, q, strict=True):
        kept = sorted({*one.topk(min(top, len(one))).indices.tolist(), *two.topk(min(top, len(two))).indices.tolist()})
        pairs = [(float(one[i]), float(two[i])) for i in kept]
        first, second = (max(1 - sum(part), 0.0) for part in zip(*pairs, strict=True))
        pairs.append((first, second))
        values.append(sum(x * math.log(2 * x / (x + y)) / 2 for a, b in pairs for x, y in ((a, b), (b, a)) if x > 0))
    return torch.tensor(values, dtype=torch.float64).view(now.shape[:-1])
