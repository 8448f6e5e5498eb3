"""Foreign masked checkpoints, run by transformers' own architectures: no code of theirs is imported."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache as LibraryCache
from transformers.cache_utils import CacheLayerMixin

from cdlm.core.checks import shown
from cdlm.core.devices import Precision
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.tensors import check_values
from cdlm.core.types import Constants
from cdlm.masked.checkpoints.dream import DREAM
from cdlm.masked.checkpoints.family import Family, Settings
from cdlm.masked.checkpoints.folder import (
    check_sizes,
    load_weights,
    read_settings,
    read_stops,
    read_tokenizer,
    read_weights,
)
from cdlm.masked.checkpoints.llada import LLADA
from cdlm.masked.model import Cache, CachedModel, LayeredModel, at_positions
from cdlm.masked.sampler import Unmasking
from cdlm.models.activations import Watch
from cdlm.models.foreign import read_specs
from cdlm.models.hub import fingerprint_of, to_device
from cdlm.sampling.prompts import Prompt
from cdlm.sampling.session import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLADA, DREAM)}
_PRECISION = 'choose the precision where the model is loaded, cdlm.load(..., precision="bf16")'
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ForeignModel(CachedModel, LayeredModel):
    """A foreign masked model: its network, tokenizer and constants. For inference; logits carry no gradient. An adapter
    of it is trained by `cdlm.masked.checkpoints.tuned`.

    Args:
        network: transformers' model, bidirectional, in evaluation mode.
        length: context of the configuration in tokens; longer rows of text are refused.
        skips_padding: positions are counted over real tokens. Otherwise they are places in the row.
        tokenizer: None if the folder has none.
        folder: where it was loaded from.
        published: how its authors sample it, and `new_tokens` how many tokens they generate; None of an unknown family.
    """

    reads_names = True

    def __init__(
        self,
        network: PreTrainedModel,
        constants: Constants,
        *,
        length: int,
        skips_padding: bool = False,
        tokenizer: PreTrainedTokenizerFast | None = None,
        folder: Path | None = None,
        published: Unmasking | None = None,
        new_tokens: int | None = None,
    ):
        self.network, self.constants, self.length = network, constants, length
        self.skips_padding, self.tokenizer, self.folder = skips_padding, tokenizer, folder
        self.published, self.new_tokens = published, new_tokens
        self.vocab = int(network.config.vocab_size)
        """Rows of the logits; the tokenizer may use fewer."""

    @property
    def defaults(self) -> Sampling:
        """As its authors sample it."""
        return super().defaults if self.published is None else self.published

    @property
    def precision(self) -> str:  # type: ignore[override]  # read off the weights, and not to be set
        return str(self.network.dtype).removeprefix("torch.")

    def tokenizer_for(self, prompts: Sequence[Prompt] | None) -> PreTrainedTokenizerFast:
        return self.need_tokenizer()  # it was trained on text

    def need_fingerprint(self) -> str:
        return self.fingerprint or fingerprint_of(self.network.state_dict())

    def stored_fingerprint(self) -> str:
        return super().stored_fingerprint() if self.folder is None else fingerprint_of(read_weights(self.folder))

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        # Under a device_map, weights that wait in memory for their turn have no device.
        return next(weight.device for weight in self.network.parameters() if not weight.is_meta)

    def to(self, device: str | torch.device) -> ForeignModel:
        """Move the weights. Their precision is fixed when they are loaded, as a cast would spoil the angles too."""
        if not isinstance(device, str | torch.device):
            raise CdlmError(f"the model goes to a device, got {device!r}: {_PRECISION}")
        to_device(self.network, str(device))
        return self

    def half(self) -> NoReturn:
        """Refused, as every cast of the weights."""
        raise CdlmError(f"the weights of {self.name} cannot be cast: {_PRECISION}")

    bfloat16 = float = double = half

    def logits(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        return self._call(tokens, self._places(valid), valid, None, positions)

    def fill(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> tuple[Float[Tensor, "*s v"], Cache]:  # fmt: skip
        layers = [SlotLayer() for _ in range(self.network.config.num_hidden_layers)]
        logits = self._call(tokens, self._places(valid), valid, layers, positions)
        return logits, tuple((layer.keys, layer.values) for layer in layers)

    def partial(
        self,
        tokens: Int[Tensor, "b q"],
        slots: Int[Tensor, "b q"],
        cache: Cache,
        valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:
        places = self._places(valid)
        there = slots if places is None else places.gather(1, slots)
        layers = [SlotLayer(keys, values, slots) for keys, values in cache]
        return self._call(tokens, there, valid, layers, positions)

    @torch.no_grad()
    def hidden(self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        decoder: Any = self.network.get_decoder()
        with Watch({"last": decoder.layers[-1]}).kept(len(tokens)) as found:
            decoder(input_ids=tokens, attention_mask=valid, position_ids=self._places(valid), use_cache=False)
        return found["last"]

    def read(self, hidden: Float[Tensor, "k d"]) -> Float[Tensor, "k v"]:
        decoder: Any = self.network.get_decoder()
        head: Any = self.network.get_output_embeddings()
        logits = head(decoder.norm(hidden))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n e"]:
        vectors: Any = self.network.get_input_embeddings()
        return vectors(tokens)

    def last_block(self) -> nn.Module:
        decoder: Any = self.network.get_decoder()
        return copy.deepcopy(decoder.layers[-1]).requires_grad_(True)

    def through(
        self, block: nn.Module, hidden: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n d"]:
        decoder: Any = self.network.get_decoder()
        places = self._places(valid)
        if places is None:
            places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = None if valid is None else valid[:, None, None, :].expand(-1, 1, valid.shape[1], -1)
        rotary = decoder.rotary_emb(hidden, places)
        return block(hidden, attention_mask=mask, position_embeddings=rotary, is_causal=False)

    def _places(self, valid: Bool[Tensor, "b n"] | None) -> Int[Tensor, "b n"] | None:
        """What queries and keys are rotated by. Dream counts real tokens, with 1 on padding, as it was trained; the
        others count from the first real token. None: places in the row."""
        if valid is None:
            return None
        if self.skips_padding:
            return (valid.cumsum(1) - 1).masked_fill(~valid, 1)
        place = torch.arange(valid.shape[1], device=valid.device)
        return place - valid.long().argmax(1, keepdim=True)

    def logits_with_gradient(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        """As `logits`, for the training of an adapter."""
        return self._run(tokens, self._places(valid), valid, None, positions)

    @torch.no_grad()
    def _call(
        self, tokens: Tensor, places: Tensor | None, valid: Tensor | None, layers: list[SlotLayer] | None,
        positions: Tensor | None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        return self._run(tokens, places, valid, layers, positions)

    def _run(
        self, tokens: Tensor, places: Tensor | None, valid: Tensor | None, layers: list[SlotLayer] | None,
        positions: Tensor | None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        cache = None if layers is None else LibraryCache(layers=list(layers))
        hidden = self.network.get_decoder()(
            input_ids=tokens, attention_mask=valid, position_ids=places, past_key_values=cache, use_cache=False
        ).last_hidden_state
        head = self.network.get_output_embeddings()
        assert head is not None
        logits = head(at_positions(hidden, tokens, positions))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class SlotLayer(CacheLayerMixin):
    """Keys and values `[b, heads, n, head_dim]` of one layer for whole rows; a call for some slots overwrites those.

    Keys are kept as rotated: a slot keeps its position. Without keys the first call fills all slots.
    """

    is_sliding = False

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None, slots: Tensor | None = None):
        super().__init__()
        self.keys, self.values, self.slots = keys, values, slots
        self.is_initialized = keys is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None or self.slots is None:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        place = self.slots.to(key_states.device)[:, None, :, None].expand_as(key_states)
        return self.keys.scatter_(2, place, key_states), self.values.scatter_(2, place, value_states)

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.keys is None else self.keys.shape[2]), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13


def open_checkpoint(
    folder: Path,
    *,
    dtype: Precision | None = None,
    device: str = "cpu",
    device_map: str | Mapping[str, int | str] | None = None,
) -> ForeignModel:
    """Load a LLaDA or Dream checkpoint, in one file or several. No network, no question, no foreign code.

    Args:
        folder: with config.json, safetensors files, and perhaps a tokenizer.
        dtype: of the weights and the arithmetic; by default as in the files, which on the CPU are mapped, not read.
        device: for all of the model, unless there is a device_map.
        device_map: "auto", or names of modules to devices: spread the model by means of accelerate.

    Raises:
        CdlmError: a family that is not known, a setting that the architecture cannot express, tensors that are not
            those of config.json, or a tokenizer without mask or end token.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CdlmError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not (device_map is None or device_map == "auto" or isinstance(device_map, Mapping)):
        raise CdlmError(f"device_map must be auto or a map from modules to devices, got {shown(device_map)}")
    settings = read_settings(folder)
    family = _family(settings)
    check_sizes(settings, family, read_specs(folder))
    network = _built(family, settings)
    rows = int(network.config.vocab_size)
    constants = family.constants(settings, rows)
    tokenizer = read_tokenizer(folder, family, constants, rows)
    constants = family.with_turn(constants, tokenizer)
    constants = replace(constants, stops=read_stops(folder, constants, rows))
    load_weights(network, family, folder, None if dtype is None else DTYPES[dtype])
    if device_map is None:
        to_device(network, device)  # where the values are quickly checked
    check_values(folder, {family.official(name): value for name, value in network.state_dict().items()})
    if device_map is not None:
        network = _spread(network, device_map)
    return ForeignModel(
        network, constants, length=settings.count(family.length), skips_padding=family.skips_padding,
        tokenizer=tokenizer, folder=folder, published=family.sampling, new_tokens=family.new_tokens,
    )  # fmt: skip


def _family(settings: Settings) -> Family:
    kind = settings.values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise settings.wrong("model_type", f"one of {', '.join(FAMILIES)}; other architectures are not known")
    return FAMILIES[kind]


def _built(family: Family, settings: Settings) -> PreTrainedModel:
    try:
        return family.network(settings)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:  # of torch and of transformers
        line = first_line(error)
        raise CdlmError(f"{settings.file} has sizes that no model can have ({line}); copy it again") from error


def _spread(network: PreTrainedModel, device_map: Any) -> PreTrainedModel:
    try:
        accelerate: Any = import_module("accelerate")
    except ImportError as error:
        raise CdlmError("device_map needs the package accelerate: install it, or give a device") from error
    whole = network._no_split_modules
    if device_map == "auto":
        memory = accelerate.utils.get_balanced_memory(network, no_split_module_classes=whole)
        device_map = accelerate.infer_auto_device_map(network, memory, no_split_module_classes=whole)
    try:
        return accelerate.dispatch_model(network, dict(device_map))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition(":")[0]  # what follows is a list of all tensors
        raise CdlmError(f"the device_map cannot be used ({reason}); give another, or auto") from error
