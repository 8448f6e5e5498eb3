"""Does halting save the time that it saves calls, and do commits?

Draws the same samples with a halting rule or commits and without, in alternating pairs, and divides: the ratio of wall
times should be at most 1.1 times the ratio of denoiser calls, and within 5 % of it on a workload. Without a run folder,
an untrained system stands in, and each row halts at a step of its own, drawn from its number, so that rows leave the
batch one by one as they do in earnest.

    python benchmarks/halting_walltime.py RUN --halt "Patience(60)"
    python benchmarks/halting_walltime.py RUN --workload "MixedPrompts()" --solver "Ancestral()" \\
        --commit "FallingThreshold(0.95)"
    python benchmarks/halting_walltime.py --width 384 --depth 8
"""

import argparse
import time
from dataclasses import dataclass
from statistics import median

import torch
from untrained import parameters, untrained

import cdlm
from cdlm.api import ask, with_halt
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.types import Decision, StepState
from cdlm.halting import Criterion, Stateless

TARGET, TARGET_OF_WORKLOADS = 1.1, 1.05


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


def cost(model: cdlm.Model, args: argparse.Namespace, halt: str | Criterion | None, commit: str | None) -> Cost:
    """One run, decoded texts included: wall seconds, processor seconds and mean calls of a sample."""
    session = cdlm.open_session(
        model, steps=args.steps, batch_size=args.batch_size, solver=args.solver, grid=args.grid, commit=commit
    )
    requests, work = ask(session, args.n, workload=args.workload)
    session = with_halt(session, halt, requests, work)
    wall, cpu = time.perf_counter(), time.process_time()
    samples = session.run(requests)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    return Cost(*seconds, float(samples.nfe.mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder; without one, an untrained system")
    parser.add_argument("--halt", help="halting rule; Patience(20) if there is no --commit either")
    parser.add_argument("--commit", help="policy of the second run of a pair")
    parser.add_argument("--workload", help="of both runs")
    parser.add_argument("--solver", default="Euler()")
    parser.add_argument("--grid", default="Warped()")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
    for name, value in dict(n=256, steps=50, batch_size=64, repeats=3).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    for name, value in dict(width=128, depth=3, heads=4, vocab=512, length=64).items():
        parser.add_argument(f"--{name}", type=int, default=value, help="of the untrained system")
    args = parser.parse_args()
    if not args.run and (args.halt or args.commit or args.workload):
        parser.error("a rule, commits or a workload need a run folder: name one")
    torch.set_num_threads(args.threads)
    if args.run:
        model = cdlm.load(args.run, device=args.device)
        halt = args.halt or (None if args.commit else "Patience(20)")
    else:
        settings = CDCD(width=args.width, depth=args.depth, heads=args.heads)
        model, halt = untrained(settings, args.vocab, args.length).to(args.device), Scattered()
    print(
        f"{parameters(model)}, {args.n} samples, {args.batch_size} in flight, {args.steps} steps, {halt or args.commit}"
    )

    warm = argparse.Namespace(**{**vars(args), "n": args.batch_size, "steps": 3})
    cost(model, warm, None, args.commit)
    print("pair  full, s halted, s wall ratio CPU ratio calls ratio wall/calls")
    rows = []
    for pair in range(args.repeats):
        full, halted = cost(model, args, None, None), cost(model, args, halt, args.commit)
        wall, cpu, calls = halted.seconds / full.seconds, halted.cpu / full.cpu, halted.calls / full.calls
        rows.append((full.seconds, halted.seconds, wall, cpu, calls, wall / calls))
        _print(str(pair + 1), rows[-1])
    middle = tuple(median(column) for column in zip(*rows, strict=True))
    _print("med.", middle)
    target = TARGET_OF_WORKLOADS if args.workload else TARGET
    print(f"target: wall/calls <= {target}: {'met' if middle[-1] <= target else 'missed'}")


def _print(name: str, row: tuple[float, ...]) -> None:
    print("{:4} {:8.2f} {:9.2f} {:10.3f} {:9.3f} {:11.3f} {:10.3f}".format(name, *row))


if __name__ == "__main__":
    main()
