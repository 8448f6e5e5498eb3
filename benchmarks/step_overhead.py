"""What a step costs besides the model: solver, statistics, halting rule, compaction, bookkeeping.

The denoiser is wrapped with a clock, and what the loop spends outside it is compared with the whole step; the target
is 5 % without a rule and 8 % with `Patience`. The first line is a bare loop of forward and Euler step, the second the
sampling loop without a halting rule: statistics that nobody asks for should cost nothing. On the CPU the clock is the
processor time of one thread, which other work on the machine disturbs little; on a GPU it is wall time with the device
brought to rest at each reading.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --batch 1 --vocab 480 --width 128 --depth 3 --heads 4  # the demo, alone
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from jaxtyping import Float, Int
from torch import Tensor
from untrained import parameters, untrained

from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.grids import Adaptive
from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.types import Condition, Prediction
from cdlm.halting import Patience
from cdlm.policies.confidence import Threshold
from cdlm.sampling.session import Session

TARGETS = {"no rule": 0.05, "Patience": 0.08}
"""Of the rest, as a share of a step."""
Clock = Callable[[], float]


def clock_of(device: str) -> Clock:
    if device == "cpu":
        return time.process_time

    def rest() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return rest


class Timed(Denoiser):
    """The same model with a note of when each call began and ended."""

    def __init__(self, inner: EmbeddingDiffusion, clock: Clock):
        self.inner, self.clock, self.calls = inner, clock, list[tuple[float, float]]()
        self.rho, self.dim, self.schedule = inner.rho, inner.dim, inner.schedule
        self.length, self.tokenizer = inner.length, inner.tokenizer

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        start = self.clock()
        prediction = self.inner.denoise(z, t, condition)
        self.calls.append((start, self.clock()))
        return prediction

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.inner.embed(tokens)

    def mix(self, weights: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        return self.inner.mix(weights)

    def expect(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        return self.inner.expect(logits)

    def costs(self) -> tuple[float, float]:
        """Medians over the steps: seconds inside the denoiser, seconds from its end to its next call."""
        inside = [end - start for start, end in self.calls]
        between = [after[0] - before[1] for before, after in zip(self.calls, self.calls[1:], strict=False)]
        self.calls.clear()
        return median(inside), median(between)


@torch.no_grad()
def bare(timed: Timed, sampling: Diffusion, batch: int) -> None:
    """Forward and Euler step, self-conditioned, and nothing else."""
    device = timed.device
    levels = sampling.grid.levels(timed.schedule, sampling.steps).to(device)
    z = levels[0].float() * torch.randn(batch, timed.length, timed.dim, device=device)
    target = torch.ones(batch, timed.length, dtype=torch.bool, device=device)
    condition = Condition(torch.zeros_like(z), target, torch.zeros_like(z))
    for t, t_next in zip(levels, [*levels[1:].tolist(), float(levels[-1])], strict=True):
        x0 = timed.denoise(z, t.expand(batch), condition).x0
        z = x0 + t_next / float(t) * (z - x0)
        condition = condition._replace(x0=x0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    sizes = dict(steps=6, repeats=2, batch=64, length=64, vocab=8192, width=384, depth=8, heads=6, dim=64)
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = CDCD(width=args.width, depth=args.depth, heads=args.heads, dim=args.dim)
    system = untrained(settings, args.vocab, args.length).to(args.device)
    timed = Timed(system, clock_of(args.device))
    never = args.steps + 1  # a rule that looks at every step and never fires, so that all steps are alike
    sampling = Diffusion(args.steps)
    plain = Session(timed, sampling, batch_size=args.batch)
    ruled = plain.with_criterion(Patience(never))
    sessions = {
        "no rule": plain,
        "Patience": ruled,
        "everything recorded": ruled.recorded(),
        "commits": plain.with_sampling(replace(sampling, commit=Threshold(1.0))),  # looks, and is never sure
        "adaptive steps": plain.with_sampling(replace(sampling, grid=Adaptive())),
    }
    print(f"{parameters(system)}, vocabulary {args.vocab}, {args.batch} rows of {args.length}, {args.steps} steps")

    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in ("bare loop", *sessions)}
    for _ in range(args.repeats):  # in turns, so that a change of the machine's speed meets all of them
        bare(timed, sampling, args.batch)
        costs["bare loop"].append(timed.costs())
        for name, session in sessions.items():
            session.run(session.requests(n=args.batch))
            costs[name].append(timed.costs())

    print(f"{'':20} {'model, ms':>10} {'rest, ms':>9} {'rest / step':>11}{'target':>9}")
    for name, pairs in costs.items():
        inside, between = median(p[0] for p in pairs), median(p[1] for p in pairs)
        share = between / (inside + between)
        wanted = TARGETS.get(name)
        verdict = "" if wanted is None else f"{wanted:9.0%}" + (" met" if share <= wanted else " missed")
        print(f"{name:20} {1e3 * inside:10.1f} {1e3 * between:9.2f} {share:11.2%}{verdict}")


if __name__ == "__main__":
    main()
