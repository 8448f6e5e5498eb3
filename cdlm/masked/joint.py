"""A layer on top of a masked model that makes tokens of one call depend on each other (ADJUST, arXiv 2509.22738).

A call of a masked model gives each open position a distribution of its own; tokens that are drawn from several of them
at once know nothing of each other. The layer sees the hidden states of that call and the tokens drawn since, and says
what the model would say of the rest if it were called again. The paper's code was not to be had: inputs, sizes and
settings are ours (specification, section 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cdlm.core.checks import Settings, check_number, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.files import read_json, replacing, write_json
from cdlm.core.schema import checked
from cdlm.core.tensors import FLOATS, read_tensors, specs_of, write_tensors
from cdlm.halting import Full
from cdlm.masked.model import LayeredModel
from cdlm.masked.sampler import Unmasking, UnmaskingLoop
from cdlm.sampling.loop import RunOptions
from cdlm.sampling.requests import Request, stack_masks
from cdlm.sampling.session import Session

WEIGHTS, ABOUT, VERSION = "sampler_layer.safetensors", "sampler_layer.json", 1
FEWEST, HELD_OUT = 16, 0.1
"""Texts to train on at least, and the share of them that is held out."""


class SamplerLayer(nn.Module):
    """One more block: h' = h + gate (block(u) - u) with u = h + W [norm(h); norm(e)], where e are the vectors of the
    tokens as they are now.

    The block begins as the model's last one, W small, and the gate at 0: untrained, the layer changes nothing.
    """

    def __init__(self, model: LayeredModel, generator: torch.Generator | None = None):
        super().__init__()
        probe = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        with torch.no_grad():
            hidden, vectors = model.hidden(probe), model.embed(probe)
        self.block = model.last_block().float()
        width, inputs = hidden.shape[-1], hidden.shape[-1] + vectors.shape[-1]
        mix = torch.randn(width, inputs, generator=generator) * (0.1 / math.sqrt(inputs))
        self.mix = nn.Parameter(mix.to(model.device))
        self.gate = nn.Parameter(torch.zeros(width, device=model.device))

    def forward(
        self, model: LayeredModel, hidden: Float[Tensor, "b n d"], vectors: Float[Tensor, "b n e"],
        valid: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b n d"]:  # fmt: skip
        both = torch.cat([_normed(hidden.float()), _normed(vectors.float())], -1)
        u = hidden.float() + both @ self.mix.mT
        return hidden + self.gate * (model.through(self.block, u, valid) - u)


def _normed(x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
    return F.layer_norm(x, x.shape[-1:])


@dataclass(frozen=True, eq=False)
class Refined:
    """A model with its sampler layer, as a `Refiner`."""

    model: LayeredModel
    layer: SamplerLayer

    def __call__(
        self, hidden: Float[Tensor, "b n d"], tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None,
        positions: Int[Tensor, " k"],
    ) -> Float[Tensor, "k v"]:  # fmt: skip
        after = self.layer(self.model, hidden, self.model.embed(tokens), valid)
        return self.model.read(after.flatten(0, 1)[positions].to(hidden.dtype))


@dataclass(frozen=True)
class LayerFitting(Settings):
    """How a sampler layer is trained.

    Args:
        tokens: most tokens that a call is to give, >= 2: the layer learns of 1 to tokens - 1 that were drawn since.
        updates: of AdamW, with a warm-up of 1 % and a cosine to 0.
        rows: texts of an update.
        lr: peak learning rate.
    """

    tokens: int = 8
    updates: int = 1000
    rows: int = 16
    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_whole("a sampler layer", least=2, tokens=self.tokens)
        check_whole("a sampler layer", updates=self.updates, rows=self.rows)
        check_number("a sampler layer", above=0, most=1, lr=self.lr)


def layered(session: Session) -> tuple[LayeredModel, Unmasking]:
    """The model, if a layer can be put on top of it, and how it is sampled.

    Raises:
        CdlmError: it is none of our own masked models, LLaDA or Dream.
    """
    model, sampling = session.model, session.sampling
    if not (isinstance(model, LayeredModel) and isinstance(sampling, Unmasking)):
        raise CdlmError(
            f"a sampler layer is for one of our own masked models, LLaDA or Dream, and {model.name} is none"
        )
    return model, sampling


class Trajectories(NamedTuple):
    """How texts were drawn, one token a call."""

    canvases: Int[Tensor, "m s n"]
    """Before each call, and at the end; what is later than that is as the end."""
    calls: Int[Tensor, " m"]
    valid: Bool[Tensor, "m n"] | None

    def of(self, rows: Int[Tensor, " k"]) -> Trajectories:
        """Some of them."""
        return Trajectories(self.canvases[rows], self.calls[rows], None if self.valid is None else self.valid[rows])


def trajectories(
    model: LayeredModel, sampling: Unmasking, requests: Sequence[Request], batch_size: int, seed: int,
    advance: Callable[[], None] = lambda: None,
) -> Trajectories:  # fmt: skip
    """Texts as the model draws them, with all that was between."""
    loop = UnmaskingLoop(model, sampling, RunOptions(Full(), seed=seed), batch_size, model.device)
    steps: dict[int, list[Tensor]] = {
        request.index: [request.tokens.masked_fill(~request.given, model.constants.mask_id)] for request in requests
    }
    for step in loop.steps(requests):
        assert step.canvas is not None
        for index, canvas in zip(step.counts.row, step.canvas.cpu(), strict=True):
            steps[index].append(canvas)
        for _ in step.counts.leaving:
            advance()
    made = [steps[request.index] for request in requests]
    longest = max(map(len, made))
    canvases = torch.stack([torch.stack([*row, *[row[-1]] * (longest - len(row))]) for row in made])
    return Trajectories(
        canvases,
        torch.tensor([len(row) - 1 for row in made]),
        stack_masks([r.valid for r in requests], torch.device("cpu")),
    )


@dataclass(frozen=True)
class Fitter:
    """Trains the layer of a model, whose own weights stay as they are."""

    model: LayeredModel
    fitting: LayerFitting
    seed: int = 0

    def fit(
        self, texts: Trajectories, advance: Callable[[float], None] = lambda nats: None
    ) -> tuple[SamplerLayer, dict[str, Any]]:
        """The layer, and what it does on texts that were held out.

        Raises:
            CdlmError: a text took one call, so that there is nothing to learn.
        """
        fitting, generator = self.fitting, torch.Generator().manual_seed(self.seed)
        if len(texts.calls) < FEWEST:
            raise CdlmError(f"a sampler layer is trained on {FEWEST} texts or more, got {len(texts.calls)}: draw more")
        if int(texts.calls.min()) < 2:
            raise CdlmError(
                "a sampler layer is trained on texts of 2 tokens or more, and one of these has 1: draw longer"
            )
        order = torch.randperm(len(texts.calls), generator=generator)
        held = max(1, round(HELD_OUT * len(order)))
        layer = SamplerLayer(self.model, generator)
        weights = list(layer.parameters())
        optimizer = torch.optim.AdamW(weights, fitting.lr, weight_decay=0.0)
        warmup = max(1, fitting.updates // 100)
        for step in range(fitting.updates):
            rows = order[held:][torch.randint(len(order) - held, (fitting.rows,), generator=generator)]
            nats, count = self._nats(layer, texts.of(rows), self._drawn(texts.of(rows), generator))
            loss = nats.sum() / count.sum()
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                weight.grad = gradient
            nn.utils.clip_grad_norm_(weights, 1.0)
            share = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * step / fitting.updates)) / 2
            optimizer.param_groups[0]["lr"] = fitting.lr * share
            optimizer.step()
            advance(float(loss.detach()))
        return layer.eval().requires_grad_(False), self._report(layer, texts.of(order[:held]))

    def _drawn(self, texts: Trajectories, generator: torch.Generator) -> Int[Tensor, "2 k"]:
        """Of each text a call, and how many tokens were drawn since; at the later state something is open."""
        since = 1 + torch.floor(
            torch.rand(len(texts.calls), generator=generator) * (texts.calls - 1).clamp(max=self.fitting.tokens - 1)
        )
        call = torch.floor(torch.rand(len(since), generator=generator) * (texts.calls - since))
        return torch.stack([call, since]).long()

    def _nats(
        self, layer: SamplerLayer | None, texts: Trajectories, drawn: Int[Tensor, "2 k"]
    ) -> tuple[Float[Tensor, " p"], Int[Tensor, " k"]]:
        """KL(p || q) at each open position of the later states, in nats, and how many there are of each text; p is what
        the model says there, q what the layer makes of the earlier call, or that call itself."""
        model, device, row = self.model, self.model.device, torch.arange(len(texts.calls))
        before = texts.canvases[row, drawn[0]].to(device)
        after = texts.canvases[row, drawn[0] + drawn[1]].to(device)
        valid = None if texts.valid is None else texts.valid.to(device)
        mask_id = model.constants.mask_id
        open_ = after == mask_id
        wanted = open_.flatten().nonzero().squeeze(1)
        if model.constants.shift:
            wanted = wanted - (wanted % after.shape[1] > 0).long()
        with torch.no_grad():
            hidden = model.hidden(before, valid)
            truth = model.read(model.hidden(after, valid).flatten(0, 1)[wanted])
        said = (
            model.read(hidden.flatten(0, 1)[wanted])
            if layer is None
            else Refined(model, layer)(hidden, after, valid, wanted)
        )
        p, q = (
            x.index_fill(-1, torch.tensor([mask_id], device=device), -torch.inf).log_softmax(-1) for x in (truth, said)
        )
        return (p.exp() * (p - q)).nan_to_num(0.0).sum(-1), open_.sum(1)

    @torch.no_grad()
    def _report(self, layer: SamplerLayer, texts: Trajectories) -> dict[str, Any]:
        """KL in nats per open position, by the number of tokens that were drawn since: of the call alone, and with the
        layer."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        table: dict[str, list[float]] = {}
        for since in range(1, self.fitting.tokens):
            some = texts.of((texts.calls > since).nonzero().squeeze(1))
            if not len(some.calls):
                break
            call = torch.floor(torch.rand(len(some.calls), generator=generator) * (some.calls - since)).long()
            drawn = torch.stack([call, torch.full_like(call, since)])
            table[str(since)] = [float(self._nats(one, some, drawn)[0].mean()) for one in (None, layer)]
        return {"kl": table, "parameters": sum(weight.numel() for weight in layer.parameters())}


