"""Measure samples, or the likelihood of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cdlm import api
from cdlm.cli.groups import read_answers, read_pairs, read_prompts, session_on
from cdlm.core.checks import check_whole
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_places
from cdlm.core.likelihood import LikelihoodSettings, Ode
from cdlm.evaluation.answers import Answers, likelihood_of_answers
from cdlm.evaluation.evaluate import Distances
from cdlm.evaluation.likelihood import likelihood as likelihood_of
from cdlm.evaluation.metrics.features import FEATURES
from cdlm.evaluation.metrics.likelihood import Likelihood
from cdlm.evaluation.small_judge import OWN
from cdlm.evaluation.table import Evaluation
from cdlm.evaluation.texts import Entry, read_texts
from cdlm.models import hub
from cdlm.runs.train import RunText
from cdlm.sampling.prompts import Prompt


@dataclass(frozen=True)
class JudgesOptions:
    """The judges of AR-NLL."""

    judge: Sequence[str] = (OWN,)
    """Any Hugging Face causal language models, by folder, GGUF file or Hub id; "own" is a small GPT-2 that is trained
    on the run's text once and cached."""
    judge_steps: int | None = None
    """Training steps of the small GPT-2; by default 500, or as many as read a small text 16 times."""

    def __post_init__(self) -> None:
        check_whole("the judge", optional=True, judge_steps=self.judge_steps)


@dataclass(frozen=True)
class DistanceOptions:
    """How the distribution is compared with real text."""

    features: str = "NGrams()"
    """What of the texts: NGrams, or the states of a network: MeanState or LastState of the first judge, Encoder("NAME")
    of any encoder of Hugging Face."""
    splits: int = 5
    """Random splits of the real text, which means and deviations are over; 0 leaves out MAUVE and the Fréchet
    distance."""
    mauve: bool | None = None
    """Compute MAUVE, which needs the mauve-text package; by default if that is installed."""

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


@dataclass(frozen=True)
class AnswerOptions:
    """Answers whose likelihood is computed, in place of that of held-out text."""

    prompts: Path | None = None
    """File with one prompt a line; in a .jsonl file {"prompt": "..."} or, with chat, {"messages": [...]}. Prompts are
    given, and not scored."""
    answers: Path | None = None
    """File with one answer a line; in a .jsonl file {"answer": "..."}, or, without prompts, both in one line."""
    chat: bool = False
    """Of a masked model, the prompts are a user's messages, or conversations, put into its chat template."""
    system: str | None = None
    """With chat, a message of the system that each conversation begins with."""
    template: bool = True
    """Prompts are written as in cdlm sample, where brackets around a number need a backslash; if not, they are plain
    text."""

    def __post_init__(self) -> None:
        others = [name for name in ("prompts", "chat", "system") if getattr(self, name) not in (None, False)]
        others += [] if self.template else ["no-template"]
        if self.answers is None and others:
            raise CdlmError(f"give --answers FILE beside {' and '.join(others)}: only answers are scored with prompts")

    def pairs(self) -> tuple[list[Prompt], list[str]] | None:
        """Prompts and answers; None if there are none.

        Raises:
            CdlmError: a file cannot be read or holds none, or their numbers differ.
        """
        if self.answers is None:
            return None
        if self.prompts is None or self.prompts == self.answers:
            return read_pairs(self.answers)
        prompts, answers = read_prompts(self.prompts), read_answers(self.answers)
        if len(prompts) != len(answers):
            raise CdlmError(
                f"each prompt has one answer, got {len(prompts)} prompts in {self.prompts} and {len(answers)} answers"
                f" in {self.answers}"
            )
        return prompts, answers


DISTANCE, LIKELIHOOD, JUDGES = DistanceOptions(), LikelihoodOptions(), JudgesOptions()
ANSWERS, MACHINE = AnswerOptions(), MachineOptions()


