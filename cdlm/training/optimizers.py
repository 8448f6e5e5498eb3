"""Optimisers for the groups of a system, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from cdlm.core.errors import CdlmError
from cdlm.training.options import TrainOptions

BETAS = (0.9, 0.99)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's author. They stretch small singular values most."""


class Muon(Optimizer):
    """Muon with Nesterov momentum (Jordan et al. 2024, "Muon"), for matrices only.

    Torch has one since 2.9 that takes one matrix after the other, in bfloat16 everywhere. Here matrices of one shape go
    together, and in float32 on a CPU: processors without instructions for bfloat16 multiply it forty times slower, and
    the optimiser then takes longer than the network.
    """

    def __init__(self, matrices: ParamsT, lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for matrix in self.param_groups[-1]["params"]:
            if matrix.ndim != 2:
                raise CdlmError(f"Muon needs matrices, got a shape of {tuple(matrix.shape)}: give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.device], list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape, matrix.device].append(matrix)
            for matrices in alike.values():
                self._move(matrices, group)
        return loss

    def _move(self, matrices: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        updates = []
        for matrix in matrices:
            grad = matrix.grad
            assert grad is not None
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            average = self.state[matrix]["momentum_buffer"]
            average.lerp_(grad, 1 - group["momentum"])
            updates.append(grad.lerp(average, group["momentum"]))
        rows, columns = matrices[0].shape
        lr = group["lr"] * math.sqrt(max(1, rows / columns))
        for matrix, step in zip(matrices, orthogonal(torch.stack(updates)).to(matrices[0].dtype), strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-lr)


def orthogonal(matrices: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n rows columns"]:
    """Nearly orthogonal matrices (singular values of about 0.5 to 1.5) with the singular vectors of those given.

    Newton-Schulz, five times: X <- a X + (b A + c A^2) X with A = X X^T (Jordan et al. 2024, "Muon").
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    if x.device.type != "cpu":
        x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


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
    named = {name: {"params": groups[name], "name": name} for name in ("matrices", "rest", "schedule") if groups[name]}
    parts: dict[str, Optimizer] = {}
    if options.optimizer == "muon" and "matrices" in named:
        parts["muon"] = Muon([named.pop("matrices")])
    if named:
        parts["adamw"] = AdamW(list(named.values()), betas=BETAS, weight_decay=0.0)
    return CombinedOptimizer(**parts) if "muon" in parts else parts["adamw"]


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
