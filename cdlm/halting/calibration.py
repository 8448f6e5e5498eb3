"""Choosing a rule's setting by the quality it may lose, with confidence; and keeping the choice beside the weights.

The loss of a setting is measured on paired samples: the same noise with and without the rule. Settings are tried from
strict to loose and the first that fails ends the search, so the confidence holds for the choice and not for each trial
alone (fixed-sequence testing, as in Learn then Test, arXiv 2110.01052).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.core.stats import Bootstrap
from cdlm.halting.criterion import Criterion

FILE = "halting.json"
VERSION = 1


@dataclass(frozen=True)
class Trial:
    """One setting of a rule on the calibration samples."""

    rule: str
    calls: float
    saved: float
    """Share of the full run's calls."""
    loss: float
    upper: float
    """Bound of the loss at the asked confidence."""
    passed: bool


@dataclass(frozen=True)
class Goal:
    """What the user is ready to lose, such as `max_loss` 0.01, and how surely, such as `confidence` 0.95."""

    max_loss: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name in ("max_loss", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise CdlmError(
                    f"{name} must lie between 0 and 1, got {getattr(self, name)}: 0.01 or 1% is one per cent"
                )

    @property
    def fewest(self) -> int:
        """Samples below which a share `max_loss` of ruined samples can stay unseen more often than asked."""
        return math.ceil(math.log1p(-self.confidence) / math.log1p(-self.max_loss))

    def check(self, samples: int) -> None:
        """Raise if so few samples cannot show it."""
        if samples < self.fewest:
            raise CdlmError(
                f"a loss of at most {self.max_loss:.2%} with {self.confidence:.0%} confidence needs at least"
                f" {self.fewest} samples, got {samples}: raise n, or ask for less"
            )

    def samples_for(self, loss: Bootstrap, samples: int) -> int | None:
        """Samples with which a trial of this mean loss would pass; None if it loses too much anyway."""
        room, spread = self.max_loss - loss.value, loss.upper(self.confidence) - loss.value
        return None if room <= 0 else math.ceil(samples * (spread / room) ** 2)


def choose(
    candidates: Iterable[Criterion],
    measure: Callable[[Criterion], tuple[float, float, Bootstrap]],
    goal: Goal,
    samples: int,
) -> list[Trial]:
    """Try settings from strict to loose until one fails; the last that passed is the choice.

    Args:
        measure: mean calls, share of calls saved, and loss of a setting.
        samples: how many the measure rests on.

    Raises:
        CdlmError: too few samples for the goal, or no setting that saves a call passes.
    """
    goal.check(samples)
    trials: list[Trial] = []
    for rule in candidates:
        calls, saved, loss = measure(rule)
        upper = loss.upper(goal.confidence)
        if not math.isfinite(loss.value):
            raise CdlmError(f"the loss of {rule!r} cannot be computed: the samples have nothing that can be judged")
        trials.append(Trial(repr(rule), calls, saved, loss.value, upper, upper <= goal.max_loss))
        if not trials[-1].passed:
            if not any(trial.passed and trial.saved > 0 for trial in trials):
                raise CdlmError(_nothing_passed(trials[-1], goal, goal.samples_for(loss, samples), samples))
            return trials
    if not any(trial.saved > 0 for trial in trials):
        raise CdlmError("no setting that was tried saves a call: try another rule, or more steps")
    return trials


def _nothing_passed(trial: Trial, goal: Goal, needed: int | None, samples: int) -> str:
    said = f"{trial.rule} loses {trial.loss:.2%}, at most {trial.upper:.2%} with {goal.confidence:.0%} confidence"
    if needed is None:
        return f"no setting keeps the loss within {goal.max_loss:.2%}: the strictest that halts, {said}; allow more"
    return f"{samples} samples cannot show a loss of at most {goal.max_loss:.2%}: {said}; about {needed} samples would"


def chosen(trials: list[Trial]) -> Trial:
    """The loosest setting that passed."""
    return [trial for trial in trials if trial.passed][-1]


@dataclass(frozen=True)
class Calibration:
    """A choice and its evidence, for one setting of the sampler."""

    settings: Mapping[str, Any]
    rule: str
    measure: str
    goal: Goal
    samples: int
    seed: int
    judge: Mapping[str, Any] | None
    trials: list[Trial]


def check_file(folder: Path) -> None:
    """Raise if there is a halting.json that cannot be read, which `keep` would have to replace."""
    if (folder / FILE).exists():
        _read(folder)


def keep(folder: Path, weights: str, has_weights: Callable[[str], bool], entry: Calibration) -> Path:
    """Write the choice into the model folder's halting.json; it replaces one for the same sampler. Returns the file.

    Args:
        weights: fingerprint of the model's weights.
        has_weights: whether they are those that a file names.
    """
    there = _read(folder) if (folder / FILE).exists() else {"weights": weights, "calibrations": []}
    old = there["calibrations"] if has_weights(there["weights"]) else []  # other weights: their choices are void
    kept = [item for item in old if item["settings"] != dict(entry.settings)]
    content = {"cdlm_halting": VERSION, "weights": weights, "calibrations": [*kept, asdict(entry)]}
    write_text(folder / FILE, json.dumps(content, indent=2) + "\n")
    return folder / FILE


def automatic(folder: Path, has_weights: Callable[[str], bool], settings: Mapping[str, Any]) -> str:
    """The rule that was calibrated for this model and sampler, as text.

    Args:
        has_weights: whether the model's weights are those that the file names.

    Raises:
        CdlmError: there is none, or it is of other weights.
    """
    if not (folder / FILE).exists():
        raise CdlmError(f'halt="auto" needs a {FILE} in {folder}: make one with cdlm calibrate')
    content = _read(folder)
    if not has_weights(content["weights"]):
        raise CdlmError(f"{folder / FILE} was made for other weights than those beside it: run cdlm calibrate again")
    for item in content["calibrations"]:
        if item["settings"] == dict(settings):
            return str(item["rule"])
    known = "; ".join(_short(item["settings"]) for item in content["calibrations"])
    raise CdlmError(
        f"{folder / FILE} has no rule for {_short(settings)}, only for {known}:"
        " sample with these, or run cdlm calibrate with yours"
    )


def _short(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _read(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["cdlm_halting"] != VERSION:
            raise CdlmError(f"{file} is of version {content['cdlm_halting']}, this program reads {VERSION}")
        for item in content["calibrations"]:
            if not (isinstance(item["settings"], dict) and isinstance(item["rule"], str)):
                raise ValueError("settings and rule of a calibration")
        return {"weights": content["weights"], "calibrations": content["calibrations"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CdlmError(f"{file} cannot be read ({error!r}): delete it and run cdlm calibrate again") from error
