"""Sampling from a continuous model: one step of a solver for each row. It yields; everything else consumes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.continuous.denoiser import Denoiser, Steering
from cdlm.continuous.levels import Grid, Warped
from cdlm.continuous.solvers import Euler, Solver
from cdlm.errors import CdlmError
from cdlm.halting import Criterion, Never
from cdlm.loop import Loop, Request, stack_masks
from cdlm.noise import row_normal
from cdlm.signals import Glance, Past, Space, check_signals, first_past, most_likely, observe
from cdlm.types import Condition, Decision, Finished, Prediction, Rows, StepState, take


@dataclass(frozen=True)
class Sampler:
    """Everything that fixes a sampling run except the model, the requests and the batch size.

    Args:
        steps: grid points, >= 1. One prediction each; the last, at t_min, is read out, so Euler spends `steps` calls.
        criterion: when a row is done before that.
        grid, solver, steering: see there.
        init_scale: the start is `init_scale * t_max * eps`; CDCD finds that a little below 1 sharpens.
        seed: of the run, >= 0.
        record: names of signals to compute at every step, for the loop's consumers.
    """

    steps: int = 200
    criterion: Criterion = field(default_factory=Never)
    grid: Grid = field(default_factory=Warped)
    solver: Solver = field(default_factory=Euler)
    steering: Steering = field(default_factory=Steering)
    init_scale: float = 1.0
    seed: int = 0
    record: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise CdlmError(f"sampling needs steps >= 1, got {self.steps}: ask for at least one denoiser call")
        if self.seed < 0:
            raise CdlmError(f"a seed is a whole number >= 0, got {self.seed}")
        if not 0 <= self.init_scale < math.inf:
            raise CdlmError(f"init_scale must be >= 0, got {self.init_scale}: 1 is the model's own noise level")
        check_signals(self.record | self.criterion.needs)

    @property
    def settings(self) -> dict[str, int | float | str]:
        """What fixes the run besides seed and rule: two runs with equal settings walk the same steps."""
        parts = {name: repr(getattr(self, name)) for name in ("grid", "solver")}
        steering = {name: float(value) for name, value in asdict(self.steering).items()}
        return {"steps": self.steps, **parts, **steering, "init_scale": float(self.init_scale)}

    def with_steps(self, steps: int) -> Sampler:
        """The same with so many steps."""
        return replace(self, steps=steps)


class Live(NamedTuple):
    """Everything with a row axis that lives from one step to the next."""

    row: Int[Tensor, " b"]
    step: Int[Tensor, " b"]
    nfe: Int[Tensor, " b"]
    z: Float[Tensor, "b n d"]
    tokens: Int[Tensor, "b n"]
    """Prompt and frozen tokens; meaningless at open positions."""
    open: Bool[Tensor, "b n"]
    condition: Condition
    past: Past
    memory: Any


class Run(Loop[Live]):
    """One run of a sampler on a denoiser.

    Row i is the same in any batch, order or batch size (bit for bit where the denoiser's arithmetic is), and a halted
    row is a prefix of the row that is not halted.
    """

    def __init__(self, denoiser: Denoiser, sampler: Sampler, batch_size: int, device: torch.device | str = "cpu"):
        super().__init__(batch_size, device)
        self.denoiser, self.sampler = denoiser, sampler
        self.needs = sampler.record | sampler.criterion.needs
        self.grid = sampler.grid.levels(denoiser.schedule, sampler.steps).to(self.device)

    @torch.no_grad()
    def admit(self, requests: list[Request], beside: Live | None) -> Live:
        tokens = torch.stack([request.tokens for request in requests]).to(self.device)
        open_ = ~torch.stack([request.given for request in requests]).to(self.device)
        valid = stack_masks([request.valid for request in requests], self.device)
        if not bool(open_.any(1).all()):
            raise CdlmError("a prompt leaves nothing to generate: shorten it, or raise the length")
        clean = self.denoiser.embed(tokens)
        noise = row_normal(self.sampler.seed, [request.index for request in requests], *clean.shape[1:])
        z = self.sampler.init_scale * float(self.grid[0]) * noise.to(clean)
        index = torch.tensor([request.index for request in requests], device=self.device)
        zero = torch.zeros_like(index)
        real = torch.ones_like(open_) if valid is None else valid
        memory = self.sampler.criterion.start(Rows(open_, zero + self.sampler.steps, real))
        condition = Condition(clean * (~open_ & real)[..., None], open_, torch.zeros_like(z), valid)
        past = first_past(self.needs, z, None if beside is None else beside.past)
        return Live(index, zero, zero, z, tokens, open_, condition, past, memory)

    @torch.no_grad()
    def step(self, live: Live) -> tuple[Finished, tuple[Live, Tensor]]:
        t, span = self.grid[live.step], live.condition.noised
        prediction, x0 = self.sampler.steering.predict(self.denoiser, live.z, t, live.condition)
        rho, first = self.denoiser.rho, live.step == 0
        space = Space(live.z, t, rho, prediction.x0)
        glance = Glance(prediction.logits, live.open, span, first, live.past, self.needs, space)
        signals, past = observe(self.needs, glance)
        nfe = live.nfe + self.sampler.steering.calls
        budget = torch.full_like(live.step, self.sampler.steps)
        state = StepState(live.row, live.step, budget, t, nfe, live.open, signals)
        memory, decision = self.sampler.criterion.look(live.memory, state)
        live = _freeze(live, decision, glance)
        full = ~live.open.any(1)
        done = decision.halt | full | (live.step == budget - 1)
        tokens = _final_tokens(prediction, live, done)
        finished = Finished(state, done, decision.halt, full & ~decision.halt, tokens, decision.info)
        live = live._replace(nfe=nfe, past=past, memory=memory)
        live = live._replace(condition=live.condition._replace(x0=self._held(live, prediction.x0)))
        return finished, (live, self._held(live, x0))

    @torch.no_grad()
    def advance(self, carried: tuple[Live, Tensor]) -> Live:
        live, x0 = carried
        steering, condition = self.sampler.steering, live.condition

        def estimate(z: Tensor, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            asked = live if rows is None else take(live, rows)
            prediction, driving = steering.predict(self.denoiser, z, t, asked.condition)
            return self._held(asked, driving), self._held(asked, prediction.x0)

        moved = self.sampler.solver.advance(estimate, live.z, x0, self.grid[live.step], self.grid[live.step + 1])
        if moved.x0 is not None:
            condition = condition._replace(x0=moved.x0)
        nfe = live.nfe + moved.evaluations * steering.calls
        return live._replace(z=moved.z, step=live.step + 1, nfe=nfe, condition=condition)

    def _held(self, live: Live, x0: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """`x0` with the embedding of its token at each frozen position, so that the state there follows the level."""
        if not self.sampler.criterion.freezes:
            return x0
        frozen = live.condition.noised & ~live.open
        return torch.where(frozen[..., None], self.denoiser.embed(live.tokens).to(x0), x0)


def _freeze(live: Live, decision: Decision, glance: Glance) -> Live:
    if decision.freeze is None:
        return live
    fresh = decision.freeze & live.open
    return live._replace(tokens=torch.where(fresh, glance.tokens, live.tokens), open=live.open & ~fresh)


def _final_tokens(prediction: Prediction, live: Live, done: Bool[Tensor, " b"]) -> Int[Tensor, "m n"]:
    leaving = done.nonzero().squeeze(1)
    kept = live.tokens[leaving]
    best = [most_likely(prediction.logits[row]) for row in leaving.tolist()]  # row by row: no copy of the logits
    return torch.where(live.open[leaving], torch.stack(best), kept) if best else kept
