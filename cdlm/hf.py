"""Decoding inside transformers' own `generate`: any of its decoders that attends both ways, and no code of the Hub."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.utils.generic import ModelOutput

from cdlm.api import open_session, with_halt
from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError
from cdlm.core.types import Constants, LoopStep
from cdlm.halting import Criterion
from cdlm.masked.checkpoints.model import FAMILIES, ForeignModel
from cdlm.masked.sampler import CacheKind
from cdlm.policies.policy import Policy
from cdlm.sampling.requests import canvases
from cdlm.sampling.samples import Samples, collect

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

NOT_READ = {"attention_mask", "past_key_values", "use_cache", "logits_to_keep", "position_ids"}
"""Inputs that `generate` makes for the network: all but the first say how to continue from the left."""
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class HaltedOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences: tokens [b, prompt + new].
        samples: the run: calls of each row, why it ended, tokens per forward.
    """

    sequences: Tensor | None = None
    samples: Samples | None = None


@torch.no_grad()
def halted(
    model: PreTrainedModel, input_ids: Int[Tensor, "b k"], generation_config: GenerationConfig,
    logits_processor: Sequence[Any] | None = None, stopping_criteria: Sequence[Any] | None = None,
    streamer: BaseStreamer | None = None, *, halt: str | Criterion | None = None, policy: str | Policy | None = None,
    mask_id: int | None = None, shift: bool | None = None, temperature: float | None = None,
    cfg_scale: float | None = None, cache: CacheKind | None = None, seed: int = 0, **inputs: Any,
) -> Int[Tensor, "b n"] | HaltedOutput:  # fmt: skip
    """Decode as a masked model: `model.generate(ids, custom_generate=cdlm.hf.halted, max_new_tokens=64, halt=...)`.

    `generate` gives what stands before `halt`; the rest are further arguments of `generate`. The text is that of
    `cdlm.decode` with the same network; what follows the first end of a row is padding, as `generate` has it.

    Args:
        model: one of transformers' decoders, such as Llama or Qwen2, with `config.is_causal = False`.
        input_ids: prompts, padded on the left.
        generation_config: `max_new_tokens`, `eos_token_id` (one or more), `pad_token_id` and
            `return_dict_in_generate` are read, and `do_sample`.
        streamer: gets what is final: of each row all up to its first open position. Where it has `put_draft`, that gets
            the rest as it stands, with the likeliest token at open positions.
        halt: a halting rule, as an object or as its text.
        policy: which positions a step commits; by default one, as `cdlm.decode`.
        mask_id: the token of the mask; by default `mask_token_id` of the generation config or of the model's.
        shift: the logits at position i - 1 predict token i, as in Dream; by default what is known of the model type.
        temperature: 0 takes the likeliest token; by default as `cdlm.decode`, and with `do_sample` 1.
        cfg_scale, cache: see `cdlm.Unmasking`.
        seed: with the number of a row it fixes what is drawn for it.

    Raises:
        CdlmError: the model attends to the left alone, its mask is not known, padding stands elsewhere, or `generate`
            was asked for what this cannot do.
    """
    streamer = _withheld("streamer") if streamer is None else streamer
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise CdlmError(f"a streamer has put and end, such as transformers' TextStreamer, got {shown(streamer)}")
    _check(model, generation_config, logits_processor or (), stopping_criteria or (), inputs)
    real = _real(input_ids, inputs.get("attention_mask"))
    most, length = generation_config.max_length or 0, generation_config.max_new_tokens
    length = most - input_ids.shape[1] if length is None else length
    requests = canvases([row[there].tolist() for row, there in zip(input_ids, real, strict=True)], length)
    masked = _masked(model, _constants(model, generation_config, mask_id, shift))
    if temperature is None and generation_config.do_sample:
        temperature = 1.0
    settings = {"policy": policy, "temperature": temperature, "cfg_scale": cfg_scale, "cache": cache}
    session = with_halt(open_session(masked, seed=seed, batch_size=len(requests), **settings), halt, requests)
    drafts = hasattr(streamer, "put_draft") and cache is None  # calls of a part of the row say nothing of the rest
    options = replace(session.options, record=frozenset({"tokens"} if drafts else ()))
    loop = session.sampling.loop(masked, options, len(requests))
    cut = partial(_cut, constants=masked.constants, pad_id=generation_config.pad_token_id)
    steps = loop.steps(requests)
    if streamer is not None:
        steps = _streamed(steps, streamer, torch.full((len(requests), length), masked.mask_id), masked.mask_id, cut)
    budget, ends = loop.budget(requests), masked.end_ids
    samples = collect(steps, requests, None, budget=budget, seed=seed, mask_id=masked.mask_id, end_ids=ends)
    text = cut(torch.from_numpy(samples.tokens[:, -length:])).tokens
    sequences = torch.cat([input_ids, text.to(input_ids.device)], 1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return HaltedOutput(sequences, replace(samples, made_by=session.description))


class _Cut(NamedTuple):
    tokens: Int[Tensor, "b m"]
    """With padding behind the first end of each row."""
    final: Int[Tensor, " b"]
    """How many of each row are final: those before its first mask, and all of a row whose text has ended."""
    size: Int[Tensor, " b"]
    """How many of each row are no padding."""


def _cut(tokens: Int[Tensor, "b m"], constants: Constants, pad_id: int | None) -> _Cut:
    """Rows up to their ends. Without a token for padding the end itself is it, as in `generate`."""
    ends, before = constants.end_ids, (tokens == constants.mask_id).cumsum(1) == 0
    end = torch.isin(tokens, torch.tensor(ends, dtype=torch.int64)) & before
    after = (end.cumsum(1) - end.long()) > 0
    padding = ends[0] if ends and pad_id is None else pad_id or 0
    return _Cut(tokens.masked_fill(after, padding), (before | after).sum(1), (~after).sum(1))


def _streamed(
    steps: Iterable[LoopStep], streamer: Any, canvas: Int[Tensor, "b m"], mask_id: int, cut: Callable[[Tensor], _Cut]
) -> Iterator[LoopStep]:
    """The same steps, told to a streamer: columns that are final in every row, each once and in order, then a draft of
    the others.

    Args:
        canvas: what is generated, all masks; written into.
    """
    sent, draft, length = 0, canvas.clone(), canvas.shape[1]
    for step in steps:
        assert step.canvas is not None
        row, now = step.state.row.cpu(), step.canvas[:, -length:].cpu()
        likely = step.state.signals.get("tokens", step.canvas)[:, -length:].cpu()
        draft[row] = torch.where(now == mask_id, likely, now)
        canvas[row] = now
        found = cut(canvas)
        final = int(torch.minimum(found.final.min(), found.size.max()))
        if final > sent:
            streamer.put(found.tokens[:, sent:final])
            sent = final
        if hasattr(streamer, "put_draft") and sent < int(found.size.max()):
            streamer.put_draft(cut(draft).tokens[:, sent:])
        yield step
    streamer.end()


def _masked(model: PreTrainedModel, constants: Constants) -> ForeignModel:
    length = getattr(model.config, "max_position_embeddings", 0)
    return ForeignModel(model, constants, length=length, skips_padding=True)


def _constants(model: PreTrainedModel, config: GenerationConfig, mask_id: int | None, shift: bool | None) -> Constants:
    """Mask and ends, checked to be tokens of the model."""
    known = (mask_id, *(getattr(where, "mask_token_id", None) for where in (config, model.config)))
    mask = next((found for found in known if found is not None), None)
    if mask is None:
        raise CdlmError(
            "which token is the mask is not known: give mask_id=tokenizer.mask_token_id or another number, or set"
            " model.generation_config.mask_token_id"
        )
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if shift is None:
        family = FAMILIES.get(model.config.model_type)
        shift = family is not None and family.released.shift
    constants = Constants(mask, *ends[:2], shift=shift, stops=tuple(ends[2:]))
    for token in (constants.mask_id, *constants.end_ids):
        if token >= model.config.vocab_size:
            raise CdlmError(f"token {token} is the mask or an end, and the model has {model.config.vocab_size} tokens")
    return constants


def _real(input_ids: Int[Tensor, "b k"], mask: Tensor | None) -> Bool[Tensor, "b k"]:
    """What is no padding; `generate` leaves out a mask of ones.

    Raises:
        CdlmError: padding does not stand on the left alone.
    """
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    real = mask.bool()
    if real.shape != input_ids.shape:
        raise CdlmError(f"the attention mask has shape {list(mask.shape)} and the prompts {list(input_ids.shape)}")
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise CdlmError(
            'padding must stand on the left, and the attention mask has zeros after ones: set padding_side="left" of'
            " the tokenizer"
        )
    return real


def _check(
    model: PreTrainedModel, config: GenerationConfig, processors: Sequence[Any], criteria: Sequence[Any],
    inputs: Mapping[str, Any],
) -> None:  # fmt: skip
    """Raise for what `generate` takes and decoding here would not obey."""
    if getattr(model.config, "is_causal", True) is not False:
        raise CdlmError(
            "this model attends to the left alone, and a masked model attends both ways: if it was trained for that,"
            " set model.config.is_causal = False"
        )
    if model.training:
        raise CdlmError("the model is in training mode: call model.eval()")
    mode = config.get_generation_mode(_withheld("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise CdlmError(
            f"halted does no {mode.value.replace('_', ' ')}, it decodes all positions together: leave out the arguments"
            " of generate, or of its config, that ask for it"
        )
    allowed = (MaxLengthCriteria, EosTokenCriteria)  # `generate` makes these itself
    for kind, found in (
        ("logits processor", processors),
        ("stopping criterion", [one for one in criteria if type(one) not in allowed]),
    ):
        if found:
            raise CdlmError(
                f"halted applies no {kind}, got {type(found[0]).__name__}: switch off what asks for it"
                f"{HINTS.get(type(found[0]).__name__, '')}"
            )
    asked = [name for name in OUTPUTS if getattr(config, name, False)]
    asked += sorted(
        name for name, value in inputs.items() if name not in NOT_READ and value is not None and value is not False
    )
    if asked:
        raise CdlmError(f"halted knows nothing of {', '.join(asked)}: leave it out")


HINTS = {
    "TopKLogitsWarper": ", with top_k=0 (do_sample asks for 50)",
    "TopPLogitsWarper": ", with top_p=1.0",
    "TemperatureLogitsWarper": ", and give temperature to generate",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": ", and give cfg_scale",
}
"""What to do about some of them."""


def _withheld(name: str) -> Any:
    """An argument of `generate` that it does not hand on to a function of ours, and would drop in silence (transformers
    5.23): it is read where it was given. None if there is none, or `generate` did not call."""
    generate: Any = GenerationMixin.__dict__["generate"]
    code, frame = inspect.unwrap(generate).__code__, inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get(name)
