"""Features: each text as a vector, so that sets of texts can be compared by their distribution."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64, UInt64
from torch import Tensor

from cdlm.core.checks import Settings, check_choice, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.parsing import Registry
from cdlm.evaluation.judge import Judge, Readers, batches_by_length, padded
from cdlm.evaluation.texts import Corpus
from cdlm.models.encoder import open_encoder

MOST_TOKENS = 256
"""Tokens of a text that a network reads, at most."""

Reader = Callable[[Corpus], Float[np.ndarray, "m w"]]
"""Gives one vector for each text."""


class Features(Settings, ABC):
    """How texts become vectors. The value of MAUVE and of the Fréchet distance belongs to the features it is of."""

    @abstractmethod
    def reader(self, reference: Sequence[Corpus], readers: Readers) -> Reader:
        """What turns texts into vectors.

        Args:
            reference: the real text that sets of texts are compared with.
            readers: the judge, of features that need one.

        Raises:
            CdlmError: a network cannot be opened.
        """

    def suited(self, corpora: Sequence[Corpus]) -> Features:
        """These features, or a kind of them that all of the texts have."""
        return self


# --- n-grams ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NGrams(Features):
    """How often each of the most widespread n-grams of the real text occurs.

    The n-grams are those in most texts of the reference. A text's value for one of them is the square root of its share
    of all n-grams of the text, times the share of the reference texts that hold the n-gram. Rare n-grams only add
    noise: without these weights most natural text is noise, and shuffled text looks like real text.

    Args:
        orders: lengths n.
        most: n-grams that are counted, the width of the vectors.
        over: "tokens" of the generator, or "words" and punctuation marks.
    """

    orders: tuple[int, ...] = (2, 3)
    most: int = 128
    over: str = "tokens"

    def __post_init__(self) -> None:
        if not isinstance(self.orders, tuple) or not self.orders:
            raise CdlmError(f"NGrams needs orders such as (2, 3), got {self.orders!r}")
        for order in self.orders:
            check_whole("NGrams", orders=order)
        check_whole("NGrams", most=self.most)
        check_choice("NGrams", ("tokens", "words"), over=self.over)

    def suited(self, corpora: Sequence[Corpus]) -> NGrams:
        """Over words if any of the texts came without the generator's tokens."""
        return replace(self, over="words") if any(corpus.foreign for corpus in corpora) else self

    def reader(self, reference: Sequence[Corpus], readers: Readers) -> Reader:
        """Counts the n-grams that most texts of the reference hold."""
        found = [self.grams(corpus) for corpus in reference]
        keys, texts = np.unique(np.concatenate([_once(*grams) for grams in found]), return_counts=True)
        chosen = np.sort(np.lexsort((keys, -texts))[: self.most])
        return _Counts(self, keys[chosen], texts[chosen] / sum(len(corpus.texts) for corpus in reference))

    def grams(self, corpus: Corpus) -> tuple[UInt64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
        """All n-grams of the texts as 64-bit hashes, and the text that each is in."""
        lines = corpus.tokens if self.over == "tokens" else _word_ids(corpus.texts)
        ids = np.fromiter(chain.from_iterable(lines), dtype=np.uint64)
        owner = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
        parts = [_hashes(ids, owner, order) for order in self.orders]
        keys, owners = (np.concatenate(part) for part in zip(*parts, strict=True))
        return keys, owners


@dataclass(frozen=True, eq=False)
class _Counts:
    """Weighted shares of the n-grams `keys`, which are in rising order."""

    ngrams: NGrams
    keys: UInt64[np.ndarray, " w"]
    weights: Float[np.ndarray, " w"]

    def __call__(self, corpus: Corpus) -> Float[np.ndarray, "m w"]:
        keys, owner = self.ngrams.grams(corpus)
        width, texts = max(1, len(self.keys)), len(corpus.texts)
        if not len(self.keys):
            return np.zeros((texts, width))
        place = np.searchsorted(self.keys, keys).clip(max=width - 1)
        known = self.keys[place] == keys
        counts = np.bincount(owner[known] * width + place[known], minlength=texts * width).reshape(texts, width)
        total = np.bincount(owner, minlength=texts).clip(min=1)
        return np.sqrt(counts / total[:, None]) * self.weights


def _once(keys: UInt64[np.ndarray, " k"], owner: Int64[np.ndarray, " k"]) -> UInt64[np.ndarray, " u"]:
    """Each n-gram of each text once."""
    order = np.lexsort((keys, owner))
    keys, owner = keys[order], owner[order]
    return keys[(np.diff(keys, prepend=keys[:1] + np.uint64(1)) != 0) | (np.diff(owner, prepend=-1) != 0)]


def _hashes(
    ids: UInt64[np.ndarray, " t"], owner: Int64[np.ndarray, " t"], order: int
) -> tuple[UInt64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """The n-grams of one order as 64-bit numbers, and the text that each is in."""
    count = max(0, len(ids) - order + 1)
    state = np.full(count, order, dtype=np.uint64)
    for step in range(order):
        state = mixed(state + ids[step : step + count])
    inside = owner[:count] == owner[order - 1 :]
    return state[inside], owner[:count][inside]


def mixed(state: UInt64[np.ndarray, " k"]) -> UInt64[np.ndarray, " k"]:
    """One step of the generator SplitMix64 (Steele, Lea and Flood, 2014) on each number: a hash."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _word_ids(texts: Sequence[str]) -> list[list[int]]:
    """Words and punctuation marks as 64-bit numbers."""
    words = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    known = {word: _word_id(word) for word in set(chain.from_iterable(words))}
    return [[known[word] for word in line] for line in words]


def _word_id(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# --- states of networks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanState(Features):
    """The judge's last hidden states, mean over the tokens of the text."""

    def reader(self, reference: Sequence[Corpus], readers: Readers) -> Reader:
        """Reads with the judge."""
        return lambda corpus: readers.states(partial(states, pool="mean"), corpus.texts)


@dataclass(frozen=True)
class LastState(Features):
    """The judge's last hidden state at the last token (MAUVE, arXiv 2102.01454). It hardly sees what comes before."""

    def reader(self, reference: Sequence[Corpus], readers: Readers) -> Reader:
        """Reads with the judge."""
        return lambda corpus: readers.states(partial(states, pool="last"), corpus.texts)


@dataclass(frozen=True)
class Encoder(Features):
    """The last hidden states of an encoder, mean over the tokens of the text.

    Args:
        name: folder or Hub id of a Hugging Face model.
    """

    name: str

    def reader(self, reference: Sequence[Corpus], readers: Readers) -> Reader:
        """Opens the encoder, on the judge's device."""
        tokenizer, model = open_encoder(self.name, readers.judge.device)
        return lambda corpus: _encoded(tokenizer, model, corpus.texts)


def states(
    judge: Judge, texts: Sequence[str], pool: Literal["mean", "last"] = "mean", batch_size: int = 32
) -> Float32[np.ndarray, "m w"]:
    """A judge's last hidden states of each text, their mean or the last one.

    Only the first `MOST_TOKENS` tokens of a text are read. A text without tokens gets zeros: it stays in the count and
    lies apart from every other text. The result does not depend on `batch_size`.
    """
    length = min(MOST_TOKENS, judge.context)
    lines = judge.encode(list(texts))
    rows = [[i for i, text in zip(line.ids, line.is_text, strict=True) if text][:length] for line in lines]
    filled = [index for index, row in enumerate(rows) if row]
    result = np.zeros((len(texts), int(judge.model.config.hidden_size)), dtype=np.float32)
    for batch in batches_by_length([len(rows[i]) for i in filled], batch_size, most_tokens=1 << 16):
        where = [filled[i] for i in batch]
        result[where] = _pooled(judge.model.base_model, *padded([rows[i] for i in where], judge.device), pool)
    return result


def _encoded(tokenizer: Any, model: Any, texts: Sequence[str], batch_size: int = 32) -> Float32[np.ndarray, "m w"]:
    length = min(MOST_TOKENS, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", MOST_TOKENS))
    rows = tokenizer(list(texts), truncation=True, max_length=length, padding=False, verbose=False)["input_ids"]
    result = np.zeros((len(texts), int(model.config.hidden_size)), dtype=np.float32)
    filled = [index for index, row in enumerate(rows) if row]
    for batch in batches_by_length([len(rows[i]) for i in filled], batch_size, most_tokens=1 << 16):
        where = [filled[i] for i in batch]
        result[where] = _pooled(model, *padded([rows[i] for i in where], str(model.device)), "mean")
    return result


@torch.inference_mode()
def _pooled(
    model: Any, ids: Int[Tensor, "b n"], real: Bool[Tensor, "b n"], pool: Literal["mean", "last"]
) -> Float32[np.ndarray, "b w"]:
    found: Float[Tensor, "b n w"] = model(input_ids=ids, attention_mask=real.long()).last_hidden_state.float()
    if pool == "last":
        chosen = found[torch.arange(len(ids), device=ids.device), real.sum(1) - 1]
    else:
        chosen = (found * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    return chosen.cpu().numpy()


FEATURES: Registry[Features] = Registry("kind of features", Features, NGrams, MeanState, LastState, Encoder)
"""Features by name; the first is the default."""
