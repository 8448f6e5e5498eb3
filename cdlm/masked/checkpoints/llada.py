"""LLaDA (arXiv 2502.09992) as transformers' Llama: names, configuration, constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from cdlm.core.types import Constants
from cdlm.masked.checkpoints.family import BIDIRECTIONAL, Family, Settings
from cdlm.masked.sampler import Unmasking
from cdlm.policies.llada import LLaDA

ONLY: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),  # null: as include_bias
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "alibi": (False,),
    "rope": (True,),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}
"""What Llama can express. LLaDA's own defaults are mostly others, so absent fields are refused too."""

TOP = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def official(name: str) -> str:
    """LLaDA's name of a tensor of Llama."""
    if name in TOP:
        return TOP[name]
    layer, leaf = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"model.transformer.blocks.{layer}.{BLOCK[leaf]}.weight"


def config(settings: Settings) -> LlamaConfig:
    """LLaDA's settings in Llama's words.

    Raises:
        CdlmError: Llama cannot express them.
    """
    settings.allow("Llama", ONLY)
    width, heads = settings.count("d_model"), settings.count("n_heads")
    one = settings.flag("multi_query_attention", False)
    wide = settings.has("mlp_hidden_size")
    return LlamaConfig(
        vocab_size=settings.count("embedding_size" if settings.has("embedding_size") else "vocab_size"),
        hidden_size=width,
        intermediate_size=settings.count("mlp_hidden_size") if wide else settings.count("mlp_ratio") * width,
        num_hidden_layers=settings.count("n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=settings.groups("d_model", "n_heads", "n_kv_heads", 1 if one else heads),
        max_position_embeddings=settings.count("max_sequence_length"),
        rms_norm_eps=settings.number("rms_norm_eps"),
        rope_parameters={"rope_type": "default", "rope_theta": settings.number("rope_theta")},
        tie_word_embeddings=settings.flag("weight_tying", True),
        **BIDIRECTIONAL,
    )


class Float32Angles(LlamaRotaryEmbedding):
    """Cosines and sines in float32, whatever the precision of the model."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.new_empty(0, dtype=torch.float32), position_ids)


class Float32Rotation(LlamaAttention):
    """Rotates queries and keys in float32 and then returns to the precision of the model, as LLaDA does.

    Llama rotates in the precision of the model, which in bfloat16 moves logits by up to a fifth of their spread.
    """

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        assert position_embeddings is not None
        projections = (self.q_proj, self.k_proj, self.v_proj)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        q, k = (x.to(v.dtype) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(str(self.config._attn_implementation), eager_attention_forward)
        seen, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(seen.flatten(2)), weights


def network(settings: Settings) -> LlamaForCausalLM:
    """Bidirectional Llama without memory for its weights."""
    wanted, full = config(settings), settings.flag("rope_full_precision", True)
    with torch.device("meta"):
        llama = LlamaForCausalLM(wanted)
        for index, layer in enumerate(llama.model.layers if full else ()):
            layer.self_attn = Float32Rotation(wanted, index)
    llama.model.rotary_emb = Float32Angles(wanted) if full else LlamaRotaryEmbedding(wanted)
    return llama


LLADA = Family(
    model_type="llada",
    network=network,
    official=official,
    released=Constants(mask_id=126336, eos_id=126081, eot_id=126348),
    length="max_sequence_length",
    layers="n_layers",
    width="d_model",
    skips_padding=False,
    tokenizer=PreTrainedTokenizerFast,
    tokenizer_files=(("tokenizer.json",),),
    turn_end="<|eot_id|>",
    sampling=Unmasking(LLaDA(), temperature=0.0),
    new_tokens=128,
)
