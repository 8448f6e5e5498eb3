"""What studies of answers share: problems that have one right answer each, and their marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cdlm.core.answers import number_of
from cdlm.data.arithmetic import Problem, problems
from cdlm.data.gsm8k import read_problems
from cdlm.studies.study import Study


@dataclass(frozen=True, kw_only=True)
class Answering(Study):
    """A study of models that solve problems.

    Args:
        new_tokens: of a masked model, positions after each prompt; by default the rest of its row, which a continuous
            one always fills. A model that was trained on rows of one length answers worse in shorter ones.
        problems: JSONL file in the format of GSM8K; without one, generated arithmetic that no training split holds.
        steps: difficulties of the generated problems.
        largest: of their numbers.
        seed: of the generated problems.
        separator: what stands between prompt and answer.
    """

    new_tokens: int | None
    problems: Path | None
    steps: list[int]
    largest: int
    seed: int
    separator: str

    @cached_property
    def tasks(self) -> list[Problem]:
        """The problems."""
        if self.problems is not None:
            return read_problems(self.problems)[: self.n]
        return list(problems(self.n, self.seed, "valid", tuple(self.steps), self.largest))

    @property
    def prompts(self) -> list[str]:
        """What is put to a model."""
        return [problem.prompt + self.separator for problem in self.tasks]


def marks(answers: Sequence[str | None], tasks: Sequence[Problem]) -> Float[np.ndarray, " m"]:
    """1.0 where an answer is right."""
    expected = (number_of(problem.answer) for problem in tasks)
    return np.array([one == other for one, other in zip(answers, expected, strict=True)], np.float64)
