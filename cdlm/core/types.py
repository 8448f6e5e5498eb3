"""What every part agrees on: predictions, step states, decisions, samples.

Axis glossary: b rows (samples in flight), n positions, d embedding dimension, v vocabulary.

Noise coordinate: `t = sigma / alpha`, the noise-to-signal ratio. Larger is noisier; sampling walks from `t_max` down to
`t_min`. States are variance exploding, `z = e + t * eps`; everything else (alpha, sigma, gamma) is a view of `t`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import check_flag, shown
from cdlm.core.errors import CdlmError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Computed(Protocol[T_co]):
    """A property, as a type checker sees it in the class."""

    def __get__(self, instance: Any, owner: Any = None, /) -> T_co: ...


AttributeOrProperty = T | Computed[T]
"""The type of a class attribute that a subclass may also compute, as a property."""


class Prediction(NamedTuple):
    """A denoiser's prediction for one state."""

    logits: Float[Tensor, "b n v"]
    """Unnormalised log-probabilities of the clean token, float32 or float64; v = 0 where they have to be asked for."""
    x0: Float[Tensor, "b n d"]
    """Expected clean embedding: under softmax(logits), where there are any."""


class Condition(NamedTuple):
    """What a denoiser is given besides the noisy state."""

    clean: Float[Tensor, "b n d"]
    """Embeddings at given positions, zero elsewhere (zero everywhere for the unconditional branch of guidance)."""
    target: Bool[Tensor, "b n"]
    """True where a token is to be generated, False where it is given (or padding)."""
    x0: Float[Tensor, "b n d"]
    """Self-conditioning: the previous estimate of the clean embedding, zero on the first call."""
    valid: Bool[Tensor, "b n"] | None = None
    """False on padding, which nobody attends to; None when there is none."""
    ahead: Bool[Tensor, "b n"] | None = None
    """Positions behind the last that this block generates, targets or not any more; None of training text, where the
    targets are the block."""
    guidance: Float[Tensor, " b"] | None = None
    """Guidance scale of each row, for a network that is told it; None for others."""


@dataclass(frozen=True)
class Constants:
    """What there is to know of a masked model besides its logits.

    Args:
        mask_id: the absorbing token.
        eos_id: the end of a text; None if the model has none.
        eot_id: the end of a turn, of models that have one.
        stops: further tokens that end a text.
        shift: the logits at position i - 1 predict token i (Dream); position 0 keeps its own, which nobody needs.
    """

    mask_id: int
    eos_id: int | None = None
    eot_id: int | None = None
    shift: bool = False
    stops: tuple[int, ...] = ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Stop tokens: the ends of a text and of a turn, where there are any, and the further ones."""
        return tuple(dict.fromkeys(end for end in (self.eos_id, self.eot_id, *self.stops) if end is not None))

    def __post_init__(self) -> None:
        check_flag("Constants", shift=self.shift)
        if not isinstance(self.stops, tuple):
            raise CdlmError(f"stops is a tuple of tokens, got {shown(self.stops)}")
        named = [(name, getattr(self, name)) for name in ("mask_id", "eos_id", "eot_id")]
        for name, value in [*named, *(("a stop", stop) for stop in self.stops)]:
            if value is None and name in ("eos_id", "eot_id"):
                continue
            if type(value) is not int or not 0 <= value < 2**63:
                raise CdlmError(f"{name} is a token, a whole number >= 0, got {shown(value)}")
            if name != "mask_id" and value == self.mask_id:
                raise CdlmError(f"{name} and mask_id are both {value}: the mask must be a token of its own")


MaskingFn = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(tokens [b n], valid [b n], generator) -> positions to generate [b n], at least one a row."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of training text, on their way from the loader to the objective. `masked` adds what a step draws."""

    tokens: Int[Tensor, "b n"]
    valid: Bool[Tensor, "b n"] | None
    """False on padding; None where there is none."""
    target: Bool[Tensor, "b n"]
    """Positions to generate, at least one a row; the others are given. From a loader, all that are valid."""
    generator: torch.Generator | None = None
    """Source of all randomness of the step, on the device of the tokens; None is torch's own."""
    u: Float[Tensor, " b"] | None = None
    """Noise levels in [0, 1]; None has the objective draw them."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Batch:
        """The same rows on another device, to which the generator must belong."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            valid=None if self.valid is None else self.valid.to(device),
            target=self.target.to(device),
            u=None if self.u is None else self.u.to(device),
        )

    def masked(self, law: MaskingFn, generator: torch.Generator, u: Float[Tensor, " b"] | None = None) -> Batch:
        """The same rows with positions to generate from a masking law; everything else is drawn from `generator`."""
        valid = torch.ones_like(self.target) if self.valid is None else self.valid
        return replace(self, target=law(self.tokens, valid, generator), generator=generator, u=u)


