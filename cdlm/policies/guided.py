"""Commit what an autoregressive guide agrees with, from left to right (Guided Diffusion of FlashDLM)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import check_choice, check_number, check_whole, shown
from cdlm.core.devices import places, read_columns
from cdlm.core.errors import CdlmError
from cdlm.core.rng import Site
from cdlm.models.causal import Causal
from cdlm.policies.policy import Choice, Policy, View, proposal
from cdlm.sampling.session import Model

Guide = Callable[[Tensor, Tensor], Tensor]
"""(tokens [b n], places [k] in `tokens.flatten()`) -> logits [k v] of the token that follows each of these places, of
which later tokens change nothing."""
ACCEPT, INSTEAD = 0x6163, 0x696E
"""Purposes of what is drawn to accept a draft, and in place of one that was rejected."""
LIKELY, NUCLEUS = 0.05, 0.95
"""What `aggressive` accepts beside the first few tokens: a probability above one, and the nucleus of the other."""


@dataclass(frozen=True)
class Guided(Policy):
    """Commit the model's proposals from left to right, up to the first that an autoregressive guide rejects (Guided
    Diffusion, arXiv 2505.21467).

    A proposal for each masked position of the block is a draft. The guide reads the row with its drafts, `verify` of
    them a call, and each is accepted or rejected by what the guide expects there after all that stands to its left. A
    stop token that is committed behind all that is given ends the text, and what is left is filled with it. The guide's
    calls stand beside each sample as `guide_calls`; `nfe` are those of the model.

    Args:
        guide: folder of a causal language model of Hugging Face with the model's tokenizer, such as one of cdlm
            train-judge; or a function of tokens [b n] and places in `tokens.flatten()` that gives logits [k v] of what
            follows these places.
        mode: "assisted" commits a first draft that is rejected all the same, and no token of the guide;
            "speculative" commits the guide's own token where it rejects one.
        accept: which drafts: "deterministic", the guide's likeliest token; "topk", one of its `k` likeliest;
            "topk_relative", one of these with at least `rho` of the probability of the likeliest;
            "dynamic_threshold", a probability above `chance`; "aggressive", one of the `k` likeliest, a probability
            above 0.05, or the nucleus of 0.95; "original", at random with the guide's probability.
        k: by default 5, and 2 of topk_relative, as published.
        rho: in [0, 1].
        chance: in [0, 1].
        verify: most drafts of a call of the guide; a row whose draft was rejected is not read further.
        block: positions of a block; by default one block.
        ids: pairs of a token of the model and the one that is its like for the guide, such as the ends of texts of
            Dream and Qwen: ((151643, 151645), (151645, 151643)).
        digest: of the guide that it was set for; by default the one that is there.
    """

    counts = ("guide_calls",)

    guide: str | Guide
    mode: Literal["assisted", "speculative"] = "assisted"
    accept: Literal["deterministic", "topk", "topk_relative", "dynamic_threshold", "aggressive", "original"] = (
        "deterministic"
    )
    k: int | None = None
    rho: float = 0.5
    chance: float = 0.1
    verify: int = 32
    block: int | None = None
    ids: tuple[tuple[int, int], ...] = ()
    digest: str = ""

    def __post_init__(self) -> None:
        check_choice("Guided", ("assisted", "speculative"), mode=self.mode)
        check_choice("Guided", tuple(ACCEPTS), accept=self.accept)
        check_whole("Guided", optional=True, k=self.k, block=self.block)
        check_number("Guided", least=0.0, most=1.0, rho=self.rho, chance=self.chance)
        check_whole("Guided", verify=self.verify)
        if not all(len(pair) == 2 and min(pair) >= 0 for pair in self.ids):
            raise CdlmError(f"Guided needs ids to be pairs of tokens, such as ((3, 4), (4, 3)), got {shown(self.ids)}")
        self._open()

    def _open(self) -> None:
        """Read the guide, and note or check which one it is."""
        if isinstance(self.guide, str):
            object.__setattr__(self, "guide", Causal.load(self.guide))
        if not callable(self.guide) or isinstance(self.guide, type):
            raise CdlmError(f"Guided needs a guide, a folder or a function, got {shown(self.guide)}")
        found = self.guide.digest if isinstance(self.guide, Causal) else ""
        if self.digest not in ("", found):
            raise CdlmError(
                f"Guided was set for the guide {self.digest}, and {self.guide!r} has {found or 'no weights'}: take the"
                " guide that it was set for, or leave out the digest"
            )
        object.__setattr__(self, "digest", found)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        if "guide" not in fixed:
            return super().sweep(**fixed)
        tests: tuple[dict[str, Any], ...] = (
            {"accept": "deterministic"}, {"accept": "dynamic_threshold", "chance": 0.3},
            {"accept": "topk_relative"}, {"accept": "dynamic_threshold"}, {"accept": "topk"}, {"accept": "aggressive"},
        )  # fmt: skip
        return [cls(**fixed, **test) for test in tests]

    @property
    def masked_only(self) -> str:
        return "guide"

    @property
    def draws(self) -> bool:
        return self.accept == "original"

    def check_model(self, model: Model) -> None:
        if not isinstance(self.guide, Causal):
            return
        known = {one for one, _ in self.ids} | {model.mask_id}
        most = max((other for _, other in self.ids), default=0)
        if most >= self.guide.vocab:
            raise CdlmError(f"ids name token {most}, and the guide {self.guide!r} has {self.guide.vocab}")
        if model.tokenizer is not None:
            self._check_tokenizer(self.guide, model, known)

    def _check_tokenizer(self, guide: Causal, model: Model, mapped: set[int | None]) -> None:
        """Raise unless tokens of both are the same; further special tokens of either may be its own."""
        assert model.tokenizer is not None
        theirs = {token: text for text, token in guide.tokenizer.get_vocab().items()}
        special = model.tokenizer.added_tokens_decoder
        for text, token in sorted(model.tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
            if token in mapped or theirs.get(token) == text or (token in special and token not in theirs):
                continue
            there = f"is {shown(theirs[token])}" if token in theirs else "does not exist"
            raise CdlmError(
                f"the guide {guide!r} has another tokenizer than {model.name}: token {token} is {shown(text)} and"
                f" {there} in the guide; take a guide of the same vocabulary, or map single tokens by ids"
            )

    def start(self, tokens: Int[Tensor, "b n"], last: Int[Tensor, " b"]) -> Any:
        most = self.guide.length if isinstance(self.guide, Causal) else None
        if most is not None and tokens.shape[1] > most:
            raise CdlmError(
                f"rows have {tokens.shape[1]} positions, and the guide {self.guide!r} reads {most}: take fewer"
                " new_tokens, a shorter prompt, or a guide with a longer context"
            )
        return ()

    def choose(self, view: View) -> Choice:
        drafts, _ = proposal(view)
        ends = self._ends(view, drafts)
        behind = (ends & view.candidates).cumsum(1) - (ends & view.candidates).long() > 0
        asked = view.candidates & ~behind  # what follows an end is filled, accepted or not
        rank = asked.cumsum(1)
        verdict = self._read(view, drafts, asked, rank)
        stop = verdict.stop[:, None]
        if self.mode == "speculative":
            commit, tokens = asked & (rank <= stop), verdict.tokens
        else:
            commit, tokens = asked & ((rank < stop) | (rank == 1)), drafts
        over = (self._ends(view, tokens) & commit).long()
        after = (over.cumsum(1) - over > 0) & view.statistics.open
        end = tokens.gather(1, over.argmax(1, keepdim=True))
        return Choice(commit | after, torch.where(after, end, tokens), counted={"guide_calls": verdict.calls})

    def _ends(self, view: View, tokens: Int[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
        """Where tokens end the text."""
        if view.ending is None or view.constants is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return view.ending & torch.isin(tokens, torch.tensor(view.constants.end_ids, device=tokens.device))

    def _read(
        self, view: View, drafts: Int[Tensor, "b n"], asked: Bool[Tensor, "b n"], rank: Int[Tensor, "b n"]
    ) -> Verdict:
        """What the guide says of the drafts, which have ranks from 1 in their rows."""
        width = drafts.shape[1]
        text, shift = self._text(view, drafts, asked)
        tokens, stop = drafts.clone(), torch.full_like(view.row, width + 1)
        (counts,) = read_columns(asked.sum(1))
        calls, done = [0] * len(counts), 0
        going = [row for row, count in enumerate(counts) if count]
        while going:
            rows = torch.tensor(going, device=drafts.device)
            here = asked[rows] & (rank[rows] > done) & (rank[rows] <= done + self.verify)
            flat = places(here.flatten(), sum(min(self.verify, counts[row] - done) for row in going))
            at = At(rows, flat // width, flat % width)
            logits = self._logits(text[rows], at.nth, at.place - shift[at.row])
            draft = drafts[at.row, at.place]
            passes = ACCEPTS[self.accept](self, Seen(logits, self._theirs(draft), view, at))
            order = rank[at.row, at.place]
            first = stop[rows].scatter_reduce(0, at.nth, order.masked_fill(passes, width + 1), "amin")
            stop[rows] = first
            if self.mode == "speculative":
                refused = order == first[at.nth]
                some = at.of(refused.nonzero().squeeze(1))
                tokens[some.row, some.place] = self._instead(view, logits[refused], draft[refused], some)
            broken = logits.isnan().any().expand_as(first)
            halted, nan = read_columns(first <= width, broken)
            if any(nan):
                raise CdlmError("the guide gave logits that are not numbers (NaN): its weights are broken")
            for row in going:
                calls[row] += 1
            done += self.verify
            going = [row for row, out in zip(going, halted, strict=True) if not out and counts[row] > done]
        return Verdict(stop, tokens, torch.tensor(calls, device=drafts.device))

    def _text(
        self, view: View, drafts: Int[Tensor, "b n"], asked: Bool[Tensor, "b n"]
    ) -> tuple[Int[Tensor, "b m"], Int[Tensor, " b"]]:
        """Rows as the guide reads them, without padding before them, and where in them what precedes a position stands,
        counted back from it. Before a draft that nothing precedes it reads an end of text."""
        held, constants = view.statistics.held, view.constants
        assert held is not None
        assert constants is not None
        before = view.place < 0
        bare = (asked & (view.place == 0)).any(1)
        if constants.eos_id is None and bool(bare.any()):
            raise CdlmError(
                "a guide needs something to read before a position: give a prompt, or Constants with an eos_id"
            )
        begin = constants.eos_id or 0
        whole = torch.where(asked, drafts, held).masked_fill(before, begin)
        # What is open behind the drafts is read by nothing, and the mask need not be a token of the guide.
        whole = self._theirs(whole.masked_fill(whole == constants.mask_id, begin))
        first = self._theirs(torch.full_like(whole[:, :1], begin))
        skip = before.sum(1) - bare.long()
        column = torch.arange(whole.shape[1], device=whole.device) + skip[:, None] + 1
        return torch.cat([first, whole], 1).gather(1, column.clamp(max=whole.shape[1])), skip + 1

    def _theirs(self, tokens: Int[Tensor, "*s"]) -> Int[Tensor, "*s"]:
        """The guide's likes of tokens of the model."""
        found = tokens
        for own, other in self.ids:
            found = torch.where(tokens == own, other, found)
        return found

    def _logits(
        self, text: Int[Tensor, "b m"], row: Int[Tensor, " k"], place: Int[Tensor, " k"]
    ) -> Float[Tensor, "k v"]:
        """What the guide expects after some places of rows, read up to the last of them."""
        assert not isinstance(self.guide, str)
        width = int(place.max()) + 1
        known = self.guide.vocab if isinstance(self.guide, Causal) else None
        text = text[:, :width]
        if known is not None and int(text.max()) >= known:
            raise CdlmError(
                f"the guide {self.guide!r} has {known} tokens, and a row holds token {int(text.max())}: map it by ids"
            )
        logits = self.guide(text, row * width + place)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(place):
            got = list(logits.shape) if isinstance(logits, Tensor) else shown(logits)
            raise CdlmError(f"a guide gives logits [places, vocabulary], here [{len(place)}, vocabulary], got {got}")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _instead(self, view: View, logits: Float[Tensor, "k v"], draft: Int[Tensor, " k"], at: At) -> Int[Tensor, " k"]:
        """The guide's own tokens where it rejected drafts, as tokens of the model: the likeliest; or, where drafts are
        accepted at random, another one at random, which makes what is committed a draw of the guide."""
        assert view.constants is not None
        own = torch.arange(view.statistics.flat.shape[-1], device=logits.device)
        theirs = self._theirs(own)
        ours = logits[:, theirs.clamp(max=logits.shape[1] - 1)]
        ours = ours.masked_fill(theirs >= logits.shape[1], -math.inf)
        ours[:, view.constants.mask_id] = -math.inf
        if self.accept != "original":
            return ours.argmax(-1)
        return view.draws.token(at.site(view), ours.scatter(1, draft[:, None], -math.inf), 1.0, INSTEAD)

    @property
    def best(self) -> int:
        """How many of the likeliest tokens are accepted."""
        return self.k or (2 if self.accept == "topk_relative" else 5)


