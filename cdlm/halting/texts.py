"""Halting rules from their texts, and the settings of a rule to try."""

from __future__ import annotations

from cdlm.core.errors import CdlmError
from cdlm.halting.criterion import Criterion
from cdlm.halting.rules import RULES
from cdlm.halting.rules.steps import Never


def parse_criterion(rule: str | Criterion | None) -> Criterion:
    """A halting rule from its text, such as `For(NormConvergence(0.01), 5) | Patience(20)`; None never halts.

    Raises:
        CdlmError: the text is no rule.
    """
    if isinstance(rule, str) and rule == "auto":
        raise CdlmError("auto is a rule that was calibrated for a model and its sampler: here, name the rule itself")
    return Never() if rule is None else RULES.parse(rule)


def sweep(text: str, budget: int) -> list[Criterion]:
    """Settings of a rule to try on runs of `budget` steps, from strict to loose: of a name, `Patience`, or of a text
    with `...`, such as `KL(..., warmup=0.3)` or `FromStep(Patience(...), 40)`.

    Raises:
        CdlmError: the text is no rule, the rule has nothing to sweep, or two rules would be swept.
    """
    return RULES.sweep(text, lambda kind, **fixed: kind.sweep(budget, **fixed))
