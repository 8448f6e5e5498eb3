"""Groups of options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cdlm import api
from cdlm.core.checks import check_whole, shown
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.files import reading
from cdlm.data.sources import jsonl_rows
from cdlm.evaluation.bench import JUDGED
from cdlm.evaluation.plots.figure import Style, check_plot_path
from cdlm.evaluation.workloads import Work
from cdlm.halting.calibration import Goal
from cdlm.sampling.prompts import Prompt, check_unicode, checked_messages
from cdlm.sampling.requests import Request
from cdlm.sampling.samples import check_extension
from cdlm.sampling.session import Session


@dataclass(frozen=True)
class JudgeOptions:
    """The judge of AR-NLL."""

    judge: str | None = None
    """Any Hugging Face causal language model, by folder, GGUF file or Hub id; by default a small GPT-2 is trained on
    the run's text once and cached."""
    judge_steps: int | None = None
    """Training steps of the small GPT-2; by default 500, or as many as read a small text 16 times."""

    def __post_init__(self) -> None:
        check_whole("the judge", optional=True, judge_steps=self.judge_steps)


@dataclass(frozen=True)
class PromptOptions:
    """What is generated."""

    n: int = 8
    """Samples, of each prompt if there are any."""
    prompt: str | None = None
    """A prefix, or a template such as "The [8] sat on the [2]." whose numbers are tokens to generate; the text "[8]" is
    written as "\\[8]"."""
    prompts: Path | None = None
    """File with one prompt a line; in a .jsonl file {"prompt": "..."} or, with chat, {"messages": [...]}."""
    length: int | None = None
    """Tokens of a sample; by default as in training."""
    new_tokens: int | None = None
    """Of a masked model, tokens after each prompt, in place of length."""
    chat: bool = False
    """Of a masked model, the prompts are a user's messages, or conversations, put into its chat template."""
    system: str | None = None
    """With chat, a message of the system that each conversation begins with."""
    template: bool = True
    """Numbers in brackets are tokens to generate; if not, prompts are plain text."""
    workload: str | None = None
    """In place of prompts, samples that differ, from the text that the run holds out: "MixedPrompts()",
    "MixedLengths()" or, of a run on arithmetic problems, "Arithmetic()"."""
    seed: int = 0
    """Fixes every sample, whatever the batch and the number of devices."""

    def __post_init__(self) -> None:
        names = ("prompt", "prompts", "length", "new_tokens", "chat", "system")
        others = [name for name in names if getattr(self, name) not in (None, False)]
        others += [] if self.template else ["no-template"]
        if self.workload is not None and others:
            raise CdlmError(f"a workload has prompts and lengths of its own: leave out {' and '.join(others)}")

    def texts(self) -> list[Prompt] | None:
        """The prompts; None if there are none.

        Raises:
            CdlmError: both a prompt and a file are given, or the file cannot be read or holds none.
        """
        if self.prompt is not None and self.prompts is not None:
            raise CdlmError("give either prompt or prompts, not both")
        if self.prompt is not None:
            return [self.prompt]
        return None if self.prompts is None else read_prompts(self.prompts)


def asked(session: Session, texts: list[Prompt] | None, prompts: PromptOptions) -> tuple[list[Request], Work | None]:
    """The requests of these prompts, or of a workload with what they were made from."""
    if prompts.workload is not None:
        return api.ask(session, prompts.n, workload=prompts.workload)
    made = session.requests(
        texts, prompts.n, prompts.length, new_tokens=prompts.new_tokens, chat=prompts.chat, system=prompts.system,
        template=prompts.template,
    )  # fmt: skip
    return made, None


def read_prompts(file: Path) -> list[Prompt]:
    """The lines of a text file that hold something; of a .jsonl file the prompt or the messages of each.

    Raises:
        CdlmError: the file cannot be read, it holds none, or a line is something else.
    """
    found: list[Prompt] = [*_lines(file, "prompt")]
    return found if file.suffix != ".jsonl" else [_prompt_of(place, value) for place, value in jsonl_rows(file)]


def read_answers(file: Path) -> list[str]:
    """The lines of a text file that hold something; of a .jsonl file the answer of each.

    Raises:
        CdlmError: as `read_prompts`.
    """
    found = _lines(file, "answer")
    return found if file.suffix != ".jsonl" else [_answer_of(place, value) for place, value in jsonl_rows(file)]


def read_pairs(file: Path) -> tuple[list[Prompt], list[str]]:
    """Prompts and answers of a .jsonl file whose lines hold both.

    Raises:
        CdlmError: as `read_prompts`.
    """
    _lines(file, "answer")
    if file.suffix != ".jsonl":
        raise CdlmError(f"{file} holds one text a line: give prompts and answers, or one .jsonl file with both")
    prompts, answers = list[Prompt](), list[str]()
    for place, value in jsonl_rows(file):
        if not isinstance(value, dict) or "answer" not in value or len(value) != 2:
            raise CdlmError(f'{place}: expected {{"prompt": "a text", "answer": "a text"}}, got {shown(value)}')
        answers.append(_answer_of(place, {"answer": value["answer"]}))
        prompts.append(_prompt_of(place, {name: part for name, part in value.items() if name != "answer"}))
    return prompts, answers


