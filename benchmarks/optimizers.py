"""AdamW or Muon: what a step of each costs, and which learns more in equal time.

A step of Muon orthogonalises every hidden matrix, which costs the same for any number of tokens; AdamW costs next to
nothing. So AdamW takes more steps in equal time, the more of them the fewer tokens a step has. Here both get the same
processor time on one thread: their steps are timed in turns in this process, and each run of `cdlm train` takes as
many of them as the time allows, with its own cosine. The columns give the share of a step's time (Muon over AdamW),
the steps, and the validation loss in nats per token of the weights' average (less is better).

    python benchmarks/optimizers.py                        # the demo's model and text
    python benchmarks/optimizers.py --large                # step times alone, of 20 million parameters
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from untrained import parameters

from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.types import Batch
from cdlm.training.optimizers import build_optimizer, set_rates
from cdlm.training.options import TrainOptions

VOCAB, LENGTH = 480, 64
DEMO = CDCD(gates=True, t_min=0.06, t_max=5.0)
LARGE = CDCD(width=384, depth=11, heads=6, gates=True)


@dataclass(frozen=True)
class Choice:
    """An optimiser with its peak learning rate."""

    optimizer: str
    lr: float

    def settings(self, steps: int) -> dict[str, Any]:
        rate = {"muon_lr": self.lr} if self.optimizer == "muon" else {"lr": self.lr}
        return {"optimizer": self.optimizer, "steps": steps, **rate}


CHOICES = [Choice("adamw", 1e-3), Choice("adamw", 3e-3), Choice("muon", 1e-2), Choice("muon", 2e-2)]


def step_times(settings: CDCD, rows: int, rounds: int) -> tuple[dict[str, float], str]:
    """Processor seconds of a step with each optimiser: medians over rounds, in turns."""
    arms: dict[str, tuple[Any, Any, TrainOptions]] = {}
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        options = TrainOptions(**Choice(name, 1e-3).settings(1000))
        system = settings.build(VOCAB).train()
        arms[name] = system, build_optimizer(system.parameter_groups(), options), options
    noise = torch.Generator().manual_seed(0)
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for step in range(rounds + 2):
        for name, (system, optimizer, options) in arms.items():
            tokens = torch.randint(VOCAB, (rows, LENGTH), generator=noise)
            batch = Batch(tokens, None, torch.ones_like(tokens, dtype=torch.bool), noise)
            began = time.process_time()
            optimizer.zero_grad()
            system(batch).total.backward()
            set_rates(optimizer, step, options)
            optimizer.step()
            taken[name].append(time.process_time() - began)
    return {name: median(seconds[2:]) for name, seconds in taken.items()}, parameters(arms["muon"][0])


def loss(choice: Choice, rows: int, steps: int, config: str, seed: int) -> float:
    """Validation loss at the end of a run of `cdlm train`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    often = {"validate_every": steps, "checkpoint_every": steps, "log_every": max(1, steps // 10), "seed": seed}
    flags = [f"--training.{name}={value}" for name, value in (choice.settings(steps) | often).items()]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cdlm", "train", "--config", config, "--out", f"{folder}/run", "--quiet"]
        subprocess.run([*command, f"--batch_size={rows}", *flags], env=environment, check=True, capture_output=True)
        with open(Path(folder) / "run" / "metrics.csv") as file:
            return [float(line["valid_nats"]) for line in csv.DictReader(file) if line["valid_nats"]][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 48], help="rows of 64 tokens a step")
    parser.add_argument("--seconds", type=float, default=150.0, help="processor time of each run")
    parser.add_argument("--rounds", type=int, default=30, help="steps that are timed")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--large", action="store_true", help="time steps of a larger model, and train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("tokens/step  optimiser  peak rate  ms/step  share  steps  nats/token")
    size = ""
    for rows in args.rows:
        seconds, size = step_times(LARGE if args.large else DEMO, rows, args.rounds)
        with ThreadPoolExecutor(args.jobs) as pool:
            plan = [(choice, seed) for choice in CHOICES for seed in range(args.seeds)]
            steps = {choice: round(args.seconds / seconds[choice.optimizer]) for choice in CHOICES}
            runs = [] if args.large else [pool.submit(loss, c, rows, steps[c], args.config, s) for c, s in plan]
            found = {run: future.result() for run, future in zip(plan, runs, strict=False)}
        for choice in CHOICES:
            took = seconds[choice.optimizer]
            losses = " ".join(f"{found[choice, seed]:.4f}" for seed in range(args.seeds) if (choice, seed) in found)
            print(
                f"{rows * LENGTH:11d}  {choice.optimizer:9}  {choice.lr:9.0e}  {1000 * took:7.1f}"
                f"  {took / seconds['adamw']:5.2f}  {steps[choice]:5d}  {losses or '-'}",
                flush=True,
            )
    print(f"{size}; one thread, processor time")


if __name__ == "__main__":
    main()
