"""The text of single tokens, for places where each token is shown by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from cdlm.core.inert import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BROKEN = "\ufffd"
"""What a tokenizer gives for bytes that are no whole character."""


class Pieces:
    """Texts of tokens, each kept once and called by its number. Control characters are made visible.

    A character may take several tokens, none of which is text alone: the first of them stands for all, and the others
    are empty.

    Args:
        special: texts to show for tokens that have a meaning of their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: Mapping[int, str] | None = None):
        self._tokenizer = tokenizer
        self.texts: list[str] = [""]
        """Every text that was needed, by number; 0 is none."""
        self._numbers = {"": 0}
        self._known: dict[int, int] = {token: self._number(text) for token, text in (special or {}).items()}

    def of(self, tokens: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Numbers of the texts of a row; those of negative tokens, which are none yet, are 0."""
        ids = tokens.tolist()
        numbers = [self._one(token) if token >= 0 else 0 for token in ids]
        broken = [token >= 0 and BROKEN in self.texts[number] for token, number in zip(ids, numbers, strict=True)]
        if any(broken):
            for is_broken, places in groupby(range(len(ids)), broken.__getitem__):
                if is_broken:
                    run = list(places)
                    numbers[run[0] : run[-1] + 1] = self._together(ids[run[0] : run[-1] + 1])
        return np.array(numbers, np.int64)

    def _one(self, token: int) -> int:
        if token not in self._known:
            self._known[token] = self._number(self._decoded([token]))
        return self._known[token]

    def _together(self, ids: Sequence[int]) -> list[int]:
        return [self._number(self._decoded(list(ids))), *[0] * (len(ids) - 1)]

    def _decoded(self, ids: list[int]) -> str:
        return visible(str(self._tokenizer.decode(ids, skip_special_tokens=False)))

    def _number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]
