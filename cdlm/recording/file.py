"""Recorded full-length runs as files: one safetensors file a run, read through a memory map.

Columns (m samples, n positions, `steps` grid points, e switches):

    index [m] int64, given [m n] bool, valid [m n] bool      the requests
    tokens [m n] int64                                       final tokens, prompts included
    t [steps m] float64, nfe [steps m] int32                 noise level and calls spent, by step; t [steps] if all
                                                             samples walk the same levels
    signal.NAME [steps m] float32                            row signals, see docs/write-a-criterion.md
    switch.step [e] uint32, switch.sample [e] uint32,        every switch of a token, in order of step;
    switch.position [e] uint16, switch.token [e] uint32      a sample's first step switches all its open positions
    commit.step, .sample, .position, .token [e]              every token committed, the same kinds, where some are
    budget [m] int64                                         of a masked model: the steps each sample may take
    ended [m] bool                                           samples that no rule halted

The header holds the format's version, the seed, the prompts, and what is known of the model and the sampler.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing
from cdlm.core.schema import Positive, Whole, checked
from cdlm.core.tensors import Spec, read_header, read_tensors, specs_of, write_tensors
from cdlm.recording.record import Record, Switches

VERSION = 1
ADVICE = "record again"
_PREFIX = "signal."
_REQUESTS = ("tokens", "given", "valid", "index")


@dataclass(frozen=True)
class Recording:
    """A full-length run: what replay needs in place of the model."""

    record: Record
    tokens: Int[np.ndarray, "m n"]
    """Final tokens of the full run, prompts included."""
    given: Bool[np.ndarray, "m n"]
    valid: Bool[np.ndarray, "m n"]
    index: Int[np.ndarray, " m"]
    seed: Whole
    model: str
    """Name of the model."""
    weights: str
    """Fingerprint of its weights."""
    settings: Mapping[str, Any]
    """Everything of the sampler but rule and seed."""
    prompts: Sequence[str | None] = ()
    """The text of each sample's prompt; empty where none was recorded."""
    made_by: Mapping[str, str] = field(default_factory=dict)
    """What made the samples, as `Samples` say it; empty in recordings of earlier programs."""
    vocab: int | None = None
    """Tokens that there are; None in recordings of earlier programs."""

    def __post_init__(self) -> None:
        left = (self.record.nfe == 0).any(0)
        if self.record.ended is not None:  # rows may have grids of their own
            left &= ~self.record.ended
        # A row of a masked model is at its end when all its positions are committed.
        if self.record.commits is not None and self._wrong_changes(self.record.commits) is None:
            done = np.zeros(self.tokens.shape, bool)
            done[self.record.commits.sample, self.record.commits.position] = True
            left &= ~(done | self.given).all(1)
        if left.any():
            raise CdlmError(
                f"replay needs full-length runs, and {int(left.sum())} of {len(left)} samples halted early:"
                " record without a halting rule"
            )

    def __len__(self) -> int:
        return len(self.index)

    def first(self, n: int) -> Recording:
        """The first n samples."""
        return self.select(slice(n))

    def select(self, rows: slice) -> Recording:
        """Some of the samples."""
        cut = {name: getattr(self, name)[rows] for name in _REQUESTS}
        record = self.record.select(np.arange(len(self))[rows])
        return replace(self, record=record, prompts=self.prompts[rows], **cut)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        commits = {} if self.record.commits is None else self.record.commits._asdict()
        columns = {
            **{name: getattr(self, name) for name in _REQUESTS},
            "t": _shared(self.record.t),
            "nfe": self.record.nfe,
            **{_PREFIX + name: values for name, values in self.record.signals.items()},
            **{f"switch.{name}": values for name, values in self.record.switches._asdict().items()},
            **{f"commit.{name}": values for name, values in commits.items()},
            **({} if self.record.budget is None else {"budget": self.record.budget}),
            **({} if self.record.ended is None else {"ended": self.record.ended}),
        }
        header = {"cdlm_recording": str(VERSION), "seed": str(self.seed), "model": self.model, "weights": self.weights,
                  "settings": json.dumps(self.settings), "prompts": json.dumps(list(self.prompts)),
                  "made_by": json.dumps(dict(self.made_by))}  # fmt: skip
        if self.vocab is not None:
            header["vocab"] = str(self.vocab)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in columns.items()}
        with replacing(path) as temporary:
            write_tensors(temporary, specs_of(tensors), {n: (lambda v=v: v) for n, v in tensors.items()}, header)

    @staticmethod
    def read(path: Path) -> Recording:
        """Open a file; its columns stay on disk until they are used.

        Raises:
            CdlmError: the file is truncated, of another version, or no recording.
        """
        specs, header = read_header(path, ADVICE)
        found = header.get("cdlm_recording")
        if found is None:
            raise CdlmError(f"{path} is no recording: write one with cdlm sample --record")
        if found != str(VERSION):
            raise CdlmError(f"{path} is a recording of version {found:.9}, this program reads {VERSION}: record again")
        _check_columns(path, specs)
        columns = {name: value.numpy() for name, value in read_tensors(path, ADVICE).items()}
        recording = Recording._from(_header(path, header), columns)
        if wrong := recording._wrong():
            raise CdlmError(f"{path} is a damaged recording ({wrong}): {ADVICE}")
        return recording

    @staticmethod
    def _from(header: Header, columns: Mapping[str, np.ndarray]) -> Recording:
        signals = {name.removeprefix(_PREFIX): column for name, column in columns.items() if name.startswith(_PREFIX)}
        switches = Switches(*(columns[f"switch.{name}"] for name in Switches._fields))
        masked = "commit.step" in columns
        commits = Switches(*(columns[f"commit.{name}"] for name in Switches._fields)) if masked else None
        t, nfe = columns["t"], columns["nfe"]
        t = np.broadcast_to(t[:, None], nfe.shape) if t.ndim == 1 else t
        record = Record(t, nfe, signals, switches, commits, columns.get("budget"), columns.get("ended"))
        requests = {name: columns[name] for name in _REQUESTS}
        return Recording(record=record, **requests, **header)

    def _wrong(self) -> str | None:
        """What the columns cannot hold, whose types and shapes are right; None if nothing is wrong."""
        record, walking = self.record, self.record.nfe > 0
        known = 2**31 if self.vocab is None else self.vocab
        changes = [part for part in (record.switches, record.commits) if part is not None]
        calls = np.diff(record.nfe, axis=0, prepend=0)
        right = {
            f"tokens that are none of {known}": _within(self.tokens, known)
            and all(_within(part.token, known) for part in changes),
            "numbers of samples below 0, or twice": _within(self.index, 2**63 - 1)
            and len(np.unique(self.index)) == len(self),
            "padding that is not given": bool((self.given | self.valid).all()),
            "samples with nothing to generate": not bool(self.given.all(1).any()),
            "calls that do not grow": bool(((calls > 0) | ~walking).all()) and bool((record.nfe >= 0).all()),
            "noise levels that are no numbers": bool((np.isfinite(record.t) & (record.t >= 0) | ~walking).all())
            or ("policy" in self.settings and bool(np.isnan(record.t).all())),  # masked models have none
            "budgets that are no number of its steps": record.budget is None
            or bool(((record.budget >= 1) & (record.budget <= record.steps)).all()),
            "signals that are no numbers": not any(
                bool((np.isnan(values).all(0) & (walking.sum(0) > 1)).any()) for values in record.signals.values()
            ),
            "prompts of other samples": len(self.prompts) in (0, len(self)),
        }
        wrong = [what for what, holds in right.items() if not holds]
        return wrong[0] if wrong else next(filter(None, map(self._wrong_changes, changes)), None)

    def _wrong_changes(self, changes: Switches) -> str | None:
        """What a list of switches or commits cannot hold."""
        ends = zip(changes[:3], (self.record.steps, *self.tokens.shape), strict=True)
        if not all(_within(part, end) for part, end in ends):
            return "switches or commits of steps, samples or positions that there are not"
        if bool((np.diff(changes.step.astype(np.int64)) < 0).any()):
            return "switches or commits that are not in order of step"
        if bool(self.given[changes.sample, changes.position].any()):
            return "switches or commits of given positions"
        return None


