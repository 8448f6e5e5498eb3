"""What a trained model can tell at each noise level, and how a sample becomes text: the figure of docs/how-it-works.md.

Prints one sample as it stands at several steps, too. The model is a run of `cdlm train` whose noise schedule learns.

    python benchmarks/how_it_works.py runs/demo docs/images/how-it-works.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import cdlm
from cdlm.continuous.system import ContinuousSystem
from cdlm.core.types import Batch
from cdlm.evaluation.plots.panels import Line, Panel, draw
from cdlm.runs.train import RunText
from cdlm.sampling.samples import Samples

ROWS, LEVELS, SAMPLES, STEPS = 128, 40, 64, 200
SHOWN = (1, 40, 80, 100, 120, 200)
"""Steps at which the sample is printed."""


@torch.no_grad()
def losses(system: ContinuousSystem, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u, t in embedding norms, nats per token) on rows of which nothing is given, at levels of equal distance in u."""
    u = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    whole = torch.ones(tokens.shape, dtype=torch.bool)
    nats = []
    for level in u:
        noise = torch.Generator().manual_seed(0)
        loss = system(Batch(tokens, None, whole, noise, level.expand(len(tokens))))
        nats.append(float((loss.nats * loss.count).sum() / loss.count.sum()))
    return u.numpy(), (system.levels(u) / system.rho).numpy(), np.array(nats)


def drawn(system: ContinuousSystem) -> Samples:
    """Full runs without a prompt, each step recorded, on equal steps in ln t."""
    session = cdlm.open_session(system, steps=STEPS, grid="LogT()", score_temperature=0.9).recorded()
    return session.run(session.requests(n=SAMPLES))


def final_share(samples: Samples) -> np.ndarray:
    """Share of the tokens that are those of the end already, at each step."""
    assert samples.record is not None
    steps = list(samples.record.walk(np.zeros_like(samples.tokens)))
    return np.array([(tokens == steps[-1]).mean() for tokens in steps])


def show(samples: Samples, system: ContinuousSystem) -> None:
    """Print the first sample at several steps."""
    assert samples.record is not None
    steps = list(samples.record.walk(np.zeros_like(samples.tokens)))
    for step in SHOWN:
        print(f"{step:>4}  {system.need_tokenizer().decode(steps[step - 1][0])!r}")


def main(run: str, image: str) -> None:
    system = cdlm.load(run, device="cpu")
    assert isinstance(system, ContinuousSystem)
    system.eval()
    valid = RunText.of_run(run).valid
    tokens = torch.stack([torch.as_tensor(valid[i].tokens).long() for i in range(ROWS)])
    u, t, nats = losses(system, tokens)
    samples = drawn(system)
    assert samples.record is not None
    level = "noise level, in embedding norms"
    straight = np.log(t / t[0]) / np.log(t[-1] / t[0])
    panels = [
        Panel("How many nats a token costs", level, "nats per token", [Line("", t, nats)], x_scale="log"),
        Panel(
            "Where training looks", level, "share of draws with less noise",
            [Line("learned", t, u), Line("equal in ln t", t, straight, dashed=True)], x_scale="log",
        ),
        Panel(
            "How a sample becomes text", level + " (sampling goes left)", "share of tokens that are final",
            [Line("", np.nanmean(samples.record.t, 1) / system.rho, final_share(samples))], x_scale="log",
        ),
    ]  # fmt: skip
    draw(panels, Path(image), columns=3, width=4.4)
    show(samples, system)


if __name__ == "__main__":
    main(*sys.argv[1:])
