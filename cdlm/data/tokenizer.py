"""Byte-level BPE tokenizers: train one, load one, tell one from another."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError, first_line
from cdlm.models.foreign import foreign_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"  # ids 0, 1, 2
_SMALLEST = 256 + 3  # every byte and the special tokens
_LARGEST = 2**20  # memory for all is asked for at once
USUAL_SIZE = 2048
"""Tokens of a tokenizer, unless it is told otherwise or the text supports fewer."""
LONGEST_WORD = 1000
"""Characters without a boundary that training sees as one: it takes the square of their number, encoding does not."""
_LONG = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # of a Hub repository, all that a tokenizer may be made of


def train_tokenizer(documents: Iterable[str], vocab_size: int | None = None) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer of exactly `vocab_size` tokens, the three special ones included; by default of
    `USUAL_SIZE`, or as many as the text supports.

    Any Unicode text comes back unchanged from encoding and decoding: there is no normaliser and no added space. The
    special tokens are the end of a document (id 0), padding (1) and the mask (2). The same documents in the same order
    give the same tokenizer. Of a word or a run of blanks that is longer than `LONGEST_WORD`, pieces are learned.

    Raises:
        CdlmError: The size is below 259 (bytes and special tokens) or above 2**20, or the text has too few repetitions
            for it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size is not None and vocab_size < _SMALLEST:
        raise CdlmError(f"vocab_size must be at least {_SMALLEST} (256 bytes and 3 special tokens), got {vocab_size}")
    if vocab_size is not None and vocab_size > _LARGEST:
        raise CdlmError(f"vocab_size must be at most {_LARGEST}, more than any text needs, got {shown(vocab_size)}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=USUAL_SIZE if vocab_size is None else vocab_size,
        special_tokens=[EOS, PAD, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(chain.from_iterable(map(_without_long_words, documents)), trainer)
    if vocab_size is not None and (supported := backend.get_vocab_size()) < vocab_size:
        raise CdlmError(
            f"the text supports a vocabulary of {supported} tokens, {vocab_size} is too many: "
            f"set vocab_size to {supported} or less, or give more text"
        )
    return _wrap(backend)


def _without_long_words(text: str) -> Iterator[str]:
    """The text in pieces, cut where a word or a run of blanks becomes too long."""
    start = 0
    for run in _LONG.finditer(text) if len(text) > LONGEST_WORD else ():
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def load_tokenizer(name_or_dir: str) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer from a local folder or the Hugging Face Hub; no code is ever run.

    One without an end-of-text token ends a text with its separator, as `foreign_tokenizer` says.

    Raises:
        CdlmError: There is none, the Hub cannot be reached, it is not a fast one, or it has no end-of-text token.
    """
    from huggingface_hub import snapshot_download
    from transformers import PreTrainedTokenizerFast

    try:
        folder = name_or_dir if Path(name_or_dir).is_dir() else snapshot_download(name_or_dir, allow_patterns=_FILES)
        tokenizer = foreign_tokenizer(Path(folder))
    except CdlmError:
        raise
    except Exception as error:  # the Hub client, its HTTP library and the parsers each raise their own kinds
        raise CdlmError(
            f"no tokenizer could be loaded from {name_or_dir!r} ({first_line(error)}); give a folder with "
            "tokenizer.json, or a Hub name; offline, download it first or set HF_HUB_OFFLINE=1 to use the local cache"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CdlmError(
            f"tokenizer {name_or_dir!r} is a {type(tokenizer).__name__}, expected a fast one (with tokenizer.json); "
            "convert it or choose another"
        )
    if tokenizer.eos_token_id is None:
        raise CdlmError(
            f"tokenizer {name_or_dir!r} has no end-of-text token (eos_token, or sep_token), which joins documents; "
            "set eos_token in its tokenizer_config.json or choose another"
        )
    return tokenizer


def encode_batch(tokenizer: "PreTrainedTokenizerFast", documents: list[str]) -> list[list[int]]:
    """Token ids of each document, as plain text: the name of a special token in the text is not that token."""
    encoded = tokenizer(
        documents,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def _wrap(backend: object) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
