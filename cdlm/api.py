"""What commands do besides drawing samples: train, keep and replay recordings, evaluate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cdlm import config as names
from cdlm import generation
from cdlm.config import RunConfig
from cdlm.continuous.likelihood import Nats, Text
from cdlm.continuous.sampler import Sampler
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.core.parallel import spread
from cdlm.core.progress import Parts, meter
from cdlm.core.trees import take
from cdlm.core.types import HaltReason
from cdlm.data.order import RowLoader, fixed_batches
from cdlm.data.sources import Source, Stories
from cdlm.data.store import DocumentRows, FilledRows, PackedRows, TextRows, build_store
from cdlm.data.stories import is_sentence, whole_sentences
from cdlm.data.tokenizer import load_tokenizer, train_tokenizer
from cdlm.evaluation import table
from cdlm.evaluation.judge import Judge, cached_judge, features, train_judge
from cdlm.evaluation.metrics.ar_nll import ArNll, Spans, ar_nll
from cdlm.evaluation.metrics.likelihood import Likelihood, LikelihoodSettings, row_nats
from cdlm.evaluation.table import Corpus, Evaluation
from cdlm.halting import Criterion
from cdlm.halting.replay import replay
from cdlm.masked.model import MaskedModel
from cdlm.masked.sampler import Decoder
from cdlm.models import hub
from cdlm.models.hub import Folder
from cdlm.models.system import Precision, System, special_of
from cdlm.recording.file import Recording, check_same_model
from cdlm.sampling.samples import Samples, ends_of, given_spans, shown_of, text_of, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREVIEW_STEPS = 64
LINE = ("text", "tokens", "nfe", "steps", "budget", "reason", "seed", "index", "given")
"""Fields of a sample's JSON object."""


def recording_of(samples: Samples, sampler: Sampler | Decoder, run: Folder, precision: Precision) -> Recording:
    """Recorded samples as something to keep and replay, with what is known of the model and the sampler."""
    if samples.record is None:
        raise CdlmError("the samples have no record to keep: draw them with record=True")
    halted = sum(reason is HaltReason.CRITERION for reason in samples.reason)
    if halted:
        raise CdlmError(
            f"replay needs full-length runs, and {halted} of {len(samples)} samples halted early:"
            " record without a halting rule"
        )
    settings = {**sampler.settings, "length": samples.tokens.shape[1], "precision": precision}
    if run.ends:
        settings["ends"] = True
    return Recording(
        samples.record, samples.tokens, samples.given, samples.valid, samples.index, samples.seed,
        run.path.name, hub.fingerprint(run.path), settings,
    )  # fmt: skip


