"""Laws of halting rules: their algebra, their ranges, and their text form."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from setups import diffusion
from torch import Tensor

from cdlm import halting
from cdlm.continuous.sampler import DiffusionLoop
from cdlm.continuous.solvers import SOLVERS
from cdlm.core.errors import CdlmError
from cdlm.core.parsing import Registry
from cdlm.core.trees import take
from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting import (
    RULES,
    AngleConvergence,
    Criterion,
    FixedPoint,
    FixedSteps,
    For,
    FromStep,
    Never,
    NormConvergence,
    Patience,
    Stateless,
    parse_criterion,
)
from cdlm.sampling.requests import Request

ROWS = 3
ENTERING = NewRows(
    torch.ones(ROWS, 1, dtype=torch.bool), torch.full((ROWS,), 50), torch.ones(ROWS, 1, dtype=torch.bool)
)


@st.composite
def walks(draw: Callable) -> list[StepState]:
    """Steps of three rows with random signals."""
    count = draw(st.integers(1, 12))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    step_of = [torch.full((ROWS,), step) for step in range(count)]
    return [state(step, generator) for step in step_of]


def state(step: Tensor, generator: torch.Generator) -> StepState:
    switches = torch.randint(0, 3, (ROWS,), generator=generator) * (torch.rand(ROWS, generator=generator) < 0.5)
    cosine = torch.where(step == 0, torch.nan, torch.rand(ROWS, generator=generator) * 2 - 1)
    signals = {"switches": switches, "x0_norm": torch.rand(ROWS, generator=generator), "score_cosine": cosine}
    signals["residual"] = torch.where(step == 0, torch.inf, torch.rand(ROWS, generator=generator))
    open_ = torch.ones(ROWS, 1, dtype=torch.bool)
    t = torch.ones(ROWS, dtype=torch.float64)
    return StepState(torch.arange(ROWS), step, step * 0 + 50, t, step + 1, open_, signals)


def halts(rule: Criterion, walk: list[StepState]) -> list[list[bool]]:
    """What the rule says at each step, whether or not it has halted before."""
    memory = rule.start(ENTERING)
    said = []
    for step in walk:
        memory, decision = rule.look(memory, step)
        said.append(decision.halt.tolist())
    return said


numbers = st.floats(0.01, 2).map(lambda x: round(x, 3))
simple = st.one_of(
    st.builds(Patience, st.integers(1, 4)),
    st.builds(NormConvergence, numbers),
    st.builds(AngleConvergence, numbers),
    st.builds(FixedPoint, numbers, st.integers(1, 3)),
    st.builds(FixedPoint, st.floats(0.01, 0.9), st.integers(1, 3), st.just(True)),
    st.builds(FixedSteps, st.integers(1, 8)),
    st.builds(Never),
)
wrapped = st.recursive(
    simple,
    lambda inner: st.one_of(st.builds(For, inner, st.integers(1, 3)), st.builds(FromStep, inner, st.integers(1, 6))),
    max_leaves=3,
)
rules = st.recursive(
    wrapped,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(For, inner, st.integers(1, 3)),
    ),
    max_leaves=4,
)


@given(a=rules, walk=walks())
@settings(max_examples=15)
def test_neutral_elements(a: Criterion, walk: list[StepState]) -> None:
    plain = halts(a, walk)
    for same in (
        For(a, 1),
        FromStep(a, 1),
        a | Never(),
        Never() | a,
        a & FixedSteps(1),
        FixedSteps(1) & a,
        a & a,
        a | a,
    ):
        assert halts(same, walk) == plain
    for nothing in (a & Never(), Never() & a, For(a, len(walk) + 1), FromStep(a, len(walk) + 1)):
        assert halts(nothing, walk) == halts(Never(), walk)


@given(a=rules, b=rules, c=rules, walk=walks())
@settings(max_examples=15)
def test_and_and_or_are_those_of_logic(a: Criterion, b: Criterion, c: Criterion, walk: list[StepState]) -> None:
    assert halts(a & b, walk) == halts(b & a, walk)
    assert halts(a | b, walk) == halts(b | a, walk)
    assert halts((a & b) & c, walk) == halts(a & (b & c), walk)
    assert halts((a | b) | c, walk) == halts(a | (b | c), walk)
    assert halts(a & (b | c), walk) == halts((a & b) | (a & c), walk)
    assert halts(a | (a & b), walk) == halts(a, walk)


@given(a=rules, n=st.integers(1, 4), m=st.integers(1, 4), walk=walks())
@settings(max_examples=40)
def test_patience_adds_up(a: Criterion, n: int, m: int, walk: list[StepState]) -> None:
    assert halts(For(For(a, n), m), walk) == halts(For(a, n + m - 1), walk)
    assert halts(FromStep(FromStep(a, n), m), walk) == halts(FromStep(a, max(n, m)), walk)
    assert halts(FromStep(a, n), walk) == halts(a & FixedSteps(n), walk)


@given(a=rules, n=st.integers(1, 4), walk=walks())
@settings(max_examples=40)
def test_for_is_a_run_of_that_many(a: Criterion, n: int, walk: list[StepState]) -> None:
    plain = halts(a, walk)
    expected = [[i + 1 >= n and all(plain[j][r] for j in range(i + 1 - n, i + 1)) for r in range(ROWS)]
                for i in range(len(walk))]  # fmt: skip
    assert halts(For(a, n), walk) == expected


@given(n=st.integers(1, 4), walk=walks())
def test_patience_is_for_of_no_switch(n: int, walk: list[StepState]) -> None:
    assert halts(Patience(n), walk) == halts(For(Quiet(), n), walk)


@given(a=rules, order=st.permutations(range(ROWS)), walk=walks())
@settings(max_examples=40)
def test_rules_follow_their_rows(a: Criterion, order: list[int], walk: list[StepState]) -> None:
    """Half way through, the rows change place, as when others leave."""
    index, half = torch.tensor(order), len(walk) // 2
    memory = a.start(ENTERING)
    for step in walk[:half]:
        memory, _ = a.look(memory, step)
    memory = take(memory, index)
    for i, step in enumerate(walk[half:], half):
        moved = StepState(*take(tuple(getattr(step, f) for f in step.__dataclass_fields__), index))
        memory, decision = a.look(memory, moved)
        assert decision.halt.tolist() == [halts(a, walk)[i][row] for row in order]


@given(a=rules, b=rules)
def test_needs_are_those_of_the_parts(a: Criterion, b: Criterion) -> None:
    assert (a & b).needs == (a | b).needs == a.needs | b.needs
    assert For(a, 2).needs == FromStep(a, 2).needs == a.needs


def test_the_first_step_never_converges_in_angle() -> None:
    first = state(torch.zeros(ROWS, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert halts(AngleConvergence(2.0), [first]) == [[False] * ROWS]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("make", [Patience, FixedSteps, lambda n: For(Never(), n), lambda n: FromStep(Never(), n)])
def test_counts_that_are_none_are_refused(make: Callable, value: int) -> None:
    with pytest.raises(CdlmError, match="whole number steps >= 1"):
        make(value)


@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
@pytest.mark.parametrize("make", [NormConvergence, AngleConvergence, FixedPoint])
def test_thresholds_that_are_none_are_refused(make: Callable, value: float) -> None:
    with pytest.raises(CdlmError, match="delta > 0"):
        make(value)


# --- the text form ---


@given(rule=wrapped)
def test_the_text_of_a_rule_is_the_rule(rule: Criterion) -> None:
    assert parse_criterion(repr(rule)) == rule


@given(rule=rules)
def test_the_text_of_a_combined_rule_is_the_rule(rule: Criterion) -> None:
    assert parse_criterion(repr(rule)) == rule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Patience(20)", Patience(20)),
        ("Patience(steps=20)", Patience(20)),
        (" For( NormConvergence(1e-2), 5 ) | Patience(40) ", For(NormConvergence(0.01), 5) | Patience(40)),
        ("Never() & Never() | Never()", (Never() & Never()) | Never()),
        ("(Never() | Patience(2)) & FixedSteps(3)", (Never() | Patience(2)) & FixedSteps(3)),
        ("FromStep(AngleConvergence(0.1), steps=3)", FromStep(AngleConvergence(0.1), 3)),
    ],
)
def test_texts_are_read_as_python_would(text: str, rule: Criterion) -> None:
    assert parse_criterion(text) == rule


def test_objects_and_nothing_are_rules_too() -> None:
    assert parse_criterion(Patience(3)) == Patience(3)
    assert parse_criterion(None) == Never()


def test_values_may_be_numbers_texts_and_tuples() -> None:
    class Keep:
        def __init__(self, *values: object, last: object = None):
            self.values = (*values, last)

    read = Registry("thing", Keep, Keep).parse('Keep(1, -2, 3.5, -1e3, "a b", True, (1, ("x",)), [2], last=None)')
    assert read.values == (1, -2, 3.5, -1000.0, "a b", True, (1, ("x",)), (2,), None)


def test_a_kind_without_joins_says_so() -> None:
    with pytest.raises(CdlmError, match=r"a solver cannot be joined with & or \|"):
        SOLVERS.parse("Euler() | Heun()")


def test_a_class_has_the_name_it_is_listed_under() -> None:
    listed = Registry("kind of number", int, int, flag=bool)
    assert list(listed) == ["int", "flag"]
    assert listed.find("flag") is bool
    assert listed.parse(3) == 3
    with pytest.raises(CdlmError, match=r"no kind of number 'flga' \(did you mean flag\?\): use one of int, flag"):
        listed.find("flga")


def test_every_rule_that_is_listed_can_be_imported_from_the_package() -> None:
    assert set(RULES) < set(halting.__all__)
    assert all(getattr(halting, name) is rule for name, rule in RULES.items())


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Patiense(3)", "did you mean Patience?"),
        ("patience(3)", "did you mean Patience?"),
        ("NormConvergance(0.1)", "did you mean NormConvergence?"),
        ("Patience(step=3)", "did you mean steps?"),
        ("NormConvergence(dleta=3)", "did you mean delta?"),
        ("Zzz(3)", "use one of Patience"),
        ("Patience()", "it is Patience(steps: int)"),
        ("Patience(1, 2)", "it is Patience(steps: int)"),
        ("Patience(0)", "steps >= 1"),
    ],
)
def test_mistakes_are_named(text: str, advice: str) -> None:
    with pytest.raises(CdlmError) as caught:
        parse_criterion(text)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


HOSTILE = (
    "", " ", "Patience", "3", "'Patience(3)'", "Patience(3", "Patience(3);", "Patience 3", "Patience(3) + Patience(3)",
    "Patience(3) and Patience(3)", "not Patience(3)", "~Patience(3)", "Patience(3) | 3",
    "Patience.steps", "Patience(3).steps",
    "Patience(3).__class__()", "().__class__.__bases__", "__import__('os').system('true')", "__import__('os')",
    "eval('1')", "exec('1')", "open('x')", "lambda: 1", "(lambda: Patience(3))()", "[x for x in (1,)]",
    "Patience([x for x in (1,)][0])", "f'{1}'", "Patience(f'{1}')", "Patience(*[3])", "Patience(**{'steps': 3})",
    "Patience(n := 3)", "Patience(3 if 1 else 2)", "Patience(1 + 2)", "Patience(2 ** 9)", "Patience({'a': 1})",
    "Patience({3})", "Patience(b'3')", "Patience(3j)", "Patience(...)", "Patience(--3)",
    "Patience(+3)", "RULES['Patience'](3)", "Patience(3)[0]", "Patience(3)(3)", "import os", "x = 3", "await x",
    "yield 3", "Patience(\0)", "Patience(steps=1, steps=2)", "For(Never, 2)", "NormConvergence(1e999)",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_but_a_rule_is_read(text: str) -> None:
    with pytest.raises(CdlmError) as caught:
        parse_criterion(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 3000 + "Never()" + ")" * 3000,
        "For(" * 300 + "Never()" + ", 1)" * 300,
        "Patience(" + "-" * 3000 + "1)",
        "Never()" + " | Never()" * 3000,
        "Never()" + ".a" * 3000,
        "Patience(" + "9" * 5000 + ")",
    ],
    ids=lambda text: f"{text[:12]}..{len(text)}",
)
def test_huge_texts_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(CdlmError) as caught:
        parse_criterion(text)
    assert "\n" not in str(caught.value)


ILL_TYPED = (
    ("criterion", "Patience(2.5)"), ("criterion", "Patience(None)"), ("criterion", "Patience('3')"),
    ("criterion", f"Patience({'[' * 150}{']' * 150})"),
    ("criterion", "Patience(99999e9999)"), ("criterion", "NormConvergence('0.1')"),
    ("criterion", "NormConvergence(True)"),
    ("criterion", "For(3, 2)"), ("criterion", "For('Never()', 2)"), ("criterion", "FromStep((), 2)"),
    ("criterion", "FromStep(Never(), Never())"), ("solver", "Patience(3)"), ("solver", "Euler(3)"),
    ("solver", "TorchDiffEq()"), ("solver", 'TorchDiffEq("euler9")'), ("solver", "TorchDiffEq(5)"),
    ("solver", "TorchDiffEq([])"), ("solver", 'TorchDiffEq("dopri5", "a")'), ("solver", 'TorchDiffEq("dopri5", -1.0)'),
    ("solver", 'TorchDiffEq("dopri5", atol=0)'), ("solver", "Huen()"), ("grid", "Euler()"), ("grid", "Warped(1)"),
    ("masking", "Mixture()"), ("masking", "Mixture(())"), ("masking", "Mixture(3)"), ("masking", "Mixture(((1, 2),))"),
    ("masking", 'Mixture((("a", Prefix()),))'), ("masking", "Mixture((Prefix(),))"), ("masking", "Never()"),
    ("masking", "Span(0)"), ("masking", "Span('a')"),
)  # fmt: skip
PROGRAM = """
import json, sys
from cdlm.continuous.grids import GRIDS
from cdlm.continuous.solvers import SOLVERS
from cdlm.data.masking import MASKINGS
from cdlm.halting import parse_criterion
parsers = {"criterion": parse_criterion, "solver": SOLVERS.parse, "grid": GRIDS.parse, "masking": MASKINGS.parse}
for kind, text in json.load(sys.stdin):
    try:
        said = ["built", repr(parsers[kind](text))]
    except BaseException as error:
        said = [type(error).__name__, str(error)]
    print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], list[str]]:
    """What users see, in a process without the shape and type checks of these tests."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(ILL_TYPED), capture_output=True, text=True, check=True
    )
    return dict(zip(ILL_TYPED, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("asked", ILL_TYPED, ids=lambda asked: asked[1][:40])
def test_arguments_of_a_wrong_kind_are_refused(answers: dict, asked: tuple[str, str]) -> None:
    kind, message = answers[asked]
    assert kind == "CdlmError", message
    assert "\n" not in message


@given(st.text(max_size=30))
@settings(max_examples=200)
def test_any_text_is_a_rule_or_an_error(text: str) -> None:
    with suppress(CdlmError):
        assert isinstance(parse_criterion(text), Criterion)


def test_every_rule_can_be_written() -> None:
    for rule in (Patience(1), NormConvergence(0.1), AngleConvergence(0.1), FixedSteps(1), Never(), For(Never(), 1)):
        assert type(rule).__name__ in RULES


# --- a rule of one's own ---


@dataclass(frozen=True)
class Quiet(Stateless):
    """No token switched."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"switches"})

    def decide(self, state: StepState) -> Decision:
        return Decision(state.switches == 0)


