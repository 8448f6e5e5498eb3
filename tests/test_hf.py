"""Decoding inside transformers' `generate`, on tiny bidirectional Llama and Qwen2 of random weights."""

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign import TINY
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
)

import cdlm
from cdlm.core.errors import CdlmError
from cdlm.halting import Full, SchED
from cdlm.hf import HaltedOutput, _withheld, halted
from cdlm.policies.llada import LLaDA
from cdlm.sampling.samples import Samples

# transformers' loop imports a part of torch that uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")

VOCAB, MASK, EOS, PAD, NEW = 40, 39, 35, 0, 8
PROMPTS: tuple[list[int], ...] = ([3, 4, 5, 6, 7], [8, 9], [10, 11, 12])
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
both = pytest.mark.parametrize("kind", sorted(KINDS))


def made(kind: str = "llama", **config: Any) -> PreTrainedModel:
    """A network whose predictions differ from place to place and are rarely sure, in float64."""
    network, settings = KINDS[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD, "is_causal": False}
    torch.manual_seed(1)
    model = network(settings(vocab_size=VOCAB, num_key_value_heads=2, **sizes, **{**special, **config})).eval().double()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(20)
    return model


@cache
def tiny(kind: str = "llama") -> PreTrainedModel:
    return made(kind)


def padded(prompts: Sequence[list[int]]) -> dict[str, Tensor]:
    """Prompts as a tokenizer gives them, padded on the left."""
    width = max(map(len, prompts))
    rows = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"inputs": rows, "attention_mask": mask}


def generated(model: PreTrainedModel, prompts: Sequence[list[int]] = PROMPTS, **settings: Any) -> Tensor:
    """What `generate` adds to the prompts."""
    found = _generate(model, {**padded(prompts), "mask_id": MASK, "max_new_tokens": NEW, **settings})
    assert isinstance(found, Tensor)
    width = max(map(len, prompts))
    assert found[:, :width].tolist() == padded(prompts)["inputs"].tolist()
    return found[:, width:]


def _generate(model: PreTrainedModel, settings: dict[str, Any]) -> Any:
    generate: Any = model.generate
    return generate(custom_generate=halted, **settings)


def decoded(model: PreTrainedModel, constants: cdlm.Constants, **settings: Any) -> Samples:
    """The same prompts given to `cdlm.decode`, with the network as a plain function."""

    def logits(tokens: Tensor, valid: Tensor | None) -> Tensor:
        place = None if valid is None else (valid.cumsum(1) - 1).masked_fill(~valid, 1)
        with torch.no_grad():
            return model(input_ids=tokens, attention_mask=valid, position_ids=place).logits

    return cdlm.decode(logits, PROMPTS, NEW, constants=constants, **settings)


def ended(row: list[int], ends: Sequence[int] = (EOS,), pad: int = PAD) -> list[int]:
    """A row with padding behind its first end."""
    size = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:size] + [pad] * (len(row) - size)


# --- the same text as decode ---

WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"policy": "LLaDA(4, block=4)", "halt": "SchED(4.0, 1.0)"},
    {"policy": "Threshold(0.3)", "halt": "Full()"},
    {"policy": "Dream(5)", "halt": "Entropy(0.5)"},
    {"halt": "JoT(2.0)"},
    {"temperature": 0.8, "seed": 3},
    {"cfg_scale": 1.0},
)


@both
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_generate_gives_the_text_of_decode(kind: str, way: dict[str, Any], shift: bool) -> None:
    model = tiny(kind)
    samples = decoded(model, cdlm.Constants(MASK, EOS, shift=shift), **way)
    assert generated(model, shift=shift, **way).tolist() == [ended(row) for row in samples.tokens[:, -NEW:].tolist()]
    output = _generate(
        model, {**padded(PROMPTS), "mask_id": MASK, "max_new_tokens": NEW, "shift": shift, **way}
        | {"return_dict_in_generate": True},
    )  # fmt: skip
    assert isinstance(output, HaltedOutput)
    assert output.samples is not None
    for name in ("tokens", "nfe", "steps", "settled", "shown"):
        assert getattr(output.samples, name).tolist() == getattr(samples, name).tolist(), name
    assert output.samples.reason == samples.reason
    assert output.samples.made_by["halt"] == samples.made_by["halt"]


