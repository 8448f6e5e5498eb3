"""Progressive distillation of a run: students of fewer and fewer steps, each in a model folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from cdlm.continuous.distillation import (
    TEACHER_STEPS,
    Distillation,
    check_distillable,
    check_steps,
    graduate,
    graduated,
    walk_of,
)
from cdlm.continuous.system import ContinuousSystem
from cdlm.core.checks import MOST_ROWS, Settings, check_number, check_whole, shown
from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.models import hub
from cdlm.models.hub import Folder
from cdlm.models.lora import is_adapter
from cdlm.models.system import System
from cdlm.runs import caches
from cdlm.runs.config import RunConfig, outline, read_run
from cdlm.runs.train import RunText, export, fit
from cdlm.sampling.session import Student
from cdlm.sampling.texts import save_tokenizer
from cdlm.training.options import TrainOptions

STEPS = (8, 4, 2)
"""Of the students, unless they are given."""


@dataclass(frozen=True)
class DistillSettings(Settings):
    """How students are trained. What is not given is as in the run.

    Args:
        train_steps: optimiser steps of each round.
        lr: peak learning rate of AdamW; Muon's goes along, as in the run. By default a third of the run's.
        batch_size: rows of a batch.
        teacher_steps: of the teacher from all noise to none, a multiple of each student's; by default 64. A run that is
            a student itself teaches in its own steps alone.
        loss: x0 is the squared error of the estimate. distribution is the divergence, in nats, of the student's tokens
            from the mixture of the teacher's that has this estimate as its mean; not of ELF.
        on_grid: share of the rows that stand at the student's own noise levels, in [0, 1]; the others are between.
        read_out: share of the rows that learn to read tokens out as before, in [0, 1).
        seed: fixes the noise and the order of the rows, in each round others.
    """

    train_steps: int = 1000
    lr: float | None = None
    batch_size: int | None = None
    teacher_steps: int | None = None
    loss: Literal["x0", "distribution"] = "x0"
    on_grid: float = 0.5
    read_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("distillation", train_steps=self.train_steps)
        check_whole("distillation", largest=MOST_ROWS, optional=True, batch_size=self.batch_size)
        check_whole("distillation", optional=True, teacher_steps=self.teacher_steps)
        check_whole("distillation", least=0, seed=self.seed)
        check_number("distillation", above=0, most=10, optional=True, lr=self.lr)
        check_number("distillation", least=0, most=1, on_grid=self.on_grid)
        check_number("distillation", least=0, below=1, read_out=self.read_out)

    def options(self, run: TrainOptions, steps: int, accelerator: str) -> TrainOptions:
        """How a student of so many steps is trained.

        Args:
            run: how its teacher was.
        """
        lr = run.lr / 3 if self.lr is None else self.lr
        muon = run.muon_lr / 3 if self.lr is None or run.lr == 0 else run.muon_lr * self.lr / run.lr
        return replace(
            run, steps=self.train_steps, lr=lr, muon_lr=min(muon, 10.0), warmup=min(run.warmup, self.train_steps // 10),
            seed=self.seed + steps, devices=1, num_nodes=1, strategy="auto", accelerator=accelerator,
        )  # fmt: skip


DEFAULT = DistillSettings()


class Source(NamedTuple):
    """What is distilled."""

    name: str
    folder: Folder
    config: RunConfig
    system: ContinuousSystem
    """The teacher."""
    teacher_steps: int


def distill(
    run: str | Path,
    out: str | Path,
    *,
    steps: Sequence[int] = STEPS,
    settings: DistillSettings = DEFAULT,
    device: str = "auto",
    progress: bool = True,
) -> dict[int, System]:
    """Distil a run to students of fewer steps, in rounds with fewer and fewer.

    Each student begins as the one before, and the first as the run's model, which is the teacher of all. A round that
    is finished is not done again, and one that was interrupted goes on.

    Args:
        run: folder of a training run of a continuous model; its text is the students' too.
        out: folder of the students' folders, `out/8`, `out/4`, ..., each a model like any other.
        steps: of the students; each divides the teacher's steps.
        device: kind of device, such as cpu or cuda; auto takes a GPU if there is one.
        progress: show progress on standard error.

    Returns:
        the students by their steps, ready to sample from.

    Raises:
        CdlmError: the run is of a model that cannot be distilled, a number of steps does not fit, a folder holds
            another model or a student of other settings, or a training fails; see `cdlm.train`.
        Interrupted: the run was asked to stop; the same call goes on.
    """
    accelerator = device.partition(":")[0]
    if accelerator != device:
        raise CdlmError(f"students are trained on a kind of device, got {device!r}: say {accelerator!r}")
    source = _source(run, settings)
    for count in steps:
        check_steps(count, source.teacher_steps)
    if not steps:
        raise CdlmError("there is no student to train: give steps, such as 8 4 2")
    caches.mark(source.config.cache)
    text = RunText.of(source.config, source.folder.tokenizer)
    before, students = source.folder.path, dict[int, System]()
    for count in sorted(set(steps), reverse=True):
        place = Path(out) / str(count)
        options = settings.options(source.config.training, count, accelerator)
        students[count] = _round(source, text, settings, options, before, place, count, progress)
        before = place
    return students


def _source(run: str | Path, settings: DistillSettings) -> Source:
    """The teacher and its settings.

    Raises:
        CdlmError: there is no such run, or its model cannot be distilled.
    """
    config, path = read_run(run), hub.locate(run)
    if is_adapter(path) or hub.is_foreign(path):
        kind = "an adapter" if is_adapter(path) else "a model of another library"
        raise CdlmError(f"{path} holds {kind}, expected the run of a continuous model of this toolkit")
    folder = hub.read(path)
    system = check_distillable(_opened(folder), str(path))
    own, given = (None if folder.student is None else folder.student.steps), settings.teacher_steps
    if own is not None and given not in (None, own):
        raise CdlmError(f"{path} is a student of {own} steps and teaches in no other number, got teacher_steps={given}")
    return Source(path.resolve().name, folder, config, system, own or given or TEACHER_STEPS)


def _opened(folder: Folder) -> System:
    system = outline(folder.config, folder.path / "config.json")
    hub.load_weights(system, folder)
    return system


def _round(
    source: Source, text: RunText, settings: DistillSettings, options: TrainOptions, before: Path, place: Path,
    count: int, progress: bool,
) -> System:  # fmt: skip
    """One student, trained or as it was trained before."""
    from cdlm.training.files import context_of, steps_done
    from cdlm.training.folder import checkpoint_of, held

    checkpoint = checkpoint_of(place)
    resume = checkpoint.exists()
    student = Student(count, source.folder.fingerprint, source.name)
    config = replace(source.config, batch_size=settings.batch_size or source.config.batch_size, training=options)
    if resume or all((place / file).exists() for file in ("config.json", "model.safetensors")):
        _check_same_student(place, student)
    if resume:
        fixed = {"batch_size": config.batch_size, "seed": options.seed, **_lessons(source, settings)}
        _check_same_settings(place, context_of(checkpoint), fixed)
        if steps_done(checkpoint) == options.steps:
            if progress:
                print(f"{place} is finished, at step {options.steps}", file=sys.stderr)
            return _opened(hub.read(place)).eval()
    system = _student(source, settings, before, student)
    with held(place):
        if not resume:
            write_text(place / "config.yaml", config.to_yaml())
            save_tokenizer(source.folder.tokenizer, place)
        trained = fit(
            config, text, system, place, resume=resume, progress=progress, files=_export,
            context=_context(source, settings, count),
        )  # fmt: skip
    assert isinstance(trained, ContinuousSystem)
    return graduate(trained)


def _student(source: Source, settings: DistillSettings, before: Path, student: Student) -> ContinuousSystem:
    """A student that has learned nothing yet: the model of the round before."""
    system = check_distillable(_opened(hub.read(before)), str(before))
    system.keep_space()
    system.objective = Distillation(
        source.system, system.objective, student.steps, source.teacher_steps,
        loss=settings.loss, on_grid=settings.on_grid, read_out=settings.read_out,
    )  # fmt: skip
    system.student, system.preset = student, walk_of(student.steps)
    return system


def _check_same_student(place: Path, student: Student) -> None:
    """Raise unless a folder holds this student, finished or not.

    Raises:
        CdlmError: it holds another model.
    """
    found = hub.read(place).student
    if found is None or (found.steps, found.teacher) != (student.steps, student.teacher):
        what = "a model that is no student" if found is None else f"a student of {found.steps} steps of {found.name}"
        raise CdlmError(
            f"{place} holds {what}, expected one of {student.steps} steps of {shown(student.name)} with the weights"
            " that it has now: choose another folder"
        )


def _check_same_settings(place: Path, saved: Mapping[str, str | int], now: Mapping[str, str | int]) -> None:
    """Raise if a student, finished or not, has learned with other settings than it is asked for.

    Raises:
        CdlmError: it has.
    """
    for name, value in now.items():
        if saved.get(name) != value:
            what = "seed plus steps" if name == "seed" else name
            raise CdlmError(
                f"{place} was distilled with {what} {shown(saved.get(name))}, and is asked for {shown(value)}: choose"
                " another folder, or the settings that it has"
            )


def _context(source: Source, settings: DistillSettings, count: int) -> dict[str, str | int]:
    """What must not change when a round goes on, beside what holds for any run."""
    return {
        "teacher": source.name,
        "teacher.digest": source.folder.fingerprint,
        "student": count,
        **_lessons(source, settings),
    }


def _lessons(source: Source, settings: DistillSettings) -> dict[str, str | int]:
    """What decides the lessons of a round, beside its teacher, its rows and its seed."""
    return {
        "teacher_steps": source.teacher_steps,
        "loss": settings.loss,
        "on_grid": str(settings.on_grid),
        "read_out": str(settings.read_out),
    }


def _export(config: RunConfig, system: System, folder: Path, step: int) -> None:
    """The files of a student, in which nothing is left of its training."""
    assert isinstance(system, ContinuousSystem)
    with graduated(system):
        export(config, system, folder, step)