class HaltReason(Enum):
    """Why a sample was returned."""

    CRITERION = "the halting criterion fired"
    FULL = "no position may change any more"
    BUDGET = "the last step of the grid was reached"


class NewRows(NamedTuple):
    """Rows that enter the batch, as a criterion sees them in `start`."""

    open: Bool[Tensor, "b n"]
    """Positions that may still change."""
    budget: Int[Tensor, " b"]
    """Steps that the row may take at most."""
    valid: Bool[Tensor, "b n"]
    """False on padding, and on blocks that come later."""


class Decision(NamedTuple):
    """A criterion's decision at one step."""

    halt: Bool[Tensor, " b"]
    """True: return the row with this step's tokens."""
    freeze: Bool[Tensor, "b n"] | None = None
    """True: the position keeps this step's token; only from a criterion that `freezes`."""
    info: Mapping[str, Tensor] = MappingProxyType({})
    """Logged signals, each with one value a row."""

    def among(self, rows: Bool[Tensor, " b"]) -> Decision:
        """The same, and nothing of the other rows."""
        freeze = None if self.freeze is None else self.freeze & rows[:, None]
        return self._replace(halt=self.halt & rows, freeze=freeze)


class Signals:
    """Types of the signals, the optional parts of a step: there while a criterion or a recorder needs them.

    `cdlm.halting.signals.SIGNALS` computes each; docs/write-a-criterion.md explains each.
    """

    logits: Float[Tensor, "b n v"]
    x0: Float[Tensor, "b n d"]
    z: Float[Tensor, "b n d"]
    score: Float[Tensor, "b n d"]
    tokens: Int[Tensor, "b n"]
    top1: Float[Tensor, "b n"]
    top2: Float[Tensor, "b n"]
    logsumexp: Float[Tensor, "b n"]
    confidence: Float[Tensor, "b n"]
    entropy: Float[Tensor, "b n"]
    switches: Int[Tensor, " b"]
    mean_entropy: Float[Tensor, " b"]
    mean_kl: Float[Tensor, " b"]
    max_jsd: Float[Tensor, " b"]
    min_confidence: Float[Tensor, " b"]
    margin: Float[Tensor, " b"]
    span_margin: Float[Tensor, " b"]
    z_norm: Float[Tensor, " b"]
    x0_norm: Float[Tensor, " b"]
    score_cosine: Float[Tensor, " b"]
    residual: Float[Tensor, " b"]


@dataclass(frozen=True)
class StepState(Signals):
    """One step of the rows in flight, after the denoiser was called and before the criterion looked.

    The signals in a rule's `needs` are attributes as well: `state.switches`. The others are not computed.
    """

    row: Int[Tensor, " b"]
    """Index of the sample in the run; rows change place, indices do not."""
    step: Int[Tensor, " b"]
    """Zero-based position on the grid."""
    budget: Int[Tensor, " b"]
    """Steps of the grid."""
    t: Float[Tensor, " b"]
    """Noise level of z, float64."""
    nfe: Int[Tensor, " b"]
    """Denoiser calls spent on the row so far, this one included."""
    open: Bool[Tensor, "b n"]
    """Positions that may still change."""
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    block: Bool[Tensor, "b n"] | None = None
    """Of a masked model: positions of the block that is decoded, decided ones too."""
    activations: Mapping[str, Tensor] = field(default_factory=dict)
    """What the modules that a rule names gave for each position, [b n d], by name; of others nothing is kept."""

    def __getattr__(self, name: str) -> Any:
        signals = self.__dict__.get("signals", {})
        if name in signals:
            return signals[name]
        if name.startswith("__"):
            raise AttributeError(name)
        raise CdlmError(
            f"the step has no signal {name!r}: list it in the criterion's `needs` (it has {sorted(signals)})"
        )


