"""Memory and time of decoding at a real vocabulary, beside the published loop.

A Llama of random weights, small but for its vocabulary of 126,464 tokens, decodes a prompt of 1,500 tokens and 128
positions in ten ways. For each, in a process of its own: the peak of resident memory over what was resident when the
model was loaded and had been called once, that peak as a multiple of the logits of the open positions in float32, and
the CPU time of a step. The first line is LLaDA's published loop, which computes all logits.

    python benchmarks/decoding_memory.py
    python benchmarks/decoding_memory.py --batch 16 --prompt 256 --length 64
    python benchmarks/decoding_memory.py --ways plain guidance --vocab 512 --prompt 32 --length 32 --steps 32
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import cdlm
from cdlm.core.types import Constants
from cdlm.halting import parse_criterion
from cdlm.masked.checkpoints.family import BIDIRECTIONAL
from cdlm.masked.checkpoints.model import ForeignModel
from cdlm.masked.sampler import Unmasking
from cdlm.sampling.requests import canvases

WAYS: dict[str, dict[str, Any]] = {
    "published loop": {},
    "plain": {"policy": "LLaDA({steps})"},
    "temperature": {"policy": "LLaDA({steps})", "temperature": 0.7},
    "guidance": {"policy": "LLaDA({steps})", "cfg_scale": 1.0},
    "Prophet": {"policy": "LLaDA({steps})", "halt": "Prophet(1e9, 1e9, 1e9)"},
    "KL": {"policy": "LLaDA({steps})", "halt": "KL(1e-30)"},
    "KLASS": {"policy": "KLASS(0.999999, 1e-30)"},
    "threshold, blocks": {"policy": "Threshold(0.999999, block=32)"},
    "prefix cache": {"policy": "LLaDA({steps}, block=32)", "cache": "prefix"},
    "dual cache": {"policy": "LLaDA({steps}, block=32)", "cache": "dual"},
    "free cache": {"policy": "LLaDA({steps}, block=32)", "cache": "free"},
}  # fmt: skip
MIB = 2**20


def model(vocab: int, length: int, width: int, depth: int) -> ForeignModel:
    """A bidirectional Llama of random weights; its mask is the last token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=2 * width, vocab_size=vocab, max_position_embeddings=length, **BIDIRECTIONAL,
    )  # fmt: skip
    network = LlamaForCausalLM(config).eval().requires_grad_(False)
    return ForeignModel(network, Constants(vocab - 1), length=length)


@torch.no_grad()
def published(
    made: ForeignModel, prompts: Int[Tensor, "b p"], length: int, steps: int, mask: int, taken: int
) -> Tensor:
    """The loop of LLaDA at temperature 0, in one block: so many of its steps."""
    x = torch.cat([prompts, torch.full((len(prompts), length), mask)], 1)
    share, rest = divmod(length, steps)
    for step in range(taken):
        open_ = x == mask
        logits = made.network(input_ids=x).logits
        best = logits.argmax(-1)
        chance = logits.softmax(-1).gather(-1, best[..., None]).squeeze(-1).masked_fill(~open_, -torch.inf)
        chosen = torch.zeros_like(open_)
        for row in range(len(x)):
            chosen[row, chance[row].topk(share + (step < rest)).indices] = True
        x = torch.where(chosen, best, x)
    return x


def measure(way: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak in bytes and CPU seconds a step, of the first steps of a run."""
    torch.set_num_threads(1)
    made = model(args.vocab, args.prompt + args.length, args.width, args.depth)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, args.vocab - 1, (args.batch, args.prompt), generator=generator)
    with torch.no_grad():
        made.network(input_ids=prompts[:1, :4])
    steps = args.length if args.steps is None else args.steps
    settings = {k: v.format(steps=steps) if isinstance(v, str) else v for k, v in WAYS[way].items()}
    halt = settings.pop("halt", None)
    resting, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if way == "published loop":
        published(made, prompts, args.length, steps, args.vocab - 1, args.taken)
    else:
        session = cdlm.open_session(made, batch_size=args.batch, sampling=Unmasking().with_flat(**settings))
        session = session if halt is None else session.with_criterion(parse_criterion(halt))
        requests = canvases(prompts.tolist(), args.length)
        loop = session.sampling.loop(made, session.options, args.batch)
        for _, _ in zip(range(args.taken), loop.steps(requests), strict=False):
            pass
    spent = time.process_time() - start
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resting)
    return {"peak": peak, "seconds": spent / args.taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(batch=1, prompt=1500, length=128, vocab=126_464, width=64, depth=2, taken=3)
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, help="of the schedule; by default one position a step")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    wanted = args.batch * args.length * args.vocab * 4
    print(f"{args.batch} rows of {args.prompt} + {args.length}, vocabulary {args.vocab}")
    print(f"logits of what is open, float32: {wanted / MIB:.0f} MiB")
    print(f"{'':20} {'peak, MiB':>10} {'/ logits':>9} {'s / step':>9}")
    for way in args.ways:
        command = [sys.executable, __file__, "--one", way, *sys.argv[1:]]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{way:20} {found['peak'] / MIB:10.0f} {found['peak'] / wanted:9.2f} {found['seconds']:9.3f}", flush=True)


if __name__ == "__main__":
    main()
