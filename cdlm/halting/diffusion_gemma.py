"""Halting rules inside the generation loop of transformers' DiffusionGemma."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import check_whole
from cdlm.core.devices import fine
from cdlm.core.errors import CdlmError
from cdlm.core.types import NewRows, StepState
from cdlm.halting.criterion import Criterion, Memory, check_rule
from cdlm.halting.signals import SIGNALS, SPATIAL, Past, StepStatistics, check_signals, first_past, observe

HOOK = "_prepare_diffusion_stopping_criteria"
"""The method from which transformers' `generate` gets its stopping object; it does not take one as an argument."""


def for_transformers(rule: Criterion, budget: int | None = None) -> Stopping:
    """The rule as a stopping object of transformers' DiffusionGemma: `with for_transformers(rule).on(model): ...`.

    Args:
        rule: any rule of the logits that halts whole rows. It sees what transformers' own rule sees: the logits after
            the temperature. Each canvas is a run of its own, in which all positions are open.
        budget: denoising steps of a canvas; `on` reads them from the configuration of `generate`.

    Raises:
        CdlmError: the rule reads embeddings, or freezes positions, for which transformers' loop has no means.
    """
    check_rule("for_transformers", rule)
    if rule.freezes:
        raise CdlmError(
            f"{rule!r} freezes positions, but transformers can only halt whole canvases: use a rule that never freezes"
        )
    if rule.modules:
        raise CdlmError(f"{rule!r} reads activations, which transformers' loop does not give: use a rule of the logits")
    check_signals(rule.needs, SIGNALS.keys() - SPATIAL)
    check_whole("for_transformers", optional=True, budget=budget)
    return Stopping(rule, budget)


class Canvas(NamedTuple):
    """What is kept from step to step of one canvas."""

    step: int
    past: Past
    memory: Memory


class Stopping:
    """Decides which rows of a batch of canvases are done: transformers' protocol of adaptive stopping.

    Transformers' loop calls `reset` when a canvas begins, then this object once a step. A row that is done stays done,
    with its canvas, and the loop goes on until all rows are.
    """

    def __init__(self, rule: Criterion, budget: int | None):
        rule.check_made_for(lambda weights: False, {})  # of a model of transformers, whose weights nobody named
        self.rule, self.budget = rule, budget
        self.canvas: Canvas | None = None

    def reset(self) -> None:
        """A new canvas begins."""
        self.canvas = None

    @torch.no_grad()
    def __call__(
        self, argmax_canvas: Int[Tensor, "b n"], logits: Float[Tensor, "b n v"], **_: Any
    ) -> Bool[Tensor, " b"]:
        """Rows that halt at this step. Ignore the values of rows that have halted before.

        Raises:
            CdlmError: the budget is not known.
        """
        if self.budget is None:
            raise CdlmError("for_transformers does not know the steps of a canvas: give it budget=, or use on(model)")
        open_ = torch.ones_like(argmax_canvas, dtype=torch.bool)
        rows = NewRows(open_, torch.full_like(argmax_canvas[:, 0], self.budget), open_)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        canvas = self.canvas or _first(self.rule, rows, logits)
        state, past = _state(self.rule, canvas, rows, logits)
        memory, decision = self.rule.look(canvas.memory, state)
        self.canvas = Canvas(canvas.step + 1, past, memory)
        return decision.halt

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Within it, the model's `generate` halts by this rule, and its own thresholds are not used.

        Raises:
            CdlmError: it is no DiffusionGemma; or, of a `generate` within, its `max_denoising_steps` is not the budget.
        """
        if not callable(getattr(type(model), HOOK, None)):  # of the class: a wrapper's attribute would have no effect
            raise CdlmError(
                f"for_transformers drives DiffusionGemmaForBlockDiffusion of transformers >= 5.23, got a"
                f" {type(model).__name__}: give it the model itself, without a wrapper"
            )
        before = vars(model).get(HOOK)
        setattr(model, HOOK, self._prepare)
        try:
            yield
        finally:
            if before is None:
                delattr(model, HOOK)
            else:
                setattr(model, HOOK, before)

    def _prepare(self, generation_config: Any) -> Stopping:
        """A fresh object for one call of `generate`."""
        steps = generation_config.max_denoising_steps
        if self.budget not in (None, steps):
            raise CdlmError(
                f"for_transformers was given a budget of {self.budget}, but generate runs max_denoising_steps={steps}:"
                " leave the budget out, or make them the same"
            )
        return for_transformers(self.rule, steps)


def _first(rule: Criterion, rows: NewRows, logits: Float[Tensor, "b n v"]) -> Canvas:
    return Canvas(0, first_past(rule.needs, logits[..., :0], None), rule.start(rows))


def _state(rule: Criterion, canvas: Canvas, rows: NewRows, logits: Float[Tensor, "b n v"]) -> tuple[StepState, Past]:
    """The step as the rule sees it, and what the next one needs of it."""
    row = torch.arange(len(logits), device=logits.device)
    step = torch.full_like(row, canvas.step)
    statistics = StepStatistics(logits, rows.open, rows.open, step, canvas.past, rule.needs)
    signals, past = observe(rule.needs, statistics)
    no_level = torch.full_like(row, torch.nan, dtype=fine(row.device))  # tokens are not noised by degrees
    return StepState(row, step, rows.budget, no_level, step + 1, rows.open, signals), past
