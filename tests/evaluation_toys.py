"""A toy corpus with word order in it, a byte-level tokenizer, and a judge trained on it in seconds."""

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from cdlm.evaluation.judge import Judge
from cdlm.evaluation.small_judge import JudgeSize, train_judge

LENGTH = 32


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, no merges and no special tokens: 256 tokens, offsets that are easy to reason about."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def tiny_gpt2(seed: int = 0, **changes: int) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2} | changes
    config = GPT2Config(bos_token_id=None, eos_token_id=None, initializer_range=0.4)  # far from uniform
    config.update(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def random_judge(seed: int = 0, **changes: int) -> Judge:
    return Judge(tiny_gpt2(seed, **changes), byte_tokenizer(), "random")


def judge_on(device: str) -> Judge:
    """The same on a device, as processes open it."""
    return replace(random_judge(), device=device)


def numpy_state() -> list[int]:
    """Of the global generator, to show that it stayed as it was."""
    return np.random.get_state(legacy=False)["state"]["key"].tolist()


def sentences(count: int, seed: int) -> list[str]:
    """Subject, verb, object: easy to learn, wrecked by shuffling."""
    draw = np.random.default_rng(seed)
    parts = (["the cat", "a dog", "my aunt"], ["sees", "likes", "finds"], ["the sea.", "a tree.", "old books."])
    return [" ".join(part[draw.integers(3)] for part in parts) for _ in range(count)]


def passages(count: int, seed: int) -> list[str]:
    """Four sentences each, a line apiece: so many that two draws hardly share any."""
    lines = sentences(4 * count, seed)
    return ["\n".join(lines[4 * i : 4 * i + 4]) for i in range(count)]


def packed_rows(texts: list[str], batch: int = 16, seed: int = 0) -> Iterator[torch.Tensor]:
    ids = torch.tensor(byte_tokenizer()("\n".join(texts))["input_ids"])
    draw = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - LENGTH, (batch,), generator=draw)
        yield torch.stack([ids[s : s + LENGTH] for s in starts.tolist()])


@functools.cache
def trained_judge() -> Judge:
    rows = packed_rows(sentences(500, seed=1))
    return train_judge(rows, byte_tokenizer(), size=JudgeSize(32, 2, 2), length=LENGTH, steps=150, lr=1e-2, seed=0)
