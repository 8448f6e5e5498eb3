"""Optimisers for the groups of a system, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from cdlm.training.options import TrainOptions

BETAS = (0.9, 0.99)


class CombinedOptimizer(Optimizer):
    """Several optimisers as one: each steps over its own groups and keeps its own state."""

    def __init__(self, **parts: Optimizer):
        self.parts = parts
        super().__init__([group for part in parts.values() for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


def build_optimizer(groups: Mapping[str, list[nn.Parameter]], options: TrainOptions) -> Optimizer:
    """The optimiser of `matrices`, `rest` and `schedule` (see `System.parameter_groups`).

    Each group carries its name; `set_rates` must be called before each step.
    """
    matrices, *others = [
        {"params": groups[name], "name": name} for name in ("matrices", "rest", "schedule") if groups[name]
    ]
    if options.optimizer == "adamw":
        return AdamW([matrices, *others], betas=BETAS, weight_decay=0.0)
    muon = Muon([matrices], weight_decay=0.0, adjust_lr_fn="original")
    return CombinedOptimizer(muon=muon, adamw=AdamW(others, betas=BETAS, weight_decay=0.0))


def lr_factor(step: int, options: TrainOptions) -> float:
    """Share of the peak learning rate in optimiser step `step` (zero-based): linear warm-up, then a cosine."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.final_lr_ratio + (1 - options.final_lr_ratio) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def set_rates(optimizer: Optimizer, step: int, options: TrainOptions) -> None:
    """Set learning rates and weight decay for step `step` from the options alone: a resumed run may change them."""
    factor = lr_factor(step, options)
    peak = {"matrices": options.muon_lr if options.optimizer == "muon" else options.lr, "rest": options.lr}
    for group in optimizer.param_groups:
        name = group["name"]
        group["lr"] = options.schedule_lr if name == "schedule" else peak[name] * factor
        group["weight_decay"] = options.weight_decay if name == "matrices" else 0.0
