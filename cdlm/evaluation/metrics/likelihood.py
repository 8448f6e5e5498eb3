"""How likely held-out text is to a model: nats per token, bits per character and perplexity, with their errors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from cdlm.continuous.likelihood import Nats, Ode, Text, bound, by_block, check_precision, ode_nats, stratified_error
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.core.stats import Scores
from cdlm.core.trees import join, take
from cdlm.masked.likelihood import nelbo, scorable
from cdlm.masked.system import MaskedDiffusion

BOUND, ODE = "bound", "ODE"

MOST_NATS = math.log(sys.float_info.max)


@dataclass(frozen=True)
class LikelihoodSettings:
    """What to compute.

    Args:
        levels: draws of the bound of each row.
        ode: of continuous models also the likelihood of the ODE, which costs far more; None leaves it out.
        seed: with the number of a row it fixes the row's noise.
        batch_size: rows at a time; the result does not depend on it.
        read_out: noise level at which the tokens of a continuous model are read out; by default its least.
    """

    levels: int = 8
    ode: Ode | None = None
    seed: int = 0
    batch_size: int = 32
    read_out: float | None = None

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise CdlmError(f"the bound needs levels >= 1, got {self.levels}")
        if self.batch_size < 1:
            raise CdlmError(f"batch_size must be >= 1, got {self.batch_size}")


def check_scorable(model: object, ode: Ode | None = None) -> None:
    """Raise unless the model has a likelihood, and one of the ODE if that is asked for."""
    if not isinstance(model, EmbeddingDiffusion | MaskedDiffusion):
        raise CdlmError(
            f"a likelihood was asked of a {type(model).__name__}, which has none here: only our own systems, continuous"
            " or masked, say what they were trained to noise"
        )
    if ode is None:
        return
    if not isinstance(model, EmbeddingDiffusion):
        raise CdlmError("a masked model has no ODE: leave out ode_steps, its bound is computed without")
    weight = next(model.parameters())
    check_precision(model, weight.dtype, weight.device)  # before the long work, not after


def row_nats(
    model: object, text: Text, asked: LikelihoodSettings, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Nats]:
    """Nats of each row, by measure: "bound", and "ODE" if that was asked for. On the CPU.

    A system that generates block by block is scored block by block.

    Args:
        text: on any device; its rows go to the model's.
        progress: told the measure, the parts that are done, and their number; a part is a row, or a block of one.

    Raises:
        CdlmError: the model has no likelihood.
    """
    check_scorable(model, asked.ode)
    if isinstance(model, MaskedDiffusion):
        if asked.read_out is not None:
            raise CdlmError("a masked model has no noise levels: leave out read_out")
        return {BOUND: _in_batches(lambda part: _masked_nats(model, part, asked), model, text, BOUND, asked, progress)}
    assert isinstance(model, EmbeddingDiffusion)
    rows = len(text.tokens)
    parts, origin = (text, torch.arange(rows)) if model.block is None else by_block(text, model.block)
    scores: dict[str, Callable[[Text], Nats]] = {
        BOUND: lambda part: bound(model, part, asked.levels, asked.seed, read_out=asked.read_out)
    }
    if (ode := asked.ode) is not None:
        scores[ODE] = lambda part: ode_nats(model, part, ode, asked.seed, read_out=asked.read_out)
    found = {name: _in_batches(score, model, parts, name, asked, progress) for name, score in scores.items()}
    return {name: nats.summed(origin.cpu(), rows) for name, nats in found.items()}


def _masked_nats(model: MaskedDiffusion, text: Text, asked: LikelihoodSettings) -> Nats:
    draws = nelbo(model, text.tokens, text.target, text.valid, text.key, asked.levels, asked.seed)
    count = scorable(model, text.tokens, text.target).sum(1)
    return Nats({"masked": draws.mean(1)}, stratified_error(draws), count)


def _in_batches(
    score: Callable[[Text], Nats], model: torch.nn.Module, text: Text, name: str, asked: LikelihoodSettings,
    progress: Callable[[str, int, int], None] | None,
) -> Nats:  # fmt: skip
    device, count = next(model.parameters()).device, len(text.tokens)
    found = []
    for batch in torch.arange(count).split(asked.batch_size):
        made = score(take(text, batch.to(text.tokens.device)).to(device))
        terms = {key: value.cpu() for key, value in made.terms.items()}
        found.append(Nats(terms, made.error.cpu(), made.positions.cpu()))
        if progress is not None:
            progress(name, int(batch[-1]) + 1, count)
    return reduce(join, found)


@dataclass(frozen=True)
class Measure:
    """One number, as means over all tokens."""

    name: str
    nats_per_token: float
    interval95: tuple[float, float]
    """Bootstrap over rows: other text, and other noise, would give another number."""
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
        total, scores = nats.total.numpy(), Scores(nats.total.numpy(), tokens.astype(np.float64))
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
    """The likelihood of held-out text, ready to be shown and kept."""

    measures: tuple[Measure, ...]
    rows: int
    tokens: int
    chars: int
    settings: Mapping[str, Any]
    """Whatever else the numbers depend on, plain values."""

    @staticmethod
    def of(
        found: Mapping[str, Nats], tokens: Int[np.ndarray, " m"], chars: Int[np.ndarray, " m"],
        settings: Mapping[str, Any],
    ) -> Likelihood:  # fmt: skip
        """From the nats of rows with so many tokens and characters.

        Raises:
            CdlmError: the rows hold no text.
        """
        if not chars.sum():
            raise CdlmError("the rows hold no text to score: take more rows, or look at the source")
        measures = tuple(Measure.of(name, nats, tokens, chars) for name, nats in found.items())
        return Likelihood(measures, len(tokens), int(tokens.sum()), int(chars.sum()), dict(settings))

    def save(self, folder: str | Path) -> None:
        """Write `likelihood.json` into `folder`, whole or not at all."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(Path(folder) / "likelihood.json", text + "\n")

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
            f"{self.rows} rows of held-out text, {self.tokens} tokens, {self.chars} characters; {settings}.",
            "Over its noise each number lies above the model's own on average: lower is better.",
            "The interval is over rows; ± noise is the standard error of the noise alone, on these rows.",
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
