"""The learned head: a small network that reads row signals and says whether a sample is done. It is kept beside the
weights of the model whose runs it was trained on, and it is of no use to another model or another sampler.

After Learn2PD (arXiv 2509.25188), whose filter reads the confidence of each token; ours reads what recordings keep of
each row. `cdlm.halting.fit` trains it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError
from cdlm.core.files import read_json, replacing, write_json
from cdlm.core.schema import checked
from cdlm.core.tensors import FLOATS, read_tensors, specs_of, write_tensors
from cdlm.core.types import NewRows, StepState

WEIGHTS, ABOUT = "halting_head.safetensors", "halting_head.json"
VERSION = 1
HIDDEN = (16, 32)
LARGEST = 30.0
"""Of a logit: what the head says stays above 0 and below 1, so that 1 never halts a row and 0 always does."""
FARTHEST = 8.0
"""Of a feature, in standard deviations."""
FADING = 0.9
"""Weight of the past in the running mean of switches."""
NOT_OF_THE_SAMPLER = ("length", "precision", "ends")
"""Settings of recordings that say nothing of how the steps are walked."""


class RowMemory(NamedTuple):
    """What the features remember of each row."""

    size: Int[Tensor, " b"]
    """Positions that were open at first."""
    quiet: Int[Tensor, " b"]
    """Steps in a row without a switch."""
    recent: Float[Tensor, " b"]
    """Running mean of the share of positions that switch, float64."""


class Feature(NamedTuple):
    """One input of the head."""

    compute: Callable[[RowMemory, StepState], Tensor]
    needs: frozenset[str] = frozenset()


def _log(signal: str, floor: float) -> Feature:
    """The log of a signal and a floor, at most 10: a divergence from no past is infinite."""
    return Feature(
        lambda memory, state: (refined(getattr(state, signal)).clamp(min=0) + floor).log().clamp(max=10.0),
        frozenset({signal}),
    )


FEATURES: Mapping[str, Feature] = MappingProxyType(
    {
        "progress": Feature(lambda memory, state: state.step / state.budget),
        "open": Feature(lambda memory, state: state.open.sum(1) / memory.size),
        "quiet": Feature(lambda memory, state: refined(memory.quiet).log1p(), frozenset({"switches"})),
        "recent": Feature(lambda memory, state: (memory.recent + 1e-4).log(), frozenset({"switches"})),
        "switches": Feature(lambda memory, state: refined(state.switches).log1p(), frozenset({"switches"})),
        "margin": _log("margin", 0.1),
        "entropy": _log("mean_entropy", 1e-6),
        "kl": _log("mean_kl", 1e-9),
        "short_of_norm": Feature(
            lambda memory, state: ((1 - refined(state.x0_norm)).abs() + 1e-6).log(), frozenset({"x0_norm"})
        ),
        "noise": Feature(lambda memory, state: (refined(state.z_norm) + 1e-3).log(), frozenset({"z_norm"})),
        "turning": Feature(
            lambda memory, state: ((1 - refined(state.score_cosine)).clamp(min=0) + 1e-9).log(),
            frozenset({"score_cosine"}),
        ),
    }
)
"""What a head may read of a row: logs of signals, its progress, and how long and how far it has been quiet."""


def start_rows(rows: NewRows) -> RowMemory:
    """The memory of rows that enter."""
    size = rows.open.sum(1)
    return RowMemory(size, torch.zeros_like(size), torch.ones(len(size), dtype=fine(size.device), device=size.device))


def look_at(memory: RowMemory, state: StepState) -> RowMemory:
    """The memory after a step."""
    switches = state.signals.get("switches")
    if switches is None:
        return memory
    share = refined(switches) / memory.size
    quiet = torch.where(switches == 0, memory.quiet + 1, 0)
    return RowMemory(memory.size, quiet, FADING * memory.recent + (1 - FADING) * share)


def features_of(names: Sequence[str], memory: RowMemory, state: StepState) -> Float[Tensor, "b f"]:
    """The features of rows at a step, float64; not finite where a signal is not yet there."""
    return torch.stack([refined(FEATURES[name].compute(memory, state)) for name in names], 1)


WHOLE = 8
"""Copies of two numbers that fill whole vectors of any processor."""
Layer = tuple[Float[Tensor, "_out _in"], Float[Tensor, " _out"]]
"""Weights and biases, float64; each layer has widths of its own."""


@dataclass(frozen=True, eq=False)
class Head:
    """A network with two hidden layers and two answers, and what it was trained on.

    Args:
        features: names of its inputs, of `FEATURES`.
        mean, scale: of the features in training.
        layers: with GELU between them.
        weights: fingerprint of the model's weights.
        settings: of the sampler, as `Sampling.settings` says them.
        report: how well it does on samples that it was not trained on.
    """

    features: tuple[str, ...]
    mean: Float[Tensor, " f"]
    scale: Float[Tensor, " f"]
    layers: tuple[Layer, ...]
    weights: str
    settings: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def needs(self) -> frozenset[str]:
        """Signals that its features are made from."""
        return frozenset().union(*(FEATURES[name].needs for name in self.features))

    @property
    def size(self) -> int:
        """Parameters."""
        return sum(part.numel() for layer in self.layers for part in layer)

    def standard(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """Features in standard deviations from their mean; one that is not known counts as the mean."""
        x = (features - self.mean.to(features)) / self.scale.to(features)
        return x.nan_to_num(0.0, FARTHEST, -FARTHEST).clamp(-FARTHEST, FARTHEST)

    def __call__(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b 2"]:
        """Chance that a row's tokens are those of its full run, and the expected share of them that are not; both
        inside (0, 1)."""
        # Whole vectors of the processor: what is left over is computed otherwise, and differs in the last bit.
        return self.logits(features).repeat(1, WHOLE).sigmoid()[:, :2]

    def logits(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b 2"]:
        """The logits of both answers. Those of a row do not depend on the rows beside it, to the last bit."""
        x = self.standard(features)
        for number, (weight, bias) in enumerate(self.layers):
            x = functional.gelu(x) if number else x
            x = _total(x[:, None, :] * weight.to(x)) + bias.to(x)
        return x.clamp(-LARGEST, LARGEST)

    def check_made_for(self, has_weights: Callable[[str], bool], settings: Mapping[str, Any]) -> None:
        """Raise unless it was trained on runs of this model, sampled in this way."""
        if not has_weights(self.weights):
            raise CdlmError(
                "the halting head was trained on runs of other weights than these: train one with cdlm train-halting"
            )
        here, there = sampler_of(settings), dict(self.settings)
        if here != there:
            names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            raise CdlmError(
                f"the halting head was trained on runs with {_said(there, names)}, and this one has"
                f" {_said(here, names)}: sample as it was trained, or train another with cdlm train-halting"
            )


def _total(parts: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """The sum over the last axis, half by half: that of a matrix product, or of `sum`, may differ in its last bits with
    the number of rows."""
    while (n := parts.shape[-1]) > 1:
        half = n // 2
        parts = torch.cat([parts[..., :half] + parts[..., half : 2 * half], parts[..., 2 * half :]], -1)
    return parts[..., 0]


def sampler_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recording or a session that say how the steps are walked."""
    return {name: value for name, value in settings.items() if name not in NOT_OF_THE_SAMPLER}


