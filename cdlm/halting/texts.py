"""Halting rules from their texts, and the settings of a rule to try."""

from __future__ import annotations

import ast

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
    """Settings of a rule to try on runs of `budget` steps, from strict to loose.

    `Patience` and `Patience(...)` are the settings of the rule itself. The rest of the text stays as it is: other
    parameters, `KL(..., warmup=0.3)`, and rules around it, `FromStep(Patience(...), 40)`. A text without `...` is one
    rule.

    Raises:
        CdlmError: the text is no rule, the rule has nothing to sweep, or two rules would be swept.
    """
    text = text.strip()
    if text in RULES:
        text += "(...)"
    calls = [node for node in ast.walk(RULES.tree(text)) if isinstance(node, ast.Call)]
    holes = [call for call in calls if any(isinstance(a, ast.Constant) and a.value is ... for a in call.args)]
    if not holes:
        return [parse_criterion(text)]
    if len(holes) > 1 or len(holes[0].args) > 1:
        raise CdlmError(f"one rule at a time can be swept, and ... stands for all of its settings: got {text!r}")
    name, fixed = ast.unparse(holes[0].func), holes[0].keywords
    made = RULES.find(name)
    try:
        rules = made.sweep(budget, **{str(k.arg): RULES.build(k.value) for k in fixed})
    except TypeError as error:
        raise CdlmError(f"cannot sweep {text!r} ({error}): it is {RULES.example(name)}") from error
    hole = str(ast.get_source_segment(text, holes[0]))
    return [parse_criterion(text.replace(hole, repr(rule))) for rule in rules]
