"""Decoding with a masked model: one call, and one round of unmasking, for each row. It yields; the rest consumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.errors import CdlmError
from cdlm.core.rng import PositionNoise
from cdlm.core.trees import blank
from cdlm.core.types import Decision, LoopStep, NewRows, StepState
from cdlm.halting import Criterion, Never
from cdlm.halting.signals import RECORDED, SPATIAL, Past, StepStatistics, check_signals, first_past, observe
from cdlm.masked.model import Cache, CachedModel, MaskedModel
from cdlm.masked.policies.llada import LLaDA
from cdlm.masked.policies.policy import Choice, Plan, Policy, View, enter, plan_of
from cdlm.masked.published import Quirks
from cdlm.sampling.loop import Loop
from cdlm.sampling.requests import Request, stack_masks

REPLAYED = frozenset(RECORDED) - SPATIAL
"""What a record that is to be replayed is made of."""


@dataclass(frozen=True)
class Decoder:
    """Everything that fixes a decoding run except the model, the requests and the batch size.

    Args:
        policy: which positions to commit at a step.
        criterion: when a row is done before the policy is.
        temperature: of the proposals, >= 0; 0 takes the likeliest token.
        cfg_scale: classifier-free guidance, logits = free + (cfg_scale + 1) (given - free), where the free call does
            not see what was given; 0 is off, others cost a second call a step.
        cache: "prefix" recomputes a block and what follows it, "dual" the block alone, against the keys and values of a
            whole call when the block was entered; criteria then look at those whole calls alone.
        seed: of the run, >= 0.
        record: names of signals to compute at every step, for the loop's consumers.
        quirks: see there.
    """

    policy: Policy = field(default_factory=LLaDA)
    criterion: Criterion = field(default_factory=Never)
    temperature: float = 0.0
    cfg_scale: float = 0.0
    cache: Literal["prefix", "dual"] | None = None
    seed: int = 0
    record: frozenset[str] = frozenset()
    quirks: Quirks = field(default_factory=Quirks)

    def __post_init__(self) -> None:
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise CdlmError(f"{name} must be a number >= 0, got {value}: 0 switches it off")
        if self.seed < 0:
            raise CdlmError(f"a seed is a whole number >= 0, got {self.seed}")
        check_signals(self.record | self.criterion.needs, spatial=False)
        if self.cache is not None:
            self._check_cache()

    def _check_cache(self) -> None:
        if self.cache not in ("prefix", "dual"):
            raise CdlmError(f"cache must be prefix, dual or None, got {self.cache!r}")
        if not self.policy.tokenwise:
            raise CdlmError(f"{self.policy!r} reads whole rows at every step: decode without a cache")
        if self.cfg_scale > 0:
            raise CdlmError("guidance needs two calls of whole rows a step: leave out the cache, or cfg_scale")
        if self.record:
            raise CdlmError("a record needs the logits of whole rows at every step: leave out the cache")

    @property
    def settings(self) -> dict[str, int | float | str]:
        """What fixes the run besides seed and rule: two runs with equal settings walk the same steps."""
        return {
            "policy": repr(self.policy),
            "temperature": float(self.temperature),
            "cfg_scale": float(self.cfg_scale),
            "cache": str(self.cache),
            **({} if self.quirks == Quirks() else {"quirks": repr(self.quirks)}),
        }

    def steps(self, request: Request) -> int:
        """Most steps of a request."""
        open_ = int((~request.given).sum())
        size = self.policy.size or open_
        return int(self.policy.budget(torch.tensor([open_]), torch.tensor([-(-open_ // size)])))

    def fewer(self, wanted: Sequence[int], request: Request) -> list[int]:
        """Numbers of steps near those wanted that the request can be decoded with; none if the policy has no number."""
        if not any(field.name == "steps" for field in fields(self.policy)):
            return []
        open_ = int((~request.given).sum())
        blocks = max(1, -(-open_ // (self.policy.size or open_)))
        return sorted({max(blocks, steps // blocks * blocks) for steps in wanted})

    def with_steps(self, steps: int) -> Decoder:
        """The same with so many steps.

        Raises:
            CdlmError: the policy has no number of steps.
        """
        if not any(field.name == "steps" for field in fields(self.policy)):
            raise CdlmError(f"{self.policy!r} has no number of steps: of the policies, LLaDA and Dream have one")
        return replace(self, policy=replace(self.policy, **{"steps": steps}))

    @property
    def asked(self) -> frozenset[str]:
        """Signals of a step that the criterion or a consumer reads, or whose past the policy needs."""
        return self.record | self.criterion.needs | (self.policy.needs & {"mean_kl"})

    @property
    def calls(self) -> int:
        """Model calls of a step."""
        return 2 if self.cfg_scale > 0 else 1


class UnmaskingRows(NamedTuple):
    """Everything with a row axis that lives from one step to the next."""

    row: Int[Tensor, " b"]
    step: Int[Tensor, " b"]
    budget: Int[Tensor, " b"]
    nfe: Int[Tensor, " b"]
    settled: Int[Tensor, " b"]
    """Calls after which the text up to its first end was decided; 0 while it is not."""
    tokens: Int[Tensor, "b n"]
    """The canvas: the mask where a position is open."""
    given: Bool[Tensor, "b n"]
    valid: Bool[Tensor, "b n"] | None
    plan: Plan
    past: Past
    memory: Any
    fresh: Bool[Tensor, " b"]
    """Rows whose next call is of whole rows: all of them without a cache, else those that enter a block."""
    cache: Cache = None


class Seen(NamedTuple):
    """What one call found of q positions of each row."""

    logits: Float[Tensor, "b q v"]
    at: Int[Tensor, "b q"]
    """Place of each position in its row."""
    cache: Cache


class Decoding(Loop[UnmaskingRows]):
    """One run of a decoder on a masked model.

    Row i is the same in any batch, order or batch size (bit for bit where the model's arithmetic is), and until it
    halts a row is what it is without a rule. No step writes over a token that is decided, nor over what was given.

    Args:
        draws: source of randomness; by default that of the decoder's seed.
        ends: whether a text ends at its first end-of-text token; in packed text that token is only a line break.
    """

    def __init__(
        self, model: MaskedModel, decoder: Decoder, batch_size: int, device: torch.device | str = "cpu",
        draws: PositionNoise | None = None, ends: bool = True,
    ):  # fmt: skip
        super().__init__(batch_size, device)
        if decoder.cache is not None and not isinstance(model, CachedModel):
            raise CdlmError(f"{type(model).__name__} keeps no keys and values: decode without a cache")
        self.model, self.decoder, self.ends = model, decoder, ends
        self.draws = PositionNoise(decoder.seed) if draws is None else draws
        mask = () if decoder.quirks.propose_mask else (model.constants.mask_id,)
        self.suppressed = (*mask, *decoder.policy.suppressed(model.constants))

    def budget(self, requests: Sequence[Request]) -> int:
        """Most steps that any of the requests may take."""
        return max(int(self.admit([request], None).budget) for request in requests)

    @torch.no_grad()
    def admit(self, requests: list[Request], beside: UnmaskingRows | None) -> UnmaskingRows:
        decoder = self.decoder
        tokens, given, valid = self._canvas(requests)
        real = torch.ones_like(given) if valid is None else valid
        place = torch.arange(tokens.shape[1], device=self.device)
        begin = torch.tensor([-1 if r.start is None else r.start for r in requests], device=self.device)
        start = torch.where(begin < 0, (~given).long().argmax(1), begin)
        end = torch.where(real, place + 1, 0).amax(1)
        for length in sorted(set((end - start).tolist())):
            decoder.policy.check(length, self.model.constants)
        plan = plan_of(decoder.policy, ~given, start, end, tokens)
        plan = enter(decoder.policy, plan, ~given, decoder.criterion.waits)
        if decoder.criterion.waits and decoder.record >= REPLAYED:
            self._check_replay(plan, ~given)
        budget = decoder.policy.budget((~given).sum(1), plan.last + 1)
        if decoder.quirks.extra_call and decoder.policy.schedule(plan) is None:
            budget = budget + plan.last + 1
        index = torch.tensor([request.index for request in requests], device=self.device)
        zero, fresh = torch.zeros_like(index), torch.ones_like(index, dtype=torch.bool)
        past = first_past(decoder.asked, tokens[..., None].float(), None if beside is None else beside.past)
        memory = decoder.criterion.start(NewRows(~given, budget, real))
        cache = None if beside is None else blank(beside.cache, len(index))
        return UnmaskingRows(index, zero, budget, zero, zero, tokens, given, valid, plan, past, memory, fresh, cache)

    def _canvas(self, requests: list[Request]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens with masks where something is to be generated, what is given, and what is no padding."""
        tokens = torch.stack([request.tokens for request in requests]).to(self.device)
        given = torch.stack([request.given for request in requests]).to(self.device)
        valid = stack_masks([request.valid for request in requests], self.device)
        mask_id, vocab = self.model.constants.mask_id, self.model.vocab
        if vocab is not None and int(tokens.max()) >= vocab:
            raise CdlmError(f"a prompt holds token {int(tokens.max())}, and the model has {vocab}: use its tokenizer")
        if valid is not None:  # padding must not read as the mask
            tokens = tokens.masked_fill(~valid, int(mask_id == 0))
        if bool((given & (tokens == mask_id)).any()):
            raise CdlmError(f"a prompt holds the mask, token {mask_id}: leave it out, or mark what is to be generated")
        if bool(given.all(1).any()):
            raise CdlmError("a prompt leaves nothing to generate: shorten it, or raise the length")
        return tokens.masked_fill(~given, mask_id), given, valid

    def _check_replay(self, plan: Plan, open_: Bool[Tensor, "b n"]) -> None:
        """Raise if rows idle inside their blocks, which every rule but Never passes over: replay could not tell."""
        steps = self.decoder.policy.schedule(plan)
        if steps is None:
            return
        for block in range(int(plan.last.max())):
            masks = (open_ & (plan.block_of == block)).sum(1)
            if bool(((masks < steps) & (plan.last > block)).any()):
                raise CdlmError(
                    f"{self.decoder.policy!r} takes more steps for a block than it has masks, and idle steps cannot be"
                    " replayed: record with the rule Full(), or take fewer steps"
                )

    def choose(self, live: UnmaskingRows) -> Int[Tensor, " k"] | None:
        if self.decoder.cache is None:
            return None
        # Rows whose calls have the same shape go together, the largest such group first. Of the others, those whose
        # block begins their row are apart: nothing stands before it.
        start = self._block_start(live)
        shape = torch.where(live.fresh, 0, 2 * (self._block_end(live) - start) + (start == 0))
        largest = Counter(shape.tolist()).most_common(1)[0][0]
        return (shape == largest).nonzero().squeeze(1)

    @torch.no_grad()
    def step(self, live: UnmaskingRows) -> tuple[LoopStep, UnmaskingRows]:
        decoder, whole = self.decoder, bool(live.fresh.all())
        seen = self._whole(live) if whole else self._part(live)
        masked = live.tokens == self.model.constants.mask_id
        statistics = self._glance(live, seen, masked, whole)
        share = masked.sum(1).double() / (~live.given).sum(1)
        live = live._replace(nfe=live.nfe + decoder.calls, cache=seen.cache)
        decision, signals = Decision(torch.zeros_like(live.fresh)), {}
        if whole:
            signals, past = observe(decoder.asked, statistics)
            live = live._replace(past=past)
        state = StepState(live.row, live.step, live.budget, share, live.nfe, masked, signals)
        if whole:
            memory, decision = decoder.criterion.look(live.memory, state)
            live = live._replace(memory=memory)
        choice = self._propose(live, seen, statistics, whole)
        live = self._write(live, seen, statistics, decision, choice)
        return self._finish(live, state, decision)

    def advance(self, carried: UnmaskingRows) -> UnmaskingRows:
        decoder, plan = self.decoder, carried.plan
        open_ = carried.tokens == self.model.constants.mask_id
        moved = enter(decoder.policy, plan, open_, decoder.criterion.waits)
        if decoder.quirks.extra_call:
            moved = _where(plan.inner >= 2, moved, plan)
        # Holes in the prompt lie outside every block, so that only whole calls see them.
        holes = (open_ & (plan.block_of < 0)).any(1)
        fresh = torch.ones_like(carried.fresh) if decoder.cache is None else (moved.block != plan.block) | holes
        return carried._replace(plan=moved, fresh=fresh, step=carried.step + 1)

    def _whole(self, live: UnmaskingRows) -> Seen:
        """A call of whole rows."""
        tokens, cache = live.tokens, live.cache
        if self.decoder.cache is not None:
            assert isinstance(self.model, CachedModel)
            logits, cache = self.model.fill(tokens, live.valid)
        elif self.decoder.cfg_scale > 0:
            free = tokens.masked_fill(live.given, self.model.constants.mask_id)
            valid = None if live.valid is None else torch.cat([live.valid, live.valid])
            both = torch.cat([tokens, free])
            logits = self.model.logits(both, valid)
            self._check(logits, both)
            told, free = logits.chunk(2)
            logits = free + (self.decoder.cfg_scale + 1) * (told - free)
        else:
            logits = self.model.logits(tokens, live.valid)
        self._check(logits, tokens)
        if self.model.constants.shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        at = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        return Seen(self._suppress(logits), at, cache)

    def _part(self, live: UnmaskingRows) -> Seen:
        """A call of each row's block, or of what follows it too, against the keys and values of the last whole call."""
        assert isinstance(self.model, CachedModel)
        start, end = self._block_start(live), self._block_end(live)
        at = start[:, None] + torch.arange(int((end - start)[0]), device=self.device)
        if not self.model.constants.shift:
            logits = self.model.partial(live.tokens.gather(1, at), at, live.cache, live.valid)
        elif self.decoder.quirks.first_from_full or bool((start == 0).any()):
            logits = self.model.partial(live.tokens.gather(1, at), at, live.cache, live.valid)
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        else:  # the position before the block is what predicts its first one
            wider = torch.cat([at[:, :1] - 1, at], 1)
            logits = self.model.partial(live.tokens.gather(1, wider), wider, live.cache, live.valid)[:, :-1]
        return Seen(self._suppress(logits), at, live.cache)

    def _block_start(self, live: UnmaskingRows) -> Int[Tensor, " b"]:
        before = live.plan.block_of < live.plan.block[:, None]
        return before.sum(1)

    def _block_end(self, live: UnmaskingRows) -> Int[Tensor, " b"]:
        if self.decoder.cache == "prefix":
            return torch.full_like(live.row, live.tokens.shape[1])
        return (live.plan.block_of <= live.plan.block[:, None]).sum(1)

    def _suppress(self, logits: Float[Tensor, "b q v"]) -> Float[Tensor, "b q v"]:
        if not self.suppressed:
            return logits
        return logits.contiguous().index_fill_(-1, torch.tensor(self.suppressed, device=logits.device), -torch.inf)

    def _check(self, logits: Tensor, tokens: Int[Tensor, "b n"]) -> None:
        constants = self.model.constants
        most = max(int(tokens.max()), constants.mask_id, constants.eos_id or 0, constants.eot_id or 0)
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape or logits.shape[2] <= most:
            raise CdlmError(
                f"the model gave logits of shape {list(logits.shape)}, expected {list(tokens.shape)} and a vocabulary"
                f" of at least {most + 1}: the tokens, or mask_id and the ends, are of another vocabulary"
            )

    def _glance(self, live: UnmaskingRows, seen: Seen, masked: Bool[Tensor, "b n"], whole: bool) -> StepStatistics:
        open_ = masked.gather(1, seen.at)
        target = ~live.given.gather(1, seen.at)
        needs = self.decoder.policy.needs | (self.decoder.asked if whole else frozenset())
        past = live.past if whole else Past(None, None, None)
        statistics = StepStatistics(seen.logits, open_, target, live.step == 0, past, needs)
        if bool((statistics.peaks.isnan().any(-1) & open_).any()):
            raise CdlmError("the model gave logits that are not numbers (NaN): its weights or its precision are broken")
        return statistics

    def _propose(self, live: UnmaskingRows, seen: Seen, statistics: StepStatistics, whole: bool) -> Choice:
        block_of = live.plan.block_of.gather(1, seen.at)
        if whole and self.decoder.cache is not None and self.decoder.quirks.first_from_full:
            return Choice(seen.at == self._block_start(live)[:, None], statistics.tokens, live.plan.own)
        candidates = statistics.open & (block_of <= live.plan.block[:, None])
        decoder, steps = self.decoder, self.decoder.policy.schedule(live.plan)
        # Of a schedule the clock is its own, so that steps that are skipped change nothing that is drawn.
        clock = live.step if steps is None else live.plan.block * steps + live.plan.inner
        view = View(
            statistics, candidates, live.row, clock, live.plan, decoder.temperature, self.model.constants, self.draws
        )
        return decoder.policy.choose(view)

    def _write(
        self, live: UnmaskingRows, seen: Seen, statistics: StepStatistics, decision: Decision, choice: Choice
    ) -> UnmaskingRows:
        """Commit what the policy chose and the criterion froze; fill rows that halt, and those at their last step."""
        quirks, mask_id = self.decoder.quirks, self.model.constants.mask_id
        value = torch.where(choice.commit, choice.tokens, live.tokens.gather(1, seen.at))
        if decision.freeze is not None:
            value = torch.where(decision.freeze & statistics.open, statistics.tokens, value)
        fill = torch.where(decision.halt[:, None], statistics.open, False)
        value = torch.where(fill, choice.tokens if quirks.noisy_fill else statistics.tokens, value)
        if not quirks.leave_masks:
            last = (live.step == live.budget - 1)[:, None]
            value = torch.where(last & (value == mask_id), statistics.tokens, value)
        tokens = live.tokens.scatter(1, seen.at, value)
        plan = live.plan._replace(inner=live.plan.inner + 1, own=choice.own)
        return live._replace(tokens=tokens, plan=plan, settled=self._settled(live, tokens))

    def _settled(self, live: UnmaskingRows, tokens: Int[Tensor, "b n"]) -> Int[Tensor, " b"]:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        eos = self.model.constants.eos_id
        real = live.given if live.valid is None else live.given & live.valid
        told = torch.where(real, place, -1).amax(1, keepdim=True)  # what is given after a hole belongs to the text
        found = (tokens == eos) & (place > told) if self.ends and eos is not None else torch.zeros_like(real)
        end = torch.where(found, place, tokens.shape[1]).amin(1, keepdim=True)
        ready = ~((tokens == self.model.constants.mask_id) & (place < end)).any(1)
        return torch.where(ready & (live.settled == 0), live.nfe, live.settled)

    def _finish(self, live: UnmaskingRows, state: StepState, decision: Decision) -> tuple[LoopStep, UnmaskingRows]:
        decoder = self.decoder
        full = ~(live.tokens == self.model.constants.mask_id).any(1)
        if decoder.criterion.waits and decoder.policy.schedule(live.plan) is not None:
            full = full & False  # it takes all steps of its schedule
        if decoder.quirks.extra_call:
            full = full & (live.plan.inner >= 2)
        done = decision.halt | full | (live.step == live.budget - 1)
        finished = LoopStep(
            state, done, decision.halt, full & ~decision.halt, live.tokens[done], decision.info, live.tokens,
            live.settled,
        )  # fmt: skip
        return finished, live


def _where(condition: Bool[Tensor, " b"], first: Plan, second: Plan) -> Plan:
    """Rows of the first plan, or of the second."""
    blocks = (torch.where(condition, getattr(first, n), getattr(second, n)) for n in ("block", "inner", "masks"))
    return first._replace(**dict(zip(("block", "inner", "masks"), blocks, strict=True)))
