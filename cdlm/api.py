"""Train a model on the text of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cdlm import config as names
from cdlm.config import RunConfig
from cdlm.core.files import write_text
from cdlm.data.order import RowLoader, fixed_batches
from cdlm.data.store import DocumentRows, FilledRows, PackedRows, TextRows, build_store
from cdlm.data.tokenizer import load_tokenizer, train_tokenizer
from cdlm.models import hub
from cdlm.models.system import System, special_of
from cdlm.sampling.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREVIEW_STEPS = 64


@dataclass(frozen=True)
class Data:
    """Tokenised text of a run."""

    tokenizer: PreTrainedTokenizerFast
    train: TextRows
    valid: TextRows

    @staticmethod
    def of(config: RunConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> Data:
        """Read, tokenise and cut the text of a configuration; stores are cached."""
        if tokenizer is None and config.tokenizer:
            tokenizer = load_tokenizer(config.tokenizer)
        if tokenizer is None:
            tokenizer = train_tokenizer(config.source.documents("train"), config.vocab_size)
        cache = Path(config.cache).expanduser() / "tokens"
        cut = {"pack": PackedRows, "document": DocumentRows, "filled": FilledRows}[config.rows]
        train = cut(build_store(config.source, "train", tokenizer, cache), config.length)
        return Data(tokenizer, train, cut(build_store(config.source, "valid", tokenizer, cache), config.length))


def train(config: RunConfig, out: Path, config_text: str, resume: bool = False, progress: bool = True) -> None:
    """Train a system into the run folder `out`: model files, checkpoints, metrics, samples and `config.yaml`.

    Args:
        config_text: the configuration as YAML, kept in the folder.
        resume: continue the run in `out`.
    """
    from cdlm.training import run as training

    data = Data.of(config)
    options = config.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        system = config.system.build(len(data.tokenizer), special_of(data.tokenizer))
    system.tokenizer, system.length, system.ends = data.tokenizer, config.length, config.rows != "pack"

    def export(averaged: System, folder: Path) -> None:
        write_text(folder / "config.yaml", config_text)
        averaged.save_pretrained(folder, card(config, averaged, config_text))

    rank, world = training.rank_and_world(options)
    training.train(
        system,
        RowLoader(data.train, config.batch_size, options.seed, rank, world, config.workers),
        lambda: fixed_batches(data.valid, config.batch_size, config.validation_rows),
        names.masking(config.masking).bind(data.tokenizer),
        options,
        out,
        samples=partial(preview, config),
        export=export,
        resume=resume,
        progress=progress,
        context={
            "data": data.train.key,
            **{f"system.{name}": str(value) for name, value in system.config.items()},
            "masking": config.masking,
            "batch_size": config.batch_size,
        },
    )


def preview(config: RunConfig, system: System) -> list[str]:
    """A few samples of a system in training, in at most `PREVIEW_STEPS` steps."""
    if not config.preview:
        return []
    session = Session(system, system.sampling)
    requests = session.requests(n=config.preview)
    if session.steps_of(requests[0]) > PREVIEW_STEPS:
        session = session.with_steps(PREVIEW_STEPS)
    return session.run(requests).texts


def card(config: RunConfig, system: System, config_text: str) -> str:
    """The model card of a run: its size, data and full configuration."""
    size = sum(p.numel() for p in system.parameters()) / 1e6
    shape = f"{config.training.steps} steps of {config.batch_size} rows of {config.length} tokens"
    sections = {
        "Training": f"{size:.1f} M parameters, {shape}, on `{config.source!r}`.\n\n```yaml\n{config_text.strip()}\n```",
        "Numbers": "See `evaluation.md` in this folder if the model was evaluated.",
    }
    return hub.model_card({"length": system.length, "model": system.config}, sections)
