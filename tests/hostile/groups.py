"""All trials of bad input, in groups."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import odd_calls
from hostile.files import files_trials
from hostile.interfaces import interface_trials
from hostile.rules import rule_trials, text_trials
from hostile.settings import settings_trials
from hostile.sound import build_run
from hostile.trials import Trial

from cdlm.cli.main import main
from cdlm.core.errors import CdlmError

QUICK = ("--n=2", "--steps=3", "--device=cpu", "--quiet")
JUDGED = ("--n=8", "--steps=4", "--judge-steps=2", "--device=cpu", "--quiet")


def commands(place: Path) -> Mapping[str, Sequence[str]]:
    """For each command, arguments with which it works and is quick; a run and what belongs to it are made for them."""
    run, recording, samples = str(place / "run"), str(place / "recording"), str(place / "samples.jsonl")
    build_run(Path(run))
    main(["sample", run, *QUICK, "--record", recording, "--out", samples])
    return {
        "sample": (run, *QUICK),
        "watch": (run, *QUICK, f"--out={place / 'page.html'}"),
        "replay": (recording, "--halt=Patience(2)", "--quiet"),
        "calibrate": (run, *JUDGED),
        "compare": (run, *JUDGED, f"--out={place / 'table'}"),
        "evaluate": (run, samples, "--judge-steps=2", "--device=cpu", "--quiet"),
        "train-judge": (run, str(place / "judge"), "--steps=2", "--device=cpu", "--quiet"),
        "train-encoder": (run, str(place / "encoder"), "--steps=2", "--width=16", "--device=cpu", "--quiet"),
        "distill": (run, str(place / "students"), "--steps", "2", "--train-steps=1", "--device=cpu", "--quiet"),
        "convert": ("plaid", run, str(place / "converted"), "--quiet"),
        "train-halting": (recording, str(place / "head"), "--quiet"),
        "train-sampler": (run, str(place / "layer"), "--updates=2", "--device=cpu", "--quiet"),  # a run that it refuses
        "merge": (run, str(place / "merged")),  # a folder without an adapter, refused
        "frontier": (run, str(place), "--device=cpu", "--quiet"),
    }


def with_commands() -> Iterator[Trial]:
    """Odd settings of all commands."""
    with TemporaryDirectory() as place:
        os.environ["HOME"] = place
        yield from settings_trials(commands(Path(place)))


def with_interfaces() -> Iterator[Trial]:
    """Odd input of what connects to other programs."""
    with TemporaryDirectory() as place:
        os.environ["HOME"] = place
        yield from interface_trials(Path(place))


def with_calls() -> Iterator[Trial]:
    """Odd arguments of the public functions."""
    with TemporaryDirectory() as place:
        for name, call in odd_calls.calls(str(Path(place) / "model")).items():
            for kind, value in odd_calls.VALUES.items():
                yield Trial(kind, name, partial(called, call, value), nonsense=not odd_calls.expected(name, kind))


def called(call: Callable[[Any], object], value: Any) -> None:
    """Call a function; a place that a sequence does not have is refused by Python's own error."""
    try:
        call(value)
    except IndexError as error:
        raise CdlmError(str(error)) from error


def some(trials: Callable[[], Iterable[Trial]]) -> Callable[[int, int | None], Iterator[Trial]]:
    """Of a table of trials, so many that a seed draws; all by default."""

    def drawn(seed: int, count: int | None) -> Iterator[Trial]:
        total = sum(1 for _ in trials())
        wanted = set(Random(seed).sample(range(total), min(total if count is None else count, total)))
        return (trial for number, trial in enumerate(trials()) if number in wanted)

    return drawn


FILES = 624
"""Broken files, by default: as many of each kind."""
GROUPS: Mapping[str, Callable[[int, int | None], Iterator[Trial]]] = {
    "rules": some(rule_trials),
    "texts": some(text_trials),
    "calls": some(with_calls),
    "settings": some(with_commands),
    "interfaces": some(with_interfaces),
    "files": lambda seed, count: files_trials(seed, FILES if count is None else count),
}
"""Trials by the name of their group, from a seed and how many are wanted."""