def _within(values: Integer[np.ndarray, "*n"], end: int) -> bool:
    """Whether all are in [0, end)."""
    return not values.size or bool(values.min() >= 0 and values.max() < end)


def _shared(t: Float[np.ndarray, "steps m"]) -> Float[np.ndarray, "steps ..."]:
    """The levels of all samples, where they are the same as far as each sample goes."""
    one = np.fmax.reduce(t, 1)
    return one if bool((np.isnan(t) | (t == one[:, None])).all()) else t


class Header(TypedDict):
    """What the header says beside the version."""

    seed: Whole
    model: str
    weights: str
    settings: dict[str, Any]
    prompts: list[str | None]
    made_by: dict[str, str]
    vocab: Positive | None


def _header(path: Path, texts: Mapping[str, str]) -> Header:
    """The header's texts as what they stand for; those that earlier programs did not write are as good as empty."""
    values: dict[str, Any] = {"prompts": [], "made_by": {}, "vocab": None, **texts}
    for name in ("seed", "settings", "prompts", "made_by", "vocab"):
        if isinstance(values.get(name), str):
            try:
                values[name] = json.loads(values[name])
            except (ValueError, RecursionError) as error:
                raise CdlmError(f"{path} is a damaged recording ({name} is no JSON): {ADVICE}") from error
    named = {name: values[name] for name in Header.__annotations__ if name in values}
    return checked(named, Header, str(path), f"a damaged recording: {ADVICE}")


