"""A tokenizer and systems small enough for tests."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from cdlm.autoregressive.system import Autoregressive, AutoregressiveModel
from cdlm.continuous.embedding import TokenEmbedding
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.continuous.systems.langflow import LangFlow
from cdlm.continuous.systems.plaid import Plaid
from cdlm.continuous.systems.ssd import SSD
from cdlm.data.tokenizer import train_tokenizer
from cdlm.masked.system import Masked, MaskedDiffusion
from cdlm.models.system import System, SystemConfig
from cdlm.sampling.texts import Special, special_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

S = TypeVar("S", bound=System)

VOCAB = 270
SMALL = {"width": 16, "depth": 2, "heads": 2, "dim": 8}
TEXT = ("the cat sat on the mat.", "the dog saw the cat.", "a bird sang on the roof, and the cat ran.") * 8


@cache
def tokenizer() -> "PreTrainedTokenizerFast":
    return train_tokenizer(TEXT, VOCAB)


def system(vocab: int = 11, seed: int = 0, **settings: Any) -> EmbeddingDiffusion:
    """A fresh float32 system; the global generator stays as it was."""
    return _embedded(CDCD(**{**SMALL, **settings}), vocab, seed)


def plaid(vocab: int = 11, seed: int = 0, **settings: Any) -> EmbeddingDiffusion:
    """A fresh float32 Plaid."""
    return _embedded(Plaid(**{**SMALL, **settings}), vocab, seed)


def ssd(vocab: int = 11, seed: int = 0, **settings: Any) -> EmbeddingDiffusion:
    """A fresh float32 SSD-LM, by default of blocks of three."""
    return _embedded(SSD(**{**SMALL, "block": 3, **settings}), vocab, seed)


def langflow(vocab: int = 11, seed: int = 0, **settings: Any) -> EmbeddingDiffusion:
    """A fresh float32 LangFlow."""
    return _embedded(LangFlow(**{**SMALL, **settings}), vocab, seed)


def weight_of(system: EmbeddingDiffusion) -> torch.nn.Parameter:
    """The free table of a system's embeddings."""
    assert isinstance(system.embedding, TokenEmbedding)
    return system.embedding.weight


def lively(vocab: int = 11, seed: int = 0, **settings: Any) -> EmbeddingDiffusion:
    """A float64 system in which no weight is zero, as after training."""
    return alive(system(vocab, seed, **settings), seed)


def with_tokenizer(seed: int = 0, length: int = 12, **settings: Any) -> EmbeddingDiffusion:
    """A system that samples can be drawn from as texts."""
    return _speaking(system(VOCAB, seed, **settings), length)


def masked(vocab: int = 11, seed: int = 0, **settings: Any) -> MaskedDiffusion:
    """A fresh float32 masked system, whose mask is token 2 and whose texts end with token 0."""
    made = _built(Masked(**{**SMALL, **settings}), vocab, seed, Special(mask_id=2, eos_id=0))
    assert isinstance(made, MaskedDiffusion)
    return made


def lively_masked(vocab: int = 11, seed: int = 0, **settings: Any) -> MaskedDiffusion:
    """A float64 masked system in which no weight is zero, as after training."""
    return alive(masked(vocab, seed, **settings), seed)


def masked_with_tokenizer(seed: int = 0, length: int = 12, **settings: Any) -> MaskedDiffusion:
    """A masked system that samples can be drawn from as texts."""
    made = masked(VOCAB, seed, **settings)
    assert special_of(tokenizer()) == Special(made.constants.mask_id, made.constants.eos_id)
    return _speaking(made, length)


def autoregressive(vocab: int = 11, seed: int = 0, **settings: Any) -> AutoregressiveModel:
    """A fresh float32 autoregressive model, whose texts end with token 0."""
    made = _built(Autoregressive(**{**SMALL, **settings}), vocab, seed, Special(eos_id=0))
    assert isinstance(made, AutoregressiveModel)
    return made


def lively_autoregressive(vocab: int = 11, seed: int = 0, **settings: Any) -> AutoregressiveModel:
    """A float64 autoregressive model in which no weight is zero, as after training."""
    return alive(autoregressive(vocab, seed, **settings), seed)


def autoregressive_with_tokenizer(seed: int = 0, length: int = 12, **settings: Any) -> AutoregressiveModel:
    """An autoregressive model that samples can be drawn from as texts."""
    made = autoregressive(VOCAB, seed, **settings)
    assert special_of(tokenizer()).eos_id == made.eos_id
    return _speaking(made, length)


def _embedded(config: SystemConfig, vocab: int, seed: int) -> EmbeddingDiffusion:
    made = _built(config, vocab, seed)
    assert isinstance(made, EmbeddingDiffusion)
    return made


def _built(config: SystemConfig, vocab: int, seed: int, special: Special | None = None) -> System:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build(vocab, special)


def alive(made: S, seed: int = 0) -> S:
    """The same in float64, with no weight zero, as after training."""
    made = made.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith("schedule"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def loaded(folder: Path) -> EmbeddingDiffusion:
    """The continuous system of a folder, on the CPU."""
    from cdlm.api import load

    made = load(folder, device="cpu")
    assert isinstance(made, EmbeddingDiffusion)
    return made


def _speaking(made: S, length: int) -> S:
    made.tokenizer, made.length = tokenizer(), length
    return made.eval()
