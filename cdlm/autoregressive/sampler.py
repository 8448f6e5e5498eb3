"""Sampling from an autoregressive model: one call, and one token, for each row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import check_number
from cdlm.core.devices import read_columns, refined
from cdlm.core.errors import CdlmError
from cdlm.core.rng import PositionNoise, Site
from cdlm.core.types import LoopStep, RowCounts, StepState
from cdlm.halting import Full
from cdlm.halting.signals import check_signals
from cdlm.sampling.loop import Loop, RunOptions
from cdlm.sampling.requests import Request, stack_masks
from cdlm.sampling.session import Model, Sampling


class CausalModel(Model):
    """`tokens -> logits`, row by row, where no logits see their own token or a later one."""

    @property
    def defaults(self) -> LeftToRight:
        """Drawn at temperature 1: samples of what it was trained on."""
        return LeftToRight()

    @abstractmethod
    def logits(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        """One call of the network: at each position the logits of its token given the tokens before it, at the first
        one given none. In float32 or float64."""


@dataclass(frozen=True)
class LeftToRightSettings:
    """Sampling of autoregressive models, as in the model's paper unless given.

    Args:
        temperature: of what is drawn; 0 takes the likeliest token.
    """

    temperature: float | None = None


@dataclass(frozen=True)
class LeftToRight(Sampling):
    """How an autoregressive model is sampled: a prefix is continued by one token a call.

    Args:
        temperature: tokens are drawn from softmax(logits / temperature), >= 0; 0 takes the likeliest one.
    """

    family = "autoregressive"
    flat = LeftToRightSettings
    signals = frozenset()
    # What a record is made of, and what no step here has: a token is decided at once, so that there is nothing to keep.
    recorded = frozenset({"tokens"})

    temperature: float = 1.0

    def __post_init__(self) -> None:
        hint = "0 takes the likeliest token"
        check_number("LeftToRight", least=0.0, temperature=self.temperature, hint=hint)

    @property
    def settings(self) -> dict[str, Any]:
        return {"temperature": float(self.temperature)}

    def with_flat(self, **settings: Any) -> LeftToRight:
        given = {name: value for name, value in settings.items() if value is not None}
        steps = given.pop("steps", None)
        changed = replace(self, **given)
        return changed if steps is None else changed.with_steps(steps)

    def with_steps(self, steps: int) -> LeftToRight:
        raise CdlmError(
            f"an autoregressive model takes one step for each token, got steps={steps}: leave it out, or ask for fewer"
            " tokens with length"
        )

    def steps_of(self, request: Request) -> int:
        return int((~request.given).sum())

    def fewer_steps(self, wanted: Sequence[int], request: Request) -> list[int]:
        return []

    def with_temperature_times(self, factor: float) -> LeftToRight:
        return replace(self, temperature=self.temperature * factor)

    def length_of(self, requests: Sequence[Request]) -> int:
        return len(requests[0].tokens)

    @property
    def draws(self) -> bool:
        return self.temperature > 0

    def loop(self, model: Any, options: RunOptions, batch_size: int) -> LeftToRightLoop:
        return LeftToRightLoop(model, self, options, batch_size, model.device)


class LeftToRightRows(NamedTuple):
    """Everything with a row axis that lives from one step to the next."""

    row: Int[Tensor, " b"]
    step: Int[Tensor, " b"]
    """Tokens that were generated so far."""
    start: Int[Tensor, " b"]
    """Place of the first token to generate."""
    budget: Int[Tensor, " b"]
    """Tokens to generate."""
    tokens: Int[Tensor, "b n"]
    """The prompt and what was generated; meaningless from `start + step` on."""

    @property
    def at(self) -> Int[Tensor, " b"]:
        """Place of the token that is generated next."""
        return self.start + self.step

    @property
    def open(self) -> Bool[Tensor, "b n"]:
        """Positions that are still to be generated."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (place >= self.at[:, None]) & (place < (self.start + self.budget)[:, None])


class LeftToRightLoop(Loop[LeftToRightRows]):
    """One run of an autoregressive model. Each call reads whole prefixes: no keys and values are kept.

    Row i is the same in any batch, order or batch size, up to the rounding of the model's arithmetic. If the model's
    texts have ends, a row is done at the first one that it draws, and the rest of it is filled with that token.
    """

    def __init__(
        self, model: CausalModel, sampling: LeftToRight, options: RunOptions, batch_size: int,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        super().__init__(options, batch_size, device)
        check_signals(options.needs, sampling.signals)
        if not isinstance(options.criterion, Full):
            raise CdlmError(
                f"{options.criterion!r} would cut off an autoregressive text, which ends by itself: leave out the rule,"
                " or ask for fewer tokens with length"
            )
        self.model, self.sampling, self.noise = model, sampling, PositionNoise(options.seed)

    def budget(self, requests: Sequence[Request]) -> int:
        return max(self.sampling.steps_of(request) for request in requests)

    def admit(self, requests: list[Request], beside: LeftToRightRows | None) -> LeftToRightRows:
        tokens = torch.stack([request.tokens for request in requests]).to(self.device)
        open_ = ~torch.stack([request.given for request in requests]).to(self.device)
        check_order(open_, stack_masks([request.valid for request in requests], self.device))
        if not bool(open_.any(1).all()):
            raise CdlmError("a prompt leaves nothing to generate: shorten it, or raise the length")
        index = torch.tensor([request.index for request in requests], device=self.device)
        return LeftToRightRows(index, torch.zeros_like(index), open_.long().argmax(1), open_.sum(1), tokens)

    @torch.no_grad()
    def step(self, live: LeftToRightRows) -> tuple[LoopStep, LeftToRightRows]:
        open_ = live.open
        state = StepState(live.row, live.step, live.budget, refined(open_.sum(1)) / live.budget, live.step + 1, open_)
        drawn = self._draw(live)
        ended = torch.isin(drawn, torch.tensor(self.model.end_ids, dtype=drawn.dtype, device=self.device))
        here = torch.arange(open_.shape[1], device=self.device) == live.at[:, None]
        tokens = torch.where(here | (ended[:, None] & open_), drawn[:, None], live.tokens)
        done = ended | (live.step == live.budget - 1)
        row, taken, left, full = read_columns(live.row, live.step + 1, done, ended)
        counts = RowCounts.of(row, taken, taken, left, [0] * len(row), full)
        return LoopStep(state, counts, counts.leave(tokens), {}), live._replace(tokens=tokens)

    def advance(self, carried: LeftToRightRows) -> LeftToRightRows:
        return carried._replace(step=carried.step + 1)

    def _draw(self, live: LeftToRightRows) -> Int[Tensor, " b"]:
        """The next token of each row."""
        prefixes = live.tokens[:, : int(live.at.max()) + 1]  # what stands later is nothing that the call could see
        logits = self.model.logits(prefixes)[torch.arange(len(prefixes), device=self.device), live.at]
        if bool(logits.isnan().any()):
            raise CdlmError("the model gave logits that are not numbers (NaN): its weights or its precision are broken")
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        return self.noise.token(Site(live.row, live.step, live.at), logits, self.sampling.temperature)


def check_order(open_: Bool[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None) -> None:
    """Raise unless each row is what is given, then what is open, then padding: `valid` is False there."""
    rank = open_.long() if valid is None else torch.where(valid, open_.long(), 2)
    if bool((rank.diff(dim=1) < 0).any()):
        raise CdlmError(
            "an autoregressive model continues a prefix and fills no holes: give no text after the first token to"
            " generate, and padding at the end alone"
        )
