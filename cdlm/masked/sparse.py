"""Attention of later steps to the blocks of keys that mattered in an early one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cdlm.core.checks import Settings, check_choice, check_number, check_whole, shown
from cdlm.core.devices import read_columns
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.parsing import Registry
from cdlm.core.trees import Columns, blank

Kernel = Literal["flex", "gather"]
GATHERED = 2**20
"""Numbers of keys that are copied at a time."""


@dataclass(frozen=True)
class SparseD(Settings):
    """Reused block-sparse attention (SparseD, arXiv 2509.24014).

    A row's first steps attend to everything, step E = int(skip * T) + 1 (counted from 0) the last of them; T is the
    most steps that the row may take, whenever it is done. At step E each layer and head measures the mean of softmax(q
    k^T / sqrt(head dim)) over every pair of a block of queries and a block of keys. From then on a block of queries
    attends to the int(select * blocks) + 1 blocks of the prompt and to as many of the generated part that had the
    largest means, however the text changes. Each row has blocks of its own, from its first real token and anew from
    where generation begins.

    The released code does three things otherwise: for LLaDA it divides by sqrt(number of heads), probably a slip; it
    ranks the generated part by a softmax over that part alone, and the prompt among all blocks; and it takes the number
    of steps for that of generated tokens.

    Args:
        skip: share of the steps with full attention, 0 to 1; 1 leaves all of them full.
        select: share of the blocks that is kept of either part, 0 to 1; 1 keeps all.
        block: positions of a block; the paper takes 128, and for short texts 32 with select 0.5.
        kernel: "flex" is PyTorch's flex_attention, which is compiled when it is first used, for half a minute; "gather"
            copies the kept keys and values beside each other. None takes flex on CUDA and gather elsewhere.
    """

    skip: float = 0.2
    select: float = 0.3
    block: int = 128
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        check_number("SparseD", least=0.0, most=1.0, skip=self.skip, select=self.select)
        check_whole("SparseD", block=self.block)
        check_choice("SparseD", ("flex", "gather", None), kernel=self.kernel)
        if self.kernel == "flex" and self.block % 16:
            raise CdlmError(f"flex attention needs a block that is a multiple of 16, got {self.block}: or take gather")

    def measured_at(self, budget: int) -> int:
        """The step at which a row measures its blocks, from 0: the last with full attention."""
        return int(self.skip * budget) + 1

    def keeps(self, blocks: int) -> int:
        """How many of the blocks of a part are kept."""
        return min(blocks, int(self.select * blocks) + 1)

    def lay_out(
        self, real: Bool[Tensor, "b n"], start: Int[Tensor, " b"], end: Int[Tensor, " b"], budget: Sequence[int],
        beside: Blocks | None = None,
    ) -> Blocks:  # fmt: skip
        """The blocks of rows that enter, which have no pattern yet.

        Args:
            real: False on padding.
            start, end: of the generated part.
            budget: most steps of each row.
            beside: of rows that these join.
        """
        length, size = real.shape[1], self.block
        width = (-(-length // size) + 1) * size
        lead = real.long().argmax(1)
        prompts, wholes = read_columns(start - lead, end - lead)
        column = torch.arange(length, device=real.device)
        place = torch.minimum((column - lead[:, None]).clamp(min=0), (end - lead)[:, None] - 1)
        before = (start - lead)[:, None]
        ahead = torch.div(before + size - 1, size, rounding_mode="floor") * size
        slot = torch.where(place < before, place, ahead + place - before)
        target = torch.where(real, slot, width)  # padding fills no slot
        empty = torch.zeros(len(real), width + 1, dtype=torch.int64, device=real.device)
        source = empty.scatter(1, target, column.expand_as(target))[:, :width]
        filled = empty.scatter(1, target, 1)[:, :width] > 0
        prompt = [-(-many // size) for many in prompts]
        generated = [-(-(whole - many) // size) for many, whole in zip(prompts, wholes, strict=True)]
        known = Counts(
            prompt, generated, [self.measured_at(steps) for steps in budget],
            [int(not whole % size and not many % size) for many, whole in zip(prompts, wholes, strict=True)],
        )  # fmt: skip
        patterns = () if beside is None else blank(beside.patterns, len(real))
        return Blocks(slot, source, filled, patterns, known)


SPARSE: Registry[SparseD] = Registry("sparse attention", SparseD, SparseD)


def parse_sparse(text: str | SparseD) -> SparseD:
    """Sparse attention from its text, such as `SparseD(0.2, 0.5, block=32)`.

    Raises:
        CdlmError: the text is none.
    """
    return SPARSE.parse("SparseD()" if isinstance(text, str) and text.strip() == "SparseD" else text)


@dataclass(frozen=True, eq=False)
class Counts(Columns):
    """What the host knows of the blocks of each row."""

    prompt: list[int]
    """Blocks of the prompt."""
    generated: list[int]
    """And of the generated part."""
    measured: list[int]
    """The step at which they are measured."""
    even: list[int]
    """Whether both parts are whole blocks, so that no slot is empty."""


class Blocks(NamedTuple):
    """How rows are divided into blocks, and what these keep. A slot is a place in the blocks of a row, `size` of each;
    the last blocks may have no positions."""

    slot: Int[Tensor, "b n"]
    """Of each position; of padding, one that is taken."""
    source: Int[Tensor, "b s"]
    """The position in each slot; 0 where there is none."""
    filled: Bool[Tensor, "b s"]
    """Slots with a position."""
    patterns: tuple[Int32[Tensor, "b g h m k"], ...]
    """Of each layer, the blocks of keys that each block of queries keeps, first of all in what a row keeps, for each
    head and each of the g texts of a row that a call has; empty until a row has measured them."""
    known: Counts


def importance(
    q: Float[Tensor, "r h s d"], k: Float[Tensor, "r h s d"], filled: Bool[Tensor, "r s"], size: int, scale: float
) -> Float[Tensor, "r h m m"]:
    """Mean attention of each block of queries to each block of keys, over the pairs of filled slots; 0 without any."""
    kind, count = torch.promote_types(q.dtype, torch.float32), filled.unflatten(1, (-1, size)).sum(2)
    keys, sums = k.to(kind).transpose(2, 3), []
    for queries, there in zip(q.split(size, 2), filled.split(size, 1), strict=True):
        scores = (queries.to(kind) @ keys).mul_(scale)
        weights = scores.masked_fill_(~filled[:, None, None], -torch.inf).softmax(-1)
        sums.append((weights * there[:, None, :, None]).sum(2).unflatten(2, (-1, size)).sum(3))
    return torch.stack(sums, 2) / (count[:, :, None] * count[:, None]).clamp(min=1)[:, None]


def strongest(
    importance: Float[Tensor, "r h m m"], parts: Int[Tensor, "r 2"], keep: Int[Tensor, "r 2"], most: int
) -> Int32[Tensor, "r h m k"]:
    """The most important blocks of keys, in order of their place; behind them any others, up to `most`.

    Args:
        parts: blocks of the prompt, and of the generated part, which follows it.
        keep: how many of each part.
    """
    ends = parts.cumsum(1)
    place = torch.arange(importance.shape[-1], device=importance.device)
    kept = torch.zeros_like(importance, dtype=torch.bool)
    for end, size, number in zip(ends.unbind(1), parts.unbind(1), keep.unbind(1), strict=True):
        there = ((place < end[:, None]) & (place >= (end - size)[:, None]))[:, None, None]
        order = importance.masked_fill(~there, -1).argsort(dim=-1, descending=True, stable=True)
        kept |= there & (order.argsort(-1) < number[:, None, None, None])
    return kept.byte().argsort(dim=-1, descending=True, stable=True)[..., :most].int()


class Kept(NamedTuple):
    """What the queries of some rows attend to."""

    blocks: Int32[Tensor, "r h m k"]
    many: Int[Tensor, " r"]
    """How many of them a row keeps: the first."""
    filled: Bool[Tensor, "r s"]
    whole: bool
    """Whether all that is named is kept, and every slot filled."""
    size: int


def gathered(
    q: Float[Tensor, "r h s d"], k: Float[Tensor, "r h s d"], v: Float[Tensor, "r h s e"], kept: Kept, scale: float
) -> Float[Tensor, "r h s e"]:
    """Attention to some blocks of keys, which are copied beside each other, a few blocks of queries at a time."""
    rows, heads, blocks, most = kept.blocks.shape
    size, first = kept.size, torch.arange(rows * heads, device=q.device).view(rows, heads, 1, 1) * blocks
    index = (kept.blocks + first).flatten(0, 2)
    queries, keys, values = (x.reshape(rows * heads * blocks, size, x.shape[-1]) for x in (q, k, v))
    seen = there = named = None
    if not kept.whole:
        there = kept.filled.view(rows, 1, blocks, size).expand(rows, heads, blocks, size).reshape(-1, size)
        named = torch.arange(most, device=q.device) < kept.many[:, None]
        named = named[:, None, None].expand(rows, heads, blocks, most).reshape(-1, most, 1)
    out, step = [], max(1, GATHERED // (most * size * q.shape[-1]))
    for begin in range(0, len(index), step):
        some = index[begin : begin + step]
        near, far = (x.index_select(0, some.flatten()).view(1, len(some), most * size, -1) for x in (keys, values))
        if there is not None and named is not None:
            seen = there.index_select(0, some.flatten()).view(len(some), most, size) & named[begin : begin + step]
            seen = seen.flatten(1)[None, :, None]
        out.append(F.scaled_dot_product_attention(queries[None, begin : begin + step], near, far, seen, scale=scale))
    return torch.cat(out, 1).view(rows, heads, blocks * size, -1)


@cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flexed(
    q: Float[Tensor, "r h s d"], k: Float[Tensor, "r h s d"], v: Float[Tensor, "r h s e"], kept: Kept, scale: float
) -> Float[Tensor, "r h s e"]:
    """Attention to some blocks of keys, by PyTorch's flex attention.

    Raises:
        CdlmError: it cannot be compiled here.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch.nn.attention.flex_attention import BlockMask

    filled, blocks = kept.filled, kept.blocks.shape[2]
    count = kept.many.int()[:, None, None].expand(kept.blocks.shape[:3]).contiguous()
    mask = BlockMask.from_kv_blocks(
        count, F.pad(kept.blocks, (0, blocks - kept.blocks.shape[3])), BLOCK_SIZE=kept.size, compute_q_blocks=False,
        mask_mod=lambda row, head, query, key: filled[row, key],
    )  # fmt: skip
    tile = min(64, kept.size & -kept.size)  # those that it takes by itself are larger than small blocks
    options = {"BLOCK_M": tile, "BLOCK_N": tile} if q.device.type == "cuda" else None
    try:
        return _flex()(q, k, v, block_mask=mask, scale=scale, kernel_options=options)
    except TorchDynamoException as error:
        raise CdlmError(
            f'flex attention cannot be compiled here ({first_line(error)}): take SparseD(..., kernel="gather")'
        ) from error


