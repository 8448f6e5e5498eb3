"""Laws of every halting rule in the loop, of rules that freeze, and of the signals that rules read."""

import importlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from divergences import coarse_jsd
from heads import HEAD
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Oracle
from safetensors.torch import load_file
from setups import diffusion
from torch import Tensor

from cdlm.continuous.guidance import Guidance
from cdlm.continuous.sampler import DiffusionLoop
from cdlm.continuous.solvers import Euler, Heun, Solver
from cdlm.core.errors import CdlmError
from cdlm.core.trees import join, take
from cdlm.core.types import Decision, LoopStep, NewRows, StepState
from cdlm.halting import (
    KL,
    RULES,
    AngleConvergence,
    Criterion,
    Entropy,
    FixedPoint,
    FixedSteps,
    For,
    FromStep,
    Full,
    JoT,
    Learned,
    Mutual,
    Never,
    NormConvergence,
    Patience,
    Prophet,
    SchED,
    StableAndConfident,
    Stop,
    VoteDecided,
    parse_criterion,
)
from cdlm.halting.signals import SIGNALS, EmbeddingState, StepStatistics, first_past, observe
from cdlm.sampling.requests import Request

GOLDEN = Path(__file__).parent / "golden" / "diffusion_gemma_stopping"
N, STEPS = 8, 16
ROW_SIGNALS = frozenset(
    {
        "mean_entropy", "mean_kl", "max_jsd", "min_confidence", "margin", "span_margin", "x0_norm", "z_norm",
        "score_cosine", "residual",
    }
)  # fmt: skip


def sum_of_tokens(tokens: np.ndarray, generated: np.ndarray, valid: np.ndarray, parser: str) -> list[str | None]:
    """Reads an answer off the generated tokens, and none of rows that have another sum."""
    return [(None, "1", "2", "3")[row[made].sum() % 4] for row, made in zip(tokens, generated, strict=True)]


PLAIN = (
    VoteDecided("fixed").reading(sum_of_tokens),
    Patience(3),
    Entropy(0.15),
    KL(0.005, warmup=0.5),
    NormConvergence(0.05),
    FixedPoint(3e-4),
    FixedPoint(1e-4, 3),
    FixedPoint(0.05, 2, relative=True),
    AngleConvergence(0.003, warmup=0.5),
    StableAndConfident(1, 0.5),
    StableAndConfident(0, 0.2),
    Mutual(0.5, 2, 0.05),
    FixedSteps(5),
    Prophet(12.0, 6.0, 3.0),
    Prophet(8.0, 4.0, 3.0, region=(1, 4), one_based=True),
    SchED(12.0, 3.0),
    SchED(10.0, 1.0, schedule="linear", variant="paper"),
    SchED(10.0, 0.0, schedule="exp", k=2.0, variant="paper"),
    For(Entropy(0.8), 2),
    Learned(str(HEAD), 0.85),
    Stop(str(HEAD), 0.06),
    FromStep(KL(0.01, warmup=0.0), 10),
    (Entropy(0.8) & SchED(9.0, 3.0)) | KL(0.001),
)
FREEZING = (
    JoT(),
    JoT(1e4, 1.0, gamma=0.7, distance=2),
    For(JoT(50.0), 2),
    FromStep(JoT(50.0), 6),
    JoT(10.0) & Patience(1),
    JoT(500.0) | Entropy(0.3),
    JoT(500.0) & JoT(200.0, 2.0, gamma=0.9, distance=3),
    For(JoT(100.0) | Prophet(12.0, 6.0, 3.0), 2),
)


# --- in the loop ---


def request(index: int) -> Request:
    """Prompts of none to two tokens, padding of none or one position, as the index says."""
    place = torch.arange(N)
    valid = place < N - index % 2
    return Request(index, place % 7, (place < index % 3) | ~valid, valid)


def run(rule: Criterion, asked: list[int], batch_size: int, oracle: Oracle | None = None, **more) -> list[LoopStep]:
    sampler = diffusion(**{"steps": STEPS, "criterion": rule, **more})
    return list(
        DiffusionLoop(oracle or Oracle(t_min=0.08, t_max=1.2), *sampler, batch_size).steps(request(i) for i in asked)
    )


def outcome(steps: list[LoopStep]) -> dict[int, tuple]:
    """Each sample's tokens, calls, last step and why it ended."""
    out = {}
    for step in steps:
        for row, tokens in zip(step.done.nonzero().squeeze(1).tolist(), step.tokens, strict=True):
            state, why = step.state, (bool(step.halted[row]), bool(step.full[row]))
            out[int(state.row[row])] = (tuple(tokens.tolist()), int(state.nfe[row]), int(state.step[row]), *why)
    return out


def paths(steps: list[LoopStep], *names: str) -> dict[int, list[tuple]]:
    """Of each sample, step by step: t, open positions, and the signals of these names."""
    out: dict[int, list[tuple]] = {}
    for step in steps:
        state = step.state
        for i, row in enumerate(state.row.tolist()):
            out.setdefault(row, []).append((state.t[i], state.open[i], *(getattr(state, name)[i] for name in names)))
    return out


@cache
def alone(rule: Criterion, solver: Solver) -> dict[int, tuple]:
    return outcome([step for i in range(3) for step in run(rule, [i], 1, solver=solver)])


@pytest.mark.parametrize("rule", PLAIN + FREEZING, ids=repr)
def test_a_batch_equals_its_members_alone(rule: Criterion) -> None:
    together = outcome(run(rule, list(range(4)), 3))
    assert {i: together[i] for i in range(3)} == alone(rule, Euler())
    assert len({last for _, _, last, *_ in together.values()}) > 1 or rule == FixedSteps(5)


@pytest.mark.parametrize("rule", [StableAndConfident(1, 0.5), *FREEZING[::3]], ids=repr)
def test_a_batch_equals_its_members_alone_with_calls_between_the_steps(rule: Criterion) -> None:
    assert outcome(run(rule, [2, 0, 1], 2, solver=Heun())) == alone(rule, Heun())


@given(rule=st.sampled_from(PLAIN + FREEZING), order=st.permutations(range(3)), batch_size=st.integers(1, 4))
@settings(max_examples=8)
def test_order_and_batch_size_do_not_matter(rule: Criterion, order: list[int], batch_size: int) -> None:
    assert outcome(run(rule, order, batch_size)) == alone(rule, Euler())


@pytest.mark.parametrize(("solver", "rules"), [(Euler(), PLAIN), (Heun(), PLAIN[::5])], ids=["Euler", "Heun"])
def test_a_halted_row_is_a_prefix_of_the_full_run(solver: Solver, rules: tuple[Criterion, ...]) -> None:
    asked, recorded = list(range(4)), frozenset({"logits", "z"})
    full = paths(run(Never(), asked, 4, solver=solver, record=recorded), "logits", "z")
    for rule in rules:
        steps = run(rule, asked, 3, solver=solver, record=recorded)
        short = paths(steps, "logits", "z")
        assert any(len(short[i]) < len(full[i]) for i in full), rule
        for i, (tokens, *_) in outcome(steps).items():
            for a, b in zip(short[i], full[i], strict=False):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            best = full[i][len(short[i]) - 1][2].argmax(-1)
            assert tokens == tuple(torch.where(request(i).given, request(i).tokens, best).tolist())