class Verdict(NamedTuple):
    """What a guide says of a step's drafts."""

    stop: Int[Tensor, " b"]
    """Rank of the first draft that it rejects; more than all if there is none."""
    tokens: Int[Tensor, "b n"]
    """The drafts; of a speculative guide its own token there."""
    calls: Int[Tensor, " b"]


class At(NamedTuple):
    """Some positions of some rows."""

    rows: Int[Tensor, " r"]
    nth: Int[Tensor, " k"]
    """Of each position, which of the rows."""
    place: Int[Tensor, " k"]

    @property
    def row(self) -> Int[Tensor, " k"]:
        return self.rows[self.nth]

    def of(self, some: Int[Tensor, " m"]) -> At:
        """Some of the positions."""
        return At(self.rows, self.nth[some], self.place[some])

    def site(self, view: View) -> Site:
        """As something is drawn for them."""
        return view.site_of(self.row, self.place)


class Seen(NamedTuple):
    """Drafts beside what a guide expects in their places."""

    logits: Float[Tensor, "k v"]
    tokens: Int[Tensor, " k"]
    """The drafts as tokens of the guide."""
    view: View
    at: At

    @property
    def own(self) -> Float[Tensor, "k 1"]:
        """The draft's logit; one that is no token of the guide is never expected."""
        there = self.tokens < self.logits.shape[1]
        own = self.logits.gather(1, self.tokens.clamp(max=self.logits.shape[1] - 1)[:, None])
        return own.masked_fill(~there[:, None], -math.inf)

    @property
    def chance(self) -> Float[Tensor, " k"]:
        """The draft's probability."""
        return (self.own.squeeze(1) - self.logits.logsumexp(-1)).exp()

    def among(self, k: int) -> Bool[Tensor, " k"]:
        """Whether fewer than k tokens are likelier."""
        own = self.own
        return ((self.logits > own).sum(-1) < k) & (own.squeeze(1) > -math.inf)

    @property
    def likelier(self) -> Float[Tensor, " k"]:
        """The probability of all tokens that are likelier."""
        return self.logits.softmax(-1).masked_fill(self.logits <= self.own, 0).sum(-1)


Accept = Callable[[Guided, Seen], Tensor]


def _topk(policy: Guided, seen: Seen) -> Bool[Tensor, " k"]:
    return seen.among(policy.best)


def _relative(policy: Guided, seen: Seen) -> Bool[Tensor, " k"]:
    ratio = (seen.own.squeeze(1) - seen.logits.amax(-1)).exp()
    return seen.among(policy.best) & (ratio >= policy.rho)


def _aggressive(policy: Guided, seen: Seen) -> Bool[Tensor, " k"]:
    nucleus = seen.likelier < NUCLEUS
    return seen.among(policy.best) | (seen.chance > LIKELY) | (nucleus & (seen.chance > 0))


def _original(policy: Guided, seen: Seen) -> Bool[Tensor, " k"]:
    return seen.view.draws.uniform(seen.at.site(seen.view), ACCEPT) < seen.chance


ACCEPTS: dict[str, Accept] = {
    "deterministic": lambda policy, seen: seen.among(1),
    "topk": _topk,
    "topk_relative": _relative,
    "dynamic_threshold": lambda policy, seen: seen.chance > policy.chance,
    "aggressive": _aggressive,
    "original": _original,
}
"""How drafts are accepted, by name."""
