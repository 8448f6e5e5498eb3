"""Training runs: the text of a run, training into a run folder, and its model card."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import yaml

from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.core.inert import fenced
from cdlm.data.division import Division, Part, Share
from cdlm.data.masking import MASKINGS
from cdlm.data.order import RowLoader, fixed_batches
from cdlm.data.store import DocumentRows, FilledRows, PackedRows, StoredRows, TextRows, build_store
from cdlm.data.tokenizer import load_tokenizer, train_tokenizer
from cdlm.models import hub, shipped
from cdlm.models.hub import Folder
from cdlm.models.lora import (
    Adapter,
    LoraSettings,
    attach,
    is_adapter,
    read_adapter,
    read_settings,
    trained_size,
    write_settings,
)
from cdlm.models.system import System
from cdlm.runs import caches
from cdlm.runs.config import RunConfig, read_run
from cdlm.sampling.session import Session, Student
from cdlm.sampling.texts import save_tokenizer, special_of
from cdlm.training.folder import check_folder, checkpoint_of, held
from cdlm.training.options import rank_and_world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from cdlm.masked.checkpoints.model import ForeignModel

PREVIEW_STEPS = 64


@dataclass(frozen=True)
class RunText:
    """The tokenised text of a run."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerFast
    train: StoredRows
    """What the generator reads."""
    valid: TextRows

    @staticmethod
    def of_run(folder: str | Path) -> RunText:
        """The text that the model of a run folder, or one that comes with the package, was trained on.

        Raises:
            CdlmError: the folder is not that of a training run, or its text is not there.
        """
        return RunText.of(read_run(folder), hub.read_tokenizer(shipped.place_of(folder)))

    @staticmethod
    def of(config: RunConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> RunText:
        """Read, tokenise and cut the text of a configuration; what is tokenised is cached.

        Args:
            tokenizer: by default that of the configuration, which may have to be trained.
        """
        if tokenizer is None and config.tokenizer:
            tokenizer = load_tokenizer(config.tokenizer)
        if tokenizer is None:
            tokenizer = train_tokenizer(config.source.documents("train"), config.vocab_size)
        train = rows_of(config, tokenizer, "generator")
        return RunText(config, tokenizer, train, rows_of(config, tokenizer, "valid"))

    @cached_property
    def judge(self) -> TextRows:
        """What the small judge reads: a part of the training text to itself, or the generator's if it has none."""
        return rows_of(self.config, self.tokenizer, "judge") if self.config.division.has("judge") else self.train

    @cached_property
    def unread(self) -> TextRows | None:
        """The part of the training text that neither generator nor judge reads; None if nothing was set aside."""
        return rows_of(self.config, self.tokenizer, "unread") if self.config.division.has("unread") else None


def rows_of(config: RunConfig, tokenizer: PreTrainedTokenizerFast, part: Part | Literal["valid"]) -> StoredRows:
    """Rows of one part of a run's text; what is tokenised is cached."""
    if part == "valid" or config.division == Division():
        source = config.source
    else:
        source = Share(config.source, config.division, part)
    cache = caches.place_of(config.cache) / "tokens"
    store = build_store(source, "valid" if part == "valid" else "train", tokenizer, cache)
    return {"pack": PackedRows, "document": DocumentRows, "filled": FilledRows}[config.rows](store, config.length)


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    start: str | Path | None = None,
    lora: LoraSettings | None = None,
    progress: bool = True,
) -> System:
    """Train a system into the run folder `out`: model files, checkpoints, metrics, samples and `config.yaml`.

    Args:
        resume: continue the run in `out`; a finished run is left as it is.
        start: folder or Hub id of a trained model whose weights and tokenizer the new run begins with. Its system must
            be that of `config`; the text, the rows and all of `config.training` are free.
        lora: leave these weights as they are and train an adapter beside them, see `cdlm.models.lora`: `out` gets the
            adapter and the map of its updates in place of a model. A run that is resumed has its own.
        progress: show progress on standard error.

    Returns:
        the EMA system, which is also the model in `out`, ready to sample from.

    Raises:
        CdlmError: a setting, the text or a folder is not as it must be; see `cdlm.training.run.train`.
        CdlmError: another process trains into the folder, or a link in it leads out of it.
        Interrupted: the run was asked to stop and can be resumed.
    """
    out, options = Path(out), config.training
    if resume and start is not None:
        raise CdlmError("a run is resumed from its own checkpoint: give resume or start, not both")
    if resume and lora is not None:
        raise CdlmError("a run is resumed with the adapter that it has: give resume or lora, not both")
    if lora is not None:
        _check_adaptable(config, start)
    first = rank_and_world(options)[0] == 0
    if first:
        check_folder(out, resume)
    from cdlm.training.files import steps_done  # Lightning takes seconds to import: first what can be refused at once

    if resume and steps_done(checkpoint_of(out)) == options.steps:
        if progress and first:
            print(f"{out} is finished, at step {options.steps}: more steps continue it", file=sys.stderr)
        return _finished(config, out)
    with held(out) if first else nullcontext():
        tuned = None if lora is None else Tuned(lora, str(start))
        if resume and is_adapter(out):
            tuned = Tuned(*read_settings(out))
        name = start if tuned is None else tuned.base
        origin = None if name is None else _origin(name, config, tuned is not None)
        return _train(config, out, resume, origin, tuned, progress)


