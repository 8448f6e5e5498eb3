"""The small judge: a GPT-2 of a run's own text, trained in a minute and kept in a cache."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cdlm.core.checks import check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.progress import meter
from cdlm.data.order import Order
from cdlm.data.store import TextRows
from cdlm.evaluation.judge import NAME_FILE, Judge, read_name
from cdlm.models import shipped
from cdlm.training.small import Progress, minimise

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast


MOST_STEPS = 500
"""Of the training of a small judge, unless it is told otherwise."""
PASSES = 16
"""Over the text of a small judge, at most, unless it is told otherwise."""


@dataclass(frozen=True)
class SmallJudge:
    """How the small judge of a run is trained.

    Args:
        rows: training text of the run.
        tokenizer: of the run.
        batch_size: rows of a batch.
        cache: folder of judges that were trained before.
        steps: batches to train on; by default `MOST_STEPS`, or as many as read the text `PASSES` times. A judge that
            reads a small text more often learns it by heart, and knows other text of its kind less well.
    """

    rows: TextRows
    tokenizer: PreTrainedTokenizerFast
    batch_size: int
    cache: Path
    steps: int | None = None

    def __post_init__(self) -> None:
        check_whole("the judge", optional=True, judge_steps=self.steps)

    @property
    def taken(self) -> int:
        """Batches that it is trained on."""
        usual = min(MOST_STEPS, -(-PASSES * len(self.rows) // self.batch_size))
        return usual if self.steps is None else self.steps

    def open(self, device: str = "cpu", progress: bool = True) -> Judge:
        """The judge that comes with the package, if it has this one, or that of the cache; on the first call it is
        trained and stored there."""
        for folder in shipped.folders():
            if (found := read_name(folder)) is not None and found.get("key") == self.key:
                return Judge.load(folder, device)

        def train() -> Judge:
            with meter(self.taken, "judge, training steps", progress) as shown:
                found = train_judge(
                    self.batches(), self.tokenizer, length=self.rows.length, steps=self.taken, seed=0, device=device,
                    progress=lambda step, nats: shown.advance(nats_per_token=f"{nats:.3f}"),
                )  # fmt: skip
                return replace(found, key=self.key)

        return cached_judge(self.key, self.cache, train, device)

    @property
    def key(self) -> str:
        """What decides the weights: the text, the steps and the size of a batch."""
        return hashlib.sha256(f"{self.rows.key} {self.taken} {self.batch_size}".encode()).hexdigest()[:16]

    def batches(self) -> Iterator[Int[Tensor, "b n"]]:
        """The run's training text without end, in the order of training with seed 0, as `judge_rows` packs it."""
        order = Order(len(self.rows), seed=0)
        rows = (self.rows[order.row(position)] for position in count())
        return judge_rows((row.tokens[row.valid] for row in rows), self.tokenizer, (self.batch_size, self.rows.length))


OWN = "own"
"""Names the small judge where a judge is named."""


def open_judge(name: str | None, small: SmallJudge, device: str = "cpu", progress: bool = True) -> Judge:
    """The judge of that folder, GGUF file or Hub id; without one, or with "own", the small judge of the run."""
    return small.open(device, progress) if name in (None, OWN) else Judge.load(name, device)


def judge_rows(
    rows: Iterable[Int[np.ndarray, " k"]], tokenizer: PreTrainedTokenizerFast, shape: tuple[int, int]
) -> Iterator[Int[Tensor, "b n"]]:
    """Token rows joined and cut into batches of `shape`, each end-of-text token as the line break of a sample's text.

    Args:
        shape: rows of a batch, and tokens of a row.
    """
    newline = tokenizer.encode("\n", add_special_tokens=False)
    size, stream = math.prod(shape), list[int]()
    for row in rows:
        for token in row.tolist():
            stream.extend(newline if token == tokenizer.eos_token_id else [token])
        while len(stream) >= size:
            yield torch.tensor(stream[:size]).view(shape)
            del stream[:size]


def cached_judge(key: str, cache_dir: str | Path, train: Callable[[], Judge], device: str = "cpu") -> Judge:
    """The judge stored under `key` in `cache_dir`; on the first call, the one `train` makes, which is then stored.

    Put into `key` everything that decides the weights: data, tokenizer, sizes, steps, seed.
    """
    folder = Path(cache_dir) / f"judge-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / NAME_FILE).is_file():
        train().save(folder)
    try:
        return Judge.load(folder, device)
    except CdlmError as error:
        raise CdlmError(
            f"the cached judge is broken ({error}): delete {folder}, and it will be trained again"
        ) from error


@dataclass(frozen=True)
class JudgeSize:
    """Size of a small GPT-2; by default about 0.6 M parameters besides the embeddings."""

    width: int = 128
    depth: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise CdlmError(
                f"expected heads that divide the width of a judge, got {self.heads} heads and width {self.width}:"
                f" try width={max(1, self.width // self.heads) * self.heads}"
            )


def train_judge(
    rows: Iterator[Int[Tensor, "b n"]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    size: JudgeSize = JudgeSize(),
    length: int,
    steps: int,
    lr: float = 3e-3,
    seed: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Judge:
    """Train a small GPT-2 on packed token rows, one batch a step; the same arguments give the same weights.

    Args:
        rows: batches of token rows, at most `length` tokens long; `steps` batches are taken.
        tokenizer: turned the text into `rows`, and later re-tokenises the texts to be judged.
        length: the judge's context in tokens.
        lr: peak rate of AdamW, after a linear warm-up and before a cosine down to a tenth.
        seed: of the weights. The global random state is left as it was.
        progress: called with (step from 1, loss in nats per token).
    """
    if steps < 1 or length < 2:
        raise CdlmError(
            "expected at least 1 step and a length of at least 2 to train a judge, "
            f"got {steps} steps and length {length}"
        )
    model = _fresh_gpt2(len(tokenizer), length, size, seed).train()
    nn.Module.to(model, device)
    taken = minimise(
        model, lambda batch: _gpt2_loss(model, batch.to(device), length), rows, steps=steps, lr=lr, progress=progress
    )
    if taken < steps:
        raise CdlmError(f"expected {steps} batches to train a judge, got {taken}; pass more text or fewer steps")
    name = f"own GPT-2 (width {size.width}, depth {size.depth}, {steps} steps, seed {seed})"
    return Judge(model, tokenizer, name, device)


def _fresh_gpt2(vocabulary: int, length: int, size: JudgeSize, seed: int) -> GPT2LMHeadModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=size.width, n_layer=size.depth, n_head=size.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws its weights from the global generator
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        return GPT2LMHeadModel(config)


def _gpt2_loss(model: GPT2LMHeadModel, batch: Int[Tensor, "b n"], length: int) -> Float[Tensor, ""]:
    if batch.shape[1] > length:
        raise CdlmError(f"expected rows of at most {length} tokens, the judge's length, got {batch.shape[1]}")
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