def test_the_ways_differ_and_rows_end_within_the_text() -> None:
    texts = [str(generated(tiny(), **way).tolist()) for way in WAYS]
    assert len(set(texts)) > 3
    assert any(EOS in row[:-1] for way in WAYS for row in decoded(tiny(), cdlm.Constants(MASK, EOS), **way).tokens)


@both
@pytest.mark.parametrize("cache", [None, "prefix", "dual", "free"])
def test_a_batch_is_its_rows_one_by_one(kind: str, cache: str | None) -> None:
    # The first row alone: the seed of a row is its number.
    ways: dict[str, Any] = {"policy": "LLaDA(8, block=4)", "halt": "SchED(4.0, 1.0)", "cache": cache}
    whole = generated(tiny(kind), **ways).tolist()
    assert whole == [generated(tiny(kind), [prompt], **ways)[0].tolist() for prompt in PROMPTS]


def test_a_call_keeps_nothing_and_counts_places_of_real_tokens() -> None:
    model, calls = made(), []
    assert model.config.use_cache
    model.get_decoder().register_forward_hook(
        lambda _, args, kwargs, out: calls.append((kwargs, out)), with_kwargs=True
    )
    generated(model, policy="LLaDA(4)")
    assert len(calls) == 4
    for kwargs, out in calls:
        assert out.past_key_values is None
        places = kwargs["position_ids"]
        assert [row[-1] + 1 for row in places.tolist()] == [len(prompt) + NEW for prompt in PROMPTS]


def test_rules_and_policies_are_objects_or_their_texts() -> None:
    texts = generated(tiny(), halt="SchED(4.0, 1.0)", policy="LLaDA(4, block=4)")
    assert texts.tolist() == generated(tiny(), halt=SchED(4.0, 1.0), policy=LLaDA(4, block=4)).tolist()
    assert generated(tiny(), halt=Full()).tolist() == generated(tiny()).tolist()


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_published_checkpoint_is_decoded_as_by_cdlm(family: str) -> None:
    model: Any = cdlm.load(TINY[family], device="cpu")
    constants = model.constants
    found = _generate(
        model.network,
        {"inputs": torch.tensor([[3, 4, 5]]), "mask_id": constants.mask_id, "shift": constants.shift,
         "eos_token_id": list(constants.end_ids), "max_new_tokens": NEW, "pad_token_id": 1},
    )  # fmt: skip
    policy = "Dream()" if constants.shift else "LLaDA()"
    row = cdlm.decode(model, [[3, 4, 5]], NEW, policy=policy, temperature=0.0).tokens[0].tolist()
    assert found[0].tolist() == row[:3] + ended(row[3:], constants.end_ids, 1)


def test_more_samples_of_a_prompt_differ_and_a_seed_repeats_them() -> None:
    drawn = {"do_sample": True, "top_k": 0, "num_return_sequences": 4, "mask_id": MASK, "max_new_tokens": NEW}
    first, again, other = (
        _generate(tiny(), {"inputs": torch.tensor([[3, 4]]), "seed": seed, **drawn}).tolist() for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(map(tuple, first))) > 1
    hotter = _generate(tiny(), {"inputs": torch.tensor([[3, 4]]), "seed": 1, **drawn, "temperature": 30.0}).tolist()
    assert hotter != first
    warm = generated(tiny(), [[3, 4]], seed=1, temperature=1.0)[0].tolist()
    assert first[0][2:] == warm, "do_sample alone is temperature 1"


# --- what is read of the configurations ---


def test_the_mask_may_stand_in_either_config() -> None:
    wanted = generated(tiny()).tolist()
    for place in ("config", "generation_config"):
        model = made()
        getattr(model, place).mask_token_id = MASK
        assert generated(model, mask_id=None).tolist() == wanted


def test_a_length_in_all_is_a_length_less_the_prompt() -> None:
    width = max(map(len, PROMPTS))
    assert generated(tiny(), max_new_tokens=None, max_length=width + NEW).tolist() == generated(tiny()).tolist()