@dataclass(frozen=True)
class Certain(Stateless):
    """Halts when the mean entropy of the open positions is below `nats`."""

    nats: float

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy"})

    def decide(self, state: StepState) -> Decision:
        return Decision((state.entropy * state.open).sum(1) / state.open.sum(1) < self.nats)


def test_a_rule_of_ones_own_runs_in_the_loop() -> None:
    asked = [Request(i, torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.bool)) for i in range(5)]
    steps = {}
    for rule in (Certain(0.05), For(Certain(0.05), 3), Certain(1e9), Certain(0.05) & Never()):
        seen = [
            step.state.step[step.done]
            for step in DiffusionLoop(Oracle(), *diffusion(steps=30, criterion=rule), 2).steps(asked)
        ]
        steps[rule] = torch.cat(seen).tolist()
    early, later, once, never = steps.values()
    assert set(never) == {29}
    assert set(once) == {0}
    assert all(0 < step < 29 for step in early)
    assert sum(later) > sum(early)


def test_a_signal_that_does_not_exist_is_refused_before_the_run() -> None:
    class Wrong(Quiet):
        @property
        def needs(self) -> frozenset[str]:
            return frozenset({"speed"})

    with pytest.raises(CdlmError, match="no signal 'speed'"):
        diffusion(criterion=Wrong())


def test_a_signal_that_was_not_listed_is_an_error_that_says_so() -> None:
    class Forgetful(Quiet):
        @property
        def needs(self) -> frozenset[str]:
            return frozenset()

    asked = [Request(0, torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.bool))]
    with pytest.raises(CdlmError, match="list it in the criterion's `needs`"):
        next(DiffusionLoop(Oracle(), *diffusion(criterion=Forgetful()), 1).steps(asked))
