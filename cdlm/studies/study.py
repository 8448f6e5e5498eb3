"""What all studies share: settings, models, and the four files they leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml
from jaxtyping import Float

from cdlm.api import configured, open_bench, open_session
from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.grids import GRIDS
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.files import plain, write_json, write_rows, write_text
from cdlm.core.inert import fenced, table_line
from cdlm.core.stats import Bootstrap
from cdlm.evaluation.bench import Bench
from cdlm.evaluation.plots.figure import Style, look_of
from cdlm.evaluation.plots.panels import Line, Panel, draw
from cdlm.halting.signals import SPATIAL
from cdlm.models import hub
from cdlm.runs import config as names
from cdlm.sampling.session import Model, Session


@dataclass(frozen=True)
class Finding:
    """What a study found."""

    rows: Sequence[Mapping[str, object]]
    """Everything, one line of the CSV each; all with the same keys."""
    table: Sequence[Mapping[str, str]]
    """What to read, ready to print; all with the same keys."""
    note: str
    """What the columns of the table are."""
    panels: Sequence[Panel]

    @property
    def markdown(self) -> str:
        """The table and its note."""
        heads = list(self.table[0])
        lines = [heads, ["--:"] * len(heads), *([row[head] for head in heads] for row in self.table)]
        return "\n".join(map(table_line, lines)) + f"\n\n{self.note}\n"


@dataclass(frozen=True, kw_only=True)
class Study(MachineOptions, ABC):
    """A small experiment; its settings without a value here have theirs in the study's YAML file.

    Args:
        models: run folders, one or more.
        n: samples of each run.
        out: folder for the CSV, the JSON, the table and the picture.
        style: of the picture: "paper" makes it a .pdf, of a column's width and with small serif letters.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    """Signals that a model must have for this study."""

    models: list[str]
    n: int
    out: Path = Path("studies")
    style: Style = "screen"
    batch_size: int = Model.batch_size

    @abstractmethod
    def find(self) -> Finding:
        """Do the experiment."""

    def check(self) -> None:
        """Raise, before any work, for a model that is not there or settings that name what does not exist."""
        for model in self.models:
            hub.read_config(hub.locate(model))

    def session(self, model: str, **settings: Any) -> Session:
        """A model, sampled as in its paper but for the flat settings given. It is loaded at the first call alone.

        Raises:
            CdlmError: the model lacks signals that the study reads, or has no such setting.
        """
        if model not in self._sessions:
            self._sessions[model] = self._open(model)
        session = self._sessions[model]
        return session.with_sampling(configured(session.sampling, settings))

    def run(self, name: str) -> str:
        """Do the experiment, write NAME.csv, NAME.json, NAME.md and NAME.png into `out`, and return the table."""
        self.check()
        try:
            for model in self.models:  # so that one that cannot be used is found before any work
                self.session(model)
            found = self.find()
        finally:
            self.close()
        write_rows(self.out / f"{name}.csv", found.rows)
        settings = plain(asdict(replace(self, devices=self.processes)))
        content = {"study": name, "settings": settings, "note": found.note, "table": found.table, "rows": found.rows}
        write_json(self.out / f"{name}.json", content)
        text = yaml.safe_dump(settings, sort_keys=False)
        write_text(self.out / f"{name}.md", f"{found.markdown}\nSettings:\n\n{fenced(text, 'yaml')}\n")
        draw(found.panels, self.out / f"{name}{look_of(self.style).ending}", style=self.style)
        return found.markdown

    def close(self) -> None:
        """Let go of the models, and end the processes that serve them."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        super().close()

    @cached_property
    def _sessions(self) -> dict[str, Session]:
        """Models that are loaded."""
        return {}

    def _open(self, model: str) -> Session:
        session = open_session(
            model, batch_size=self.batch_size, device=self.device, devices=self.devices, precision=self.precision,
            progress=not self.quiet,
        )  # fmt: skip
        missing = sorted(self.reads - session.signals)
        if missing:
            session.close()
            raise CdlmError(
                f"{label(model)} is a {session.sampling.family} model and has no {missing[0]!r}, which this study"
                " reads: leave it out of the models"
            )
        return session.with_sampling(session.model.plain)


@dataclass(frozen=True, kw_only=True)
class Continuous(Study):
    """A study of continuous models, sampled with Euler steps on one grid for all.

    Args:
        score_temperature: divides the score; below 1 sharpens.
    """

    reads = SPATIAL

    score_temperature: float

    def flow(self, model: str, steps: int, seed: int, grid: str) -> Session:
        """A model as this study samples it, without a rule."""
        session = self.session(
            model, steps=steps, solver="Euler()", grid=grid, projection="Expectation()",
            score_temperature=self.score_temperature,
        )  # fmt: skip
        return session.with_seed(seed)

    def denoiser(self, model: str) -> Denoiser:
        """The model itself: its embedding norm and its noise levels."""
        found: Any = self.session(model).model  # it moves in embedding space, or its session is refused
        return found


@dataclass(frozen=True, kw_only=True)
class Judged(Study):
    """A study that measures text with a judge.

    Args:
        seed: of the samples.
        recordings: folder with a folder of recordings for each model, by its name; by default the runs are drawn.
        judge: any Hugging Face causal language model; by default a small one is trained on the text and cached.
        judge_steps: training steps of the small one; by default those of `SmallJudge`.
    """

    seed: int
    recordings: Path | None = None
    judge: str | None = None
    judge_steps: int | None = None

    def check(self) -> None:
        super().check()
        for model in self.models:  # whose settings say what text it is judged beside
            names.read_run(model)

    def bench(self, model: str, session: Session) -> Bench:
        """The full run of a model's session, drawn or taken from a recording, and the judge."""
        place = None if self.recordings is None else self.recordings / label(model)
        return open_bench(session, self.n, judge=self.judge, judge_steps=self.judge_steps, recordings=place)


@dataclass(frozen=True, kw_only=True)
class JudgedContinuous(Continuous, Judged):
    """A study that measures text of continuous models.

    Args:
        grid: Warped(), LogT() or UniformT().
    """

    grid: str

    def check(self) -> None:
        super().check()
        GRIDS.parse(self.grid)

    def full_run(self, model: str, steps: int) -> Bench:
        """The full run of a model, and the judge."""
        return self.bench(model, self.flow(model, steps, self.seed, self.grid))


def label(model: str) -> str:
    """What a model is called in tables and pictures."""
    return Path(model).name


def ends(name: str, found: Bootstrap) -> dict[str, float]:
    """A number with its 95 % interval, as columns of a row."""
    low, high = found.interval95
    return {name: found.value, f"{name}_low": low, f"{name}_high": high}


def interval(row: Mapping[str, Any], name: str, form: str) -> str:
    """Such columns as text."""
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"


def curve(title: str, rows: Sequence[Mapping[str, Any]], x: str, y: str, dashed: bool = False) -> Line:
    """Two columns as a curve, with the interval of `y` if the rows have it."""
    band = None
    if f"{y}_low" in rows[0]:
        band = column(rows, f"{y}_low"), column(rows, f"{y}_high")
    return Line(title, column(rows, x), column(rows, y), band, dashed, dots=True)


def column(rows: Sequence[Mapping[str, Any]], name: str) -> Float[np.ndarray, " k"]:
    """One column as numbers."""
    return np.array([row[name] for row in rows], np.float64)
