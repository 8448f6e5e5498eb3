"""A tokenizer and systems small enough for tests."""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from cdlm.continuous.cdcd import CDCD
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.data.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB = 270
TEXT = ("the cat sat on the mat.", "the dog saw the cat.", "a bird sang on the roof, and the cat ran.") * 8


@cache
def tokenizer() -> "PreTrainedTokenizerFast":
    return train_tokenizer(TEXT, VOCAB)


def system(vocab: int = 11, seed: int = 0, **settings: Any) -> EmbeddingDiffusion:
    """A fresh float32 system; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CDCD(**{"width": 16, "depth": 2, "heads": 2, "dim": 8, **settings}).build(vocab)


def lively(vocab: int = 11, seed: int = 0, **settings: Any) -> EmbeddingDiffusion:
    """A float64 system in which no weight is zero, as after training."""
    made = system(vocab, seed, **settings).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith("schedule"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def with_tokenizer(seed: int = 0, length: int = 12, **settings: Any) -> EmbeddingDiffusion:
    """A system that samples can be drawn from as texts."""
    made = system(VOCAB, seed, **settings)
    made.tokenizer, made.length = tokenizer(), length
    return made.eval()
