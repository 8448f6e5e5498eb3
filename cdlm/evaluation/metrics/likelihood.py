"""How likely held-out text is to a model: nats per token, bits per character and perplexity, with their errors."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from cdlm.core.errors import CdlmError
from cdlm.core.files import write_json
from cdlm.core.likelihood import ODE, Nats
from cdlm.core.stats import Scores

MOST_NATS = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Measure:
    """One number, as means over all tokens."""

    name: str
    nats_per_token: float
    interval95: tuple[float, float]
    """Bootstrap over blocks of neighbouring rows: other text, and other noise, would give another number."""
    error: float | None
    """Standard error of the noise alone, on these rows; None where each row has a single draw."""
    bits_per_char: float
    perplexity: float | None
    """None where it is larger than any floating-point number."""
    terms: Mapping[str, float]
    """What `nats_per_token` is the sum of."""

    @staticmethod
    def of(name: str, nats: Nats, tokens: Int[np.ndarray, " m"], chars: Int[np.ndarray, " m"]) -> Measure:
        """Of rows with so many tokens and characters.

        Raises:
            CdlmError: a row has no number, for the network overflowed.
        """
        if odd := int((~nats.total.isfinite()).sum()):
            raise CdlmError(
                f"the {name} of {odd} of {len(nats.total)} rows is not a number: the weights are broken, the steps of"
                " the ODE too few, or its least noise too little (read_out)"
            )
        total, scores = nats.total.numpy(), Scores(nats.total.numpy(), tokens.astype(np.float64), serial=True)
        error = float(nats.error.square().sum().sqrt()) / int(tokens.sum())
        mean = float(total.sum() / tokens.sum())
        return Measure(
            name,
            mean,
            scores.bootstrap().interval95,
            error if math.isfinite(error) else None,
            float(total.sum() / math.log(2) / chars.sum()),
            math.exp(mean) if mean < MOST_NATS else None,
            {term: float(values.sum() / tokens.sum()) for term, values in nats.terms.items()},
        )


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of held-out text, ready to be shown and saved."""

    measures: tuple[Measure, ...]
    rows: int
    tokens: int
    chars: int
    settings: Mapping[str, Any]
    """Whatever else the numbers depend on, plain values."""
    what: str = "rows of held-out text"
    """What the rows are."""

    @staticmethod
    def of(
        found: Mapping[str, Nats], tokens: Int[np.ndarray, " m"], chars: Int[np.ndarray, " m"],
        settings: Mapping[str, Any], what: str = "rows of held-out text",
    ) -> Likelihood:  # fmt: skip
        """From the nats of rows in the order of the text, with so many tokens and characters.

        Raises:
            CdlmError: the rows hold no text.
        """
        if not chars.sum():
            raise CdlmError("the rows hold no text to score: take more rows, or look at the source")
        measures = tuple(Measure.of(name, nats, tokens, chars) for name, nats in found.items())
        return Likelihood(measures, len(tokens), int(tokens.sum()), int(chars.sum()), dict(settings), what)

    def save(self, folder: str | Path) -> None:
        """Write `likelihood.json` into `folder`, whole or not at all."""
        write_json(Path(folder) / "likelihood.json", asdict(self))

    def terminal(self) -> str:
        """The numbers as aligned plain text, and what they are."""
        head = ["likelihood", "nats/token", "95 % interval", "± noise", "bits/char", "perplexity"]
        lines = [head, *[_line(measure) for measure in self.measures]]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
        table.insert(1, "─" * len(table[0]))
        return "\n".join([*table, "", self._footer()])

    def _footer(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        parts = [
            f"{self.rows} {self.what}, {self.tokens} tokens, {self.chars} characters; {settings}.",
            "Over its noise each number lies above the model's own on average: lower is better.",
            "The interval is over blocks of rows; ± noise is the standard error of the noise alone, on these rows.",
        ]
        if any(measure.name == ODE for measure in self.measures):
            parts.append("The ODE's number settles as ode_steps grow: compare with twice as many.")
        return " ".join(parts)


def _line(measure: Measure) -> list[str]:
    low, high = measure.interval95
    error = "-" if measure.error is None else f"{measure.error:.4f}"
    shown = measure.perplexity
    perplexity = "-" if shown is None else f"{shown:.2f}" if shown < 1e6 else f"{shown:.1e}"
    return [
        measure.name, f"{measure.nats_per_token:.4f}", f"[{low:.4f}, {high:.4f}]", error,
        f"{measure.bits_per_char:.4f}", perplexity,
    ]  # fmt: skip
