"""What a family of foreign masked checkpoints is, and its `config.json`, read with one-line errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdlm.core.errors import CdlmError
from cdlm.core.types import Constants
from cdlm.masked.sampler import Unmasking

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BIDIRECTIONAL: Mapping[str, Any] = {
    "is_causal": False,
    "attn_implementation": "sdpa",
    "use_cache": False,  # else every call would build one
    "pad_token_id": None,  # else the embedding of that token, which is the end token, would never learn
}
"""Settings that any of transformers' decoders needs to be run as a masked model."""


@dataclass(frozen=True)
class Settings:
    """`config.json` of a foreign checkpoint. A field that is null counts as absent."""

    file: Path
    values: Mapping[str, Any]

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def count(self, name: str) -> int:
        """A whole number >= 1, and one that the size of a tensor may be."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise self.wrong(name, "a whole number >= 1 and below 2**31")
        return value

    def number(self, name: str) -> float:
        """A number > 0, and finite."""
        value = self.values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2**63:
            raise self.wrong(name, "a number > 0 and below 2**63")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; `default` if it is absent."""
        value = self.values.get(name) if self.has(name) else default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def token(self, name: str, rows: int) -> int | None:
        """One of `rows` tokens, None if it is absent."""
        value = self.values.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < rows):
            raise self.wrong(name, f"one of the {rows} tokens, a whole number")
        return value

    def allow(self, architecture: str, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse what the architecture cannot express: each field must have one of its values, None if absent."""
        for name, values in allowed.items():
            if self.values.get(name) not in values:
                raise self.wrong(name, f"{_word(values[0])}, the only kind that {architecture} can express")

    def groups(self, width: str, heads: str, groups: str, default: int) -> int:
        """Heads of the keys, `default` if absent. Raises unless all divides evenly, as rotary attention needs."""
        count = self.count(groups) if self.has(groups) else default
        if self.count(width) % (2 * self.count(heads)):
            raise self.wrong(width, f"a multiple of 2 * {heads}, which is {2 * self.count(heads)}")
        if self.count(heads) % count:
            raise self.wrong(groups, f"a divisor of {heads}, which is {self.count(heads)}")
        return count

    def wrong(self, name: str, expected: str) -> CdlmError:
        """The error for a field."""
        return CdlmError(f"{self.file}: {name} is {_word(self.values.get(name))}, expected {expected}")


def _word(value: Any) -> str:
    return "absent" if value is None else repr(value)


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint that one of transformers' own architectures can run."""

    model_type: str
    """In config.json."""
    network: Callable[[Settings], PreTrainedModel]
    """The architecture with bidirectional attention, without memory for its weights; raises for what it cannot be."""
    official: Callable[[str], str]
    """The name in the checkpoint of a tensor of the network."""
    released: Constants
    """Of the released models. A config.json with another mask token has another vocabulary: they are not assumed."""
    length: str
    """The field that holds the context length."""
    layers: str
    """The field that holds the number of layers."""
    width: str
    """The field that holds their width."""
    skips_padding: bool
    """Positions are counted over real tokens."""
    tokenizer: type[PreTrainedTokenizerFast]
    tokenizer_files: tuple[tuple[str, ...], ...]
    """The sets of files of which a tokenizer needs one."""
    turn_end: str
    """Name of the token that ends a turn."""
    sampling: Unmasking
    """How its authors sample it."""
    new_tokens: int
    """Positions that they generate after a prompt."""

    def constants(self, settings: Settings, rows: int) -> Constants:
        """Mask and end tokens among `rows` tokens: those of config.json, or the released models'."""
        mask, eos = (settings.token(name, rows) for name in ("mask_token_id", "eos_token_id"))
        if mask is None and self.released.mask_id >= rows:
            raise settings.wrong("mask_token_id", f"one of the {rows} tokens")
        if mask is not None and mask == eos:
            raise settings.wrong("eos_token_id", "a token of its own, as it is the mask")
        if mask in (None, self.released.mask_id):
            return replace(self.released, eos_id=self.released.eos_id if eos is None else eos)
        return Constants(mask, eos, shift=self.released.shift)

    def with_turn(self, constants: Constants, tokenizer: PreTrainedTokenizerFast | None) -> Constants:
        """The same with the end of a turn, where it is not known and the tokenizer has the family's token for it."""
        if constants.eot_id is not None or tokenizer is None:
            return constants
        found = tokenizer.added_tokens_encoder.get(self.turn_end)
        return constants if found in (None, constants.mask_id) else replace(constants, eot_id=found)