def keep(recording: Recording, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write the recording into `folder`, beside the tokenizer that reads its tokens; returns the file.

    Raises:
        CdlmError: the folder holds recordings of another model.
    """
    check_same_model(folder, recording.weights)
    given = recording.given & recording.valid
    asked = [recording.index, given, recording.valid, np.where(given, recording.tokens, 0)]
    what = json.dumps([recording.settings, *(part.tolist() for part in asked)], sort_keys=True)
    digest = hashlib.sha256(what.encode()).hexdigest()[:8]
    file = folder / f"{recording.record.steps}-steps-seed-{recording.seed}-{digest}.safetensors"
    recording.write(file)
    hub.save_tokenizer(tokenizer, folder)
    return file


def replayed(recording: Recording, rule: str | Criterion, tokenizer: PreTrainedTokenizerFast) -> Samples:
    """The samples that a live run with the rule would have given."""
    asked = names.criterion(rule)
    run, eos = replay(recording, asked), special_of(tokenizer).eos_id
    ends = eos if recording.settings.get("ends") else None
    shown = shown_of(run.tokens, recording.given, recording.valid, ends)
    masked, budget = recording.record.commits is not None, recording.record.budgets
    full = masked & ~run.halted & ((run.steps < budget) | (not asked.waits))
    reasons = [
        HaltReason.CRITERION if halted else HaltReason.FULL if done else HaltReason.BUDGET
        for halted, done in zip(run.halted, full, strict=True)
    ]
    return Samples(
        tokens=run.tokens,
        texts=texts_of(tokenizer, run.tokens, shown),
        nfe=run.nfe,
        steps=run.steps,
        budget=recording.record.steps,
        reason=reasons,
        seed=recording.seed,
        index=recording.index,
        given=recording.given,
        valid=recording.valid,
        shown=shown,
        settled=recording.record.settled(
            ends_of(run.tokens, recording.given & recording.valid, ends), recording.given, run.steps - 1
        ),
    )


def agreement(tokens: Int[np.ndarray, "m n"], recording: Recording) -> Float[np.ndarray, " m"]:
    """Share of each sample's generated tokens that are those of the full run."""
    same = (tokens == recording.tokens) & ~recording.given
    return same.sum(1) / (~recording.given).sum(1)


def lines(samples: Samples, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """One JSON object a sample, with the fields of `LINE`; `given` are the characters [start, end) of the prompt."""
    out = []
    for i, text in enumerate(samples.texts):
        shown = samples.shown[i]
        ids, given = samples.tokens[i][shown].tolist(), samples.given[i][shown]
        out.append(
            {
                "text": text, "tokens": ids, "nfe": int(samples.nfe[i]), "steps": int(samples.steps[i]),
                "budget": samples.budget,
                "reason": samples.reason[i].name.lower(), "seed": samples.seed, "index": int(samples.index[i]),
                "given": given_spans(tokenizer, ids, given),
            }
        )  # fmt: skip
    return out


def write_lines(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file, whole or not at all."""
    write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects))


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
    """A few samples of a system in training."""
    if not config.preview or not isinstance(system, EmbeddingDiffusion | MaskedModel):
        return []
    steps = PREVIEW_STEPS if isinstance(system, EmbeddingDiffusion) else None
    return generation.generate(system, n=config.preview, steps=steps).texts


def card(config: RunConfig, system: System, config_text: str) -> str:
    """The model card of a run: its size, data and full configuration."""
    size = sum(p.numel() for p in system.parameters()) / 1e6
    shape = f"{config.training.steps} steps of {config.batch_size} rows of {config.length} tokens"
    sections = {
        "Training": f"{size:.1f} M parameters, {shape}, on `{config.source!r}`.\n\n```yaml\n{config_text.strip()}\n```",
        "Numbers": "See `evaluation.md` in this folder if the model was evaluated.",
    }
    return hub.model_card({"length": system.length, "model": system.config}, sections)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The samples of a JSONL file that `cdlm sample --out` wrote."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise CdlmError(f"cannot read samples from {path} ({reason}): write them with cdlm sample --out") from error
    out = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        try:
            item = json.loads(line)
            out.append({key: item[key] for key in LINE})
        except (ValueError, KeyError, TypeError) as error:
            raise CdlmError(
                f"{path}, line {number} is no sample ({error!r}): expected text, tokens, nfe, given"
            ) from error
    if not out:
        raise CdlmError(f"{path} holds no samples: write some with cdlm sample --out")
    return out


def corpus_of(name: str, samples: Sequence[Mapping[str, Any]], source: Source) -> Corpus:
    """Samples as a row of the table."""
    texts = [item["text"] for item in samples]
    return Corpus(
        name,
        [item["tokens"] for item in samples],
        texts,
        [[(start, end) for start, end in item["given"]] for item in samples],
        [item["nfe"] for item in samples],
        {
            "steps": max(item["budget"] for item in samples),
            "halted": sum(item["reason"] == "criterion" for item in samples) / len(samples),
            **_grammar(texts, source),
        },
    )


def real_text(data: Data, source: Source, n: int) -> tuple[Corpus, Corpus]:
    """Two disjoint sets of `n` held-out rows: one to judge, one for MAUVE to compare with."""
    if len(data.valid) < 2 * n:
        raise CdlmError(
            f"evaluating {n} samples needs {2 * n} rows of held-out text, there are {len(data.valid)}:"
            " take fewer samples, or hold out more text"
        )
    rows = [data.valid[i] for i in range(2 * n)]  # neighbours stay together: no document is in both sets but one
    eos = None if isinstance(data.valid, PackedRows) else special_of(data.tokenizer).eos_id
    tokens = [text_ids(row.tokens[row.valid].tolist(), eos) for row in rows]
    texts = [text_of(data.tokenizer, ids) for ids in tokens]
    extra = _grammar(texts[:n], source)
    return Corpus("real text", tokens[:n], texts[:n], extra=extra), Corpus("more real text", tokens[n:], texts[n:])


def text_ids(ids: list[int], eos_id: int | None) -> list[int]:
    """Tokens of a row up to its first `eos_id`; None ends no text."""
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def _grammar(texts: list[str], source: Source) -> dict[str, float]:
    if not isinstance(source, Stories):
        return {}
    whole = [sentence for text in texts for sentence in whole_sentences(text)]
    return {"grammar": sum(map(is_sentence, whole)) / max(1, len(whole))}


def evaluate(
    run: str | Path,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    judge: str | None = None,
    judge_steps: int = 500,
    mauve_seeds: int = 5,
    device: str = "cpu",
    devices: int = 1,
    progress: bool = True,
) -> Evaluation:
    """The table of sets of samples (by name, as `lines` gives them) beside a run's held-out text.

    Args:
        run: folder whose configuration names the text.
        judge: folder or Hub id of a causal language model; by default a small one is trained on the text and cached.
        judge_steps: training steps of the small one.
        mauve_seeds: k-means seeds; 0 leaves MAUVE out.
        device, devices: where the judge runs, and on how many processes.
    """
    config = names.read_run(run)
    data = Data.of(config, hub.read_tokenizer(Path(run)))
    corpora = [corpus_of(name, items, config.source) for name, items in samples.items()]
    real, more = real_text(data, config.source, len(corpora[0].texts))
    asked = open_judge(judge, data, config, judge_steps, device, progress)
    return table.evaluate(
        corpora,
        real,
        asked,
        decode=partial(text_of, data.tokenizer),
        mauve_reference=more if mauve_seeds else None,
        mauve_seeds=mauve_seeds,
        score=partial(_score, devices, device),
        feature=partial(_features, devices, device),
    )


def _score(devices: int, device: str, judge: Judge, texts: list[str], given: Spans | None) -> ArNll:
    parts = spread(partial(_score_share, judge, texts, given), min(devices, len(texts)), device)
    return ArNll.merge(parts)


def _score_share(judge: Judge, texts: list[str], given: Spans | None, rank: int, world: int, device: str) -> ArNll:
    here = replace(judge, device=device)
    return ar_nll(here, texts[rank::world], None if given is None else given[rank::world])


def _features(devices: int, device: str, judge: Judge, texts: list[str]) -> Float[np.ndarray, "m w"]:
    parts = spread(partial(_features_share, judge, texts), min(devices, len(texts)), device)
    result = np.empty((len(texts), parts[0].shape[1]), parts[0].dtype)
    for rank, part in enumerate(parts):
        result[rank :: len(parts)] = part
    return result


def _features_share(judge: Judge, texts: list[str], rank: int, world: int, device: str) -> Float[np.ndarray, "m w"]:
    return features(replace(judge, device=device), texts[rank::world])


def open_judge(
    judge: str | None, data: Data, config: RunConfig, steps: int, device: str = "cpu", progress: bool = True
) -> Judge:
    """The judge of that folder or Hub id; without one, the small GPT-2 of the run's text."""
    return Judge.load(judge, device) if judge else own_judge(data, config, steps, device, progress)


def own_judge(data: Data, config: RunConfig, steps: int, device: str = "cpu", progress: bool = True) -> Judge:
    """The small GPT-2 of a run's text, trained once and cached."""
    key = hashlib.sha256(f"{data.train.key} {steps}".encode()).hexdigest()[:16]
    loader = RowLoader(data.train, config.batch_size, seed=0)

    def train_it() -> Judge:
        rows = judge_rows((batch.tokens[batch.valid] for batch in loader), data.tokenizer, config)
        with meter(steps, "judge, training steps", progress) as shown:
            return train_judge(
                rows, data.tokenizer, length=config.length, steps=steps, seed=0, device=device,
                progress=lambda step, nats: shown.advance(nats_per_token=f"{nats:.3f}"),
            )  # fmt: skip

    return cached_judge(key, Path(config.cache).expanduser() / "judges", train_it, device)


def judge_rows(
    batches: Iterable[Int[Tensor, " k"]], tokenizer: PreTrainedTokenizerFast, config: RunConfig
) -> Iterator[Int[Tensor, "b n"]]:
    """Rows as a judge will meet them: the end-of-text token is the line break that it is in a sample's text."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    size, stream = config.batch_size * config.length, list[int]()
    for batch in batches:
        for token in batch.tolist():
            stream.extend(newline if token == tokenizer.eos_token_id else [token])
        while len(stream) >= size:
            yield torch.tensor(stream[:size]).view(config.batch_size, config.length)
            del stream[:size]


def plot(samples: Samples, path: Path, title: str) -> None:
    """Switches, norms and angles of recorded samples against the step, with the halting points marked."""
    from cdlm.evaluation.plots.trajectories import plot_trajectories

    if samples.record is None:
        raise CdlmError("the samples have no record to plot: draw them with record=True")
    record = samples.record
    columns = {**record.signals, "switches": np.where(record.nfe > 0, record.switch_counts(), np.nan)}
    plot_trajectories(columns, path, halted=samples.steps - 1, title=title)


def likelihood(
    run: str | Path,
    rows: int = 128,
    asked: LikelihoodSettings | None = None,
    *,
    precision: Precision = "fp32",
    device: str = "cpu",
    devices: int = 1,
    progress: bool = True,
) -> Likelihood:
    """The likelihood of the first `rows` rows of a run's held-out text, each from nothing, padding apart.

    Where rows end at a text's end, that end is a token of the text and what fills the row after it is not; it is still
    part of what the model has to predict.

    Args:
        rows: at most; all there are if they are fewer.
        precision: arithmetic of the network; the ODE refuses bf16.
        device, devices: where the model runs, and on how many processes.

    Raises:
        CdlmError: the model has no likelihood, or the folder is not that of a run.
    """
    asked = asked or LikelihoodSettings()
    if rows < 1:
        raise CdlmError(f"a likelihood is of rows >= 1, got {rows}")
    if hub.is_foreign(hub.locate(run)):
        raise CdlmError(f"{run} is another library's model, and a likelihood is of our own systems: give a run folder")
    config = names.read_run(run)
    data = Data.of(config, hub.read_tokenizer(Path(run)))
    held = [data.valid[i] for i in range(min(rows, len(data.valid)))]
    tokens = torch.from_numpy(np.stack([row.tokens for row in held]))
    valid = torch.from_numpy(np.stack([row.valid for row in held]))
    key = torch.arange(len(held))[:, None]
    text = Text(tokens, valid, None if bool(valid.all()) else valid, key)
    work = partial(_nats_share, str(run), precision, text, asked, progress)
    found = _dealt(spread(work, min(devices, len(held)), device))
    eos = None if isinstance(data.valid, PackedRows) else special_of(data.tokenizer).eos_id
    texts = [_with_end(row.tokens[row.valid].tolist(), eos) for row in held]
    ode = asked.ode
    settings = {
        "levels": asked.levels, **({} if asked.read_out is None else {"read out at": asked.read_out}),
        "seed": asked.seed, "precision": precision,
        **({} if ode is None else {"ode": ode.method, "ode_steps": ode.steps, "probes": ode.probes,
                                   "directions": ode.law, "state": str(ode.state).removeprefix("torch.")}),
    }  # fmt: skip
    chars = np.array([len(text_of(data.tokenizer, ids)) for ids in texts])
    return Likelihood.of(found, np.array([len(ids) for ids in texts]), chars, settings)


Arrays = dict[str, np.ndarray]
"""`Nats` for the way between processes: tensors do not outlive the process that made them, arrays do."""


def _nats_share(
    run: str,
    precision: Precision,
    text: Text,
    asked: LikelihoodSettings,
    progress: bool,
    rank: int,
    world: int,
    device: str,
) -> dict[str, Arrays]:
    """One process's share of the rows; see `cdlm.core.parallel`."""

    mine = take(text, torch.arange(rank, len(text.tokens), world))
    with Parts(progress and rank == 0) as parts:
        found = row_nats(generation.load(run, device, precision), mine, asked, parts)
    return {
        name: {**{f"term {term}": values.numpy() for term, values in nats.terms.items()},
               "error": nats.error.numpy(), "positions": nats.positions.numpy()}
        for name, nats in found.items()
    }  # fmt: skip


def _dealt(shares: Sequence[dict[str, Arrays]]) -> dict[str, Nats]:
    """The rows of all shares; row r + i N is row i of share r of N."""
    found: dict[str, Nats] = {}
    for name in shares[0]:
        counts = [len(share[name]["positions"]) for share in shares]
        order = np.concatenate([np.arange(count) * len(shares) + rank for rank, count in enumerate(counts)]).argsort()
        whole = {
            part: torch.from_numpy(np.concatenate([share[name][part] for share in shares])[order])
            for part in shares[0][name]
        }
        error, positions = whole.pop("error"), whole.pop("positions")
        found[name] = Nats({part.removeprefix("term "): values for part, values in whole.items()}, error, positions)
    return found


def _with_end(ids: list[int], eos_id: int | None) -> list[int]:
    """Tokens of a row up to its first `eos_id`, which counts; None ends no text."""
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids
