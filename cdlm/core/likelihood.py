"""The likelihood of text under a model, whatever its family: what is scored, how, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import check_choice, check_number, check_object, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.trees import join, take

BOUND, ODE = "bound", "ODE"
"""Names of the measures: the variational bound, and the density of the probability-flow ODE."""

METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4")
"""One-step methods of torchdiffeq on a fixed grid. Adaptive ones share an error norm over the rows, and those of Adams
take steps of one size for granted."""

Progress = Callable[[str, int, int], None]
"""Called with the measure, the parts that are done, and their number; a part is a row, or a block of one."""


class Text(NamedTuple):
    """Rows to score."""

    tokens: Int[Tensor, "b n"]
    target: Bool[Tensor, "b n"]
    """Positions to score, at least one a row; the others are given, or padding."""
    valid: Bool[Tensor, "b n"] | None
    """False on padding; None when there is none."""
    key: Int[Tensor, "b k"]
    """What each row is, as whole numbers >= 0: with the seed it fixes the row's noise, whatever the batch."""

    @property
    def given(self) -> Bool[Tensor, "b n"]:
        """Positions that are neither scored nor padding."""
        return ~self.target if self.valid is None else self.valid & ~self.target

    @property
    def sizes(self) -> list[int]:
        """Positions of each row without its padding."""
        return [self.tokens.shape[1]] * len(self.tokens) if self.valid is None else self.valid.sum(1).tolist()

    def spread(self, values: Sequence[Float[Tensor, "_ ..."]]) -> Float[Tensor, "b n ..."]:
        """Values of the positions of each row in one tensor on the text's device, 0 on padding: what is drawn for a row
        does not depend on the rows beside it."""
        if self.valid is None:
            return torch.stack(list(values)).to(self.tokens.device)
        flat = torch.cat(list(values)).to(self.tokens.device)
        whole = flat.new_zeros((*self.tokens.shape, *flat.shape[1:]))
        whole[self.valid] = flat
        return whole

    def cropped(self) -> Text:
        """The same without columns that are padding in every row; `valid` is None if no padding is left."""
        if self.valid is None:
            return self
        kept = self.valid.any(0)
        valid = self.valid[:, kept]
        return Text(self.tokens[:, kept], self.target[:, kept], None if bool(valid.all()) else valid, self.key)

    def to(self, device: torch.device) -> Text:
        """The same on another device."""
        valid = None if self.valid is None else self.valid.to(device)
        return Text(self.tokens.to(device), self.target.to(device), valid, self.key.to(device))


class Nats(NamedTuple):
    """Minus the log-likelihood of rows in nats, each summed over the positions that are scored."""

    terms: Mapping[str, Float[Tensor, " b"]]
    """What they are the sum of, float64."""
    error: Float[Tensor, " b"]
    """Monte-Carlo standard error of each row; NaN where there was a single draw."""
    positions: Int[Tensor, " b"]
    """How many are scored."""

    @property
    def total(self) -> Float[Tensor, " b"]:
        """The sum of the terms."""
        return torch.stack(list(self.terms.values())).sum(0)

    def summed(self, origin: Int[Tensor, " b"], rows: int) -> Nats:
        """Sums over the parts of each of so many rows; part i is of row `origin[i]`."""

        def add(values: Tensor) -> Tensor:
            return values.new_zeros(rows).index_add_(0, origin, values)

        terms = {name: add(values) for name, values in self.terms.items()}
        return Nats(terms, add(self.error.square()).sqrt(), add(self.positions))


@dataclass(frozen=True)
class Ode:
    """How the probability-flow ODE of a continuous model is integrated.

    Args:
        steps: intervals, evenly spaced in the schedule's u.
        method: of torchdiffeq, one of `METHODS`.
        probes: independent estimates of each row, each with a start and a direction of its own.
        law: of the directions, whose components have mean 0 and variance 1.
        state: type of the state and of the trace, float64 or float32.
    """

    steps: int = 64
    method: str = "heun2"
    probes: int = 1
    law: Literal["rademacher", "gaussian"] = "rademacher"
    state: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        check_whole("the ODE", steps=self.steps, probes=self.probes)
        if self.method not in METHODS:
            raise CdlmError(
                f"the ODE likelihood has no method {self.method!r}: use one of {', '.join(METHODS)}; the others mix"
                " the rows, or need steps of one size"
            )
        check_choice("the ODE", ("rademacher", "gaussian"), law=self.law)
        if self.state not in (torch.float64, torch.float32):
            raise CdlmError(
                f"the state of the ODE must be float64 or float32, got {self.state}: the log density is a small"
                " difference of large sums, and half precision loses it"
            )


@dataclass(frozen=True)
class LikelihoodSettings:
    """What to compute. A model refuses the settings that its family has no use for.

    Args:
        levels: draws of the bound of each row.
        ode: of continuous models, also compute the likelihood of the ODE, which costs far more; None leaves it out.
        seed: with the number of a row it fixes the row's noise.
        batch_size: rows at a time; the result does not depend on it.
        read_out: of continuous models, the noise level at which tokens are read out; by default the least there is.
    """

    levels: int = 8
    ode: Ode | None = None
    seed: int = 0
    batch_size: int = 32
    read_out: float | None = None

    def __post_init__(self) -> None:
        check_whole("the bound", levels=self.levels, batch_size=self.batch_size)
        check_whole("the bound", least=0, seed=self.seed)
        check_number("the bound", optional=True, read_out=self.read_out)
        if self.ode is not None:
            check_object("the likelihood", Ode, ode=self.ode)


def in_batches(
    score: Callable[[Text], Nats], text: Text, name: str, settings: LikelihoodSettings, device: torch.device,
    progress: Progress | None = None,
) -> Nats:  # fmt: skip
    """Score the rows batch by batch on `device`, the longest first; the result is on the CPU, in the rows' order."""
    found, done, count = [], 0, len(text.tokens)
    order = torch.tensor(text.sizes).argsort(descending=True, stable=True)
    for batch in order.split(settings.batch_size):
        nats = score(take(text, batch.to(text.tokens.device)).cropped().to(device))
        terms = {key: value.cpu() for key, value in nats.terms.items()}
        found.append(Nats(terms, nats.error.cpu(), nats.positions.cpu()))
        done += len(batch)
        if progress is not None:
            progress(name, done, count)
    return take(reduce(join, found), order.argsort())


def stratified_error(draws: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """Standard error of the mean of one draw from each of k strata, from the differences of neighbours; NaN for one.

    The differences between strata count as noise, so it is too large rather than too small (collapsed strata; Cochran,
    Sampling Techniques, chapter 5A).
    """
    k = draws.shape[1]
    if k == 1:
        return torch.full_like(draws[:, 0], math.nan)
    return (draws.diff(dim=1).square().sum(1) / (2 * k * (k - 1))).sqrt()
