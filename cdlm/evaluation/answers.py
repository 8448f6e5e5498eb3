"""The likelihood of answers, each given its prompt: nats of every answer, and what they come to together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cdlm.core.checks import check_flag
from cdlm.core.errors import CdlmError
from cdlm.core.files import write_json, write_rows
from cdlm.core.inert import one_line
from cdlm.core.likelihood import LikelihoodSettings, Nats, Text
from cdlm.evaluation.likelihood import nats_of, shown_settings
from cdlm.evaluation.metrics.likelihood import Likelihood
from cdlm.evaluation.table import aligned_table
from cdlm.sampling.prompts import Message, Prompt, checked_answers, checked_prompts, encode_pair, text_of_prompt
from cdlm.sampling.session import Model, Session

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN = 20
"""Answers that the printed table shows."""


@dataclass(frozen=True)
class Total:
    """All answers together, by one measure, in nats."""

    name: str
    nats: float
    error: float | None
    """Standard error of the noise alone; None where each answer has a single draw."""
    nats_per_answer: float
    standard_error: float | None
    """Of the mean over answers, from how they differ; None of a single answer."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Minus the log-likelihood of answers, in their order."""

    prompts: Sequence[str]
    """A conversation is written as JSON."""
    answers: Sequence[str]
    nats: dict[str, Nats]
    """Of each answer, by measure: the bound, and of a continuous model the ODE if it was asked for."""
    summary: Likelihood
    """Per token and per character, over all answers."""
    made_by: Mapping[str, str]
    """Model, fingerprint of its weights where it is known, and version."""

    def __len__(self) -> int:
        return len(self.answers)

    def __repr__(self) -> str:
        return self.terminal()

    @property
    def totals(self) -> tuple[Total, ...]:
        """All answers together, by measure."""
        return tuple(_total(name, nats) for name, nats in self.nats.items())

    def rows(self) -> list[dict[str, Any]]:
        """A plain mapping for each answer and measure: nats with the standard error of their noise, and per token."""
        return [
            {
                "index": i, "likelihood": name, "nats": float(nats.total[i]), "error": _finite(nats.error[i].item()),
                "tokens": int(nats.positions[i]), **_per_token(nats, i), "prompt": self.prompts[i],
                "answer": self.answers[i],
            }
            for i in range(len(self))
            for name, nats in self.nats.items()
        ]  # fmt: skip

    def to_pandas(self) -> DataFrame:
        """The rows as a table of pandas."""
        from pandas import DataFrame

        return DataFrame(self.rows())

    def save(self, folder: str | Path) -> None:
        """Write `answers.json`, which has everything, and `answers.csv`, its rows, each whole or not at all."""
        totals = [asdict(total) for total in self.totals]
        everything = {**asdict(self.summary), "totals": totals, "made_by": self.made_by, "answers": self.rows()}
        write_json(Path(folder) / "answers.json", everything)
        write_rows(Path(folder) / "answers.csv", self.rows())

    def terminal(self) -> str:
        """The first answers and the sums, as aligned plain text."""
        head = ["answer", "likelihood", "tokens", "nats", "± noise", "nats/token", "± noise", "text"]
        rows = self.rows()
        lines = [_line(row) for row in rows if row["index"] < SHOWN]
        width = max(len(line[-1]) for line in lines)
        table = aligned_table([[*line[:-1], line[-1].ljust(width)] for line in [head, *lines]])
        more = [f"... and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        totals = [_said(total) for total in self.totals]
        return "\n".join([table, *more, "", *totals, "", self.summary.terminal()])


def likelihood_of_answers(
    session: Session, prompts: Iterable[Prompt | Message], answers: Iterable[str], *, chat: bool = False,
    system: str | None = None, template: bool = True, settings: LikelihoodSettings | None = None,
) -> Answers:  # fmt: skip
    """How likely each answer is to follow its prompt, which is given and not scored.

    Args:
        session: the model, and the processes that it runs on.
        prompts, answers: as many of the one as of the other; see `cdlm.likelihood`.

    Raises:
        CdlmError: their numbers differ, one of them cannot be read, an answer says nothing or is longer than the
            model's rows, or the model has no likelihood, or not with these settings.
    """
    check_flag("what is asked", chat=chat, template=template)
    asked, said = checked_prompts(prompts, chat, system) or [], checked_answers(answers)
    if len(asked) != len(said):
        raise CdlmError(f"each prompt has one answer, got {len(asked)} prompts and {len(said)} answers")
    model = session.model
    tokenizer, how = model.need_tokenizer(), {"chat": chat, "template": template, "names": model.reads_names}
    pairs = [encode_pair(tokenizer, prompt, answer, **how) for prompt, answer in zip(asked, said, strict=True)]
    found = nats_of(session, text_of(pairs, model), settings := settings or LikelihoodSettings())
    tokens, chars = np.array([len(answer) for _, answer in pairs]), np.array([len(answer) for answer in said])
    summary = Likelihood.of(found, tokens, chars, shown_settings(settings, model.precision), "answers")
    made_by = {name: session.description[name] for name in ("model", "weights", "version")}
    return Answers([text_of_prompt(prompt) or "" for prompt in asked], said, found, summary, made_by)


def text_of(pairs: Sequence[tuple[list[int], list[int]]], model: Model) -> Text:
    """Prompts and answers as rows that end with padding, in which the answers are scored.

    Raises:
        CdlmError: an answer has no tokens, or a row has more than the model's length.
    """
    for number, (prompt, answer) in enumerate(pairs, 1):
        if not answer:
            raise CdlmError(f"answer {number} has no tokens: there is nothing to score")
        if model.length and len(prompt) + len(answer) > model.length:
            raise CdlmError(
                f"prompt and answer {number} have {len(prompt)} + {len(answer)} tokens, and the model's length is"
                f" {model.length}: shorten one of them"
            )
    begins = torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]
    ends = begins + torch.tensor([len(answer) for _, answer in pairs])[:, None]
    place = torch.arange(int(ends.max()))
    tokens = torch.zeros(len(pairs), len(place), dtype=torch.int64)
    for row, (prompt, answer) in zip(tokens, pairs, strict=True):
        row[: len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
    valid = place < ends
    return Text(tokens, valid & (place >= begins), valid, torch.arange(len(pairs))[:, None])


def _total(name: str, nats: Nats) -> Total:
    count, total = len(nats.total), nats.total
    spread = float(total.std()) / math.sqrt(count) if count > 1 else None
    return Total(
        name, float(total.sum()), _finite(float(nats.error.square().sum().sqrt())), float(total.mean()), spread
    )


def _per_token(nats: Nats, i: int) -> dict[str, float | None]:
    count = int(nats.positions[i])
    per = float(nats.total[i]) / count if count else None
    return {"nats_per_token": per, "error_per_token": _finite(nats.error[i].item() / count) if count else None}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(row: dict[str, Any], width: int = 48) -> list[str]:
    text = one_line(row["answer"])
    numbers = [_number(row[name]) for name in ("nats", "error", "nats_per_token", "error_per_token")]
    text = text if len(text) <= width else f"{text[: width - 3]}..."
    return [str(row["index"]), row["likelihood"], str(row["tokens"]), *numbers, text]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _said(total: Total) -> str:
    noise = "" if total.error is None else f" ± {total.error:.4f} (noise)"
    each = "" if total.standard_error is None else f" ± {total.standard_error:.4f} (over answers)"
    return f"{total.name}: {total.nats:.4f}{noise} nats in all, {total.nats_per_answer:.4f}{each} an answer"
