"""Measure samples, or the likelihood of text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cdlm import api
from cdlm.cli.groups import JudgeOptions, session_on
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_places
from cdlm.core.likelihood import LikelihoodSettings, Ode
from cdlm.evaluation.evaluate import evaluate_files
from cdlm.evaluation.likelihood import likelihood as likelihood_of
from cdlm.evaluation.metrics.likelihood import Likelihood
from cdlm.evaluation.small_judge import open_judge
from cdlm.evaluation.table import Evaluation
from cdlm.evaluation.texts import RealText, read_texts
from cdlm.models import hub
from cdlm.runs.config import read_run
from cdlm.runs.train import RunText


@dataclass(frozen=True)
class MauveOptions:
    """MAUVE, which needs the mauve-text package."""

    mauve: bool = True
    """Compute it."""
    mauve_seeds: int = 5
    """Seeds of k-means; the mean and the deviation are over them."""


@dataclass(frozen=True)
class LikelihoodOptions:
    """The likelihood of held-out text."""

    likelihood: bool = False
    """Compute the bound on the negative log likelihood."""
    rows: int = 128
    """Rows of held-out text."""
    levels: int = 8
    """Noise levels that the bound of each row is drawn at."""
    read_out: float | None = None
    """Of continuous models, noise level at which tokens are read out; by default the least there is."""
    ode_steps: int = 0
    """Of continuous models, intervals of the ODE whose likelihood is computed beside the bound; 0 leaves it out."""
    probes: int = 1
    """Draws of the ODE likelihood of each row; from 2 on, their deviation gives its error."""
    method: str = "heun2"
    """Solver of torchdiffeq with a fixed grid, such as heun2 or rk4."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        if self.ode_steps < 0:
            raise CdlmError(f"ode_steps is a number of intervals >= 0, got {self.ode_steps}: 0 leaves out the ODE")
        if not self.likelihood and (self.ode_steps or self.read_out is not None):
            raise CdlmError("ode_steps and read_out are settings of the likelihood: add --likelihood")

    def settings(self, batch_size: int) -> LikelihoodSettings:
        """The same for `cdlm.evaluation`."""
        ode = Ode(max(1, self.ode_steps), self.method, self.probes)  # checked even where it is left out
        return LikelihoodSettings(self.levels, ode if self.ode_steps else None, self.seed, batch_size, self.read_out)


MAUVE, LIKELIHOOD, JUDGE = MauveOptions(), LikelihoodOptions(), JudgeOptions()
MACHINE = MachineOptions(precision="fp32", batch_size=32)


def evaluate(
    run: str,
    samples: Path | None = None,
    *,
    baseline: Path | None = None,
    n: int | None = None,
    out: Path | None = None,
    judge: JudgeOptions = JUDGE,
    mauve: MauveOptions = MAUVE,
    likelihood: LikelihoodOptions = LIKELIHOOD,
    machine: MachineOptions = MACHINE,
) -> None:
    """Measure samples beside held-out real text and the same text with its tokens shuffled; or the model itself, by the
    likelihood of held-out text.

    Args:
        run: the run folder whose text the samples are compared with.
        samples: file of cdlm sample --out, or of any texts: .jsonl, .csv or .parquet with a column "text", or .txt with
            one text a line; may be left out with --likelihood.
        baseline: a second such file for the same table, for instance of the full run without halting.
        n: samples of each file to use; by default as many as the shorter file has.
        out: folder for evaluation.json, evaluation.md and likelihood.json; by default the run folder.
    """
    if samples is None and not likelihood.likelihood:
        raise CdlmError("evaluate needs samples to measure, a file of texts, or --likelihood")
    if samples is None and baseline is not None:
        raise CdlmError("baseline is a second file of samples, and there is no first: name it as samples")
    if n is not None and n < 1:
        raise CdlmError(f"n is a number of samples >= 1, got {n}: leave it out to use all")
    settings = likelihood.settings(machine.batch_size or 32)
    paths = [path for path in (samples, baseline) if path is not None]
    files = {f"{path.absolute().parent.name}/{path.stem}": read_texts(path) for path in paths}
    if likelihood.likelihood and hub.is_foreign(hub.locate(run)):
        raise CdlmError(f"{run} is another library's model, which has no held-out text here: give a run folder")
    place, config = out or Path(run), read_run(run)
    check_places(place / "evaluation.json")
    text = RunText.of(config, hub.read_tokenizer(Path(run)))
    real = RealText(text.valid, text.unread, text.tokenizer, config.source)
    if likelihood.likelihood:
        with session_on(machine, run) as session:
            _report(likelihood_of(session, real, likelihood.rows, settings), place, machine)
    if files:
        count = min([len(texts) for texts in files.values()] + ([] if n is None else [n]))
        small = api.small_judge(config, text, judge.judge_steps)
        found = evaluate_files(
            {name: texts[:count] for name, texts in files.items()}, real,
            partial(open_judge, judge.judge, small, progress=not machine.quiet),
            mauve_seeds=mauve.mauve_seeds if mauve.mauve else 0, device=machine.device, devices=machine.devices,
        )  # fmt: skip
        _report(found, place, machine)


def _report(found: Likelihood | Evaluation, place: Path, machine: MachineOptions) -> None:
    found.save(place)
    if not machine.quiet:
        print(found.terminal())
