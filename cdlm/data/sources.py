"""Where text comes from: English shipped with Python, generated stories and problems, files, the Hugging Face Hub."""

import ast
import csv
import glob
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Literal

from cdlm.core.checks import MOST_ROWS, Settings, check_number, check_whole, shown
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import check_ends
from cdlm.core.parsing import Registry
from cdlm.data import arithmetic
from cdlm.data.stories import grammar_fingerprint, is_sentence, stories, whole_sentences

Split = Literal["train", "valid"]
SampleBy = Literal["line", "paragraph", "document"]


class Source(Settings, ABC):
    """A corpus of documents in two splits. Reading a split twice gives the same documents in the same order."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, none of them blank."""

    @abstractmethod
    def fingerprint(self) -> str:
        """64 hex digits that change when the settings or the data change."""

    def measures(self, texts: Sequence[str]) -> dict[str, float]:
        """What only this source can measure of generated texts, by name; of most sources nothing."""
        return {}


@dataclass(frozen=True)
class Stdlib(Source):
    """English technical prose that every Python has on disk: the help topics and the standard library's docstrings.

    The docstrings are parsed out of the source files, without importing them; tests are left out, and so are
    docstrings of under 40 characters and repeated ones. The text differs a little between Python versions.

    Attributes:
        valid_fraction: Share of documents held out, in (0, 0.5].
    """

    valid_fraction: float = 0.05

    def __post_init__(self) -> None:
        _check_fraction(type(self).__name__, self.valid_fraction)

    def documents(self, split: Split) -> Iterator[str]:
        """Help topics first, then docstrings by path and place in the file."""
        advice = "this Python is installed without its library's source; use stories or files"
        return _hold_out(_unique(chain(_topics(), _docstrings())), split, self.valid_fraction, advice)

    def fingerprint(self) -> str:
        """A hash of the settings and the exact Python build."""
        return _digest("stdlib", asdict(self), sys.version)