@pytest.mark.parametrize("rule", [JoT(1e4), FromStep(JoT(50.0), 6), For(JoT(), 3)], ids=repr)
def test_a_rule_that_freezes_leaves_the_run_alone_until_it_does(rule: Criterion) -> None:
    full, frozen = (paths(run(r, list(range(4)), 4, record=frozenset({"z"})), "z") for r in (Never(), rule))
    changed = 0
    for i, path in frozen.items():
        for (_, open_, z), (_, all_open, plain) in zip(path, full[i], strict=False):
            assert torch.equal(z, plain) == torch.equal(open_, all_open)
            changed += not torch.equal(z, plain)
    assert changed > 0


# --- strict and loose ---


@cache
def walk(budget: int) -> tuple[list[StepState], NewRows]:
    """All steps of five samples that never halt, with every signal."""
    asked = [request(i) for i in range(5)]
    states = [step.state for step in run(Never(), list(range(5)), 5, steps=budget, record=frozenset(SIGNALS))]
    valid = torch.stack([r.valid for r in asked if r.valid is not None])
    return states, NewRows(states[0].open, states[0].budget, valid)


def first_halts(rule: Criterion, budget: int) -> list[int]:
    """The step at which the rule halts each sample of the walk; the budget where it does not."""
    states, rows = walk(budget)
    memory, halts = rule.start(rows), torch.full_like(rows.budget, budget)
    for state in states:
        memory, decision = rule.look(memory, state)
        halts = torch.where(decision.halt & (halts == budget), state.step, halts)
    return halts.tolist()


SWEPT = {
    "Patience": (Patience, {}),
    "Entropy": (Entropy, {}),
    "KL": (KL, {}),
    "KL, no warm-up": (KL, {"warmup": 0.0}),
    "NormConvergence": (NormConvergence, {}),
    "AngleConvergence": (AngleConvergence, {}),
    "FixedPoint": (FixedPoint, {}),
    "FixedPoint, three steps": (FixedPoint, {"steps": 3}),
    "FixedPoint, relative": (FixedPoint, {"relative": True}),
    "StableAndConfident": (StableAndConfident, {"stability_threshold": 2}),
    "FixedSteps": (FixedSteps, {}),
    "Prophet": (Prophet, {}),
    "Prophet of a region": (Prophet, {"region": (1, 4), "one_based": True}),
    "Mutual": (Mutual, {}),
    "Mutual, confidence alone": (Mutual, {"persistence": 1, "nats": math.inf}),
    "SchED": (SchED, {}),
    "SchED, linear": (SchED, {"schedule": "linear"}),
    "SchED of the paper": (SchED, {"schedule": "exp", "k": 2.0, "variant": "paper"}),
}


@pytest.mark.parametrize("name", SWEPT)
def test_a_sweep_runs_from_strict_to_loose(name: str) -> None:
    family, fixed = SWEPT[name]
    rules = family.sweep(40, **fixed)
    steps = [first_halts(rule, 40) for rule in rules]
    assert len(set(rules)) == len(rules) >= 8
    assert all(type(rule) is family and getattr(rule, key) == value for rule in rules for key, value in fixed.items())
    for strict, loose in itertools.pairwise(steps):
        assert all(late >= early for late, early in zip(strict, loose, strict=True))
    assert sum(steps[-1]) < sum(steps[0])


@pytest.mark.parametrize("rule", PLAIN, ids=repr)
def test_the_loop_halts_where_the_rule_does_on_a_full_run(rule: Criterion) -> None:
    live, expected = outcome(run(rule, list(range(5)), 3)), first_halts(rule, STEPS)
    assert [live[i][2] for i in range(5)] == [min(step, STEPS - 1) for step in expected]
    assert [live[i][3] for i in range(5)] == [step < STEPS for step in expected]


@pytest.mark.parametrize("budget", [1, 2, 3, 10])
def test_short_runs_have_sweeps_too(budget: int) -> None:
    for family, fixed in (*SWEPT.values(), (JoT, {})):
        rules = family.sweep(budget, **fixed)
        assert len(set(rules)) == len(rules) > 0


def test_what_cannot_be_swept_says_so() -> None:
    for family in (Full, Never, For, FromStep):
        with pytest.raises(CdlmError, match="no settings to sweep"):
            family.sweep(10)


small, margins = st.floats(1e-6, 2), st.floats(0, 40)
counts, shares = st.integers(1, 12), st.floats(0, 0.9)


@st.composite
def strict_and_loose(draw: Callable) -> tuple[Criterion, Criterion]:
    """Two settings of one rule."""
    (low, high), (few, many) = sorted([draw(small), draw(small)]), sorted([draw(counts), draw(counts)])
    early, late = sorted([draw(shares), draw(shares)])
    loose, strict = zip(*(sorted([draw(margins), draw(margins)]) for _ in range(3)), strict=True)
    variant, schedule = draw(st.sampled_from(["code", "paper"])), draw(st.sampled_from(["linear", "cosine", "exp"]))
    region = draw(st.sampled_from([None, (2, 5), (0, 6)]))
    pairs = (
        (Entropy(low), Entropy(high)),
        (KL(low, late), KL(high, early)),
        (NormConvergence(min(low, 0.9)), NormConvergence(high)),
        (AngleConvergence(low, late), AngleConvergence(high, early)),
        (FixedPoint(low, many), FixedPoint(high, few)),
        (FixedPoint(min(low, 0.9), many, relative=True), FixedPoint(min(high, 0.9), few, relative=True)),
        (StableAndConfident(many, low), StableAndConfident(few, high)),
        (FixedSteps(many), FixedSteps(few)),
        (Mutual(late, many, low), Mutual(early, few, high)),
        tuple(Prophet(tau[0], tau[1], tau[2], region) for tau in (strict, loose)),
        tuple(SchED(tau[0], tau[1], schedule, variant=variant) for tau in (strict, loose)),
        (For(Entropy(low), many), For(Entropy(high), few)),
        (FromStep(KL(low), many), FromStep(KL(high), few)),
        (Entropy(low) & Patience(many), Entropy(high) & Patience(few)),
        (Entropy(low) | Patience(many), Entropy(high) | Patience(few)),
    )
    return draw(st.sampled_from(pairs))


@given(pair=strict_and_loose())
@settings(max_examples=50)
def test_looser_never_later(pair: tuple[Criterion, Criterion]) -> None:
    strict, loose = pair
    assert all(b <= a for a, b in zip(first_halts(strict, 30), first_halts(loose, 30), strict=True))


@given(pair=strict_and_loose())
@settings(max_examples=6)
def test_looser_never_later_in_the_loop(pair: tuple[Criterion, Criterion]) -> None:
    late, early = (outcome(run(rule, [0, 1, 2], 3)) for rule in pair)
    assert all(early[i][1] <= late[i][1] for i in late)


def test_a_looser_jot_freezes_more_at_its_first_look() -> None:
    states, rows = walk(40)
    for fixed in ({}, {"tau_min": 0.5, "gamma": 0.8, "distance": 2}):
        rules = JoT.sweep(40, **fixed)
        for state in states[::6]:
            frozen = [rule.look(rule.start(rows), state)[1].freeze for rule in rules]
            pairs = [(a, b) for a, b in itertools.pairwise(frozen) if a is not None and b is not None]
            assert len(pairs) == len(rules) - 1
            assert all((b | ~a).all() for a, b in pairs)


# --- the two ends of the range ---

