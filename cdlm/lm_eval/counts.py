"""What the answers of a run cost, summed over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any

from cdlm.sampling.samples import Samples


def tokens_per_forward(tokens: int, calls: int) -> float | None:
    """TPF: output tokens over calls of the denoiser, both summed over all samples; None without calls."""
    return tokens / calls if calls else None


def _sum(first: Any, second: Any) -> Any:
    if not isinstance(first, Mapping):
        return first + second
    return {name: first.get(name, 0) + second.get(name, 0) for name in dict.fromkeys((*first, *second))}


@dataclass(frozen=True)
class Counts:
    """Sums over the answers so far."""

    answers: int = 0
    tokens: int = 0
    """See `Samples.output_tokens`."""
    calls: int = 0
    """Of the denoiser; two a step under guidance."""
    calls_after_end: int = 0
    """Calls that were spent when the text was already decided."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """How many answers ended for which reason."""
    counted: Mapping[str, int] = field(default_factory=dict)
    """What the policy counted beside these calls, such as `guide_calls`."""
    truncated: int = 0
    """Prompts, and texts to score, that were cut."""
    scored: int = 0
    """Texts whose likelihood was computed."""
    error: float = 0.0
    """Summed Monte-Carlo standard errors of these, in nats."""
    errors: int = 0
    """Texts that have one: it takes two draws."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: _sum(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    @classmethod
    def of(cls, samples: Samples) -> Counts:
        """Of a finished run."""
        return cls(
            answers=len(samples), tokens=int(samples.output_tokens.sum()), calls=int(samples.nfe.sum()),
            calls_after_end=int(samples.calls_after_end.sum()),
            reasons=dict(Counter(reason.name.lower() for reason in samples.reason)),
            counted=reduce(_sum, samples.counted, {}),
        )  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """The same for people: means where they say more than sums."""
        found: dict[str, Any] = {"truncated": self.truncated}
        if self.answers:
            found |= {
                "answers": self.answers, "mean_calls": self.calls / self.answers,
                "mean_calls_after_end": self.calls_after_end / self.answers, "output_tokens": self.tokens,
                "calls": self.calls, "tpf": tokens_per_forward(self.tokens, self.calls),
                "halt_reasons": dict(sorted(self.reasons.items())), **self.counted,
            }  # fmt: skip
        if self.scored:
            error = self.error / self.errors if self.errors else None
            found |= {"scored": self.scored, "mean_standard_error": error}
        return found
