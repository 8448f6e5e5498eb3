"""How to train: every choice that is not the model's or the data's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from cdlm.core.checks import MOST_DEVICES, check_choice, check_number, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.ranks import launched, number_in

Logger = Literal["tensorboard", "wandb"]
LOGGERS = get_args(Logger)


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`. The defaults suit a laptop and a model of a few million parameters.

    Raises:
        CdlmError: a value is out of range.
    """

    steps: int = 10_000
    """Optimiser steps of the whole run; resuming with more continues a finished run."""
    accumulate: int = 1
    """Batches of each process per optimiser step; their gradients are averaged."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    schedule_lr: float = 1e-2
    """Learning rate of the noise schedule's own parameters, the same at every step."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """What trains the hidden matrices; AdamW trains all the rest."""
    muon_lr: float = 2e-2
    """Peak learning rate of Muon, with the shape correction sqrt(max(1, rows / columns)) of its author."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the hidden matrices, per step and unit of learning rate."""
    warmup: int = 100
    """Optimiser steps of linear warm-up, at most `steps` of them count."""
    final_lr_ratio: float = 0.0
    """Learning rate of the last step as a share of the peak; a cosine leads there. 1 keeps it constant."""
    clip: float = 1.0
    """Largest gradient norm of all parameters but the schedule's; infinity switches clipping off."""
    ema: float = 0.999
    """Decay of the weight average per optimiser step (it ramps up as (1 + k) / (10 + k)); 0 averages nothing."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network; weights and optimiser are always float32."""
    compile: bool = False
    """Compile the network with torch.compile."""
    devices: int = 1
    """Processes of each machine, each with a device and its own batches."""
    num_nodes: int = 1
    """Machines, on each of which the command is started by torchrun, by srun, or by hand with MASTER_ADDR, MASTER_PORT
    and NODE_RANK."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work: whole copies (ddp), or slices of weights and optimiser (fsdp, with AdamW)."""
    validate_every: int = 500
    """Optimiser steps between two validations with samples; the last step is always validated."""
    checkpoint_every: int = 500
    """Optimiser steps between two checkpoints; the last step always has one."""
    log_every: int = 10
    """Optimiser steps between two lines of metrics, and between two searches for NaN."""
    loggers: tuple[Logger, ...] = ()
    """Loggers besides metrics.csv; each must be installed."""
    seed: int = 0
    """Fixes noise and masks, and in `cdlm train` the first weights and the order of rows."""

    def __post_init__(self) -> None:
        counts = ("steps", "accumulate", "devices", "num_nodes", "validate_every", "checkpoint_every", "log_every")
        check_whole("training", **{name: getattr(self, name) for name in counts})
        check_whole("training", least=0, warmup=self.warmup, seed=self.seed)
        check_number("training", least=0, most=10, lr=self.lr, schedule_lr=self.schedule_lr, muon_lr=self.muon_lr)
        check_number("training", least=0, weight_decay=self.weight_decay)
        check_number("training", least=0, most=1, final_lr_ratio=self.final_lr_ratio)
        check_number("training", least=0, most=0.999999, ema=self.ema)
        check_number("training", least=1e-6, infinite=True, clip=self.clip)
        choices = {name: get_args(hint) for name, hint in get_type_hints(TrainOptions).items()}
        for name in ("optimizer", "precision", "accelerator", "strategy"):
            check_choice("training", choices[name], **{name: getattr(self, name)})
        check_choice("training", (False, True), compile=self.compile)
        if not isinstance(self.loggers, tuple | list) or len({*map(str, self.loggers)}) < len(self.loggers):
            raise CdlmError(
                f"training needs loggers to be some of {', '.join(LOGGERS)}, each once, got {self.loggers!r}"
            )
        for logger in self.loggers:
            check_choice("training", LOGGERS, loggers=logger)
        if self.world > MOST_DEVICES:
            raise CdlmError(
                f"training has at most {MOST_DEVICES} processes, got {self.devices} on each of {self.num_nodes}"
                " machines"
            )
        if self.strategy == "fsdp" and self.optimizer == "muon":
            raise CdlmError("strategy='fsdp' needs optimizer='adamw', got 'muon': set it, or take strategy='ddp'")

    @property
    def world(self) -> int:
        """Processes of all machines."""
        return self.devices * self.num_nodes


def rank_and_world(options: TrainOptions) -> tuple[int, int]:
    """Number of this process and of all processes, as the loader needs them before `train` is called.

    They are as Lightning finds them: by the variables of torchrun or srun, or else by MASTER_ADDR, MASTER_PORT and
    NODE_RANK, where `train` starts the command again for each further process of the machine and sets LOCAL_RANK.

    Raises:
        CdlmError: as many processes or machines as the options have were not started.
    """
    place, world = launched(), options.world
    wanted = f"{options.devices} on each of {options.num_nodes} machines (devices, num_nodes)"
    if place is not None and (place.size, place.each or options.devices) != (world, options.devices):
        each = "" if place.each is None else f", {place.each} on each machine"
        raise CdlmError(f"{place.size} processes were started{each}, and training is of {wanted}: set them so")
    if place is not None and ("TORCHELASTIC_RUN_ID" in os.environ or "RANK" not in os.environ):
        return place.rank, world
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if options.num_nodes > 1 and missing:
        raise CdlmError(
            f"training is of {wanted}, and this process was not started as one of several machines: start it with"
            f" torchrun or srun on each, or set {', '.join(missing)}"
        )
    machine = number_in(os.environ, "NODE_RANK", number_in(os.environ, "GROUP_RANK", 0))
    if machine >= options.num_nodes:
        raise CdlmError(
            f"NODE_RANK is {machine} in the environment, expected a number below that of machines, {options.num_nodes}:"
            " machines are counted from 0; set num_nodes or NODE_RANK"
        )
    rank = machine * options.devices + number_in(os.environ, "LOCAL_RANK", 0)
    if place is not None and place.rank != rank:
        raise CdlmError(
            f"RANK is {place.rank} in the environment, expected {rank} by NODE_RANK and LOCAL_RANK: set it so"
        )
    return rank, world
