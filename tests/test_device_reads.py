"""How often a step of decoding reads from the device. On a GPU each read waits for all that was asked of it.

Reads are counted where Python asks for them: numbers, lists and arrays of tensors, and whatever has a size that depends
on values. On a CPU they cost nothing, so that only a count can tell.
"""

from typing import Any

import pytest
import torch
from masked_toys import Toy
from oracle import Oracle
from setups import Setup, diffusion, unmasking
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cdlm.continuous.grids import Adaptive
from cdlm.continuous.sampler import DiffusionLoop
from cdlm.continuous.solvers import Ancestral, Churn, Euler, Heun, Renoise, TwoStep
from cdlm.core.types import Prediction
from cdlm.halting import KL, Full, JoT, Never, Patience, SchED
from cdlm.masked.sampler import UnmaskingLoop
from cdlm.policies.confidence import FallingThreshold, Threshold
from cdlm.policies.dream import Dream
from cdlm.policies.entropy import EntropyBound
from cdlm.policies.klass import KLASS
from cdlm.policies.llada import LLaDA
from cdlm.policies.mutual import Mutual
from cdlm.sampling.requests import Request, canvases

VALUES = {
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.cpu,
    Tensor.numpy, Tensor.__contains__, Tensor.equal, torch.equal, torch.allclose,
}  # fmt: skip
SIZES = {
    Tensor.nonzero, torch.nonzero, torch.argwhere, Tensor.masked_select, torch.masked_select, torch.unique,
    Tensor.unique, torch.bincount, Tensor.repeat_interleave, torch.repeat_interleave,
}  # fmt: skip
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}


class Reads(TorchFunctionMode):
    """Counts the reads; `pause` while the model is called, whose own do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in VALUES or func in SIZES or (func in INDEXING and _by_truth(args[1]))
        return func(*args, **(kwargs or {}))


def _by_truth(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def reads_of(decoder: Setup, steps: int, rows: int = 3) -> list[int]:
    """Reads of each step of rows that all take the same steps."""
    loop = UnmaskingLoop(Toy(), *decoder, rows)
    live, counts = loop.admit(canvases([[3, 4]] * rows, 8), None), []
    for _ in range(steps):
        with Reads() as reads:
            finished, carried = loop.step(live)
            assert not len(finished.tokens)
            live = loop.advance(carried)
        counts.append(reads.count)
    return counts


POLICIES = (LLaDA(8), LLaDA(8, remasking="random"), Dream(8), Dream(8, alg_temp=1.0), Threshold(1.0), EntropyBound(0.0))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("policy", [*POLICIES, KLASS(0.99, 0.0), Mutual(0.99, 2, 0.0)], ids=repr)
def test_a_step_reads_once(policy: Any, temperature: float) -> None:
    for rule in (Full(), Never(), Patience(99), SchED(1e9, 1e9)):
        assert reads_of(unmasking(policy, rule, temperature), 5) == [1] * 5, rule


@pytest.mark.parametrize("cache", [None, "prefix", "dual", "free"])
def test_and_once_more_where_rows_enter_a_block(cache: Any) -> None:
    assert reads_of(unmasking(LLaDA(8, block=4), cache=cache), 6) == [1, 1, 1, 2, 1, 1]


def continuous_reads(setup: Setup, steps: int, rows: int = 3) -> list[int]:
    """Reads of each step of rows that all take the same steps, those of the denoiser aside."""
    oracle = Oracle()
    inner, told = oracle.denoise, Reads()

    def denoise(*args: Any) -> Prediction:
        before = told.count
        made = inner(*args)
        told.count = before
        return made

    setattr(oracle, "denoise", denoise)  # noqa: B010
    loop = DiffusionLoop(oracle, *setup, rows)
    asked = [Request(i, torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.bool)) for i in range(rows)]
    live, counts = loop.admit(asked, None), []
    for _ in range(steps):
        with told:
            finished, carried = loop.step(live)
            assert not finished.counts.leaving
            live = loop.advance(carried)
        counts.append(told.count)
        told.count = 0
    return counts


SOLVERS = (Euler(), Heun(), TwoStep(), Ancestral(), Renoise(), Churn())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_continuous_step_without_a_rule_reads_nothing(solver: Any) -> None:
    assert continuous_reads(diffusion(9, solver=solver), 5) == [0] * 5
    at_its_end = continuous_reads(diffusion(3, solver=solver, block=2), 5)  # tokens are read out, row by row
    assert at_its_end[:2] == at_its_end[3:] == [0, 0]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_with_a_rule_or_a_policy_it_reads_once(solver: Any) -> None:
    ways: list[dict[str, Any]] = [
        {"criterion": Patience(99)}, {"criterion": KL(1e-300)}, {"grid": Adaptive()}, {"commit": Threshold(1.0)},
        {"commit": FallingThreshold(1.0, 0.99), "criterion": Patience(99), "grid": Adaptive()},
        {"commit": EntropyBound(0.0), "criterion": JoT(1e30, 1e29)},
    ]  # fmt: skip
    for settings in ways:
        if solver == Churn() and "grid" in settings:  # it has to know the next level before
            continue
        assert continuous_reads(diffusion(40, solver=solver, **settings), 5) == [1] * 5, settings


def test_reads_are_counted() -> None:
    tensor = torch.arange(3)
    with Reads() as reads:
        int(tensor[0])
        tensor.tolist()
        bool(tensor.any())
        _ = tensor[tensor > 1]
        (tensor > 1).nonzero()
        _ = tensor[1:] + tensor.sum()
    assert reads.count == 5
