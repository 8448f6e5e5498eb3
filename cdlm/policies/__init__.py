"""Policies of what to commit. A policy has a name for texts and messages once it is listed in `POLICIES`."""

from cdlm.core.parsing import Registry
from cdlm.policies.adjust import Adjust
from cdlm.policies.confidence import Factor, FallingThreshold, Threshold
from cdlm.policies.core import CORE
from cdlm.policies.dream import Dream, DreamThreshold
from cdlm.policies.editing import Editing
from cdlm.policies.entropy import EntropyBound
from cdlm.policies.gaussian import Gaussian
from cdlm.policies.guided import Guided
from cdlm.policies.klass import KLASS
from cdlm.policies.llada import LLaDA
from cdlm.policies.mutual import Mutual
from cdlm.policies.policy import Policy

POLICIES: Registry[Policy] = Registry(
    "policy", Policy,
    LLaDA, Gaussian, Dream, DreamThreshold, Threshold, FallingThreshold, Factor, EntropyBound, KLASS, Mutual,
    CORE, Editing, Adjust, Guided,
)  # fmt: skip


def parse_policy(text: str | Policy) -> Policy:
    """A policy from its text, such as `Threshold(0.9, block=32)`; a name alone is the policy with its defaults.

    Raises:
        CdlmError: the text is no policy.
    """
    if isinstance(text, str) and text.strip() in POLICIES:
        text = f"{text.strip()}()"
    return POLICIES.parse(text)


def sweep_policy(text: str) -> list[Policy]:
    """Settings of a policy to try, from strict to loose: of a name, `Threshold`, or of a text with `...`, such as
    `Threshold(..., block=16)`. Another text is one policy.

    Raises:
        CdlmError: the text is no policy, or the policy has nothing to sweep.
    """
    return POLICIES.sweep(text, lambda kind, **fixed: kind.sweep(**fixed))
