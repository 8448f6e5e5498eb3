"""Halting: rules that say when a sample is done, and their combinators. Knows no sampler and no model."""

from cdlm.halting.criterion import AfterStep, And, Criterion, For, Or, Stateless
from cdlm.halting.margins import JoT, Prophet, SchED
from cdlm.halting.rules import (
    KL,
    AngleConvergence,
    Entropy,
    FixedSteps,
    Full,
    Never,
    NormConvergence,
    Patience,
    StableAndConfident,
)
from cdlm.halting.transformers import for_transformers

__all__ = [
    "KL",
    "AfterStep",
    "And",
    "AngleConvergence",
    "Criterion",
    "Entropy",
    "FixedSteps",
    "For",
    "Full",
    "JoT",
    "Never",
    "NormConvergence",
    "Or",
    "Patience",
    "Prophet",
    "SchED",
    "StableAndConfident",
    "Stateless",
    "for_transformers",
]
