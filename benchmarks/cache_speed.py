"""Is decoding with a cache faster than without?

Decodes one prompt of 512 tokens and 256 positions in blocks of 32 with a Llama of random weights, without a cache and
with each kind, and divides the wall times. Outputs without a cache are checked to be those of the plain function.

    python benchmarks/cache_speed.py                    # 20 M parameters
    python benchmarks/cache_speed.py --width 128 --depth 4 --prompt 64 --length 64
"""

import argparse
import time
from typing import get_args

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cdlm
from cdlm.masked.checkpoints.family import BIDIRECTIONAL
from cdlm.masked.checkpoints.model import ForeignModel
from cdlm.masked.model import Constants
from cdlm.masked.sampler import CacheKind
from cdlm.sampling.samples import Samples


def model(width: int, depth: int, vocab: int, length: int) -> ForeignModel:
    """A bidirectional Llama of random weights; its mask is the last token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=6, num_key_value_heads=6,
        intermediate_size=8 * width // 3, vocab_size=vocab, max_position_embeddings=length, **BIDIRECTIONAL,
    )  # fmt: skip
    network = LlamaForCausalLM(config).eval().requires_grad_(False)
    return ForeignModel(network, Constants(vocab - 1, 0), length=length)


def timed(
    made: ForeignModel, prompt: list[int], args: argparse.Namespace, cache: CacheKind | None
) -> tuple[float, Samples]:
    """Seconds of one run, and its samples."""
    start = time.perf_counter()
    policy = f"LLaDA({args.steps}, block={args.block})"
    samples = cdlm.decode(made, [prompt], args.length, policy=policy, cache=cache)
    return time.perf_counter() - start, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 384, "depth": 8, "vocab": 8192, "prompt": 512, "length": 256, "block": 32,
                        "steps": 64, "threads": 1}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = model(args.width, args.depth, args.vocab, args.prompt + args.length)
    prompt = torch.randint(1, args.vocab - 1, (args.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    size = sum(p.numel() for p in made.network.parameters()) / 1e6
    print(f"{size:.1f} M parameters, prompt {args.prompt}, length {args.length}, {args.steps} steps,"
          f" blocks of {args.block}, {args.threads} thread")  # fmt: skip
    cdlm.decode(made, [prompt], args.block, policy="LLaDA(1)")  # warm up
    base, plain = timed(made, prompt, args, None)
    function = cdlm.decode(
        lambda tokens, valid: made.logits(tokens, valid), [prompt], args.length, constants=made.constants,
        policy=f"LLaDA({args.steps}, block={args.block})",
    )  # fmt: skip
    assert (function.tokens == plain.tokens).all()
    print(f"{'no cache':10} {base:7.1f} s   1.00")
    for cache in get_args(CacheKind):
        seconds, samples = timed(made, prompt, args, cache)
        same = (samples.tokens == plain.tokens).mean()
        print(f"{cache:10} {seconds:7.1f} s   {base / seconds:4.2f} times as fast, {samples.nfe[0]} calls,"
              f" {same:.0%} of the tokens as without")  # fmt: skip


if __name__ == "__main__":
    main()
