"""Training of the learned head on recorded full runs, whose every step says what a halt there would have lost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from cdlm.core.checks import check_number, check_whole
from cdlm.core.errors import CdlmError
from cdlm.halting.head import FEATURES, Head, features_of, look_at, sampler_of, start_rows, untrained
from cdlm.halting.replay import FROM_SWITCHES, new_rows, states
from cdlm.recording.file import Recording

HELD_OUT = 0.25
"""Share of the samples that decide when training ends and how sure the head may be."""
FEWEST = 16
"""Samples that a head can be trained on."""
BATCH = 256
TEMPERATURES = np.geomspace(0.25, 4.0, 161)
"""That are tried on the held-out samples."""


@dataclass(frozen=True)
class Fitting:
    """How a head is trained.

    Args:
        share: of a sample's tokens that have to be those of its full run, for a step to count as settled; in (0, 1].
        epochs: passes over the steps, at most.
        patience: passes without a lower held-out loss, after which training ends.
        lr: of Adam.
        seed: of the first weights, the order and the samples that are held out.
    """

    share: float = 1.0
    epochs: int = 40
    patience: int = 5
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("a halting head", above=0.0, most=1.0, share=self.share)
        check_number("a halting head", above=0.0, lr=self.lr)
        check_whole("a halting head", epochs=self.epochs, patience=self.patience)
        check_whole("a halting head", least=0, seed=self.seed)


class Examples(NamedTuple):
    """Every step of some samples at which they could have halted before their end."""

    features: Float[Tensor, "k f"]
    kept: Float[Tensor, " k"]
    """Share of the sample's generated tokens that are those of its full run."""
    weight: Float[Tensor, " k"]
    """Steps that are left, over their sum in the sample: what is decided early saves most."""
    sample: Int[Tensor, " k"]

    def of(self, samples: Int[Tensor, " s"]) -> Examples:
        """Those of some samples."""
        there = torch.isin(self.sample, samples)
        return Examples(*(part[there] for part in self))


def features_in(recording: Recording) -> tuple[str, ...]:
    """Features that the signals of a recording give."""
    held = {*recording.record.signals, *FROM_SWITCHES}
    return tuple(name for name, feature in FEATURES.items() if feature.needs <= held)


def kept_by_step(recording: Recording) -> Float[np.ndarray, "steps m"]:
    """Share of each sample's generated tokens that are those of its full run, if it halts at a step."""
    open_ = ~recording.given
    walked = recording.record.walk(recording.tokens)
    same = [((tokens == recording.tokens) & open_).sum(1) for tokens in walked]
    return np.stack(same) / open_.sum(1)


def examples_of(recordings: Iterable[Recording], names: Sequence[str]) -> Examples:
    """The examples of all samples, numbered from 0."""
    parts, first = list[Examples](), 0
    for recording in recordings:
        needs = frozenset().union(*(FEATURES[name].needs for name in names))
        memory, seen = start_rows(new_rows(recording)), list[Tensor]()
        for state in states(recording, needs):
            memory = look_at(memory, state)
            seen.append(features_of(names, memory, state))
        last = recording.record.last_step(committed=True)
        left = (last - np.arange(len(seen))[:, None]).clip(min=0).astype(np.float64)
        there = torch.from_numpy(left > 0)
        weight = torch.from_numpy(left / left.sum(0).clip(min=1))
        sample = torch.arange(first, first + len(recording)).expand(len(seen), -1)
        kept = torch.from_numpy(kept_by_step(recording))
        parts.append(Examples(torch.stack(seen)[there], kept[there], weight[there], sample[there]))
        first += len(recording)
    return Examples(*(torch.cat(column) for column in zip(*parts, strict=True)))


def fit(recordings: Sequence[Recording], fitting: Fitting = Fitting()) -> Head:
    """A head that is trained on the recordings, which must be of one model and one sampler.

    Its first answer is trained on whether the tokens are settled, its second on the share of them that is not, both by
    cross-entropy: the second is then the expected share. Both are made honest by a temperature on held-out samples.

    Raises:
        CdlmError: the recordings are of different samplers, or of too few samples, or there is nothing to learn.
    """
    names, settings = _same(recordings)
    examples, different = examples_of(recordings, names), once_each(recordings)
    count = len(different)
    generator = torch.Generator().manual_seed(fitting.seed)
    order = different[torch.randperm(count, generator=generator)]
    held = examples.of(order[: max(1, round(HELD_OUT * count))])
    train = examples.of(order[max(1, round(HELD_OUT * count)) :])
    for part in (train, held):
        _check_both(_targets(part, fitting.share)[:, 0], fitting.share)
    mean, scale = _moments(train.features)
    head = Head(names, mean, scale, untrained(names, fitting.seed), recordings[0].weights, settings, {})
    head, epochs = _trained(head, train, held, fitting, generator)
    return _honest(head, held, {"samples": count, "epochs": epochs, "seed": fitting.seed, "share": fitting.share})


def once_each(recordings: Sequence[Recording]) -> Int[Tensor, " s"]:
    """The numbers of the samples, of those that were recorded several times the first."""
    first: dict[tuple[int, int, bytes, bytes], int] = {}
    number = 0
    for recording in recordings:
        for index, given, tokens in zip(recording.index, recording.given, recording.tokens, strict=True):
            key = (recording.seed, int(index), given.tobytes(), tokens[given].tobytes())
            first.setdefault(key, number)
            number += 1
    return torch.tensor(list(first.values()))


