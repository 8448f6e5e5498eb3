"""Decoding with a masked model: one call, and one round of unmasking, for each row. It yields; the rest consumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import check_number, check_object, shown
from cdlm.core.errors import CdlmError
from cdlm.core.rng import PositionNoise
from cdlm.core.trees import blank
from cdlm.core.types import Decision, LoopStep, NewRows, StepState
from cdlm.halting.signals import RECORDED, SIGNALS, SPATIAL, Past, StepStatistics, check_signals, first_past, observe
from cdlm.masked.model import Cache, CachedModel, MaskedModel
from cdlm.masked.published import Quirks
from cdlm.policies import parse_policy
from cdlm.policies.llada import LLaDA
from cdlm.policies.policy import Choice, Plan, Policy, View, enter, plan_of
from cdlm.sampling.loop import Loop, RunOptions
from cdlm.sampling.prompts import encode_prompt, text_of_prompt
from cdlm.sampling.requests import Asked, Request, canvases, stack_masks
from cdlm.sampling.session import Model, Sampling


@dataclass(frozen=True)
class UnmaskingSettings:
    """Sampling of masked models, as in the model's paper unless given.

    Args:
        policy: LLaDA(64, block=32), Dream(64), DreamThreshold(64, 0.9), Threshold(0.9, block=32), Factor(1.0), KLASS()
            or EntropyBound(0.01).
        temperature: of what is drawn, by autoregressive models too; 0 takes the likeliest token.
        cfg_scale: classifier-free guidance; 0 is off, others double the calls.
        cache: keep keys and values while a block is decoded (of LLaDA and Dream).
    """

    policy: str | Policy | None = None
    temperature: float | None = None
    cfg_scale: float | None = None
    cache: Literal["prefix", "dual"] | None = None


@dataclass(frozen=True)
class Unmasking(Sampling):
    """How a masked model is sampled.

    Args:
        policy: which positions to commit at a step.
        temperature: of the proposals, >= 0; 0 takes the likeliest token.
        cfg_scale: classifier-free guidance, logits = free + (cfg_scale + 1) (given - free), where the free call does
            not see what was given; 0 is off, others cost a second call a step.
        cache: "prefix" recomputes a block and what follows it, "dual" the block alone, against the keys and values of a
            whole call when the block was entered; criteria then look at those whole calls alone.
        quirks: see there.
    """

    family = "masked"
    flat = UnmaskingSettings
    signals = frozenset(SIGNALS) - SPATIAL
    recorded = frozenset({"tokens", *RECORDED}) - SPATIAL

    policy: Policy = field(default_factory=LLaDA)
    temperature: float = 0.0
    cfg_scale: float = 0.0
    cache: Literal["prefix", "dual"] | None = None
    quirks: Quirks = field(default_factory=Quirks)

    def __post_init__(self) -> None:
        check_object("Unmasking", Policy, policy=self.policy)
        check_object("Unmasking", Quirks, quirks=self.quirks)
        off = "0 switches it off"
        check_number("Unmasking", least=0.0, temperature=self.temperature, cfg_scale=self.cfg_scale, hint=off)
        if self.cache is not None:
            self._check_cache()

    def _check_cache(self) -> None:
        if not isinstance(self.cache, str) or self.cache not in ("prefix", "dual"):
            raise CdlmError(f"cache must be prefix, dual or None, got {shown(self.cache)}")
        if not self.policy.tokenwise:
            raise CdlmError(f"{self.policy!r} reads whole rows at every step: decode without a cache")
        if self.cfg_scale > 0:
            raise CdlmError("guidance needs two calls of whole rows a step: leave out the cache, or cfg_scale")

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "policy": repr(self.policy),
            "temperature": float(self.temperature),
            "cfg_scale": float(self.cfg_scale),
            "cache": str(self.cache),
            **({} if self.quirks == Quirks() else {"quirks": repr(self.quirks)}),
        }

    def with_flat(self, **settings: Any) -> Unmasking:
        given = {name: value for name, value in settings.items() if value is not None}
        steps = given.pop("steps", None)
        if "policy" in given:
            if steps is not None:
                raise CdlmError(f"a policy has its own steps: write them in {given['policy']}, or leave out the policy")
            given["policy"] = parse_policy(given["policy"])
        changed = replace(self, **given)
        return changed if steps is None else changed.with_steps(steps)

    def with_steps(self, steps: int) -> Unmasking:
        if not self._has_steps:
            raise CdlmError(
                f"{self.policy!r} has no number of steps: of the policies, LLaDA, Dream and DreamThreshold have one"
            )
        return replace(self, policy=replace(self.policy, **{"steps": steps}))

    @property
    def _has_steps(self) -> bool:
        return any(field.name == "steps" for field in fields(self.policy))

    def steps_of(self, request: Request) -> int:
        open_ = int((~request.given).sum())
        size = self.policy.size or open_
        return int(self.policy.budget(torch.tensor([open_]), torch.tensor([-(-open_ // size)])))

    def fewer_steps(self, wanted: Sequence[int], request: Request) -> list[int]:
        if not self._has_steps:
            return []
        open_ = int((~request.given).sum())
        blocks = max(1, -(-open_ // (self.policy.size or open_)))
        return sorted({max(blocks, steps // blocks * blocks) for steps in wanted})

    def with_temperature_times(self, factor: float) -> Unmasking:
        return replace(self, temperature=self.temperature * factor)

    def rivals(self) -> Mapping[str, Sequence[Unmasking]]:
        return {"fewer steps": [self]} if self._has_steps else {}

    def length_of(self, requests: Sequence[Request]) -> int:
        return max(int((~request.given).sum()) for request in requests)

    def requests(self, model: Model, asked: Asked) -> list[Request]:
        if model.whole_rows and asked.new_tokens is None and not asked.chat:
            return super().requests(model, asked)
        new = model.new_tokens if asked.new_tokens is None else asked.new_tokens
        if asked.length is not None or new is None:
            raise CdlmError("new_tokens is the number of positions after each prompt: give it, and no length beside it")
        prompts, tokenizer = asked.prompts or [""], model.need_tokenizer()
        how = {"chat": asked.chat, "template": asked.template, "names": model.reads_names}
        rows = [encode_prompt(tokenizer, prompt, **how) for prompt in prompts]
        if asked.new_tokens is None and any(None in row for row in rows):  # these say what is to be generated
            if not all(None in row for row in rows):
                raise CdlmError("some prompts have holes, others none: give new_tokens, the positions after each")
            new = 0
        made, texts = canvases(rows, new, asked.n), [text_of_prompt(prompt) for prompt in prompts]
        return [replace(request, prompt=texts[i // asked.n]) for i, request in enumerate(made)]

    def loop(self, model: Any, options: RunOptions, batch_size: int) -> UnmaskingLoop:
        return UnmaskingLoop(model, self, options, batch_size, model.device)

    @property
    def draws(self) -> bool:
        return self.temperature > 0 or self.policy.draws

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


class UnmaskingLoop(Loop[UnmaskingRows]):
    """One run of a masked model.

    Row i is the same in any batch, order or batch size (bit for bit where the model's arithmetic is), and until it
    halts a row is what it is without a rule. No step writes over a token that is decided, nor over what was given.

    Args:
        noise: source of randomness; by default that of the run's seed.
    """

    def __init__(
        self, model: MaskedModel, sampling: Unmasking, options: RunOptions, batch_size: int,
        device: torch.device | str = "cpu", noise: PositionNoise | None = None,
    ):  # fmt: skip
        super().__init__(options, batch_size, device)
        check_signals(options.needs, sampling.signals)
        if sampling.cache is not None and not isinstance(model, CachedModel):
            raise CdlmError(f"{type(model).__name__} keeps no keys and values: decode without a cache")
        if sampling.cache is not None and options.record:
            raise CdlmError("a record needs the logits of whole rows at every step: leave out the cache")
        self.model, self.sampling = model, sampling
        self.noise = PositionNoise(options.seed) if noise is None else noise
        self.needs = options.needs | (sampling.policy.needs & {"mean_kl"})
        """Signals of a step: those that are read, and those whose past the policy needs."""
        mask = () if sampling.quirks.propose_mask else (model.constants.mask_id,)
        self.suppressed = (*mask, *sampling.policy.suppressed(model.constants))

    def budget(self, requests: Sequence[Request]) -> int:
        return max(int(self.admit([request], None).budget) for request in requests)

    @torch.no_grad()
    def admit(self, requests: list[Request], beside: UnmaskingRows | None) -> UnmaskingRows:
        sampling = self.sampling
        tokens, given, valid = self._canvas(requests)
        real = torch.ones_like(given) if valid is None else valid
        place = torch.arange(tokens.shape[1], device=self.device)
        begin = torch.tensor([-1 if r.start is None else r.start for r in requests], device=self.device)
        start = torch.where(begin < 0, (~given).long().argmax(1), begin)
        end = torch.where(real, place + 1, 0).amax(1)
        for length in sorted(set((end - start).tolist())):
            sampling.policy.check(length, self.model.constants)
        plan = plan_of(sampling.policy, ~given, start, end, tokens)
        plan = enter(sampling.policy, plan, ~given, self.options.criterion.waits)
        if self.options.criterion.waits and self.options.record >= sampling.recorded:
            self._check_replay(plan, ~given)
        budget = sampling.policy.budget((~given).sum(1), plan.last + 1)
        if sampling.quirks.extra_call and sampling.policy.schedule(plan) is None:
            budget = budget + plan.last + 1
        index = torch.tensor([request.index for request in requests], device=self.device)
        zero, fresh = torch.zeros_like(index), torch.ones_like(index, dtype=torch.bool)
        past = first_past(self.needs, tokens[..., None].float(), None if beside is None else beside.past)
        memory = self.options.criterion.start(NewRows(~given, budget, real))
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
        steps = self.sampling.policy.schedule(plan)
        if steps is None:
            return
        for block in range(int(plan.last.max())):
            masks = (open_ & (plan.block_of == block)).sum(1)
            if bool(((masks < steps) & (plan.last > block)).any()):
                raise CdlmError(
                    f"{self.sampling.policy!r} takes more steps for a block than it has masks, and idle steps cannot be"
                    " replayed: record with the rule Full(), or take fewer steps"
                )

    def choose(self, live: UnmaskingRows) -> Int[Tensor, " k"] | None:
        if self.sampling.cache is None:
            return None
        # Rows whose calls have the same shape go together, the largest such group first. Of the others, those whose
        # block begins their row are apart: nothing stands before it.
        start = self._block_start(live)
        shape = torch.where(live.fresh, 0, 2 * (self._block_end(live) - start) + (start == 0))
        largest = Counter(shape.tolist()).most_common(1)[0][0]
        return (shape == largest).nonzero().squeeze(1)

    @torch.no_grad()
    def step(self, live: UnmaskingRows) -> tuple[LoopStep, UnmaskingRows]:
        sampling, whole = self.sampling, bool(live.fresh.all())
        seen = self._whole(live) if whole else self._part(live)
        masked = live.tokens == self.model.constants.mask_id
        statistics = self._glance(live, seen, masked, whole)
        share = masked.sum(1).double() / (~live.given).sum(1)
        live = live._replace(nfe=live.nfe + sampling.calls, cache=seen.cache)
        decision, signals = Decision(torch.zeros_like(live.fresh)), {}
        if whole:
            signals, past = observe(self.needs, statistics)
            live = live._replace(past=past)
        state = StepState(live.row, live.step, live.budget, share, live.nfe, masked, signals)
        if whole:
            memory, decision = self.options.criterion.look(live.memory, state)
            live = live._replace(memory=memory)
        choice = self._propose(live, seen, statistics, share, whole)
        live = self._write(live, seen, statistics, decision, choice)
        return self._finish(live, state, decision)

    def advance(self, carried: UnmaskingRows) -> UnmaskingRows:
        sampling, plan = self.sampling, carried.plan
        open_ = carried.tokens == self.model.constants.mask_id
        moved = enter(sampling.policy, plan, open_, self.options.criterion.waits)
        if sampling.quirks.extra_call:
            moved = _where(plan.inner >= 2, moved, plan)
        # Holes in the prompt lie outside every block, so that only whole calls see them.
        holes = (open_ & (plan.block_of < 0)).any(1)
        fresh = torch.ones_like(carried.fresh) if sampling.cache is None else (moved.block != plan.block) | holes
        return carried._replace(plan=moved, fresh=fresh, step=carried.step + 1)

    def _whole(self, live: UnmaskingRows) -> Seen:
        """A call of whole rows."""
        tokens, cache = live.tokens, live.cache
        if self.sampling.cache is not None:
            assert isinstance(self.model, CachedModel)
            logits, cache = self.model.fill(tokens, live.valid)
        elif self.sampling.cfg_scale > 0:
            free = tokens.masked_fill(live.given, self.model.constants.mask_id)
            valid = None if live.valid is None else torch.cat([live.valid, live.valid])
            both = torch.cat([tokens, free])
            logits = self.model.logits(both, valid)
            self._check(logits, both)
            conditional, free = logits.chunk(2)
            logits = free + (self.sampling.cfg_scale + 1) * (conditional - free)
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
        elif self.sampling.quirks.first_from_full or bool((start == 0).any()):
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
        if self.sampling.cache == "prefix":
            return torch.full_like(live.row, live.tokens.shape[1])
        return (live.plan.block_of <= live.plan.block[:, None]).sum(1)

    def _suppress(self, logits: Float[Tensor, "b q v"]) -> Float[Tensor, "b q v"]:
        if not self.suppressed:
            return logits
        return logits.contiguous().index_fill_(-1, torch.tensor(self.suppressed, device=logits.device), -torch.inf)

    def _check(self, logits: Tensor, tokens: Int[Tensor, "b n"]) -> None:
        constants = self.model.constants
        most = max(int(tokens.max()), constants.mask_id, *constants.end_ids)
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape or logits.shape[2] <= most:
            raise CdlmError(
                f"the model gave logits of shape {list(logits.shape)}, expected {list(tokens.shape)} and a vocabulary"
                f" of at least {most + 1}: the tokens, or mask_id and the ends, are of another vocabulary"
            )

    def _glance(self, live: UnmaskingRows, seen: Seen, masked: Bool[Tensor, "b n"], whole: bool) -> StepStatistics:
        open_ = masked.gather(1, seen.at)
        target = ~live.given.gather(1, seen.at)
        needs = self.sampling.policy.needs | (self.needs if whole else frozenset())
        past = live.past if whole else Past(None, None, None)
        statistics = StepStatistics(seen.logits, open_, target, live.step == 0, past, needs)
        if bool((statistics.peaks.isnan().any(-1) & open_).any()):
            raise CdlmError("the model gave logits that are not numbers (NaN): its weights or its precision are broken")
        return statistics

    def _propose(
        self, live: UnmaskingRows, seen: Seen, statistics: StepStatistics, share: Float[Tensor, " b"], whole: bool
    ) -> Choice:
        block_of = live.plan.block_of.gather(1, seen.at)
        if whole and self.sampling.cache is not None and self.sampling.quirks.first_from_full:
            return Choice(seen.at == self._block_start(live)[:, None], statistics.tokens, live.plan.own)
        candidates = statistics.open & (block_of <= live.plan.block[:, None])
        sampling, steps = self.sampling, self.sampling.policy.schedule(live.plan)
        # Of a schedule the clock is its own, so that steps that are skipped change nothing that is drawn.
        clock = live.step if steps is None else live.plan.block * steps + live.plan.inner
        view = View(
            statistics, candidates, live.row, clock, live.plan, share, sampling.temperature,
            self.model.constants, self.noise,
        )  # fmt: skip
        return sampling.policy.choose(view)

    def _write(
        self, live: UnmaskingRows, seen: Seen, statistics: StepStatistics, decision: Decision, choice: Choice
    ) -> UnmaskingRows:
        """Commit what the policy chose and the criterion froze; fill rows that halt, and those at their last step."""
        quirks, mask_id = self.sampling.quirks, self.model.constants.mask_id
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
        ends = torch.tensor(self.model.end_ids, dtype=tokens.dtype, device=tokens.device)
        real = live.given if live.valid is None else live.given & live.valid
        given_last = torch.where(real, place, -1).amax(
            1, keepdim=True
        )  # what is given after a hole belongs to the text
        found = torch.isin(tokens, ends) & (place > given_last)
        end = torch.where(found, place, tokens.shape[1]).amin(1, keepdim=True)
        ready = ~((tokens == self.model.constants.mask_id) & (place < end)).any(1)
        return torch.where(ready & (live.settled == 0), live.nfe, live.settled)

    def _finish(self, live: UnmaskingRows, state: StepState, decision: Decision) -> tuple[LoopStep, UnmaskingRows]:
        sampling = self.sampling
        full = ~(live.tokens == self.model.constants.mask_id).any(1)
        if self.options.criterion.waits and sampling.policy.schedule(live.plan) is not None:
            full = full & False  # it takes all steps of its schedule
        if sampling.quirks.extra_call:
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
