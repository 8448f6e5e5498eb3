"""Texts to measure: read from files of any origin, and a run's real text to set beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints

import numpy as np
from jaxtyping import Int64
from msgspec import Meta

from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.schema import Whole, checked
from cdlm.data import arithmetic
from cdlm.data.sources import Source, csv_rows, jsonl_rows, parquet_rows, text_of, txt_documents
from cdlm.data.store import PackedRows, TextRows, TokenStore
from cdlm.data.tokenizer import encode_batch
from cdlm.evaluation.metrics.copying import Runs
from cdlm.sampling import texts as decoding
from cdlm.sampling.samples import Samples
from cdlm.sampling.texts import special_of, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Value = str | int | float | None
Token = Annotated[int, Meta(ge=0, lt=2**31)]
Spans = list[list[tuple[int, int]]]
"""For each text, the [start, end) character spans that were given (a prompt), not generated."""


PARTS = ("tokens", "given", "generated", "lengths", "nfe")
"""Lists of a corpus with an entry for each text."""


@dataclass(frozen=True)
class Corpus:
    """Texts of one origin, in the order of their tokens.

    Attributes:
        name: heading of the row.
        tokens: the generator's own token ids of each text, without padding.
        texts: the decoded texts.
        given: character spans of each text that came from a prompt and are not scored; None for no prompts.
        generated: token spans of each text that did not come from a prompt; None where that is not known.
        lengths: positions that the model had for each text; None where that is not known.
        nfe: model calls spent on each text; None where nothing was generated, or the calls are not known.
        extra: more columns of this row, by name (grammar rate, steps, ...).
        serial: texts stand in the order of a file, where neighbours may belong together: intervals draw blocks of them.
        foreign: some of the texts came without tokens, which were made here.
    """

    name: str
    tokens: list[list[int]]
    texts: list[str]
    given: Spans | None = None
    generated: Spans | None = None
    lengths: list[int] | None = None
    nfe: list[int] | None = None
    extra: Mapping[str, Value] = field(default_factory=dict)
    serial: bool = False
    foreign: bool = False

    def __post_init__(self) -> None:
        for what in PARTS:
            part = getattr(self, what)
            if part is not None and len(part) != len(self.texts):
                count = len(self.texts)
                raise CdlmError(f"expected {what} for each of the {count} texts of {self.name!r}, got {len(part)}")

    def first(self, count: int | None) -> Corpus:
        """The first texts with all that belongs to them; all of them if `count` is None."""
        return self._of(range(len(self.texts))[:count])

    def some(self, count: int, seed: int) -> Corpus:
        """`count` texts drawn at random, in their order, with all that belongs to them.

        Raises:
            CdlmError: there are fewer.
        """
        if count > len(self.texts):
            raise CdlmError(f"expected at least {count} texts in {self.name!r}, got {len(self.texts)}; give more texts")
        if count == len(self.texts):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.texts))[:count]).tolist()
        return self._of(chosen)

    def _of(self, chosen: Sequence[int]) -> Corpus:
        parts = {name: getattr(self, name) for name in ("texts", *PARTS)}
        return replace(self, **{name: part and [part[i] for i in chosen] for name, part in parts.items()})

    @property
    def prompted(self) -> bool:
        """Whether a part of some text was given."""
        return any(self.given or [])

    @property
    def whole(self) -> bool:
        """Whether these are texts from nothing that had equally many positions, as rows of real text have."""
        return not self.prompted and len(set(self.lengths or [])) <= 1

    def made(self) -> list[list[int]]:
        """The tokens of each text that were generated: all of them where nothing was given.

        Raises:
            CdlmError: texts with prompts that do not say it.
        """
        if not self.prompted:
            return self.tokens
        if self.generated is None:
            raise CdlmError(
                f"the texts of {self.name!r} have prompts, and which tokens were generated is not known: draw them"
                " again with cdlm sample --out, or measure them beside the text of the run that drew them"
            )
        return [
            [token for start, end in spans for token in line[start:end]]
            for line, spans in zip(self.tokens, self.generated, strict=True)
        ]

    def shuffled(self, decode: Callable[[list[int]], str], seed: int) -> Corpus:
        """The same tokens in random order inside each text; scored whole, since no prompt stays in its place."""
        draw = np.random.default_rng(seed)
        tokens = [draw.permutation(np.array(line, dtype=np.int64)).tolist() for line in self.tokens]
        texts = [decode(line) for line in tokens]
        return Corpus("tokens shuffled", tokens, texts, serial=self.serial, foreign=self.foreign)

    def salad(self, decode: Callable[[list[int]], str], seed: int) -> Corpus:
        """Tokens drawn at random from all tokens of these texts, in texts of the same lengths."""
        draw = np.random.default_rng(seed)
        all_tokens = np.array([token for line in self.tokens for token in line], dtype=np.int64)
        tokens = [draw.choice(all_tokens, len(line)).tolist() if line else [] for line in self.tokens]
        return Corpus("unigram salad", tokens, [decode(line) for line in tokens], foreign=self.foreign)


# --- files of texts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One text of a file, and what the file knows of how it was made; None where it knows nothing.

    Attributes:
        tokens: ids of the generator.
        given: [start, end) characters of the text that came from a prompt.
        generated: [start, end) tokens that did not.
        length: positions that the model had for it.
        nfe: calls of the model.
        budget: steps of the full run.
        reason: why the sample was returned, a name of `HaltReason` in lower case.
        seed, index: of the sample's noise.
        sampling: how it was sampled.
        halt: the halting rule.
        answer: the right one, of a problem.
    """

    text: str
    tokens: list[Token] | None = None
    given: list[tuple[Whole, Whole]] | None = None
    generated: list[tuple[Whole, Whole]] | None = None
    length: Whole | None = None
    nfe: Whole | None = None
    budget: Whole | None = None
    reason: Literal["criterion", "full", "budget"] | None = None
    seed: Whole | None = None
    index: Whole | None = None
    sampling: str | None = None
    halt: str | None = None
    answer: str | None = None


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
            f"cannot read samples from {path} ({error.strerror or first_line(error)}): name a file of texts, such as"
            " cdlm sample --out writes"
        ) from error
    if not found:
        raise CdlmError(f"{path} holds no texts: write one a line, or draw some with cdlm sample --out")
    return found


