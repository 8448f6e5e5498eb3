"""What does sparse attention save, and what does it change?

Decodes one prompt under full attention and under that of SparseD, and gives the processor time of a step after step E.
Half way through a sparse run it compares, on the canvas as it is then, the logits of the open positions under the row's
pattern with those under full attention: the largest and the mean change, the mean over that of the full logits around
their own means, and the share of positions whose most likely token is another.

    python benchmarks/sparse_attention.py                                            # a Llama of random weights: times
    python benchmarks/sparse_attention.py --model runs/masked --text valid.txt       # a trained model: changes
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from cache_speed import model as random_llama

import cdlm
from cdlm.masked.model import MaskedModel
from cdlm.masked.sampler import Unmasking, UnmaskingLoop
from cdlm.masked.sparse import SparseAttention, SparseD
from cdlm.policies.llada import LLaDA
from cdlm.sampling.loop import RunOptions
from cdlm.sampling.requests import canvases


class Decoding:
    """A prompt that is decoded, one step after the other."""

    def __init__(self, made: MaskedModel, prompt: list[int], args: argparse.Namespace, sparse: SparseD | None):
        self.made, self.steps, self.sparse = made, args.steps, sparse
        sampling = Unmasking(LLaDA(args.steps), sparse=sparse)
        self.loop = UnmaskingLoop(made, sampling, RunOptions(), 1, made.device)
        self.live = self.loop.admit(canvases([prompt], args.length), None)

    def seconds(self, steps: int) -> list[float]:
        """Of the processor, for each of the next steps."""
        found = []
        for _ in range(steps):
            start = time.process_time()
            self.live = self.loop.advance(self.loop.step(self.live)[1])
            found.append(time.process_time() - start)
        return found

    @torch.no_grad()
    def change(self) -> tuple[float, float, float]:
        """Largest and relative mean change of the logits that are next, and the share of other tokens."""
        live = self.live
        assert self.sparse is not None
        assert live.blocks is not None
        places = live.open.flatten().nonzero().squeeze(1)
        full = self.made.logits(live.tokens, None, places)
        with SparseAttention(self.sparse, live.blocks, live.known.step, padded=False):
            thin = self.made.logits(live.tokens, None, places)
        there = full.isfinite()  # our own models never say the mask
        centred = (full - full.masked_fill(~there, 0).sum(-1, keepdim=True) / there.sum(-1, keepdim=True))[there]
        moved = (thin - full)[there].abs()
        other = full.argmax(-1) != thin.argmax(-1)
        return float(moved.max()), float(moved.mean() / centred.abs().mean()), float(other.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 384, "depth": 8, "vocab": 8192, "prompt": 768, "length": 256, "block": 128,
                        "steps": 32, "threads": 1}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", help="in place of random weights")
    parser.add_argument("--text", type=Path, help="whose first tokens are the prompt; by default random ones")
    parser.add_argument("--kernel", choices=("gather", "flex"), default="gather")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model is None:
        made: MaskedModel = random_llama(args.width, args.depth, args.vocab, args.prompt + args.length)
    else:
        loaded = cdlm.load(args.model, device="cpu")
        assert isinstance(loaded, MaskedModel)
        assert loaded.vocab is not None
        made, args.vocab = loaded, loaded.vocab - 1
    prompt = torch.randint(1, args.vocab - 1, (args.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    if args.text is not None:
        prompt = made.need_tokenizer()(args.text.read_text("utf-8")).input_ids[: args.prompt]
    half, skip = args.steps // 2, 0.2
    full = Decoding(made, prompt, args, None)
    full.seconds(2)  # warm up
    base = statistics.median(full.seconds(half))
    print(f"prompt {len(prompt)}, length {args.length}, {args.steps} steps, blocks of {args.block}, {args.kernel},"
          f" {args.threads} thread")  # fmt: skip
    print(f"full         {base:6.3f} s a step")
    for select in (1.0, 0.5, 0.3, 0.1):
        sparse = SparseD(skip, select, args.block, args.kernel)
        run = Decoding(made, prompt, args, sparse)
        at = sparse.measured_at(args.steps)
        measured = run.seconds(at + 1)[-1]
        later = run.seconds(half - at - 1 + 2)[1:]  # of the first, flex attention compiles
        largest, mean, other = run.change()
        print(f"select {select:4.2f}  {statistics.median(later):6.3f} s a step, {base / statistics.median(later):4.2f}"
              f" times as fast; step {at}, which measures, {measured:6.3f} s; logits change by at most {largest:.3f},"
              f" in the mean {mean:.2%}; another token at {other:.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