class Tuned(NamedTuple):
    """An adapter that is to be trained."""

    settings: LoraSettings
    base: str
    """Folder or Hub id of what it adapts."""


def _check_adaptable(config: RunConfig, start: str | Path | None) -> None:
    options = config.training
    if start is None:
        raise CdlmError("an adapter is trained beside the weights of a model: say which, with start (--start MODEL)")
    if options.optimizer != "adamw" or options.strategy == "fsdp":
        asked = f"optimizer={options.optimizer!r}, strategy={options.strategy!r}"
        raise CdlmError(
            f"an adapter is trained by AdamW on whole copies of the weights, got {asked}: set optimizer='adamw', and no"
            " fsdp"
        )


def _origin(name: str | Path, config: RunConfig, adapts: bool) -> Folder | ForeignModel:
    """What a run begins with: a model folder, or, where an adapter is trained, a LLaDA or Dream, which is loaded.

    Raises:
        CdlmError: there is no such model, it is an adapter, or it is foreign and would be trained itself.
    """
    path = hub.locate(name)
    if is_adapter(path):
        raise CdlmError(f"{path} holds an adapter: merge it into its base with cdlm merge, and start from the result")
    if not hub.is_foreign(path):
        return hub.read(path)
    if not adapts:
        raise CdlmError(
            f"{path} is a model of another library, of which an adapter can be trained: give --lora RANK and the system"
            " Masked, whose weight is used"
        )
    from cdlm.masked.checkpoints.model import open_checkpoint
    from cdlm.masked.checkpoints.tuned import is_flat

    is_flat(config.system, path)  # or refuses the system, before the weights are read

    model = open_checkpoint(path, dtype=config.training.precision)
    if config.length > model.length:
        raise CdlmError(f"rows of {config.length} are longer than {path} was made for, {model.length}: lower length")
    model.need_tokenizer()
    return model


def _train(
    config: RunConfig, out: Path, resume: bool, origin: Folder | ForeignModel | None, tuned: Tuned | None,
    progress: bool,
) -> System:  # fmt: skip
    options = config.training
    if origin is not None and origin.tokenizer is not None:
        config = replace(config, tokenizer=None, vocab_size=len(origin.tokenizer))
    caches.mark(config.cache)
    text = RunText.of(config, _tokenizer(out, resume, origin))
    if config.tokenizer is None and config.vocab_size is None:  # what was left to the text is settled from here on
        config = replace(config, vocab_size=len(text.tokenizer))
    settings = config.to_yaml()
    _ = text.judge, text.unread  # a text too small to be divided is better known before the training
    system = _built(config, text, origin)
    order = RowLoader(text.train, config.batch_size, options.seed)
    system.prepare(text.tokenizer, order, caches.place_of(config.cache), fresh=origin is None and not resume)
    if tuned is not None and origin is not None:
        weights = origin.fingerprint if isinstance(origin, Folder) else origin.stored_fingerprint()
        system.adapt(tuned.settings, tuned.base, weights, options.seed)
    if rank_and_world(options)[0] == 0 and not resume:  # a checkpoint without these could not be resumed
        if system.adapter is not None:
            write_settings(out, system.adapter.settings, system.adapter.base)
        write_text(out / "config.yaml", settings)
        save_tokenizer(text.tokenizer, out)
    shown = progress and rank_and_world(options)[0] == 0
    if shown:
        print(_division(config, text), file=sys.stderr)
    trained = fit(config, text, system, out, resume=resume, progress=progress)
    if shown:
        print(f"{out} has the model: cdlm sample {shlex.quote(str(out))}", file=sys.stderr)
    return trained


