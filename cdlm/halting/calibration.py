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
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cdlm.errors import CdlmError
from cdlm.files import write_text
from cdlm.halting.criterion import Criterion

RESAMPLES = 2000
FILE = "halting.json"
VERSION = 1


@dataclass(frozen=True)
class Bootstrap:
    """A statistic of a set of samples, and its values on samples drawn with replacement."""

    value: float
    draws: Float[np.ndarray, " r"]

    @property
    def interval95(self) -> tuple[float, float]:
        """Percentile interval."""
        low, high = np.quantile(self.draws, [0.025, 0.975])
        return float(low), float(high)

    def upper(self, confidence: float) -> float:
        """One-sided bound: the true value is below it with this confidence."""
        return float(np.quantile(self.draws, confidence))


def bootstrap(statistic: Callable[[Float[np.ndarray, "r m"]], Float[np.ndarray, " r"]], samples: int) -> Bootstrap:
    """`statistic` of the multiplicities of the samples: once each, then drawn with replacement, always the same draws.

    Statistics of one set of samples are therefore paired, draw by draw.
    """
    return Bootstrap(float(statistic(np.ones((1, samples)))[0]), statistic(_multiplicities(samples)))


@lru_cache(4)
def _multiplicities(samples: int) -> Float[np.ndarray, "r m"]:
    rng = np.random.default_rng(0)
    return rng.multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES).astype(np.float64)


@dataclass(frozen=True)
class Scores:
    """A measure that is a ratio of sums over samples, such as nats per token."""

    total: Float[np.ndarray, " m"]
    weight: Float[np.ndarray, " m"]

    def __call__(self, times: Float[np.ndarray, "r m"]) -> Float[np.ndarray, " r"]:
        return (times @ self.total) / (times @ self.weight)

    def bootstrap(self) -> Bootstrap:
        """The measure with its resampled values."""
        return bootstrap(self, len(self.total))

    def relative_to(self, full: Scores) -> Bootstrap:
        """self / full - 1 on the same samples: 0.01 is one per cent more."""
        return bootstrap(lambda times: self(times) / full(times) - 1, len(self.total))


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


def keep(folder: Path, weights: str, entry: Calibration) -> None:
    """Write the choice into the model folder's halting.json; it replaces one for the same sampler."""
    there = _read(folder) if (folder / FILE).exists() else {"weights": weights, "calibrations": []}
    old = there["calibrations"] if there["weights"] == weights else []  # other weights: their choices are void
    kept = [item for item in old if item["settings"] != dict(entry.settings)]
    content = {"cdlm_halting": VERSION, "weights": weights, "calibrations": [*kept, asdict(entry)]}
    write_text(folder / FILE, json.dumps(content, indent=2) + "\n")


def automatic(folder: Path, weights: str, settings: Mapping[str, Any]) -> str:
    """The rule that was calibrated for this model and sampler, as text.

    Raises:
        CdlmError: there is none, or it is of other weights.
    """
    if not (folder / FILE).exists():
        raise CdlmError(f'halt="auto" needs a {FILE} in {folder}: make one with cdlm calibrate')
    content = _read(folder)
    if content["weights"] != weights:
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
