"""Texts to measure: read from files of any origin, and a run's held-out text to set beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdlm.core.errors import CdlmError
from cdlm.data.sources import Source, csv_rows, jsonl_rows, parquet_rows, text_of, txt_documents
from cdlm.data.store import PackedRows, TextRows
from cdlm.data.tokenizer import encode_batch
from cdlm.sampling import texts as decoding
from cdlm.sampling.texts import special_of, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Value = str | int | float | None
Spans = list[list[tuple[int, int]]]
"""For each text, the [start, end) character spans that were given (a prompt), not generated."""


@dataclass(frozen=True)
class Corpus:
    """Texts of one origin, in the order of their tokens.

    Attributes:
        name: heading of the row.
        tokens: the generator's own token ids of each text, without padding.
        texts: the decoded texts.
        given: character spans of each text that came from a prompt and are not scored; None for no prompts.
        nfe: model calls spent on each text; None where nothing was generated, or the calls are not known.
        extra: more columns of this row, by name (grammar rate, steps, ...).
    """

    name: str
    tokens: list[list[int]]
    texts: list[str]
    given: Spans | None = None
    nfe: list[int] | None = None
    extra: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("tokens", "given", "nfe"):
            part = getattr(self, what)
            if part is not None and len(part) != len(self.texts):
                count = len(self.texts)
                raise CdlmError(f"expected {what} for each of the {count} texts of {self.name!r}, got {len(part)}")

    def first(self, count: int) -> Corpus:
        """The first `count` texts with all that belongs to them."""
        return replace(
            self,
            tokens=self.tokens[:count],
            texts=self.texts[:count],
            given=None if self.given is None else self.given[:count],
            nfe=None if self.nfe is None else self.nfe[:count],
        )

    def shuffled(self, decode: Callable[[list[int]], str], seed: int) -> Corpus:
        """The same tokens in random order inside each text; scored whole, since no prompt stays in its place."""
        draw = np.random.default_rng(seed)
        tokens = [draw.permutation(np.array(line, dtype=np.int64)).tolist() for line in self.tokens]
        return Corpus(f"{self.name}, tokens shuffled", tokens, [decode(line) for line in tokens])


# --- files of texts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One text of a file, and what the file knows of how it was made; None where it knows nothing.

    Attributes:
        tokens: ids of the generator.
        given: [start, end) characters of the text that came from a prompt.
        nfe: calls of the model.
        budget: steps of the full run.
        reason: why the sample was returned, a name of `HaltReason` in lower case.
    """

    text: str
    tokens: list[int] | None = None
    given: list[tuple[int, int]] | None = None
    nfe: int | None = None
    budget: int | None = None
    reason: str | None = None


def read_texts(path: Path) -> list[Entry]:
    """The texts of a file: .jsonl with a field `text` a line, .csv or .parquet with such a column, or .txt.

    A .txt holds one text a line, and blank lines are skipped. In the others the further fields of `Entry` are read
    where they are there, as in the files that `cdlm sample --out` writes.

    Raises:
        CdlmError: the file cannot be read, is of another kind, or holds no text; or a field holds something else.
    """
    if path.suffix not in READERS:
        kinds = f"{', '.join(READERS)}"
        raise CdlmError(f"cannot read samples from {path}: expected one of {kinds}, got {path.suffix or 'no ending'!r}")
    try:
        found = [_entry(row, place) for place, row in READERS[path.suffix](path)]
    except OSError as error:
        raise CdlmError(
            f"cannot read samples from {path} ({error.strerror or error}): name a file of texts, such as cdlm sample"
            " --out writes"
        ) from error
    if not found:
        raise CdlmError(f"{path} holds no texts: write one a line, or draw some with cdlm sample --out")
    return found