def entries_of(texts: Samples | Sequence[str], name: str) -> list[Entry]:
    """Samples, or plain texts, as entries. Of plain texts nothing is known but the text.

    Raises:
        CdlmError: there are none, or they are no texts.
    """
    if isinstance(texts, str) or not isinstance(texts, Samples | Sequence) or not len(texts):
        raise CdlmError(f"expected samples or a list of texts in {name}, got {shown(texts)}: draw some with generate")
    if not isinstance(texts, Samples) and (wrong := [text for text in texts if not isinstance(text, str)]):
        raise CdlmError(f"expected texts in {name}, got {shown(wrong[0])} among them: leave it out")
    rows: Sequence[Any] = texts.rows() if isinstance(texts, Samples) else [{"text": text} for text in texts]
    return [_entry(row, f"{name}, text {number}") for number, row in enumerate(rows)]


def _txt(path: Path) -> Iterator[tuple[str, Any]]:
    lines = enumerate(txt_documents(path, "line"), 1)
    return ((f"{path}, line {number}", {"text": line}) for number, line in lines if line.strip())


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Lists and numbers stand in the cells as JSON; an empty cell is nothing."""
    for place, row in csv_rows(path, "text"):
        yield place, {name: cell if name == "text" else _from_cell(name, cell) for name, cell in row.items()}


def _from_cell(name: str, cell: Any) -> Any:
    if not cell or name not in FIELDS or name in ("reason", "sampling", "halt", "answer"):
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


FIELDS: Mapping[str, Any] = {
    name: kind for name, kind in get_type_hints(Entry, include_extras=True).items() if name != "text"
}
"""What an `Entry` has beside its text, and its kind."""
COMMON = frozenset({"reason", "seed", "index", "sampling", "halt", "generated", "length", "answer"})
"""Fields whose names others use for other things: what is not right in them is passed over."""
_OWN = {name: kind for name, kind in FIELDS.items() if name not in COMMON}
OWN: Any = TypedDict("OWN", _OWN, total=False)  # pyright: ignore
"""The other fields."""
ADVICE = "leave the field out or mend it"
INSIDE = 3
"""Characters by which spans of a text may be off: a token may end inside of one, which then is up to this many."""


def _entry(row: Any, place: str) -> Entry:
    text = text_of(row, "text", place)
    known = dict(checked({name: row[name] for name in FIELDS.keys() - COMMON if name in row}, OWN, place, ADVICE))
    for name in COMMON & row.keys():
        with suppress(CdlmError):
            known[name] = checked(row[name], FIELDS[name], place, ADVICE)
    if not arithmetic.is_number(known.get("answer")):
        known.pop("answer", None)
    return _fitting(Entry(text, **known), place)


def _fitting(entry: Entry, place: str) -> Entry:
    """The same, whose parts were found to be of one text."""
    if entry.given is not None:
        entry = replace(entry, given=_ordered(entry.given, len(entry.text), INSIDE, f"{place}, given"))
    if entry.tokens is None:  # what the others then mean is not known
        return replace(entry, generated=None)
    count = len(entry.tokens)
    if entry.length is not None and entry.length < count:
        raise CdlmError(f"{place}, 'length': expected at least its {count} tokens, got {entry.length}; {ADVICE}")
    if entry.generated is None:
        return entry
    return replace(entry, generated=_ordered(entry.generated, count, 0, f"{place}, generated"))


def _ordered(spans: list[tuple[int, int]], end: int, off: int, place: str) -> list[tuple[int, int]]:
    """Spans that rise, and end by `end`; they may be `off` by so much."""
    made, before = list[tuple[int, int]](), 0
    for start, stop in spans:
        if start < before - off or stop < start - off or stop > end + off:
            raise CdlmError(f"{place}: expected spans that rise to {end} at most, got [{start}, {stop}]; {ADVICE}")
        first = min(max(start, before), end)
        before = min(max(stop, first), end)
        made.append((first, before))
    return made


# --- real text -------------------------------------------------------------------------------------------------------

Part = Literal["held out", "like training"]
REAL: dict[Part, str] = {"held out": "real text, held out", "like training": "real text, like the training text"}
"""Names of the rows of real text."""

LONGEST = 8
"""Rows that are drawn together, at most. A longer document counts as several: a few whole ones are no sample."""


@dataclass(frozen=True)
class RealText:
    """The real text of a run, by which samples and models are measured.

    A file is often sorted, so rows that stand beside each other are alike. Rows are therefore drawn at random, and the
    rows of a document are drawn together. A document of more than `LONGEST` rows counts as several.

    Args:
        held_out: the validation split, in rows as the model is trained on them.
        unread: documents of the training split that neither the generator nor the small judge reads, in the same rows;
            None if there are none.
        tokenizer: of the run.
        source: where the text is from; it may have a measure of its own.
        trained: what the generator was trained on, to look for copies in; None where that is not known.
    """

    held_out: TextRows
    unread: TextRows | None
    tokenizer: PreTrainedTokenizerFast
    source: Source
    trained: TokenStore | None = None

    @cached_property
    def _runs(self) -> Runs | None:
        return None if self.trained is None else Runs.of(self.trained, self._shown_end)

    def copied(self, corpus: Corpus) -> float | None:
        """Share of the tokens that stand word for word in the training text, see `metrics.copying`; None of texts with
        given parts, whose generated pieces are no texts, and where the training text is not known. The end of a text
        counts as the line break that it is shown as."""
        if self.trained is None or self._runs is None or corpus.prompted:
            return None
        end, shown_end = self.trained.eos_id, self._shown_end
        texts = [[shown_end if token == end else token for token in tokens] for tokens in corpus.tokens]
        return self._runs.copied(texts)

    @cached_property
    def _shown_end(self) -> int:
        """What the end of a text counts as: the token of a line break, or itself if a break is several tokens."""
        assert self.trained is not None
        found = encode_batch(self.tokenizer, ["\n"])[0]
        return found[0] if len(found) == 1 else self.trained.eos_id

    @property
    def eos_id(self) -> int | None:
        """The token that ends the text of a row; None where rows are cut from joined documents."""
        return None if isinstance(self.held_out, PackedRows) else special_of(self.tokenizer).eos_id

    def decode(self, ids: list[int]) -> str:
        """The text of tokens; the end-of-text token is a line break."""
        return decoding.text_of(self.tokenizer, ids)

    def rows(self, part: Part) -> TextRows:
        """All rows of a part.

        Raises:
            CdlmError: the run has no such part.
        """
        if part == "held out":
            return self.held_out
        if self.unread is None:
            raise CdlmError(
                "this run has no text like its training text that nobody read: train one with unread_share above 0"
            )
        return self.unread

    @property
    def reference_part(self) -> Part:
        """What sets of samples are compared with: text like the training text if there is any."""
        return "held out" if self.unread is None else "like training"

    @property
    def reference(self) -> TextRows:
        """The rows of `reference_part`."""
        return self.rows(self.reference_part)

    @property
    def most(self) -> int:
        """Rows on each side of a split of the reference, at most."""
        starts = _starts(self.reference)
        longest = int(np.diff(starts, append=len(self.reference)).max())
        return (len(self.reference) - longest + 1) // 2  # in the worst order, the first side cuts the longest

    def sample(self, rows: TextRows, count: int, seed: int = 0) -> list[int]:
        """The numbers of `count` rows, in the order of the text; those of fewer rows are among those of more.

        Raises:
            CdlmError: there are fewer.
        """
        if not 0 < count <= len(rows):
            raise CdlmError(
                f"expected 1 to {len(rows)} rows of real text, for that is what there is, got {count}: take fewer"
                " samples, or set more text aside"
            )
        return _draw(rows, (count,), seed)[0]

    def corpus(self, part: Part, count: int, seed: int = 0) -> Corpus:
        """A sample of `count` rows of a part, as texts.

        Raises:
            CdlmError: the run has no such part, or it has fewer rows.
        """
        rows = self.rows(part)
        corpus = self._texts(REAL[part], rows, self.sample(rows, count, seed))
        return replace(corpus, extra=self.source.measures(corpus.texts))

    def splits(self, count: int, times: int = 5, seed: int = 0) -> list[tuple[Corpus, Corpus]]:
        """Random splits of the reference into two sides of `count` rows each. The rows that begin in one document of
        `LONGEST` rows or fewer are on one side; a row that is cut from several documents goes with its first.

        Raises:
            CdlmError: there are fewer than `count` rows a side, see `most`.
        """
        rows, most = self.reference, self.most
        if not 0 < count <= most:
            raise CdlmError(
                f"two sides of {count} rows need more real text than there is: it has {len(rows)} rows, enough for"
                f" {most} a side; take fewer samples, or set more text aside"
            )
        name = REAL[self.reference_part]
        sides = [_draw(rows, (count, count), (seed, number)) for number in range(1, times + 1)]
        return [(self._texts(name, rows, left), self._texts(name, rows, right)) for left, right in sides]

    def _texts(self, name: str, rows: TextRows, numbers: Sequence[int]) -> Corpus:
        found = [rows[number] for number in numbers]
        tokens = [text_ids(row.tokens[row.valid].tolist(), self.eos_id) for row in found]
        return Corpus(name, tokens, [self.decode(ids) for ids in tokens], serial=True)

    def samples(self, name: str, entries: Sequence[Entry]) -> Corpus:
        """Texts of a file as a row of the table. What some of them do not know is left blank.

        Texts without tokens, and those whose tokens are of another tokenizer, get those of the run's tokenizer. `right`
        is the share of problems that are solved.
        """
        entries = [self._with_own_tokens(entry) for entry in entries]
        texts = [entry.text for entry in entries]
        bare = iter(encode_batch(self.tokenizer, [entry.text for entry in entries if entry.tokens is None] or [""]))
        tokens = [next(bare) if entry.tokens is None else entry.tokens for entry in entries]
        nfe, budgets, reasons, generated, lengths, answers = (
            [getattr(entry, name) for entry in entries]
            for name in ("nfe", "budget", "reason", "generated", "length", "answer")
        )
        return Corpus(
            name,
            tokens,
            texts,
            [entry.given or [] for entry in entries],
            None if None in generated else generated,
            None if None in lengths else lengths,
            None if None in nfe else nfe,
            {
                "steps": None if None in budgets else max(budgets),
                "halted": None if None in reasons else reasons.count("criterion") / len(reasons),
                **({} if None in answers else {"right": float(arithmetic.right(texts, answers).mean())}),
                **self.source.measures(texts),
            },
            foreign=any(entry.tokens is None for entry in entries),
        )

    def _with_own_tokens(self, entry: Entry) -> Entry:
        """The same, without tokens if they do not say its text in the run's tokenizer."""
        tokens = entry.tokens
        if tokens is None or (max(tokens, default=0) < len(self.tokenizer) and self.decode(tokens) == entry.text):
            return entry
        return replace(entry, tokens=None, generated=None)


def _draw(rows: TextRows, counts: Sequence[int], seed: int | tuple[int, ...]) -> list[list[int]]:
    """Disjoint sets of so many rows: documents in random order, and of the last one of each set what is needed."""
    starts = _starts(rows)
    ends = np.append(starts[1:], len(rows))
    order = np.random.default_rng(seed).permutation(len(starts))
    sets = list[list[int]]()
    for count in counts:
        used = int(np.searchsorted(np.cumsum((ends - starts)[order]), count)) + 1
        taken = [row for i in order[:used] for row in range(int(starts[i]), int(ends[i]))]
        sets.append(sorted(taken[:count]))
        order = order[used:]
    return sets


def _starts(rows: TextRows) -> Int64[np.ndarray, " k"]:
    """The first row of each document, or of each stretch of a long one."""
    changes = np.flatnonzero(np.diff(rows.documents(), prepend=-1))
    inside = np.arange(len(rows)) - np.repeat(changes, np.diff(changes, append=len(rows)))
    return np.flatnonzero(inside % LONGEST == 0)
