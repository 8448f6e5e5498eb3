"""How often a calibrated setting loses more than was promised, by simulation on the oracle.

    python tests/coverage_of_bounds.py

A large pool of samples of the oracle says what every setting loses in truth. Calibrations on random sets of them choose
a setting, and a choice that in truth loses more than the limit is a failure: at most one in ten is promised. In the
second pool one sample in 300 is ruined by every setting that halts: all its tokens differ, and it costs 10 nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from oracle import Oracle, loop

from cdlm.core.errors import CdlmError
from cdlm.core.stats import Scores
from cdlm.halting import FixedSteps
from cdlm.halting.calibration import Goal, Tried, loosest, search
from cdlm.halting.losses import Bounded, Change, Loss
from cdlm.sampling.requests import requests

POSITIONS, STEPS, CONFIDENCE = 8, 24, 0.9
NATS = 10.0
"""What a ruined sample costs a token."""


@dataclass(frozen=True)
class Pool:
    """What each of many samples loses under each setting, from strict to loose."""

    differ: Float[np.ndarray, "k m"]
    """Share of its tokens that are not those of the full run."""
    nats: Float[np.ndarray, "k m"]
    """Change of its negative log likelihood a token, under the oracle's own frequencies."""

    def ruined(self, share: float, seed: int = 0) -> Pool:
        """The same, with so many samples ruined by every setting."""
        broken = np.random.default_rng(seed).random(self.differ.shape[1]) < share
        return Pool(np.where(broken, 1.0, self.differ), np.where(broken, NATS, self.nats))


def pool(samples: int, seed: int = 0) -> Pool:
    """Samples of the oracle, stopped at every step but the last."""
    oracle = Oracle(vocab=7, dim=5)
    run = loop(oracle, 512, steps=STEPS, seed=seed, record={"tokens"})
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        for first in range(0, samples, 512):
            asked = requests(None, min(512, samples - first), POSITIONS, None, first)
            seen.append(torch.stack([step.state.signals["tokens"] for step in run.steps(asked)]))
    tokens = torch.cat(seen, 1).numpy()
    cost = -np.log(oracle.frequencies.numpy())[tokens].mean(2)
    last = tokens[-1]
    return Pool((tokens != last).mean(2)[-2::-1], (cost - cost[-1])[-2::-1])


Measure = Callable[[Pool, int, np.ndarray], Loss]


def differ(of: Pool, setting: int, chosen: np.ndarray) -> Loss:
    """The bounded loss."""
    return Bounded(of.differ[setting, chosen])


def nats(of: Pool, setting: int, chosen: np.ndarray) -> Loss:
    """The unbounded one."""
    change = of.nats[setting, chosen]
    return Change(Scores(change, np.ones(len(change))).bootstrap(), two_sided=True, samples=len(change))


def failures(of: Pool, measure: Measure, limit: float, samples: int, times: int, seed: int = 1) -> tuple[float, float]:
    """Shares of calibrations that choose a setting which in truth loses too much, and that choose none."""
    truth = np.abs((of.differ if measure is differ else of.nats).mean(1))
    goal, rng = Goal(limit, CONFIDENCE), np.random.default_rng(seed)
    rules = [FixedSteps(steps) for steps in range(STEPS - 1, 0, -1)]
    wrong = none = 0
    for _ in range(times):
        chosen = rng.choice(of.differ.shape[1], samples, replace=False)

        def trial(rule: FixedSteps, chosen: np.ndarray = chosen) -> Tried:
            return Tried(float(rule.steps), 1 - rule.steps / STEPS, measure(of, STEPS - 1 - rule.steps, chosen))

        try:
            best = loosest(search(rules, trial, goal, samples)).rule  # type: ignore[arg-type]
        except CdlmError:
            none += 1
            continue
        wrong += truth[[repr(rule) for rule in rules].index(best)] > limit
    return wrong / times, none / times


def main() -> None:
    """Print the rates."""
    clean = pool(20480)
    print("| loss | bound | pool | limit | samples | failed | chose nothing |\n|---|---|---|--:|--:|--:|--:|")
    for name, of, limits in (
        ("as drawn", clean, (0.02, 0.02)),
        ("1 in 300 ruined", clean.ruined(1 / 300), (0.003, 0.02)),
    ):
        for measure, limit in zip((differ, nats), limits, strict=True):
            for samples in (256, 512, 1024):
                if samples < Goal(limit, CONFIDENCE).fewest:
                    continue
                wrong, none = failures(of, measure, limit, samples, 300)
                bound = "Hoeffding-Bentkus" if measure is differ else "bootstrap"
                loss = "tokens that differ" if measure is differ else "nats per token"
                print(f"| {loss} | {bound} | {name} | {limit} | {samples} | {wrong:.1%} | {none:.1%} |", flush=True)


if __name__ == "__main__":
    main()
