"""The models of this toolkit in lm-evaluation-harness: `CdlmLM`, and the command `cdlm lm-eval`; docs/lm-eval.md.

The harness is imported with `CdlmLM`, not with this package: pip install 'cdlm[lm-eval]'.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdlm.lm_eval.adapter import CdlmLM

__all__ = ["CdlmLM"]


def __getattr__(name: str) -> Any:
    if name != "CdlmLM":
        raise AttributeError(f"module 'cdlm.lm_eval' has no attribute {name!r}")
    from cdlm.lm_eval.adapter import CdlmLM

    return CdlmLM