def _division(config: RunConfig, text: RunText) -> str:
    """What a person should know of the text before a long training."""
    rows, options = len(text.train), config.training
    taken = options.steps * options.accumulate * config.batch_size
    kept = {"for a judge": config.judge_share, "to compare samples with": config.unread_share}
    said = [f"{share:.0%} of the text is kept {what}" for what, share in kept.items() if share]
    return "; ".join([f"{rows:,} rows of {config.length} tokens, read {taken / rows:,.1f} times", *said])


def fit(
    config: RunConfig,
    text: RunText,
    system: System,
    out: Path,
    *,
    resume: bool,
    progress: bool,
    files: Callable[[RunConfig, System, Path, int], None] | None = None,
    context: Mapping[str, str | int] | None = None,
) -> System:
    """Train a system on the text of a run, as the run's settings say, into a folder that is held and has its settings.

    Args:
        files: writes the files of the model after a step; by default `export`.
        context: what must not change when the training is resumed, beside `context_of`.
    """
    from cdlm.training import run as training

    rank, world = rank_and_world(config.training)
    return training.train(
        system,
        RowLoader(text.train, config.batch_size, config.training.seed, rank, world, config.workers),
        lambda: fixed_batches(text.valid, config.batch_size, config.validation_rows),
        MASKINGS.parse(config.masking).bind(text.tokenizer),
        config.training,
        out,
        samples=partial(preview, config),
        export=partial(files or export, config),
        resume=resume,
        progress=progress,
        context=context_of(config, text, system) | dict(context or {}),
    )


def _tokenizer(out: Path, resume: bool, origin: Folder | ForeignModel | None) -> PreTrainedTokenizerFast | None:
    """The tokenizer that comes along: of the model to start from, or of the run that is resumed."""
    if origin is not None:
        return origin.tokenizer
    return hub.read_tokenizer(out) if resume else None


