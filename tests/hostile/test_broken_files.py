"""Broken files of every kind end in one clear line, or do no harm.

A fixed sample; `python -m hostile files` runs as many as are asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile.damage import DAMAGES, PLANTED, Change
from hostile.files import CARD, broken, sound, use
from hostile.sound import KINDS, Kind, must
from hostile.trials import Outcome, Trial, attempt

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries warn of odd values
COUNT = 12
"""Trials of each kind."""
TRAINS = "run"
"""A kind that takes long."""
each_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == TRAINS else ()) for kind in KINDS]
)
NOTHING = Change("nothing", lambda _: None)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sound folders are built."""
    return tmp_path_factory.mktemp("files")


@each_kind
def test_sound_files_are_used(kind: str, place: Path) -> None:
    """Else nothing is shown by what comes of broken ones."""
    folder = sound(kind, place)
    result = attempt(Trial("nothing", kind, lambda: use(kind, folder, Path("x"), NOTHING), nonsense=False))
    assert result.outcome is Outcome.ACCEPTED, str(result)


@pytest.mark.parametrize("number", range(COUNT))
@each_kind
def test_a_broken_file_is_refused_in_one_line_or_does_no_harm(kind: str, number: int, place: Path) -> None:
    result = attempt(broken(kind, place, 1, number))
    assert not result.bad, str(result)


@each_kind
def test_what_is_broken_follows_from_the_seed(kind: str, place: Path) -> None:
    first, again = ([broken(kind, place, seed, 1).kind for seed in range(8)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 4


@each_kind
def test_there_is_a_damage_for_every_format(kind: str, place: Path) -> None:
    files = [path for path in sound(kind, place).rglob("*") if path.is_file() and path.name != CARD]
    assert {file.suffix for file in files} <= {*DAMAGES, ".txt"}


HARM: dict[str, tuple[Callable[[Path], object], Outcome]] = {
    "an error of Python": (lambda _: {}["x"], Outcome.TRACEBACK),
    "results that cannot be": (lambda _: must(False, "nonsense"), Outcome.NONSENSE),
    "code from elsewhere": (lambda _: importlib.import_module(PLANTED.rpartition(".")[0]), Outcome.NONSENSE),
    "a file elsewhere": (lambda folder: folder.with_name("outside").touch(), Outcome.NONSENSE),
    "an end without a reason": (lambda _: sys.exit(2), Outcome.UNCLEAR),
}


@pytest.mark.parametrize("name", HARM)
def test_harm_is_seen(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harm, outcome = HARM[name]
    folder = sound("calibration", place)
    monkeypatch.setitem(KINDS, "calibration", Kind(KINDS["calibration"].build, harm))
    result = attempt(Trial(name, "here", lambda: use("calibration", folder, Path("x"), NOTHING), nonsense=False))
    assert result.outcome is outcome
    assert result.bad