def _check_columns(path: Path, specs: Mapping[str, Spec]) -> None:
    """Raise unless all columns are there, of their types and of one run."""
    try:
        m, n = specs["tokens"].shape
        (steps, _), (switches,) = specs["nfe"].shape, specs["switch.step"].shape
        (commits,) = specs["commit.step"].shape if "commit.step" in specs else (None,)
    except (KeyError, ValueError) as error:
        raise CdlmError(f"{path} is a damaged recording (tokens, nfe or switches): {ADVICE}") from error
    floats = {name: Spec((steps, m), torch.float32) for name in specs if name.startswith(_PREFIX)}
    level = Spec((steps,), torch.float64) if specs.get("t", Spec((), torch.float64)).shape == (steps,) else None
    wanted = {
        "tokens": Spec((m, n), torch.int64), "given": Spec((m, n), torch.bool), "valid": Spec((m, n), torch.bool),
        "index": Spec((m,), torch.int64), "t": level or Spec((steps, m), torch.float64),
        "nfe": Spec((steps, m), torch.int32), **floats, **_changes("switch", switches),
    }  # fmt: skip
    optional = {"budget": Spec((m,), torch.int64), "ended": Spec((m,), torch.bool)}
    wanted |= {name: spec for name, spec in optional.items() if name in specs}
    wanted |= {} if commits is None else _changes("commit", commits)
    odd = [name for name in wanted.keys() | specs.keys() if wanted.get(name) != specs.get(name)]
    if odd or 0 in (m, n, steps):
        what = f"{min(odd)} is of another type, shape or run" if odd else "it has no samples, positions or steps"
        raise CdlmError(f"{path} is a damaged recording ({what}): {ADVICE}")


def _changes(what: str, count: int) -> dict[str, Spec]:
    kinds = (torch.uint32, torch.uint32, torch.uint16, torch.uint32)
    return {f"{what}.{name}": Spec((count,), kind) for name, kind in zip(Switches._fields, kinds, strict=True)}


def read_folder(folder: Path) -> dict[str, Recording]:
    """Every recording of a folder, which must be of one model, by the name of its file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CdlmError(f"{folder} holds no recordings: write some with cdlm sample --record {folder}")
    recordings = {file.stem: Recording.read(file) for file in files}
    first = recordings[files[0].stem]
    for file, recording in zip(files, recordings.values(), strict=True):
        if recording.weights != first.weights:
            raise CdlmError(
                f"{file} was recorded with the model {recording.model}, {files[0].name} with other weights"
                f" ({first.model}): keep one folder for each model"
            )
    return recordings


def check_same_model(folder: Path, has_weights: Callable[[str], bool]) -> None:
    """Raise if `folder` already holds recordings made with other weights.

    Args:
        has_weights: whether the model's weights are those that a file names.
    """
    if any(folder.glob("*.safetensors")):
        there = next(iter(read_folder(folder).values()))
        if not has_weights(there.weights):
            raise CdlmError(f"{folder} holds recordings of another model ({there.model}): choose another folder")
