"""What EDIT saves beside the whole schedule, and beside leaving a block that is full, which costs nothing.

The published schedule commits most of a block early, so that its last steps have nothing left (`Gaussian`). A saving
that is counted from the whole schedule holds these steps too; `Full()` saves them with the same tokens. Here held-out
word problems are answered by an adapter of a model that answers them (`configs/arithmetic.yaml`), with their map, under
each rule on each schedule, all of them run. "The same" are the tokens of the answers that are those of the whole
schedule. Intervals are 95 %, bootstrap over problems. Only problems are taken whose answers fill the row that the model
was trained on with equal blocks.

    python benchmarks/edit.py runs/adapter
"""

import argparse
import os
from itertools import islice

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from cdlm import api
from cdlm.core.stats import Scores
from cdlm.data.arithmetic import problems, right
from cdlm.data.sources import Arithmetic
from cdlm.halting import parse_criterion
from cdlm.runs.config import read_run
from cdlm.sampling.samples import Samples

LENGTH = 40
SCHEDULES = (
    f"Gaussian({LENGTH // 2}, block={LENGTH // 2}, center=4.0, std=4.0)",
    f"LLaDA({LENGTH}, block={LENGTH // 2})",
)
RULES = (
    "Never()", "Full()", "EDIT({0!r}, delta=0.05, span=2)", "EDIT({0!r}, delta=0.5, span=2)",
    "EDIT({0!r}, delta=2.0, span=2)", "EDIT({0!r}, 'paper', delta=1e-05, span=4)",
    "EDIT({0!r}, 'paper', delta=0.0001, span=4)", "EDIT({0!r}, 'paper', delta=0.001, span=4)",
)  # fmt: skip


def interval(values: np.ndarray, form: str) -> str:
    """A mean with its interval."""
    found = Scores(values.astype(np.float64), np.ones(len(values))).bootstrap()
    low, high = found.interval95
    return f"{found.value:{form}} [{low:{form}}, {high:{form}}]"


def marks(samples: Samples, answers: list) -> np.ndarray:
    """1.0 where the answer is right."""
    texts = [sample.text[sample.given[-1][1] :] for sample in samples]
    return right(texts, answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="run folder of cdlm train --lora, on a model of configs/arithmetic.yaml")
    parser.add_argument("--n", type=int, default=300, help="problems")
    parser.add_argument("--seed", type=int, default=1, help="of the problems")
    args = parser.parse_args()
    model, source = api.load(args.adapter, device="cpu"), read_run(args.adapter).source
    assert isinstance(source, Arithmetic)
    drawn = problems(40 * args.n, args.seed, "valid", tuple(source.steps), source.largest)
    row = read_run(args.adapter).length
    assert model.tokenizer is not None
    fitting = (task for task in drawn if len(model.tokenizer.encode(task.prompt + "\n")) == row - LENGTH)
    tasks = list(islice(fitting, args.n))
    prompts = [task.prompt + "\n" for task in tasks]
    print("| schedule | rule | right | the same | calls | of the schedule | of Full() |\n|---|---|---|---|---|---|---|")
    for policy in SCHEDULES:
        calls: dict[str, float] = {}
        full = np.zeros(0)
        for text in RULES:
            rule = parse_criterion(text.format(args.adapter))
            samples = api.generate(
                model, prompts, new_tokens=LENGTH, policy=policy, temperature=0.0, halt=rule, batch_size=100
            )
            calls[text] = float(samples.nfe.mean())
            full = samples.tokens if text == RULES[0] else full
            same = (samples.tokens == full).sum(1) - samples.given.sum(1)
            kept = interval(same / (~samples.given).sum(1), ".1%")
            shares = [f"{calls[text] / calls[name]:.2f}" if name in calls else "" for name in RULES[:2]]
            name = text.replace("{0!r}", "path")
            solved = interval(marks(samples, [task.answer for task in tasks]), ".1%")
            row = (solved, kept, interval(samples.nfe, ".1f"))
            print("|", " | ".join((f"`{policy}`", f"`{name}`", *row, *shares)), "|", flush=True)


if __name__ == "__main__":
    main()