def _same(recordings: Sequence[Recording]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Features and sampler that the recordings have in common."""
    if (count := len(once_each(recordings))) < FEWEST:
        raise CdlmError(f"a halting head needs at least {FEWEST} different samples, got {count}: record more")
    samplers = {json.dumps(sampler_of(recording.settings), sort_keys=True) for recording in recordings}
    if len(samplers) > 1 or len({recording.weights for recording in recordings}) > 1:
        raise CdlmError(
            f"a halting head is for one model and one sampler, and these recordings are of {len(samplers)}:"
            f" {' and '.join(sorted(samplers))}; keep one folder for each, or name a file"
        )
    common = set.intersection(*(set(features_in(recording)) for recording in recordings))
    return tuple(name for name in FEATURES if name in common), json.loads(samplers.pop())


def _check_both(settled: Float[Tensor, " k"], share: float) -> None:
    if not 0 < settled.sum() < len(settled):
        when = "at every step" if len(settled) and settled.all() else "before the end"
        raise CdlmError(
            f"there is nothing to learn: {'no' if when == 'before the end' else 'each'} sample has {share:.0%} of its"
            f" tokens {when}; record with more steps, or take another share"
        )


def _moments(features: Float[Tensor, "k f"]) -> tuple[Float[Tensor, " f"], Float[Tensor, " f"]]:
    """Mean and standard deviation of each feature, where it is known; 1 of one that does not vary."""
    known = features.isfinite()
    count = known.sum(0).clamp(min=1)
    mean = torch.where(known, features, 0).sum(0) / count
    scale = (torch.where(known, features - mean, 0).square().sum(0) / count).sqrt()
    return mean, torch.where(scale > 1e-6, scale, 1.0)


def _targets(examples: Examples, share: float) -> Float[Tensor, "k 2"]:
    """Whether the tokens are settled, and the share that is lost."""
    return torch.stack([(examples.kept >= share - 1e-9).double(), 1 - examples.kept], 1)


def _losses(logits: Float[Tensor, "k 2"], targets: Float[Tensor, "k 2"], weight: Tensor) -> Float[Tensor, " 2"]:
    """Mean cross-entropy of each answer in nats."""
    each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (each * weight[:, None]).sum(0) / weight.sum()


def _trained(
    head: Head, train: Examples, held: Examples, fitting: Fitting, generator: torch.Generator
) -> tuple[Head, int]:
    """The head with the least held-out loss, and the passes that it took."""
    layers = tuple((weight.requires_grad_(), bias.requires_grad_()) for weight, bias in head.layers)
    moving = replace(head, layers=layers)
    optimizer = torch.optim.Adam([part for layer in layers for part in layer], lr=fitting.lr)
    targets, best, found, taken = _targets(train, fitting.share), math.inf, head, 0
    for epoch in range(1, fitting.epochs + 1):
        for batch in torch.randperm(len(targets), generator=generator).split(BATCH):
            loss = _losses(moving.logits(train.features[batch]), targets[batch], train.weight[batch]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            now = float(_losses(moving.logits(held.features), _targets(held, fitting.share), held.weight).sum())
        if now < best:
            best, taken = now, epoch
            found = replace(head, layers=tuple((w.detach().clone(), b.detach().clone()) for w, b in layers))
        elif epoch - taken >= fitting.patience:
            break
    return found, taken


def _honest(head: Head, held: Examples, about: dict[str, Any]) -> Head:
    """The head with each answer's logit divided by its best temperature, and its report on the held-out samples."""
    targets = _targets(held, about["share"])
    logits = head.logits(held.features)
    tried = torch.stack([_losses(logits / t, targets, held.weight) for t in TEMPERATURES.tolist()])
    chosen = torch.from_numpy(TEMPERATURES)[tried.argmin(0)]
    weight, bias = head.layers[-1]
    cooled = replace(head, layers=(*head.layers[:-1], (weight / chosen[:, None], bias / chosen)))
    after = cooled(held.features)
    before, losses = (_losses(made.logits(held.features), targets, held.weight).tolist() for made in (head, cooled))
    base = (targets * held.weight[:, None]).sum(0) / held.weight.sum()
    blind = _losses(base.logit(1e-9).expand_as(targets), targets, held.weight).tolist()
    error = ((after[:, 1] - targets[:, 1]).square() * held.weight).sum() / held.weight.sum()
    report = {
        **about,
        "held_out": len(held.sample.unique()),
        "parameters": cooled.size,
        "auc": auc(after[:, 0], targets[:, 0] > 0),
        "cross_entropy": losses[0],
        "cross_entropy_of_the_mean": blind[0],
        "cross_entropy_before_temperature": before[0],
        "loss_cross_entropy": losses[1],
        "loss_cross_entropy_of_the_mean": blind[1],
        "loss_error": math.sqrt(float(error)),
        "temperatures": chosen.tolist(),
    }
    return replace(cooled, report=report)


def auc(score: Float[Tensor, " k"], truth: Tensor) -> float:
    """Chance that a true example scores above a false one, ties counted as half (the area under the ROC curve)."""
    _, place, count = np.unique(score.numpy(), return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    rank = (ends - (count - 1) / 2)[place]  # from 1; equal scores share their mean rank
    true = truth.numpy()
    positives = int(true.sum())
    pairs = positives * (len(true) - positives)
    return float((rank[true].sum() - positives * (positives + 1) / 2) / pairs)
