"""What each halting rule costs, in shares of a step; the target is 2 % each.

A rule is run at a setting at which it never fires, and the time that the loop spends outside the denoiser is compared
with that of the loop without a rule (the clock is that of step_overhead.py). The first step, which has no past, is left
out. The last column is the largest tensor that the signals make over a vocabulary of 50304, in shares of the logits.

    python benchmarks/criterion_cost.py
"""

import argparse
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from step_overhead import Timed, clock_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from untrained import parameters, untrained

from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.types import Prediction
from cdlm.halting import RULES, Criterion
from cdlm.halting.criterion import Pair
from cdlm.halting.head import FEATURES, Head, sampler_of, write_head
from cdlm.halting.head import untrained as untrained_layers
from cdlm.halting.rules.learned import ByHead
from cdlm.halting.signals import EmbeddingState, StepStatistics, first_past, observe
from cdlm.sampling.session import Session

TARGET = 0.02
TINY, HUGE, LATE = 1e-30, 1e30, 10**6
NEVER: dict[str, tuple[float, ...]] = {
    "Patience": (LATE,),
    "KL": (TINY,),
    "Learned": (1.0,),
    "AngleConvergence": (TINY,),
    "Entropy": (TINY,),
    "FixedPoint": (TINY,),
    "FixedSteps": (LATE,),
    "Full": (),
    "JoT": (HUGE,),
    "Mutual": (1.0, LATE, 0.0),
    "Never": (),
    "NormConvergence": (TINY,),
    "Prophet": (HUGE, HUGE, HUGE),
    "SchED": (HUGE, HUGE),
    "StableAndConfident": (LATE,),
    "Stop": (0.0,),
    "VoteDecided": (),
}
"""Arguments with which a rule looks at every step and never fires; those by a head are given its folder first."""
NOWHERE = "0" * 64
"""Weights of a head that was trained on none."""
WIDE = 50304
"""Vocabulary at which the largest tensor is looked for, with four rows."""
LEFT_OUT = {"For", "FromStep", "EDIT"}
"""Rules that are made of others, or read what continuous models do not give."""
MODELS = {
    "small": (CDCD(width=384, depth=8, heads=6, dim=64), 8192, 64),
    "large": (CDCD(width=1024, depth=8, heads=16, dim=256), 32000, 16),  # configs/ddlm.yaml
}
"""Settings, vocabulary and rows."""


def rules(settings: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Criterion]:
    """Every rule that has a name but those `LEFT_OUT`; heads are of a sampler with these settings."""
    plain = [name for name, made in RULES.items() if name not in LEFT_OUT and not _joins(made)]
    with TemporaryDirectory() as folder:
        write_head(Path(folder), _head(settings))
        return {name: _rule(RULES[name], folder, NEVER[name]) for name in plain}


def _rule(made: Any, folder: str, settings: tuple[float, ...]) -> Criterion:
    arguments = (folder, *settings) if issubclass(made, ByHead) else settings
    return made(*arguments).reading(_no_answers)


def _no_answers(tokens: Any, generated: Any, valid: Any, parser: str) -> list[None]:
    """In place of the texts, which the rule reads at their own cost: of the vote alone."""
    return [None] * len(tokens)


def _head(settings: Mapping[str, Any]) -> Head:
    """A head that reads all there is."""
    names = tuple(FEATURES)
    none = torch.zeros(len(names), dtype=torch.float64)
    return Head(names, none, none + 1, untrained_layers(names), NOWHERE, sampler_of(settings), {})


def _joins(made: Any) -> bool:
    return isinstance(made, type) and issubclass(made, Pair)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor made, views and what was there before left out."""

    def __init__(self, there: list[torch.Tensor]):
        super().__init__()
        self.known, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in there}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


def largest(needs: frozenset[str], length: int) -> float:
    """Bytes of the largest tensor that the signals make at a step with a past, over those of the logits."""
    state = torch.randn(4, length, 64)
    steps = [Prediction(torch.randn(4, length, WIDE), torch.randn_like(state)) for _ in range(2)]
    made = Largest([state, *(part for step in steps for part in step)])
    past, open_ = first_past(needs, state, None), torch.ones(4, length, dtype=torch.bool)
    for i, prediction in enumerate(steps):
        first = torch.full((4,), i == 0)
        space = EmbeddingState(state, torch.ones(4), 1.0, prediction.x0, state)
        statistics = StepStatistics(prediction.logits, open_, open_, first, past, needs, space)
        with made:
            _, past = observe(needs, statistics)
    return made.bytes / steps[0].logits.nbytes


def seconds(timed: Timed, sessions: dict[str, Session], rows: int, repeats: int) -> tuple[float, dict[str, float]]:
    """Seconds of a step inside the denoiser, and outside it for each session: medians over steps and repeats."""
    inside: list[float] = []
    outside: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(repeats):  # in turns, so that a change of the machine's speed meets all of them
        for name, session in sessions.items():
            session.run(session.requests(n=rows))
            calls, timed.calls = timed.calls, []
            inside += [end - start for start, end in calls]
            outside[name] += [b[0] - a[1] for a, b in pairwise(calls[1:])]
    return median(inside), {name: median(values) for name, values in outside.items()}


def measure(name: str, args: argparse.Namespace) -> None:
    settings, vocab, rows = MODELS[name]
    system = untrained(settings, vocab, args.length).to(args.device)
    timed = Timed(system, clock_of(args.device))
    timed.fingerprint = NOWHERE
    session = Session(timed, Diffusion(args.steps), batch_size=rows)
    sessions = {"no rule": session}
    sessions |= {name: session.with_criterion(rule) for name, rule in rules(session.settings).items()}
    sessions["everything recorded"] = session.recorded()
    inside, outside = seconds(timed, sessions, rows, args.repeats)
    plain = outside.pop("no rule")
    print(f"{parameters(system)}, vocabulary {vocab}, {rows} rows of {args.length}: a step is {inside + plain:.3f} s,")
    print(f"of which the loop without a rule {1e3 * plain:.1f} ms")
    print(f"{'':20} {'ms a step':>10} {'of the step':>12} {'largest tensor':>16}")
    for name, took in outside.items():
        options = sessions[name].options
        made = largest(options.needs, args.length)
        share = (took - plain) / (inside + took)
        verdict = f"  above the target of {TARGET:.0%}" if share > TARGET and not options.record else ""
        print(f"{name:20} {1e3 * (took - plain):10.2f} {share:12.2%} {made:16.2%}{verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--device", default="cpu")
    for name, value in dict(steps=5, repeats=2, length=64).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        measure(name, args)


if __name__ == "__main__":
    main()