class SparseAttention(TorchFunctionMode):
    """In this, attention of one call of a model is that of the rows' patterns, whatever network attends.

    It stands between the network and `torch.nn.functional.scaled_dot_product_attention`, in this thread alone: nothing
    of it stays at the model. Rows whose pattern is not known yet attend to everything.

    Args:
        sparse: the settings.
        blocks: of the rows.
        step: of each row.
        padded: some of the positions are padding, which the network hides. It must hide nothing else.
        texts: texts of each row in the call: all first ones, then all second ones.
    """

    def __init__(self, sparse: SparseD, blocks: Blocks, step: Sequence[int], padded: bool, texts: int = 1):
        super().__init__()
        self.sparse, self.blocks, self.padded, self.texts = sparse, blocks, padded, texts
        now = list(zip(step, blocks.known.measured, strict=True))
        self.measuring = [row for row, (step, at) in enumerate(now) if step == at]
        self.reading = [row for row, (step, at) in enumerate(now) if step > at]
        self.others = [row for row, (step, at) in enumerate(now) if step <= at]
        self.layers = 0
        self.found: list[Int32[Tensor, "r h m k"]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def after(self) -> Blocks:
        """The blocks after the call, with the patterns that it has measured.

        Raises:
            CdlmError: the network attends in another way, and was not changed at all; or not as in earlier calls.
        """
        patterns = self.blocks.patterns
        if self.layers == 0 or (patterns and len(patterns) != self.layers):
            times = f"{self.layers} times, and {len(patterns)} before" if self.layers else "without it"
            raise CdlmError(
                "sparse attention is of models whose every call attends through torch's scaled_dot_product_attention,"
                f' as with attn_implementation="sdpa", and this one attends {times}: leave out sparse'
            )
        if not self.measuring:
            return self.blocks
        rows = torch.tensor(self.measuring)
        parts = [found.unflatten(0, (self.texts, -1)).transpose(0, 1) for found in self.found]
        patterns = patterns or tuple(part.new_zeros(len(self.blocks.slot), *part.shape[1:]) for part in parts)
        merged = (old.index_copy(0, rows.to(old.device), new) for old, new in zip(patterns, parts, strict=True))
        return self.blocks._replace(patterns=tuple(merged))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        self._check(q, k, attn_mask, dropout_p > 0 or is_causal)
        layer, self.layers = self.layers, self.layers + 1
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if self.measuring:
            self.found.append(self._measured(q, k, factor))
        rest = {"scale": scale, "enable_gqa": enable_gqa}
        if not self.reading:
            return F.scaled_dot_product_attention(q, k, v, attn_mask, **rest)
        sparse = self._sparse(q, k, v, layer, factor)
        if not self.others:
            return sparse
        rows = self._in_call(self.others, q.device)
        mask = None if attn_mask is None else attn_mask[rows]
        full = F.scaled_dot_product_attention(q[rows], k[rows], v[rows], mask, **rest)
        out = torch.empty((len(q), *full.shape[1:]), dtype=full.dtype, device=full.device)
        return out.index_copy_(0, rows, full).index_copy_(0, self._in_call(self.reading, q.device), sparse)

    def _check(self, q: Tensor, k: Tensor, mask: Tensor | None, other: bool) -> None:
        rows, length = self.blocks.slot.shape
        wanted = [rows * self.texts, length]
        if q.ndim != 4 or [[len(x), x.shape[2]] for x in (q, k)] != [wanted, wanted]:
            raise CdlmError(
                f"sparse attention is of all {length} positions of {wanted[0]} rows to each other, and the model"
                f" attends from {shown(list(q.shape))} to {shown(list(k.shape))}: leave out sparse"
            )
        padding = self.padded and mask is not None and mask.ndim == 4 and len(mask) == len(q)
        if other or not (mask is None or padding):
            raise CdlmError(
                "sparse attention is of positions that see all others but padding, and the model hides some or has"
                " dropout: leave out sparse"
            )

    def _in_call(self, rows: list[int], device: torch.device) -> Int[Tensor, " r"]:
        """The rows of the call that are texts of some rows."""
        every = len(self.blocks.slot)
        return torch.tensor([row + text * every for text in range(self.texts) for row in rows], device=device)

    def _slots(self, x: Tensor, heads: int, rows: list[int], width: int) -> Float[Tensor, "r h s d"]:
        """Vectors of some rows in their slots, each head with its own."""
        x = x[self._in_call(rows, x.device)]
        x = x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)
        source = self._for_texts(self.blocks.source[:, :width], rows, x.device)
        row = torch.arange(len(x) * heads, device=x.device).view(len(x), heads, 1) * x.shape[2]
        return x.flatten(0, 2).index_select(0, (row + source[:, None]).flatten()).view(len(x), heads, width, -1)

    def _for_texts(self, x: Tensor, rows: list[int], device: torch.device) -> Tensor:
        """What is the same for each text of some rows."""
        some = x.to(device)[torch.tensor(rows, device=device)]
        return some.repeat(self.texts, *[1] * (x.ndim - 1))

    def _keep(self, rows: list[int]) -> list[list[int]]:
        """Blocks of either part that rows keep."""
        known, keeps = self.blocks.known, self.sparse.keeps
        return [[keeps(known.prompt[row]), keeps(known.generated[row])] for row in rows]

    def _measured(self, q: Tensor, k: Tensor, scale: float) -> Int32[Tensor, "r h m k"]:
        known, width = self.blocks.known, self.blocks.source.shape[1]
        q, k = (self._slots(x, q.shape[1], self.measuring, width) for x in (q, k))
        filled = self._for_texts(self.blocks.filled, self.measuring, q.device)
        with torch.autocast(q.device.type, enabled=False):
            means = importance(q, k, filled, self.sparse.block, scale)
        parts = [[known.prompt[row], known.generated[row]] for row in self.measuring] * self.texts
        keep = self._keep(self.measuring) * self.texts
        most = self.sparse.keeps(means.shape[-1]) + 2  # of two parts one more than of both, and one for rounding
        return strongest(means, torch.tensor(parts).to(q.device), torch.tensor(keep).to(q.device), most)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Float[Tensor, "r h n e"]:
        """Attention of the rows that have a pattern."""
        rows, known, size = self.reading, self.blocks.known, self.sparse.block
        patterns, heads = self.blocks.patterns, q.shape[1]
        if layer >= len(patterns):
            raise CdlmError("sparse attention is of models that attend as often in each call: leave out sparse")
        blocks = max(known.prompt[row] + known.generated[row] for row in rows)
        count = [sum(keep) for keep in self._keep(rows)]
        kept = patterns[layer][torch.tensor(rows).to(q.device), :, :, :blocks, : max(count)]
        filled = self._for_texts(self.blocks.filled[:, : blocks * size], rows, q.device)
        whole = all(known.even[row] for row in rows) and min(count) == max(count)
        some = Kept(
            kept.transpose(0, 1).flatten(0, 1), torch.tensor(count * self.texts).to(q.device), filled, whole, size
        )
        q, k, v = (self._slots(x, heads, rows, blocks * size) for x in (q, k, v))
        kernel = self.sparse.kernel or ("flex" if q.device.type == "cuda" else "gather")
        out = (flexed if kernel == "flex" else gathered)(q, k, v, some, scale)
        slot = self._for_texts(self.blocks.slot, rows, q.device)
        row = torch.arange(len(out) * heads, device=q.device).view(len(out), heads, 1) * out.shape[2]
        return out.flatten(0, 2).index_select(0, (row + slot[:, None]).flatten()).view(*out.shape[:2], -1, v.shape[-1])
