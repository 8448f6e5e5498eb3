"""Tiny foreign checkpoints in the official formats: golden folders to copy and break, random ones of any size."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cdlm.masked.checkpoints.family import Settings
from cdlm.masked.checkpoints.model import FAMILIES

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
TINY = {"llada": GOLDEN / "llada_tiny", "Dream": GOLDEN / "dream_tiny"}

TEXT = "the cat sat on the mat, the dog sat by the door. "
SPECIAL = {
    "llada": {120: "<|endoftext|>", 121: "<|startoftext|>", 122: "<|start_header_id|>", 123: "<|end_header_id|>",
              124: "<|eot_id|>", 125: "<|reserved|>", 126: "<|mdm_mask|>"},
    "Dream": {120: "<|endoftext|>", 121: "<|a|>", 122: "<|b|>", 123: "<|c|>", 124: "<|im_start|>", 125: "<|im_end|>",
              126: "<|mask|>", 127: "<|beginoftext|>"},
}  # fmt: skip
TEMPLATE = {
    "llada": "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>"
    "{% endfor %}<|start_header_id|>assistant<|end_header_id|>",
    "Dream": "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}",
}


def copy_of(family: str, folder: Path, **override: Any) -> Path:
    """A copy of the tiny golden checkpoint, with fields of its config.json replaced."""
    shutil.copytree(TINY[family], folder, dirs_exist_ok=True)
    edit(folder / "config.json", **override)
    return folder


def edit(file: Path, **override: Any) -> None:
    """Replace fields of a JSON object; `...` removes one."""
    values = json.loads(file.read_text()) | override
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def random_checkpoint(
    folder: Path,
    family: str,
    override: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The tiny configuration with some fields replaced, and random weights that fit it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TINY[family] / "config.json", folder)
    edit(folder / "config.json", **(override or {}))
    settings = Settings(folder / "config.json", json.loads((folder / "config.json").read_text()))
    network = FAMILIES[family].network(settings)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        FAMILIES[family].official(name): _random(tuple(value.shape), generator).to(dtype)
        for name, value in network.state_dict().items()
        if not (name == "lm_head.weight" and network.config.tie_word_embeddings)
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) / shape[1] ** 0.5


def write_tokenizer(folder: Path, family: str, **override: Any) -> None:
    """Tokenizer files in the family's own form, for its tiny checkpoint: 120 words, then special tokens.

    LLaDA's tokenizer_config.json does not say which token is the mask. Dream's names a class of its own, whose file
    is absent.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([TEXT] * 5, trainers.BpeTrainer(vocab_size=100, show_progress=False))
    state = json.loads(bpe.to_str())
    words = state["model"]["vocab"]
    words |= {f"<unused {i}>": i for i in range(len(words), 120)}
    style = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {i: {"content": content, **style} for i, content in SPECIAL[family].items()}
    config = {"added_tokens_decoder": added, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config |= {"chat_template": TEMPLATE[family]}
    if family == "llada":
        state["added_tokens"] = [{"id": i, **token} for i, token in added.items()]
        (folder / "tokenizer.json").write_text(json.dumps(state))
        config |= {"bos_token": "<|startoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        (folder / "vocab.json").write_text(json.dumps(words))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        config |= {"bos_token": "<|beginoftext|>", "mask_token": "<|mask|>", "tokenizer_class": "DreamTokenizer"}
        config |= {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    edit(folder / "tokenizer_config.json", **override)
