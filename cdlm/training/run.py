"""A training run: one function, one folder."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from inspect import signature
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import cannot_write
from cdlm.core.ranks import is_lost
from cdlm.core.types import Batch, MaskingFn
from cdlm.models.system import System
from cdlm.training.callback import Export, Outputs, RunCallback
from cdlm.training.context import Context
from cdlm.training.files import AtomicCheckpoints, steps_done
from cdlm.training.folder import check_folder
from cdlm.training.module import Loader, TrainingModule
from cdlm.training.options import TrainOptions, rank_and_world
from cdlm.training.progress import reporter
from cdlm.training.sharding import check_shards
from cdlm.training.stop import Interrupted, StopRequest

HARMLESS = (
    r"GPU available but not used",  # on purpose
    r"Found \d+ module\(s\) in eval mode",  # the EMA
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's use of torch
)


def train(
    system: System,
    loader: Loader,
    valid_batches: Callable[[], Iterable[Batch]],
    masking: MaskingFn,
    options: TrainOptions,
    run_dir: str | Path,
    *,
    samples: Callable[[System], list[str]] | None = None,
    export: Export | None = None,
    resume: bool = False,
    progress: bool = True,
    context: Context | None = None,
) -> System:
    """Train `system` in place into a run folder, and return its EMA, which `export` and `samples` receive as well.

    The folder gets `checkpoints/last.ckpt` (for resuming only), `metrics.csv` and `samples/step_*.txt`. A resumed run
    equals an uninterrupted one bit for bit on one CPU process, if system, loader and options are built as before.

    Args:
        loader: endless batches of this rank.
        valid_batches: gives this rank's held-out batches, the same ones each time.
        masking: draws the positions to generate.
        samples: texts to write beside each validation.
        export: called with the EMA system, the folder and the number of steps before each checkpoint, so that the
            folder can be used while the run goes on and after it was interrupted.
        resume: continue from the folder's checkpoint. Learning rates, intervals and `steps` may differ from before.
        progress: show a bar on a terminal and lines elsewhere, on standard error.
        context: what must not change when resuming, such as a key of the data.

    Returns:
        the EMA system on the device that it was trained on, or on the CPU if it was spread over several; of several
        processes, only rank 0 has the last weights.

    Raises:
        CdlmError: nothing to resume, a run that would be overwritten, a changed context, NaN, a full disk.
        Interrupted: SIGTERM or Ctrl-C came; the last step is saved, unless a second Ctrl-C cut that short.
    """
    outputs = Outputs(Path(run_dir), valid_batches, samples, export)
    first = rank_and_world(options)[0] == 0
    if first:
        check_folder(outputs.run_dir, resume)
    try:
        outputs.run_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise cannot_write(outputs.run_dir, error if isinstance(error, OSError) else OSError(str(error))) from error
    if resume:
        steps_done(outputs.checkpoint)  # says what is wrong with it, before anything is built
    fixed = {name: getattr(options, name) for name in ("seed", "accumulate", "optimizer")} | {"devices": options.world}
    module = TrainingModule(system, loader, masking, options, {**(context or {}), **fixed})
    shown = reporter(progress and first)
    with StopRequest() as stop, _quiet():
        trainer = _trainer(options, outputs, RunCallback(outputs, shown, stop))
        _tell(trainer.loggers, context or {}, options)
        try:
            trainer.fit(module, module.feed, ckpt_path=outputs.checkpoint if resume else None, weights_only=True)
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into an exit
                raise
            raise Interrupted(
                f"stopped at once; {outputs.checkpoint} is from an earlier step", signal.SIGINT
            ) from error
        except OSError as error:  # of a logger, or of a folder for temporary files
            if error.errno is None:  # not of the system
                raise
            raise cannot_write(outputs.run_dir, error) from error
        except RuntimeError as error:
            if options.world == 1 or not is_lost(error):
                raise
            raise CdlmError(
                f"another process of this run has ended or cannot be reached ({first_line(error)}): see what it said in"
                f" its own output; {outputs.checkpoint} is the last checkpoint, if there is one: resume"
            ) from error
        finally:
            shown.close()
        return module.trained() if options.strategy == "fsdp" else module.trained().to(trainer.strategy.root_device)


def _trainer(options: TrainOptions, outputs: Outputs, callback: Callback) -> Trainer:
    try:
        return Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=_strategy(options),
            precision="32-true",
            max_steps=options.steps,
            max_epochs=-1,
            accumulate_grad_batches=options.accumulate,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=[outputs.metrics, *_loggers(options, outputs.run_dir)],
            callbacks=[callback],
            plugins=[AtomicCheckpoints()],
            default_root_dir=outputs.run_dir,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError) as error:  # a ValueError is of what SLURM says
        raise CdlmError(
            f"cannot train on {options.num_nodes} x {options.devices} x {options.accelerator}:"
            f" {' '.join(str(error).split())}"
        ) from error


def _strategy(options: TrainOptions) -> Strategy | str:
    if options.strategy == "fsdp":
        check_shards()
        return ModelParallelStrategy(options.world, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if options.strategy == "ddp" or options.world > 1:
        # Buffers follow from the weights, equally in each process. Older torch has another name for this.
        newer = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        return DDPStrategy(forward_sync_buffers=False) if newer else DDPStrategy(broadcast_buffers=False)
    return "auto"


def _loggers(options: TrainOptions, run_dir: Path) -> list[Logger]:
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    make: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(run_dir, name="tensorboard", version=""),
        "wandb": lambda: WandbLogger(save_dir=run_dir, name=run_dir.name),
    }
    try:
        return [make[name]() for name in options.loggers]
    except ModuleNotFoundError as error:
        raise CdlmError(f"a logger of {options.loggers} is not installed: pip install it or take it out") from error


def _tell(loggers: Sequence[Logger], context: Context, options: TrainOptions) -> None:
    """Give the loggers the hyper-parameters, which they show beside the curves."""
    plain = {name: str(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
    for logger in loggers:
        logger.log_hyperparams({**context, **plain})


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's tips and notices are about features that are off on purpose."""
    names = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in names]
    with warnings.catch_warnings():
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message)
        try:
            for logger in names:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(names, levels, strict=True):
                logger.setLevel(level)
