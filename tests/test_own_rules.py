"""A rule and a policy of one's own, as a newcomer writes them. The type checker reads this file: `needs`, `freezes` and
`waits` are class attributes or properties, and both must pass it."""

from dataclasses import dataclass

import torch
from oracle import Oracle
from setups import diffusion

from cdlm.continuous.sampler import DiffusionLoop
from cdlm.core.types import Decision, StepState
from cdlm.halting import For, Patience, Stateless
from cdlm.policies.policy import LIGHT, Choice, Policy, View, proposal
from cdlm.policies.quotas import best
from cdlm.sampling.requests import Request


@dataclass(frozen=True)
class Confident(Stateless):
    """The rule of the README."""

    nats: float
    needs = frozenset({"entropy"})

    def decide(self, state: StepState) -> Decision:
        mean = (state.entropy * state.open).sum(1) / state.open.sum(1)
        return Decision(mean < self.nats)


@dataclass(frozen=True)
class Computed(Stateless):
    """The same, with properties."""

    nats: float
    signal: str = "entropy"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.signal})

    @property
    def freezes(self) -> bool:
        return False

    @property
    def waits(self) -> bool:
        return self.nats > 1

    def decide(self, state: StepState) -> Decision:
        return Confident(self.nats).decide(state)


@dataclass(frozen=True)
class Settling(Confident):
    """An heir that freezes."""

    freezes = True
    waits = True


@dataclass(frozen=True)
class TwoAtATime(Policy):
    """A policy that commits the two most confident positions."""

    block: int | None = None
    needs = LIGHT | {"entropy"}

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        return Choice(best(confidence, view.candidates, torch.full_like(view.row, 2)), tokens)


def signals_of(rule: Stateless) -> frozenset[str]:
    """What the type checker sees in any rule."""
    return rule.needs | {"tokens"}


def test_attributes_and_properties_say_the_same() -> None:
    attribute, computed = Confident(0.05), Computed(0.05)
    assert signals_of(attribute) == signals_of(computed) == {"entropy", "tokens"}
    assert attribute.freezes is computed.freezes is False
    assert attribute.waits is computed.waits is False
    assert Computed(2.0).waits
    assert (Settling(0.05) | Patience(15)).freezes
    assert For(Settling(0.05), 2).waits
    assert (attribute & Patience(15)).needs == {"entropy", "switches"}
    assert TwoAtATime().needs == {"tokens", "logsumexp", "entropy"}
    assert repr(attribute) == "Confident(nats=0.05)"  # what it needs is no setting


def test_they_halt_at_the_same_steps() -> None:
    asked = [Request(i, torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.bool)) for i in range(5)]
    taken = []
    for rule in (Confident(0.05), Computed(0.05)):
        loop = DiffusionLoop(Oracle(), *diffusion(steps=30, criterion=rule), 2)
        taken.append(torch.cat([step.state.step[step.done] for step in loop.steps(asked)]).tolist())
    assert taken[0] == taken[1]
    assert 0 < min(taken[0]) <= max(taken[0]) < 29
