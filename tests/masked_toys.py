"""Masked models small enough to be exact: sums of multiples of a power of two, the same in any order and batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from setups import Setup
from torch import Tensor, nn

from cdlm.masked.model import Cache, CachedModel, Constants, LayeredModel, MaskedModel, Refiner, at_positions
from cdlm.masked.sampler import UnmaskingLoop
from cdlm.sampling.requests import Request

VOCAB, MASK, EOS, EOT = 12, 11, 1, 2
PLAIN, SHIFTED = Constants(MASK, EOS, EOT), Constants(MASK, EOS, EOT, shift=True)
PLACES, REACH = 16, 2


class Toy(CachedModel, LayeredModel):
    """Logits of a position: what its place likes, and what each of its neighbours likes to have beside it.

    A key is a token and nothing else, so decoding with a cache is exact. Its hidden states are its logits.

    Args:
        sway: of the neighbours; 0 makes positions independent.
    """

    def __init__(self, constants: Constants = PLAIN, seed: int = 0, sway: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        self.likes = _dyadic(2.0, PLACES, VOCAB, generator=generator)
        self.beside = _dyadic(1.5 * sway, 2 * REACH + 1, VOCAB, VOCAB, generator=generator)
        self.constants, self.calls, self.rows = constants, 0, 0

    def logits(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        self.calls, self.rows = self.calls + 1, self.rows + len(tokens)
        return at_positions(self._said(tokens, valid), tokens, positions)

    def _said(self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n v"]:
        real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        place = (real.cumsum(1) - 1).clamp(min=0) % PLACES  # of real tokens: padding moves nothing
        out, n = self.likes[place], tokens.shape[1]
        for offset in range(-REACH, REACH + 1):
            there = torch.arange(n) + offset
            inside = ((there >= 0) & (there < n)) & real[:, there.clamp(0, n - 1)]
            out = out + self.beside[offset + REACH][tokens[:, there.clamp(0, n - 1)]] * inside[..., None]
        return out

    def fill(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> tuple[Float[Tensor, "*s v"], Cache]:  # fmt: skip
        return self.logits(tokens, valid, positions), (tokens.clone(),)

    def partial(
        self,
        tokens: Int[Tensor, "b q"],
        slots: Int[Tensor, "b q"],
        cache: Cache,
        valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:
        whole = self.logits(cache[0].scatter_(1, slots, tokens), valid)
        return at_positions(whole.gather(1, slots[..., None].expand(-1, -1, whole.shape[-1])), slots, positions)

    def refiner(self, folder: Path) -> Refiner:
        """A layer that goes half of the way to what a call would say now."""

        def refine(hidden: Tensor, tokens: Tensor, valid: Tensor | None, positions: Tensor) -> Tensor:
            return ((hidden + self._said(tokens, valid)) / 2).flatten(0, 1)[positions]

        return refine

    def hidden(self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        return self.logits(tokens, valid)

    def read(self, hidden: Float[Tensor, "k d"]) -> Float[Tensor, "k v"]:
        return hidden

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n e"]:
        return nn.functional.one_hot(tokens, VOCAB).double()

    def last_block(self) -> nn.Module:
        return nn.Identity()

    def through(
        self, block: nn.Module, hidden: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n d"]:
        return block(hidden)


class Bag:
    """A guide that expects what goes with all tokens so far, and with the last one; exact in any batch."""

    def __init__(self, seed: int = 0, size: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randint(-(2**12), 2**12, (2, VOCAB, VOCAB), generator=generator).double() / 2**12
        self.table, self.calls, self.rows = draw * torch.tensor([0.25, 2.0])[:, None, None] * size, 0, 0
        self.seed = seed

    def __repr__(self) -> str:
        return f"Bag({self.seed})"

    def __call__(self, tokens: Int[Tensor, "b n"], positions: Int[Tensor, " k"]) -> Float[Tensor, "k v"]:
        self.calls, self.rows = self.calls + 1, self.rows + len(tokens)
        assert int(tokens.max()) < MASK, "a guide sees no mask"
        return (self.table[0][tokens].cumsum(1) + self.table[1][tokens]).flatten(0, 1)[positions]


@dataclass(eq=False)
class Scripted(MaskedModel):
    """Logits that are a function of the tokens alone."""

    script: Callable[[Tensor], Tensor]
    constants: Constants = PLAIN

    def logits(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        return at_positions(self.script(tokens), tokens, positions)


def _dyadic(size: float, *shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**16), 2**16 + 1, shape, generator=generator).double() * size / 2**16


def confident(p: Sequence[float], vocab: int = VOCAB) -> Tensor:
    """Logits of positions whose likeliest token, 3, has these probabilities; the others share the rest evenly."""
    chance = torch.tensor(p, dtype=torch.float64)[:, None]
    rest = ((1 - chance) / (vocab - 2)).expand(-1, vocab).clone()
    rest[:, 3:4] = chance
    rest[:, MASK] = 0.0
    return rest.log()


class Row(NamedTuple):
    """All that happened to a row."""

    canvases: list[tuple[int, ...]]
    """After each of its steps; the last is what it leaves with."""
    nfe: int
    settled: int
    reason: str
    logits: list[Tensor]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.canvases[-1]

    @property
    def result(self) -> tuple[tuple[int, ...], int, int, str]:
        return self.tokens, self.nfe, self.settled, self.reason


def decoded(model: MaskedModel, decoder: Setup, requests: Sequence[Request], batch_size: int = 8) -> dict[int, Row]:
    """Every row, by its index. What holds of every run is checked of each: see `sound`."""
    rows: dict[int, Row] = {}
    served = model.rows if isinstance(model, Toy) else 0
    for finished in UnmaskingLoop(model, *decoder, batch_size).steps(requests):
        assert finished.canvas is not None
        state, leaving = finished.state, iter(finished.tokens.tolist())
        for i, index in enumerate(state.row.tolist()):
            before = rows.get(index, Row([], 0, 0, "", []))
            assert not before.reason, "a row that left came back"
            assert int(state.step[i]) == len(before.canvases) < int(state.budget[i])
            done, halted, full = (bool(what[i]) for what in (finished.done, finished.halted, finished.full))
            assert halted + full <= done
            canvas = tuple(finished.canvas[i].tolist())
            assert not done or canvas == tuple(next(leaving))
            reason = "halted" if halted else "full" if full else "budget" if done else ""
            seen = [*before.logits, *([state.logits[i]] if "logits" in state.signals else [])]
            calls, settled = finished.counts.nfe[i], finished.counts.settled[i]
            rows[index] = Row([*before.canvases, canvas], calls, settled, reason, seen)
        assert next(leaving, None) is None
    if isinstance(model, Toy):
        assert model.rows - served == sum(row.nfe for row in rows.values())
    for request in requests:
        sound(rows[request.index], request, decoder, model.constants)
    return rows


def sound(row: Row, request: Request, decoder: Setup, constants: Constants) -> None:
    """What is decided or given stays, nothing is left open, and calls are counted as they are made.

    Of a policy that revises what is given stays; its own calls are not those of its steps.
    """
    assert row.reason
    given, revises = request.given.tolist(), decoder.sampling.policy.revises
    valid = [True] * len(given) if request.valid is None else request.valid.tolist()
    before = [t if g else constants.mask_id for t, g in zip(request.tokens.tolist(), given, strict=True)]
    settled, told = 0, max((i for i, g in enumerate(given) if g and valid[i]), default=-1)
    for step, canvas in enumerate(row.canvases):
        assert all(
            old in (new, constants.mask_id) or (revises and not there)
            for old, new, there in zip(before, canvas, given, strict=True)
        )
        ends = [i for i, token in enumerate(canvas) if token in constants.end_ids and i > told]
        if not settled and constants.mask_id not in canvas[: min(ends, default=len(canvas))]:
            settled = (step + 1) * decoder.sampling.calls
        last = step == len(row.canvases) - 1
        assert row.reason != "full" or (constants.mask_id in canvas) == (not last) or (revises and not last)
        before = list(canvas)
    assert constants.mask_id not in row.tokens
    assert revises or (row.settled, row.nfe) == (settled, len(row.canvases) * decoder.sampling.calls)
