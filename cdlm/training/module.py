"""The LightningModule: it connects a system, its data and its optimiser, and computes nothing itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from cdlm.core.rng import generator
from cdlm.core.types import Batch, MaskingFn
from cdlm.models.system import System
from cdlm.training import sharding
from cdlm.training.context import FORMAT, Context, check_format, check_same
from cdlm.training.divergence import diverged, fault_of
from cdlm.training.ema import EMA
from cdlm.training.folder import checkpoint_of
from cdlm.training.optimizers import build_optimizer, set_rates
from cdlm.training.options import TrainOptions
from cdlm.training.restore import COLUMNS, check_tensors, count_moments

TRAINING, VALIDATION, DROPOUT = 0x7261, 0x7662, 0x6472
"""Purposes of noise: the second word of its key."""


@runtime_checkable
class Loader(Protocol):
    """Endless batches, a function of their number alone."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches, from the next one on."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to batch number `state["batches"]`."""
        ...


class TrainingModule(LightningModule):
    """All randomness of batch i on rank r is a function of (seed, i, r), so the only state to save is a count.

    Args:
        loader: endless batches of this rank.
        masking: draws the positions to generate.
        context: what must not change when the run is resumed.
    """

    def __init__(
        self,
        system: System,
        loader: Loader,
        masking: MaskingFn,
        options: TrainOptions,
        context: Context,
    ):
        super().__init__()
        system.precision = options.precision
        self.system = system.train()
        self.ema = EMA(system, options.ema)
        if options.compile:
            system.network.compile()
        self.feed = Feed(loader)
        frozen = [name for name, weight in system.named_parameters() if not weight.requires_grad]
        self.frozen = frozenset(f"{part}.{name}" for name in frozen for part in ("system", "ema.system"))
        """Weights that are not trained: checkpoints do without them."""
        self.strict_loading = not frozen  # `check_tensors` has compared all names
        self.drops = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in system.modules())
        self.masking, self.options, self.context = masking, options, dict(context)
        self._whole: list[System] = []  # in a list, where torch does not look for submodules
        self.batches = 0
        """Batches that this process has consumed."""
        self.window: list[Float[Tensor, " columns"]] = []
        """What to log: a row for each batch since the last line of metrics."""
        self.gradient_norm = torch.tensor(math.nan)
        """Of the last step, before clipping, without the schedule."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        noise = generator(self.options.seed, TRAINING, self.batches, self.global_rank, device=self.device)
        self.batches += 1
        tokens = batch.target.sum()  # as it comes from the loader: all that are valid
        try:
            with self._dropout():
                loss = self.system(batch.masked(self.masking, noise))
        except Exception as error:  # parts of a system that has gone astray fail in ways of their own
            if fault := fault_of(self.system):
                raise diverged(f"{fault} before step {self.global_step + 1}", self._checkpoint) from error
            raise
        row = (loss.total.detach(), (loss.nats * loss.count).sum(), loss.count.sum(), tokens)
        self.window.append(torch.stack([x.double() for x in row]))
        return loss.total

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Torch's own generator, which dropout draws from, as a function of the batch; as it was, after it."""
        if not self.drops:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(generator(self.options.seed, DROPOUT, self.batches, self.global_rank).initial_seed())
            yield

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All but the frozen weights."""
        state = super().state_dict(*args, **kwargs)
        for name in self.frozen:
            state.pop(name, None)
        return state

    @property
    def _checkpoint(self) -> Path:
        return checkpoint_of(Path(self.trainer.default_root_dir))

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(self.system.parameter_groups(), self.options)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip all but the schedule, whose regression must not scale the network's gradient."""
        groups = self.system.parameter_groups()
        if self.options.strategy == "fsdp":
            sharding.average_gradients(groups["schedule"])
        norm = torch.nn.utils.clip_grad_norm_(groups["matrices"] + groups["rest"], self.options.clip)
        self.gradient_norm = sharding.full(norm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        set_rates(optimizer, self.global_step, self.options)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.system.after_step()
        step = self.global_step + 1
        if self.system.adapter is not None and (step % self.options.log_every == 0 or step == self.options.steps):
            self.system.adapter.observe(self.system.network, self.trainer.optimizers[0].state)
        self.ema.update(self.system, self.global_step + 1)  # the trainer counts the step when this returns

    def configure_model(self) -> None:
        if self.options.strategy != "fsdp" or self._whole:
            return
        self._whole = [copy.deepcopy(self.ema.system)]
        assert self.device_mesh is not None
        for system in (self.system, self.ema.system):
            sharding.shard(system, self.device_mesh["data_parallel"])

    def averaged(self) -> System:
        """The EMA system, up to date on rank 0. Every process must call this. What was spread over devices is whole on
        the CPU: it need not fit on one of them."""
        if self._whole:
            sharding.gather(self.ema.system, self._whole[0])
            return self._whole[0]
        return self.ema.system.to(self.device)

    def trained(self) -> System:
        """The EMA system as `averaged` gave it last, without asking the other processes."""
        return self._whole[0] if self._whole else self.ema.system

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        window = torch.stack(self.window).cpu() if self.window else torch.empty(0, COLUMNS, dtype=torch.float64)
        checkpoint["cdlm"] = {
            "format": FORMAT, "batches": self.batches, "context": self.context, "window": window,
            "moments": count_moments(checkpoint.get("optimizer_states")),
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, run = checkpoint["cdlm"], Path(self.trainer.default_root_dir)
        check_format(saved.get("format", 1), run)
        check_same(saved["context"], self.context, run)
        check_tensors(checkpoint, self, self.configure_optimizers(), self._checkpoint)
        self.batches = saved["batches"]
        self.window = list(saved["window"].to(self.device))
        self.feed.seek(self.batches)


class Feed:
    """A loader as Lightning sees it: without the loader's own count, which runs ahead because Lightning prefetches."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    def seek(self, batches: int) -> None:
        self._loader.load_state_dict({"batches": batches})
