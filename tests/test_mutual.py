"""Laws and known answers of LESS: its divergence, its policy and its halting rule."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from divergences import coarse_jsd
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_toys import MASK, Row, Scripted, Toy, confident, decoded
from oracle import Oracle
from setups import diffusion, unmasking
from torch import Tensor

from cdlm.continuous.sampler import DiffusionLoop
from cdlm.core.errors import CdlmError
from cdlm.core.types import NewRows, StepState
from cdlm.halting import Full, Mutual, parse_criterion, sweep
from cdlm.halting.mutual import leftmost_run
from cdlm.halting.signals import TOP, StepStatistics, first_past, observe
from cdlm.masked.sampler import Unmasking, UnmaskingLoop
from cdlm.policies import parse_policy, sweep_policy
from cdlm.policies.confidence import Threshold
from cdlm.policies.llada import LLaDA
from cdlm.policies.mutual import Mutual as MutualPolicy
from cdlm.sampling.requests import Request, canvases

INF, LN2 = math.inf, math.log(2)
NEEDS = frozenset({"max_jsd", "min_confidence", "tokens"})

# --- the divergence ---


def statistics(logits: Tensor, before: StepStatistics | None, needs: frozenset[str] = NEEDS) -> StepStatistics:
    """A look at logits [row, position, token], all positions open; the second one after `before`."""
    b, n, _ = logits.shape
    open_, step = torch.ones(b, n, dtype=torch.bool), torch.full((b,), int(before is not None))
    past = first_past(needs, torch.zeros(b, n, 0), None) if before is None else observe(needs, before)[1]
    return StepStatistics(logits, open_, open_, step, past, needs)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    """Of logits q after logits p."""
    return statistics(q, statistics(p, None)).jsd


def whole_jsd(p: Tensor, q: Tensor) -> Tensor:
    return coarse_jsd(p, q, top=p.shape[-1])


def randoms(seed: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits of two steps, some positions alike and others not, one of them sure of other tokens."""
    generator = torch.Generator().manual_seed(seed)
    p = 3 * torch.randn(2, 5, vocab, generator=generator, dtype=torch.float64)
    q = (
        p
        + torch.randn(2, 5, vocab, generator=generator, dtype=torch.float64) * torch.tensor([0, 0.1, 1, 3, 9])[:, None]
    )
    q[1, 4], p[1, 4] = q[1, 4].roll(1), 0.01 * p[1, 4]
    if vocab > 1:
        p[0, 0, vocab // 2] = q[0, 0, vocab // 2] = -INF  # ruled out
    return p.to(dtype), q.to(dtype)


@pytest.mark.parametrize(
    ("p", "q", "nats"),
    [
        ((0.7, 0.2, 0.1), (0.6, 0.3, 0.1), 0.006959),
        ((0.9, 0.05, 0.05), (0.5, 0.45, 0.05), 0.120989),
        ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), LN2),
        ((0.2, 0.3, 0.5), (0.2, 0.3, 0.5), 0.0),
    ],
)
def test_known_divergences(p: tuple[float, ...], q: tuple[float, ...], nats: float) -> None:
    one, two = (torch.tensor([[x]], dtype=torch.float64).log() for x in (p, q))
    assert abs(float(jsd(one, two)) - nats) < 1e-6
    assert abs(float(whole_jsd(one, two)) - nats) < 1e-6


