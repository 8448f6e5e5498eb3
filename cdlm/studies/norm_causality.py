"""Do norms decide when tokens settle? The run is disturbed, and the zero-switch step watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.grids import GRIDS
from cdlm.continuous.solvers import Advance, Estimate, Euler, Interval, Memory, Solver
from cdlm.core.rng import row_normal
from cdlm.core.stats import Bootstrap, Scores
from cdlm.evaluation.plots.panels import Line, Panel
from cdlm.recording.file import Recording
from cdlm.sampling.recordings import recording_of
from cdlm.sampling.requests import Request
from cdlm.sampling.session import Session
from cdlm.studies.measures import reached, zero_switch
from cdlm.studies.norms import NEAR, batches
from cdlm.studies.study import Continuous, Finding, ends, interval, label

UNTOUCHED = "untouched"
NOISE_KEY = 7
"""Keeps the injected noise apart from that of the start."""
Change = Callable[[Tensor], Tensor]
Strike = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Driven(Solver):
    """Euler, with the estimate that drives the state changed at every step.

    What the model predicts, reads as its previous estimate, and reads out is not touched.
    """

    change: Change
    inner: Solver = field(default_factory=Euler)

    def start(self, z: Tensor) -> Memory:
        return self.inner.start(z)

    def advance(self, memory: Memory, interval: Interval, estimate: Estimate) -> tuple[Memory, Advance]:
        return self.inner.advance(memory, interval._replace(x0=self.change(interval.x0)), estimate)


@dataclass(frozen=True)
class Struck(Solver):
    """Euler, with the state changed once: when it arrives at the noise level `level`."""

    level: float
    strike: Strike
    inner: Solver = field(default_factory=Euler)

    def start(self, z: Tensor) -> Memory:
        return self.inner.start(z)

    def advance(self, memory: Memory, interval: Interval, estimate: Estimate) -> tuple[Memory, Advance]:
        memory, moved = self.inner.advance(memory, interval, estimate)
        hit = (interval.t_next == self.level)[:, None, None]
        return memory, moved._replace(z=torch.where(hit, self.strike(moved.z, interval.t_next), moved.z))


def at_norm(x0: Float[Tensor, "b n d"], norm: float) -> Float[Tensor, "b n d"]:
    """Every position's estimate at the norm of an embedding."""
    return norm * torch.nn.functional.normalize(x0, dim=-1)


def with_noise(
    z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], *, scale: float, seed: int, indices: Sequence[int]
) -> Float[Tensor, "b n d"]:
    """z + scale * t * eps, with noise of each sample's own."""
    eps = row_normal(seed, [(NOISE_KEY << 32) + i for i in indices], *z.shape[1:]).to(z)
    return z + scale * t.to(z.dtype)[:, None, None] * eps


class Seen(NamedTuple):
    """What is watched of a run; steps from 1."""

    zero_switch: Int[np.ndarray, " m"]
    norm_arrival: Int[np.ndarray, " m"]
    """Step from which x0's norm stays near that of embeddings."""
    tokens: Int[np.ndarray, "m n"]


