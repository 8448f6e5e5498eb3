"""A device without float64, such as Apple's GPUs, played on the CPU: numbers are drawn and grids are made on the host,
which has float64, and nothing that a step computes is finer than float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchdiffeq  # noqa: F401, its tables are made as it is imported
from masked_toys import Toy
from setups import Setup, diffusion, unmasking
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdlm.continuous.grids import Adaptive, LogT
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.readouts import Decoder
from cdlm.continuous.sampler import DiffusionLoop
from cdlm.continuous.solvers import Ancestral, Churn, Heun, Renoise, TorchDiffEq, TwoStep
from cdlm.continuous.systems import SYSTEMS
from cdlm.core import devices
from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting import KL, AngleConvergence, Criterion, Entropy, JoT, Never, NormConvergence, Patience, Prophet, SchED
from cdlm.halting.criterion import Memory
from cdlm.halting.head import FEATURES, features_of, look_at, start_rows
from cdlm.masked.sampler import UnmaskingLoop
from cdlm.policies.confidence import Factor, FallingThreshold, Threshold
from cdlm.policies.dream import Dream
from cdlm.policies.entropy import EntropyBound
from cdlm.policies.klass import KLASS
from cdlm.policies.llada import LLaDA
from cdlm.policies.mutual import Mutual
from cdlm.sampling.loop import Loop
from cdlm.sampling.requests import Request, canvases

N = 9


class NoFloat64(TorchDispatchMode):
    """Refuses whatever gives float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(made)):
            raise TypeError(f"{func} gives float64")
        return made


@dataclass(frozen=True)
class Features(Criterion):
    """Reads all that a halting head reads, and never halts."""

    needs = frozenset().union(*(feature.needs for feature in FEATURES.values()))

    def start(self, rows: NewRows) -> Memory:
        return start_rows(rows)

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        memory = look_at(memory, state)
        features = features_of(tuple(FEATURES), memory, state)
        return memory, Decision(torch.zeros_like(state.open[:, 0]), info={"progress": features[:, 0]})


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "COARSE", frozenset({"cpu"}))


def run(loop: Loop, requests: Sequence[Request]) -> int:
    with NoFloat64():
        return len(list(loop.steps(requests)))


ANYWHERE = [JoT(3.0, 1.0), Patience(2), Entropy(0.1), KL(1e-3), Prophet(), SchED(7.5, 2.5), Never()]
"""Rules for every family."""
COMMITTING = [
    Threshold(0.9),
    FallingThreshold(0.95),
    Factor(1.0),
    EntropyBound(0.5),
    KLASS(0.9, 0.1),
    Mutual(0.9, 2, 0.1),
    LLaDA(4),
    Dream(4),
]


def unmasked(setup: Setup) -> int:
    toy = Toy()
    toy.likes, toy.beside = toy.likes.float(), toy.beside.float()
    return run(UnmaskingLoop(toy, *setup, 2), canvases([[3, 4], [5]] * 2, 8))


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("policy", COMMITTING, ids=repr)
def test_masked_models(policy: Any, temperature: float) -> None:
    assert unmasked(unmasking(policy, SchED(9.0, 8.0, variant="paper"), temperature)) > 1


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("rule", ANYWHERE, ids=repr)
def test_rules_on_masked_models(rule: Criterion) -> None:
    assert unmasked(unmasking(LLaDA(8), rule)) > 1


SMALL = {"width": 16, "depth": 1, "heads": 2}
OWN: dict[str, dict[str, Any]] = {
    "cdcd": {"dim": 8, "output_prior": True}, "ssd": {"dim": 8, "block": 4},
    "elf": {"encoder": "nowhere", "encoder_dim": 8, "encoder_hash": "of nothing"},
}  # fmt: skip
READ: dict[str, dict[str, Any]] = {"elf": {"read_out": Decoder(), "guidance": Guidance(scale=3.0)}}
"""How a system is sampled that does not say its tokens."""
PROMPTED = {name: name != "elf" for name in SYSTEMS}
"""Whether prompts can be shown without another model."""
WAYS: list[dict[str, Any]] = [
    {}, {"solver": Heun()}, {"solver": Churn(0.1), "grid": LogT()},
    {"solver": TwoStep(), "grid": LogT()}, {"solver": Ancestral(), "commit": Dream(4)},
    {"solver": Renoise(), "grid": Adaptive()}, {"solver": TorchDiffEq("rk4"), "commit": FallingThreshold(0.2)},
    {"commit": KLASS(0.1, 9.0)},
    {"commit": Mutual(0.1, 1, 9.0)},
]  # fmt: skip


def sampled(name: str, **settings: Any) -> int:
    torch.manual_seed(0)
    system = SYSTEMS[name](**SMALL, **OWN.get(name, {})).build(12).eval()
    way = READ.get(name, {}) | settings
    loop = DiffusionLoop(system, *diffusion(5, **way), 2)  # the host has float64: here the grid is made
    prompt = (torch.arange(N) < 2) & PROMPTED[name]
    return run(loop, [Request(i, torch.full((N,), 3), prompt) for i in range(3)])


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_ways_to_sample_continuous_models(way: dict[str, Any]) -> None:
    assert sampled("cdcd", **way) > 1


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("name", SYSTEMS)
def test_continuous_systems(name: str) -> None:
    assert sampled(name, criterion=Patience(3)) > 1


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("rule", [*ANYWHERE, NormConvergence(0.01), AngleConvergence(1e-6), Features()], ids=repr)
def test_rules_on_continuous_models(rule: Criterion) -> None:
    assert sampled("cdcd", criterion=rule) > 0


def test_where_there_is_float64_it_is_used() -> None:
    """The stand-in can fail: each of these runs is refused on a device that is taken for a fine one."""
    with pytest.raises(TypeError, match="gives float64"):
        unmasked(unmasking(LLaDA(8), SchED(7.5, 2.5)))
    with pytest.raises(TypeError, match="gives float64"):
        sampled("cdcd")
