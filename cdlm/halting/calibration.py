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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from cdlm.core.checks import check_number
from cdlm.core.errors import CdlmError
from cdlm.core.files import read_json, real_path, write_text
from cdlm.core.schema import Positive, checked
from cdlm.halting.criterion import Criterion
from cdlm.halting.losses import Loss

FILE = "halting.json"
BESIDE = "path='.'"
"""Of a rule with a head that lies beside the weights."""
VERSION = 3
"""Versions 1 and 2 are still read: 1 wrote the rule `FromStep` as `AfterStep`, and both had one-sided goals alone."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Trial:
    """One setting of a rule on the calibration samples."""

    rule: str
    calls: float
    saved: float
    """Share of the full run's calls."""
    loss: float
    """Signed: below 0 is a gain, which counts as a loss of the same size where the goal is two-sided."""
    upper: float
    """Bound of the loss, at the confidence of the goal."""
    passed: bool
    differ: float | None = None
    """Share of the tokens that are not those of the full run, where the goal limits it."""
    differ_upper: float | None = None


@dataclass(frozen=True)
class Goal:
    """The loss is at most `limit`, with probability `confidence`; both in (0, 1).

    Args:
        two_sided: a gain counts as a loss of the same size.
        agreement: least share of the tokens that are those of the full run, in [0, 1), with the same confidence; 0 asks
            for none.
    """

    limit: float
    confidence: float = 0.95
    two_sided: bool = True
    agreement: float = 0.0

    def __post_init__(self) -> None:
        hint = "0.01 or 1% is one per cent"
        check_number("a goal", above=0.0, below=1.0, hint=hint, limit=self.limit, confidence=self.confidence)
        check_number("a goal", least=0.0, below=1.0, hint="0.99 or 99%, and 0 for none", agreement=self.agreement)

    @property
    def fewest(self) -> int:
        """Least number of samples: of fewer, none may be ruined by chance, more often than `confidence` allows."""
        share = min(self.limit, 1 - self.agreement) if self.agreement else self.limit
        return math.ceil(math.log1p(-self.confidence) / math.log1p(-share))

    def check(self, samples: int, fewest: int | None = None) -> None:
        """Raise unless so many samples can show that the goal is met.

        Args:
            fewest: that it needs, if these are more than its own.
        """
        needed = self.fewest if fewest is None else fewest
        if samples < needed:
            raise CdlmError(
                f"{self} with {self.confidence:.0%} confidence needs at least {needed} samples, got {samples}: raise n,"
                " or ask for less"
            )

    def __str__(self) -> str:
        limit = f"a {'change' if self.two_sided else 'loss'} of at most {self.limit:.4g}"
        return f"{limit} at an agreement of at least {self.agreement:.2%}" if self.agreement else limit


@dataclass(frozen=True)
class Tried:
    """What a setting spends and loses.

    Args:
        calls: mean calls of a sample.
        saved: share of the full run's calls.
        loss: as the goal measures it.
        differ: share of each sample's tokens that are not those of the full run; None where nobody asks.
    """

    calls: float
    saved: float
    loss: Loss
    differ: Loss | None = None

    def under(self, goal: Goal, rule: Criterion) -> Trial:
        """The verdict."""
        upper = self.loss.at_most(goal.confidence)
        passed, differ, most = upper <= goal.limit, None, None
        if self.differ is not None:
            differ, most = self.differ.value, self.differ.at_most(goal.confidence)
            passed = passed and most <= 1 - goal.agreement + ROUNDING
        return Trial(repr(rule), self.calls, self.saved, self.loss.value, upper, passed, differ, most)


def search(
    candidates: Iterable[Criterion], measure: Callable[[Criterion], Tried], goal: Goal, samples: int
) -> list[Trial]:
    """Trials of settings, from strict to loose, up to the first that fails; see `loosest` for the choice.

    Where the goal also limits how many tokens differ, a setting has to meet both, each at the whole confidence: it
    passes wrongly no more often than the confidence allows (intersection-union test, Berger, 1982).

    Args:
        measure: tries a setting on the samples.
        samples: number of samples that the loss is measured on.

    Raises:
        CdlmError: too few samples for the goal, or no setting that saves a call passes.
    """
    goal.check(samples)
    trials: list[Trial] = []
    for rule in candidates:
        found = measure(rule)
        if not math.isfinite(found.loss.value):
            raise CdlmError(f"the loss of {rule!r} cannot be computed: the samples have nothing that can be judged")
        trials.append(found.under(goal, rule))
        if not trials[-1].passed:
            if not any(trial.passed and trial.saved > 0 for trial in trials):
                raise CdlmError(_nothing_passed(trials[-1], found, goal, samples))
            return trials
    if not any(trial.saved > 0 for trial in trials):
        raise CdlmError("no setting that was tried saves a call: try another rule, or more steps")
    return trials


