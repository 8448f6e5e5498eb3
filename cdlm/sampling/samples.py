"""What a run returns: samples in the order of their requests, with what each of them cost and what made them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
import torch
from jaxtyping import Bool, Int

from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing, write_rows, write_text
from cdlm.core.types import HaltReason, LoopStep
from cdlm.halting.criterion import Criterion
from cdlm.halting.signals import RECORDED
from cdlm.recording.record import Record
from cdlm.recording.writer import Recorder
from cdlm.sampling.requests import Request
from cdlm.sampling.texts import given_spans, outputs_of, shown_of, spans_where, texts_of

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerFast

Spans = list[tuple[int, int]]
"""Characters [start, end) of a text."""
SHOWN = 3
"""Texts that the repr of samples shows."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of a run."""

    text: str
    """Empty when there is no tokenizer."""
    tokens: Int[np.ndarray, " k"]
    """Tokens of the text: without padding, and without what follows its end."""
    nfe: int
    """Model calls spent on it."""
    steps: int
    reason: HaltReason
    index: int
    """With the seed of the run it fixes the sample's noise."""
    seed: int
    prompt: str | None
    given: Spans
    """Characters of the text that came from the prompt: [start, end) of each part."""
    generated: Spans
    """Tokens of the text that did not."""


@dataclass(frozen=True, eq=False, repr=False)
class Origin:
    """What recorded samples came from, as far as it takes to show their steps and to try rules on them."""

    family: str
    """Of the model, such as "continuous"."""
    weights: str
    """Fingerprint of its weights; empty if it has none."""
    settings: Mapping[str, Any]
    """Of the sampler, and `ends`: the stop tokens of the texts."""
    freezes: bool
    """Whether the rule of the run settled tokens on the way."""
    tokenizer: PreTrainedTokenizerFast | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """A finished run, in the order of the requests: a sequence of samples."""

    tokens: Int[np.ndarray, "m n"]
    """Whole rows, prompts and padding included."""
    texts: list[str]
    """Empty when there is no tokenizer."""
    nfe: Int[np.ndarray, " m"]
    """Model calls spent on each sample; of a copy those of the sample that it is a copy of, which were spent once."""
    steps: Int[np.ndarray, " m"]
    """Steps that each sample took."""
    budget: int
    """Steps that a sample of this run takes at most."""
    reason: list[HaltReason]
    seed: int
    index: Int[np.ndarray, " m"]
    """Index of each sample: with the seed it fixes the sample's noise."""
    given: Bool[np.ndarray, "m n"]
    """True at prompt positions and padding."""
    valid: Bool[np.ndarray, "m n"]
    """False on padding, which a template shorter than the length leaves."""
    shown: Bool[np.ndarray, "m n"]
    """Positions that are text: no padding, and nothing from the end of a text on where texts have one."""
    settled: Int[np.ndarray, " m"]
    """Calls after which the text up to its first stop token was decided: what was spent beyond, was spent after the
    end. Of a continuous model all calls."""
    spans: list[Spans] = field(default_factory=list)
    """Characters of each text that came from its prompt."""
    prompts: list[str | None] = field(default_factory=list)
    """The prompt of each sample; a conversation is written as JSON."""
    answers: list[str | None] = field(default_factory=list)
    """The right answer of each problem; None where none was asked for."""
    copy_of: list[int | None] = field(default_factory=list)
    """Of each sample the index of the one that it is a copy of, as nothing was drawn and both were asked for the same;
    None of one that was computed. Empty if all were."""
    counted: list[dict[str, int]] = field(default_factory=list)
    """What the policy counted of each sample, such as `revised`, tokens that it took back. Empty if nothing."""
    made_by: Mapping[str, str] = field(default_factory=dict)
    """Model, fingerprint of its weights, sampling, rule and version."""
    record: Record | None = None
    """Statistics of every step; None unless the run was recorded."""
    origin: Origin | None = None
    """What a recorded run came from; None of one that a session did not draw."""

    def __len__(self) -> int:
        return len(self.nfe)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        try:
            i = range(len(self))[index]  # counts from the end as well
        except TypeError:
            raise CdlmError(
                f"a sample is named by its place or a slice, got {shown(index)}; a list of places is for select"
            ) from None
        except IndexError:
            raise IndexError(f"there is no sample {shown(index)}: the run has {len(self)}") from None
        real = self.shown[i]
        return Sample(
            text=self.texts[i] if self.texts else "",
            tokens=self.tokens[i][real],
            nfe=int(self.nfe[i]),
            steps=int(self.steps[i]),
            reason=self.reason[i],
            index=int(self.index[i]),
            seed=self.seed,
            prompt=self.prompts[i] if self.prompts else None,
            given=self.spans[i] if self.spans else [],
            generated=spans_where(~self.given[i][real]),
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        if not len(self):
            return "no samples"
        count = "1 sample" if len(self) == 1 else f"{len(self)} samples"
        head = f"{count}, {self.nfe.mean():.1f} calls a sample of {self.budget} steps{self.counted_text}"
        lines = [f"  {sample.nfe:4} calls  {_short(sample)}" for sample in self[:SHOWN]]
        rest = [f"  ... and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        return "\n".join([head, *lines, *rest])

    def _repr_html_(self) -> str:
        """In a notebook: the page of `watch` if the run was recorded, and otherwise the texts."""
        from cdlm.sampling.watch.page import notebook

        return notebook(self)

    def watch(
        self, path: str | Path, *, rules: Sequence[str | Criterion] | None = None, beside: Sequence[Samples] = ()
    ) -> Path:
        """Write a page in which one watches the samples form: one HTML file that needs no network.

        It shows the text at every step, maps of position and step, the signals, and where rules would have halted.

        Args:
            path: of the page, such as page.html.
            rules: halting rules to try on the steps, objects or their texts; by default some that suit the model.
            beside: samples of other models from the same prompts, shown side by side.

        Raises:
            CdlmError: the samples have no record or no tokenizer, none of the rules can be replayed on them, or the
                place cannot be written.
        """
        from cdlm.sampling.watch.page import write_page

        return write_page(path, self, rules, beside)

    @property
    def originals(self) -> list[int]:
        """Places of the samples that are no copies of others."""
        return [i for i, index in enumerate(self.copy_of or [None] * len(self)) if index is None]

    def repeated(self, first: Sequence[int], requests: Sequence[Request]) -> Samples:
        """The samples of requests that were served once where they ask for the same.

        Args:
            first: of each request the place of the one that was served, whose samples these are, in order.
        """
        place = {at: i for i, at in enumerate(sorted(set(first)))}
        if len(place) == len(requests):
            return self
        return replace(
            self.select(np.array([place[at] for at in first])),
            index=np.array([request.index for request in requests]),
            prompts=[request.prompt for request in requests],
            answers=[request.answer for request in requests],
            copy_of=[None if at == i else requests[at].index for i, at in enumerate(first)],
        )

    @property
    def calls_after_end(self) -> Int[np.ndarray, " m"]:
        """Calls that each sample spent when its text was already decided."""
        return self.nfe - self.settled

    @property
    def output_tokens(self) -> Int[np.ndarray, " m"]:
        """Tokens that each sample made: up to its first stop token and with it, without prompt and padding."""
        return outputs_of(self.shown, self.given, self.valid)

    @property
    def tpf(self) -> float:
        """Tokens per forward: output tokens of all samples over their model calls, as the dllm leaderboard counts them.
        Of several runs, add both sums before dividing; a mean of ratios is another number. NaN of no samples."""
        calls = int(self.nfe.sum())
        return int(self.output_tokens.sum()) / calls if calls else math.nan

    @property
    def counted_text(self) -> str:
        """Means of what the policy counted of a sample, for people: "; 2.5 guide calls". Empty if that is nothing."""
        names = dict.fromkeys(name for counted in self.counted for name in counted)
        means = {name: np.mean([counted.get(name, 0) for counted in self.counted]) for name in names}
        said = [f"{mean:.1f} {name.replace('_', ' ')}" for name, mean in means.items() if mean > 0]
        return f"; {', '.join(said)}" if said else ""

    def select(self, samples: Int[np.ndarray, " k"]) -> Samples:
        """The samples at these places, in this order.

        Raises:
            CdlmError: they are no list of places, or one of them is none.
        """
        samples = self._places(samples)
        values = {f.name: _picked(getattr(self, f.name), samples) for f in fields(self) if f.name in PER_SAMPLE}
        return replace(self, **values, record=None if self.record is None else self.record.select(samples))

    def _places(self, samples: object) -> Int[np.ndarray, " k"]:
        if not isinstance(samples, np.ndarray | list | tuple | range):
            raise CdlmError(f"samples are selected by a list of places, got {shown(samples)}")
        try:
            places = np.asarray(samples) if len(samples) else np.zeros(0, np.int64)
        except ValueError:  # lists of different lengths
            places = np.zeros(())
        if places.ndim != 1 or places.dtype.kind not in "iu":
            raise CdlmError(f"samples are selected by a list of places, whole numbers, got {shown(samples)}")
        outside = places[(places < -len(self)) | (places >= len(self))]
        if len(outside):
            raise CdlmError(f"there is no sample {outside[0]}: the run has {len(self)}")
        return places

    @staticmethod
    def merge(parts: Sequence[Samples], index: Sequence[int] | None = None) -> Samples:
        """The samples of several processes as one run.

        Args:
            index: the order of the samples, by their index; by default rising.
        """
        order = np.argsort(np.concatenate([part.index for part in parts]), kind="stable")
        if index is not None:
            order = order[np.argsort(np.argsort(index))]
        values = {name: _joined([getattr(part, name) for part in parts]) for name in PER_SAMPLE}
        records = [part.record for part in parts if part.record is not None]
        whole = replace(
            parts[0], **values, budget=max(part.budget for part in parts),
            record=Record.join(records) if records else None,
        )  # fmt: skip
        return whole.select(order)

    def rows(self) -> list[dict[str, Any]]:
        """One plain mapping a sample: its text, what it cost, and what made it."""
        return [
            {
                "text": sample.text, "tokens": sample.tokens.tolist(), "nfe": sample.nfe, "steps": sample.steps,
                "budget": self.budget, "reason": sample.reason.name.lower(), "seed": sample.seed,
                "index": sample.index, "prompt": sample.prompt, "given": [list(span) for span in sample.given],
                "generated": [list(span) for span in sample.generated], "length": int(length), **counted, **answer,
                **copied, **self.made_by,
            }
            for sample, length, counted, answer, copied in zip(
                self, self.valid.sum(1), self.counted or [{}] * len(self), self._answers(), self._copies(), strict=True
            )
        ]  # fmt: skip

    def _answers(self) -> list[dict[str, str]]:
        """A column for problems."""
        return [{} if answer is None else {"answer": answer} for answer in self.answers] or [{} for _ in self.nfe]

    def _copies(self) -> list[dict[str, int | None]]:
        """A column for runs with copies."""
        return [{"copy_of": index} for index in self.copy_of] or [{} for _ in self.nfe]

    def to_pandas(self) -> DataFrame:
        """The rows as a table of pandas."""
        from pandas import DataFrame

        return DataFrame(self.rows())

    def save(self, path: str | Path) -> Path:
        """Write the rows as .jsonl, .csv or .parquet, whole or not at all.

        Raises:
            CdlmError: another extension, no samples, or a place that cannot be written.
        """
        if not isinstance(path, str | Path):
            raise CdlmError(f"samples are written to a file, such as samples.jsonl, got {shown(path)}")
        path = Path(path)
        write = WRITERS[check_extension(path)]
        if not len(self):
            raise CdlmError(f"there are no samples to write to {path}")
        write(self.rows(), path)
        return path


PER_SAMPLE = (
    "tokens", "texts", "nfe", "steps", "reason", "index", "given", "valid", "shown", "settled", "spans", "prompts",
    "answers", "copy_of", "counted",
)  # fmt: skip
"""Fields of samples with an entry for each."""


def _picked(values: Any, samples: Int[np.ndarray, " k"]) -> Any:
    return values[samples] if isinstance(values, np.ndarray) else [values[i] for i in samples] if values else values


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [item for part in parts for item in part]


def _short(sample: Sample, width: int = 88) -> str:
    text = " ".join(sample.text.split()) or " ".join(map(str, sample.tokens.tolist()))
    return text if len(text) <= width else text[: width - 3] + "..."


def _write_jsonl(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    write_rows(path, [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows])


def _write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    with replacing(path) as temporary:
        parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), temporary)


WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
"""How rows are written, by the extension of the file."""


def check_extension(path: Path) -> str:
    """The extension of a file to write samples to.

    Raises:
        CdlmError: no writer has it.
    """
    if path.suffix not in WRITERS:
        raise CdlmError(f"samples are written as {', '.join(WRITERS)}, got {str(path)!r}: give the file one of these")
    return path.suffix


def collect(
    steps: Iterable[LoopStep],
    requests: Sequence[Request],
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    budget: int,
    seed: int,
    record: bool = False,
    watched: Collection[str] = (),
    mask_id: int | None = None,
    end_ids: Collection[int] = (),
) -> Samples:
    """Run the loop to its end.

    Args:
        tokenizer: None leaves out the texts.
        record: keep every step; the loop must compute the signals of a record.
        watched: names of signals of each position that the record keeps as well.
        mask_id: of a masked model.
        end_ids: stop tokens; texts are cut at the first one that was generated.
    """
    place = {request.index: i for i, request in enumerate(requests)}
    count = len(requests)
    tokens = torch.stack([request.tokens for request in requests])
    nfe, taken, settled = (np.zeros(count, np.int64) for _ in range(3))
    reasons, counted = [HaltReason.BUDGET] * count, [dict[str, int]() for _ in requests]
    recorder = Recorder(RECORDED, budget, tokens, mask_id, watched) if record else None
    for step in steps:
        counts = step.counts
        leaving = counts.leaving
        if recorder is None and not leaving:
            continue
        columns = np.array([place[row] for row in counts.row])
        if recorder is not None:
            recorder.write(step, columns)
        tokens[columns[leaving]] = step.tokens.cpu()
        for row in leaving:
            i = columns[row]
            nfe[i], taken[i], settled[i] = counts.nfe[row], counts.taken[row], counts.settled[row] or counts.nfe[row]
            if counts.halted[row]:
                reasons[i] = HaltReason.CRITERION
            elif counts.full[row]:
                reasons[i] = HaltReason.FULL
        for name, values in step.counted.items():
            for row, value in zip(leaving, values[leaving].tolist(), strict=True):
                counted[columns[row]][name] = value
    valid = np.stack([np.ones(len(r.tokens), bool) if r.valid is None else r.valid.numpy() for r in requests])
    given = np.stack([request.given.numpy() for request in requests])
    shown = shown_of(tokens.numpy(), given, valid, end_ids)
    return Samples(
        tokens=tokens.numpy(),
        texts=[] if tokenizer is None else texts_of(tokenizer, tokens.numpy(), shown),
        nfe=nfe,
        steps=taken,
        budget=budget,
        reason=reasons,
        seed=seed,
        index=np.array([request.index for request in requests]),
        given=given,
        valid=valid,
        shown=shown,
        settled=settled,
        spans=[] if tokenizer is None else spans_of(tokenizer, tokens.numpy(), given, shown),
        prompts=[request.prompt for request in requests],
        answers=[request.answer for request in requests],
        counted=counted if any(counted) else [],
        record=None if recorder is None else recorder.record(),
    )


def spans_of(
    tokenizer: PreTrainedTokenizerFast, tokens: Int[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"],
    shown: Bool[np.ndarray, "m n"],
) -> list[Spans]:  # fmt: skip
    """Characters of each text that came from its prompt."""
    rows = zip(tokens, given, shown, strict=True)
    return [given_spans(tokenizer, ids[text].tolist(), part[text]) for ids, part, text in rows]