INFINITE = (
    Patience(10**9),
    Entropy(1e-300),
    StableAndConfident(10**9, 1e9),
    StableAndConfident(0, 1e-300),
    Mutual(0.0, 10**9, math.inf),
    Mutual(1.0, 1, 0.0),
    FixedSteps(9),
    Prophet(math.inf, math.inf, math.inf),
    Prophet(math.inf, math.inf, math.inf, region=(2, 5)),
    SchED(math.inf, math.inf),
    SchED(math.inf, math.inf, "linear", variant="paper"),
    SchED(math.inf, math.inf, "exp", variant="paper"),
    JoT(1e300, 1e299),
    JoT(1e13, 1.1e12),
    For(JoT(), 10**9),
    FromStep(JoT(), 10**9),
    For(Entropy(1e9), 10**9),
    FromStep(Entropy(1e9), 10**9),
    JoT() & Never(),
    Never() | Never(),
    Full(),
    Full() | Never(),
)


@pytest.mark.parametrize(("solver", "rules"), [(Euler(), INFINITE), (Heun(), INFINITE[12:16])], ids=["Euler", "Heun"])
def test_infinite_strictness_is_the_plain_run(solver: Solver, rules: tuple[Criterion, ...]) -> None:
    plain = outcome(run(Never(), list(range(4)), 3, solver=solver, steps=8))
    for rule in rules:
        assert outcome(run(rule, list(range(4)), 4, solver=solver, steps=8)) == plain, rule


@pytest.mark.parametrize(
    "rule", [KL(1e-300), NormConvergence(1e-7), FixedPoint(1e-30), AngleConvergence(1e-300)], ids=repr
)
def test_rules_that_converge_are_strict_while_nothing_has_converged(rule: Criterion) -> None:
    """Their thresholds are reached in the end, when float32 tells no difference any more."""
    oracle = Oracle(t_min=0.3, t_max=1.2)
    assert outcome(run(rule, list(range(4)), 3, oracle)) == outcome(run(Never(), list(range(4)), 3, oracle))


def calls(rule: Criterion, oracle: Oracle | None = None, budget: int = 10) -> set[int]:
    """Calls of the rows that the rule halted or filled; of others, minus one."""
    done = outcome(run(rule, list(range(3)), 3, oracle, steps=budget))
    return {nfe if halted or full else -1 for _, nfe, _, halted, full in done.values()}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Entropy(1e9), 1),
        (KL(1e9, warmup=0.0), 2),
        (KL(1e9), 3),
        (KL(1e9, warmup=0.57), 6),
        (NormConvergence(1.0), 1),
        (AngleConvergence(2.0, warmup=0.0), 2),
        (AngleConvergence(2.0), 3),
        (FixedPoint(1e30), 2),
        (FixedPoint(1e30, 3), 4),
        (StableAndConfident(0, 1e9), 1),
        (Mutual(0.0, 1, math.inf), 1),
        (Mutual(0.0, 1, 0.7), 2),
        (FixedSteps(1), 1),
        (FixedSteps(7), 7),
        (Prophet(-math.inf, -math.inf, -math.inf), 1),
        (Prophet(-math.inf, -math.inf, -math.inf, region=(2, 5), one_based=True), 1),
        (SchED(-1e9, -1e9, variant="paper"), 1),
        (JoT(1.0, 0.0), 1),
        (JoT(0.5, -1.0), 1),
        (For(JoT(0.5, 0.0), 3), 3),
        (FromStep(JoT(0.5, 0.0), 4), 4),
        (JoT(0.5, 0.0) & FixedSteps(6), 6),
        (JoT(0.5, 0.0) | FixedSteps(6), 1),
        (For(Entropy(1e9), 3), 3),
        (FromStep(Entropy(1e9), 4), 4),
    ],
    ids=repr,
)
def test_a_rule_that_fires_at_once_stops_where_it_says(rule: Criterion, expected: int) -> None:
    assert calls(rule) == {expected}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exp"])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_thresholds_at_minus_infinity_are_reached_at_once(schedule: Any, variant: Any) -> None:
    assert calls(SchED(-math.inf, -math.inf, schedule, variant=variant), sure()) == {1 if variant == "paper" else 2}


def sure() -> Oracle:
    """An oracle whose first token is so frequent that nothing switches early on."""
    oracle = Oracle()
    oracle.frequencies = torch.tensor([0.94, *[0.01] * 6], dtype=torch.float64)
    return oracle


@pytest.mark.parametrize("k", [1, 2, 5])
def test_rules_of_stability_stop_after_their_first_quiet_steps(k: int) -> None:
    assert calls(Patience(k), sure()) == calls(StableAndConfident(k, 1e9), sure()) == {k + 1}


def test_the_code_of_sched_waits_for_a_step_without_switches() -> None:
    eager = SchED(-1e9, -1e9)
    assert calls(eager, sure()) == {2}
    assert outcome(run(eager, list(range(5)), 3)) == outcome(run(Patience(1), list(range(5)), 3))
    assert max(nfe for _, nfe, *_ in outcome(run(eager, list(range(5)), 3)).values()) > 2


# --- DiffusionGemma's own object ---


def looks(rule: Criterion, logits: Tensor) -> list[list[bool]]:
    """What the rule says at each step of logits [step, row, position, token], through the signals of the loop."""
    open_ = torch.ones(logits.shape[1:3], dtype=torch.bool)
    z, number = torch.zeros(*open_.shape, 1), torch.arange(len(open_))
    budget = torch.full_like(number, len(logits))
    past, memory, said = first_past(rule.needs, z, None), rule.start(NewRows(open_, budget, open_)), []
    for i, now in enumerate(logits):
        step, t = torch.full_like(number, i), torch.ones(len(open_), dtype=torch.float64)
        statistics = StepStatistics(now, open_, open_, step, past)
        signals, past = observe(rule.needs, statistics)
        memory, decision = rule.look(memory, StepState(number, step, budget, t, step + 1, open_, signals))
        said.append(decision.halt.tolist())
    return said


def theirs(stability: int, confidence: float, logits: Tensor) -> list[list[bool]]:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import StableAndConfidentStoppingCriteria

    stop = StableAndConfidentStoppingCriteria(stability, confidence)
    return [stop(torch.as_tensor(now.argmax(-1)), now).tolist() for now in logits]  # pyright: ignore[reportArgumentType]