def _nothing_passed(trial: Trial, found: Tried, goal: Goal, samples: int) -> str:
    finding = f"{trial.rule} changes {trial.loss:+.4g}, at most {trial.upper:.4g} with {goal.confidence:.0%} confidence"
    needed = [found.loss.samples_for(goal.limit, goal.confidence)]
    if found.differ is not None:
        finding += f", and {trial.differ:.2%} of the tokens, at most {trial.differ_upper:.2%}"
        needed.append(found.differ.samples_for(1 - goal.agreement, goal.confidence))
    if None in needed:
        return f"no setting keeps within {goal}: the strictest that halts, {finding}; allow more"
    most = max(count for count in needed if count is not None)
    return f"{samples} samples cannot show {goal}: {finding}; about {most} samples would"


def loosest(trials: list[Trial]) -> Trial:
    """The loosest setting that passed."""
    return [trial for trial in trials if trial.passed][-1]


@dataclass(frozen=True)
class Calibration:
    """The rule chosen for one setting of the sampler, and the evidence."""

    settings: Mapping[str, Any]
    rule: str
    measure: str
    bound: str
    """Method that bounds the loss. That of the tokens that differ is always Hoeffding's and Bentkus'."""
    goal: Goal
    samples: int
    seed: int
    judge: Mapping[str, Any] | None
    trials: list[Trial]
    gap: Mapping[str, Any] | None = None
    """Of the measure `gap`: its size in nats with the ends of its interval, and the real text that it is to."""


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
    trials = [replace(trial, rule=_from_folder(trial.rule, folder)) for trial in entry.trials]
    entry = replace(entry, rule=_from_folder(entry.rule, folder), trials=trials)
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
            return str(item["rule"]).replace(BESIDE, f"path={str(folder)!r}")
    known = "; ".join(_short(item["settings"]) for item in content["calibrations"])
    raise CdlmError(
        f"{folder / FILE} has no rule for {_short(settings)}, only for {known}:"
        " sample with these, or run cdlm calibrate with yours"
    )


def _from_folder(rule: str, folder: Path) -> str:
    """The text of a rule in which the model's folder is ".", so that it holds wherever that is moved, and other folders
    are whole paths."""

    def named(path: re.Match[str]) -> str:
        place = real_path(path[2])
        return BESIDE if place == real_path(folder) else f"path={str(place)!r}"

    return re.sub(r"path=(['\"])(.*?)\1", named, rule)


def _short(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


class Tested(TypedDict):
    """What is read of a trial."""

    rule: str


class Known(TypedDict):
    """What is read of a calibration."""

    settings: dict[str, Any]
    rule: str
    trials: NotRequired[list[Tested]]


class Content(TypedDict):
    """What halting.json holds."""

    cdlm_halting: Positive
    weights: str
    calibrations: list[Known]


def _read(folder: Path) -> dict[str, Any]:
    file, advice = folder / FILE, "delete it and run cdlm calibrate again"
    content = read_json(file, "a calibrated model")
    version = content.get("cdlm_halting")
    if type(version) is int and version > VERSION:
        raise CdlmError(f"{file} is of version {version}, and this program reads up to {VERSION}: update cdlm")
    checked(content, Content, str(file), advice)
    items = [_current(item) if version == 1 else item for item in content["calibrations"]]
    return {"weights": content["weights"], "calibrations": items}


def _current(item: dict[str, Any]) -> dict[str, Any]:
    """A calibration of version 1, with the names that rules have now."""
    trials = [{**trial, "rule": _renamed(trial["rule"])} for trial in item.get("trials", ())]
    return {**item, "rule": _renamed(item["rule"]), "trials": trials}


def _renamed(rule: str) -> str:
    return re.sub(r"\bAfterStep\(", "FromStep(", rule)