def _said(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    return " ".join(f"{name}={settings.get(name, 'its default')}" for name in names)


def write_head(folder: Path, head: Head) -> str:
    """Write the head beside the weights, each file whole or not at all; returns its digest."""
    tensors = {"mean": head.mean, "scale": head.scale}
    for number, (weight, bias) in enumerate(head.layers):
        tensors |= {f"layers.{number}.weight": weight, f"layers.{number}.bias": bias}
    with replacing(folder / WEIGHTS) as temporary:
        write_tensors(temporary, specs_of(tensors), {name: (lambda v=value: v) for name, value in tensors.items()})
    digest = _digest(folder / WEIGHTS)
    about = {"cdlm_halting_head": VERSION, "digest": digest, "features": list(head.features), "weights": head.weights,
             "settings": head.settings, "report": head.report}  # fmt: skip
    write_json(folder / ABOUT, about)
    return digest


def read_head(folder: Path) -> tuple[Head, str]:
    """The head in a folder, and its digest.

    Raises:
        CdlmError: there is none, or its files are damaged or of different heads.
    """
    if not (folder / ABOUT).exists():
        raise CdlmError(f"{folder} has no {ABOUT}: train a halting head with cdlm train-halting RECORDINGS {folder}")
    about = read_json(folder / ABOUT, "a halting head")
    if about.get("cdlm_halting_head") != VERSION:
        raise CdlmError(f"{folder / ABOUT} is not of version {VERSION}, which this program reads: train the head again")
    checked(about, About, str(folder / ABOUT), "it is damaged: train it again")
    tensors = read_tensors(folder / WEIGHTS, "train it again")
    digest = _digest(folder / WEIGHTS)
    try:
        if digest != about["digest"]:
            raise ValueError(f"{WEIGHTS} is of another head")
        head = _head(about, tensors)
    except (KeyError, ValueError) as error:
        raise CdlmError(f"the halting head in {folder} is damaged ({error!r}): train it again") from error
    return head, digest


class About(TypedDict):
    """What `ABOUT` holds."""

    digest: str
    features: list[str]
    weights: str
    settings: dict[str, Any]
    report: dict[str, Any]


def _head(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Head:
    """The head of these files; ValueError if they do not fit together."""
    names = tuple(about["features"])
    if not names or set(names) - set(FEATURES) or len(set(names)) < len(names):
        raise ValueError("features that there are not")
    if any(value.dtype not in FLOATS or not value.isfinite().all() for value in tensors.values()):
        raise ValueError("values that are not numbers")
    count = sum(name.endswith(".weight") for name in tensors)
    layers = tuple((tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]) for i in range(count))
    widths = [len(names), *(len(bias) for _, bias in layers)]
    shapes = [(tuple(weight.shape), tuple(bias.shape)) for weight, bias in layers]
    fitting = shapes == [((b, a), (b,)) for a, b in pairwise(widths)] and widths[-1] == 2
    if not fitting or any(tuple(tensors[name].shape) != (len(names),) for name in ("mean", "scale")):
        raise ValueError("shapes that do not fit")
    if not bool((tensors["scale"] > 0).all()):
        raise ValueError("a scale that is not above 0")
    mean, scale = tensors["mean"].double(), tensors["scale"].double()
    exact = tuple((weight.double(), bias.double()) for weight, bias in layers)
    return Head(names, mean, scale, exact, about["weights"], about["settings"], about["report"])


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


def untrained(features: Sequence[str], seed: int = 0) -> tuple[Layer, ...]:
    """Layers to begin with, drawn as torch draws linear ones."""
    generator, widths = torch.Generator().manual_seed(seed), (len(features), *HIDDEN, 2)
    layers = []
    for a, b in pairwise(widths):
        drawn = torch.rand(b, a + 1, generator=generator, dtype=torch.float64).mul(2).sub(1) / math.sqrt(a)
        layers.append((drawn[:, :a].contiguous(), drawn[:, a].contiguous()))
    return tuple(layers)