def evaluate(
    run: str,
    samples: list[Path] | None = None,
    *,
    n: int | None = None,
    out: Path | None = None,
    judge: JudgesOptions = JUDGES,
    distance: DistanceOptions = DISTANCE,
    likelihood: LikelihoodOptions = LIKELIHOOD,
    answered: AnswerOptions = ANSWERS,
    machine: MachineOptions = MACHINE,
) -> None:
    """Measure samples beside real text and beside text without order; or the model itself, by the likelihood of
    held-out text, or of answers to prompts.

    Args:
        run: the run folder whose text the samples are compared with; of answers also a Hub id, and a model in a
            published format.
        samples: files of cdlm sample --out, or of any texts: .jsonl, .csv or .parquet with a column "text", or .txt
            with one text a line; a row of the table each. They may be left out with --likelihood.
        n: samples of each file to use; by default as many as the shortest file has.
        out: folder for evaluation.json, evaluation.md, likelihood.json, answers.json and answers.csv; by default the
            run folder, and of other models none.
    """
    if answered.answers is not None and not likelihood.likelihood:
        raise CdlmError("answers are measured by their likelihood: add --likelihood")
    if not samples and not likelihood.likelihood:
        raise CdlmError("evaluate needs samples to measure, files of texts, or --likelihood")
    if n is not None and n < 1:
        raise CdlmError(f"n is a number of samples >= 1, got {n}: leave it out to use all")
    settings = likelihood.settings(machine.batch_size or 32)
    distances = distance.distances()
    files, pairs = _read(samples or []), answered.pairs()
    if pairs is not None:
        _score(run, pairs, out, likelihood, answered, machine)
        if not files:
            return
    held_out = likelihood.likelihood and pairs is None
    if held_out and hub.is_foreign(hub.locate(run)):
        raise CdlmError(
            f"{run} is another library's model, which has no held-out text here: give a run folder, or --answers"
        )
    place = _place(run, out, "evaluation.json", machine.quiet)
    text = RunText.of_run(run)
    if held_out:
        with session_on(machine, run) as session:
            _report(likelihood_of(session, api.real_text(text), likelihood.rows, settings), place, machine)
    if files:
        found = api.evaluate_entries(
            text, files, judge.judge, judge.judge_steps, n=n, distances=distances, device=machine.device,
            devices=machine.devices, progress=not machine.quiet,
        )  # fmt: skip
        _report(found, place, machine)


def _score(
    run: str, pairs: tuple[list[Prompt], list[str]], out: Path | None, likelihood: LikelihoodOptions,
    answered: AnswerOptions, machine: MachineOptions,
) -> None:  # fmt: skip
    """Score answers, and write and print what was found."""
    place = _place(run, out, "answers.json", machine.quiet)
    with session_on(machine, run) as session:
        settings = likelihood.settings(machine.batch_size or session.model.batch_size)
        how = {"chat": answered.chat, "system": answered.system, "template": answered.template}
        found = likelihood_of_answers(session, *pairs, settings=settings, **how)
    _report(found, place, machine)


def _place(run: str, out: Path | None, file: str, quiet: bool) -> Path | None:
    """Where to write: the folder that is named, else that of a run of one's own, else nowhere.

    Raises:
        CdlmError: it cannot be written, or nothing would be written and nothing shown.
    """
    ours = Path(run).is_dir() and not hub.is_foreign(Path(run))
    place = Path(run) if out is None and ours else out
    if place is None and quiet:
        raise CdlmError("nothing would be written and nothing shown: give --out, or leave out --quiet")
    check_places(None if place is None else place / file)
    return place


def _read(paths: Sequence[Path]) -> dict[str, list[Entry]]:
    """The texts of files, by the name of their row: folder and file."""
    names = [f"{path.absolute().parent.name}/{path.stem}" for path in paths]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CdlmError(f"two files would be the row {twice!r}: rename one, or name each file once")
    return {name: read_texts(path) for name, path in zip(names, paths, strict=True)}


def _report(found: Likelihood | Evaluation | Answers, place: Path | None, machine: MachineOptions) -> None:
    if place is not None:
        found.save(place)
    if not machine.quiet:
        print(found.terminal())
