"""Tokens per second of batched decoding beside a loop that decodes one prompt after the other.

The loop is the published sampler of LLaDA in its plainest form (quotas, the most confident first, block by block), at
batch 1. Both get the same model of random weights, the same prompts and the same policy, and must give the same tokens.

    python benchmarks/decoding_throughput.py
    python benchmarks/decoding_throughput.py --width 384 --depth 8 --batch 16
"""

import argparse
import time

import torch
from jaxtyping import Int
from torch import Tensor

import cdlm
from cdlm.masked.system import Masked, MaskedDiffusion
from cdlm.sampling.texts import Special

MASK, EOS = 2, 0


@torch.no_grad()
def one_by_one(model: MaskedDiffusion, prompt: list[int], length: int, steps: int, block: int) -> Int[Tensor, " n"]:
    """The plain loop, one row."""
    x = torch.tensor([[*prompt, *[MASK] * length]])
    blocks = length // block
    for k in range(blocks):
        end = len(prompt) + (k + 1) * block
        per_step = steps // blocks
        left = int((x[:, :end] == MASK).sum())
        for i in range(per_step):
            logits = model.logits(x)
            p, best = logits.softmax(-1).max(-1)
            p = p.masked_fill(x != MASK, -1.0)
            p[:, end:] = -1.0
            quota = left // per_step + (i < left % per_step)
            chosen = p.topk(quota, -1).indices
            x = x.scatter(1, chosen, best.gather(1, chosen))
    return x[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 128, "depth": 4, "vocab": 1024, "prompts": 32, "prompt": 32, "length": 64, "steps": 64,
                        "block": 32, "batch": 16, "threads": 1, "pairs": 3}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Masked(width=args.width, depth=args.depth).build(args.vocab, Special(MASK, EOS)).eval()
    with torch.no_grad():  # random weights that do not treat all tokens alike
        model.network.get_parameter("output.weight").mul_(50)
    prompts = torch.randint(3, args.vocab, (args.prompts, args.prompt), generator=torch.Generator().manual_seed(1))
    rows, total = prompts.tolist(), args.prompts * args.length
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {args.prompts} prompts of {args.prompt}, length {args.length}, {args.steps} steps")
    cdlm.decode(model, rows[:1], args.length, policy="LLaDA(1)")  # warm up
    ratios = []
    for _ in range(args.pairs):
        start = time.perf_counter()
        plain = torch.stack([one_by_one(model, row, args.length, args.steps, args.block) for row in rows])
        middle = time.perf_counter()
        policy = f"LLaDA({args.steps}, block={args.block})"
        batched = cdlm.decode(model, rows, args.length, policy=policy, temperature=0.0, batch_size=args.batch)
        alone, ours = middle - start, time.perf_counter() - middle
        same = float((torch.from_numpy(batched.tokens) == plain).double().mean())
        ratios.append(alone / ours)
        print(f"one by one {total / alone:8.0f} tokens/s, batch {args.batch} {total / ours:8.0f} tokens/s,"
              f" {ratios[-1]:.2f} times, {same:.1%} of the tokens equal")  # fmt: skip
    print(f"median {sorted(ratios)[len(ratios) // 2]:.2f} times")


if __name__ == "__main__":
    main()
