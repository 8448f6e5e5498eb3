"""A llama of one layer in a GGUF file, with one token a byte: it stands in for a neutral judge."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, HEADS, INNER = 32, 2, 32


def tiny_llama() -> LlamaForCausalLM:
    """The model that the file holds."""
    config = LlamaConfig(
        vocab_size=258, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-6,
        initializer_range=0.4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers.0": "blk.0",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """Of a tensor."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def rotated(weight: np.ndarray) -> np.ndarray:
    """Queries and keys in the order of llama.cpp, which pairs neighbours where transformers pairs the two halves."""
    return weight.reshape(HEADS, 2, -1, WIDTH).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, architecture: str = "llama") -> Path:
    """Write the model; another architecture than llama is a name alone."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(258)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|endoftext|>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    writer.add_bos_token_id(257)
    for name, tensor in tiny_llama().state_dict().items():
        if name != "lm_head.weight":
            turns = any(part in name for part in ("q_proj", "k_proj"))
            writer.add_tensor(gguf_name(name), rotated(tensor.numpy()) if turns else tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
