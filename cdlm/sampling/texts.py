"""From tokens to texts: where a text begins and ends in its row, and which of it was given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import replacing, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Special:
    """Ids of a tokenizer's special tokens; None where it has none."""

    mask_id: int | None = None
    eos_id: int | None = None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Its stop tokens: the end of a text, if there is one."""
        return () if self.eos_id is None else (self.eos_id,)


def special_of(tokenizer: PreTrainedTokenizerFast) -> Special:
    """Special tokens of a tokenizer."""

    def whole(value: object) -> int | None:
        return value if isinstance(value, int) else None

    return Special(whole(tokenizer.mask_token_id), whole(tokenizer.eos_token_id))


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Text of a packed row: the end-of-text token, which joins documents, is a line break."""
    text, eos = _decoded(tokenizer, ids), special_of(tokenizer).eos_id
    if eos is None:
        return text
    if text.count(str(tokenizer.eos_token)) == ids.count(eos):
        return text.replace(str(tokenizer.eos_token), "\n")
    # The name is also written out, as text that is no such token.
    ends = [i for i, token in enumerate(ids) if token == eos]
    parts = zip([0, *(end + 1 for end in ends)], [*ends, len(ids)], strict=True)
    return "\n".join(_decoded(tokenizer, ids[start:end]) for start, end in parts)


def _decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def text_ids(ids: list[int], eos_id: int | None, with_end: bool = False) -> list[int]:
    """Tokens of a row up to its first `eos_id`, that one included `with_end`; None ends no text."""
    return ids[: ids.index(eos_id) + with_end] if eos_id in ids else ids


def texts_of(
    tokenizer: PreTrainedTokenizerFast, tokens: Int[np.ndarray, "m n"], valid: Bool[np.ndarray, "m n"]
) -> list[str]:
    """Text of each row without its padding."""
    return [text_of(tokenizer, ids[real].tolist()) for ids, real in zip(tokens, valid, strict=True)]


def shown_of(
    tokens: Int[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], valid: Bool[np.ndarray, "m n"],
    end_ids: Collection[int],
) -> Bool[np.ndarray, "m n"]:  # fmt: skip
    """Positions that are text: no padding, and nothing from the first generated stop token on; without any, no text
    ends."""
    if not end_ids:
        return valid
    return valid & ~np.logical_or.accumulate(ends_of(tokens, given & valid, end_ids), 1)


def outputs_of(
    shown: Bool[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], valid: Bool[np.ndarray, "m n"]
) -> Int[np.ndarray, " m"]:
    """Tokens of each row that count as output: what was generated, up to its first stop token and with it, without
    prompt and padding.

    Args:
        shown: positions that are text, from `shown_of` with the same `given` and `valid`.
    """
    return (shown & ~given).sum(1) + (valid & ~shown).any(1)


def ends_of(
    tokens: Int[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], end_ids: Collection[int]
) -> Bool[np.ndarray, "m n"]:
    """Where a text may end: at a stop token after the last position that was given (padding apart)."""
    after = ~np.logical_or.accumulate(given[:, ::-1], 1)[:, ::-1]
    return np.isin(tokens, list(end_ids)) & after


def given_spans(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], given: Bool[np.ndarray, " n"]
) -> list[tuple[int, int]]:
    """Characters [start, end) of the decoded text that came from a prompt."""
    return [
        (len(text_of(tokenizer, ids[:start])), len(text_of(tokenizer, ids[:end]))) for start, end in spans_where(given)
    ]


def spans_where(mask: Bool[np.ndarray, " n"]) -> list[tuple[int, int]]:
    """The stretches [start, end) in which a mask is true."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer's files, each whole or not at all, with no room needed elsewhere."""
    with replacing(folder / "tokenizer.json") as last:
        made = last.with_name("files")
        try:
            tokenizer.save_pretrained(made)
        except OSError:
            raise
        except Exception as error:  # the library has a kind of its own for what the system refuses
            raise CdlmError(
                f"cannot write {folder / last.name} ({first_line(error)}); choose another folder"
            ) from error
        for file in sorted(made.iterdir()):
            if file.name != last.name:
                write_text(folder / file.name, file.read_text(encoding="utf-8"))
        (made / last.name).rename(last)