@st.composite
def traces(draw: Callable) -> Tensor:
    """Logits of three rows of four positions, of which most keep their canvas from step to step."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    moves = torch.rand(draw(st.integers(1, 12)), 3, 1, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.5]))
    shift = (moves * torch.randint(0, 2, (len(moves), 3, 4), generator=generator)).cumsum(0)
    canvas = (torch.randint(0, 9, (3, 4), generator=generator) + shift) % 9
    sharp = draw(st.floats(1.0, 9.0)) * torch.rand(len(moves), 3, 1, 1, generator=generator) + 1.0
    noise = torch.rand(*canvas.shape, 9, generator=generator)
    return noise + sharp * torch.nn.functional.one_hot(canvas, 9)


def between(values: Tensor, share: float) -> float:
    """A threshold that no value is near, with about this share of them below."""
    ordered = values.double().flatten().sort().values
    wide = ((ordered[1:] - ordered[:-1]) > 1e-3).nonzero().flatten()
    assume(len(wide) > 0)
    i = int(wide[int(share * (len(wide) - 1))])
    return float(ordered[i] + ordered[i + 1]) / 2


@given(logits=traces(), stability=st.integers(0, 4), share=st.floats(0, 1))
@settings(max_examples=40)
def test_decides_as_diffusion_gemma_does(logits: Tensor, stability: int, share: float) -> None:
    confidence = between(entropies(logits.double()).mean(-1), share)
    assert looks(StableAndConfident(stability, confidence), logits) == theirs(stability, confidence, logits)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "cases.json").read_text()), ids=lambda case: str(case)[:60])
def test_decides_as_diffusion_gemma_did(case: dict) -> None:
    recorded = load_file(GOLDEN / "arrays.safetensors")
    rule = StableAndConfident(case["stability_threshold"], case["confidence_threshold"])
    assert looks(rule, recorded["logits"]) == case["stop_per_step"]
    assert (entropies(recorded["logits"].double()).mean(-1) - recorded["mean_entropy"]).abs().max() < 1e-4


@pytest.mark.parametrize(("stability", "confidence"), [(0, 0.3), (1, 0.5), (2, 0.1), (3, 2.0)])
def test_halts_a_run_where_diffusion_gemma_would(stability: int, confidence: float) -> None:
    rule, asked = StableAndConfident(stability, confidence), [0, 6, 12]  # neither prompt nor padding
    full = run(Never(), asked, 3, steps=40, record=frozenset({"logits", "tokens"}))
    said = theirs(stability, confidence, torch.stack([step.state.logits for step in full]))
    live = outcome(run(rule, asked, 2, steps=40))
    expected = [next((i + 1 for i, row in enumerate(said) if row[column]), 40) for column in range(3)]
    assert [live[i][1] for i in asked] == expected
    assert min(expected) < 40


# --- known answers ---


def at(step: int, budget: int, **signals: object) -> StepState:
    """One row of six open positions at a step."""
    one = torch.tensor([step])
    values = {name: torch.as_tensor(value)[None] for name, value in signals.items()}
    t, open_ = torch.ones(1, dtype=torch.float64), torch.ones(1, 6, dtype=torch.bool)
    return StepState(one * 0, one, one * 0 + budget, t, one + 1, open_, values)


SCHEDULES = (
    ("linear", 4.0, 2.5, (7.5, 6.25, 5, 3.75, 2.5)), ("linear", 4.0, 0.0, (7.5, 5.625, 3.75, 1.875, 0)),
    ("cosine", 4.0, 2.5, (7.5, 6.767767, 5, 3.232233, 2.5)), ("cosine", 4.0, 0.0, (7.5, 6.401650, 3.75, 1.098350, 0)),
    ("exp", 2.0, 2.5, (7.5, 5.532653, 4.339397, 3.615651, 3.176676)),
    ("exp", 2.0, 0.0, (7.5, 4.548980, 2.759096, 1.673476, 1.015015)),
    ("exp", 4.0, 2.5, (7.5, 4.339397, 3.176676, 2.748935, 2.591578)),
    ("exp", 4.0, 0.0, (7.5, 2.759096, 1.015015, 0.373403, 0.137367)),
    ("exp", 8.0, 2.5, (7.5, 3.176676, 2.591578, 2.512394, 2.501677)),
    ("exp", 8.0, 0.0, (7.5, 1.015015, 0.137367, 0.018591, 0.002516)),
    ("exp", 16.0, 2.5, (7.5, 2.591578, 2.501677, 2.500031, 2.500001)),
    ("exp", 16.0, 0.0, (7.5, 0.137367, 0.002516, 0.000046, 0.000001)),
)  # fmt: skip


@pytest.mark.parametrize(("schedule", "k", "low", "expected"), SCHEDULES)
def test_thresholds_of_sched(schedule: Any, k: float, low: float, expected: tuple[float, ...]) -> None:
    """At p = 0, 1/4, 1/2, 3/4, 1: steps 0 to 4 of 5 as the code counts, of 4 as the paper does."""
    for rule, budget in ((SchED(7.5, low, schedule, k), 5), (SchED(7.5, low, schedule, k, "paper"), 4)):
        seen = [float(rule.threshold(at(step, budget))) for step in range(5)]
        assert seen == pytest.approx(expected, abs=6e-7)


def test_of_a_single_step_sched_takes_the_low_threshold() -> None:
    assert float(SchED().threshold(at(0, 1))) == 2.5
    assert float(SchED(variant="paper").threshold(at(0, 1))) == 7.5


def test_thresholds_of_prophet() -> None:
    for one_based, (high, mid) in ((False, (4, 3)), (True, (3, 3))):
        rule = Prophet(one_based=one_based)
        seen = [float(rule.threshold(at(step, 10))) for step in range(10)]
        assert seen == [7.5] * high + [5.0] * mid + [2.5] * (10 - high - mid)


def test_prophet_reads_the_answer_and_nothing_else() -> None:
    """Margins 9 1 4 6 5 0 at six positions of which the fourth is prompt: the answer's mean is (4 + 5) / 2."""
    rule, open_ = Prophet(9.0, 4.5, 2.0, region=(2, 5)), torch.tensor([[True, True, True, False, True, True]])
    entering = NewRows(open_, torch.tensor([10]), torch.ones_like(open_))
    signals = {"top1": torch.tensor([[9.0, 2, 3, 5, 5, 1]]), "top2": torch.tensor([[0.0, 1, -1, -1, 0, 1]])}
    halts = []
    for step in range(10):
        # As other positions freeze, decided ones among them, the answer stays the answer.
        state = replace(at(step, 10), open=open_ & (torch.arange(6) > step), signals=signals)
        memory, decision = rule.look(rule.start(entering), state)
        assert torch.equal(memory, torch.tensor([[False, False, True, False, True, False]]))
        assert float(decision.info["margin"]) == 4.5
        halts.append(bool(decision.halt))
    assert halts == [False] * 4 + [True] * 6  # a margin that equals the threshold is enough


def test_prophet_without_an_answer_never_halts() -> None:
    eager = Prophet(-math.inf, -math.inf, -math.inf, region=(1, 3))
    open_ = torch.tensor([[False, True, False, False, True], [False, True, False, True, True]])  # given in row 0
    memory = eager.start(NewRows(open_, torch.tensor([4, 4]), torch.ones_like(open_)))
    now = {"top1": torch.full((2, 5), 3.0), "top2": torch.zeros(2, 5)}
    step = torch.zeros(2, dtype=torch.int64)
    state = StepState(step, step, torch.tensor([4, 4]), torch.ones(2, dtype=torch.float64), step + 1, open_, now)
    assert eager.look(memory, state)[1].halt.tolist() == [False, True]


def test_a_region_beyond_the_row_is_refused() -> None:
    with pytest.raises(CdlmError, match=r"does not fit: a sample has 8 positions") as caught:
        run(Prophet(region=(4, 9)), [0], 1)
    assert "\n" not in str(caught.value)
    run(Prophet(region=(4, 8)), [0], 1)


def test_the_guard_of_sched() -> None:
    """At p = 1/2 the cosine is at 5."""
    for margin, switches, halts in ((5.1, 0, True), (4.9, 0, False), (5.1, 1, False), (99.0, 1, False)):
        state = at(5, 11, margin=margin, span_margin=0.0, switches=switches)
        assert SchED().decide(state).halt.tolist() == [halts]
        paper = at(5, 10, margin=0.0, span_margin=margin, switches=switches)
        assert SchED(variant="paper").decide(paper).halt.tolist() == [margin >= 5]


def mask(text: str) -> Tensor:
    """Decided positions: those that are not 1."""
    return torch.tensor([[letter != "1" for letter in text.split()]])


