"""Systems with random weights: what they cost does not depend on what they have learned."""

from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.sampling.session import Model


def untrained(settings: CDCD, vocab: int, length: int, seed: int = 0) -> EmbeddingDiffusion:
    """A system over the made-up words w0, w1, ..., ready to sample from."""
    torch.manual_seed(seed)
    system = settings.build(vocab).eval()
    words = {f"w{i}": i for i in range(vocab)}
    system.length = length
    system.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w0", unk_token="w0"
    )
    return system


def parameters(model: Model) -> str:
    """The number of weights, in millions."""
    network: Any = model
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters"