def _built(config: RunConfig, text: RunText, origin: Folder | ForeignModel | None) -> System:
    if origin is not None and not isinstance(origin, Folder):
        from cdlm.masked.checkpoints.tuned import TunedForeign, is_flat

        assert origin.folder is not None
        tuned = TunedForeign(origin, flat=is_flat(config.system, origin.folder))
        return _described(config, tuned, text.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        system = config.system.build(len(text.tokenizer), special_of(text.tokenizer))
    if origin is not None:
        _check_same_system(system, origin)
        hub.load_weights(system, origin)
    return _described(config, system, text.tokenizer)


def _finished(config: RunConfig, out: Path) -> System:
    adapter = read_adapter(out) if is_adapter(out) else None
    origin = hub.read(out) if adapter is None else _origin(adapter.base, config, adapts=True)
    if not isinstance(origin, Folder):
        from cdlm.masked.checkpoints.tuned import TunedForeign

        assert adapter is not None
        weights = origin.stored_fingerprint()
        system: System = _described(config, TunedForeign(origin, flat=False), origin.need_tokenizer())
    else:
        weights = origin.fingerprint
        system = config.system.build(len(origin.tokenizer), special_of(origin.tokenizer))
        _check_same_system(system, origin)
        hub.load_weights(system, origin)
    if adapter is not None:
        system.fingerprint = attach(system.network, adapter, weights, adapter.base)
        system.folder = out
    return system.eval()


def _described(config: RunConfig, system: System, tokenizer: PreTrainedTokenizerFast) -> System:
    system.tokenizer, system.length, system.ends = tokenizer, config.length, config.rows != "pack"
    system.preset, system.student = config.preset, None  # a student that is trained on is none any more
    return system


def _check_same_system(system: System, origin: Folder) -> None:
    ours = json.loads(json.dumps(system.config))
    keys = [key for key in ours | origin.config if ours.get(key) != origin.config.get(key)]
    if keys:
        how = ", ".join(f"{key} is {origin.config.get(key)} there and {ours.get(key)} here" for key in keys)
        raise CdlmError(f"{origin.path} holds a different system ({how}): give these settings the values from there")


def context_of(config: RunConfig, text: RunText, system: System) -> dict[str, str | int]:
    """What must not change when the run is resumed; see `cdlm.training.context`."""
    return {
        "data": f"{config.source!r} in rows of {config.length} ({config.rows}), shares {config.division}",
        "data.digest": text.train.key,
        "tokenizer": config.tokenizer or f"one trained to {config.vocab_size} tokens",
        **{f"system.{name}": str(value) for name, value in system.config.items()},
        "masking": config.masking,
        "batch_size": config.batch_size,
        **({} if system.adapter is None else _adapter_context(system.adapter)),
    }


def _adapter_context(adapter: Adapter) -> dict[str, str | int]:
    return {"lora": repr(adapter.settings), "base": adapter.base, "base.digest": adapter.weights}


def export(config: RunConfig, system: System, folder: Path, step: int) -> None:
    """Write the files of a model that was trained for `step` steps, and the settings of its run."""
    write_text(folder / "config.yaml", config.to_yaml())
    system.save_pretrained(folder, card(config, system, step))


def preview(config: RunConfig, system: System) -> list[str]:
    """A few samples of a system in training, in at most `PREVIEW_STEPS` steps where it has a number of them."""
    if not config.preview:
        return []
    session = Session(system, system.sampling)
    requests = session.requests(n=config.preview)
    fewer = session.fewer_steps([PREVIEW_STEPS], requests[0])
    if fewer and session.steps_of(requests[0]) > PREVIEW_STEPS:
        session = session.with_steps(fewer[0])
    return session.run(requests).texts


def card(config: RunConfig, system: System, step: int) -> str:
    """The model card of a run after `step` steps: its size, data and configuration, without local folders."""
    size, options = sum(p.numel() for p in system.parameters()) / 1e6, config.training
    trained = "" if system.adapter is None else "trained "
    if system.adapter is not None:
        size = trained_size(system.network) / 1e6
    steps = f"{step}" if step == options.steps else f"{step} of {options.steps}"
    rows = config.batch_size * options.accumulate * options.world
    shape = f"{steps} steps of {rows} rows of {config.length} tokens"
    settings = yaml.safe_dump(without_folders(yaml.safe_load(config.to_yaml())), sort_keys=False, allow_unicode=True)
    source = type(config.source).__name__
    sections = {
        "Training": f"{size:.1f} M {trained}parameters, {shape}, on text of `{source}`.\n\n{fenced(settings, 'yaml')}",
        "Numbers": "See `evaluation.md` in this folder if the model was evaluated.",
    }
    sampling: dict[str, Any] = {"sampling": dict(system.preset)} if system.preset else {}
    if system.student is not None:
        sections["Distillation"] = _words_of(system.student)
        sampling["student"] = asdict(system.student)
    shown = {"length": system.length, **sampling, "model": without_folders(system.config)}
    return hub.model_card(shown, sections, system.kind)


def _words_of(student: Student) -> str:
    return (
        f"A student of {student.steps} steps of the model `{student.name}` (weights `{student.teacher}`), by"
        " progressive distillation: it learns to do in one step what its teacher does in several. It takes this many"
        " steps and no others; the schedule, the embeddings and the tokenizer are its teacher's."
    )


def without_folders(value: Any) -> Any:
    """The same settings with no more than the name of each file that is given by an absolute path."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