@pytest.mark.parametrize(
    ("distance", "phi", "tau"),
    [
        (2, (2 / 3, 1 / 2, 1 / 3, 1 / 6), (30.7, 45.55, 60.4, 75.25)),
        (8, (0.564706, 0.470588, 0.305882, 0.152941), (39.7847, 48.1706, 62.8459, 76.4729)),
    ],
)
def test_thresholds_of_jot(distance: int, phi: tuple[float, ...], tau: tuple[float, ...]) -> None:
    decided = mask("0 0 0 1 1 0 1 1")
    rule = JoT(90.1, 1.0, 0.5, distance)
    assert rule.threshold(decided)[~decided].tolist() == pytest.approx(tau, abs=1e-4)
    assert JoT(1.0, 0.0, 0.5, distance).threshold(decided)[~decided].tolist() == pytest.approx(
        [1 - x for x in phi], abs=1e-6
    )


@given(gamma=st.floats(0.01, 2.0), distance=st.integers(1, 9))
def test_after_a_long_prompt_half_of_the_neighbours_are_decided(gamma: float, distance: int) -> None:
    decided = torch.arange(30)[None] < 12
    assert float(JoT(3.0, 1.0, gamma, distance).threshold(decided)[0, 12]) == pytest.approx(2.0)


# --- freezing ---


def by_hand(rule: JoT, decided: list[bool]) -> list[float]:
    weights = {d: rule.gamma**d for d in range(1, rule.distance + 1)}
    whole = 2 * sum(weights.values())
    near = [
        sum(w for d, w in weights.items() for j in (i - d, i + d) if 0 <= j < len(decided) and decided[j]) / whole
        for i in range(len(decided))
    ]
    return [rule.tau_max - (rule.tau_max - rule.tau_min) * share for share in near]


@given(seed=st.integers(0, 2**31), gamma=st.floats(0.1, 1.5), distance=st.integers(1, 12), tau=st.floats(1.1, 30.0))
@settings(max_examples=40)
def test_jot_freezes_what_its_formula_says(seed: int, gamma: float, distance: int, tau: float) -> None:
    """Prompts and frozen positions are decided neighbours; padding and what lies outside are not."""
    generator, rule = torch.Generator().manual_seed(seed), JoT(tau, 1.0, gamma, distance)
    logits = torch.randn(4, 9, 5, generator=generator) * 3
    kind = torch.randint(0, 3, (4, 9), generator=generator)  # open, decided, padding
    top, whole = logits.topk(2, -1).values, logits.logsumexp(-1)
    signals = {"top1": top[..., 0], "top2": top[..., 1], "logsumexp": whole, "tokens": logits.argmax(-1)}
    number = torch.arange(4)
    t = torch.ones(4, dtype=torch.float64)
    state = StepState(number, number * 0, number * 0 + 9, t, number * 0 + 1, kind == 0, signals)
    _, decision = rule.look(rule.start(NewRows(kind == 0, state.budget, kind < 2)), state)
    assert decision.freeze is not None
    assert not decision.halt.any()
    ratio = (top[..., 0] - top[..., 1]).double().exp()
    for row in range(4):
        for i, least in enumerate(by_hand(rule, (kind[row] == 1).tolist())):
            if abs(float(ratio[row, i]) / least - 1) > 1e-4:
                assert bool(decision.freeze[row, i]) == (int(kind[row, i]) == 0 and float(ratio[row, i]) >= least)
        valid, undecided = (kind[row] < 2).sum(), ((kind[row] == 0) & ~decision.freeze[row]).sum()
        assert valid == 0 or float(decision.info["decided"][row]) == pytest.approx(1 - float(undecided / valid))


SETUPS = [(Euler(), Guidance()), (Euler(), Guidance(scale=2.0, score_temperature=0.8)), (Heun(), Guidance())]


@pytest.mark.parametrize(
    ("rule", "solver", "guidance"),
    [*((rule, *SETUPS[0]) for rule in FREEZING), *((FREEZING[i], *setup) for i in (0, 2, 6) for setup in SETUPS[1:])],
    ids=repr,
)
def test_frozen_tokens_stay(rule: Criterion, solver: Solver, guidance: Guidance) -> None:
    asked = list(range(4))
    steps = run(rule, asked, 4, solver=solver, guidance=guidance, record=frozenset({"tokens"}))
    most = (STEPS * 2 - 1 if solver == Heun() else STEPS) * guidance.calls  # of the plain run
    ends, seen = outcome(steps), paths(steps, "tokens")
    frozen = 0
    for i in asked:
        final, kept = torch.tensor(ends[i][0]), request(i).tokens.clone()
        for (_, before, tokens), (_, after, _) in itertools.pairwise(seen[i]):
            assert not (after & ~before).any()
            kept = torch.where(before & ~after, tokens, kept)
            frozen += int((before & ~after).sum())
        _, open_, tokens = seen[i][-1]
        assert torch.equal(final, torch.where(open_, tokens, kept))
        assert ends[i][1] <= most
    assert frozen > 0


def test_rows_end_full_exactly_when_nothing_is_open() -> None:
    rule, reasons = JoT(50.0, distance=3), []
    for step in run(rule, list(range(8)), 4, Oracle(t_min=0.2, t_max=1.5), record=rule.needs):
        valid = torch.stack([request(i).tokens * 0 + 1 for i in step.state.row.tolist()]).bool()
        valid[:, -1] = step.state.row % 2 == 0
        freeze = rule.look(valid, step.state)[1].freeze
        assert freeze is not None
        full = ~(step.state.open & ~freeze).any(1)
        assert torch.equal(step.full, full)
        assert torch.equal(step.done, full | (step.state.step == STEPS - 1))
        assert not step.halted.any()
        reasons += step.full[step.done].tolist()
    assert set(reasons) == {False, True}


def test_a_row_that_is_halted_and_filled_at_once_is_halted() -> None:
    ends = outcome(run(JoT(0.5, 0.0) | FixedSteps(1), [0, 1], 2))
    assert all((halted, full) == (True, False) for _, _, _, halted, full in ends.values())


@pytest.mark.parametrize(("solver", "guidance"), SETUPS, ids=repr)
def test_the_state_of_a_frozen_position_follows_its_token(solver: Solver, guidance: Guidance) -> None:
    oracle, rule = Oracle(), FromStep(JoT(30.0), 3)
    steps = run(rule, list(range(5)), 3, oracle, solver=solver, guidance=guidance, record=frozenset({"tokens", "z"}))
    checked, ends = 0, outcome(steps)
    for i, path in paths(steps, "tokens", "z").items():
        given, target = request(i).given, oracle.embed(torch.tensor([ends[i][0]]))[0]
        for (t, _, _, z), (t_next, open_, _, z_next) in itertools.pairwise(path):
            frozen = ~open_ & ~given  # by the decision of the step before, at the latest
            straight = target + (t_next / t) * (z - target)
            close = torch.equal if isinstance(solver, Euler) else torch.allclose
            assert close(z_next[frozen], straight[frozen])
            offsets = (z_next - target)[frozen].norm(dim=-1) / t_next, (z - target)[frozen].norm(dim=-1) / t
            assert torch.allclose(*offsets)
            checked += int(frozen.sum())
    assert checked > 20


# --- the algebra of rules that freeze ---

ROWS, WIDTH = 3, 5
ENTERING = NewRows(
    torch.tensor([[True] * WIDTH, [False] + [True] * (WIDTH - 1), [True] * (WIDTH - 1) + [False]]),
    torch.full((ROWS,), 20),
    torch.tensor([[True] * WIDTH, [True] * WIDTH, [True] * (WIDTH - 1) + [False]]),
)


