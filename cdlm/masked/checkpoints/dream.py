"""Dream (arXiv 2508.15487) as transformers' Qwen2: configuration and constants. The tensors have Qwen2's names."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from cdlm.core.types import Constants
from cdlm.masked.checkpoints.family import BIDIRECTIONAL, Family, Settings
from cdlm.masked.sampler import Unmasking
from cdlm.policies.dream import Dream

ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
}
"""What bidirectional Qwen2 can express of a Dream configuration."""


def config(settings: Settings) -> Qwen2Config:
    """Dream's settings in Qwen2's words, which are mostly the same.

    Raises:
        CdlmError: Qwen2 cannot express them.
    """
    settings.allow("Qwen2", ONLY)
    heads = settings.count("num_attention_heads")
    return Qwen2Config(
        vocab_size=settings.count("vocab_size"),
        hidden_size=settings.count("hidden_size"),
        intermediate_size=settings.count("intermediate_size"),
        num_hidden_layers=settings.count("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=settings.groups("hidden_size", "num_attention_heads", "num_key_value_heads", heads),
        max_position_embeddings=settings.count("max_position_embeddings"),
        rms_norm_eps=settings.number("rms_norm_eps"),
        rope_parameters={"rope_type": "default", "rope_theta": settings.number("rope_theta")},
        tie_word_embeddings=settings.flag("tie_word_embeddings", False),
        use_sliding_window=False,
        **BIDIRECTIONAL,
    )


def network(settings: Settings) -> Qwen2ForCausalLM:
    """Bidirectional Qwen2 without memory for its weights."""
    wanted = config(settings)
    with torch.device("meta"):
        qwen = Qwen2ForCausalLM(wanted)
    qwen.model.rotary_emb = Qwen2RotaryEmbedding(wanted)
    return qwen


DREAM = Family(
    model_type="Dream",
    network=network,
    official=str,
    released=Constants(mask_id=151666, eos_id=151643, eot_id=151645, shift=True),
    length="max_position_embeddings",
    layers="num_hidden_layers",
    width="hidden_size",
    skips_padding=True,
    tokenizer=Qwen2Tokenizer,
    tokenizer_files=(("tokenizer.json",), ("vocab.json", "merges.txt")),
    turn_end="<|im_end|>",
    sampling=Unmasking(Dream(alg="entropy", top_p=0.95), temperature=0.2),
    new_tokens=512,
)
