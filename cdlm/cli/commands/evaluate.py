"""Measure samples, or the likelihood of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cdlm import api
from cdlm.cli.groups import session_on
from cdlm.core.checks import check_whole
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_places
from cdlm.core.likelihood import LikelihoodSettings, Ode
from cdlm.evaluation.evaluate import Distances, evaluate_files
from cdlm.evaluation.likelihood import likelihood as likelihood_of
from cdlm.evaluation.metrics.features import FEATURES
from cdlm.evaluation.metrics.likelihood import Likelihood
from cdlm.evaluation.small_judge import OWN, open_judge
from cdlm.evaluation.table import Evaluation
from cdlm.evaluation.texts import Entry, read_texts
from cdlm.models import hub
from cdlm.runs.config import RunConfig, read_run
from cdlm.runs.train import RunText


@dataclass(frozen=True)
class JudgesOptions:
    """The judges of AR-NLL."""

    judge: Sequence[str] = (OWN,)
    """Any Hugging Face causal language models, by folder, GGUF file or Hub id; "own" is a small GPT-2 that is trained
    on the run's text once and cached."""
    judge_steps: int = 500
    """Training steps of the small GPT-2."""

    def __post_init__(self) -> None:
        check_whole("the judge", judge_steps=self.judge_steps)


@dataclass(frozen=True)
class DistanceOptions:
    """How the distribution is compared with real text."""

    features: str = "NGrams()"
    """What of the texts: NGrams, or the states of a network: MeanState or LastState of the first judge, Encoder("NAME")
    of any encoder of Hugging Face."""
    splits: int = 5
    """Random splits of the real text, which means and deviations are over; 0 leaves out MAUVE and the Fréchet
    distance."""
    mauve: bool = True
    """Compute MAUVE, which needs the mauve-text package."""

    @property
    def distances(self) -> Distances:
        """The same as an object."""
        return Distances(FEATURES.parse(self.features), self.splits, self.mauve)


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
        check_whole("the likelihood", rows=self.rows)
        self.settings(1)  # checked even where it is left out

    def settings(self, batch_size: int) -> LikelihoodSettings:
        """The same for `cdlm.evaluation`."""
        ode = Ode(max(1, self.ode_steps), self.method, self.probes)
        return LikelihoodSettings(self.levels, ode if self.ode_steps else None, self.seed, batch_size, self.read_out)


DISTANCE, LIKELIHOOD, JUDGES = DistanceOptions(), LikelihoodOptions(), JudgesOptions()
MACHINE = MachineOptions(precision="fp32", batch_size=32)


def evaluate(
    run: str,
    samples: list[Path] | None = None,
    *,
    n: int | None = None,
    out: Path | None = None,
    judge: JudgesOptions = JUDGES,
    distance: DistanceOptions = DISTANCE,
    likelihood: LikelihoodOptions = LIKELIHOOD,
    machine: MachineOptions = MACHINE,
) -> None:
    """Measure samples beside real text and beside text without order; or the model itself, by the likelihood of
    held-out text.

    Args:
        run: the run folder whose text the samples are compared with.
        samples: files of cdlm sample --out, or of any texts: .jsonl, .csv or .parquet with a column "text", or .txt
            with one text a line; a row of the table each. They may be left out with --likelihood.
        n: samples of each file to use; by default as many as the shortest file has.
        out: folder for evaluation.json, evaluation.md and likelihood.json; by default the run folder.
    """
    if not samples and not likelihood.likelihood:
        raise CdlmError("evaluate needs samples to measure, files of texts, or --likelihood")
    if n is not None and n < 1:
        raise CdlmError(f"n is a number of samples >= 1, got {n}: leave it out to use all")
    settings, distances = likelihood.settings(machine.batch_size or 32), distance.distances
    files = _read(samples or [])
    if likelihood.likelihood and hub.is_foreign(hub.locate(run)):
        raise CdlmError(f"{run} is another library's model, which has no held-out text here: give a run folder")
    place, config = out or Path(run), read_run(run)
    check_places(place / "evaluation.json")
    text = RunText.of(config, hub.read_tokenizer(Path(run)))
    real = api.real_text(config, text)
    if likelihood.likelihood:
        with session_on(machine, run) as session:
            _report(likelihood_of(session, real, likelihood.rows, settings), place, machine)
    if files:
        count = min([len(texts) for texts in files.values()] + ([] if n is None else [n]))
        small = api.small_judge(config, text, judge.judge_steps)
        found = evaluate_files(
            {name: texts[:count] for name, texts in files.items()}, real,
            [partial(open_judge, name, small, progress=not machine.quiet) for name in judge.judge],
            distances=distances, device=machine.device, devices=machine.devices, notes=_notes(config, judge.judge),
        )  # fmt: skip
        _report(found, place, machine)


def _read(paths: Sequence[Path]) -> dict[str, list[Entry]]:
    """The texts of files, by the name of their row: folder and file."""
    names = [f"{path.absolute().parent.name}/{path.stem}" for path in paths]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CdlmError(f"two files would be the row {twice!r}: rename one, or name each file once")
    return {name: read_texts(path) for name, path in zip(names, paths, strict=True)}


def _notes(config: RunConfig, judges: Sequence[str]) -> list[str]:
    if OWN in judges and not config.judge_share:
        return ["the own judge read the generator's training text (judge_share 0): copying that text is rewarded."]
    return []


def _report(found: Likelihood | Evaluation, place: Path, machine: MachineOptions) -> None:
    found.save(place)
    if not machine.quiet:
        print(found.terminal())