@st.composite
def walks(draw: Callable) -> list[StepState]:
    """Steps of three rows with random signals, some of whose positions close on the way."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    closing = draw(st.sampled_from([0.0, 0.1]))
    open_, states = ENTERING.open, []

    def unit(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    for i in range(draw(st.integers(1, 10))):
        open_ = open_ & (unit(ROWS, WIDTH) >= closing)
        low = unit(ROWS, WIDTH)
        signals = {
            "top1": low + 3 * unit(ROWS, WIDTH), "top2": low, "logsumexp": low + 3,
            "tokens": torch.zeros(ROWS, WIDTH, dtype=torch.int64), "switches": (2 * unit(ROWS)).long(),
            "mean_entropy": unit(ROWS), "mean_kl": unit(ROWS) if i else torch.full((ROWS,), math.inf),
            "margin": 3 * unit(ROWS), "span_margin": 3 * unit(ROWS),
        }  # fmt: skip
        step = torch.full((ROWS,), i)
        t = torch.ones(ROWS, dtype=torch.float64)
        states.append(StepState(torch.arange(ROWS), step, ENTERING.budget, t, step + 1, open_, signals))
    return states


def said(rule: Criterion, walk: list[StepState]) -> list[tuple]:
    """At each step, the rows the rule halts and the open positions it settles, by halting or by freezing."""
    memory, out = rule.start(ENTERING), []
    for state in walk:
        memory, decision = rule.look(memory, state)
        out.append(settled(decision, state))
    return out


def settled(decision: Decision, state: StepState) -> tuple:
    everything = decision.halt[:, None] & state.open
    whole = everything if decision.freeze is None else everything | (decision.freeze & state.open)
    return decision.halt.tolist(), whole.tolist()


units, ends = st.floats(0.05, 1).map(lambda x: round(x, 3)), st.floats(-3, 3).map(lambda x: round(x, 3))
atoms = st.one_of(
    st.builds(lambda low, gap, d: JoT(low + gap, low, 0.5, d), units, units.map(lambda x: 20 * x), st.integers(1, 4)),
    st.builds(JoT, st.floats(1.5, 20.0).map(lambda x: round(x, 3))),
    st.builds(Entropy, units),
    st.builds(KL, units, st.sampled_from([0.0, 0.2])),
    st.builds(StableAndConfident, st.integers(0, 2), units),
    st.builds(Prophet, ends, ends, ends, st.sampled_from([None, (0, 1), (1, 4)]), st.booleans()),
    st.builds(
        SchED, ends, ends, st.sampled_from(["linear", "cosine", "exp"]), units, st.sampled_from(["code", "paper"])
    ),
    st.builds(Patience, st.integers(1, 2)),
    st.builds(FixedSteps, st.integers(1, 6)),
    st.just(Never()),
    st.just(Full()),
)
rules = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds(For, inner, st.integers(1, 3)),
        st.builds(FromStep, inner, st.integers(1, 5)),
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
    ),
    max_leaves=4,
)


@given(a=rules, walk=walks())
@settings(max_examples=20)
def test_neutral_elements(a: Criterion, walk: list[StepState]) -> None:
    plain = said(a, walk)
    for same in (
        a | Never(),
        Never() | a,
        a | Full(),
        a & FixedSteps(1),
        FixedSteps(1) & a,
        a & a,
        a | a,
        For(a, 1),
        FromStep(a, 1),
    ):
        assert said(same, walk) == plain
        assert same.freezes == a.freezes
    for nothing in (a & Never(), Never() & a, For(a, len(walk) + 1), FromStep(a, len(walk) + 1)):
        assert said(nothing, walk) == said(Never(), walk)
    assert said(a | FixedSteps(1), walk) == said(FixedSteps(1), walk)


@given(a=rules, b=rules, c=rules, walk=walks())
@settings(max_examples=15)
def test_and_and_or_are_those_of_sets(a: Criterion, b: Criterion, c: Criterion, walk: list[StepState]) -> None:
    assert said(a & b, walk) == said(b & a, walk)
    assert said(a | b, walk) == said(b | a, walk)
    assert said((a & b) & c, walk) == said(a & (b & c), walk)
    assert said((a | b) | c, walk) == said(a | (b | c), walk)
    assert said(a & (b | c), walk) == said((a & b) | (a & c), walk)
    assert said(a | (b & c), walk) == said((a | b) & (a | c), walk)
    assert said(a | (a & b), walk) == said(a & (a | b), walk) == said(a, walk)


@given(a=rules, n=st.integers(1, 4), m=st.integers(1, 4), walk=walks())
@settings(max_examples=25)
def test_patience_adds_up(a: Criterion, n: int, m: int, walk: list[StepState]) -> None:
    assert said(For(For(a, n), m), walk) == said(For(a, n + m - 1), walk)
    assert said(FromStep(FromStep(a, n), m), walk) == said(FromStep(a, max(n, m)), walk)
    assert said(FromStep(a, n), walk) == said(a & FixedSteps(n), walk)


@given(a=rules, b=rules, n=st.integers(1, 4), walk=walks())
@settings(max_examples=20)
def test_for_is_a_run_of_that_many(a: Criterion, b: Criterion, n: int, walk: list[StepState]) -> None:
    halts, whole = (np.array([step[part] for step in said(a, walk)]) for part in (0, 1))
    quiet = [(halts[max(0, i + 1 - n) : i + 1].all(0) & (i + 1 >= n)).tolist() for i in range(len(walk))]
    still = [(whole[max(0, i + 1 - n) : i + 1].all(0) & (i + 1 >= n)).tolist() for i in range(len(walk))]
    assert [step[0] for step in said(For(a, n), walk)] == quiet
    if a.freezes:
        assert [step[1] for step in said(For(a, n), walk)] == still
    assert said(For(a & b, n), walk) == said(For(a, n) & For(b, n), walk)


@given(a=rules, order=st.permutations(range(ROWS)), walk=walks())
@settings(max_examples=25)
def test_rules_follow_their_rows(a: Criterion, order: list[int], walk: list[StepState]) -> None:
    """Half way through, the rows change place, as when others leave."""
    index, half, memory = torch.tensor(order), len(walk) // 2, a.start(ENTERING)
    for state in walk[:half]:
        memory, _ = a.look(memory, state)
    memory, expected = take(memory, index), said(a, walk)
    for i, state in enumerate(walk[half:], half):
        moved = StepState(*take(tuple(getattr(state, name) for name in state.__dataclass_fields__), index))
        memory, decision = a.look(memory, moved)
        halts, whole = settled(decision, moved)
        assert (halts, whole) == tuple([part[row] for row in order] for part in expected[i])
        assert all(len(values) == ROWS for values in decision.info.values())


@given(a=rules, walk=walks())
@settings(max_examples=25)
def test_rules_keep_the_form_of_their_memory_and_leave_the_step_as_it_is(a: Criterion, walk: list[StepState]) -> None:
    memory, before = a.start(ENTERING), [{k: v.clone() for k, v in state.signals.items()} for state in walk]
    for state in walk:
        kept = take(memory, torch.arange(ROWS))
        after, decision = a.look(memory, state)
        assert shapes(after) == shapes(memory) == shapes(kept)
        assert same(memory, kept)
        assert a.freezes or decision.freeze is None
        memory = after
    assert all(
        torch.equal(v, state.signals[k]) for state, old in zip(walk, before, strict=True) for k, v in old.items()
    )


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [] if tree is None else [leaf for item in tree for leaf in leaves(item)]


def shapes(tree: Any) -> list[tuple]:
    return [(leaf.shape, leaf.dtype) for leaf in leaves(tree)]


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))


# --- text form, and what is refused ---


@given(rule=rules)
def test_the_text_of_a_rule_is_the_rule(rule: Criterion) -> None:
    assert parse_criterion(repr(rule)) == rule
    assert hash(parse_criterion(repr(rule))) == hash(rule)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Entropy(1e-3)", Entropy(0.001)),
        ("KL(1e-4, warmup=0.1)", KL(1e-4, 0.1)),
        ("StableAndConfident()", StableAndConfident(1, 0.005)),
        ("StableAndConfident(confidence_threshold=0.1)", StableAndConfident(1, 0.1)),
        ("Prophet(8.0, 5.0, 3.5, (40, 60))", Prophet(8.0, 5.0, 3.5, (40, 60))),
        ("Prophet(region=[0, 4], one_based=True)", Prophet(region=(0, 4), one_based=True)),
        ("SchED(7.5, -1.0, 'exp', k=2.0, variant='paper')", SchED(7.5, -1.0, "exp", 2.0, "paper")),
        ("For(JoT(90.1, 1.0, 0.5, 8), 2) | Entropy(0.01)", For(JoT(90.1, 1.0, 0.5, 8), 2) | Entropy(0.01)),
    ],
)
def test_texts_are_read_as_python_would(text: str, rule: Criterion) -> None:
    assert parse_criterion(text) == rule


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Entropy()", "it is Entropy(nats: float)"),
        ("KL(0.1, warm=0.1)", "did you mean warmup?"),
        ("Sched()", "did you mean SchED?"),
        ("StableAndConfidant()", "did you mean StableAndConfident?"),
        ("Entropy(1e999)", "finite number nats > 0"),
        ("JoT(1.0, 2.0)", "tau_max > 2"),
        ("For(SchED, 2)", "SchED is written as a call"),
        ("Prophet(region=(4, 2))", "0 <= start < end"),
    ],
)
def test_mistakes_are_named(text: str, advice: str) -> None:
    with pytest.raises(CdlmError) as caught:
        parse_criterion(text)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_rule_is_under_test_here_and_can_be_written() -> None:
    tested = {type(rule).__name__ for rule in (*PLAIN, *FREEZING, Full(), Never())} | {"And", "Or"}
    of_activations = {"EDIT"}  # in tests/test_edit.py, on a model with modules
    assert set(RULES) - of_activations == tested - ({"And", "Or"} - set(RULES))


def test_the_benchmark_of_rules_measures_every_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    benchmark = importlib.import_module("criterion_cost")
    assert set(benchmark.rules()) == set(RULES) - {"For", "FromStep", "And", "Or", "EDIT"}


REFUSED = (
    ("Entropy(0.0)", "nats > 0"), ("Entropy(-1.0)", "nats > 0"),  ("Entropy('0.1')", "nats to be a number"),
    ("Entropy(True)", "nats to be a number"), ("Entropy((1,))", "nats to be a number"),
    ("KL(0.0)", "nats > 0"), ("KL(0.1, 1.0)", "warmup"), ("KL(0.1, -0.1)", "warmup"), ("KL(0.1, 'a')", "warmup"),
    ("KL(0.1, True)", "warmup"),
    ("AngleConvergence(0.1, 1.0)", "warmup"),
    ("StableAndConfident(-1)", "stability_threshold >= 0"), ("StableAndConfident(1.5)", "a whole number"),
    ("StableAndConfident(True)", "a whole number"),
    ("StableAndConfident(1, 0.0)", "confidence_threshold > 0"),
    ("StableAndConfident(1, '1')", "a number"),
    ("Prophet('a')", "tau_high"), ("Prophet(1.0, True)", "tau_mid"), ("Prophet(1.0, 1.0, (1,))", "tau_low"),
    ("Prophet(region=3)", "region"), ("Prophet(region=(1,))", "region"), ("Prophet(region=(1, 2, 3))", "region"),
    ("Prophet(region=(2, 2))", "region"), ("Prophet(region=(-1, 2))", "region"), ("Prophet(region=(0, 1.5))", "region"),
    ("Prophet(region=('a', 'b'))", "region"), ("Prophet(region=(False, True))", "region"),
    ("Prophet(one_based='yes')", "one_based"),
    ("SchED(schedule='cos')", "linear, cosine, exp"), ("SchED(variant='official')", "code, paper"),
    ("SchED(schedule=(1, 2))", "linear, cosine, exp"), ("SchED(k=0.0)", "k > 0"), ("SchED(k=-1.0)", "k > 0"),
    ("SchED('7')", "tau_high"), ("SchED(7.5, True)", "tau_low"),
    ("JoT(1.0)", "tau_max > 1"), ("JoT(1.0, 2.0)", "tau_max > 2"), ("JoT('a')", "tau_max to be a number"),
    ("JoT(3.0, 'a')", "tau_min"), ("JoT(gamma=0.0)", "gamma > 0"), ("JoT(gamma=-0.5)", "gamma > 0"),
    ("JoT(distance=0)", "distance >= 1"), ("JoT(distance=2.5)", "a whole number"), ("JoT(True)", "tau_max"),
    ("For(JoT(), 0)", "steps >= 1"), ("FromStep(JoT(), 1.5)", "a whole number"),
)  # fmt: skip
PROGRAM = """
import json, math, sys
from cdlm.halting import *
for text in json.load(sys.stdin):
    try:
        said = ["built", repr(eval(text))]
    except BaseException as error:
        said = [type(error).__name__, str(error)]
    print(json.dumps(said))
