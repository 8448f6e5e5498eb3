"""A training step of ours beside one as MDLM's network and loop take it, at equal size and equal tokens.

The peer is written anew after MDLM (arXiv 2406.07524): a transformer whose blocks are modulated by the noise level
(adaLN), with dropout, rotary positions and weights of its own for input and output; log-linear noise, antithetic
levels, logits of the SUBS parameterisation over all positions, AdamW, clipping and an EMA. Torch's attention stands for
flash attention. Ours is `Masked` with AdamW and with Muon. The steps are timed in turns, in processor time on one
thread; the ratio is the median over rounds, with the middle half of them.

    python benchmarks/training_step.py --rows 2 8
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from untrained import parameters

from cdlm.core.types import Batch
from cdlm.masked.system import Masked
from cdlm.sampling.texts import Special
from cdlm.training.ema import EMA
from cdlm.training.optimizers import build_optimizer, set_rates
from cdlm.training.options import TrainOptions

VOCAB, WIDTH, HEADS, DEPTH, LENGTH = 8192, 384, 6, 7, 128
MASK = VOCAB - 1
CONDITION, FREQUENCIES = 128, 256
LEAST = 1e-3
"""The least noise level, and what is left unmasked at the largest."""

Step = Callable[[int, Tensor], None]


class Modulation(nn.Module):
    """Shifts, scales and gates from the noise level, zero at first."""

    def __init__(self, parts: int):
        super().__init__()
        self.linear, self.parts = nn.Linear(CONDITION, parts * WIDTH), parts
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(condition)[:, None].chunk(self.parts, 2)


class Block(nn.Module):
    """Attention and a feed-forward network, each modulated and gated."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.modulation = Modulation(6)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.1)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)
        h = h + gate * self.dropout(self.attend(self.norms[0](h) * (1 + scale) + shift, cos, sin))
        return h + gate2 * self.dropout(self.feed(self.norms[1](h) * (1 + scale2) + shift2))

    def attend(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = (
            x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) * sin for x in (q, k)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Peer(nn.Module):
    """The network of MDLM, and its loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.level = nn.Sequential(nn.Linear(FREQUENCIES, CONDITION), nn.SiLU(), nn.Linear(CONDITION, CONDITION))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.modulation = nn.LayerNorm(WIDTH, bias=False), Modulation(2)
        half = WIDTH // HEADS // 2
        turns = torch.outer(torch.arange(LENGTH), 10000.0 ** (-torch.arange(half) / half)).repeat(1, 2)
        self.register_buffer("cos", turns.cos())
        self.register_buffer("sin", turns.sin())

    def forward(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        waves = sigma[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        condition = F.silu(self.level(torch.cat((waves.cos(), waves.sin()), -1)))
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h, self.cos, self.sin, condition)
        shift, scale = self.modulation(condition)
        return self.head(self.norm(h) * (1 + scale) + shift)

    def loss(self, tokens: Tensor) -> Tensor:
        rows = len(tokens)
        level = (torch.rand(rows) + torch.arange(rows)) / rows * (1 - LEAST) + LEAST
        masked = torch.rand(tokens.shape) < ((1 - LEAST) * level)[:, None]
        noisy = tokens.masked_fill(masked, MASK)
        logits = self(noisy, -torch.log1p(-(1 - LEAST) * level))
        logits[..., MASK] -= 1e6
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        log_p[~masked] = -1e6
        log_p[~masked, noisy[~masked]] = 0.0
        return (-log_p.gather(-1, tokens[..., None])[..., 0] / level[:, None]).mean()


def peer() -> tuple[Any, Step]:
    torch.manual_seed(0)
    network = Peer().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, weight_decay=0.0)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9999))

    def step(_: int, tokens: Tensor) -> None:
        optimizer.zero_grad()
        network.loss(tokens).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)

    return network, step


def ours(name: Literal["adamw", "muon"]) -> tuple[Any, Step]:
    torch.manual_seed(0)
    settings = Masked(width=WIDTH, depth=DEPTH, heads=HEADS, dim=WIDTH, gates=True)
    system = settings.build(VOCAB, Special(mask_id=MASK, eos_id=0)).train()
    options = TrainOptions(optimizer=name, steps=1000)
    optimizer, average = build_optimizer(system.parameter_groups(), options), EMA(system, 0.9999)
    noise = torch.Generator().manual_seed(0)

    def step(number: int, tokens: Tensor) -> None:
        optimizer.zero_grad()
        system(Batch(tokens, None, torch.ones_like(tokens, dtype=torch.bool), noise)).total.backward()
        nn.utils.clip_grad_norm_(system.parameters(), 1.0)
        set_rates(optimizer, number, options)
        optimizer.step()
        average.update(system, number + 1)

    return system, step


def rounds(steps: dict[str, Step], rows: int, number: int) -> Iterator[list[float]]:
    """Processor seconds of one step of each, round by round; the first one is left out."""
    for k in range(number + 1):
        tokens = torch.randint(MASK, (rows, LENGTH))
        taken = []
        for step in steps.values():
            began = time.process_time()
            step(k, tokens)
            taken.append(time.process_time() - began)
        if k:
            yield taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8], help=f"rows of {LENGTH} tokens a step")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    arms = {"MDLM's, AdamW": peer(), "ours, AdamW": ours("adamw"), "ours, Muon": ours("muon")}
    print("; ".join(f"{name}: {parameters(system)}" for name, (system, _) in arms.items()))
    print("rows  tokens  step           ms/step  ratio")
    for rows in args.rows:
        seconds = np.array(list(rounds({name: step for name, (_, step) in arms.items()}, rows, args.rounds)))
        ratios = seconds / seconds[:, :1]
        for i, name in enumerate(arms):
            low, middle, high = np.quantile(ratios[:, i], [0.25, 0.5, 0.75])
            took = 1000 * np.median(seconds[:, i])
            print(
                f"{rows:4d}  {rows * LENGTH:6d}  {name:13}  {took:7.0f}  {middle:.2f} [{low:.2f}, {high:.2f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
