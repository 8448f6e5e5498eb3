"""Bad arguments of everything that is written as a call, and bad values of every setting of the command line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hostile.rules import BUILT, REGISTRIES, rule_trials, text_trials
from hostile.settings import settings_trials
from hostile.trials import Result, Trial, attempt_here

from cdlm.cli.commands import COMMANDS
from cdlm.core.checks import _hints


def bad(trials: list[Trial]) -> list[str]:
    """What is to be mended, in words."""
    assert trials
    results: list[Result] = [attempt_here(trial) for trial in trials]
    slow = [f"slow: {result.trial.place}, {result.trial.kind}" for result in results if result.seconds > 1]
    return [str(result) for result in results if result.bad] + slow


RULES = [(registry.what, name) for registry in (*REGISTRIES, *BUILT) for name in registry]


@pytest.mark.parametrize(("what", "name"), RULES)
def test_no_odd_argument_is_anything_but_right_or_refused(what: str, name: str) -> None:
    trials = [trial for trial in rule_trials() if trial.place.startswith(f"{what} {name}.")]
    if trials:
        assert not bad(trials)


@pytest.mark.parametrize("what", [registry.what for registry in REGISTRIES])
def test_no_odd_text_is_anything_but_refused(what: str) -> None:
    assert not bad([trial for trial in text_trials() if trial.place == what])


@pytest.mark.parametrize("what", [registry.what for registry in REGISTRIES])
def test_no_odd_object_is_taken_for_a_text(what: str) -> None:
    assert not bad([trial for trial in text_trials() if trial.place == f"{what}, an object"])


def test_there_are_enough_trials_of_rules() -> None:
    kinds = Counter(trial.nonsense for trial in [*rule_trials(), *text_trials()])
    assert kinds[True] > 3000
    assert kinds[False] > 300


@pytest.mark.parametrize(("what", "name"), RULES)
def test_the_types_of_all_settings_are_known(what: str, name: str) -> None:
    registry = next(registry for registry in (*REGISTRIES, *BUILT) if registry.what == what)
    names = [trial for trial in rule_trials() if trial.place.startswith(f"{what} {name}.")]
    assert bool(_hints(registry[name])) or not names


@pytest.mark.parametrize("command", [command.name for command in COMMANDS if not command.own])
def test_no_odd_setting_is_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is read: the run that is named is not there."""
    monkeypatch.chdir(tmp_path)
    assert not bad(list(settings_trials({command: NOWHERE[command]})))
    assert not list(tmp_path.iterdir())


NOWHERE: dict[str, list[str]] = {
    "sample": ["nowhere/run"], "replay": ["nowhere/rec", "--halt=Patience(2)"],
    "calibrate": ["nowhere/run", "--halt=Patience"], "compare": ["nowhere/run"], "evaluate": ["nowhere/run", "no.jsonl"],
    "train-judge": ["nowhere/run", "--out=judge"], "convert": ["plaid", "nowhere/run", "--out=out"],
    "train-halting": ["nowhere/rec", "--out=head"], "frontier": ["nowhere/run"],
}  # fmt: skip
"""Arguments of each command whose run is not there."""
