"""What every part agrees on: predictions, step states, decisions, samples.

Axis glossary: b rows (samples in flight), n positions, d embedding dimension, v vocabulary.

Noise coordinate: `t = sigma / alpha`, the noise-to-signal ratio. Larger is noisier; sampling walks from `t_max` down to
`t_min`. States are variance exploding, `z = e + t * eps`; everything else (alpha, sigma, gamma) is a view of `t`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.errors import CdlmError
from cdlm.record import Record


class Prediction(NamedTuple):
    """All that a denoiser says about one state."""

    logits: Float[Tensor, "b n v"]
    """Unnormalised log-probabilities of the clean token, float32 or float64."""
    x0: Float[Tensor, "b n d"]
    """Expected clean embedding under softmax(logits)."""


class Condition(NamedTuple):
    """What a denoiser is told besides the noisy state."""

    clean: Float[Tensor, "b n d"]
    """Embeddings at given positions, zero elsewhere (zero everywhere for the unconditional branch of guidance)."""
    noised: Bool[Tensor, "b n"]
    """True where a token is to be generated, False where it is given (or padding)."""
    x0: Float[Tensor, "b n d"]
    """Self-conditioning: the previous estimate of the clean embedding, zero on the first call."""
    valid: Bool[Tensor, "b n"] | None = None
    """False on padding, which nobody attends to; None when there is none."""


class HaltReason(Enum):
    """Why a sample was returned."""

    CRITERION = "the halting criterion fired"
    FULL = "no position may change any more"
    BUDGET = "the last step of the grid was reached"


class Rows(NamedTuple):
    """Rows that enter the batch, as a criterion sees them in `start`."""

    open: Bool[Tensor, "b n"]
    """Positions that may still change."""
    budget: Int[Tensor, " b"]
    """Steps that the row may take at most."""
    valid: Bool[Tensor, "b n"]
    """False on padding, and on blocks that come later."""


class Decision(NamedTuple):
    """What a criterion says about one step."""

    halt: Bool[Tensor, " b"]
    """True: return the row with this step's tokens."""
    freeze: Bool[Tensor, "b n"] | None = None
    """True: the position keeps this step's token; only of a criterion that `freezes`."""
    info: Mapping[str, Tensor] = MappingProxyType({})
    """Logged signals, each with one value a row."""


class Signals:
    """The optional parts of a step: present only while some criterion or recorder lists them in its `needs`."""

    if TYPE_CHECKING:
        logits: Float[Tensor, "b n v"]
        x0: Float[Tensor, "b n d"]
        z: Float[Tensor, "b n d"]
        score: Float[Tensor, "b n d"]
        tokens: Int[Tensor, "b n"]
        top1: Float[Tensor, "b n"]
        top2: Float[Tensor, "b n"]
        logsumexp: Float[Tensor, "b n"]
        entropy: Float[Tensor, "b n"]
        switches: Int[Tensor, " b"]
        mean_entropy: Float[Tensor, " b"]
        mean_kl: Float[Tensor, " b"]
        margin: Float[Tensor, " b"]
        span_margin: Float[Tensor, " b"]
        z_norm: Float[Tensor, " b"]
        x0_norm: Float[Tensor, " b"]
        score_cosine: Float[Tensor, " b"]