@dataclass(frozen=True)
class Stories(Source):
    """Short English stories from a seeded grammar, small enough to be learned in minutes on a laptop.

    Attributes:
        n: Stories in the training split; the validation split has n // 20 (at least one) of its own.
        seed: Fixes both splits.
    """

    n: int = 20000
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("Stories", largest=MOST_ROWS, n=self.n)
        check_whole("Stories", least=0, seed=self.seed)

    def documents(self, split: Split) -> Iterator[str]:
        """One story a document."""
        if split == "train":
            return stories(self.n, 2 * self.seed)
        return stories(max(1, self.n // 20), 2 * self.seed + 1)

    def fingerprint(self) -> str:
        """A hash of the settings and the grammar."""
        return _digest("stories", asdict(self), grammar_fingerprint())

    def measures(self, texts: Sequence[str]) -> dict[str, float]:
        """`grammar`: share of the whole sentences that are sentences of the grammar, 0..1."""
        whole = [sentence for text in texts for sentence in whole_sentences(text)]
        return {"grammar": sum(map(is_sentence, whole)) / max(1, len(whole))}


@dataclass(frozen=True)
class Arithmetic(Source):
    """Arithmetic word problems with reasoning and answer, one a document: `cdlm.data.arithmetic`.

    Made for rows of one document each and the masking law `Completion()`. The splits share no calculation.

    Attributes:
        n: Problems in the training split; the validation split has n // 20 (at least one).
        seed: Fixes both splits.
        steps: Difficulties, numbers of equations, that take turns.
        largest: No number is above it, 10 to 99.
    """

    n: int = 100_000
    seed: int = 0
    steps: tuple[int, ...] = (1, 2, 3)
    largest: int = arithmetic.LARGEST

    def __post_init__(self) -> None:
        check_whole("Arithmetic", largest=MOST_ROWS, n=self.n)
        check_whole("Arithmetic", least=0, seed=self.seed)
        arithmetic.check_steps(self.steps)
        arithmetic.check_largest(self.largest)

    def documents(self, split: Split) -> Iterator[str]:
        """One problem a document: the prompt, a line break, the reasoning and the answer."""
        count = self.n if split == "train" else max(1, self.n // 20)
        return (problem.document for problem in arithmetic.problems(count, self.seed, split, self.steps, self.largest))

    def fingerprint(self) -> str:
        """A hash of the settings and the grammar."""
        return _digest("arithmetic", asdict(self), arithmetic.grammar_fingerprint())


@dataclass(frozen=True)
class Files(Source):
    """Text files in UTF-8: .txt, .jsonl, .csv (with a header) or .parquet. Blank documents are dropped.

    Attributes:
        paths: Files or glob patterns (`**` goes into subfolders); the order of documents follows them.
        valid_paths: The same for the validation split; if there are none, every k-th document is held out.
        field: The key or column that holds the text, of all kinds but .txt.
        sample_by: What a document is in a .txt: a line, a paragraph (up to a blank line) or the whole file.
        valid_fraction: 1/k, in (0, 0.5]; unused with `valid_paths`.
    """

    paths: tuple[str, ...]
    valid_paths: tuple[str, ...] = ()
    field: str = "text"
    sample_by: SampleBy = "line"
    valid_fraction: float = 0.05

    def __post_init__(self) -> None:
        _check_fraction(type(self).__name__, self.valid_fraction)
        if not self.paths:
            raise CdlmError("Files: expected at least one path, got none")

    def documents(self, split: Split) -> Iterator[str]:
        """Documents in the order of the files, read when they are needed (one whole file for sample_by document)."""
        if self.valid_paths:
            return self._read(self.paths if split == "train" else self.valid_paths)
        advice = "give valid_paths, or split the text with sample_by line or paragraph"
        return _hold_out(self._read(self.paths), split, self.valid_fraction, advice)

    def fingerprint(self) -> str:
        """A hash of the settings and of each file's kind and content, not of where the files lie."""
        settings = asdict(self) | {"paths": _contents(self.paths), "valid_paths": _contents(self.valid_paths)}
        return _digest("files", settings)

    def _read(self, patterns: tuple[str, ...]) -> Iterator[str]:
        for path in _expand(patterns):
            empty = True
            try:
                for text in self._texts(path):
                    if text.strip():
                        empty = False
                        yield text
            except OSError as error:
                raise CdlmError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
            if empty:
                raise CdlmError(f"{path}: expected text, found none in the whole file; remove it or fill it")

    def _texts(self, path: Path) -> Iterator[str]:
        if path.suffix == ".txt":
            return txt_documents(path, self.sample_by)
        return (text_of(row, self.field, place) for place, row in _READERS[path.suffix](path, self.field))


@dataclass(frozen=True)
class Hub(Source):
    """A text column of a data set on the Hugging Face Hub (or of a local folder that `datasets` can read).

    Attributes:
        name, config, split, revision: As in `datasets.load_dataset`; pin the revision for a lasting result.
        valid_split: The split to validate on; if None, every k-th document of `split` is held out.
        streaming: Read over the network as needed instead of downloading first.
        field: The column that holds the text.
        valid_fraction: 1/k, in (0, 0.5]; unused with `valid_split`.
    """

    name: str
    config: str | None = None
    split: str = "train"
    valid_split: str | None = None
    revision: str | None = None
    streaming: bool = False
    field: str = "text"
    valid_fraction: float = 0.05

    def __post_init__(self) -> None:
        _check_fraction(type(self).__name__, self.valid_fraction)
        folder = Path(self.name)
        here = folder.is_absolute() or (folder.name and ".." not in folder.parts and folder.is_dir())
        if not here and not _HUB_NAME.fullmatch(self.name):
            raise CdlmError(
                f"Hub: expected the name of a data set, such as user/data, or a folder without .. in its path, got"
                f" {self.name!r}"
            )

    def documents(self, split: Split) -> Iterator[str]:
        """The column's texts in the order of the data set, blank ones dropped."""
        if self.valid_split is not None:
            return self._read(self.split if split == "train" else self.valid_split)
        advice = "give a valid_split"
        return _hold_out(self._read(self.split), split, self.valid_fraction, advice)

    def fingerprint(self) -> str:
        """A hash of the settings and of the data set's commit."""
        import datasets

        with self._explained():
            builder = datasets.load_dataset_builder(self.name, self.config, revision=self.revision)
        settings = asdict(self)
        del settings["streaming"]  # the same documents either way
        return _digest("hub", settings, builder.hash)

    def _read(self, split: str) -> Iterator[str]:
        import datasets

        with self._explained():
            rows = datasets.load_dataset(
                self.name, self.config, split=split, revision=self.revision, streaming=self.streaming
            )
            for number, row in enumerate(rows):
                text = text_of(row, self.field, f"data set {self.name}, row {number}")
                if text.strip():
                    yield text

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what `datasets` and the Hub client raise into one line of advice."""
        _check_folder(Path(self.name))
        try:
            yield
        except CdlmError:
            raise
        except Exception as error:  # the client, its HTTP library and the file readers each raise their own kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise CdlmError(
                f"data set {self.name!r} could not be loaded from the Hub ({reason}); check name, config and split; "
                "offline, set HF_HUB_OFFLINE=1 to use a cached copy, or save it as parquet or jsonl where there is a "
                "network and read that with Files"
            ) from error


_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


MOST_FILES = 10_000
"""Of a folder that `datasets` is to look through."""


def _check_folder(folder: Path) -> None:
    """Raise if a folder holds more than a data set does, such as all of a disk."""
    found = 0
    for _, folders, files in os.walk(folder):  # of no folder nothing
        found += len(folders) + len(files)
        if found > MOST_FILES:
            raise CdlmError(f"data set {str(folder)!r} is a folder of over {MOST_FILES:,} files: name its own folder")


def _check_fraction(source: str, fraction: float) -> None:
    check_number(source, above=0, most=0.5, hint="0.05 holds out every 20th document", valid_fraction=fraction)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hold_out(documents: Iterator[str], split: Split, fraction: float, advice: str) -> Iterator[str]:
    """Every k-th document for validation, k = 1/fraction, the rest for training; never an empty split."""
    head = list(islice(documents, 2))
    if len(head) < 2:
        raise CdlmError(f"expected two documents or more to hold some out for validation, got {len(head)}; {advice}")
    every = round(1 / fraction)
    for number, text in enumerate(chain(head, documents)):
        if (number % every == 1) == (split == "valid"):
            yield text


def _unique(documents: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in documents:
        if text not in seen:
            seen.add(text)
            yield text


# --- Python's own documentation -------------------------------------------------------------------------------------

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
_SHORTEST_DOCSTRING = 40


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions pack it separately
        return
    for name in sorted(topics):
        yield _tidy(topics[name])


def _docstrings() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
            for docstring in _docstrings_of(path.read_bytes()):
                if len(docstring) >= _SHORTEST_DOCSTRING:
                    yield docstring


def _docstrings_of(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files have escapes that newer Pythons complain about
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates that are not Python
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield _tidy(ast.get_docstring(node) or "")


def _tidy(text: str) -> str:
    """No trailing blanks, at most one empty line in a row."""
    lines = "\n".join(line.rstrip() for line in inspect.cleandoc(text).splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


# --- files ----------------------------------------------------------------------------------------------------------


def _expand(patterns: tuple[str, ...]) -> list[Path]:
    """The files the patterns stand for, each once, of known kinds."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        literal = Path(pattern).is_file()  # a name may contain brackets
        names = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))
        files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            hint = f"; it is a folder: name its files, as in {pattern}/*.txt" if Path(pattern).is_dir() else ""
            raise CdlmError(f"no file matches {pattern!r} (looked in {Path.cwd()}){hint}")
        found |= dict.fromkeys(files)
    kinds = [".txt", *_READERS]
    for path in found:
        if path.suffix not in kinds:
            raise CdlmError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {', '.join(kinds)}")
    return list(found)


def _contents(patterns: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(path.suffix, _file_hash(path)) for path in _expand(patterns)] if patterns else []


def _file_hash(path: Path) -> str:
    try:
        check_ends(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CdlmError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _lines(path: Path) -> Iterator[str]:
    r"""Lines with their ends, cut after "\n"; a byte order mark is dropped."""
    offset = 0
    check_ends(path)
    with path.open("rb") as file:
        for raw in file:
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                place = f"byte {offset + error.start} is 0x{raw[error.start]:02x}"
                raise CdlmError(f"{path}: expected UTF-8 text, but {place}; convert the file to UTF-8") from error
            yield text if offset else text.removeprefix("\ufeff")
            offset += len(raw)


def txt_documents(path: Path, sample_by: SampleBy) -> Iterator[str]:
    r"""Documents of a text file; "\n", "\r\n" and "\r" all end a line."""
    lines = (part for line in _lines(path) for part in line.removesuffix("\n").removesuffix("\r").split("\r"))
    if sample_by == "line":
        return lines
    if sample_by == "paragraph":
        return ("\n".join(group) for blank, group in groupby(lines, lambda line: not line.strip()) if not blank)
    return iter(["\n".join(lines)])


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line of a JSONL file that is not blank: its place, to name in messages, and its value.

    Raises:
        CdlmError: A line is not UTF-8 or not JSON.
    """
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CdlmError(f"{place}: expected one JSON object a line ({error}); mend it") from error


def csv_rows(path: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a CSV file with a header: its place, to name in messages, and its cells by column.

    Raises:
        CdlmError: The file is not UTF-8 or no CSV, or `column` is not there.
    """
    reader = csv.DictReader(_lines(path))
    try:
        _check_column(path, column, list(reader.fieldnames or []))
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise CdlmError(
            f"{path}, after line {reader.line_num}: not valid CSV ({error}); mend it or use jsonl"
        ) from error


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a parquet file: its place, to name in messages, and those of `columns` that are there.

    Raises:
        CdlmError: The file is no parquet, or the first of `columns` is not there.
    """
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(path, columns[0], file.schema_arrow.names)
            present = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=present):
                for row in batch.to_pylist():
                    yield str(path), row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter of names of columns
        raise CdlmError(f"{path}: not a valid parquet file ({first_line(error)}); write it again") from error


def _check_column(path: Path, column: str, found: list[str]) -> None:
    if column not in found:
        raise CdlmError(f"{path}: expected a column {column!r}, found {shown(found, 300)}; {_advice(column)}")


def _advice(name: str) -> str:
    return f"rename the one that holds the text to {name!r}, or set the source's field in training"


def text_of(row: Any, field: str, place: str) -> str:
    """The text of a record, empty for null.

    Raises:
        CdlmError: The record is no object with this field, or the field holds no text; `place` says where.
    """
    if not isinstance(row, dict):
        raise CdlmError(f"{place}: expected an object with a field {field!r}, got {type(row).__name__}")
    if field not in row:
        raise CdlmError(f"{place}: expected a field {field!r}, found {list(row)}; {_advice(field)}")
    text = "" if row[field] is None else row[field]
    if not isinstance(text, str):
        raise CdlmError(f"{place}: expected text in the field {field!r}, got {type(text).__name__}; choose another")
    if re.search("[\ud800-\udfff]", text):
        raise CdlmError(f"{place}: the text holds half of a surrogate pair, which is no character; mend the escapes")
    return text


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": lambda path, _: jsonl_rows(path),
    ".csv": csv_rows,
    ".parquet": lambda path, field: parquet_rows(path, [field]),
}


SOURCES: Registry[Source] = Registry("source", Source, Stories, Arithmetic, Stdlib, Files, Hub)
