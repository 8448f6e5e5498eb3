"""Draw several tokens a call, each in the light of those before it (ADJUST)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import check_choice, check_object, check_whole
from cdlm.core.devices import places
from cdlm.core.errors import CdlmError
from cdlm.core.rng import ORDER
from cdlm.policies.policy import Choice, Policy, View, drawn, proposal
from cdlm.policies.quotas import best

PASS = 2**32
"""What a pass within a step adds to the number of the step where something is drawn."""


@dataclass(frozen=True)
class Adjust(Policy):
    """Commit `tokens` positions a call, one after the other: after each, a layer on top of the model says what it would
    say now (ADJUST, arXiv 2509.22738). `cdlm train-sampler` trains the layer.

    With `tokens=1` it is the sampler of one position a call. A pass of the layer is no call of the model: they are
    counted as `layer_passes`.

    Args:
        path: folder of the layer, which is for one model.
        tokens: positions a call, >= 1.
        block: positions of a block; by default one block.
        order: "confidence" commits the most confident proposal first, "random" draws the order.
    """

    path: str
    tokens: int = 4
    block: int | None = None
    order: Literal["confidence", "random"] = "confidence"

    counts = ("layer_passes",)

    def __post_init__(self) -> None:
        check_object("Adjust", str, path=self.path)
        check_whole("Adjust", tokens=self.tokens)
        check_whole("Adjust", optional=True, block=self.block)
        check_choice("Adjust", ("confidence", "random"), order=self.order)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        if "path" not in fixed:
            return super().sweep(**fixed)
        path = str(fixed.pop("path"))
        return [cls(path, tokens, **fixed) for tokens in (1, 2, 3, 4, 6, 8, 12, 16)]

    @property
    def masked_only(self) -> str:
        return "path"

    @property
    def tokenwise(self) -> bool:
        return False

    @property
    def draws(self) -> bool:
        return self.order == "random"

    def refiner(self, model: Any) -> Any:
        made = getattr(model, "refiner", None)
        if made is None:
            raise CdlmError(
                f"{self!r} needs a model whose last block is known, and {type(model).__name__} is a plain function: use"
                " one of our own, LLaDA or Dream"
            )
        return made(Path(self.path))

    def choose(self, view: View) -> Choice:
        assert view.refine is not None
        assert view.statistics.held is not None
        tokens, confidence = proposal(view)
        first = self._first(view, view.candidates, tokens, confidence)
        commit, found = first, torch.where(first, tokens, view.statistics.held)
        passes, broken = torch.zeros_like(view.row), torch.zeros_like(first.any())
        for number in range(1, self.tokens):
            later, left = self._later(view, number), view.candidates & ~commit
            at = places(left.flatten(), None)
            if not len(at):
                break
            fresh, chance = self._drawn(later, view.refine(found, at), at)
            tokens = tokens.flatten().index_copy(0, at, fresh).view_as(tokens)
            confidence = confidence.new_zeros(confidence.numel()).index_copy_(0, at, chance).view_as(confidence)
            broken = broken | chance.isnan().any()
            more = self._first(later, left, tokens, confidence)
            passes = passes + left.any(1)
            commit, found = commit | more, torch.where(more, tokens, found)
        if self.tokens > 1 and bool(broken):
            raise CdlmError(f"the layer in {self.path} gave logits that are not numbers (NaN): train it again")
        return Choice(commit, found, counted={"layer_passes": passes})

    def _later(self, view: View, number: int) -> View:
        """The view of a pass: what is drawn there is drawn anew."""
        return view._replace(step=view.step + number * PASS)

    def _first(
        self, view: View, candidates: Bool[Tensor, "b n"], tokens: Int[Tensor, "b n"], confidence: Float[Tensor, "b n"]
    ) -> Bool[Tensor, "b n"]:
        """The position of each row that is committed next."""
        score = view.draws.uniform(view.site, ORDER) if self.order == "random" else confidence
        return best(score, candidates, torch.ones_like(view.row))

    def _drawn(
        self, view: View, logits: Float[Tensor, "k v"], at: Int[Tensor, " k"]
    ) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
        """A token of each of these places, and its probability at temperature 1."""
        if view.temperature == 0:
            chance, tokens = logits.log_softmax(-1).max(-1)
            return tokens, chance.exp()
        width = view.candidates.shape[1]
        return drawn(view, logits, view.site_of(at // width, at % width))
