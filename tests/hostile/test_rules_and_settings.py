"""Bad arguments of everything that is written as a call, and bad values of every setting of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
from hostile.rules import BUILT, REGISTRIES
from hostile.settings import settings_trials
from hostile.trials import Outcome, Trial, attempt_here

from cdlm.cli.commands import COMMANDS
from cdlm.cli.main import main

HERE = Path(__file__).parent.parent
PROGRAM = "from hostile.rules import *; from hostile.trials import report; report([*rule_trials(), *text_trials()])"
WHATS = [registry.what for registry in (*REGISTRIES, *BUILT)]


@pytest.fixture(scope="module")
def tried() -> Mapping[str, list[tuple[str, bool, float, str]]]:
    """What came of the trials of rules, by what was tried, in a process without the type checks of these tests."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=HERE,
        env={"PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = defaultdict(list)
    for line in done.stdout.splitlines():
        result = json.loads(line)
        found[next(what for what in WHATS if result[0].startswith(what))].append(result)
    return found


@pytest.mark.parametrize("what", WHATS)
def test_no_odd_argument_is_anything_but_right_or_refused(tried: Mapping[str, list], what: str) -> None:
    assert len(tried[what]) > 50
    assert not [words for _, bad, _, words in tried[what] if bad]
    assert not [words for _, _, seconds, words in tried[what] if seconds > 1]


def test_there_are_thousands_of_trials(tried: Mapping[str, list]) -> None:
    assert sum(map(len, tried.values())) > 4000


NOWHERE: dict[str, list[str]] = {
    "sample": ["nowhere/run"], "watch": ["nowhere/run", "--out=page.html"],
    "replay": ["nowhere/rec", "--halt=Patience(2)"],
    "calibrate": ["nowhere/run"], "compare": ["nowhere/run", "--n=8"],
    "evaluate": ["nowhere/run", "nowhere/s.jsonl"], "train-judge": ["nowhere/run", "judge"],
    "train-encoder": ["nowhere/run", "encoder"],
    "convert": ["plaid", "nowhere/run", "out"], "train-halting": ["nowhere/rec", "head"],
    "frontier": ["nowhere/run", "nowhere/way=s.jsonl"], "train-sampler": ["nowhere/run", "layer"],
    "merge": ["nowhere/adapter", "out"], "pack": ["nowhere/run", "out"],
    "distill": ["nowhere/run", "out", "--steps", "8"],
}  # fmt: skip
"""Arguments of each command whose run is not there: what is refused is refused before anything is read."""


@pytest.mark.parametrize("command", [command.name for command in COMMANDS if not command.own])
def test_no_odd_setting_is_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 17th of the trials; `python -m hostile` runs them all."""
    monkeypatch.chdir(tmp_path)
    alone = attempt_here(Trial("nothing wrong but the run", command, lambda: main([command, *NOWHERE[command]])))
    assert alone.outcome is Outcome.REFUSED
    assert "nowhere" in alone.said
    results = [attempt_here(trial) for trial in list(settings_trials({command: NOWHERE[command]}))[::17]]
    own = [result for result in results if "nowhere" not in result.said]
    assert len(own) > len(results) / 3  # refused for their own sake, before anything is read
    assert not [str(result) for result in results if result.bad]
    assert not list(tmp_path.iterdir())
