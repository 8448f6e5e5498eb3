"""Halting: rules that say when a sample is done, and their combinators. Knows no sampler and no model."""

from cdlm.halting.criterion import AfterStep, And, Criterion, For, Or, Stateless
from cdlm.halting.rules import AngleConvergence, FixedSteps, Never, NormConvergence, Patience

__all__ = [
    "AfterStep",
    "And",
    "AngleConvergence",
    "Criterion",
    "FixedSteps",
    "For",
    "Never",
    "NormConvergence",
    "Or",
    "Patience",
    "Stateless",
]