def write_layer(folder: Path, layer: SamplerLayer, weights: str, fitting: LayerFitting, report: dict[str, Any]) -> None:
    """Write the layer, each file whole or not at all.

    Args:
        weights: fingerprint of the model's.
    """
    tensors = layer.state_dict()
    with replacing(folder / WEIGHTS) as temporary:
        write_tensors(temporary, specs_of(tensors), {name: (lambda v=value: v) for name, value in tensors.items()})
    about = {"cdlm_sampler_layer": VERSION, "weights": weights, "fitting": asdict(fitting), "report": report}
    write_json(folder / ABOUT, about)


class About(TypedDict):
    """What `ABOUT` holds."""

    cdlm_sampler_layer: int
    weights: str
    fitting: dict[str, Any]
    report: dict[str, Any]


def read_layer(folder: Path, model: LayeredModel) -> Refined:
    """The model with the layer of a folder.

    Raises:
        CdlmError: there is none, its files are damaged, or it was trained for another model.
    """
    if not (folder / ABOUT).exists():
        raise CdlmError(f"{folder} has no {ABOUT}: train a sampler layer with cdlm train-sampler MODEL {folder}")
    about = read_json(folder / ABOUT, "a sampler layer")
    if about.get("cdlm_sampler_layer") != VERSION:
        raise CdlmError(
            f"{folder / ABOUT} is not of version {VERSION}, which this program reads: train the layer again"
        )
    checked(about, About, str(folder / ABOUT), "it is damaged: train it again")
    if not model.has_weights(about["weights"]):
        raise CdlmError(
            f"the sampler layer in {folder} was trained for other weights than these: train one with cdlm train-sampler"
        )
    layer = SamplerLayer(model, torch.Generator().manual_seed(0))
    expected, tensors = specs_of(layer.state_dict()), read_tensors(folder / WEIGHTS, "train it again")
    if {name: spec.shape for name, spec in expected.items()} != {n: tuple(v.shape) for n, v in tensors.items()}:
        raise CdlmError(
            f"{folder / WEIGHTS} holds other tensors than a sampler layer of this model has: train it again"
        )
    if any(value.dtype not in FLOATS or not value.isfinite().all() for value in tensors.values()):
        raise CdlmError(f"{folder / WEIGHTS} holds values that are not numbers: train it again")
    layer.load_state_dict(tensors)
    return Refined(model, layer.eval().requires_grad_(False))
