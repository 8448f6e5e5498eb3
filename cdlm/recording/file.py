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
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing
from cdlm.recording.record import Record, Switches

VERSION = 1
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
    seed: int
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

    def __post_init__(self) -> None:
        left = (self.record.nfe == 0).any(0)
        if self.record.ended is not None:  # rows may have grids of their own
            left &= ~self.record.ended
        # A row of a masked model is at its end when all its positions are committed.
        if self.record.commits is not None and not self._broken():
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

    def _broken(self) -> list[str]:
        """Columns of switches and commits that do not fit the others."""
        (m, n), steps, record = self.tokens.shape, self.record.steps, self.record
        ends, wrong = {"step": steps, "sample": m, "position": n}, []
        for what in (record.switches, record.commits):
            if what is not None:
                wrong += [name for name, end in ends.items() if getattr(what, name).max(initial=0) >= end]
                wrong += ["switches or commits"] if len({len(part) for part in what}) > 1 else []
        if record.budget is not None and record.budget.shape != (m,):
            wrong.append("budget")
        if record.ended is not None and record.ended.shape != (m,):
            wrong.append("ended")
        return wrong

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
        from safetensors.numpy import save_file

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
        with replacing(path) as temporary:
            save_file({name: np.ascontiguousarray(values) for name, values in columns.items()}, temporary, header)

    @staticmethod
    def read(path: Path) -> Recording:
        """Open a file; its columns stay on disk until they are used.

        Raises:
            CdlmError: the file is truncated, of another version, or no recording.
        """
        header, columns = _open(path)
        found = header.get("cdlm_recording")
        if found is None:
            raise CdlmError(f"{path} is no recording: write one with cdlm sample --record")
        if found != str(VERSION):
            raise CdlmError(f"{path} is a recording of version {found}, this program reads {VERSION}: record again")
        try:
            recording = Recording._from(header, columns)
            recording._check()
        except (KeyError, ValueError, TypeError) as error:
            raise CdlmError(f"{path} is a damaged recording ({error!r}): record again") from error
        return recording

    @staticmethod
    def _from(header: Mapping[str, str], columns: Mapping[str, np.ndarray]) -> Recording:
        signals = {name.removeprefix(_PREFIX): column for name, column in columns.items() if name.startswith(_PREFIX)}
        switches = Switches(*(columns[f"switch.{name}"] for name in Switches._fields))
        masked = "commit.step" in columns
        commits = Switches(*(columns[f"commit.{name}"] for name in Switches._fields)) if masked else None
        t, nfe = columns["t"], columns["nfe"]
        t = np.broadcast_to(t[:, None], nfe.shape) if t.ndim == 1 else t
        return Recording(
            Record(t, columns["nfe"], signals, switches, commits, columns.get("budget"), columns.get("ended")),
            *(columns[name] for name in _REQUESTS),
            seed=int(header["seed"]),
            model=header["model"],
            weights=header["weights"],
            settings=dict(json.loads(header["settings"])),
            prompts=list(json.loads(header.get("prompts", "[]"))),
            made_by=dict(json.loads(header.get("made_by", "{}"))),
        )

    def _check(self) -> None:
        """Raise ValueError unless all columns are of one run."""
        (m, n), steps, record = self.tokens.shape, self.record.steps, self.record
        shapes = {"given": (m, n), "valid": (m, n), "index": (m,)}
        wrong = [name for name, shape in shapes.items() if getattr(self, name).shape != shape]
        wrong += [name for name, column in record.signals.items() if column.shape != (steps, m)]
        wrong += ["t"] if record.t.shape != (steps, m) else []
        wrong += self._broken() + ([] if len(self.prompts) in (0, m) else ["prompts"])
        if wrong or record.nfe.shape != (steps, m):
            raise ValueError(f"columns of different runs: {', '.join(wrong) or 'nfe or switches'}")


def _shared(t: Float[np.ndarray, "steps m"]) -> Float[np.ndarray, "steps ..."]:
    """The levels of all samples, where they are the same as far as each sample goes."""
    one = np.fmax.reduce(t, 1)
    return one if bool((np.isnan(t) | (t == one[:, None])).all()) else t


def _open(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:  # maps the file; its tensors are views of the map
            return file.metadata() or {}, {name: file.get_tensor(name).numpy() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CdlmError(f"{path} cannot be read, it is truncated or damaged ({error}): record again") from error


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