@given(
    seed=st.integers(0, 2**31), vocab=st.sampled_from([1, 2, TOP, 23, 2049, 5000]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
@settings(max_examples=25)
def test_laws_of_the_divergence(seed: int, vocab: int, dtype: torch.dtype) -> None:
    p, q = randoms(seed, vocab, dtype)
    found = jsd(p, q)
    assert found.dtype == dtype
    assert bool(((found >= 0) & (found <= LN2)).all())
    assert torch.equal(found, jsd(q, p))
    near = 1e-5 if dtype == torch.float32 else 1e-9
    assert bool((found.double() <= whole_jsd(p, q) + near).all())
    torch.testing.assert_close(found.double(), coarse_jsd(p, q), rtol=0, atol=near)
    assert torch.equal(jsd(p, p.clone()), torch.zeros_like(found))
    for row, place in itertools.product(range(2), range(5)):
        assert torch.equal(jsd(p[row, place][None, None], q[row, place][None, None]), found[row, place][None, None])


def test_at_first_nothing_is_before() -> None:
    p, _ = randoms(0, 23)
    assert statistics(p, None).jsd.isposinf().all()


def test_the_most_likely_tokens_are_found_across_chunks() -> None:
    for vocab in (3, 40, 2048, 5000):
        p, _ = randoms(1, vocab)
        one = statistics(p, None)
        expected = p.flatten(0, 1).topk(min(TOP, vocab), -1)
        assert torch.equal(one.flat.gather(1, one.most).sort(-1).values, expected.values.sort(-1).values)


def test_nothing_is_computed_that_is_not_asked_for() -> None:
    p, q = randoms(0, 23)
    without = frozenset({"tokens", "mean_kl"})
    assert observe(without, statistics(q, statistics(p, None, without), without))[1].top is None


# --- the test and the frontier ---


def test_the_leftmost_run() -> None:
    def run(text: str) -> str:
        """c: a candidate that passes, x: one that does not, .: no candidate."""
        passes, candidates = (torch.tensor([[char in kinds for char in text]]) for kinds in ("c", "cx"))
        return "".join("c" if flag else "-" for flag in leftmost_run(passes, candidates)[0].tolist())

    assert run("ccxcc") == "cc---"
    assert run("xxccxc") == "--cc--"  # the leftmost does not pass: the leftmost run that there is
    assert run(".c.cc.xc") == "-c-cc---"  # what is decided breaks no run
    assert run("xx.x") == "----"


def row_of(policy: MutualPolicy, p: list[tuple[float, ...]]) -> Row:
    """A row whose positions are as sure as `p` says at each step, which the number of masks tells."""
    told = dict(zip(range(len(p[0]), 0, -1), p, strict=False))

    def script(tokens: Tensor) -> Tensor:
        return torch.stack([confident(told.get(int((row == MASK).sum()), p[-1])) for row in tokens])

    return decoded(Scripted(script), unmasking(policy), canvases([[]], len(p[0])))[0]


def order_of(row: Row) -> list[set[int]]:
    decided = [{i for i, token in enumerate(canvas) if token != MASK} for canvas in row.canvases]
    return [now - before for before, now in itertools.pairwise([set(), *decided])]


STEADY = [(0.9, 0.5, 0.8, 0.85, 0.95)] * 5
MOVING = [(0.9, 0.9, 0.3, 0.9, 0.95), *[(0.9, 0.9, 0.9, 0.9, 0.95)] * 4]


def test_the_policy_by_hand() -> None:
    # At first the best alone; then 0, as 1 is not sure and stands before 2 and 3; then the run 2, 3; then the rest.
    assert order_of(row_of(MutualPolicy(), STEADY)) == [{4}, {0}, {2, 3}, {1}]
    assert order_of(row_of(MutualPolicy(commit="parallel"), STEADY)) == [{4}, {0, 2, 3}, {1}]
    assert order_of(row_of(MutualPolicy(exempt_first=True), STEADY)) == [{0}, {2, 3, 4}, {1}]
    assert order_of(row_of(MutualPolicy(persistence=3, commit="parallel"), STEADY)) == [{4}, {0}, {2, 3}, {1}]
    # Position 2 becomes sure at the second step: its distribution has moved, its token has not.
    assert order_of(row_of(MutualPolicy(commit="parallel"), MOVING)) == [{4}, {0, 1, 3}, {2}]
    assert order_of(row_of(MutualPolicy(commit="parallel", nats=0.5), MOVING)) == [{4}, {0, 1, 2, 3}]


@pytest.mark.parametrize("confidence", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("block", [None, 4])
def test_confidence_alone_is_the_threshold(confidence: float, block: int | None) -> None:
    """Without persistence, without drift and in parallel it is Fast-dLLM's rule, call for call."""
    asked = canvases([[3, 4], [5, None, 6], []], 8, 2)
    rows = [
        decoded(Toy(), unmasking(policy, temperature=temperature), asked)
        for temperature in (0.0,)
        for policy in (MutualPolicy(confidence, 1, INF, "parallel", block=block), Threshold(confidence, block=block))
    ]
    assert {i: row.canvases for i, row in rows[0].items()} == {i: row.canvases for i, row in rows[1].items()}


@pytest.mark.parametrize("strict", [{"persistence": 10**9}, {"confidence": 1.0}], ids=str)
@pytest.mark.parametrize("commit", ["frontier", "parallel"])
def test_infinite_strictness_commits_one_a_step(strict: dict, commit: str) -> None:
    asked = canvases([[3, 4], [5, None, 6], []], 8, 2)
    one = decoded(Toy(), unmasking(replace(MutualPolicy(commit=commit), **strict)), asked)  # pyright: ignore
    plain = decoded(Toy(), unmasking(LLaDA()), asked)
    for i, row in plain.items():
        assert one[i].canvases == row.canvases


@st.composite
def glances(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, run length and divergence of some positions."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps = torch.randint(0, 5, (3, 7), generator=generator)
    return torch.rand(3, 7, generator=generator), steps, torch.rand(3, 7, generator=generator) * LN2


unit, small = st.floats(0, 1), st.integers(1, 5)


@given(glance=glances(), c=st.tuples(unit, unit), p=st.tuples(small, small), d=st.tuples(unit, unit))
@settings(max_examples=50)
def test_a_looser_test_passes_more(
    glance: tuple[Tensor, Tensor, Tensor], c: tuple[float, float], p: tuple[int, int], d: tuple[float, float]
) -> None:
    """In each of the three, all else equal; for the policy and for the rule alike."""
    for kind in (MutualPolicy, Mutual):
        strict = kind(max(c), max(p), min(d))
        for looser in ({"confidence": min(c)}, {"persistence": min(p)}, {"nats": max(d)}):
            more = replace(strict, **looser).settled(*glance)
            assert bool((more | ~strict.settled(*glance)).all())
        assert torch.equal(Mutual(c[0], p[0], d[0]).settled(*glance), MutualPolicy(c[0], p[0], d[0]).settled(*glance))


# --- rule and policy see the same ---


def by_hand(rule: Mutual, logits: Tensor) -> list[bool]:
    """Where the rule halts a row of logits [step, position, token], by its definition."""
    said, run = [], torch.zeros(logits.shape[1])
    for i, now in enumerate(logits):
        sure, token = now.softmax(-1).max(-1)
        run = torch.where(token == (logits[i - 1].argmax(-1) if i else -1), run + 1, 1)
        moved = coarse_jsd(now, logits[i - 1]) if i else torch.full_like(sure, INF)
        eligible = (sure >= rule.confidence) & (run >= rule.persistence) & (moved <= rule.nats)
        said.append(bool(eligible.all()))
    return said


@given(seed=st.integers(0, 2**31), c=st.floats(0.1, 0.9), p=st.integers(1, 4), d=st.floats(0.01, 0.4))
@settings(max_examples=30)
def test_a_row_halts_where_all_its_positions_pass(seed: int, c: float, p: int, d: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 4, 23, generator=generator).double() * torch.linspace(3, 0.3, 8)[:, None, None]
    logits[..., 3] += torch.linspace(0, 9, 8)[:, None]
    rule, open_, one = Mutual(c, p, d), torch.ones(1, 4, dtype=torch.bool), torch.ones(1, dtype=torch.int64)
    memory, seen, said = rule.start(NewRows(open_, one * 8, open_)), None, []
    for i, now in enumerate(logits):
        past = first_past(rule.needs, torch.zeros(1, 4, 0), None) if seen is None else observe(rule.needs, seen)[1]
        seen = StepStatistics(now[None], open_, open_, one * i, past, rule.needs)
        state = StepState(one, one * i, one * 8, one.double(), one, open_, observe(rule.needs, seen)[0])
        memory, decision = rule.look(memory, state)
        said.append(bool(decision.halt))
    assert said == by_hand(rule, logits)


@pytest.mark.parametrize("settings_", [{}, {"commit": "parallel"}, {"commit": "parallel", "block": 4}], ids=str)
def test_the_policy_is_the_same_beside_a_rule_that_reads_more(settings_: dict) -> None:
    policy = MutualPolicy(0.3, 2, 0.3, **settings_)
    asked = canvases([[3, 4], [5, None, 6]], 8, 2)
    alone = decoded(Toy(), unmasking(policy), asked)
    for rule in (Mutual(1.0, 99, 0.0), Full()):
        beside = decoded(Toy(), unmasking(policy, rule), asked)
        assert {i: row.canvases for i, row in beside.items()} == {i: row.canvases for i, row in alone.items()}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("commit", [None, MutualPolicy(0.6, 2, 0.2), MutualPolicy(0.5, 3, 0.3, "parallel")], ids=repr)
def test_a_continuous_row_is_the_same_in_any_batch(commit: MutualPolicy | None, batch_size: int) -> None:
    rule = Mutual(0.7, 2, 0.05)
    asked = [Request(i, torch.arange(8) % 7, torch.arange(8) < i % 3) for i in range(5)]

    def rows(size: int, chosen: list[Request]) -> dict[int, tuple]:
        setup = diffusion(16, rule, commit=commit)
        found = {}
        for step in DiffusionLoop(Oracle(), *setup, size).steps(chosen):
            for place, tokens in zip(step.counts.leaving, step.tokens.tolist(), strict=True):
                found[step.counts.row[place]] = (tokens, step.counts.nfe[place], step.counts.halted[place])
        return found

    together = rows(batch_size, asked)
    assert together == {i: row for request in asked for i, row in rows(1, [request]).items()}
    assert all(
        row[0][k] == int(asked[i].tokens[k]) for i, row in together.items() for k in range(8) if asked[i].given[k]
    )
    assert commit is not None or len({nfe for _, nfe, _ in together.values()}) > 1


# --- texts, sweeps and what is refused ---


def test_both_have_one_name_and_one_text() -> None:
    assert parse_criterion("Mutual()") == Mutual(0.75, 2, 0.04)
    assert parse_criterion("Mutual(nats=inf)") == Mutual(nats=INF)
    assert parse_policy("Mutual") == MutualPolicy(0.75, 2, 0.04, "frontier", exempt_first=False)
    assert parse_policy(repr(MutualPolicy(0.5, commit="parallel"))) == MutualPolicy(0.5, commit="parallel")


def test_sweeps_go_from_strict_to_loose() -> None:
    policies = sweep_policy("Mutual")
    rules = sweep("Mutual(..., persistence=3)", 20)
    for found in (policies, rules):
        confidences = [one.confidence for one in found]  # pyright: ignore
        assert confidences == sorted(set(confidences), reverse=True)
        assert len(found) >= 8
    assert all(isinstance(rule, Mutual) and rule.persistence == 3 for rule in rules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Mutual(1.5)", "0 <= confidence <= 1"), ("Mutual(0.5, 0)", "persistence >= 1"),
        ("Mutual(0.5, 2, -1.0)", "nats >= 0"), ("Mutual(0.5, 2.5)", "a whole number"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(text: str, message: str) -> None:
    for parse in (parse_criterion, parse_policy):
        with pytest.raises(CdlmError, match=message):
            parse(text)


def test_the_policy_is_refused_with_a_cache() -> None:
    with pytest.raises(CdlmError, match="reads whole rows at every step: decode without a cache"):
        Unmasking(MutualPolicy(), cache="prefix")


def test_the_rule_looks_at_the_whole_calls_of_a_cache() -> None:
    setup = unmasking(Threshold(0.9, block=4), Mutual(0.0, 1, INF), cache="prefix")
    steps = list(UnmaskingLoop(Toy(), *setup, 4).steps(canvases([[3]], 8, 2)))
    assert len(steps) == 1
    assert steps[0].halted.all()
