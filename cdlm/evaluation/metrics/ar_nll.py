"""AR-NLL: how surprising a text is to an autoregressive judge, in nats per judge token and bits per character.

Low is not good by itself: text that repeats itself is easy to predict. Read it beside the entropy and beside the value
of real text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch.nn import functional

from cdlm.core.errors import CdlmError
from cdlm.core.parallel import interleaved
from cdlm.core.stats import Scores
from cdlm.evaluation.judge import Encoded, Judge, batches_by_length, padded
from cdlm.evaluation.texts import Spans


@dataclass(frozen=True, eq=False)
class ArNll:
    """AR-NLL of a corpus and of its texts.

    Attributes:
        text_nats: sum over the scored tokens of each text.
        text_tokens: number of scored tokens of each text; 0 where nothing could be scored.
        text_chars: number of characters of the scored tokens of each text.
        empty: number of texts that are empty or white space; they have no tokens to score, so look at this count too.
        unscored: number of texts without any scored token, the empty ones among them.
        serial: texts are in the order of a file, and the interval draws blocks of neighbours.
    """

    text_nats: Float[np.ndarray, " m"]
    text_tokens: Int[np.ndarray, " m"]
    text_chars: Int[np.ndarray, " m"]
    empty: int
    serial: bool = False

    @property
    def tokens(self) -> int:
        """Scored tokens of the corpus."""
        return int(self.text_tokens.sum())

    @property
    def chars(self) -> int:
        """Characters of the scored tokens of the corpus."""
        return int(self.text_chars.sum())

    @property
    def unscored(self) -> int:
        """Texts without any scored token."""
        return int((self.text_tokens == 0).sum())

    @property
    def nats_per_token(self) -> float:
        """Over all tokens of the corpus, so long texts weigh more; NaN without tokens."""
        return float(self.text_nats.sum()) / self.tokens if self.tokens else math.nan

    @property
    def bits_per_char(self) -> float:
        """Over all characters of the corpus; comparable between tokenizers. NaN without characters."""
        return float(self.text_nats.sum()) / math.log(2) / self.chars if self.chars else math.nan

    @property
    def interval95(self) -> tuple[float, float]:
        """Of `nats_per_token`, bootstrap over texts, or over blocks of them; NaN without tokens."""
        return self.scores.bootstrap().interval95

    @property
    def scores(self) -> Scores:
        """`nats_per_token` as a ratio of sums over texts."""
        return Scores(self.text_nats, self.text_tokens.astype(np.float64), self.serial)

    @staticmethod
    def merge(shares: Sequence[ArNll]) -> ArNll:
        """The corpus whose texts r, r + N, r + 2 N, ... are those of share r of N."""

        nats, tokens, chars = (
            interleaved([getattr(share, name) for share in shares])
            for name in ("text_nats", "text_tokens", "text_chars")
        )
        return ArNll(nats, tokens, chars, sum(share.empty for share in shares), all(share.serial for share in shares))


def ar_nll(judge: Judge, texts: list[str], given: Spans | None = None, batch_size: int = 32) -> ArNll:
    """Score each text under the judge, alone and from its beginning.

    A token counts if it belongs to the text (is no BOS of the tokenizer), is not the first of the text, and starts
    outside every span of `given`; what was given is still read as context. Results do not depend on `batch_size` or on
    the other texts. Texts longer than the judge's context are read in windows, see `token_nats`.

    Raises CdlmError when `given` does not have one list of spans for each text.
    """
    if given is not None and len(given) != len(texts):
        raise CdlmError(f"expected given spans for each of {len(texts)} texts, got {len(given)}; use [] for no span")
    if batch_size < 1:
        raise CdlmError(f"expected a batch size of at least 1, got {batch_size}")
    encoded = judge.encode(texts)
    nats = np.zeros(len(texts))
    tokens = np.zeros(len(texts), dtype=np.int64)
    chars = np.zeros(len(texts), dtype=np.int64)
    for i, line in enumerate(token_nats(judge, encoded, batch_size)):
        scored = _scored(encoded[i], given[i] if given else [])
        nats[i], tokens[i] = line[scored].sum(), scored.sum()
        chars[i] = _widths(encoded[i].starts, len(texts[i]))[scored].sum()
    empty = sum(not text.strip() for text in texts)
    return ArNll(nats, tokens, chars, empty)


def _scored(encoded: Encoded, spans: list[tuple[int, int]]) -> Bool[np.ndarray, " n"]:
    scored = np.array(encoded.is_text, dtype=bool)
    scored[np.flatnonzero(scored)[:1]] = False
    scored[:1] = False
    starts = np.array(encoded.starts, dtype=np.int64)
    for start, end in spans:
        scored &= (starts < start) | (starts >= end)
    return scored


def _widths(starts: list[int], length: int) -> Int[np.ndarray, " n"]:
    """Characters from each token's start to the next one's, so that blanks belong to a token and none counts twice."""
    return np.diff(np.array([*starts, length], dtype=np.int64)).clip(min=0)


def token_nats(judge: Judge, encoded: list[Encoded], batch_size: int) -> list[Float[np.ndarray, " n"]]:
    """Minus the log-probability of each token in nats, float64; NaN for the first token, which has no context.

    A text longer than the judge's context is read through windows of that length which advance by half of it; each
    token is taken from the first window that holds it, so from the second window on every token has at least half a
    window of context.
    """
    rows = [e.ids for e in encoded]
    result = [np.full(len(row), np.nan) for row in rows]
    windows = [(text, *window) for text, row in enumerate(rows) for window in _windows(len(row), judge.context)]
    most_tokens = (1 << 28) // int(judge.model.config.vocab_size)  # 1 GiB of float32 logits
    for batch in batches_by_length([stop - start for _, start, stop, _ in windows], batch_size, most_tokens):
        nats = _next_token_nats(judge, [rows[t][start:stop] for t, start, stop, _ in (windows[i] for i in batch)])
        for line, (text, start, stop, new) in zip(nats, (windows[i] for i in batch), strict=True):
            result[text][new:stop] = line[new - start - 1 : stop - start - 1]
    return result


def _windows(tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first token not seen before) of each window; none for a text of one token or none."""
    if tokens < 2:
        return
    starts = [0]
    while starts[-1] + context < tokens:
        starts.append(starts[-1] + max(1, context // 2))
    yield 0, min(context, tokens), 1
    for before, start in pairwise(starts):
        yield start, min(start + context, tokens), before + context


@torch.inference_mode()
def _next_token_nats(judge: Judge, rows: list[list[int]]) -> Float[np.ndarray, "b n"]:
    ids, real = padded(rows, judge.device)
    logits = judge.model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1].float()
    nats = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats.view(len(rows), -1).double().cpu().numpy()