class SignalReader:
    """What reads signals of a step: a halting rule, a policy."""

    needs: AttributeOrProperty[frozenset[str]] = frozenset()
    """Names of the signals that it reads (see `cdlm.halting.signals.SIGNALS`)."""

    modules: AttributeOrProperty[frozenset[str]] = frozenset()
    """Names of the modules of the network whose outputs it reads, in `StepState.activations`."""


class RowCounts(NamedTuple):
    """What a step says of each row, on the host: all of it is known there, or read from the device once a step."""

    row: list[int]
    """Index of the sample in the run."""
    taken: list[int]
    """Steps that the row has taken, this one included, those of its earlier blocks too."""
    nfe: list[int]
    """Calls spent on it so far."""
    done: list[bool]
    """Rows that leave with this step's tokens."""
    halted: list[bool]
    """Those of them that the criterion halted."""
    full: list[bool]
    """Those of them in which every position is frozen; the others reached the end of the grid."""
    settled: list[int]
    """Of a masked model: calls after which the text up to its first end was decided; 0 while it is not, and of other
    models."""

    @staticmethod
    def of(
        row: list[int], taken: list[int], nfe: list[int], done: Sequence[int], halted: Sequence[int],
        full: Sequence[int], settled: list[int] | None = None,
    ) -> RowCounts:  # fmt: skip
        """From what was read; a row that is full and is halted counts as halted."""
        stopped = [bool(flag) for flag in halted]
        whole = [bool(flag) and not stop for flag, stop in zip(full, stopped, strict=True)]
        said = [0] * len(row) if settled is None else settled
        return RowCounts(row, taken, nfe, [bool(flag) for flag in done], stopped, whole, said)

    @property
    def leaving(self) -> list[int]:
        """Places of the rows that leave."""
        return [place for place, leaves in enumerate(self.done) if leaves]

    @property
    def staying(self) -> list[int]:
        """Places of the others."""
        return [place for place, leaves in enumerate(self.done) if not leaves]

    def leave(self, tokens: Int[Tensor, "b n"]) -> Int[Tensor, "m n"]:
        """Of each row's tokens, those of the rows that leave."""
        leaving = self.leaving
        return tokens.index_select(0, torch.tensor(leaving, device=tokens.device)) if leaving else tokens[:0]


class LoopStep(NamedTuple):
    """A step as the loop's consumers see it."""

    state: StepState
    counts: RowCounts
    tokens: Int[Tensor, "m n"]
    """Final tokens of the m rows that leave, prompts filled in."""
    info: Mapping[str, Tensor]
    """What the criterion logged, one value a row."""
    canvas: Int[Tensor, "b n"] | None = None
    """Of a run that commits: every row after the step; where it is open the mask, or of a continuous model -1."""
    counted: Mapping[str, Int[Tensor, " b"]] = MappingProxyType({})
    """What the policy has counted of each row up to now."""

    @property
    def done(self) -> Bool[Tensor, " b"]:
        """Rows that leave with this step's tokens; on the CPU."""
        return torch.tensor(self.counts.done)

    @property
    def halted(self) -> Bool[Tensor, " b"]:
        """Those of them that the criterion halted; on the CPU."""
        return torch.tensor(self.counts.halted)

    @property
    def full(self) -> Bool[Tensor, " b"]:
        """Those of them in which every position is frozen; on the CPU."""
        return torch.tensor(self.counts.full)
