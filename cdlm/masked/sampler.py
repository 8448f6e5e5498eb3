"""Decoding with a masked model: one call, and one round of unmasking, for each row. It yields; the rest consumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import check_number, check_object, shown
from cdlm.core.devices import fine, places, read_columns
from cdlm.core.errors import CdlmError
from cdlm.core.rng import PositionNoise
from cdlm.core.trees import Columns, blank
from cdlm.core.types import Decision, LoopStep, NewRows, RowCounts, StepState
from cdlm.halting.signals import (
    DIVERGENCES,
    RECORDED,
    SIGNALS,
    SPATIAL,
    Past,
    StepStatistics,
    Where,
    check_signals,
    first_past,
    observe,
)
from cdlm.masked.model import Cache, CachedModel, LayeredModel, MaskedModel
from cdlm.masked.published import Quirks
from cdlm.masked.sparse import Blocks, SparseAttention, SparseD, parse_sparse
from cdlm.models.activations import Watch
from cdlm.policies import parse_policy
from cdlm.policies.llada import LLaDA
from cdlm.policies.policy import Choice, Plan, Policy, View, enter, plan_of
from cdlm.sampling.loop import Loop, RunOptions
from cdlm.sampling.prompts import encode_prompt, text_of_prompt
from cdlm.sampling.requests import Asked, Request, canvases, stack_masks
from cdlm.sampling.session import Model, Sampling

CacheKind = Literal["prefix", "dual", "free"]
"""How keys and values are kept, see `Unmasking`."""
FREE_BLOCK = 32
"""Positions between two places up to which a free cache keeps what is decided, of a policy without blocks."""


@dataclass(frozen=True)
class UnmaskingSettings:
    """Sampling of masked models, as in the model's paper unless given.

    Args:
        policy: LLaDA(64, block=32), Gaussian(64), Dream(64), DreamThreshold(64, 0.9), Threshold(0.9, block=32),
            Factor(1.0), KLASS(), Mutual(), EntropyBound(0.01), CORE(64), Editing(), Adjust(path, 4) or
            Guided("FOLDER"), where a causal model says what to commit.
        temperature: of what is drawn, by autoregressive models too; 0 takes the likeliest token.
        cfg_scale: classifier-free guidance; 0 is off, others double the calls.
        cache: keep keys and values (of LLaDA and Dream): prefix and dual while a block is decoded, free of what is
            decided.
        sparse: attention of later steps to some blocks of keys alone, SparseD(0.2, 0.3, block=128).
    """

    policy: str | Policy | None = None
    temperature: float | None = None
    cfg_scale: float | None = None
    cache: CacheKind | None = None
    sparse: str | SparseD | None = None


@dataclass(frozen=True)
class Unmasking(Sampling):
    """How a masked model is sampled.

    Args:
        policy: which positions to commit at a step.
        temperature: of the proposals, >= 0; 0 takes the likeliest token.
        cfg_scale: classifier-free guidance, logits = free + (cfg_scale + 1) (given - free), where the free call does
            not see what was given; 0 is off, others cost a second call a step.
        cache: "prefix" recomputes a block and what follows it, "dual" the block alone, against the keys and values of a
            whole call when the block was entered; criteria then look at those whole calls alone. "free" makes one whole
            call, and then recomputes what follows the last block that is decided: keys and values of a token are kept
            once they have been computed of it (FreeCache, arXiv 2505.21467). Criteria look at every call, if they read
            open positions alone.
        sparse: after some steps, attention to the blocks of keys alone that mattered in an early one. For models that
            attend through torch's scaled_dot_product_attention: our own, LLaDA and Dream. Further calls that a policy
            makes within a step stay full.
        quirks: see there.
    """

    family = "masked"
    flat = UnmaskingSettings
    signals = frozenset(SIGNALS) - SPATIAL
    recorded = frozenset({"tokens", *RECORDED}) - SPATIAL
    watches = True

    policy: Policy = field(default_factory=LLaDA)
    temperature: float = 0.0
    cfg_scale: float = 0.0
    cache: CacheKind | None = None
    sparse: SparseD | None = None
    quirks: Quirks = field(default_factory=Quirks)

    def __post_init__(self) -> None:
        check_object("Unmasking", Policy, policy=self.policy)
        check_object("Unmasking", Quirks, quirks=self.quirks)
        off = "0 switches it off"
        check_number("Unmasking", least=0.0, temperature=self.temperature, cfg_scale=self.cfg_scale, hint=off)
        if self.sparse is not None:
            check_object("Unmasking", SparseD, sparse=self.sparse)
        if self.cache is not None:
            self._check_cache()

    def _check_cache(self) -> None:
        if not isinstance(self.cache, str) or self.cache not in get_args(CacheKind):
            raise CdlmError(f"cache must be prefix, dual, free or None, got {shown(self.cache)}")
        if not self.policy.tokenwise:
            raise CdlmError(f"{self.policy!r} reads whole rows at every step: decode without a cache")
        if self.sparse is not None:
            raise CdlmError("sparse attention measures whole rows, and a cache calls parts of them: leave out one")
        if self.cfg_scale > 0:
            raise CdlmError("guidance needs two calls of whole rows a step: leave out the cache, or cfg_scale")
        if self.cache == "free" and (self.quirks.first_from_full or self.quirks.extra_call):
            raise CdlmError("first_from_full and extra_call are of Fast-dLLM's caches: take prefix or dual")

    @property
    def unrecorded(self) -> tuple[str, str] | None:
        return ("takes commits back", f"choose another policy than {self.policy!r}") if self.policy.revises else None

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "policy": repr(self.policy),
            "temperature": float(self.temperature),
            "cfg_scale": float(self.cfg_scale),
            "cache": str(self.cache),
            **({} if self.sparse is None else {"sparse": repr(self.sparse)}),
            **({} if self.quirks == Quirks() else {"quirks": repr(self.quirks)}),
        }

    def with_flat(self, **settings: Any) -> Unmasking:
        given = {name: value for name, value in settings.items() if value is not None}
        steps = given.pop("steps", None)
        if "policy" in given:
            if steps is not None:
                raise CdlmError(f"a policy has its own steps: write them in {given['policy']}, or leave out the policy")
            given["policy"] = parse_policy(given["policy"])
        if "sparse" in given:
            given["sparse"] = parse_sparse(given["sparse"])
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
        if asked.length is not None:
            raise CdlmError("new_tokens is the number of positions after each prompt: give it, and no length beside it")
        if new is None:
            raise CdlmError("chat needs new_tokens, the number of positions after each prompt: give it")
        prompts, tokenizer = asked.prompts or [""], model.need_tokenizer()
        how = {"chat": asked.chat, "template": asked.template, "names": model.reads_names}
        rows = [encode_prompt(tokenizer, prompt, **how) for prompt in prompts]
        if asked.new_tokens is None and any(None in row for row in rows):  # these say what is to be generated
            if not all(None in row for row in rows):
                raise CdlmError("some prompts have holes, others none: give new_tokens, the positions after each")
            new = 0
        longest = new + max(map(len, rows))
        if not model.whole_rows and 0 < model.length < longest:
            raise CdlmError(
                f"the longest prompt and its {new} new tokens are {longest} positions, and {model.name} was made for"
                f" {model.length}: take fewer new_tokens, or a shorter prompt"
            )
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


class Scope(Enum):
    """The positions of a row that a step of whole rows needs logits of."""

    CANDIDATES = "what the policy chooses from"
    OPEN = "what is open"
    TARGET = "what is generated"
    ALL = "every position"


OF_EACH = frozenset({"top1", "top2", "logsumexp", "confidence", "entropy", "span_margin"})
"""Signals that say something of every position that is generated, decided or not."""


def scope_of(needs: frozenset[str], halts: bool, keeps: bool = True, revises: bool = False) -> Scope:
    """What the signals that are read need.

    Args:
        halts: a rule may halt a row, whose open positions are then all filled.
        keeps: what is given stays; if not, a prompt may have open positions too.
        revises: the policy looks at what it has committed.
    """
    if "logits" in needs:
        return Scope.ALL
    if revises or not needs.isdisjoint(OF_EACH):
        return Scope.TARGET if keeps else Scope.ALL
    return Scope.OPEN if halts or needs else Scope.CANDIDATES


@dataclass(frozen=True, eq=False)
class Known(Columns):
    """What the host knows of each row before its next step, so that nothing has to be read in the midst of it."""

    row: list[int]
    step: list[int]
    nfe: list[int]
    settled: list[int]
    """Calls after which the text up to its first end was decided; 0 while it is not."""
    budget: list[int]
    largest: list[int]
    """Largest token of the prompt."""
    size: list[int]
    """Positions that are generated."""
    steps: list[int]
    """Steps of each block; -1 if it ends when it is full."""
    open: list[int]
    """Positions that are masked."""
    due: list[int]
    """Those of them in the block that is decoded, and in earlier ones."""
    own: list[int]
    """Those in the block itself."""
    inner: list[int]
    """Steps spent in the block."""
    again: list[int]
    """Whether the policy wants another step in it, be it full or not."""
    more: list[int]
    """Whether another block follows."""
    called: list[int]
    """Positions that a call with a cache computes anew, times 2, and 1 more if nothing stands before them."""
    whole: list[int]
    """Whether the next call is of the whole row: all are without a cache, else those that enter a block, and with a
    free cache those that enter the batch."""
    holes: list[int]
    """With a cache, whether there are holes in the prompt that are open."""

    @property
    def shape(self) -> list[int]:
        """Rows with the same number can be called together."""
        return [0 if whole else called for whole, called in zip(self.whole, self.called, strict=True)]

    @property
    def last(self) -> list[bool]:
        """Whether a row is at its last step."""
        return [step == budget - 1 for step, budget in zip(self.step, self.budget, strict=True)]


class UnmaskingRows(NamedTuple):
    """Everything with a row axis that lives from one step to the next."""

    row: Int[Tensor, " b"]
    step: Int[Tensor, " b"]
    budget: Int[Tensor, " b"]
    nfe: Int[Tensor, " b"]
    tokens: Int[Tensor, "b n"]
    """The canvas: the mask where a position is open."""
    open: Bool[Tensor, "b n"]
    reach: Bool[Tensor, "b n"]
    """Positions of the block that is decoded, and those before it."""
    due: Bool[Tensor, "b n"]
    """Those of them that are open."""
    target: Bool[Tensor, "b n"]
    """Positions that are generated."""
    share: Float[Tensor, " b"]
    """Of them, the share that is open."""
    size: Float[Tensor, " b"]
    """How many are generated."""
    ending: Bool[Tensor, "b n"]
    """Positions behind all that is given: a stop token there ends the text."""
    place: Int[Tensor, "b n"]
    """Of each position in its row, not counting padding before it."""
    valid: Bool[Tensor, "b n"] | None
    plan: Plan
    past: Past
    memory: Any
    known: Known
    counted: Mapping[str, Int[Tensor, " b"]]
    """What the policy has counted of each row."""
    cache: Cache = None
    kept: Int[Tensor, " b"] | None = None
    """Of a free cache, the place from which the next call computes anew."""
    blocks: Blocks | None = None
    """Of sparse attention."""


class UnmaskingLoop(Loop[UnmaskingRows]):
    """One run of a masked model.

    Row i is the same in any batch, order or batch size (bit for bit where the model's arithmetic is), and until it
    halts a row is what it is without a rule. No step writes over a token that is decided, nor over what was given.

    Logits are asked for, and statistics made, of those positions alone that this step can decide or a signal reads, see
    `Scope`. A step reads from the device once, at its end.

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
        if options.record and (why := sampling.unrecorded):
            raise CdlmError(f"a run that {why[0]} cannot be recorded: {why[1]}")
        if sampling.policy.revises and options.criterion.freezes:
            raise CdlmError(
                f"{sampling.policy!r} takes back what it has committed, and {options.criterion!r} freezes tokens for"
                " good: take one of the two"
            )
        sampling.policy.check_model(model)
        if sampling.cache is not None and options.modules:
            raise CdlmError("a rule of activations needs calls of whole rows at every step: leave out the cache")
        self.watch = Watch(model.modules_named(options.modules))
        self.model, self.sampling, self.refiner = model, sampling, sampling.policy.refiner(model)
        if self.refiner is not None and sampling.cfg_scale > 0:
            raise CdlmError(f"{sampling.policy!r} reads a layer that knows no guidance: leave out cfg_scale")
        self.noise = PositionNoise(options.seed) if noise is None else noise
        self.needs = options.needs | (sampling.policy.needs & DIVERGENCES)
        """Signals of a step: those that are read, and those whose past the policy needs."""
        self.scope = scope_of(self.needs, self.options.halts, sampling.policy.keeps, sampling.policy.revises)
        self.free = sampling.cache == "free"
        if self.free and self.scope in (Scope.TARGET, Scope.ALL):
            raise CdlmError(
                f"{options.criterion!r} reads positions that are decided, and a free cache does not compute them again:"
                " take another cache, or a rule that reads open positions"
            )
        mask = () if sampling.quirks.propose_mask else (model.constants.mask_id,)
        suppressed = (*mask, *sampling.policy.suppressed(model.constants))
        self.suppressed = torch.tensor(suppressed, device=self.device) if suppressed else None
        self.ends = torch.tensor(model.end_ids, dtype=torch.int64, device=self.device)

    def budget(self, requests: Sequence[Request]) -> int:
        return max(int(self.admit([request], None).budget) for request in requests)

    @torch.no_grad()
    def admit(self, requests: list[Request], beside: UnmaskingRows | None) -> UnmaskingRows:
        sampling, criterion = self.sampling, self.options.criterion
        tokens, given, valid = self._canvas(requests)
        open_, real = ~given, torch.ones_like(given) if valid is None else valid
        place = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        begin = torch.tensor([-1 if r.start is None else r.start for r in requests], device=self.device)
        start = torch.where(begin < 0, open_.long().argmax(1), begin)
        end = torch.where(real, place + 1, 0).amax(1)
        for length in sorted(set((end - start).tolist())):
            sampling.policy.check(length, self.model.constants)
        plan = plan_of(sampling.policy, open_, start, end, tokens)
        plan = enter(sampling.policy, plan, open_, criterion.waits)
        if criterion.waits and self.options.record >= sampling.recorded:
            self._check_replay(plan, open_)
        budget = sampling.policy.budget(open_.sum(1), plan.last + 1)
        if sampling.quirks.extra_call and plan.steps is None:
            budget = budget + plan.last + 1
        index = torch.tensor([request.index for request in requests], device=self.device)
        zero = torch.zeros_like(index)
        # What is given after a hole belongs to the text.
        ending = place > torch.where(given & real, place, -1).amax(1, keepdim=True)
        reach = plan.block_of <= plan.block[:, None]
        size = open_.sum(1)
        most, largest, sizes = read_columns(budget, tokens.masked_fill(open_, 0).amax(1), size)
        due, own, inner, more, called, each = self._of_the_block(plan, open_)
        rows, none, all_ = [request.index for request in requests], [0] * len(requests), [1] * len(requests)
        known = Known(
            row=rows, step=none, nfe=none, settled=none, budget=most, largest=largest, size=sizes, steps=each,
            open=sizes, due=due, own=own, inner=inner, again=none, more=more, called=called, whole=all_, holes=all_,
        )  # fmt: skip
        beside_past = None if beside is None else beside.past
        past = first_past(self.needs, tokens[..., None].float(), beside_past, ragged=True)
        memory = criterion.start(NewRows(open_, budget, real))
        cache = None if beside is None else blank(beside.cache, len(index))
        count = size.to(fine(self.device))
        blocks = None
        if sampling.sparse is not None:
            blocks = sampling.sparse.lay_out(real, start, end, most, None if beside is None else beside.blocks)
        return UnmaskingRows(
            index, zero, budget, zero, tokens, open_, reach, open_ & reach, open_, count / count, count, ending,
            place - real.long().argmax(1, keepdim=True), valid, plan, past, memory, known,
            dict.fromkeys(self._counts, zero), cache, zero if self.free else None,
            blocks,
        )  # fmt: skip

    def _of_the_block(self, plan: Plan, open_: Bool[Tensor, "b n"]) -> list[list[int]]:
        """What the host has to know of rows that have entered a block: `due`, `own`, `inner`, `more`, `called` and
        `steps`."""
        block_of, block = plan.block_of, plan.block[:, None]
        own = block_of == block
        called = self._called(plan).sum(1)
        first = (block_of >= block).all(1)
        return read_columns(
            (open_ & (block_of <= block)).sum(1), (open_ & own).sum(1), plan.inner, plan.block < plan.last,
            2 * called + first, torch.full_like(called, -1) if plan.steps is None else plan.steps,
        )  # fmt: skip

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
        policy = self.sampling.policy
        for block in range(int(plan.last.max())):
            steps = policy.steps_of(plan, torch.full_like(plan.block, block))
            if steps is None:
                return
            masks = (open_ & (plan.block_of == block)).sum(1)
            if bool((policy.idles(masks, steps, block) & (plan.last > block)).any()):
                raise CdlmError(
                    f"{self.sampling.policy!r} takes steps for a block that is full, and idle steps cannot be"
                    " replayed: record with the rule Full(), or take fewer steps"
                )

    def choose(self, live: UnmaskingRows) -> Int[Tensor, " k"] | None:
        if self.sampling.cache is None:
            return None
        # Rows whose calls have the same shape go together, the largest such group first.
        shape = live.known.shape
        largest = Counter(shape).most_common(1)[0][0]
        return torch.tensor([row for row, its in enumerate(shape) if its == largest])

    @torch.no_grad()
    def step(self, live: UnmaskingRows) -> tuple[LoopStep, UnmaskingRows]:
        called_whole = all(live.known.whole)
        whole = called_whole or self.free  # all that is open is computed
        where = self._wanted(live, whole)
        attention = self._attention(live)
        with self.watch.kept(len(live.row)) as activations, attention or nullcontext():
            logits, cache, hidden = self._whole(live, where) if called_whole else (*self._part(live, where), None)
        if attention is not None:
            live = live._replace(blocks=attention.after())
        if self.suppressed is not None:
            logits.index_fill_(-1, self.suppressed, -torch.inf)
        statistics = self._glance(live, logits, where, whole)
        live = live._replace(nfe=live.nfe + self.sampling.calls, cache=cache)
        decision, signals = None, {}
        if whole:
            signals, past = observe(self.needs, statistics)
            live = live._replace(past=past)
        block = live.plan.block_of == live.plan.block[:, None]
        state = StepState(
            live.row, live.step, live.budget, live.share, live.nfe, live.open, signals, block, activations
        )
        if whole and self.options.halts:
            memory, decision = self.options.criterion.look(live.memory, state)
            live = live._replace(memory=memory)
        choice = self._propose(live, statistics, whole, hidden)
        after = self._write(live, statistics, decision, choice)
        return self._finish(live, after, statistics, state, decision, choice)

    def advance(self, carried: UnmaskingRows) -> UnmaskingRows:
        """Rows whose block is done go on to their next one. The host knows whether there are any."""
        policy, plan, open_, known = self.sampling.policy, carried.plan, carried.open, carried.known
        moves = self._moves(known)
        if any(moves):
            moved = enter(policy, plan, open_, self.options.criterion.waits)
            plan = _where(plan.inner >= 2, moved, plan) if self.sampling.quirks.extra_call else moved
            reach = plan.block_of <= plan.block[:, None]
            names = ("due", "own", "inner", "more", "called", "steps")
            entered = dict(zip(names, self._of_the_block(plan, open_), strict=True))
            known = replace(known, **(entered | {"called": known.called} if self.free else entered))
            carried = carried._replace(plan=plan, reach=reach, due=open_ & reach)
        if self.sampling.cache is None:
            return carried._replace(known=known)
        if self.free:
            return carried._replace(known=replace(known, whole=[0] * len(moves)))
        # Holes in the prompt lie outside every block, so that only whole calls see them.
        whole = [int(moved or hole) for moved, hole in zip(moves, known.holes, strict=True)]
        return carried._replace(known=replace(known, whole=whole))

    def _moves(self, known: Known) -> list[bool]:
        """Rows that leave their block, as `enter` would find on the device."""
        waits, least = self.options.criterion.waits, 2 if self.sampling.quirks.extra_call else 0
        return [
            bool(more)
            and inner >= least
            and ((due == 0 and not again and not (waits and steps >= 0)) or 0 <= steps <= inner)
            for due, inner, again, steps, more in zip(
                known.due, known.inner, known.again, known.steps, known.more, strict=True
            )
        ]

    def _attention(self, live: UnmaskingRows) -> SparseAttention | None:
        """How this step attends, if not to everything."""
        sparse = self.sampling.sparse
        if sparse is None or live.blocks is None:
            return None
        return SparseAttention(sparse, live.blocks, live.known.step, live.valid is not None, self.sampling.calls)

    def _wanted(self, live: UnmaskingRows, whole: bool) -> Where:
        """The positions that this step needs logits of."""
        known, scope = live.known, self.scope if whole else Scope.CANDIDATES
        shape = (len(live.row), live.open.shape[1])
        if scope is Scope.ALL:
            everything = torch.arange(live.open.numel(), device=self.device)
            return Where(everything, (shape[1],) * shape[0], shape, open=False)
        if scope is Scope.CANDIDATES:
            chosen, counts = self._candidates(live, whole), known.due if whole else known.own
        else:
            chosen, counts = (live.open, known.open) if scope is Scope.OPEN else (live.target, known.size)
        if scope is Scope.CANDIDATES and any(known.last):  # a last step fills what the policy leaves
            ending = torch.tensor(known.last, device=self.device)[:, None]
            chosen = torch.where(ending, live.open if whole else live.open & self._called(live.plan), chosen)
            (counts,) = read_columns(chosen.sum(1))
        return Where(places(chosen.flatten(), sum(counts)), tuple(counts), shape, open=scope is not Scope.TARGET)

    def _candidates(self, live: UnmaskingRows, whole: bool) -> Bool[Tensor, "b n"]:
        """What the policy chooses from: of a call with a cache, positions of the block alone."""
        return live.due if whole else live.open & (live.plan.block_of == live.plan.block[:, None])

    def _whole(
        self, live: UnmaskingRows, where: Where
    ) -> tuple[Float[Tensor, "k v"], Cache, Float[Tensor, "b n d"] | None]:
        """A call of whole rows; its hidden states where the policy has a layer that reads them."""
        tokens = live.tokens
        wanted = self._before(where.flat, tokens.shape[1])
        if self.sampling.cache is not None:
            assert isinstance(self.model, CachedModel)
            logits, cache = self.model.fill(tokens, live.valid, wanted)
            return self._checked(logits, wanted, live.known), cache, None
        if self.refiner is not None:
            assert isinstance(self.model, LayeredModel)
            hidden = self.model.hidden(tokens, live.valid)
            logits = self.model.read(hidden.flatten(0, 1)[wanted])
            return self._checked(logits, wanted, live.known), None, hidden
        return self._guided(tokens, live.valid, live.target, wanted, live.known), None, None

    def _guided(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None, target: Bool[Tensor, "b n"],
        wanted: Int[Tensor, " k"], known: Known,
    ) -> Float[Tensor, "k v"]:  # fmt: skip
        if self.sampling.cfg_scale == 0:
            return self._checked(self.model.logits(tokens, valid, wanted), wanted, known)
        free = torch.where(target, tokens, self.model.constants.mask_id)
        valid = None if valid is None else torch.cat([valid, valid])
        wanted = torch.cat([wanted, wanted + tokens.numel()])
        both = self._checked(self.model.logits(torch.cat([tokens, free]), valid, wanted), wanted, known)
        given, free = both.chunk(2)
        return given.sub_(free).mul_(self.sampling.cfg_scale + 1).add_(free)

    def _again(
        self, live: UnmaskingRows, rows: Int[Tensor, " r"], tokens: Int[Tensor, "r n"], positions: Int[Tensor, " k"]
    ) -> Float[Tensor, "k v"]:
        """What a policy gets that calls the model again, see `Call`."""
        valid = None if live.valid is None else live.valid[rows]
        logits = self._guided(tokens, valid, live.target[rows], self._before(positions, tokens.shape[1]), live.known)
        return logits if self.suppressed is None else logits.index_fill_(-1, self.suppressed, -torch.inf)

    def _refined(
        self, live: UnmaskingRows, hidden: Float[Tensor, "b n d"], tokens: Int[Tensor, "b n"],
        positions: Int[Tensor, " k"],
    ) -> Float[Tensor, "k v"]:  # fmt: skip
        """What a policy gets that has a layer on top of the model, see `Refine`."""
        logits = self.refiner(hidden, tokens, live.valid, self._before(positions, tokens.shape[1]))
        return logits if self.suppressed is None else logits.index_fill_(-1, self.suppressed, -torch.inf)

    def _before(self, places: Int[Tensor, " k"], length: int) -> Int[Tensor, " k"]:
        """Where the network gives the logits of some places: of a shifted one at the place before, in its row."""
        return places - (places % length > 0).long() if self.model.constants.shift else places

    def _part(self, live: UnmaskingRows, where: Where) -> tuple[Float[Tensor, "k v"], Cache]:
        """A call of each row's block, or of what follows it too, against keys and values of earlier calls."""
        assert isinstance(self.model, CachedModel)
        width, first = divmod(live.known.called[0], 2)
        start = (live.plan.block_of < live.plan.block[:, None]).sum(1) if live.kept is None else live.kept
        slots = start[:, None] + torch.arange(width, device=self.device)
        length = live.tokens.shape[1]
        row = where.flat // length
        place = where.flat % length - start[row]
        if self.model.constants.shift:
            if self.sampling.quirks.first_from_full or first:
                place = (place - 1).clamp(min=0)
            else:  # the position before the block is what predicts its first one
                slots = torch.cat([slots[:, :1] - 1, slots], 1)
        wanted = row * slots.shape[1] + place
        logits = self.model.partial(live.tokens.gather(1, slots), slots, live.cache, live.valid, wanted)
        return self._checked(logits, wanted, live.known), live.cache

    def _boundary(self, called: UnmaskingRows) -> Int[Tensor, " b"]:
        """Where the next call begins with a free cache: all before was decided when these rows were called, so that its
        keys and values are those of its tokens."""
        open_, start = called.open, (called.plan.block_of < 0).sum(1)
        first = torch.where(open_.any(1), open_.long().argmax(1), open_.shape[1] - 1)
        size = self.sampling.policy.size or FREE_BLOCK
        blocks = torch.div(first - start, size, rounding_mode="floor")
        return (start + blocks * size).clamp(min=0)

    def _called(self, plan: Plan) -> Bool[Tensor, "b n"]:
        """Positions of the block, and with a prefix cache of what follows it."""
        block_of, block = plan.block_of, plan.block[:, None]
        return block_of >= block if self.sampling.cache == "prefix" else block_of == block

    def _checked(self, logits: Float[Tensor, "k v"], wanted: Int[Tensor, " k"], known: Known) -> Float[Tensor, "k v"]:
        constants = self.model.constants
        most = max(*known.largest, constants.mask_id, *constants.end_ids)
        if logits.ndim != 2 or len(logits) != len(wanted) or logits.shape[1] <= most:
            raise CdlmError(
                f"the model gave logits of shape {list(logits.shape)}, expected {len(wanted)} positions and a"
                f" vocabulary of at least {most + 1}: the tokens, or mask_id and the ends, are of another vocabulary"
            )
        return logits

    def _glance(self, live: UnmaskingRows, logits: Float[Tensor, "k v"], where: Where, whole: bool) -> StepStatistics:
        needs = self.sampling.policy.needs | (self.needs if whole else frozenset())
        past = live.past if whole else Past(None, None, None)
        if whole and self.scope is Scope.ALL:  # a rule reads the logits of whole rows
            logits = logits.unflatten(0, where.shape)
        return StepStatistics(logits, live.open, live.target, live.step, past, needs, held=live.tokens, where=where)

    def _propose(
        self, live: UnmaskingRows, statistics: StepStatistics, whole: bool, hidden: Float[Tensor, "b n d"] | None
    ) -> Choice:
        sampling, plan = self.sampling, live.plan
        if whole and sampling.cache is not None and sampling.quirks.first_from_full:
            start = (plan.block_of < plan.block[:, None]).sum(1, keepdim=True)
            place = torch.arange(live.tokens.shape[1], device=self.device)
            return Choice(place == start, statistics.tokens, plan.own)
        # Of a schedule the clock is its own, so that steps that are skipped change nothing that is drawn.
        clock = live.step if plan.steps is None else plan.block * plan.steps + plan.inner
        refine = None if hidden is None else partial(self._refined, live, hidden)
        view = View(
            statistics, self._candidates(live, whole), live.row, clock, plan, live.share, sampling.temperature,
            self.model.constants, self.noise, live.place, sum(live.known.due if whole else live.known.own),
            partial(self._again, live), refine, live.known.inner, live.known.steps,
            live.ending if self.model.end_ids else None,
        )  # fmt: skip
        return sampling.policy.choose(view)

    def _write(
        self, live: UnmaskingRows, statistics: StepStatistics, decision: Decision | None, choice: Choice
    ) -> UnmaskingRows:
        """Commit what the policy chose and the criterion froze; fill rows that halt, and those at their last step."""
        quirks, mask_id = self.sampling.quirks, self.model.constants.mask_id
        if self.sampling.policy.revises:
            choice = _within_bounds(live, decision, choice)
        tokens = live.tokens if choice.reopen is None else live.tokens.masked_fill(choice.reopen, mask_id)
        tokens = torch.where(choice.commit, choice.tokens, tokens)
        if decision is not None and decision.freeze is not None:
            tokens = torch.where(decision.freeze & live.open, statistics.tokens, tokens)
        if decision is not None:
            fill = choice.tokens if quirks.noisy_fill else statistics.tokens
            tokens = torch.where(decision.halt[:, None] & live.open, fill, tokens)
        if any(live.known.last) and not quirks.leave_masks:
            last = torch.tensor(live.known.last, device=self.device)[:, None]
            tokens = torch.where(last & (tokens == mask_id), statistics.tokens, tokens)
        again = live.plan.again if choice.again is None else choice.again
        plan = live.plan._replace(inner=live.plan.inner + 1, own=choice.own, again=again)
        open_ = tokens == mask_id
        return live._replace(tokens=tokens, open=open_, due=open_ & live.reach, plan=plan)

    def _finish(
        self, before: UnmaskingRows, live: UnmaskingRows, statistics: StepStatistics, state: StepState,
        decision: Decision | None, choice: Choice,
    ) -> tuple[LoopStep, UnmaskingRows]:  # fmt: skip
        """What the step says of its rows. Here it is read from the device how they are, all at once."""
        known, open_ = live.known, live.open.sum(1)
        broken = statistics.peaks.isnan()
        if statistics.where is None or not statistics.where.open:
            broken = broken & statistics.pick(statistics.open)[:, None]
        before_end = (torch.isin(live.tokens, self.ends) & live.ending).cumsum(1) == 0
        waiting = (live.open & before_end).any(1)
        columns = {"open": open_, "due": live.due.sum(1), "waiting": waiting, "nan": broken.any().expand_as(waiting)}
        if decision is not None:
            columns["halted"] = decision.halt
        if choice.again is not None:
            columns["again"] = choice.again
        more = dict(choice.counted)
        if self.sampling.policy.revises:
            more["revised"] = columns["revised"] = ((live.tokens != before.tokens) & ~before.open).sum(1)
        if self.free:
            columns["kept"] = self._boundary(before)
            live = live._replace(kept=columns["kept"])
        elif self.sampling.cache is not None:
            columns["own"] = self._candidates(live, whole=False).sum(1)
            columns["holes"] = (live.open & (live.plan.block_of < 0)).any(1)
        read = dict(zip(columns, read_columns(*columns.values()), strict=True))
        if any(read["nan"]):
            raise CdlmError("the model gave logits that are not numbers (NaN): its weights or its precision are broken")
        nfe = [spent + calls for spent, calls in zip(known.nfe, self._calls(known, choice), strict=True)]
        if choice.calls is not None:
            live = live._replace(nfe=torch.tensor(nfe, device=self.device))
        revised = read.get("revised", [0] * len(nfe))
        settled = [
            (0 if wait else now) if changed or not old else old
            for old, wait, changed, now in zip(known.settled, read["waiting"], revised, nfe, strict=True)
        ]
        last = known.last
        known = replace(
            known, step=[step + 1 for step in known.step], inner=[inner + 1 for inner in known.inner], nfe=nfe,
            settled=settled, open=read["open"], due=read["due"], own=read.get("own", read["due"]),
            again=read.get("again", known.again), holes=read.get("holes", known.holes),
            called=[2 * (live.open.shape[1] - at) + (not at) for at in read.get("kept", [])] or known.called,
        )  # fmt: skip
        halts = read.get("halted", [0] * len(nfe))
        full = [not halt and self._full(known, row) for row, halt in enumerate(halts)]
        done = [any(reasons) for reasons in zip(halts, full, last, strict=True)]
        counts = RowCounts.of(known.row, known.step, nfe, done, halts, full, settled)
        counted = {name: total + more[name] if name in more else total for name, total in live.counted.items()}
        finished = LoopStep(
            state, counts, counts.leave(live.tokens), {} if decision is None else decision.info, live.tokens, counted
        )
        return finished, live._replace(step=live.step + 1, share=open_ / live.size, known=known, counted=counted)

    @property
    def _counts(self) -> tuple[str, ...]:
        """Names of what is counted of each row."""
        return ("revised",) * self.sampling.policy.revises + self.sampling.policy.counts

    def _calls(self, known: Known, choice: Choice) -> list[int]:
        """Calls that this step has spent on each row, with those that the policy made."""
        own = self.sampling.calls
        return [own * (1 + more) for more in choice.calls or [0] * len(known.row)]

    def _full(self, known: Known, row: int) -> bool:
        """Whether a row ends because nothing in it is open, and no steps of a schedule have to be taken."""
        waits = self.options.criterion.waits and known.steps[row] >= 0
        done = known.open[row] == 0 and not known.again[row]
        return done and not waits and known.inner[row] >= (2 if self.sampling.quirks.extra_call else 0)


def _within_bounds(live: UnmaskingRows, decision: Decision | None, choice: Choice) -> Choice:
    """What a policy that revises may do: nothing to what was given, nor to what is decided in a row that halts."""
    may = live.target if decision is None else live.target & ~decision.halt[:, None]
    reopen = None if choice.reopen is None else choice.reopen & may & ~choice.commit
    return choice._replace(commit=choice.commit & (may | live.open), reopen=reopen)


def _where(condition: Bool[Tensor, " b"], first: Plan, second: Plan) -> Plan:
    """Rows of the first plan, or of the second."""
    names = ("block", "inner", "masks", *(() if first.steps is None else ("steps",)))
    blocks = (torch.where(condition, getattr(first, n), getattr(second, n)) for n in names)
    return first._replace(**dict(zip(names, blocks, strict=True)))
