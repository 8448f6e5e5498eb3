"""Progressive distillation: a student learns to do in one step what its teacher does in several (arXiv 2202.00512, in
the form of the students of ELF).

The student stays at the x-prediction: it learns the one estimate that, in one step of Euler, leads where the teacher's
steps lead. In cdlm's units, with z = x + t eps, a step is `z' = r z + (1 - r) x0`, r = t'/t. So a span from t to t_end,
and from z to z_end, is one step to the estimate `(z_end - r z) / (1 - r)`, r = t_end/t.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.objectives import Objective
from cdlm.continuous.projections import Expectation
from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.solvers import Euler, Interval, Renoise
from cdlm.continuous.system import ContinuousSystem, EmbeddingDiffusion
from cdlm.core.checks import check_choice, check_number, check_whole
from cdlm.core.devices import fine
from cdlm.core.errors import CdlmError
from cdlm.core.rng import StepNoise
from cdlm.core.trees import join, take
from cdlm.core.types import Batch, Condition
from cdlm.models.system import Loss, row_cross_entropy, stratified

TEACHER_STEPS = 64
"""Steps in which a teacher walks from all noise to none."""
SHOWN = 0.5
"""Share of rows in which both see an estimate of the teacher, as they do after the first step of sampling."""
SHORT = 1e-9
"""A span in which t falls by less than this share has no end to aim at."""
Kind = Literal["x0", "distribution"]


def walk_of(steps: int) -> dict[str, int | float | str]:
    """Flat settings of the sampler that a student is distilled for: u = 1, ..., 2/steps, 1/steps."""
    return {"steps": steps, "grid": "UpperEnds()", "solver": "Euler()"}


def check_steps(steps: int, teacher_steps: int) -> None:
    """Raise unless a student of so many steps can follow a teacher of so many.

    Raises:
        CdlmError: a number is no whole number >= 1, or the one does not divide the other.
    """
    check_whole("a student", steps=steps)
    check_whole("a teacher", teacher_steps=teacher_steps)
    if steps >= teacher_steps or teacher_steps % steps:
        fitting = [k for k in range(1, teacher_steps) if teacher_steps % k == 0]
        raise CdlmError(
            f"a student takes fewer steps than its teacher's {teacher_steps}, and each of them stands for as many of"
            f" those, got {steps}: take some of {', '.join(map(str, fitting)) or 'none'}"
        )


def check_distillable(system: object, name: str) -> ContinuousSystem:
    """The system, if its samples follow its estimate of the clean vectors.

    Args:
        name: of its model, for the error.

    Raises:
        CdlmError: they do not.
    """
    if not isinstance(system, ContinuousSystem):
        raise CdlmError(
            f"{name} is no continuous model: what is distilled is the way of a state under falling noise, as of CDCD,"
            " LangFlow and Plaid"
        )
    way = system.defaults
    if not isinstance(way, Diffusion):
        raise CdlmError(f"{name} is sampled by a {type(way).__name__}, expected a Diffusion: it cannot be distilled")
    if isinstance(way.solver, Renoise) or way.guidance.projection != Expectation() or way.block is not None:
        raise CdlmError(
            f"{name} is sampled by fresh draws in each step ({way.solver!r}, {way.guidance.projection!r},"
            f" block={way.block}), which no single step of a student can follow: distil CDCD, LangFlow or Plaid"
        )
    return system


class Teacher:
    """A frozen system, which is no part of what holds it: not in its state, not moved and not copied with it."""

    def __init__(self, system: ContinuousSystem):
        self._system = system.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def beside(self, student: ContinuousSystem, device: torch.device) -> ContinuousSystem:
        """The system, where the student is and in its precision."""
        self._system.precision = student.precision
        return self._system.to(device)


class SubStep(NamedTuple):
    """One step of a teacher on its way."""

    z: Float[Tensor, "b n d"]
    x0: Float[Tensor, "b n d"]
    """The estimate that it moves to."""
    logits: Float[Tensor, "b n v"]


def path(
    system: Denoiser, z: Float[Tensor, "b n d"], levels: Float[Tensor, "b edges"], condition: Condition,
    clean: Float[Tensor, "b n d"],
) -> Iterator[SubStep]:  # fmt: skip
    """The steps of Euler from each noise level of a row to its next, as sampling takes them.

    Args:
        levels: float64, one more than there are steps.
        condition: its estimate is what the first step sees; each later one sees that of the step before.
        clean: embeddings. A network that cannot tell given positions has its state held there, and its estimate.
    """
    for t, t_next in zip(levels.T[:-1], levels.T[1:], strict=True):
        made = system.denoise(z, t, condition)
        x0 = held(system, made.x0, condition.target, clean)
        yield SubStep(z, x0, made.logits)
        interval = Interval(z, x0, t, t_next, StepNoise(0, (), ()))  # Euler draws nothing, and asks nothing
        z = Euler().advance((), interval, lambda *_, known=x0: (known, known))[1].z
        condition = condition._replace(x0=x0)


def held(
    system: Denoiser, x0: Float[Tensor, "b n d"], target: Bool[Tensor, "b n"], clean: Float[Tensor, "b n d"]
) -> Float[Tensor, "b n d"]:
    """The estimate, with the embedding at given positions where the network takes them for noisy ones."""
    return x0 if system.sees_given else torch.where(target[..., None], x0, clean.to(x0))


def shares(levels: Float[Tensor, "b edges"]) -> Float[Tensor, "b steps"]:
    """What each step's estimate counts in the one of the whole span; each row sums to 1.

    Over 1/t a step of Euler adds (1/t' - 1/t) x0 to z/t. So the estimate of the span is the mean of those of its steps,
    weighted by how far each goes in 1/t. It is the same as `(z_end - r z) / (1 - r)`, without its cancellation. In a
    span of no length the first estimate is all.
    """
    rises = (1 / levels).diff(dim=1)
    whole = 1 / levels[:, -1:] - 1 / levels[:, :1]
    flat = (1 - levels[:, -1:] / levels[:, :1]) < SHORT
    first = (torch.arange(rises.shape[1], device=levels.device) == 0).to(levels)
    return torch.where(flat, first, rises / torch.where(flat, 1, whole))


class Lesson(NamedTuple):
    """What the student is shown, and what it is to say."""

    z: Float[Tensor, "b n d"]
    t: Float[Tensor, " b"]
    condition: Condition
    x0: Float[Tensor, "b n d"]
    """The estimate that leads in one step to the end of the span."""
    p: Float[Tensor, "b n v"] | None
    """A distribution of tokens whose mean embedding is that estimate."""


class Distillation(Objective):
    """What a student is trained on, in place of its own objective. In evaluation mode it is its own.

    A row stands at a level u of its schedule's own coordinate, in which its grid `UpperEnds()` is even, and learns the
    span of 1/steps from there. Most rows learn where the teacher gets to, the others to read tokens out as before.

    Schedule, output prior and embeddings stay those of the teacher: freeze them, see `ContinuousSystem.keep_space`.

    Args:
        teacher: of the same system; it is frozen.
        own: the student's own objective.
        steps: of the student.
        teacher_steps: of the teacher from u = 1 to u = 0; `teacher_steps / steps` of them make a step of the student.
        loss: "x0" is the squared error of the estimate (the paper's). "distribution" is KL(p || student) in nats, where
            p mixes the teacher's token probabilities as the target mixes its estimates, so that its mean embedding is
            the target; of systems whose estimate is a mean embedding alone.
        on_grid: share of the rows that stand at the student's own levels u = 1/steps, 2/steps, ..., 1. The others are
            uniform in [1/steps, 1]. Sampling asks at its own levels alone; the others smooth what lies between.
        read_out: share of the rows that learn to read out.

    Raises:
        CdlmError: a setting is out of range, or the loss does not suit the system.
    """

    fits_schedule = False

    def __init__(
        self, teacher: ContinuousSystem, own: Objective, steps: int, teacher_steps: int = TEACHER_STEPS, *,
        loss: Kind = "x0", on_grid: float = 0.5, read_out: float = 0.2,
    ):  # fmt: skip
        super().__init__()
        check_whole("a student", steps=steps)
        if teacher_steps % steps:
            check_steps(steps, teacher_steps)
        check_choice("a distillation", ("x0", "distribution"), loss=loss)
        check_number("a distillation", least=0, most=1, on_grid=on_grid)
        check_number("a distillation", least=0, below=1, read_out=read_out)
        if loss == "distribution" and not isinstance(teacher, EmbeddingDiffusion):
            raise CdlmError(
                "loss='distribution' is of systems whose estimate is a mean embedding, and this one's is a vector of"
                " its own: take loss='x0'"
            )
        self.teacher, self.own = Teacher(teacher), own
        self.steps, self.sub_steps = steps, teacher_steps // steps
        self.loss, self.on_grid, self.share = loss, on_grid, read_out

    def forward(self, system: ContinuousSystem, batch: Batch) -> Loss:
        if not system.training:
            return self.own(system, batch)
        rows = len(batch)
        taught = rows - round(self.share * rows)
        lesson = self.lesson(system, _part(batch, slice(taught)))
        made = system.denoise(lesson.z, lesson.t, lesson.condition)
        target, tokens = lesson.condition.target, batch.tokens[:taught]
        errors = (self._errors(lesson, made.x0, made.logits) * target).sum(1)
        total, nats, count = errors.sum(), errors.detach(), target.sum(1)
        if not system.decodes:  # its estimates say their tokens
            nats, count = row_cross_entropy(made.logits.detach(), tokens, target)
        t = lesson.t
        if taught < rows:
            read, read_count = self.own.read_out(system, _part(batch, slice(taught, None)))
            total, nats, count = total + read.sum(), torch.cat([nats, read]), torch.cat([count, read_count])
            t = torch.cat([t, t.new_full((rows - taught,), torch.nan)])  # of levels that the read-out draws for itself
        return Loss(total / count.sum(), (nats / count).detach(), t, count)

    def _errors(
        self, lesson: Lesson, x0: Float[Tensor, "b n d"], logits: Float[Tensor, "b n v"]
    ) -> Float[Tensor, "b n"]:
        if lesson.p is None:
            return (x0 - lesson.x0).square().mean(-1)
        return F.kl_div(logits.log_softmax(-1), lesson.p, reduction="none").sum(-1)

    @torch.no_grad()
    def lesson(self, system: ContinuousSystem, batch: Batch) -> Lesson:
        """States of a batch at levels of the student, and where the teacher gets to from there."""
        levels = self._levels(system, batch)
        teacher, t = self.teacher.beside(system, batch.tokens.device), levels[:, 0]
        clean, z, condition = system.draw(batch, t)
        condition = self._shown(teacher, z, t, condition, clean)
        weights = shares(levels).to(z.dtype)[..., None, None]
        x0: Tensor | None = None
        p: Tensor | None = None
        for i, step in enumerate(path(teacher, z, levels, condition, clean)):
            x0 = weights[:, i] * step.x0 if x0 is None else x0 + weights[:, i] * step.x0
            if self.loss == "distribution":
                mixed = weights[:, i] * step.logits.softmax(-1)
                p = mixed if p is None else p + mixed
        assert x0 is not None
        return Lesson(z, t, condition, x0, p)

    def _levels(self, system: ContinuousSystem, batch: Batch) -> Float[Tensor, "b edges"]:
        """Noise levels of each row: the student's, those of the teacher's steps, evenly spaced in u, and the end."""
        rows, device = len(batch), batch.tokens.device
        u = stratified(rows, batch.generator, device) if batch.u is None else batch.u
        own = ((u * self.steps).floor() + 1).clamp(max=self.steps)
        between = 1 + (self.steps - 1) * u
        snapped = torch.rand(rows, generator=batch.generator, device=device) < self.on_grid
        passed = torch.arange(self.sub_steps + 1, dtype=fine(device), device=device) / self.sub_steps
        edges = (torch.where(snapped, own, between)[:, None] - passed) / self.steps
        return system.schedule.t_of_u(edges.clamp(min=0).flatten()).detach().view(edges.shape)

    def _shown(self, teacher: ContinuousSystem, z: Tensor, t: Tensor, condition: Condition, clean: Tensor) -> Condition:
        """The condition, in which the first rows, a random share, show an estimate of the teacher's."""
        rows = round(SHOWN * len(z)) if teacher.self_conditioning > 0 else 0
        if rows == 0:
            return condition
        first = torch.arange(rows, device=z.device)
        x0 = held(teacher, teacher.denoise(*take((z, t, condition), first)).x0, condition.target[:rows], clean[:rows])
        return condition._replace(x0=join(x0, condition.x0[rows:]))


def _part(batch: Batch, rows: slice) -> Batch:
    valid, u = (None if x is None else x[rows] for x in (batch.valid, batch.u))
    return replace(batch, tokens=batch.tokens[rows], valid=valid, target=batch.target[rows], u=u)


def graduate(student: ContinuousSystem) -> ContinuousSystem:
    """The student with its own objective again: an ordinary system."""
    if isinstance(student.objective, Distillation):
        student.objective = student.objective.own
    return student


@contextmanager
def graduated(student: ContinuousSystem) -> Iterator[ContinuousSystem]:
    """The same for a while, amid its training."""
    objective = student.objective
    try:
        yield graduate(student)
    finally:
        student.objective = objective