@dataclass(frozen=True, kw_only=True)
class NormCausality(Continuous):
    """Do norms decide when tokens settle? Norms are rescaled and noise is injected, and the zero-switch step watched.

    Args:
        steps: grid points.
        seed: of the samples and of the injected noise.
        grid: Warped(), LogT() or UniformT().
        factors: by which the driving x0 is multiplied at every step, or the state once.
        noise: standard deviations of the noise that is injected once, in units of the noise level there.
        at: where the state is struck, as shares of the steps.
    """

    steps: int
    seed: int
    grid: str
    factors: list[float]
    noise: list[float]
    at: list[float]

    def find(self) -> Finding:
        rows: list[dict[str, Any]] = []
        table: list[dict[str, str]] = []
        panels: list[Panel] = []
        notes = []
        for model in self.models:
            seen = self._watch(model)
            rows += [row for name, run in seen.items() for row in self._rows(model, name, run, seen[UNTOUCHED])]
            table += [self._line(model, name, run, seen[UNTOUCHED]) for name, run in seen.items()]
            panels += self._panels(model, seen)
            notes.append(f"{label(model)} {_correlation(*seen[UNTOUCHED][:2])}")
        note = (
            f"Means over {self.n} samples, as shares of the {self.steps} steps, with 95 % intervals (bootstrap) of the"
            f" paired differences to the untouched run. Norm: the step from which the norm of x0 stays above {NEAR} of"
            " an embedding's. As untouched: share of the final tokens. Correlation of the two steps over untouched"
            f" samples: {', '.join(notes)}."
        )
        return Finding(rows, table, note, panels)

    def solvers(self, denoiser: Denoiser, indices: Sequence[int]) -> dict[str, Solver]:
        """Every disturbance by name, for a group of samples that walk in step."""
        levels = GRIDS.parse(self.grid).levels(denoiser.schedule, self.steps)
        # The first level is the start itself, which no step arrives at.
        places = {share: float(levels[min(max(1, round(share * self.steps)), self.steps - 1)]) for share in self.at}
        made: dict[str, Solver] = {UNTOUCHED: Euler()}
        for f in self.factors:
            made[f"x0 * {f:g}, always"] = Driven(lambda x0, f=f: f * x0)
        made["x0 at the embedding norm, always"] = Driven(partial(at_norm, norm=denoiser.rho))
        for f in self.factors:
            made |= {f"z * {f:g} at {a:.0%}": Struck(level, lambda z, t, f=f: f * z) for a, level in places.items()}
        for s in self.noise:
            strike = partial(with_noise, scale=s, seed=self.seed, indices=indices)
            made |= {f"noise {s:g} t at {a:.0%}": Struck(level, strike) for a, level in places.items()}
        return made

    def _watch(self, model: str) -> dict[str, Seen]:
        session = self.flow(model, self.steps, self.seed, self.grid).alone().recorded()
        groups = list(batches(session.requests(n=self.n), self.batch_size))
        made = [self.solvers(self.denoiser(model), [r.index for r in group]) for group in groups]
        return {
            name: seen([_run(session, solvers[name], group) for solvers, group in zip(made, groups, strict=True)])
            for name in made[0]
        }

    def _rows(self, model: str, name: str, run: Seen, plain: Seen) -> list[dict[str, Any]]:
        same = (run.tokens == plain.tokens).mean(1)
        return [
            {"model": label(model), "disturbance": name, "sample": i, "steps": self.steps,
             "zero_switch": int(run.zero_switch[i]), "norm_arrival": int(run.norm_arrival[i]),
             "as_untouched": float(same[i])}
            for i in range(len(same))
        ]  # fmt: skip

    def _line(self, model: str, name: str, run: Seen, plain: Seen) -> dict[str, str]:
        def moved(now: Int[np.ndarray, " m"], before: Int[np.ndarray, " m"]) -> str:
            change = ends("change", _mean((now - before) / self.steps))
            return "" if name == UNTOUCHED else interval(change, "change", "+.1%")

        return {
            "model": label(model),
            "disturbance": name,
            "zero-switch": f"{run.zero_switch.mean() / self.steps:.1%}",
            "moved by": moved(run.zero_switch, plain.zero_switch),
            "norm": f"{run.norm_arrival.mean() / self.steps:.1%}",
            "norm moved by": moved(run.norm_arrival, plain.norm_arrival),
            "as untouched": f"{(run.tokens == plain.tokens).mean():.1%}",
        }

    def _panels(self, model: str, seen: dict[str, Seen]) -> list[Panel]:
        """Shifts of both steps, one dot a disturbance."""
        plain = seen[UNTOUCHED]
        place = np.arange(len(seen))
        shifts = {
            "zero-switch": [_mean((s.zero_switch - plain.zero_switch) / self.steps) for s in seen.values()],
            "norm of x0": [_mean((s.norm_arrival - plain.norm_arrival) / self.steps) for s in seen.values()],
        }
        lines = [
            Line(name, np.array([b.value for b in found]), place, _band(found), dots=True)
            for name, found in shifts.items()
        ]
        same = np.array([(s.tokens == plain.tokens).mean() for s in seen.values()])
        return [
            Panel(label(model), "moved by, share of the steps", "", lines, ticks=tuple(seen)),
            Panel(label(model), "final tokens as untouched", "", [Line("", same, place, dots=True)], ticks=tuple(seen)),
        ]


def _run(session: Session, solver: Solver, group: list[Request]) -> Recording:
    disturbed = session.with_sampling(session.sampling.with_flat(solver=solver))
    return recording_of(disturbed.run(group), disturbed)


def seen(parts: Sequence[Recording]) -> Seen:
    """What the samples of several groups show, side by side."""
    return Seen(
        np.concatenate([zero_switch(part.record) for part in parts]),
        np.concatenate([reached(part.record.signals["x0_norm"].astype(np.float64), NEAR) for part in parts]),
        np.concatenate([part.tokens for part in parts]),
    )


def _correlation(a: Int[np.ndarray, " m"], b: Int[np.ndarray, " m"]) -> str:
    return f"{np.corrcoef(a, b)[0, 1]:.2f}" if a.std() and b.std() else "undefined, one of them is the same everywhere"


def _mean(values: Float[np.ndarray, " m"]) -> Bootstrap:
    return Scores(values, np.ones(len(values))).bootstrap()


def _band(found: Sequence[Bootstrap]) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    low, high = np.array([b.interval95 for b in found]).T
    return low, high


STUDY = NormCausality