"""
FAMILIES = (
    "Entropy({})", "KL({})", "KL(1.0, {})", "AngleConvergence(1.0, {})", "StableAndConfident(1, {})", "SchED(k={})",
    "JoT({})", "JoT(3.0, {})", "JoT(gamma={})",
)  # fmt: skip
NUMBERS = (
    *(family.format(value) for family in FAMILIES for value in ("math.nan", "math.inf", "-math.inf")),
    *(f"{name}({tau}=math.nan)" for name in ("Prophet", "SchED") for tau in ("tau_high", "tau_low")),
)


@pytest.fixture(scope="module")
def answers() -> dict[str, list[str]]:
    """What constructors say in a process without the shape and type checks of these tests."""
    texts = [text for text, _ in REFUSED] + list(NUMBERS)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    return dict(zip(texts, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("text", "advice"), [*REFUSED, *((text, "") for text in NUMBERS)])
def test_bad_thresholds_are_refused_in_one_line(answers: dict, text: str, advice: str) -> None:
    kind, message = answers[text]
    assert kind == "CdlmError", message
    assert advice in message
    assert "\n" not in message


# --- the signals ---


def entropies(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


def divergences(now: Tensor, before: Tensor) -> Tensor:
    p, q = now.softmax(-1), before.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def mean(values: Tensor, over: Tensor) -> Tensor:
    return torch.stack([row[chosen].mean() for row, chosen in zip(values, over, strict=True)])


def a_glance(
    seed: int, dtype: torch.dtype, shape: tuple[int, int, int] = (4, 9, 23), scale: float = 3.0
) -> StepStatistics:
    """A step of rows of which the first enters now, beside others whose second step it is."""
    b, n, v = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def chosen(share: float) -> Tensor:
        return (torch.rand(b, n, generator=generator) < share) | (torch.arange(n) == 3)

    span, logits = chosen(0.8), scale * normal(b, n, v)
    before = logits + normal(b, n, v)
    none = first_past(frozenset(SIGNALS), normal(b, n, 5), None)
    z, t, step = normal(b, n, 5), normal(b).double().exp(), (torch.arange(b) > 0).long()
    _, past = observe(
        frozenset(SIGNALS),
        StepStatistics(before, span, span, step * 0, none, embedding=EmbeddingState(z, t, 2.0, normal(b, n, 5))),
    )
    past = take(past, torch.arange(1, b))
    past = join(first_past(frozenset(SIGNALS), z[:1], past), past)
    space = EmbeddingState(z + normal(b, n, 5), t * 0.9, 2.0, normal(b, n, 5), normal(b, n, 5))
    return StepStatistics(logits, span & chosen(0.8), span, step, past, embedding=space)


@given(
    seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 1.0, 5.0]), v=st.sampled_from([2, 23, 2100, 4096]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
@settings(max_examples=20)
def test_signals_are_what_they_say(seed: int, scale: float, v: int, dtype: torch.dtype) -> None:
    seen = a_glance(seed, dtype, (4, 9, v), scale)
    signals, past = observe(frozenset(SIGNALS), seen)
    logits, x0, z, open_ = seen.logits.double(), seen.here.x0.double(), seen.here.z.double(), seen.open
    assert seen.here.shown is not None
    first, shown = seen.step == 0, seen.here.shown.double()
    ordered = logits.sort(-1, descending=True)
    score = (x0 - z) / seen.here.t[:, None, None] ** 2 * open_[..., None]
    margin = ordered.values[..., 0] - ordered.values[..., 1]
    assert seen.past.score is not None
    assert isinstance(seen.past.logits, Tensor)
    cosine = torch.nn.functional.cosine_similarity(score.flatten(1), seen.past.score.double().flatten(1))
    kl = mean(divergences(logits, seen.past.logits.double()), open_)
    most = coarse_jsd(logits, seen.past.logits.double()).masked_fill(~open_, 0).amax(1)
    switched = (ordered.indices[..., 0] != seen.past.logits.argmax(-1)) | first[:, None]
    expected = {
        "logits": logits, "x0": x0, "z": z, "score": score, "tokens": ordered.indices[..., 0],
        "top1": ordered.values[..., 0], "top2": ordered.values[..., 1], "logsumexp": logits.exp().sum(-1).log(),
        "confidence": logits.softmax(-1).amax(-1), "entropy": entropies(logits), "switches": (switched & open_).sum(1),
        "mean_entropy": mean(entropies(logits), open_), "mean_kl": torch.where(first, math.inf, kl),
        "margin": mean(margin, open_), "span_margin": mean(margin, seen.target),
        "z_norm": mean(z.norm(dim=-1), open_) / 2, "x0_norm": mean(x0.norm(dim=-1), open_) / 2,
        "score_cosine": torch.where(first, math.nan, cosine), "max_jsd": torch.where(first, math.inf, most),
        "residual": torch.where(first, math.inf, mean((x0 - shown).square().sum(-1), open_) / 4),
        "min_confidence": logits.softmax(-1).amax(-1).masked_fill(~open_, 1).amin(1),
    }  # fmt: skip
    assert set(expected) == set(signals) == set(SIGNALS)
    for name, value in expected.items():
        tolerance = 1e-4 * float(1 + value.double().nan_to_num(posinf=0.0).abs().max())
        assert torch.allclose(signals[name].double(), value.double(), rtol=0, atol=tolerance, equal_nan=True), name
    assert all(signals[name].dtype == torch.float32 for name in ROW_SIGNALS)
    assert past.logits is seen.logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("v", [23, 300, 5000])
def test_the_signals_of_a_row_do_not_depend_on_its_neighbours(v: int, dtype: torch.dtype) -> None:
    whole = a_glance(0, dtype, (5, 21, v))
    signals, _ = observe(frozenset(SIGNALS), whole)
    for row in range(5):
        fields = (
            whole.here.z,
            whole.here.t,
            whole.here.x0,
            whole.here.shown,
            whole.logits,
            whole.open,
            whole.target,
            whole.step,
            whole.past,
        )
        z, t, x0, shown, logits, open_, span, step, past = take(fields, torch.tensor([row]))
        alone = StepStatistics(logits, open_, span, step, past, embedding=EmbeddingState(z, t, 2.0, x0, shown))
        single, _ = observe(frozenset(SIGNALS), alone)
        for name in SIGNALS:
            assert torch.equal(single[name][0].nan_to_num(), signals[name][row].nan_to_num()), name


@pytest.mark.parametrize("v", [5, 3000])
def test_of_equal_logits_the_first_is_the_token(v: int) -> None:
    seen = a_glance(0, torch.float32, (2, 4, v))
    logits = torch.zeros(2, 4, v)
    logits[1, :, [3, v - 1]] = 1.0
    signals, _ = observe(frozenset({"tokens", "top1", "top2"}), replace(seen, logits=logits))
    assert signals["tokens"].tolist() == [[0] * 4, [3] * 4]
    assert torch.equal(signals["top1"], signals["top2"])


def test_a_token_that_is_ruled_out_counts_as_one_of_no_probability() -> None:
    seen = a_glance(0, torch.float32)
    assert isinstance(seen.past.logits, Tensor)
    ruled_out = seen.logits.clone()
    ruled_out[..., 4:9] = -math.inf
    signals, _ = observe(frozenset(SIGNALS), replace(seen, logits=ruled_out))
    left = torch.cat([ruled_out[..., :4], ruled_out[..., 9:]], -1)
    assert torch.allclose(signals["entropy"], entropies(left), atol=1e-4)
    assert torch.allclose(signals["logsumexp"], left.logsumexp(-1), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_predictions_have_signals_too(dtype: torch.dtype) -> None:
    signals, _ = observe(frozenset(SIGNALS), a_glance(0, dtype, scale=1e5))
    assert all(values[1:].isfinite().all() for values in signals.values())
    assert (signals["mean_entropy"] < 1e-3).all()


@given(seed=st.integers(0, 2**31), shift=st.sampled_from([0.0, 1e-9, 1e-6, 1e-4]), scale=st.sampled_from([1.0, 50.0]))
@settings(max_examples=20)
def test_a_prediction_that_hardly_moves_hardly_diverges(seed: int, shift: float, scale: float) -> None:
    """And rounding does not take entropies and divergences below zero, where any threshold would be met."""
    still = a_glance(seed, torch.float32, scale=scale)
    assert isinstance(still.past.logits, Tensor)
    moved = torch.where(still.step[:, None, None] == 0, still.logits, still.past.logits * (1 + shift))
    signals, _ = observe(frozenset(SIGNALS), replace(still, logits=moved))
    assert math.isinf(signals["mean_kl"][0])
    assert (signals["mean_kl"][1:] < 1e-4).all()
    assert all((signals[name] >= 0).all() for name in ("entropy", "mean_entropy", "mean_kl"))


@pytest.mark.parametrize("rule", [Entropy(0.15), JoT(1e4, distance=2), Prophet(12.0, 6.0, 3.0)], ids=repr)
@pytest.mark.parametrize("batch_size", [2, 3])
def test_each_row_diverges_from_its_own_past(rule: Criterion, batch_size: int) -> None:
    """Also where others have left before it in the batch, or have entered beside it."""
    steps = run(rule, list(range(5)), batch_size, record=frozenset({"logits", "mean_kl"}))
    assert len({len(path) for path in paths(steps).values()}) > 1
    for path in paths(steps, "logits", "mean_kl").values():
        assert math.isinf(path[0][3])
        for (_, _, before, _), (_, open_, now, kl) in itertools.pairwise(path):
            expected = (now.log_softmax(-1) - before.log_softmax(-1)).mul(now.softmax(-1)).sum(-1)[open_].mean()
            assert float(kl) == pytest.approx(float(expected), abs=1e-5, rel=1e-4)
