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
from cdlm.continuous.readouts import READ_OUTS, Decoder, ReadOut
from cdlm.continuous.solvers import SOLVERS, Ancestral, Euler, Interval, Solver
from cdlm.core.checks import MOST_STEPS, check_number, check_object, check_whole
from cdlm.core.devices import fine, read_columns
from cdlm.core.errors import CdlmError
from cdlm.core.rng import PositionNoise, StepNoise, generator
from cdlm.core.trees import Columns, choose, join, take
from cdlm.core.types import Condition, Decision, LoopStep, NewRows, Prediction, RowCounts, StepState
from cdlm.halting.signals import (
    DIVERGENCES,
    RECORDED,
    SIGNALS,
    SPATIAL,
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
        solver: Euler(), Heun(), TwoStep(), TorchDiffEq("rk4"), TorchDiffEq("dopri5"), ..., Ancestral(), Renoise() or
            Churn(1.5, "exact").
        grid: Warped(), LogT(), UniformT(), UpperEnds(), or the beginning of one, such as Truncated(LogT(), 0.6); or
            Adaptive(0.04), in which each row takes its own steps.
        projection: how logits drive the state: Expectation(), Greedy(), Drawn(0.9), MultiHot(0.2) or Uneven(0.2).
        softmax_temperature: divides the logits; below 1 sharpens.
        score_temperature: divides the score; below 1 sharpens. It breaks LangFlow, whose noise spans too many orders of
            magnitude: sharpen that by softmax_temperature.
        guidance: scale of classifier-free guidance; 1 is off, others double the calls.
        init_scale: scale of the noise that a sample starts from.
        passes: predictions at each noise level, each shown the estimate of the one before; of models with
            self-conditioning.
        commit: a policy, such as Threshold(0.9) or FallingThreshold(0.95): what it is sure of is given from then on;
            none commits nothing.
        reopen: least probability that a committed token must keep; below it, it is taken back. For models that were
            trained with wrong_given.
        read_out: Decoder(), Decoder(4), Probe() or NoReadOut(): what a step of ELF says of its tokens.
    """

    solver: str | Solver | None = None
    grid: str | Grid | None = None
    projection: str | Projection | None = None
    softmax_temperature: float | None = None
    score_temperature: float | None = None
    guidance: float | None = None
    init_scale: float | None = None
    passes: int | None = None
    commit: str | Policy | None = None
    reopen: float | None = None
    read_out: str | ReadOut | None = None


@dataclass(frozen=True)
class Diffusion(Sampling):
    """How a continuous model is sampled.

    Args:
        steps: grid points, >= 1; with `Adaptive` the most of a row. One prediction each; the last, at t_min, is read
            out, so Euler spends `steps` calls.
        solver, grid, guidance: see there.
        init_scale: the start is `init_scale` times the prior; CDCD finds that a little below 1 sharpens.
        passes: predictions at each level, >= 1, each shown the estimate of the one before, so that self-conditioning
            comes nearer to its fixed point (arXiv 2607.00714). All but the last cost one call; the last one counts, and
            is guided. More than one asks for a model with self-conditioning.
        block: positions that are generated at a time: `steps` for each block, and the rule begins anew in each.
            None generates all at once.
        commit: which positions to commit at a step, and to what. The network sees a committed token as it sees a
            prompt, clean and marked as given, whatever noise is left in the row; a row ends when all are committed. The
            steps and blocks of a policy are those of the grid and of `block`. None commits nothing.
        reopen: a committed token whose probability falls below this is taken back: its position is open again, under
            the noise that its row has then (as DSL remasks, arXiv 2605.12836). None takes nothing back.
        read_out: how the tokens of a step are read, of systems whose estimates do not say them; None of others.
    """

    family = "continuous"
    flat = DiffusionSettings
    walk = frozenset({"steps", "solver", "grid", "commit"})
    recorded = frozenset({"tokens", *RECORDED})

    steps: int = 200
    solver: Solver = field(default_factory=Euler)
    grid: Grid = field(default_factory=Warped)
    guidance: Guidance = field(default_factory=Guidance)
    init_scale: float = 1.0
    passes: int = 1
    block: int | None = None
    commit: Policy | None = None
    reopen: float | None = None
    read_out: ReadOut | None = None

    def __post_init__(self) -> None:
        check_object("Diffusion", Solver, solver=self.solver)
        check_object("Diffusion", Grid, grid=self.grid)
        check_object("Diffusion", Guidance, guidance=self.guidance)
        if self.solver.looks_ahead and isinstance(self.grid, Adaptive):
            raise CdlmError(
                f"{self.solver!r} has to know the next level before the prediction, and {self.grid!r} chooses it after:"
                " take another solver, or a grid such as LogT()"
            )
        check_whole("Diffusion", largest=MOST_STEPS, steps=self.steps)
        check_number("Diffusion", least=0.0, init_scale=self.init_scale, hint="1 is the model's own noise level")
        check_whole("Diffusion", largest=MOST_PASSES, passes=self.passes, hint="1 is one call at each level")
        hint = "a block has one position or more, and None generates all at once"
        check_whole("Diffusion", block=self.block, optional=True, hint=hint)
        if self.commit is not None:
            check_object("Diffusion", Policy, commit=self.commit)
            if switch := self.commit.masked_only:
                raise CdlmError(f"{switch} of {self.commit!r} makes sense for masked models alone: leave it out")
        check_number("Diffusion", least=0.0, most=1.0, optional=True, reopen=self.reopen)
        if self.reopen is not None and self.commit is None:
            raise CdlmError(f"reopen={self.reopen} takes back what was committed, and nothing is: give commit too")
        if self.read_out is None:
            return
        check_object("Diffusion", ReadOut, read_out=self.read_out)
        if self.commit is not None and self.read_out != Decoder():
            raise CdlmError(
                f"to commit tokens each step has to say them: set read_out to Decoder(), got {self.read_out}"
            )

    @property
    def signals(self) -> frozenset[str]:
        return SPATIAL if self.read_out is not None and not self.read_out.reads else frozenset(SIGNALS)

    @property
    def settings(self) -> dict[str, Any]:
        parts = {name: repr(getattr(self, name)) for name in ("grid", "solver")}
        more: dict[str, Any] = {} if self.passes == 1 else {"passes": self.passes}
        more |= {} if self.block is None else {"block": self.block}
        more |= {} if self.commit is None else {"commit": repr(self.commit)}
        more |= {} if self.reopen is None else {"reopen": self.reopen}
        more |= {} if self.read_out is None else {"read_out": repr(self.read_out)}
        return {"steps": self.steps, **parts, **self.guidance.settings, "init_scale": float(self.init_scale), **more}

    @property
    def calls(self) -> int:
        """Calls of the model for one prediction that counts."""
        return self.passes - 1 + self.guidance.calls

    @property
    def unrecorded(self) -> tuple[str, str] | None:
        if self.reopen is not None:
            return "takes commits back", "leave out reopen"
        if self.read_out not in (None, Decoder()):
            return "does not say its tokens at every step", f"set read_out to Decoder(), got {self.read_out!r}"
        return None

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

    def walks(self, model: Any) -> bool:
        try:
            self.check_walk(model)
        except CdlmError:
            return False
        return True

    def check_walk(self, denoiser: Denoiser) -> None:
        """Raise what keeps the solver from walking the levels of the grid on a model."""
        if self.solver.looks_ahead:
            self.solver.check(self.grid.levels(denoiser.schedule, self.steps))

    def blocks_of(self, request: Request) -> int:
        return 1 if self.block is None else math.ceil(int((~request.given).sum()) / self.block)

    def with_temperature_times(self, factor: float) -> Diffusion:
        if self.read_out is not None:  # such a system has none
            return self
        score = round(self.guidance.score_temperature * factor, 9)  # 0.9 * 0.7 is to be shown as 0.63
        return replace(self, guidance=replace(self.guidance, score_temperature=score))

    def rivals(self) -> Mapping[str, Sequence[Diffusion]]:
        """Its own solver, and ancestral steps, each on its own grid, the shipped ones and their beginnings: they commit
        nothing, take all their steps, and make one pass at each level."""
        shared = () if isinstance(self.grid, Adaptive) else (self.grid,)
        grids = dict.fromkeys((*shared, Warped(), LogT(), *(Truncated(LogT(), share) for share in BEGINNINGS)))
        own = {"fewer steps": [replace(self, grid=grid, passes=1, commit=None, reopen=None) for grid in grids]}
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
    "read_out": READ_OUTS.parse,
}
"""Flat settings that are objects, and what reads their text."""
MOST_PASSES = 1000
BEGINNINGS = (0.75, 0.6, 0.5)
"""Shares of the grid `LogT` that the plain sampler is also tried on: below some level nothing changes any more."""
GUIDANCE = {
    "projection": "projection", "softmax_temperature": "softmax_temperature", "score_temperature": "score_temperature",
    "guidance": "scale",
}  # fmt: skip
"""Flat settings of the guidance, and its fields."""


@dataclass(frozen=True, eq=False)
class Known(Columns):
    """What the host knows of each row before its next step, so that nothing has to be read in the midst of it."""

    row: list[int]
    step: list[int]
    taken: list[int]
    """Steps so far, those of its earlier blocks too."""
    nfe: list[int]
    left: list[int]
    """Positions of later blocks."""
    decided: list[int]
    """Whether positions of the block were decided before it is done; some may be open again."""
    ended: list[int]
    """Whether the block is done, and another follows."""


class DiffusionRows(NamedTuple):
    """Everything with a row axis that lives from one step to the next."""

    row: Int[Tensor, " b"]
    step: Int[Tensor, " b"]
    budget: Int[Tensor, " b"]
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
    read: Float[Tensor, "b n v"] | None
    """The last logits that were asked for, where they are not asked for at every step."""
    known: Known

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
    """The row as it would be returned now, where its block is done."""


class Change(NamedTuple):
    """What a step decides, and what it takes back."""

    fresh: Bool[Tensor, "b n"]
    """Positions that are decided now."""
    tokens: Int[Tensor, "b n"]
    """The rows with what is decided."""
    doubted: Bool[Tensor, "b n"] | None
    """Positions that are taken back; None if nothing ever is."""
    open: Bool[Tensor, "b n"]
    """Positions that may still change."""
    broken: Bool[Tensor, " b"]
    """Rows in which a position was committed by logits that are not numbers."""
    plan: Plan | None


class Said(NamedTuple):
    """What the host learns of each row in a step."""

    halted: list[int]
    """The rule halts it."""
    full: list[int]
    """Nothing in it is open."""
    arrived: list[int]
    """It has come to the end of its grid before its last step."""
    fresh: list[int]
    """Positions were decided."""
    broken: list[int]
    """A position was committed by logits that are not numbers."""


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
        self._check_read_out()
        if (why := sampling.unrecorded) and options.record >= sampling.recorded:
            raise CdlmError(f"a run that {why[0]} cannot be recorded: {why[1]}")
        if sampling.passes > 1 and not denoiser.self_conditioning:
            raise CdlmError(
                f"passes={sampling.passes} shows the model its own estimate, and this one was trained without"
                " self-conditioning: leave out passes"
            )
        policy = frozenset() if sampling.commit is None else sampling.commit.needs - sampling.commit.spared
        self.needs = options.needs | (policy & DIVERGENCES)
        """Signals of a step: those that are read, and those whose past the policy needs."""
        self.glanced = self.needs | policy
        """And those that the policy reads."""
        self.decides = options.criterion.freezes or sampling.commit is not None
        """Whether positions can be decided before their row is done."""
        self.position_noise = PositionNoise(options.seed)
        self.walk = sampling.grid.walk(denoiser.schedule, sampling.steps, denoiser.rho, self.device)
        sampling.check_walk(denoiser)
        self.calls = sampling.calls if denoiser.guidance_range is None else sampling.passes
        """Of a prediction."""

    def _check_read_out(self) -> None:
        read_out, guidance, name = self.sampling.read_out, self.sampling.guidance, self.denoiser.name
        if not self.denoiser.decodes and read_out is not None:
            raise CdlmError(f"every step of {name} says its tokens, and {read_out} asks for them: leave out read_out")
        if self.denoiser.decodes:
            if read_out is None:
                raise CdlmError(
                    f"the steps of {name} do not say their tokens: set read_out to one of {', '.join(READ_OUTS)}"
                )
            for setting in ("softmax_temperature", "score_temperature", "projection", "control"):
                if getattr(guidance, setting) != getattr(Guidance(), setting):
                    raise CdlmError(
                        f"the estimate of {name} is no mixture of embeddings, so {setting} has no meaning: leave it out"
                    )
        if (known := self.denoiser.guidance_range) is not None and not known[0] <= guidance.scale <= known[1]:
            raise CdlmError(f"{name} knows guidance from {known[0]:g} to {known[1]:g}, got {guidance.scale:g}")

    def _check_reopen(self) -> None:
        if self.sampling.reopen is None:
            return
        if not self.denoiser.doubts:
            raise CdlmError("reopen asks the model which given tokens are wrong: train it with wrong_given above 0")

    def budget(self, requests: Sequence[Request]) -> int:
        return self.sampling.steps * max(self.sampling.blocks_of(request) for request in requests)

    @torch.no_grad()
    def admit(self, requests: list[Request], beside: DiffusionRows | None) -> DiffusionRows:
        tokens = torch.stack([request.tokens for request in requests]).to(self.device)
        open_ = ~torch.stack([request.given for request in requests])
        valid = stack_masks([request.valid for request in requests], self.device)
        wanted = open_.sum(1).tolist()
        if 0 in wanted:
            raise CdlmError("a prompt leaves nothing to generate: shorten it, or raise the length")
        rows = [request.index for request in requests]
        zeros = [0] * len(rows)
        known = Known(rows, zeros, zeros, zeros, wanted, zeros, zeros)
        index = torch.tensor(rows, device=self.device)
        return self._enter(known, index, torch.zeros_like(index), tokens, open_.to(self.device), valid, beside)

    def _enter(
        self, known: Known, index: Tensor, nfe: Tensor, tokens: Tensor, left: Tensor, valid: Tensor | None,
        beside: DiffusionRows | None,
    ) -> DiffusionRows:  # fmt: skip
        """Rows at the first step of their next block, with the positions in `left` yet to be generated, as many as
        `known.left`."""
        block, zeros = self.sampling.block, [0] * len(index)
        now = left if block is None else left & (left.cumsum(1) <= block)
        rest = zeros if block is None else [max(0, count - block) for count in known.left]
        known = replace(known, step=zeros, left=rest, decided=zeros, ended=zeros)
        real, later, zero = torch.ones_like(left) if valid is None else valid, left & ~now, torch.zeros_like(index)
        clean = self.denoiser.given(tokens, ~left & real)
        z = self.sampling.init_scale * self.denoiser.prior_std * self._start(known.row, known.taken, clean)
        budget = zero + self.sampling.steps
        # To a rule, later blocks are no part of the row yet: neither open nor decided.
        memory = self.options.criterion.start(NewRows(now, budget, real & ~later))
        told = self.denoiser.guidance_range is not None
        scale = torch.full((len(index),), self.sampling.guidance.scale, device=self.device) if told else None
        condition = Condition(clean, now, torch.zeros_like(z), valid, behind(now), scale)
        past = first_past(self.needs, z, None if beside is None else beside.past)
        t = torch.full((len(index),), self.walk.begin, dtype=fine(self.device), device=self.device)
        solver, grid = self.sampling.solver.start(z), self.walk.start(z)
        return DiffusionRows(
            index, zero, budget, nfe, t, z, tokens, now, later, condition, past, memory, solver, grid,
            self._plan(now, tokens), self._unread(z, beside), known,
        )  # fmt: skip

    def _plan(self, open_: Bool[Tensor, "b n"], tokens: Int[Tensor, "b n"]) -> Plan | None:
        policy = self.sampling.commit
        if policy is None:
            return None
        place = torch.arange(open_.shape[1], device=open_.device)
        start, end = open_.long().argmax(1), torch.where(open_, place + 1, 0).amax(1)
        return enter(policy, plan_of(policy, open_, start, end, tokens), open_, waits=False)

    def _start(self, index: list[int], before: list[int], like: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Standard normal noise of each row: of its first block by its index alone, of later ones by what came before
        as well."""
        seed, pairs = self.options.seed, zip(index, before, strict=True)
        keys = [(seed, i, b) if b else (seed, i) for i, b in pairs]
        return torch.stack([torch.randn(like.shape[1:], generator=generator(*key)) for key in keys]).to(like)

    @torch.no_grad()
    def step(self, live: DiffusionRows) -> tuple[LoopStep, Stepped]:
        live = self._before(live)
        t = live.t
        prediction, x0, shown = self._predict(live, live.z, t)
        prediction, live, due = self._asked(live, prediction)
        calls = [self.calls + asked for asked in self._reading(due)]
        again = self.sampling.passes > 1
        embedding = EmbeddingState(live.z, t, self.denoiser.rho, prediction.x0, shown, again)
        statistics = StepStatistics(
            prediction.logits, live.open, live.block, live.step, live.past, self.glanced, embedding,
            live.tokens if self.decides else None,
        )  # fmt: skip
        signals, past = observe(self.needs, statistics)
        made = self.calls if self.sampling.read_out is None else torch.tensor(calls, device=self.device)
        state = StepState(live.row, live.step, live.budget, t, live.nfe + made, live.open, signals)
        memory, decision = live.memory, None
        if self.options.halts:
            memory, decision = self.options.criterion.look(memory, state)
        if not all(due):
            past, memory = choose(due, past, live.past), choose(due, memory, live.memory)
            decision = None if decision is None else decision.among(torch.tensor(due, device=self.device))
        change = self._decide(live, statistics, decision)
        said = self._read(t, decision, change)
        if any(said.broken):
            raise _broken()
        taken = [steps + 1 for steps in live.known.taken]
        last = [step == self.walk.steps - 1 for step in live.known.step]
        over = [any(reasons) for reasons in zip(said.halted, said.full, said.arrived, last, strict=True)]
        done = [end and not left for end, left in zip(over, live.known.left, strict=True)]
        ended = [end and not leaves for end, leaves in zip(over, done, strict=True)]
        decided = [old or new for old, new in zip(live.known.decided, said.fresh, strict=True)]
        grid, t_next = self.walk.next(live.grid, Seen(t, live.step, prediction.x0, live.open))
        if change is not None:
            live = self._changed(live, change, x0, any(said.fresh))
        tokens, last_calls = self._read_out(prediction, live, over, due)
        nfe = [sum(parts) for parts in zip(live.known.nfe, calls, last_calls, strict=True)]
        counts = RowCounts.of(live.known.row, taken, nfe, done, said.halted, said.full)
        known = replace(live.known, nfe=nfe, decided=decided, ended=ended)
        info = {} if decision is None else decision.info
        finished = LoopStep(state, counts, counts.leave(tokens), info, self._canvas(live))
        shown, driving = self._held(live, known, prediction.x0, x0)
        spent = state.nfe + torch.tensor(last_calls, device=self.device) if any(last_calls) else state.nfe
        live = live._replace(
            nfe=spent, past=past, memory=memory, grid=grid, known=known,
            condition=live.condition._replace(x0=shown),
        )  # fmt: skip
        return finished, Stepped(live, driving, t_next, tokens)

    def _predict(self, live: DiffusionRows, z: Tensor, t: Tensor) -> tuple[Prediction, Tensor, Tensor]:
        """The last prediction at a level, the estimate that drives the state, and the one that the last was shown."""
        guidance, condition = self.sampling.guidance, live.condition
        for _ in range(self.sampling.passes - 1):
            plain = self.denoiser.denoise(z, t, condition).x0
            condition = condition._replace(x0=self._held(live, live.known, plain, plain)[0])
        return *guidance.predict(self.denoiser, z, t, condition, self._draws(live)), condition.x0

    def _before(self, live: DiffusionRows) -> DiffusionRows:
        """Rows where the prediction is made: a solver may take them back to more noise first."""
        solver = self.sampling.solver
        if not solver.looks_ahead:
            return live
        z, t = solver.before(live.z, live.t, self.walk.ahead(live.step), self._draws(live))
        return live._replace(z=z, t=t)

    def _asked(self, live: DiffusionRows, prediction: Prediction) -> tuple[Prediction, DiffusionRows, list[bool]]:
        """The prediction with what its read-out says of the tokens, and which rows were asked: of the others the logits
        are those of an earlier step."""
        read_out, due = self.sampling.read_out, [True] * len(live.known.step)
        if read_out is None:
            return prediction, live, due
        due = [step % read_out.every == 0 for step in live.known.step]
        if all(due):
            logits = read_out.logits(self.denoiser, prediction.x0, live.condition)
        else:
            assert live.read is not None
            logits, some = live.read, _true(due)
            if any(due):
                fresh = read_out.logits(self.denoiser, *take((prediction.x0, live.condition), some))
                logits = logits.index_copy(0, some.to(self.device), fresh)
        read = None if read_out.every == 1 else logits
        return prediction._replace(logits=logits), live._replace(read=read), due

    def _reading(self, due: Sequence[bool]) -> list[int]:
        """Calls of each row for what its step says of the tokens."""
        calls = 0 if self.sampling.read_out is None else self.sampling.read_out.calls
        return [calls * asked for asked in due]

    def _read_out(
        self, prediction: Prediction, live: DiffusionRows, ended: Sequence[int], due: Sequence[bool]
    ) -> tuple[Int[Tensor, "b n"], list[int]]:
        """The tokens of each row, read out in those whose block has ended, and the calls of each row for that."""
        read_out = self.sampling.read_out
        if not any(ended):
            return live.tokens, [0] * len(ended)
        known = [asked and (read_out is None or read_out.exact) for asked in due]
        asks = [bool(end) and not said for end, said in zip(ended, known, strict=True)]
        decoded = iter(())
        if any(asks):
            decoded = iter(self.denoiser.decode(*take((prediction.x0, live.condition), _true(asks))))
        tokens = live.tokens.clone()
        for row in [row for row, over in enumerate(ended) if over]:  # row by row: no copy of the logits
            logits = next(decoded) if asks[row] else prediction.logits[row]
            if bool((logits.isnan().any(-1) & live.open[row]).any()):
                raise _broken()
            tokens[row] = torch.where(live.open[row], most_likely(logits), tokens[row])
        return tokens, [int(asked) for asked in asks]

    def _read(self, t: Float[Tensor, " b"], decision: Decision | None, change: Change | None) -> Said:
        """All that a step reads from the device; a step without rule, policy and steps of its own reads nothing."""
        columns = {} if decision is None else {"halted": decision.halt}
        if change is not None:
            full, fresh = ~change.open.any(1), change.fresh.any(1)
            columns |= {"full": full, "fresh": fresh, "broken": change.broken}
        arrived = self.walk.arrived(t)
        if arrived is not None:
            columns["arrived"] = arrived
        nothing = [0] * t.shape[0]
        if not columns:
            return Said(nothing, nothing, nothing, nothing, nothing)
        read = dict(zip(columns, read_columns(*columns.values()), strict=True))
        return Said(**{name: read.get(name, nothing) for name in Said._fields})

    @torch.no_grad()
    def advance(self, carried: Stepped) -> DiffusionRows:
        ended = carried.live.known.ended
        if not any(ended):
            return self._move(carried)
        fresh = self._next_block(take(carried, _true(ended)))
        if all(ended):
            return fresh
        return join(self._move(take(carried, _true([not end for end in ended]))), fresh)

    def _next_block(self, carried: Stepped) -> DiffusionRows:
        live = carried.live
        known = replace(live.known, taken=[steps + 1 for steps in live.known.taken])
        return self._enter(known, live.row, live.nfe, carried.tokens, live.later, live.condition.valid, live)

    def _unread(self, z: Float[Tensor, "b n d"], beside: DiffusionRows | None) -> Float[Tensor, "b n v"] | None:
        """Room for logits that rows which enter will be asked for, as wide as those of the rows beside them."""
        if self.sampling.read_out is None or self.sampling.read_out.every == 1:
            return None
        wide = 0 if beside is None or beside.read is None else beside.read.shape[-1]
        return z.new_zeros((*z.shape[:2], wide))

    def _move(self, carried: Stepped) -> DiffusionRows:
        live = carried.live

        def estimate(z: Tensor, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            some = live if rows is None else take(live, rows)
            prediction, driving, _ = self._predict(some, z, t)
            plain, held = self._held(some, some.known, prediction.x0, driving)
            return held, plain

        interval = Interval(live.z, carried.x0, live.t, carried.t_next, self._draws(live))
        solver, memory, known = self.sampling.solver, live.solver, live.known
        if any(known.decided):
            memory = solver.decided(memory, live.block & ~live.open, carried.x0)
        memory, moved = solver.advance(memory, interval, estimate)
        condition = live.condition if moved.x0 is None else live.condition._replace(x0=moved.x0)
        nfe, spent = live.nfe, known.nfe
        if any(moved.evaluations):
            more = [count * self.calls for count in moved.evaluations]
            nfe, spent = nfe + torch.tensor(more, device=self.device), [a + b for a, b in zip(spent, more, strict=True)]
        step, taken = [step + 1 for step in known.step], [steps + 1 for steps in known.taken]
        known = replace(known, step=step, taken=taken, nfe=spent)
        return live._replace(
            z=moved.z, t=carried.t_next, step=live.step + 1, nfe=nfe, condition=condition, solver=memory, known=known
        )

    def _decide(self, live: DiffusionRows, statistics: StepStatistics, decision: Decision | None) -> Change | None:
        """What the rule freezes, and what the policy commits of the rest; None if neither can decide anything."""
        open_, tokens, plan, policy = live.open, live.tokens, live.plan, self.sampling.commit
        freeze = None if decision is None else decision.freeze
        if freeze is None and plan is None:
            return None
        fresh, broken, doubted = torch.zeros_like(open_), torch.zeros_like(live.row, dtype=torch.bool), None
        if freeze is not None:
            fresh = freeze & open_
            open_, tokens = open_ & ~fresh, torch.where(fresh, statistics.tokens, tokens)
        if policy is not None and plan is not None:
            candidates = open_ & (plan.block_of <= plan.block[:, None])
            level = live.t / self.denoiser.rho
            # Of the block: no position is drawn for in two blocks, so that the draws differ all the same.
            place = torch.arange(open_.shape[1], device=self.device).expand_as(open_)
            view = View(statistics, candidates, live.row, live.step, plan, level, 0.0, None, self.position_noise, place)
            choice = policy.choose(view)
            commit, doubted = choice.commit & candidates, self._doubted(live, statistics)
            broken = (statistics.plane(statistics.peaks).isnan().any(-1) & commit).any(1)
            fresh, open_ = fresh | commit, open_ & ~commit
            open_ = open_ if doubted is None else open_ | doubted
            tokens = torch.where(commit, choice.tokens, tokens)
            plan = enter(policy, plan._replace(inner=plan.inner + 1, own=choice.own), open_, waits=False)
        return Change(fresh, tokens, doubted, open_, broken, plan)

    def _changed(self, live: DiffusionRows, change: Change, x0: Float[Tensor, "b n d"], fresh: bool) -> DiffusionRows:
        """Rows in which positions have got their tokens, which the network sees as it sees a prompt, or lost them.

        Args:
            x0: the estimate that drives the state.
            fresh: whether any have got theirs.
        """
        clean, solver = live.condition.clean, live.solver
        if fresh:
            clean = torch.where(change.fresh[..., None], self.denoiser.committed(change.tokens, x0), clean)
        if change.doubted is not None:
            clean = clean.masked_fill(change.doubted[..., None], 0)
            # The token that was there is no estimate of an earlier step.
            solver = self.sampling.solver.decided(solver, change.doubted, x0)
        condition = live.condition._replace(clean=clean, target=change.open)
        return live._replace(tokens=change.tokens, condition=condition, solver=solver, plan=change.plan)

    def _doubted(self, live: DiffusionRows, statistics: StepStatistics) -> Bool[Tensor, "b n"] | None:
        """Positions committed before this step whose token has too little probability by now; None if nothing is taken
        back."""
        if self.sampling.reopen is None or not any(live.known.decided):
            return None
        committed, logits = live.block & ~statistics.open, statistics.logits
        tokens = live.tokens[committed][:, None]
        chance = logits[committed].log_softmax(-1).gather(1, tokens).squeeze(1).exp()
        return committed.masked_scatter(committed, chance < self.sampling.reopen)

    def _canvas(self, live: DiffusionRows) -> Int[Tensor, "b n"] | None:
        """What is given or committed, for a record; None of a run that commits nothing."""
        return None if self.sampling.commit is None else torch.where(live.open | live.later, OPEN, live.tokens)

    def _draws(self, live: DiffusionRows) -> StepNoise:
        return StepNoise(self.options.seed, live.known.row, live.known.taken)

    def _held(
        self, live: DiffusionRows, known: Known, plain: Float[Tensor, "b n d"], driving: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        """Two estimates with the embedding of its token at each decided position, so that the state there follows the
        level; the same at all given positions for a network that takes them for noisy ones."""
        if self.denoiser.sees_given and not any(known.decided):
            return plain, driving
        held = (live.block & ~live.open if self.denoiser.sees_given else ~live.open & ~live.later)[..., None]
        clean = live.condition.clean
        shown = torch.where(held, clean.to(plain), plain)
        return shown, shown if driving is plain else torch.where(held, clean.to(driving), driving)


def behind(block: Bool[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """Positions after the last of each row's block."""
    return block.flip(1).cumsum(1).flip(1) == 0


def _broken() -> CdlmError:
    return CdlmError("the model gave logits that are not numbers (NaN): its weights or its precision are broken")


def _true(flags: Sequence[int]) -> Int[Tensor, " k"]:
    """Places of those that are true."""
    return torch.tensor([place for place, flag in enumerate(flags) if flag], dtype=torch.int64)
