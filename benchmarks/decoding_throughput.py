"""Time of decoding beside LLaDA's published loop, at equal tokens.

The loop is the published sampler in its plainest form (quotas, the most confident first, block by block): at the same
batch, and one prompt after the other. All get the same model of random weights, the same prompts and the same policy,
and must give the same tokens. Times are processor times of one thread, taken in turns.

    python benchmarks/decoding_throughput.py
    python benchmarks/decoding_throughput.py --batch 1 --prompts 4 --vocab 512
    python benchmarks/decoding_throughput.py --batch 1 --prompts 1 --vocab 126464 --prompt 256
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor

import cdlm
from cdlm.masked.system import Masked, MaskedDiffusion
from cdlm.sampling.texts import Special

MASK, EOS = 2, 0


@torch.no_grad()
def published(model: MaskedDiffusion, prompts: Int[Tensor, "b p"], length: int, steps: int, block: int) -> Tensor:
    """The plain loop."""
    x = torch.cat([prompts, torch.full((len(prompts), length), MASK)], 1)
    blocks = length // block
    for k in range(blocks):
        end = prompts.shape[1] + (k + 1) * block
        per_step = steps // blocks
        left = (x[:, :end] == MASK).sum(1)
        for i in range(per_step):
            masked = x == MASK
            logits = model.logits(x)
            best = logits.argmax(-1)
            p = logits.softmax(-1).gather(-1, best[..., None]).squeeze(-1)
            p[:, end:] = -torch.inf
            p = torch.where(masked, p, -torch.inf)
            best = torch.where(masked, best, x)
            chosen = torch.zeros_like(masked)
            quota = left // per_step + (i < left % per_step)
            for row in range(len(x)):
                chosen[row, p[row].topk(int(quota[row])).indices] = True
            x = torch.where(chosen, best, x)
    return x


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
    print(f"{size:.1f} M parameters, vocabulary {args.vocab}, {args.prompts} prompts of {args.prompt}, length"
          f" {args.length}, {args.steps} steps")  # fmt: skip
    settings = {"policy": f"LLaDA({args.steps}, block={args.block})", "temperature": 0.0}
    shape = args.length, args.steps, args.block

    def ours() -> Tensor:
        samples = cdlm.decode(model, rows, args.length, halt="Full()", batch_size=args.batch, **settings)
        return torch.from_numpy(samples.tokens)

    loops: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "published": lambda: torch.cat([published(model, part, *shape) for part in prompts.split(args.batch)]),
        "one by one": lambda: torch.cat([published(model, part, *shape) for part in prompts.split(1)]),
    }
    spent: dict[str, list[float]] = {name: [] for name in loops}
    made: dict[str, Tensor] = {}
    for turn in range(args.pairs + 1):
        for name, loop in loops.items():
            start = time.process_time()
            made[name] = loop()
            if turn:  # the first warms up
                spent[name].append(time.process_time() - start)
    same = float((made["ours"] == made["published"]).double().mean())
    for name, times in spent.items():
        ratios = sorted(mine / other for mine, other in zip(spent["ours"], times, strict=True))
        print(f"{name:10} {total / median(times):8.0f} tokens/s, ours takes {median(ratios):.2f} of its time"
              f" [{ratios[0]:.2f}, {ratios[-1]:.2f}]")  # fmt: skip
    print(f"{same:.1%} of the tokens are the same")


if __name__ == "__main__":
    main()
