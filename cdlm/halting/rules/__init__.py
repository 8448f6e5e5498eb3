"""Halting rules, by what they read. A rule has a name for texts, messages and sweeps once it is listed in `RULES`."""

from cdlm.core.parsing import Registry
from cdlm.halting.criterion import And, Criterion, For, FromStep, Or
from cdlm.halting.rules.distribution import KL, Entropy, StableAndConfident
from cdlm.halting.rules.edit import EDIT
from cdlm.halting.rules.learned import Learned, Stop
from cdlm.halting.rules.margin import JoT, Prophet, SchED
from cdlm.halting.rules.mutual import Mutual
from cdlm.halting.rules.state import AngleConvergence, FixedPoint, NormConvergence
from cdlm.halting.rules.steps import FixedSteps, Full, Never
from cdlm.halting.rules.tokens import Patience
from cdlm.halting.rules.voting import VoteDecided

RULES: Registry[Criterion] = Registry(
    "halting rule", Criterion,
    Patience, Entropy, KL, NormConvergence, AngleConvergence, FixedPoint, StableAndConfident, Mutual, Prophet, SchED,
    JoT, EDIT, VoteDecided, Learned, Stop, FixedSteps, Full, Never, For, FromStep, And, Or,
)  # fmt: skip

__all__ = [
    "EDIT", "KL", "RULES", "And", "AngleConvergence", "Entropy", "FixedPoint", "FixedSteps", "For", "FromStep", "Full",
    "JoT", "Learned", "Mutual", "Never", "NormConvergence", "Or", "Patience", "Prophet", "SchED", "StableAndConfident",
    "Stop", "VoteDecided",
]  # fmt: skip
