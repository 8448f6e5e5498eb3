"""Does halting save the time that it saves calls?

Draws the same samples with a halting rule and without, in alternating pairs, and divides: the ratio of wall times
should be at most 1.1 times the ratio of denoiser calls. Without a run folder, an untrained system stands in, and each
row halts at a step of its own, drawn from its number, so that rows leave the batch one by one as they do in earnest.

    python benchmarks/halting_walltime.py RUN --halt "Patience(60)"
    python benchmarks/halting_walltime.py --width 384 --depth 8
"""

import argparse
import time
from dataclasses import dataclass
from statistics import median

import torch
from untrained import parameters, untrained

import cdlm
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.types import Decision, StepState
from cdlm.halting import Criterion, Stateless

TARGET = 1.1


@dataclass(frozen=True)
class Scattered(Stateless):
    """Row i halts at a pseudo-random share of its steps in [low, high), the same in every run."""

    needs = frozenset({"switches"})  # what the common rules read, so that its cost is in the measurement

    low: float = 0.4
    high: float = 1.0

    def decide(self, state: StepState) -> Decision:
        share = (state.row * 2654435761 % 2**32).double() / 2**32  # multiplicative hashing
        return Decision(state.step + 1 >= (self.low + (self.high - self.low) * share) * state.budget)


@dataclass(frozen=True)
class Cost:
    seconds: float
    cpu: float
    calls: float


def cost(model: cdlm.Model, args: argparse.Namespace, halt: str | Criterion | None) -> Cost:
    """One run, decoded texts included: wall seconds, processor seconds and mean calls of a sample."""
    wall, cpu = time.perf_counter(), time.process_time()
    samples = cdlm.generate(model, n=args.n, steps=args.steps, halt=halt, seed=0, batch_size=args.batch_size)
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, float(samples.nfe.mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder; without one, an untrained system")
    parser.add_argument("--halt", default="Patience(20)", help="halting rule, for a run folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
    for name, value in dict(n=256, steps=50, batch_size=64, repeats=3).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    for name, value in dict(width=128, depth=3, heads=4, vocab=512, length=64).items():
        parser.add_argument(f"--{name}", type=int, default=value, help="of the untrained system")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run:
        model, halt = cdlm.load(args.run, device=args.device), args.halt
    else:
        settings = CDCD(width=args.width, depth=args.depth, heads=args.heads)
        model, halt = untrained(settings, args.vocab, args.length).to(args.device), Scattered()
    print(f"{parameters(model)}, {args.n} samples, {args.batch_size} in flight, {args.steps} steps, {halt}")

    cdlm.generate(model, n=args.batch_size, steps=3)  # warm up
    print("pair  full, s halted, s wall ratio CPU ratio calls ratio wall/calls")
    rows = []
    for pair in range(args.repeats):
        full, halted = cost(model, args, None), cost(model, args, halt)
        wall, cpu, calls = halted.seconds / full.seconds, halted.cpu / full.cpu, halted.calls / full.calls
        rows.append((full.seconds, halted.seconds, wall, cpu, calls, wall / calls))
        _print(str(pair + 1), rows[-1])
    middle = tuple(median(column) for column in zip(*rows, strict=True))
    _print("med.", middle)
    print(f"target: wall/calls <= {TARGET}: {'met' if middle[-1] <= TARGET else 'missed'}")


def _print(name: str, row: tuple[float, ...]) -> None:
    print("{:4} {:8.2f} {:9.2f} {:10.3f} {:9.3f} {:11.3f} {:10.3f}".format(name, *row))


if __name__ == "__main__":
    main()
