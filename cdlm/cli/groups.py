"""Groups of options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass

from cdlm.core.errors import CdlmError


@dataclass(frozen=True)
class JudgeOptions:
    """The judge of AR-NLL."""

    judge: str | None = None
    """Any Hugging Face causal language model, by folder or Hub id; by default a small GPT-2 is trained on the run's
    text once and cached."""
    judge_steps: int = 500
    """Training steps of the small GPT-2."""

    def __post_init__(self) -> None:
        if self.judge_steps < 1:
            raise CdlmError(f"judge_steps must be >= 1, got {self.judge_steps}")