def test_every_end_ends_a_text_and_without_padding_the_end_is_it() -> None:
    raw = generated(tiny(), eos_token_id=None).tolist()
    other = raw[0][3]
    for ends in ([MASK - 1, other], [MASK - 1, MASK - 2, other]):
        found = generated(tiny(), eos_token_id=ends, pad_token_id=1).tolist()
        assert found == [ended(row, ends, 1) for row in raw]
        assert 1 in found[0]
    model = made(pad_token_id=None)
    assert generated(model, eos_token_id=other)[0].tolist() == ended(raw[0], (other,), other)


# --- streaming ---


class Heard:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[Tensor] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert not self.ends
        self.said.append(value)

    def end(self) -> None:
        self.ends += 1


class Drafted(Heard):
    """One that takes drafts too."""

    def __init__(self) -> None:
        super().__init__()
        self.drafts: list[tuple[int, Tensor]] = []

    def put_draft(self, value: Tensor) -> None:
        assert not self.ends
        self.drafts.append((sum(part.shape[1] for part in self.said[1:]), value))


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=len)
@pytest.mark.parametrize("way", WAYS[:5], ids=str)
def test_a_streamer_hears_the_text_once_and_in_order(prompts: Sequence[list[int]], way: dict[str, Any]) -> None:
    quiet = generated(tiny(), prompts, **way)
    for streamer in (Heard(), Drafted()):
        assert generated(tiny(), prompts, streamer=streamer, **way).tolist() == quiet.tolist()
        assert streamer.said[0].tolist() == padded(prompts)["inputs"].tolist()
        text = torch.cat(streamer.said[1:], 1).tolist()
        size = max(len(ended(row, pad=-1)) - ended(row, pad=-1).count(-1) for row in quiet.tolist())
        assert text == quiet[:, :size].tolist(), "all up to the last end, and no mask"
        assert streamer.ends == 1


