"""Word problems in the format of GSM8K (Cobbe et al., arXiv 2110.14168): a question and a worked answer a line.

The answer's lines are the reasoning, with calculator annotations such as `<<16-3-4=9>>`; the last one is "#### 9".
"""

import re
from pathlib import Path

from cdlm.core.answers import MARK, answer_of
from cdlm.core.errors import CdlmError
from cdlm.data.arithmetic import Problem
from cdlm.data.sources import jsonl_rows, text_of

_ANNOTATION = re.compile(r"<<[^<>]*>>")


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a JSONL file with the fields `question` and `answer`, in order.

    The question becomes one line, for the first line break of a document ends its prompt. The reasoning keeps its
    lines, without annotations and blank lines. The answer is a number as `answer_of` writes it.

    Raises:
        CdlmError: The file cannot be read or holds no problem, or a line is no such problem: the message says which.
    """
    path = Path(path)
    try:
        found = [_problem(text_of(row, "question", at), text_of(row, "answer", at), at) for at, row in jsonl_rows(path)]
    except OSError as error:
        raise CdlmError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    if not found:
        raise CdlmError(f"{path}: expected one problem a line, found none in the whole file; remove it or fill it")
    return found


def _problem(question: str, worked: str, place: str) -> Problem:
    if (question + worked).count(MARK) != 1 or (answer := answer_of(worked)) is None:
        raise CdlmError(f"{place}: expected one {MARK!r} with a number after it in the answer, got {worked[-60:]!r}")
    reasoning = (_line(line) for line in _ANNOTATION.sub("", worked.partition(MARK)[0]).splitlines())
    prompt, steps = _line(question), "\n".join(line for line in reasoning if line)
    if not prompt or not steps:
        missing = "reasoning in the answer" if prompt else "question"
        raise CdlmError(f"{place}: expected a {missing}, got blanks; fill or remove the line")
    return Problem(prompt, steps, answer)


def _line(text: str) -> str:
    """The words of a text on one line."""
    return " ".join(text.split())
