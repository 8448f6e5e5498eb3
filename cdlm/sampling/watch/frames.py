"""What a page shows of recorded samples, as plain values: tokens, maps, curves, and where rules would have halted.

Steps count from 1, as the calls of a sample do. A frame is a step that the page shows; long runs have frames of some
steps only.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from cdlm.core.errors import CdlmError
from cdlm.core.inert import visible
from cdlm.core.parsing import brief
from cdlm.core.types import HaltReason
from cdlm.halting import Criterion
from cdlm.halting.replay import check_replayable
from cdlm.recording.file import Recording
from cdlm.recording.record import Record
from cdlm.sampling.recordings import agreement, replayed
from cdlm.sampling.samples import Origin, Samples
from cdlm.sampling.texts import special_of
from cdlm.sampling.watch.pieces import Pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_FRAMES = 400
"""Steps of a run that a page shows, beside those at which rules halt."""
MOST_CELLS = 1_500_000
"""Positions times frames of all samples of a model: a page of more would be slow."""
FEWEST_FRAMES = 50
END = "\u21b5\n"
"""What is shown for the end of a text: an arrow, and a line break."""
LEFT_OUT = "Left out: "
"""What a note on a rule begins with that cannot be tried."""
NOTHING = 255
"""In a map, what stands where no position was open; values go from 0 to 254."""


class Curve(NamedTuple):
    """How a signal is drawn."""

    title: str
    unit: str
    logarithmic: bool = False


CURVES: Mapping[str, Curve] = {
    "switches": Curve("Token switches", "tokens that changed"),
    "mean_entropy": Curve("Entropy", "nats a token"),
    "min_confidence": Curve("Least confidence", "probability"),
    "mean_kl": Curve("Divergence", "KL to the step before, nats", True),
    "margin": Curve("Margin", "of the best logit, nats"),
    "x0_norm": Curve("Prediction", "norm, embedding norms"),
    "z_norm": Curve("Noisy state", "norm, embedding norms", True),
    "angle": Curve("Score", "turn in a step, degrees"),
    "residual": Curve("Residual", "of self-conditioning", True),
}
"""Signals of a row that a page draws, in this order."""


@dataclass(frozen=True)
class Tried:
    """What a rule would have done to the samples."""

    rule: Criterion
    samples: Samples
    same: Float[np.ndarray, " m"]
    """Share of the generated tokens that are those of the full run."""


def panel(samples: Samples, rules: Sequence[Criterion] | None, most_samples: int) -> dict[str, Any]:
    """All that a page shows of one model.

    Args:
        rules: to try on the steps; None takes some that suit the model.
        most_samples: the first of the samples, of which the page shows so many.

    Raises:
        CdlmError: the samples have no record or no tokenizer.
    """
    origin, tokenizer = need_origin(samples)
    first = samples[:most_samples]
    record = first.record
    assert record is not None
    tried, notes = _tried(first, origin, tokenizer, rules)
    frames = chosen_frames(record, first.tokens.shape[1], tried)
    if len(frames) < record.steps:
        notes.append(
            f"The run has {record.steps:,} steps, and the page shows {len(frames):,} of them: spread evenly, with the"
            " first, the last, and those at which a rule halts."
        )
    if len(first) < len(samples):
        notes.append(f"The run has {len(samples):,} samples, and the page shows the first {len(first):,}.")
    view = _View(first, record, frames, Pieces(tokenizer, _special(tokenizer)), tried, _tops(record))
    shown = [view.sample(i) for i in range(len(first))]
    return {
        "name": visible(samples.made_by.get("model", "")), "family": origin.family, "budget": record.steps,
        "sampling": visible(samples.made_by.get("sampling", "")), "steps": (frames + 1).tolist(), "notes": notes,
        "rules": [visible(brief(one.rule)) for one in tried], "maps": view.tops,
        "curves": {name: curve._asdict() for name, curve in CURVES.items() if name in view.curves},
        "samples": shown, "pieces": view.pieces.texts,
    }  # fmt: skip


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """The token that joins documents breaks the line, as in a text, and can be seen."""
    special = special_of(tokenizer)
    return {} if special.eos_id is None else {special.eos_id: END}


def need_origin(samples: Samples) -> tuple[Origin, PreTrainedTokenizerFast]:
    """What the samples came from, and the tokenizer that reads them.

    Raises:
        CdlmError: they were not recorded, or there is no tokenizer.
    """
    if samples.record is None or samples.origin is None:
        raise CdlmError("the samples have no record to watch: draw them with watch=True")
    if samples.origin.tokenizer is None:
        raise CdlmError("the samples have no text to watch, as the model has no tokenizer: set model.tokenizer")
    if not len(samples):
        raise CdlmError("there are no samples to watch: draw one or more")
    return samples.origin, samples.origin.tokenizer


def default_rules(steps: int) -> list[Criterion]:
    """Rules to try where none are given, of which a model gets those that its record can answer."""
    from cdlm.halting import KL, Entropy, FixedSteps, NormConvergence, Patience, SchED

    patience, half = Patience(max(2, steps // 10)), FixedSteps(max(1, steps // 2))
    return [patience, Entropy(0.1), KL(0.001), NormConvergence(0.01), SchED(), half]


def _tried(
    samples: Samples, origin: Origin, tokenizer: PreTrainedTokenizerFast, rules: Sequence[Criterion] | None
) -> tuple[list[Tried], list[str]]:
    """What rules would have done, and a word on those that cannot be tried."""
    if origin.freezes or any(reason is HaltReason.CRITERION for reason in samples.reason):
        return [], ["A rule halted these samples or settled their tokens, so that no other can be tried on them."]
    recording = recording_of(samples, origin)
    tried, notes = [], []
    for rule in default_rules(recording.record.steps) if rules is None else rules:
        try:
            check_replayable(recording, rule)
        except CdlmError as error:
            notes += [] if rules is None else [f"{LEFT_OUT}{visible(str(error))}."]
            continue
        made = replayed(recording, rule, tokenizer)
        tried.append(Tried(rule, made, agreement(made.tokens, recording)))
    return tried, notes


def recording_of(samples: Samples, origin: Origin) -> Recording:
    """The recorded samples as replay takes them, whether or not they could be written to a file."""
    assert samples.record is not None
    return Recording(
        samples.record, samples.tokens, samples.given, samples.valid, samples.index, samples.seed,
        samples.made_by.get("model", ""), origin.weights, origin.settings, samples.prompts, samples.made_by,
    )  # fmt: skip


def chosen_frames(record: Record, positions: int, tried: Sequence[Tried]) -> Int[np.ndarray, " f"]:
    """Steps, from 0, that a page shows: all, or of many some that are evenly spaced, and those where a rule halts."""
    room = MOST_CELLS // max(1, positions * len(record))
    most = min(MOST_FRAMES, max(FEWEST_FRAMES, room))
    if record.steps <= most:
        return np.arange(record.steps)
    spread = np.linspace(0, record.steps - 1, most).round().astype(np.int64)
    halts = [one.samples.steps[_fired(one.samples)] - 1 for one in tried]
    return np.unique(np.concatenate([spread, *halts]))


def _fired(samples: Samples) -> np.ndarray:
    return np.array([reason is HaltReason.CRITERION for reason in samples.reason])


@dataclass(frozen=True)
class _View:
    """What the samples of a panel have in common."""

    samples: Samples
    record: Record
    frames: Int[np.ndarray, " f"]
    pieces: Pieces
    tried: Sequence[Tried]
    tops: Mapping[str, float]
    """Maps that there are, each with the value of its brightest cell."""

    @cached_property
    def curves(self) -> dict[str, Float[np.ndarray, "steps m"]]:
        """The signals that a page draws; NaN where there is none."""
        record, signals = self.record, dict(self.record.signals)
        signals["switches"] = np.where(record.nfe > 0, record.switch_counts(), np.nan)
        if "score_cosine" in signals:  # near 1 all along, so its angle is what can be seen
            signals["angle"] = np.degrees(np.arccos(signals["score_cosine"].astype(np.float64).clip(-1, 1)))
        return {name: values for name, values in signals.items() if name in CURVES}

    def sample(self, i: int) -> dict[str, Any]:
        """What a page shows of one sample, without its padding."""
        record, one, frames = self.record.select(np.array([i])), self.samples[i], self.frames
        real, tokens, given = self.samples.valid[i], self.samples.tokens[i], self.samples.given[i]
        rows = tokens_after(record, np.where(given, tokens, -1), tokens, frames)[:, real]
        numbers = np.stack([self.pieces.of(row) for row in rows])
        start = np.where(given[real], numbers[-1], 0)
        last = int(record.last_step(committed=False)[0])
        return {
            "index": one.index, "prompt": None if one.prompt is None else visible(one.prompt),
            "given": given[real].astype(int).tolist(), "text": self.samples.shown[i][real].astype(int).tolist(),
            "start": start.tolist(), "changes": _changes(numbers, start), "commits": self._commits(record, given, real),
            "last": int(np.searchsorted(frames, last)), "calls": one.nfe, "reason": one.reason.name.lower(),
            "nfe": np.maximum.accumulate(record.nfe[:, 0])[frames].tolist(),
            "maps": {n: _quantised(record.positions[n][frames, 0][:, real], top) for n, top in self.tops.items()},
            "curves": {name: _rounded(values[frames, i]) for name, values in self.curves.items()},
            "halts": [self._halt(rule, i) for rule in self.tried],
        }  # fmt: skip

    def _commits(self, record: Record, given: np.ndarray, real: np.ndarray) -> list[int] | None:
        """The frame from which each position is committed: -1 of what is given, and one past the last of what never
        is. None of a run that commits nothing."""
        if record.commits is None:
            return None
        when = np.where(given, -1, len(self.frames))
        when[record.commits.position] = np.searchsorted(self.frames, record.commits.step)
        return when[real].tolist()

    def _halt(self, tried: Tried, i: int) -> dict[str, Any]:
        """Where a rule would have halted a sample, and what would then have been read."""
        made, full = tried.samples, self.samples.nfe[i]
        return {
            "halted": made.reason[i] is HaltReason.CRITERION, "step": int(made.steps[i]), "calls": int(made.nfe[i]),
            "frame": min(int(np.searchsorted(self.frames, made.steps[i] - 1)), len(self.frames) - 1),
            "saved": round(float(1 - made.nfe[i] / full), 4), "same": round(float(tried.same[i]), 4),
            "text": visible(made.texts[i]),
        }  # fmt: skip


def tokens_after(
    record: Record, start: Int[np.ndarray, " n"], final: Int[np.ndarray, " n"], frames: Int[np.ndarray, " f"]
) -> Int[np.ndarray, "f n"]:
    """The tokens of a record's only sample after each of these steps: what is committed, and elsewhere the most likely.

    Args:
        start: what is given, and -1 elsewhere.
        final: what the sample is returned with, at its last step and after it.
    """
    now, rows, last = start.copy(), [], int(record.last_step(committed=False)[0])
    parts = [part for part in (record.switches, record.commits) if part is not None]
    seen = [0] * len(parts)
    for frame in frames.tolist():
        for k, part in enumerate(parts):  # what is committed stays, as later switches are of open positions
            until = int(np.searchsorted(part.step, frame, side="right"))
            here, seen[k] = slice(seen[k], until), until
            now[part.position[here]] = part.token[here]
        rows.append(final if frame >= last else now.copy())
    return np.stack(rows)


def _changes(numbers: Int[np.ndarray, "f n"], start: Int[np.ndarray, " n"]) -> list[list[int]]:
    """Of each frame the positions that show another text than before, each with the number of that text."""
    before = np.concatenate([start[None], numbers[:-1]])
    places = [np.flatnonzero(row != old) for row, old in zip(numbers, before, strict=True)]
    return [np.stack([at, row[at]], 1).ravel().tolist() for at, row in zip(places, numbers, strict=True)]


def _tops(record: Record) -> dict[str, float]:
    """The maps that there are of the signals of positions, each with the value of its brightest cell, above 0."""
    entropies = record.positions.get("entropy")
    found = {"confidence": 1.0} if "confidence" in record.positions else {}
    if entropies is not None:
        found["entropy"] = max(float(np.nanmax(entropies, initial=0.0)), 1e-3)
    return found


def _quantised(values: Float[np.ndarray, "f n"], top: float) -> str:
    """One byte a cell, frame by frame, in base 64: 0 to 254 from 0 to `top`, and `NOTHING` where there is no number."""
    known = np.isfinite(values)
    scaled = np.where(known, values, 0).astype(np.float64) / top
    cells = np.where(known, (scaled.clip(0, 1) * (NOTHING - 1)).round(), NOTHING)
    return base64.b64encode(cells.astype(np.uint8).tobytes()).decode("ascii")


def _rounded(values: Float[np.ndarray, " f"]) -> list[float | None]:
    """Four digits of each number; None where there is none."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]
