"""Sound files and folders of each kind, small, and what uses them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import heads
import numpy as np
import torch
from evaluation_toys import random_judge, tiny_gpt2
from foreign import copy_of
from hostile.trials import Nonsense
from toys import autoregressive_with_tokenizer, masked_with_tokenizer, tokenizer, with_tokenizer

import cdlm
from cdlm.api import merge
from cdlm.autoregressive.system import AutoregressiveModel
from cdlm.cli.main import main
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.data.sources import Files, Stories
from cdlm.data.store import DocumentRows, PackedRows, TokenStore, build_store
from cdlm.evaluation.judge import Judge
from cdlm.evaluation.metrics.ar_nll import ar_nll
from cdlm.evaluation.texts import RealText, read_texts
from cdlm.halting import EDIT, parse_criterion
from cdlm.halting.calibration import calibrated_rule
from cdlm.halting.fit import Fitting, fit
from cdlm.halting.head import write_head
from cdlm.halting.replay import replay
from cdlm.masked.joint import LayerFitting, SamplerLayer, write_layer
from cdlm.masked.system import MaskedDiffusion
from cdlm.models.lora import LoraSettings, lora_parameters
from cdlm.models.system import System
from cdlm.policies.adjust import Adjust
from cdlm.policies.guided import Guided
from cdlm.recording.file import Recording
from cdlm.runs.config import RunConfig
from cdlm.runs.train import train
from cdlm.training.options import TrainOptions


@dataclass(frozen=True)
class Kind:
    """Files of a kind.

    Attributes:
        build: writes sound ones into a folder.
        use: opens those of a folder and does with them what they are for. Raises `Nonsense` if what comes of it cannot
            be.
    """

    build: Callable[[Path], Any]
    use: Callable[[Path], Any]


def must(true: Any, what: str) -> None:
    """Raise if something that holds of all results does not hold."""
    if not bool(true):
        raise Nonsense(what)


# --- models ----------------------------------------------------------------------------------------------------------

RECOMMENDED = {"steps": 3, "solver": "Ancestral()", "commit": "Threshold(0.7)"}


def build_continuous(folder: Path) -> None:
    """A continuous model that recommends a sampler."""
    with_tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sampling": RECOMMENDED}))


def use_model(folder: Path) -> None:
    """Load a model, and sample a text."""
    model = cdlm.load(folder, device="cpu")
    check_weights(model)
    causal = isinstance(model, AutoregressiveModel)
    samples = cdlm.generate(model, n=1, length=4) if causal else cdlm.generate(model, n=1, steps=2)
    ids, known = samples.tokens, len(model.tokenizer)  # pyright: ignore
    must(ids.min() >= 0 and ids.max() < known, "tokens that the tokenizer does not have")
    must((np.asarray(samples.nfe) >= 0).all(), "calls below zero")


def check_weights(model: Any) -> None:
    """All weights of a model are numbers."""
    must(all(weight.isfinite().all() for weight in model.state_dict().values()), "weights that are no numbers")


def build_published(family: str, folder: Path) -> None:
    """A model in a published format of masked models: settings and weights."""
    copy_of(family, folder)
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()


def use_published(folder: Path) -> None:
    """Load the model, and sample tokens."""
    tokens = cdlm.decode(cdlm.load(folder, device="cpu"), [[1, 2]], 4, steps=2).tokens  # pyright: ignore
    must(tokens.min() >= 0, "tokens below zero")


# --- what belongs to models ------------------------------------------------------------------------------------------


def use_judge(folder: Path) -> None:
    """Load a judge, and let it read."""
    nats = ar_nll(Judge.load(folder), ["the cat sees"]).text_nats
    must(np.isfinite(nats).all() and (nats >= 0).all(), f"nats of {nats}")


def build_recording(folder: Path) -> None:
    """A recording of 20 samples."""
    folder.mkdir()
    heads.runs(20).write(folder / "recording.safetensors")


def use_recording(folder: Path) -> None:
    """Read a recording, and replay rules on it."""
    recording = Recording.read(folder / "recording.safetensors")
    for rule in ("Patience(2)", "Entropy(1.0)"):
        check_replay(recording, rule)


def check_replay(recording: Recording, rule: str) -> None:
    """A replay makes from no call up to those of the full run."""
    made = replay(recording, parse_criterion(rule))
    calls, tokens = np.asarray(made.nfe), np.asarray(made.tokens)
    must((calls >= 0).all() and (calls <= heads.STEPS).all(), f"calls of {calls}")
    must((tokens >= 0).all(), "tokens below zero")


def build_head(folder: Path) -> None:
    """A halting head."""
    write_head(folder, fit([heads.runs(48)], Fitting(epochs=2)))


def use_head(folder: Path) -> None:
    """Halt by the head."""
    check_replay(heads.runs(20), f"Learned(path={str(folder)!r}, threshold=0.5)")


SETTINGS = {"steps": 5}
CALIBRATION = {
    "cdlm_halting": 3, "weights": "w", "calibrations": [{
        "settings": SETTINGS, "rule": "Patience(steps=3)", "measure": "a", "bound": "b", "goal": {"limit": 0.1},
        "samples": 5, "seed": 0, "judge": None, "trials": [{"rule": "Patience(steps=3)", "calls": 1.0}],
    }],
}  # fmt: skip


def build_calibration(folder: Path) -> None:
    """A calibrated rule."""
    folder.mkdir()
    (folder / "halting.json").write_text(json.dumps(CALIBRATION))


def use_calibration(folder: Path) -> None:
    """Build the calibrated rule."""
    parse_criterion(calibrated_rule(folder, lambda weights: weights == "w", SETTINGS))


LENGTH = 12
"""Tokens of a sample."""


def build_adapter(folder: Path) -> None:
    """An adapter with its map, of a model beside the folder."""
    base = folder.with_name("base")
    masked_with_tokenizer(length=LENGTH).save_pretrained(base)
    model, draw = cdlm.load(base, device="cpu"), torch.Generator().manual_seed(0)
    assert isinstance(model, MaskedDiffusion)
    model.adapt(LoraSettings(2), str(base), model.need_fingerprint(), seed=0)
    state = {}
    for half in lora_parameters(model.network):
        half.data = torch.rand(half.shape, generator=draw)
        state[half] = {"exp_avg": half.data - 0.5, "exp_avg_sq": half.data}
    assert model.adapter is not None
    model.adapter.observe(model.network, state)
    model.save_pretrained(folder)


def use_adapter(folder: Path) -> None:
    """Load the model with its adapter, sample by a rule that reads the map, and merge the two."""
    model: Any = cdlm.load(folder, device="cpu")
    check_weights(model)
    rule = EDIT(str(folder), delta=100.0, span=1)
    samples = cdlm.generate(model, n=2, policy=f"LLaDA({LENGTH})", halt=rule)
    must((samples.nfe >= 1).all() and (samples.nfe <= LENGTH).all(), f"calls of {samples.nfe}")
    merge(folder, "merged")
    check_weights(cdlm.load("merged", device="cpu"))


def build_layer(folder: Path) -> None:
    """A sampler layer that changes what is said."""
    model = masked_with_tokenizer(length=LENGTH)
    layer = SamplerLayer(model, torch.Generator().manual_seed(0)).requires_grad_(False)
    layer.gate.fill_(1.0)
    folder.mkdir()
    write_layer(folder, layer, model.need_fingerprint(), LayerFitting(), {})


def use_layer(folder: Path) -> None:
    """Sample with the layer."""
    samples = cdlm.generate(masked_with_tokenizer(length=LENGTH), n=2, policy=Adjust(str(folder), 3))
    must((samples.nfe == LENGTH / 3).all(), f"calls of {samples.nfe}")
    must(samples.counted[0]["layer_passes"] == 2 * LENGTH / 3, f"passes of {samples.counted}")


def build_guide(folder: Path) -> None:
    """A guide with the tokenizer of the model that it guides."""
    tiny_gpt2(0, vocab_size=len(tokenizer())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def use_guide(folder: Path) -> None:
    """Sample with the guide, in both modes."""
    for mode in ("assisted", "speculative"):
        samples = cdlm.generate(masked_with_tokenizer(length=LENGTH), n=2, policy=Guided(str(folder), mode))
        must((samples.nfe >= 1).all() and (samples.nfe <= LENGTH).all(), f"calls of {samples.nfe}")
        must(samples.tokens.max() < len(tokenizer()), "tokens that the tokenizer does not have")


# --- texts -----------------------------------------------------------------------------------------------------------


TEXTS = ("texts.jsonl", "texts.csv", "texts.parquet")


def build_texts(folder: Path) -> None:
    """Samples in each format."""
    real_text()  # built once
    samples = cdlm.generate(with_tokenizer(), ["the"], n=4, steps=3)
    for name in TEXTS:
        samples.save(folder / name)


@cache
def real_text() -> RealText:
    """What samples are measured by."""
    with TemporaryDirectory() as place:
        rows = PackedRows(build_store(Stories(n=60), "valid", tokenizer(), Path(place)), 8)
    return RealText(rows, None, tokenizer(), Stories(n=60))


def use_texts(folder: Path) -> None:
    """Read each file as the evaluation does, and ask for all that it asks."""
    for name in TEXTS:
        corpus = real_text().samples("samples", read_texts(folder / name))
        for text, spans in zip(corpus.texts, corpus.given or [], strict=False):
            must(all(0 <= start <= end <= len(text) for start, end in spans), f"{spans} in {len(text)} characters")
        must(all(calls >= 0 for calls in corpus.nfe or []), "calls below zero, or no numbers")
        must(corpus.prompted in (True, False) and corpus.whole in (True, False), "neither with prompts nor without")
        corpus.made()


def build_documents(folder: Path) -> None:
    """The same, and plain text, to train on."""
    build_texts(folder)
    (folder / "texts.txt").write_text("the cat sat.\n\nthe dog saw the cat.\n")


def use_documents(folder: Path) -> None:
    """Read each file as training does."""
    for name in (*TEXTS, "texts.txt"):
        source = Files((str(folder / name),), valid_fraction=0.5)
        source.fingerprint()
        must(all(text.strip() for text in source.documents("train")), "documents without text")


def build_tokens(folder: Path) -> None:
    """A store of tokens, in a folder that has its key as a name."""
    build_store(Stories(n=60), "train", tokenizer(), folder)


def use_tokens(folder: Path) -> None:
    """Open the store, and cut rows in both ways."""
    (place,) = (path for path in folder.iterdir() if path.is_dir())
    store = TokenStore.open(place)
    for rows in (PackedRows(store, 8), DocumentRows(store, 8)):
        for number in range(min(20, len(rows))):
            tokens = rows[number].tokens
            must((tokens >= 0).all() and (tokens < len(tokenizer())).all(), "tokens that the tokenizer does not have")


# --- a run -----------------------------------------------------------------------------------------------------------

STEPS = 2


def build_run(folder: Path) -> None:
    """The folder of a run of two steps."""
    system, cache = CDCD(width=16, depth=1, heads=2, dim=8), folder.parent / "cache"
    options = TrainOptions(steps=STEPS, accelerator="cpu", warmup=1, checkpoint_every=1, log_every=1)
    config = RunConfig(source=Stories(n=60), system=system, vocab_size=300, length=16, batch_size=4, validation_rows=4,
                       preview=1, cache=str(cache), training=options)  # fmt: skip
    train(config, folder, progress=False)
    shutil.rmtree(folder / "samples")


def use_run(folder: Path) -> None:
    """Go on with the run for one step."""
    main(["train", "--resume", str(folder), f"--training.steps={STEPS + 1}", "--training.accelerator=cpu", "--quiet"])
    made = cdlm.load(folder, device="cpu")
    check_weights(made)
    must(isinstance(made, System), "a resumed run is no model")
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    steps = [int(row.split(",")[0]) for row in rows]
    must(steps == sorted(steps) and steps[-1] == STEPS + 1, f"metrics of steps {steps}")


KINDS: dict[str, Kind] = {
    "continuous model": Kind(build_continuous, use_model),
    "masked model": Kind(lambda folder: masked_with_tokenizer().save_pretrained(folder), use_model),
    "autoregressive model": Kind(lambda folder: autoregressive_with_tokenizer().save_pretrained(folder), use_model),
    "LLaDA model": Kind(lambda folder: build_published("llada", folder), use_published),
    "Dream model": Kind(lambda folder: build_published("Dream", folder), use_published),
    "judge": Kind(lambda folder: random_judge().save(folder), use_judge),
    "recording": Kind(build_recording, use_recording),
    "halting head": Kind(build_head, use_head),
    "adapter": Kind(build_adapter, use_adapter),
    "sampler layer": Kind(build_layer, use_layer),
    "guide": Kind(build_guide, use_guide),
    "calibration": Kind(build_calibration, use_calibration),
    "training text": Kind(build_documents, use_documents),
    "store of tokens": Kind(build_tokens, use_tokens),
    "texts": Kind(build_texts, use_texts),
    "run": Kind(build_run, use_run),
}
"""All kinds of files that are read, by what they hold."""