@dataclass(frozen=True)
class StepState(Signals):
    """One step of the rows in flight, after the denoiser was called and before the criterion looked.

    Signals that were asked for are attributes as well: `state.switches`. Nobody pays for the others.
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

    def __getattr__(self, name: str) -> Any:
        signals = self.__dict__.get("signals", {})
        if name in signals:
            return signals[name]
        if name.startswith("__"):
            raise AttributeError(name)
        raise CdlmError(
            f"the step has no signal {name!r}: list it in the criterion's `needs` (it has {sorted(signals)})"
        )


class Finished(NamedTuple):
    """A step as the loop's consumers see it."""

    state: StepState
    done: Bool[Tensor, " b"]
    """Rows that leave with this step's tokens."""
    halted: Bool[Tensor, " b"]
    """Those of them that the criterion halted."""
    full: Bool[Tensor, " b"]
    """Those of them in which every position is frozen; the others reached the end of the grid."""
    tokens: Int[Tensor, "m n"]
    """Final tokens of the m rows that leave, prompts filled in."""
    info: Mapping[str, Tensor]
    """What the criterion logged, one value a row."""
    canvas: Int[Tensor, "b n"] | None = None
    """Of a masked model: every row after the step, the mask where it is open."""
    settled: Int[Tensor, " b"] | None = None
    """Of a masked model: calls after which the text up to its first end was decided; 0 while it is not."""
    taken: Int[Tensor, " b"] | None = None
    """Steps that each row has taken, in a run whose rows count anew for each block."""


COLUMNS = ("tokens", "nfe", "steps", "index", "given", "valid", "shown", "settled")
"""Fields of samples that are arrays with a row for each."""


@dataclass(frozen=True)
class Samples:
    """A finished run, in the order of the requests."""

    tokens: Int[np.ndarray, "m n"]
    texts: list[str]
    """Empty when there is no tokenizer."""
    nfe: Int[np.ndarray, " m"]
    """Denoiser calls spent on each sample."""
    steps: Int[np.ndarray, " m"]
    """Grid points visited by each sample."""
    budget: int
    """Grid points of the run."""
    reason: list[HaltReason]
    seed: int
    index: Int[np.ndarray, " m"]
    """Index of each sample: with the seed it fixes the sample's noise."""
    given: Bool[np.ndarray, "m n"]
    """True at prompt positions and padding."""
    valid: Bool[np.ndarray, "m n"]
    """False on padding, which a template shorter than the length leaves."""
    shown: Bool[np.ndarray, "m n"]
    """Positions that are text: no padding, and nothing from the end of a text on where texts have one."""
    settled: Int[np.ndarray, " m"]
    """Calls after which the text up to its first end-of-text token was decided: what was spent beyond, was spent after
    the end. Of a continuous model all calls."""
    record: Record | None = None
    """Statistics of every step; None unless asked for."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def calls_after_end(self) -> Int[np.ndarray, " m"]:
        """Calls that each sample spent when its text was already decided."""
        return self.nfe - self.settled

    @staticmethod
    def merge(parts: Sequence[Samples]) -> Samples:
        """The samples of several processes as one run, in the order of their index."""
        order = np.argsort(np.concatenate([part.index for part in parts]), kind="stable")

        def all_of(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in parts])[order]

        texts = [text for part in parts for text in part.texts]
        reasons = [reason for part in parts for reason in part.reason]
        records = [part.record for part in parts if part.record is not None]
        record = Record.join(records).select(order) if records else None
        return Samples(
            **{name: all_of(name) for name in COLUMNS},
            texts=[texts[i] for i in order] if texts else [],
            reason=[reasons[i] for i in order],
            seed=parts[0].seed,
            budget=max(part.budget for part in parts),
            record=record,
        )


def take(tree: Any, index: Tensor) -> Any:
    """Rows `index` (int64 positions) of every tensor in a nest of tuples, lists and dicts."""
    return _map(lambda x: x.index_select(0, index), tree)


def join(first: Any, second: Any) -> Any:
    """Two nests of the same form, concatenated along the rows."""
    import torch

    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: join(first[key], second[key]) for key in first}
    return _rebuild(first, [join(a, b) for a, b in zip(first, second, strict=True)])


def blank(tree: Any, rows: int) -> Any:
    """A nest of the same form with `rows` rows of zeros."""
    return _map(lambda x: x.new_zeros((rows, *x.shape[1:])), tree)


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: _map(function, value) for key, value in tree.items()}
    return _rebuild(tree, [_map(function, item) for item in tree])


def _rebuild(like: Any, items: Iterable[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
