"""Ways to sample beside each other."""

from __future__ import annotations

import fnmatch
from functools import partial
from pathlib import Path

from cdlm import api
from cdlm.cli.commands.evaluate import JudgesOptions
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_places
from cdlm.core.parallel import workers_on
from cdlm.core.parsing import nearest
from cdlm.evaluation.frontier import check_noise, drawn_from, measure
from cdlm.evaluation.frontier_table import save
from cdlm.evaluation.judge import Readers
from cdlm.evaluation.plots.figure import Style
from cdlm.evaluation.small_judge import open_judge
from cdlm.evaluation.texts import Entry, read_texts
from cdlm.runs.train import RunText

JUDGES, MACHINE = JudgesOptions(), MachineOptions(precision="fp32", batch_size=32)


def frontier(
    run: str,
    ways: list[Path],
    *,
    rivals: list[str] | None = None,
    few: int | None = None,
    out: Path = Path("frontier"),
    style: Style = "screen",
    judge: JudgesOptions = JUDGES,
    machine: MachineOptions = MACHINE,
) -> None:
    """Compare ways to sample at equal entropy: AR-NLL over entropy for each, and the calls that each saves.

    Args:
        run: the run folder, or the name of a model that comes with cdlm, whose text the samples are compared with.
        ways: folders, one for each way to sample, named after it; or a folder of such folders. Each holds files of cdlm
            sample --out, drawn with several temperatures; those that differ in the seed alone are taken together.
        rivals: names of the ways that the others are compared with, or patterns such as "plain-*"; by default the
            first.
        few: samples that judges after the first read; by default all.
        out: folder for frontier.json, frontier.md, frontier.png (AR-NLL over entropy), calls.png (over calls) and
            every-call.png (the same with every point, on logarithmic axes).
        style: paper makes the pictures .pdf, of a column's width and with small serif letters.
    """
    if few is not None and few < 1:
        raise CdlmError(f"few is a number of samples >= 1, got {few}: leave it out to read all")
    check_places(out / "frontier.json")
    files = _read(ways)
    compared = _named(rivals, list(files))
    text = RunText.of_run(run)
    real, small = api.real_text(text), api.small_judge(text, judge.judge_steps)
    drawn = [each for way, entries in files.items() for each in drawn_from(way, entries, real.samples)]
    check_noise(drawn)
    opens = [partial(open_judge, name, small, progress=not machine.quiet) for name in judge.judge]
    pools = [workers_on(machine.devices, opened, machine.device) for opened in opens]
    try:
        readers = [Readers(opened(machine.device), pool) for opened, pool in zip(opens, pools, strict=True)]
        found = measure(drawn, real, readers, compared, few=few, shown=not machine.quiet)
    finally:
        for pool in pools:
            pool.close()
    table = save(found, out, style)
    if not machine.quiet:
        print(table)


def _named(rivals: list[str] | None, ways: list[str]) -> list[str]:
    """The ways that the rivals name, in the order of the ways."""
    if rivals is None:
        return ways[:1]
    for rival in rivals:
        if not fnmatch.filter(ways, rival):
            raise CdlmError(
                f"there is no way {rival!r}{nearest(rival, ways)} to compare with: there is {', '.join(ways)}"
            )
    return [way for way in ways if any(fnmatch.fnmatchcase(way, rival) for rival in rivals)]


def _folders(way: Path) -> list[Path]:
    """The folder, or those in it."""
    inside = sorted(path for path in way.iterdir() if path.is_dir()) if way.is_dir() else []
    return inside or [way]


def _read(ways: list[Path]) -> dict[str, list[Entry]]:
    """The samples of each way."""
    found: dict[str, list[Entry]] = {}
    for way in (inner for outer in ways for inner in _folders(outer)):
        files = sorted(way.glob("*.jsonl")) if way.is_dir() else []
        if not files:
            raise CdlmError(f"{way} is no folder with .jsonl files: draw some with cdlm sample --out {way}/NAME.jsonl")
        if way.name in found:
            raise CdlmError(f"two folders would be the way {way.name!r}: rename one")
        found[way.name] = [entry for file in files for entry in read_texts(file)]
    return found
