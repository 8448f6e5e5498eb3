"""Halting: rules that say when a sample is done, and their combinators. Knows no sampler and no model."""

from cdlm.halting.criterion import And, Criterion, For, FromStep, Or, Stateless
from cdlm.halting.diffusion_gemma import for_transformers
from cdlm.halting.rules.distribution import KL, Entropy, StableAndConfident
from cdlm.halting.rules.margin import JoT, Prophet, SchED
from cdlm.halting.rules.state import AngleConvergence, NormConvergence
from cdlm.halting.rules.steps import FixedSteps, Full, Never
from cdlm.halting.rules.tokens import Patience

__all__ = [
    "KL",
    "And",
    "AngleConvergence",
    "Criterion",
    "Entropy",
    "FixedSteps",
    "For",
    "FromStep",
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