def _txt(path: Path) -> Iterator[tuple[str, Any]]:
    lines = enumerate(txt_documents(path, "line"), 1)
    return ((f"{path}, line {number}", {"text": line}) for number, line in lines if line.strip())


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Lists and numbers stand in the cells as JSON; an empty cell is nothing."""
    for place, row in csv_rows(path, "text"):
        yield place, {name: cell if name == "text" else _from_cell(name, cell) for name, cell in row.items()}


def _from_cell(name: str, cell: Any) -> Any:
    if not cell or name not in FIELDS or name == "reason":
        return cell or None
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell  # the check of the field says what is wrong with it


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    return parquet_rows(path, ("text", *FIELDS))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": jsonl_rows, ".txt": _txt, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip
"""Rows of a file with their place, by the ending of its name."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_spans(value: Any) -> bool:
    return isinstance(value, list) and all(_is_tokens(span) and len(span) == 2 for span in value)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokens": (_is_tokens, "a list of token ids"),
    "given": (_is_spans, "a list of [start, end] characters"),
    "nfe": (_is_count, "a whole number"),
    "budget": (_is_count, "a whole number"),
    "reason": (lambda value: isinstance(value, str), "a text"),
}
"""What an `Entry` has beside its text: how to tell that it is right, and what it is."""


def _entry(row: Any, place: str) -> Entry:
    text = text_of(row, "text", place)
    known = {name: row[name] for name in FIELDS if row.get(name) is not None}
    for name, value in known.items():
        is_right, what = FIELDS[name]
        if not is_right(value):
            raise CdlmError(f"{place}: expected {what} in {name!r}, got {value!r:.60}; leave the field out or mend it")
    if "given" in known:
        known["given"] = [(start, end) for start, end in known["given"]]
    return Entry(text, **known)


# --- held-out text ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of a run, by which samples and models are measured.

    Args:
        rows: tokens as the model is trained on them.
        tokenizer: of the run.
        source: where the text is from; it may have a measure of its own.
    """

    rows: TextRows
    tokenizer: PreTrainedTokenizerFast
    source: Source

    @property
    def eos_id(self) -> int | None:
        """The token that ends the text of a row; None where rows are cut from joined documents."""
        return None if isinstance(self.rows, PackedRows) else special_of(self.tokenizer).eos_id

    def decode(self, ids: list[int]) -> str:
        """The text of tokens; the end-of-text token is a line break."""
        return decoding.text_of(self.tokenizer, ids)

    def corpora(self, count: int) -> tuple[Corpus, Corpus]:
        """Two disjoint sets of `count` rows: one to judge, one for MAUVE to compare with.

        Raises:
            CdlmError: there is less text.
        """
        if len(self.rows) < 2 * count:
            raise CdlmError(
                f"evaluating {count} samples needs {2 * count} rows of held-out text, there are {len(self.rows)}:"
                " take fewer samples, or hold out more text"
            )
        rows = [self.rows[i] for i in range(2 * count)]  # neighbours stay together: one document may be in both sets
        tokens = [text_ids(row.tokens[row.valid].tolist(), self.eos_id) for row in rows]
        texts = [self.decode(ids) for ids in tokens]
        first = Corpus("real text", tokens[:count], texts[:count], extra=self.source.measures(texts[:count]))
        return first, Corpus("more real text", tokens[count:], texts[count:])

    def corpus(self, name: str, entries: Sequence[Entry]) -> Corpus:
        """Texts of a file as a row of the table. What some of them do not know is left blank.

        Texts without tokens get those of the run's tokenizer.
        """
        texts = [entry.text for entry in entries]
        bare = iter(encode_batch(self.tokenizer, [entry.text for entry in entries if entry.tokens is None] or [""]))
        tokens = [next(bare) if entry.tokens is None else entry.tokens for entry in entries]
        nfe, budgets, reasons = ([getattr(entry, name) for entry in entries] for name in ("nfe", "budget", "reason"))
        return Corpus(
            name,
            tokens,
            texts,
            [entry.given or [] for entry in entries],
            None if None in nfe else nfe,
            {
                "steps": None if None in budgets else max(budgets),
                "halted": None if None in reasons else reasons.count("criterion") / len(reasons),
                **self.source.measures(texts),
            },
        )
