"""Halting: rules that say when a sample is done, and their combinators. Knows no sampler and no model."""

from cdlm.halting.criterion import AfterStep, And, Criterion, For, Or, Stateless
from cdlm.halting.margins import JoT, Prophet, SchED
from cdlm.halting.rules import (
    KL,
    AngleConvergence,
    Entropy,
    FixedSteps,
    Never,
    NormConvergence,
    Patience,
    StableAndConfident,
)

__all__ = [
    "KL",
    "AfterStep",
    "And",
    "AngleConvergence",
    "Criterion",
    "Entropy",
    "FixedSteps",
    "For",
    "JoT",
    "Never",
    "NormConvergence",
    "Or",
    "Patience",
    "Prophet",
    "SchED",
    "StableAndConfident",
    "Stateless",
]