def test_a_draft_is_the_rest_without_masks() -> None:
    streamer = Drafted()
    quiet = generated(tiny(), streamer=streamer, policy="LLaDA(8)", eos_token_id=None)
    assert len(streamer.drafts) > 1
    for sent, draft in streamer.drafts:
        assert draft.shape == (len(PROMPTS), NEW - sent)
        assert MASK not in draft
    assert any(draft.tolist() != quiet[:, sent:].tolist() for sent, draft in streamer.drafts)
    cached = Drafted()
    generated(tiny(), streamer=cached, policy="LLaDA(8, block=4)", cache="dual", eos_token_id=None)
    assert any(MASK in draft for _, draft in cached.drafts), "calls of a block say nothing of the rest"


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of one word a token."""
    plain = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w2", pad_token="w0")


@pytest.mark.parametrize("kind", [TextStreamer, TextDiffusionStreamer])
def test_transformers_own_streamers_print_the_text(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, prompt = words(), torch.tensor([PROMPTS[0]])
    settings = {"inputs": prompt, "mask_id": MASK, "max_new_tokens": NEW, "policy": "LLaDA(8)", "halt": "Full()"}
    for skip in (False, True):
        found = _generate(tiny(), {**settings, "streamer": kind(tokenizer, skip_prompt=skip)})[0]
        printed = capsys.readouterr().out
        if kind is TextDiffusionStreamer:  # a draft is coloured, and wiped out
            printed = "".join(part.split("\0338\033[J")[-1] for part in printed.split("\0337"))
        text = [token for token in found.tolist()[len(PROMPTS[0]) if skip else 0 :] if token != PAD]
        assert text[-1] == EOS
        assert printed.rstrip("\n") == tokenizer.decode(text)


def test_a_streamer_that_is_read_elsewhere_comes_to_its_end() -> None:
    streamer = TextIteratorStreamer(words(), skip_prompt=True, timeout=10)
    found = generated(tiny(), PROMPTS[:1], streamer=streamer)
    assert "".join(streamer) == words().decode(found[0][found[0] != PAD])


def test_what_generate_withholds_is_read_from_its_call_alone() -> None:
    streamer, seen = Heard(), []

    def function(model: Any, input_ids: Tensor, streamer: Any = None, **inputs: Any) -> Tensor:
        seen.append((streamer, _withheld("streamer"), _withheld("assistant_model")))
        return input_ids

    generate: Any = tiny().generate
    generate(torch.tensor([[3]]), custom_generate=function, max_new_tokens=1, streamer=streamer)
    # When this fails because transformers hands the streamer on: `_withheld` is needed for assistant_model alone.
    assert seen == [(None, streamer, None)]
    assert _withheld("streamer") is None


# --- what is refused ---

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "no beam search"),
    "contrastive": ({"penalty_alpha": 0.5, "top_k": 4}, "no contrastive search"),
    "look-up": ({"prompt_lookup_num_tokens": 2}, "no assisted generation"),
    "top_k": ({"do_sample": True}, "got TopKLogitsWarper.* top_k=0"),
    "top_p": ({"do_sample": True, "top_k": 0, "top_p": 0.5}, "got TopPLogitsWarper.* top_p=1.0"),
    "repetition": ({"repetition_penalty": 1.3}, "got RepetitionPenaltyLogitsProcessor"),
    "fewest": ({"min_new_tokens": 3}, "got MinLengthLogitsProcessor"),
    "guidance": ({"guidance_scale": 2.0}, "give cfg_scale"),
    "time": ({"max_time": 3.0}, "no stopping criterion, got MaxTimeCriteria"),
    "scores": ({"output_scores": True}, "nothing of output_scores"),
    "right padding": ({"attention_mask": padded(PROMPTS)["attention_mask"].flip(1)}, "padding_side"),
    "holes": ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]] * 3)}, "zeros after ones"),
    "another shape": (
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]] * 3)},
        r"shape \[3, 6\] and the prompts \[3, 5\]",
    ),
    "no mask": ({"mask_id": None}, "give mask_id=tokenizer.mask_token_id"),
    "mask of no model": ({"mask_id": VOCAB}, "token 40 is the mask or an end, and the model has 40 tokens"),
    "mask that ends": ({"mask_id": EOS}, "eos_id and mask_id are both 35"),
    "prompt with a mask": ({"mask_id": 4}, "a prompt holds the mask, token 4"),
    "no policy": ({"policy": "Treshold(0.9)"}, "did you mean Threshold"),
    "calibrated": ({"halt": "auto"}, "give a rule"),
    "seed": ({"seed": -1}, "seed >= 0, got -1"),
    "half a streamer": ({"streamer": SimpleNamespace(put=print)}, "a streamer has put and end"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_done_is_refused_in_one_line(name: str) -> None:
    settings, said = REFUSED[name]
    with pytest.raises(CdlmError, match=said) as caught:
        generated(tiny(), **settings)
    assert "\n" not in str(caught.value)


def test_embeddings_and_what_else_a_network_takes_are_refused() -> None:
    with pytest.raises(CdlmError, match="nothing of inputs_embeds: leave it out"):
        _generate(tiny(), {"inputs_embeds": torch.zeros(1, 2, 32), "mask_id": MASK, "max_new_tokens": NEW})
    with pytest.raises(CdlmError, match="nothing of labels: leave it out"):
        generated(tiny(), PROMPTS[:1], labels=torch.tensor([[1]]))


def test_a_second_model_is_refused_though_generate_does_not_hand_it_on() -> None:
    with pytest.raises(CdlmError, match="no assisted generation"):
        generated(tiny(), PROMPTS[:1], assistant_model=tiny("qwen2"))


def test_a_model_that_looks_to_the_left_alone_is_refused_with_advice(tmp_path: Path) -> None:
    model = made(is_causal=True)
    with pytest.raises(CdlmError, match=r"set model.config.is_causal = False") as caught:
        generated(model)
    assert "\n" not in str(caught.value)
    model.config.is_causal = False
    assert generated(model).tolist() == generated(tiny()).tolist()
    model.save_pretrained(tmp_path)
    loaded = KINDS["llama"][0].from_pretrained(tmp_path, dtype=torch.float64)
    assert generated(loaded).tolist() == generated(tiny()).tolist(), "the config that is saved says so too"
    with pytest.raises(CdlmError, match=r"call model.eval\(\)"):
        generated(made().train())


def test_a_misspelt_setting_is_refused_by_generate_itself() -> None:
    with pytest.raises(ValueError, match="hallt"):
        generated(tiny(), hallt="Full()")


def test_cdlm_alone_does_not_load_it() -> None:
    code = "import sys, cdlm; sys.exit('cdlm.hf' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
