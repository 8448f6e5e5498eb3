"""Training with two threads beside other work, with and without OMP_WAIT_POLICY=PASSIVE.

Threads of OpenMP wait for each other at the end of every operation. By default they wait in a loop that keeps their
core busy; beside another process on the same cores, the thread that has work is then kept from running by the one that
waits for it. With PASSIVE the waiting thread gives its core away. The command line sets it unless the user did.

Each round trains in four new processes in turn: quiet and beside a process that computes without end, with the default
policy and with PASSIVE. The table has the median speed over the rounds, and its share of the quiet default.

    python benchmarks/busy_training.py [--rounds 3] [--seconds 20] [--threads 2] [--busy 1]
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

ROWS, LENGTH, VOCAB = 48, 64, 480
VARIABLE = "OMP_WAIT_POLICY"


@dataclass(frozen=True)
class Setting:
    """One way to train."""

    policy: str | None
    busy: bool

    def __str__(self) -> str:
        return f"{'busy ' if self.busy else 'quiet'}  {self.policy or 'default'}"


SETTINGS = [Setting(policy, busy) for busy in (False, True) for policy in (None, "PASSIVE")]


@contextmanager
def spinning(processes: int) -> Iterator[None]:
    """Processes that do nothing but keep a core busy each."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def speed(setting: Setting, args: argparse.Namespace) -> float:
    """Tokens per second of a training process with these settings."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"OMP_NUM_THREADS": str(args.threads)} | ({VARIABLE: setting.policy} if setting.policy else {})
    command = [sys.executable, __file__, "--measure", "--seconds", str(args.seconds), "--threads", str(args.threads)]
    with spinning(args.busy if setting.busy else 0):
        return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def measure(seconds: float, threads: int) -> float:
    """Tokens per second of optimiser steps on random tokens, at the size of configs/demo.yaml."""
    import torch

    from cdlm.continuous.systems.cdcd import CDCD
    from cdlm.core.types import Batch
    from cdlm.training.optimizers import build_optimizer, set_rates
    from cdlm.training.options import TrainOptions

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    options, system = TrainOptions(), CDCD(gates=True).build(VOCAB).train()
    optimizer = build_optimizer(system.parameter_groups(), options)
    noise, step, began, first = torch.Generator().manual_seed(0), 0, 0.0, 1
    while step <= first or time.perf_counter() - began < seconds:
        if step == first:  # the step before it warms up
            began = time.perf_counter()
        tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=noise)
        optimizer.zero_grad()
        system(Batch(tokens, None, torch.ones_like(tokens, dtype=torch.bool), noise)).total.backward()
        set_rates(optimizer, step, options)
        optimizer.step()
        step += 1
    return (step - first) * ROWS * LENGTH / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="training time of each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=int, default=1, help="processes that compute beside the busy ones")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.seconds, args.threads))
        return
    speeds: dict[Setting, list[float]] = {setting: [] for setting in SETTINGS}
    for _ in range(args.rounds):
        for setting in SETTINGS:
            speeds[setting].append(speed(setting, args))
            print(f"{setting}: {speeds[setting][-1]:,.0f} tokens/s", file=sys.stderr)
    load = os.getloadavg()[0]
    print(f"{args.threads} threads, {os.cpu_count()} cores, {args.busy} busy beside, load at the end {load:.1f}")
    print("machine  policy    tokens/s   of quiet default   range")
    for setting, found in speeds.items():
        share = median(found) / median(speeds[SETTINGS[0]])
        print(f"{setting!s:16}  {median(found):9,.0f}   {share:16.2f}   {min(found):,.0f} to {max(found):,.0f}")


if __name__ == "__main__":
    main()