def _lines(file: Path, what: str) -> list[str]:
    """The lines of a file that hold something."""
    with reading(file, f"give a text file, one {what} a line", pipes=True):
        lines = file.read_text(encoding="utf-8").split("\n")
    found = [line for line in lines if line.strip()]
    if not found:
        raise CdlmError(f"{file} holds no {what}s: write one a line")
    return found


def _prompt_of(place: str, value: Any) -> Prompt:
    """What a line of a .jsonl file asks for."""
    fields_ = set(value) if isinstance(value, dict) else set()
    try:
        if fields_ == {"messages"}:
            return checked_messages(value["messages"])
        if fields_ == {"prompt"} and isinstance(value["prompt"], str):
            check_unicode(value["prompt"], "the prompt")
            return value["prompt"]
    except CdlmError as error:
        raise CdlmError(f"{place}: {error}") from error
    raise CdlmError(f'{place}: expected {{"prompt": "a text"}} or {{"messages": [...]}}, got {shown(value)}')


def _answer_of(place: str, value: Any) -> str:
    """What a line of a .jsonl file answers."""
    if not isinstance(value, dict) or set(value) != {"answer"} or not isinstance(value["answer"], str):
        raise CdlmError(f'{place}: expected {{"answer": "a text"}}, got {shown(value)}')
    try:
        check_unicode(value["answer"], "the answer")
    except CdlmError as error:
        raise CdlmError(f"{place}: {error}") from error
    return value["answer"]


@dataclass(frozen=True)
class OutputOptions:
    """What is written."""

    out: Path | None = None
    """File of the samples: .jsonl, .csv or .parquet; by default the texts are printed."""
    record: Path | None = None
    """Folder to write the steps of full-length runs to, for cdlm replay."""
    plot: Path | None = None
    """Plot of switches, norms and angles against the step: .png, .pdf or .svg."""
    style: Style = "screen"
    """Of the plot: paper has the width of two columns and small serif letters."""

    def __post_init__(self) -> None:
        if self.out is not None:
            check_extension(self.out)
        if self.plot is not None:
            check_plot_path(self.plot)


@dataclass(frozen=True)
class GoalOptions:
    """What a rule may change."""

    measure: Literal["gap", "nats", "ar-nll", "agreement", "texts", "answers"] = "gap"
    """What is measured against the full run: the change of AR-NLL as a share of the gap between the full run and real
    text (gap), in nats per token (nats) or as a share of the full run's (ar-nll); the share of tokens (agreement) or of
    whole samples (texts) that differ, or of problems whose right answer is lost (answers)."""
    max_change: str | None = None
    """The most that the measure may change in either direction, such as 5% or 0.05: text that becomes easier to predict
    is sharper, not better. By default 5% of gap and texts, 1% of ar-nll, agreement and answers, 0.01 nats."""
    max_loss: str | None = None
    """In its place, the most that may be lost, whatever is gained."""
    min_agreement: str | None = None
    """Beside the measures of AR-NLL, least share of the tokens that are those of the full run: by default 99%, and 0
    asks for none."""
    confidence: float = 0.95
    """How surely."""

    def __post_init__(self) -> None:
        if self.max_change is not None and self.max_loss is not None:
            raise CdlmError("give max_change, a limit of gains and losses, or max_loss, a limit of losses: not both")
        if self.min_agreement is not None and self.measure not in JUDGED:
            raise CdlmError(
                f"min_agreement stands beside measures of AR-NLL, and {self.measure} has a limit of its own"
            )

    @property
    def goal(self) -> Goal:
        """The same as numbers."""
        limit = self.max_loss or self.max_change or LIMITS[self.measure]
        agreement = share(self.min_agreement or "99%") if self.measure in JUDGED else 0.0
        return Goal(share(limit), self.confidence, two_sided=self.max_loss is None, agreement=agreement)


LIMITS = {"gap": "5%", "nats": "0.01", "ar-nll": "1%", "agreement": "1%", "texts": "5%", "answers": "1%"}
"""What a measure may change unless it is said."""


def share(text: str) -> float:
    """A share from a text such as 5% or 0.05."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise CdlmError(f"expected a share such as 1% or 0.01, got {text!r}") from error


def flat_settings(*groups: Any, **more: Any) -> dict[str, Any]:
    """The settings of groups as one mapping, without those that are not given."""
    values = {field.name: getattr(group, field.name) for group in groups for field in fields(group)} | more
    return {name: value for name, value in values.items() if value is not None}


def session_on(
    machine: MachineOptions, run: str, seed: int = 0, device_map: str | None = None, **settings: Any
) -> Session:
    """A session of a model on the machine of the command line.

    Args:
        device_map: of a foreign model, how to divide it among devices.
        settings: flat settings of the model's family, and `steps`.
    """
    return api.open_session(
        run, seed=seed, batch_size=machine.batch_size, device=machine.device, devices=machine.devices,
        precision=machine.precision, progress=not machine.quiet, device_map=device_map, **settings,
    )  # fmt: skip
