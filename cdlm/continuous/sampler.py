"""Sampling from a continuous model: one step of a solver for each row. It yields; everything else consumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.grids import GRIDS, Adaptive, Grid, LogT, Seen, Truncated, Warped
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.projections import PROJECTIONS, Projection
from cdlm.continuous.solvers import SOLVERS, Ancestral, Euler, Interval, Solver
from cdlm.core.checks import MOST_STEPS, check_number, check_object, check_whole
from cdlm.core.devices import read_columns
from cdlm.core.errors import CdlmError
from cdlm.core.rng import PositionNoise, StepNoise, generator
from cdlm.core.trees import join, take
from cdlm.core.types import Condition, LoopStep, NewRows, Prediction, RowCounts, StepState
from cdlm.halting.signals import (
    RECORDED,
    SIGNALS,
    EmbeddingState,
    Past,
    StepStatistics,
    first_past,
    most_likely,
    observe,
)
from cdlm.policies import parse_policy
from cdlm.policies.policy import Plan, Policy, View, enter, plan_of
from cdlm.recording.writer import OPEN
from cdlm.sampling.loop import Loop, RunOptions
from cdlm.sampling.requests import Request, stack_masks
from cdlm.sampling.session import Sampling


@dataclass(frozen=True)
class DiffusionSettings:
    """Sampling of continuous models. Without steps, solver, grid and commit it is what the model's folder recommends,
    if anything; what is not given otherwise is as in the model's paper.

    Args:
        solver: Euler(), Heun(), TwoStep(), TorchDiffEq("rk4"), TorchDiffEq("dopri5"), ..., Ancestral() or Renoise().
        grid: Warped(), LogT(), UniformT(), UpperEnds(), or the beginning of one, such as Truncated(LogT(), 0.6); or
            Adaptive(0.04), in which each row takes its own steps.
        projection: how logits drive the state: Expectation(), Greedy(), Drawn(0.9), MultiHot(0.2) or Uneven(0.2).
        softmax_temperature: divides the logits; below 1 sharpens.
        score_temperature: divides the score; below 1 sharpens. It breaks LangFlow, whose noise spans too many orders of
            magnitude: sharpen that by softmax_temperature.
        guidance: scale of classifier-free guidance; 1 is off, others double the calls.
        init_scale: scale of the noise that a sample starts from.
        commit: a policy, such as Threshold(0.9) or FallingThreshold(0.95): what it is sure of is given from then on;
            none commits nothing.
        reopen: least probability that a committed token must keep; below it, it is taken back. For models that were
            trained with wrong_given.
    """

    solver: str | Solver | None = None
    grid: str | Grid | None = None
    projection: str | Projection | None = None
    softmax_temperature: float | None = None
    score_temperature: float | None = None
    guidance: float | None = None
    init_scale: float | None = None
    commit: str | Policy | None = None
    reopen: float | None = None


@dataclass(frozen=True)
class Diffusion(Sampling):
    """How a continuous model is sampled.

    Args:
        steps: grid points, >= 1; with `Adaptive` the most of a row. One prediction each; the last, at t_min, is read
            out, so Euler spends `steps` calls.
        solver, grid, guidance: see there.
        init_scale: the start is `init_scale` times the prior; CDCD finds that a little below 1 sharpens.
        block: positions that are generated at a time: `steps` for each block, and the rule begins anew in each.
            None generates all at once.
        commit: which positions to commit at a step, and to what. The network sees a committed token as it sees a
            prompt, clean and marked as given, whatever noise is left in the row; a row ends when all are committed. The
            steps and blocks of a policy are those of the grid and of `block`. None commits nothing.
        reopen: a committed token whose probability falls below this is taken back: its position is open again, under
            the noise that its row has then (as DSL remasks, arXiv 2605.12836). None takes nothing back.
    """

    family = "continuous"
    flat = DiffusionSettings
    walk = frozenset({"steps", "solver", "grid", "commit"})
    signals = frozenset(SIGNALS)
    recorded = frozenset({"tokens", *RECORDED})

    steps: int = 200
    solver: Solver = field(default_factory=Euler)
    grid: Grid = field(default_factory=Warped)
    guidance: Guidance = field(default_factory=Guidance)
    init_scale: float = 1.0
    block: int | None = None
    commit: Policy | None = None
    reopen: float | None = None

    def __post_init__(self) -> None:
        check_object("Diffusion", Solver, solver=self.solver)
        check_object("Diffusion", Grid, grid=self.grid)
        check_object("Diffusion", Guidance, guidance=self.guidance)
        check_whole("Diffusion", largest=MOST_STEPS, steps=self.steps)
        check_number("Diffusion", least=0.0, init_scale=self.init_scale, hint="1 is the model's own noise level")
        hint = "a block has one position or more, and None generates all at once"
        check_whole("Diffusion", block=self.block, optional=True, hint=hint)
        if self.commit is not None:
            check_object("Diffusion", Policy, commit=self.commit)
            if switch := self.commit.masked_only:
                raise CdlmError(f"{switch} of {self.commit!r} makes sense for masked models alone: leave it out")
        check_number("Diffusion", least=0.0, most=1.0, optional=True, reopen=self.reopen)
        if self.reopen is not None and self.commit is None:
            raise CdlmError(f"reopen={self.reopen} takes back what was committed, and nothing is: give commit too")

    @property
    def settings(self) -> dict[str, Any]:
        parts = {name: repr(getattr(self, name)) for name in ("grid", "solver")}
        more: dict[str, Any] = {} if self.block is None else {"block": self.block}
        more |= {} if self.commit is None else {"commit": repr(self.commit)}
        more |= {} if self.reopen is None else {"reopen": self.reopen}
        return {"steps": self.steps, **parts, **self.guidance.settings, "init_scale": float(self.init_scale), **more}

    @property
    def keeps(self) -> bool:
        return self.reopen is None

    def with_flat(self, **settings: Any) -> Diffusion:
        given = {name: value for name, value in settings.items() if value is not None}
        parts = {name: PARTS[name](given.pop(name)) for name in PARTS if name in given}
        steered = {field: parts.get(name, given.pop(name, None)) for name, field in GUIDANCE.items()}
        guidance = replace(self.guidance, **{name: value for name, value in steered.items() if value is not None})
        whole = {name: value for name, value in parts.items() if name not in GUIDANCE}
        return replace(self, guidance=guidance, **whole, **given)

    def with_steps(self, steps: int) -> Diffusion:
        return replace(self, steps=steps)

    def steps_of(self, request: Request) -> int:
        return self.steps

    def fewer_steps(self, wanted: Sequence[int], request: Request) -> list[int]:
        return sorted({max(1, steps) for steps in wanted})

    def blocks_of(self, request: Request) -> int:
        return 1 if self.block is None else math.ceil(int((~request.given).sum()) / self.block)

    def with_temperature_times(self, factor: float) -> Diffusion:
        score = round(self.guidance.score_temperature * factor, 9)  # 0.9 * 0.7 is to be shown as 0.63
        return replace(self, guidance=replace(self.guidance, score_temperature=score))

    def rivals(self) -> Mapping[str, Sequence[Diffusion]]:
        """Its own solver, and ancestral steps, each on its own grid, the shipped ones and their beginnings: they commit
        nothing, and take all their steps."""
        shared = () if isinstance(self.grid, Adaptive) else (self.grid,)
        grids = dict.fromkeys((*shared, Warped(), LogT(), *(Truncated(LogT(), share) for share in BEGINNINGS)))
        own = {"fewer steps": [replace(self, grid=grid, commit=None, reopen=None) for grid in grids]}
        if self.solver == Ancestral():
            return own
        return {**own, "ancestral": [replace(one, solver=Ancestral()) for one in own["fewer steps"]]}

    def length_of(self, requests: Sequence[Request]) -> int:
        return len(requests[0].tokens)

    def loop(self, model: Any, options: RunOptions, batch_size: int) -> DiffusionLoop:
        return DiffusionLoop(model, self, options, batch_size, model.device)


PARTS: Mapping[str, Callable[[Any], Any]] = {
    "solver": SOLVERS.parse,
    "grid": GRIDS.parse,
    "projection": PROJECTIONS.parse,
    "commit": lambda text: None if isinstance(text, str) and text.strip() == "none" else parse_policy(text),
}
"""Flat settings that are objects, and what reads their text."""
BEGINNINGS = (0.75, 0.6, 0.5)
"""Shares of the grid `LogT` that the plain sampler is also tried on: below some level nothing changes any more."""
GUIDANCE = {
    "projection": "projection", "softmax_temperature": "softmax_temperature", "score_temperature": "score_temperature",
    "guidance": "scale",
}  # fmt: skip
"""Flat settings of the guidance, and its fields."""


class DiffusionRows(NamedTuple):
    """Everything with a row axis that lives from one step to the next."""

    row: Int[Tensor, " b"]
    step: Int[Tensor, " b"]
    before: Int[Tensor, " b"]
    """Steps taken in earlier blocks."""
    nfe: Int[Tensor, " b"]
    t: Float[Tensor, " b"]
    """Noise level of z, float64."""
    z: Float[Tensor, "b n d"]
    tokens: Int[Tensor, "b n"]
    """Prompt, earlier blocks and what is decided; meaningless at open positions and in later blocks."""
    block: Bool[Tensor, "b n"]
    """Positions that are generated now."""
    later: Bool[Tensor, "b n"]
    """Positions of later blocks."""
    condition: Condition
    past: Past
    memory: Any
    """Of the halting rule."""
    solver: Any
    """Memory of the solver."""
    grid: Any
    """Memory of the grid."""
    plan: Plan | None
    """Of the policy, where there is one."""

    @property
    def open(self) -> Bool[Tensor, "b n"]:
        """Positions of the block that may still change: the network has to generate them."""
        return self.condition.target


class Stepped(NamedTuple):
    """Rows between a prediction and the move that follows it."""

    live: DiffusionRows
    x0: Float[Tensor, "b n d"]
    """The estimate that drives the state."""
    t_next: Float[Tensor, " b"]
    tokens: Int[Tensor, "b n"]
    """The row as it would be returned now."""
    ended: Bool[Tensor, " b"]
    """Rows whose block is done and that have another; on the CPU."""


class DiffusionLoop(Loop[DiffusionRows]):
    """One run of a denoiser.

    Row i is the same in any batch, order or batch size (bit for bit where the denoiser's arithmetic is), and a halted
    row is a prefix of the row that is not halted.
    """

    def __init__(
        self, denoiser: Denoiser, sampling: Diffusion, options: RunOptions, batch_size: int,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        super().__init__(options, batch_size, device)
        self.denoiser, self.sampling = denoiser, sampling
        self._check_reopen()
        policy = frozenset() if sampling.commit is None else sampling.commit.needs - sampling.commit.spared
        self.needs = options.needs | (policy & {"mean_kl"})
        """Signals of a step: those that are read, and those whose past the policy needs."""
        self.glanced = self.needs | policy
        """And those that the policy reads."""
        self.decides = options.criterion.freezes or sampling.commit is not None
        """Whether positions can be decided before their row is done."""
        self.position_noise = PositionNoise(options.seed)
        self.walk = sampling.grid.walk(denoiser.schedule, sampling.steps, denoiser.rho, self.device)

    def _check_reopen(self) -> None:
        if self.sampling.reopen is None:
            return
        if not self.denoiser.doubts:
            raise CdlmError("reopen asks the model which given tokens are wrong: train it with wrong_given above 0")
        if self.options.record >= self.sampling.recorded:
            raise CdlmError("a run that takes commits back cannot be recorded: leave out reopen")

    def budget(self, requests: Sequence[Request]) -> int:
        return self.sampling.steps * max(self.sampling.blocks_of(request) for request in requests)

    @torch.no_grad()
    def admit(self, requests: list[Request], beside: DiffusionRows | None) -> DiffusionRows:
        tokens = torch.stack([request.tokens for request in requests]).to(self.device)
        open_ = ~torch.stack([request.given for request in requests]).to(self.device)
        valid = stack_masks([request.valid for request in requests], self.device)
        if not bool(open_.any(1).all()):
            raise CdlmError("a prompt leaves nothing to generate: shorten it, or raise the length")
        index = torch.tensor([request.index for request in requests], device=self.device)
        zero = torch.zeros_like(index)
        return self._enter(index, zero, zero, tokens, open_, valid, None if beside is None else beside.past)

    def _enter(
        self, index: Tensor, before: Tensor, nfe: Tensor, tokens: Tensor, left: Tensor, valid: Tensor | None,
        beside: Past | None,
    ) -> DiffusionRows:  # fmt: skip
        """Rows at the first step of their next block, with the positions in `left` yet to be generated."""
        block = self.sampling.block
        now = left if block is None else left & (left.cumsum(1) <= block)
        clean = self.denoiser.embed(tokens)
        z = self.sampling.init_scale * self.denoiser.prior_std * self._start(index, before, clean)
        real, later, zero = torch.ones_like(left) if valid is None else valid, left & ~now, torch.zeros_like(index)
        # To a rule, later blocks are no part of the row yet: neither open nor decided.
        memory = self.options.criterion.start(NewRows(now, zero + self.sampling.steps, real & ~later))
        condition = Condition(clean * (~left & real)[..., None], now, torch.zeros_like(z), valid, behind(now))
        past = first_past(self.needs, z, beside)
        t = torch.full((len(index),), self.walk.begin, dtype=torch.float64, device=self.device)
        solver, grid = self.sampling.solver.start(z), self.walk.start(z)
        return DiffusionRows(
            index, zero, before, nfe, t, z, tokens, now, later, condition, past, memory, solver, grid,
            self._plan(now, tokens),
        )  # fmt: skip

    def _plan(self, open_: Bool[Tensor, "b n"], tokens: Int[Tensor, "b n"]) -> Plan | None:
        policy = self.sampling.commit
        if policy is None:
            return None
        place = torch.arange(open_.shape[1], device=open_.device)
        start, end = open_.long().argmax(1), torch.where(open_, place + 1, 0).amax(1)
        return enter(policy, plan_of(policy, open_, start, end, tokens), open_, waits=False)

    def _start(self, index: Tensor, before: Tensor, like: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Standard normal noise of each row: of its first block by its index alone, of later ones by what came before
        as well."""
        seed, pairs = self.options.seed, zip(index.tolist(), before.tolist(), strict=True)
        keys = [(seed, i, b) if b else (seed, i) for i, b in pairs]
        return torch.stack([torch.randn(like.shape[1:], generator=generator(*key)) for key in keys]).to(like)

    @torch.no_grad()
    def step(self, live: DiffusionRows) -> tuple[LoopStep, Stepped]:
        t = live.t
        prediction, x0 = self.sampling.guidance.predict(self.denoiser, live.z, t, live.condition, self._draws(live))
        rho, first = self.denoiser.rho, live.step == 0
        embedding = EmbeddingState(live.z, t, rho, prediction.x0)
        statistics = StepStatistics(
            prediction.logits, live.open, live.block, first, live.past, self.glanced, embedding,
            live.tokens if self.decides else None,
        )  # fmt: skip
        signals, past = observe(self.needs, statistics)
        nfe = live.nfe + self.sampling.guidance.calls
        budget = torch.full_like(live.step, self.sampling.steps)
        state = StepState(live.row, live.step, budget, t, nfe, live.open, signals)
        memory, decision = self.options.criterion.look(live.memory, state)
        if decision.freeze is not None:
            live = self._give(live, decision.freeze & live.open, statistics.tokens)
        live = self._commit(live, statistics, t, x0)
        full = ~live.open.any(1)
        ended = decision.halt | full | self.walk.ended(t, live.step)
        done = ended & ~live.later.any(1)
        taken = live.before + live.step + 1
        full = full & ~decision.halt
        *columns, over = read_columns(live.row, taken, nfe, done, decision.halt, full, ended)
        counts = RowCounts(*columns, settled=[0] * len(over))
        tokens = _read_out(prediction, live, over)
        finished = LoopStep(state, counts, counts.of_leaving(tokens), decision.info, self._canvas(live))
        seen = Seen(t, live.step, prediction.x0, statistics.open)
        grid, t_next = self.walk.next(live.grid, seen)
        live = live._replace(nfe=nfe, past=past, memory=memory, grid=grid)
        live = live._replace(condition=live.condition._replace(x0=self._held(live, prediction.x0)))
        return finished, Stepped(
            live, self._held(live, x0), t_next, tokens, torch.tensor(over, dtype=torch.bool) & ~finished.done
        )

    @torch.no_grad()
    def advance(self, carried: Stepped) -> DiffusionRows:
        if not bool(carried.ended.any()):
            return self._move(carried)
        fresh = self._next_block(take(carried, carried.ended.nonzero().squeeze(1)))
        if bool(carried.ended.all()):
            return fresh
        return join(self._move(take(carried, (~carried.ended).nonzero().squeeze(1))), fresh)

    def _next_block(self, carried: Stepped) -> DiffusionRows:
        live = carried.live
        before = live.before + live.step + 1
        valid, past = live.condition.valid, live.past
        return self._enter(live.row, before, live.nfe, carried.tokens, live.later, valid, past)

    def _move(self, carried: Stepped) -> DiffusionRows:
        live, guidance = carried.live, self.sampling.guidance

        def estimate(z: Tensor, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            some = live if rows is None else take(live, rows)
            prediction, driving = guidance.predict(self.denoiser, z, t, some.condition, self._draws(some))
            return self._held(some, driving), self._held(some, prediction.x0)

        interval = Interval(live.z, carried.x0, live.t, carried.t_next, self._draws(live))
        solver, known = self.sampling.solver, live.solver
        if self.decides:
            known = solver.decided(known, live.block & ~live.open, carried.x0)
        memory, moved = solver.advance(known, interval, estimate)
        condition = live.condition if moved.x0 is None else live.condition._replace(x0=moved.x0)
        nfe = live.nfe + moved.evaluations * guidance.calls
        return live._replace(
            z=moved.z, t=carried.t_next, step=live.step + 1, nfe=nfe, condition=condition, solver=memory
        )

    def _commit(
        self, live: DiffusionRows, statistics: StepStatistics, t: Float[Tensor, " b"], x0: Float[Tensor, "b n d"]
    ) -> DiffusionRows:
        """What the policy decides is given from now on."""
        policy, plan = self.sampling.commit, live.plan
        if policy is None or plan is None:
            return live
        candidates = live.open & (plan.block_of <= plan.block[:, None])
        level = t / self.denoiser.rho
        # Of the block: no position is drawn for in two blocks, so that the draws differ all the same.
        place = torch.arange(live.tokens.shape[1], device=self.device).expand_as(live.tokens)
        view = View(statistics, candidates, live.row, live.step, plan, level, 0.0, None, self.position_noise, place)
        choice = policy.choose(view)
        doubted = self._doubted(live, statistics)
        commit = choice.commit & candidates
        if bool(statistics.logits[commit].isnan().any()):
            raise _broken()
        live = self._give(live, commit, choice.tokens)
        if doubted is not None:
            clean = live.condition.clean.masked_fill(doubted[..., None], 0)
            condition = live.condition._replace(clean=clean, target=live.open | doubted)
            # The token that was there is no estimate of an earlier step.
            live = live._replace(condition=condition, solver=self.sampling.solver.decided(live.solver, doubted, x0))
        plan = plan._replace(inner=plan.inner + 1, own=choice.own)
        return live._replace(plan=enter(policy, plan, live.open, waits=False))

    def _doubted(self, live: DiffusionRows, statistics: StepStatistics) -> Bool[Tensor, "b n"] | None:
        """Positions committed before this step whose token has too little probability by now; None if nothing is taken
        back."""
        committed, logits = live.block & ~statistics.open, statistics.logits
        if self.sampling.reopen is None or not bool(committed.any()):
            return None
        tokens = live.tokens[committed][:, None]
        chance = logits[committed].log_softmax(-1).gather(1, tokens).squeeze(1).exp()
        return committed.masked_scatter(committed, chance < self.sampling.reopen)

    def _canvas(self, live: DiffusionRows) -> Int[Tensor, "b n"] | None:
        """What is given or committed, for a record; None of a run that commits nothing."""
        return None if self.sampling.commit is None else torch.where(live.open | live.later, OPEN, live.tokens)

    def _give(self, live: DiffusionRows, fresh: Bool[Tensor, "b n"], tokens: Int[Tensor, "b n"]) -> DiffusionRows:
        """Rows in which some open positions have got their tokens: the network sees them as it sees a prompt."""
        if not bool(fresh.any()):
            return live
        tokens = torch.where(fresh, tokens, live.tokens)
        clean = torch.where(fresh[..., None], self.denoiser.embed(tokens), live.condition.clean)
        condition = live.condition._replace(clean=clean, target=live.open & ~fresh)
        return live._replace(tokens=tokens, condition=condition)

    def _draws(self, live: DiffusionRows) -> StepNoise:
        return StepNoise(self.options.seed, live.row, live.before + live.step)

    def _held(self, live: DiffusionRows, x0: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """`x0` with the embedding of its token at each decided position, so that the state there follows the level; the
        same at all given positions for a network that takes them for noisy ones."""
        if self.denoiser.sees_given and not self.decides:
            return x0
        held = live.block & ~live.open if self.denoiser.sees_given else ~live.open & ~live.later
        return torch.where(held[..., None], self.denoiser.embed(live.tokens).to(x0), x0)


def behind(block: Bool[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """Positions after the last of each row's block."""
    return block.flip(1).cumsum(1).flip(1) == 0


def _broken() -> CdlmError:
    return CdlmError("the model gave logits that are not numbers (NaN): its weights or its precision are broken")


def _read_out(prediction: Prediction, live: DiffusionRows, ended: Sequence[int]) -> Int[Tensor, "b n"]:
    """The tokens of each row, read out of the prediction in those whose block has ended."""
    tokens = live.tokens.clone()
    for row in [row for row, over in enumerate(ended) if over]:  # row by row: no copy of the logits
        if bool((prediction.logits[row].isnan().any(-1) & live.open[row]).any()):
            raise _broken()
        tokens[row] = torch.where(live.open[row], most_likely(prediction.logits[row]), tokens[row])
    return tokens
