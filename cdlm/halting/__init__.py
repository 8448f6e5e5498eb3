"""Halting: rules that say when a sample is done, and their combinators. Knows no sampler and no model."""

from cdlm.halting import rules
from cdlm.halting.criterion import Criterion, Stateless
from cdlm.halting.diffusion_gemma import for_transformers
from cdlm.halting.rules import *  # noqa: F403 (a rule is listed there, and nowhere else)
from cdlm.halting.texts import parse_criterion, sweep

__all__ = ["Criterion", "Stateless", "for_transformers", "parse_criterion", "sweep"]
__all__ += rules.__all__
