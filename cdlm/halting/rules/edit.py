"""A rule that reads hidden states beside a map of the training: EDIT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from cdlm.core.checks import check_choice, check_number, check_object, check_whole, shown
from cdlm.core.errors import CdlmError
from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting.criterion import Criterion, Memory
from cdlm.halting.rules.sweeps import geometric_thresholds
from cdlm.halting.update_map import UpdateMap, read_map, row_norms

FLOOR = 1e-8
"""Added to each probability, as published."""


class Past(NamedTuple):
    """What is remembered of each row."""

    seen: dict[str, Tensor]
    """Of each module: by "code" the activations along the directions [b n r], by "paper" their cosines [b n]."""
    visible: Bool[Tensor, "b n"]
    """Positions that were decided."""
    field: Bool[Tensor, "b n"]
    """Positions that are looked at: by "code" all but padding, by "paper" those that are generated."""
    block: Bool[Tensor, "b n"]
    """The block that was decoded."""
    number: Int[Tensor, " b"]
    """Blocks entered before it; -1 before the first step."""
    entries: Int[Tensor, " b"]
    """Steps spent in the block, or by "paper" in the row."""
    recent: Float[Tensor, "b s"]
    """Divergences of the last steps of it, the latest last; infinite where there were none."""
    width: Float[Tensor, " b"]
    """Temperature of the block."""
    left: Int[Tensor, " b"]
    """Steps to polish that are left; -1 as long as the block goes on."""


@dataclass(frozen=True)
class EDIT(Criterion):
    """Stop when the activations of decided tokens no longer turn, seen along the updates of a LoRA training
    (arXiv 2512.00670): the divergence from the step before is below `delta` at `span` steps in a row.

    `variant="code"`, as published: of each decided token of the block, the softmax over the update directions of its
    activation, beside that of the step before. It ends a block: what is open in it is decided in `polish` further
    steps, evenly, the likeliest first and by the likeliest tokens; then the next block begins.

    `variant="paper"`, as described: the softmax over the decided tokens of their cosines to one vector, the row
    lengths of the updates, at the tokens decided at both steps. It halts the row. With fewer than two such tokens there
    is nothing to compare, and no step counts.

    The earliest end is at step `span` + 1 of a block, or `span` + 2 of a row. Decoding needs the adapter beside which
    the map lies, and calls of whole rows.

    Args:
        path: folder of the adapter, with its map, as cdlm train --lora wrote it.
        delta: nats, >= 0; at 0 nothing ends.
        span: steps that are looked back at.
        required: how many of them must be below; by default all.
        polish: of "code", steps after the last look, 2 unless given; 0 decides what is open in the block at once.
        first_delta, first_span: of "code", in place of the others in the first block.
        only: the modules of the map whose names hold this text, such as q_proj; by default all.
        digest: of the map that the rule was set for; by default the one that is there.
    """

    path: str
    variant: Literal["code", "paper"] = "code"
    delta: float = 0.05
    span: int = 6
    required: int | None = None
    polish: int | None = None
    first_delta: float | None = None
    first_span: int | None = None
    only: str = ""
    digest: str = ""
    _map: UpdateMap = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_object("EDIT", str, path=self.path, only=self.only, digest=self.digest)
        check_choice("EDIT", ("code", "paper"), variant=self.variant)
        check_number("EDIT", least=0.0, delta=self.delta)
        check_number("EDIT", least=0.0, optional=True, first_delta=self.first_delta)
        check_whole("EDIT", largest=1000, span=self.span)
        check_whole("EDIT", largest=1000, optional=True, first_span=self.first_span)
        check_whole("EDIT", largest=min(self.span, self.first_span or self.span), optional=True, required=self.required)
        check_whole("EDIT", least=0, optional=True, polish=self.polish)
        of_blocks = [name for name in ("polish", "first_delta", "first_span") if getattr(self, name) is not None]
        if self.variant == "paper" and of_blocks:
            raise CdlmError(f"EDIT needs variant='code' for {of_blocks[0]}, which is of blocks: leave it out")
        self._open()

    def _open(self) -> None:
        """Read the map, and note or check which one it is."""
        found, digest = read_map(Path(self.path))
        if self.digest not in ("", digest):
            raise CdlmError(
                f"EDIT was set for the map {self.digest}, and {self.path} has {digest}, trained since: set it again"
            )
        chosen = {name: value for name, value in found.directions.items() if self.only in name}
        if not chosen:
            some = shown(sorted(found.directions)[0])
            raise CdlmError(f"EDIT found no module whose name holds {self.only!r} in its map: it has such as {some}")
        object.__setattr__(self, "_map", UpdateMap(chosen, found.weights, found.steps))
        object.__setattr__(self, "digest", digest)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(delta=delta, **fixed) for delta in geometric_thresholds(1e-5, 5.0, 20)]

    @property
    def modules(self) -> frozenset[str]:
        return frozenset(self._map.directions)

    @property
    def freezes(self) -> bool:
        return self.variant == "code"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"top1", "logsumexp"} if self.variant == "code" and self._polish else ())

    @property
    def _polish(self) -> int:
        return 2 if self.polish is None else self.polish

    def check_made_for(self, has_weights: Callable[[str], bool], settings: Mapping[str, Any]) -> None:
        if not has_weights(self._map.weights):
            raise CdlmError(
                f"the map in {self.path} was made with other weights than these: load the adapter beside it, or train"
                " one with cdlm train --lora"
            )

    def start(self, rows: NewRows) -> Memory:
        n, device = rows.open.shape[1], rows.open.device
        zero, none = torch.zeros_like(rows.budget), torch.zeros_like(rows.open)
        kept = {
            name: torch.zeros(len(zero), n, *([u.shape[1]] if self.variant == "code" else []), device=device)
            for name, u in self._map.directions.items()
        }
        most = max(self.span, self.first_span or 0)
        never = torch.full((len(zero), most), torch.inf, device=device)
        looked_at = rows.valid if self.variant == "code" else rows.open
        return Past(kept, none, looked_at, none, zero - 1, zero, never, never[:, 0], zero - 1)

    def look(self, memory: Past, state: StepState) -> tuple[Memory, Decision]:
        return self._look_at_block(memory, state) if self.variant == "code" else self._look_at_row(memory, state)

    def _look_at_block(self, memory: Past, state: StepState) -> tuple[Memory, Decision]:
        assert state.block is not None
        block = state.block & memory.field
        fresh = (block != memory.block).any(1)
        masked = (block & state.open).sum(1) / block.sum(1).clamp(min=1)
        width = torch.where(fresh, (2.0 - 1.9 * masked).clamp(0.1, 2.0), memory.width)
        visible = block & ~state.open
        maps = {name: u.to(block.device) for name, u in self._map.directions.items()}
        seen = {name: along(self._given(state, name), u) for name, u in maps.items()}
        nats = [turn(memory.seen[name], now, visible, width) for name, now in seen.items()]
        divergence = torch.where(fresh, torch.inf, torch.stack(nats).mean(0))
        number = memory.number + fresh.long()
        entries = torch.where(fresh, 0, memory.entries) + 1
        recent = _pushed(torch.where(fresh[:, None], torch.inf, memory.recent), divergence)
        first = number == 0
        left = torch.where(fresh, -1, memory.left)
        ends = (left < 0) & self._quiet(recent, entries, first)
        freeze = self._share(state, block, ends, left)
        left = torch.where(ends, self._polish, torch.where(left > 0, left - 1, left))
        past = Past(seen, visible, memory.field, block, number, entries, recent, width, left)
        return past, Decision(torch.zeros_like(ends), freeze, {"divergence": divergence})

    def _look_at_row(self, memory: Past, state: StepState) -> tuple[Memory, Decision]:
        visible = memory.field & ~state.open
        both = visible & memory.visible
        vectors = {name: row_norms(u).to(visible.device) for name, u in self._map.directions.items()}
        seen = {n: functional.cosine_similarity(self._given(state, n), u, -1) for n, u in vectors.items()}
        nats = [divergence_over(memory.seen[name], now, both) for name, now in seen.items()]
        divergence = torch.where(both.sum(1) > 1, torch.stack(nats).mean(0), torch.inf)
        entries, recent = memory.entries + 1, _pushed(memory.recent, divergence)
        past = memory._replace(seen=seen, visible=visible, entries=entries, recent=recent)
        never = torch.zeros_like(entries, dtype=torch.bool)
        return past, Decision(self._quiet(recent, entries, never), info={"divergence": divergence})

    def _given(self, state: StepState, name: str) -> Float[Tensor, "b n d"]:
        """What a module of the map gives."""
        found, features = state.activations[name], len(self._map.directions[name])
        if found.shape[-1] != features:
            raise CdlmError(
                f"the map in {self.path} has {features} features of {name}, which gives {found.shape[-1]}: train the"
                " adapter again, with cdlm train --lora"
            )
        return found.float()

    def _quiet(self, recent: Float[Tensor, "b s"], entries: Int[Tensor, " b"], first: Bool[Tensor, " b"]) -> Tensor:
        """Rows whose last `span` divergences are small."""
        span = torch.where(first, self.first_span or self.span, self.span)
        delta = torch.where(first, self.delta if self.first_delta is None else self.first_delta, self.delta)
        place = torch.arange(recent.shape[1], 0, -1, device=recent.device)  # 1 is the latest
        small = (recent < delta[:, None]) & (place <= span[:, None])
        return (entries >= span) & (small.sum(1) >= (span if self.required is None else self.required))

    def _share(
        self, state: StepState, block: Bool[Tensor, "b n"], ends: Bool[Tensor, " b"], left: Int[Tensor, " b"]
    ) -> Bool[Tensor, "b n"]:
        """What is decided at this step beside what the policy chooses: an even share of what is open, up to the end of
        the block, of the steps to polish; or, without such steps, all of it."""
        until = block.flip(1).cumsum(1).flip(1) > 0
        due = state.open & until
        if not self._polish:
            return due & ends[:, None]
        share = torch.where(left > 0, -(-due.sum(1) // left.clamp(min=1)), 0)
        score = (state.top1 - state.logsumexp).masked_fill(~due, -torch.inf)
        order = score.sort(dim=1, descending=True, stable=True).indices
        place = torch.arange(due.shape[1], device=due.device) < share[:, None]
        return torch.zeros_like(due).scatter(1, order, place) & due


def along(activations: Float[Tensor, "b n d"], directions: Float[Tensor, "d r"]) -> Float[Tensor, "b n r"]:
    """Cosines of the activations of each position to the columns of a map."""
    return functional.normalize(activations, dim=-1) @ functional.normalize(directions, dim=0)


def turn(
    before: Float[Tensor, "b n r"],
    now: Float[Tensor, "b n r"],
    visible: Bool[Tensor, "b n"],
    width: Float[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """Mean over visible positions of KL(before || now), of softmaxes over the directions at temperature `width`, in
    nats; 0 where nothing is visible (published)."""
    p, q = ((x / width[:, None, None]).softmax(-1) + FLOOR for x in (before, now))
    nats = (p * (p.log() - q.log())).sum(-1)
    return torch.where(visible, nats, 0).sum(1) / visible.sum(1).clamp(min=1e-6)


def divergence_over(
    before: Float[Tensor, "b n"], now: Float[Tensor, "b n"], over: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """KL(before || now) of softmaxes over some positions of each row, in nats; 0 where there are none."""
    p, q = (x.masked_fill(~over, -torch.inf).log_softmax(1) for x in (before, now))
    return torch.where(over, p.exp() * (p - q), 0).sum(1)


def _pushed(recent: Float[Tensor, "b s"], latest: Float[Tensor, " b"]) -> Float[Tensor, "b s"]:
    return torch.cat([recent[:, 1:], latest[:, None]], 1)
