"""Calibration: the setting of a rule that loses at most so much quality, found on samples and stored with the model.

The loss of a setting is measured on paired samples: the same noise with and without the rule. Settings are tried from
strict to loose, and the search ends at the first that fails, so the confidence holds for the choice and not only for
each trial (fixed-sequence testing, as in Learn then Test, arXiv 2110.01052).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cdlm.core.checks import check_number
from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.core.stats import Bootstrap
from cdlm.halting.criterion import Criterion

FILE = "halting.json"
VERSION = 2
"""Version 1 wrote the rule `FromStep` as `AfterStep`; it is still read."""


@dataclass(frozen=True)
class Trial:
    """One setting of a rule on the calibration samples."""

    rule: str
    calls: float
    saved: float
    """Share of the full run's calls."""
    loss: float
    upper: float
    """Bound of the loss, at the confidence of the goal."""
    passed: bool


@dataclass(frozen=True)
class Goal:
    """The loss is at most `max_loss`, with probability `confidence`; both in (0, 1)."""

    max_loss: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        hint = "0.01 or 1% is one per cent"
        check_number("a goal", above=0.0, below=1.0, hint=hint, max_loss=self.max_loss, confidence=self.confidence)

    @property
    def fewest(self) -> int:
        """Least number of samples: of fewer, none may be ruined by chance, more often than `confidence` allows."""
        return math.ceil(math.log1p(-self.confidence) / math.log1p(-self.max_loss))

    def check(self, samples: int) -> None:
        """Raise unless so many samples can show that the goal is met."""
        if samples < self.fewest:
            raise CdlmError(
                f"a loss of at most {self.max_loss:.2%} with {self.confidence:.0%} confidence needs at least"
                f" {self.fewest} samples, got {samples}: raise n, or ask for less"
            )

    def samples_for(self, loss: Bootstrap, samples: int) -> int | None:
        """Samples with which a trial of this mean loss would pass; None if it loses too much anyway."""
        room, margin = self.max_loss - loss.value, loss.upper(self.confidence) - loss.value
        return None if room <= 0 else math.ceil(samples * (margin / room) ** 2)


def search(
    candidates: Iterable[Criterion],
    measure: Callable[[Criterion], tuple[float, float, Bootstrap]],
    goal: Goal,
    samples: int,
) -> list[Trial]:
    """Trials of settings, from strict to loose, up to the first that fails; see `loosest` for the choice.

    Args:
        measure: mean calls, share of calls saved, and loss of a setting.
        samples: number of samples that the loss is measured on.

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
    finding = f"{trial.rule} loses {trial.loss:.2%}, at most {trial.upper:.2%} with {goal.confidence:.0%} confidence"
    if needed is None:
        return f"no setting keeps the loss within {goal.max_loss:.2%}: the strictest that halts, {finding}; allow more"
    return (
        f"{samples} samples cannot show a loss of at most {goal.max_loss:.2%}: {finding}; about {needed} samples would"
    )


def loosest(trials: list[Trial]) -> Trial:
    """The loosest setting that passed."""
    return [trial for trial in trials if trial.passed][-1]


@dataclass(frozen=True)
class Calibration:
    """The rule chosen for one setting of the sampler, and the evidence."""

    settings: Mapping[str, Any]
    rule: str
    measure: str
    goal: Goal
    samples: int
    seed: int
    judge: Mapping[str, Any] | None
    trials: list[Trial]


def check_readable(folder: Path) -> None:
    """Raise if the folder has a halting.json that cannot be read, so that `write_calibration` would fail."""
    if (folder / FILE).exists():
        _read(folder)


def write_calibration(folder: Path, weights: str, has_weights: Callable[[str], bool], entry: Calibration) -> Path:
    """Write the choice to halting.json in the model folder; it replaces one for the same settings of the sampler.

    Args:
        weights: fingerprint of the model.
        has_weights: whether the model's weights are those that a file names. Choices made for others are removed.

    Returns:
        the file.
    """
    before = _read(folder) if (folder / FILE).exists() else {"weights": weights, "calibrations": []}
    valid = before["calibrations"] if has_weights(before["weights"]) else []
    others = [item for item in valid if item["settings"] != dict(entry.settings)]
    content = {"cdlm_halting": VERSION, "weights": weights, "calibrations": [*others, asdict(entry)]}
    write_text(folder / FILE, json.dumps(content, indent=2) + "\n")
    return folder / FILE


def calibrated_rule(folder: Path, has_weights: Callable[[str], bool], settings: Mapping[str, Any]) -> str:
    """The text of the rule that was calibrated for a model and these settings of its sampler.

    Args:
        has_weights: whether the model's weights are those that the file names.

    Raises:
        CdlmError: there is none, or it was calibrated with other weights.
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
        version = content["cdlm_halting"]
        if version not in (1, VERSION):
            raise CdlmError(f"{file} is of version {version}, and this program reads up to {VERSION}: update cdlm")
        items = [_current(item) if version == 1 else item for item in content["calibrations"]]
        for item in items:
            if not (isinstance(item["settings"], dict) and isinstance(item["rule"], str)):
                raise ValueError("settings and rule of a calibration")
        return {"weights": str(content["weights"]), "calibrations": items}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CdlmError(f"{file} cannot be read ({error!r}): delete it and run cdlm calibrate again") from error


def _current(item: dict[str, Any]) -> dict[str, Any]:
    """A calibration of version 1, with the names that rules have now."""
    trials = [{**trial, "rule": _renamed(trial["rule"])} for trial in item.get("trials", ())]
    return {**item, "rule": _renamed(item["rule"]), "trials": trials}


def _renamed(rule: str) -> str:
    return re.sub(r"\bAfterStep\(", "FromStep(", rule)
