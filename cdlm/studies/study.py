"""What all studies share: settings, drawing samples, and the three files they leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float

from cdlm import config as names
from cdlm import generation
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.sampler import Sampler
from cdlm.core.devices import resolve_device
from cdlm.core.files import write_rows, write_text
from cdlm.core.stats import Bootstrap
from cdlm.evaluation.bench import Bench, Machine, open_bench
from cdlm.models import hub
from cdlm.models.system import Precision
from cdlm.sampling.requests import requests
from cdlm.sampling.samples import Samples
from cdlm.studies.picture import Line, Panel, draw


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
        return (
            "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
            + f"\n\n{self.note}\n"
        )


@dataclass(frozen=True, kw_only=True)
class Study(ABC):
    """A small experiment; its settings without a value here have theirs in the study's YAML file.

    Args:
        models: run folders, one or more.
        n: samples of each run.
        out: folder for the CSV, the table and the picture.
        batch_size: samples in flight.
        precision: arithmetic of the network.
        device: cpu, cuda, cuda:1, mps, ...; auto is cuda if there is one, else mps, else cpu.
        devices: processes to spread the samples over.
        quiet: show no progress.
    """

    models: list[str]
    n: int
    out: Path = Path("studies")
    batch_size: int = generation.BATCH
    precision: Precision = "fp32"
    device: str = "auto"
    devices: int = 1
    quiet: bool = False

    @abstractmethod
    def find(self) -> Finding:
        """Do the experiment."""

    def check(self) -> None:
        """Raise, before any work, for a model that is not there or settings that name what does not exist."""
        for model in self.models:
            hub.read_config(hub.locate(model))

    @property
    def machine(self) -> Machine:
        """Where the samples are drawn."""
        device = resolve_device(self.device)
        return Machine(self.batch_size, self.precision, device, self.devices, not self.quiet)

    def run(self, name: str) -> str:
        """Do the experiment, write NAME.csv, NAME.md and NAME.png into `out`, and return the table."""
        self.check()
        found = self.find()
        write_rows(self.out / f"{name}.csv", found.rows)
        settings = yaml.safe_dump({key: _plain(value) for key, value in asdict(self).items()}, sort_keys=False)
        write_text(self.out / f"{name}.md", f"{found.markdown}\nSettings:\n\n```yaml\n{settings}```\n")
        draw(found.panels, self.out / f"{name}.png")
        return found.markdown


@dataclass(frozen=True, kw_only=True)
class Sampled(Study):
    """A study of continuous models.

    Args:
        score_temperature: divides the score; below 1 sharpens.
    """

    score_temperature: float

    def sampler(self, steps: int, seed: int, grid: str, record: bool = True) -> Sampler:
        """Without a rule, with or without what a record needs."""
        guidance = Guidance(score_temperature=self.score_temperature)
        return generation.make_sampler(steps, None, seed, record, grid=grid, guidance=guidance)

    def draw(self, model: str, sampler: Sampler, prompts: list[str] | None = None) -> Samples:
        """n samples of each prompt, or of none."""
        folder = hub.read(model)
        asked = requests(prompts, self.n, folder.length, folder.tokenizer)
        return generation.draw_spread(model, sampler, asked, **asdict(self.machine))


@dataclass(frozen=True, kw_only=True)
class Judged(Sampled):
    """A study that measures text with a judge.

    Args:
        seed: of the samples.
        grid: Warped(), LogT() or UniformT().
        recordings: folder with a folder of recordings for each model, by its name; by default the runs are drawn.
        judge: any Hugging Face causal language model; by default a small one is trained on the text and kept.
        judge_steps: training steps of the small one.
    """

    seed: int
    grid: str
    recordings: Path | None = None
    judge: str | None = None
    judge_steps: int = 500

    def check(self) -> None:
        super().check()
        check_texts(self.models)
        names.grid(self.grid)

    def bench(self, model: str, steps: int) -> Bench:
        """The full run of a model, drawn or taken from a recording, and the judge."""
        kept = None if self.recordings is None else self.recordings / Path(model).name
        return open_bench(
            model, self.sampler(steps, self.seed, self.grid, record=False), self.n, self.machine, recordings=kept,
            judge=self.judge, judge_steps=self.judge_steps,
        )  # fmt: skip


def check_texts(models: Sequence[str]) -> None:
    """Raise for a model without the settings of its run, which say what text it is judged beside."""
    for model in models:
        names.read_run(model)


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


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
