"""What happens between two optimiser steps: measure, log, validate, save, stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.core.types import Batch
from cdlm.models.system import System
from cdlm.training.divergence import diverged, fault_of
from cdlm.training.files import MetricsFile
from cdlm.training.folder import checkpoint_of
from cdlm.training.module import TrainingModule
from cdlm.training.progress import Reporter
from cdlm.training.stop import Interrupted, StopRequest
from cdlm.training.validation import losses_by_level, validation_metrics

Export = Callable[[System, Path, int], None]
"""(EMA system, run folder, optimiser steps done) -> files of the model."""


@dataclass(frozen=True)
class Outputs:
    """Where results go and who makes them."""

    run_dir: Path
    valid_batches: Callable[[], Iterable[Batch]]
    samples: Callable[[System], list[str]] | None
    export: Export | None

    @property
    def metrics(self) -> MetricsFile:
        return MetricsFile(self.run_dir / "metrics.csv")

    @property
    def checkpoint(self) -> Path:
        return checkpoint_of(self.run_dir)


class RunCallback(Callback):
    """Acts after whole optimiser steps only, so every checkpoint lies between two of them."""

    def __init__(self, outputs: Outputs, reporter: Reporter, stop: StopRequest):
        self.outputs, self.reporter, self.stop = outputs, reporter, stop
        self._step, self._since, self._restored = -1, 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _ours(pl_module)
        self.stop.listen()
        if trainer.received_sigterm:  # it came while the trainer started
            self.stop.signal = signal.SIGTERM
        self._step = trainer.global_step
        if trainer.is_global_zero:
            lost = self.outputs.metrics.cut(self._step or -1)  # a run that starts writes row 0 itself
            if lost:
                self.reporter.note(f"{self.outputs.metrics.path}: {lost} lines were no rows of metrics and are gone")
        self.reporter.start(self._step, module.options.steps, place_of(trainer))
        if self._step == 0:
            self._log(trainer, module.system.facts())
            self._check_system(trainer, module)
            if module.options.strategy != "fsdp":  # there, saving makes an optimiser that never stepped take a step
                self._save(trainer, module)  # also finds out now whether the folder can be written
        self._since, self._restored = time.perf_counter(), len(module.window)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step >= 0:
            return
        if trainer.global_step > (steps := _ours(pl_module).options.steps):
            raise CdlmError(f"the run is at step {trainer.global_step} already, beyond {steps}: ask for more steps")
        self._export(trainer, _ours(pl_module))  # of a finished run that was saved without an export

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # amid an accumulation
        module, self._step = _ours(pl_module), trainer.global_step
        self.reporter.advance(self._step)
        stop, options = self._stop_signal(trainer), module.options
        measure, validate, save = (
            self._step % every == 0 or self._step == options.steps
            for every in (options.log_every, options.validate_every, options.checkpoint_every)
        )
        if measure or validate or save or stop:
            self._check(trainer, module)
            if validate or save or stop:
                self._check_system(trainer, module)
            metrics = self._measure(trainer, module) if measure else {}
            paused = time.perf_counter()
            metrics |= self._validate(trainer, module) if validate else {}
            if metrics:
                self._log(trainer, metrics)
                self.reporter.show(metrics)
            if save or stop:
                if not validate:
                    self._held_out(trainer, module, islice(self.outputs.valid_batches(), 1))
                self._save(trainer, module)
            self._since += time.perf_counter() - paused  # speed is that of training alone
        if stop and self._step < options.steps:
            name, path = signal.Signals(stop).name, self.outputs.checkpoint
            raise Interrupted(f"{name} after step {self._step} of {options.steps}; saved {path}: resume to go on", stop)

    def _stop_signal(self, trainer: Trainer) -> int:
        if trainer.world_size == 1:
            return self.stop.signal
        received = torch.tensor(self.stop.signal, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def _check(self, trainer: Trainer, module: TrainingModule) -> None:
        if not module.window:
            return
        bad = (~torch.stack(module.window)[:, 0].isfinite()).nonzero().flatten().cpu()
        first = int(bad[0]) if len(bad) else len(module.window)
        if trainer.world_size > 1:
            first = int(trainer.strategy.reduce(torch.tensor(first, device=module.device), reduce_op="min"))
        if first < len(module.window):
            step = self._step - (len(module.window) - 1 - first) // module.options.accumulate
            raise self._diverged(f"loss became NaN or infinite at step {step}")

    def _check_system(self, trainer: Trainer, module: TrainingModule) -> None:
        """Before a good checkpoint and a good model are replaced."""
        fault = fault_of(module.system) or fault_of(module.ema.system, "averaged weights")
        if not trainer.strategy.reduce_boolean_decision(fault is None, all=True):
            raise self._diverged(f"{fault or 'weights of another process became NaN or infinite'} at step {self._step}")

    def _diverged(self, what: str) -> CdlmError:
        return diverged(what, self.outputs.checkpoint)

    def _measure(self, trainer: Trainer, module: TrainingModule) -> dict[str, float]:
        means = trainer.strategy.reduce(torch.stack(module.window).mean(0), reduce_op="mean")
        loss, nats, count, tokens = means.tolist()
        now = time.perf_counter()
        seconds, batches = now - self._since, len(module.window) - self._restored
        module.window, self._since, self._restored = [], now, 0
        quantiles = module.system.levels(torch.tensor([0.1, 0.5, 0.9])).tolist()
        return {
            "loss": loss,
            "nats_per_token": nats / count,
            "tokens_per_second": tokens * batches * trainer.world_size / seconds,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "gradient_norm": float(module.gradient_norm),
            **dict(zip(("t_q10", "t_q50", "t_q90"), quantiles, strict=True)),
        }

    def _validate(self, trainer: Trainer, module: TrainingModule) -> dict[str, float]:
        sums = self._held_out(trainer, module, self.outputs.valid_batches())
        if self.outputs.samples is not None:
            system = module.averaged()
            texts = self._samples(self.outputs.samples, system) if trainer.is_global_zero else []
            if texts:
                write_text(self.outputs.run_dir / "samples" / f"step_{self._step:06d}.txt", "\n".join(texts) + "\n")
        return validation_metrics(sums.cpu())

    def _held_out(self, trainer: Trainer, module: TrainingModule, batches: Iterable[Batch]) -> Tensor:
        sums = losses_by_level(module.ema.system, batches, module.masking, module.options.seed, module.device)
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        if not bool(sums.isfinite().all()):
            raise self._diverged(f"the loss of held-out text became NaN or infinite at step {self._step}")
        return sums

    def _samples(self, draw: Callable[[System], list[str]], system: System) -> list[str]:
        try:
            return draw(system)
        except CdlmError as error:
            raise self._diverged(f"no samples could be drawn at step {self._step} ({error})") from error

    def _log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.log_metrics(metrics, self._step)

    def _save(self, trainer: Trainer, module: TrainingModule) -> None:
        self._export(trainer, module)  # first, so that the checkpoint of a finished run has its model beside it
        trainer.save_checkpoint(self.outputs.checkpoint)

    def _export(self, trainer: Trainer, module: TrainingModule) -> None:
        system = module.averaged()
        if self.outputs.export is not None and trainer.is_global_zero:
            self.outputs.export(system, self.outputs.run_dir, trainer.global_step)


def place_of(trainer: Trainer) -> str:
    """The devices of a run in words, such as `cpu` or `2 x cuda (NVIDIA H100)`."""
    device, count = trainer.strategy.root_device, trainer.world_size
    named = f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
    return named if count == 1 else f"{count} x {named}"


def _ours(module: LightningModule) -> TrainingModule:
    assert isinstance(module, TrainingModule)
    return module
