"""Recorded runs of the oracle denoiser, and the head in tests/golden that was trained on them:

PYTHONPATH=tests python tests/heads.py    # writes it again
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from oracle import Oracle
from setups import diffusion

from cdlm.continuous.sampler import Diffusion, DiffusionLoop
from cdlm.halting.fit import Fitting, fit
from cdlm.halting.head import write_head
from cdlm.halting.signals import RECORDED
from cdlm.recording.file import Recording
from cdlm.recording.writer import Recorder
from cdlm.sampling.requests import Request

HEAD = Path(__file__).parent / "golden" / "halting_head"
POSITIONS, STEPS = 8, 16


def request(index: int) -> Request:
    """Prompts of none to two tokens."""
    place = torch.arange(POSITIONS)
    return Request(index, place % 7, place < index % 3)


@cache
def runs(count: int = 48, steps: int = STEPS, first: int = 0) -> Recording:
    """Full runs of so many samples."""
    asked = [request(i) for i in range(first, first + count)]
    tokens = torch.stack([one.tokens for one in asked])
    given = torch.stack([one.given for one in asked]).numpy()
    tape = Recorder(RECORDED, steps, tokens)
    setup = diffusion(steps, record=Diffusion.recorded)
    for step in DiffusionLoop(Oracle(t_min=0.08, t_max=1.2), *setup, 16).steps(asked):
        tape.write(step, step.state.row.numpy() - first)
        tokens[step.state.row[step.done] - first] = step.tokens
    about = {**setup.sampling.settings, "length": POSITIONS, "precision": "fp32"}
    index = np.arange(first, first + count)
    return Recording(tape.record(), tokens.numpy(), given, np.ones_like(given), index, 0, "oracle", "0" * 64, about)


if __name__ == "__main__":
    write_head(HEAD, fit([runs()], Fitting(epochs=60)))
