"""Laws of decoding with a masked model, for every policy and every rule, bit for bit on a toy that is exact."""

import math
from collections.abc import Sequence
from functools import cache, reduce
from itertools import pairwise
from operator import or_
from typing import Any, Literal, TypeGuard, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_toys import EOS, MASK, PLAIN, SHIFTED, VOCAB, Bag, Row, Scripted, Toy, confident, decoded
from setups import Setup, unmasking
from tiny import GOLDEN, Tiny
from torch import Tensor

from cdlm.core.errors import CdlmError
from cdlm.halting import (
    KL,
    AngleConvergence,
    Criterion,
    Entropy,
    FixedSteps,
    For,
    FromStep,
    Full,
    JoT,
    Mutual,
    Never,
    NormConvergence,
    Patience,
    Prophet,
    SchED,
    StableAndConfident,
)
from cdlm.masked.model import Constants
from cdlm.masked.published import Quirks
from cdlm.masked.sampler import OF_EACH, CacheKind, UnmaskingLoop
from cdlm.policies.adjust import Adjust
from cdlm.policies.confidence import Factor, Threshold
from cdlm.policies.core import CORE
from cdlm.policies.dream import Dream, DreamThreshold
from cdlm.policies.editing import Editing
from cdlm.policies.entropy import EntropyBound
from cdlm.policies.gaussian import Gaussian
from cdlm.policies.guided import Guided
from cdlm.policies.klass import KLASS
from cdlm.policies.llada import LLaDA
from cdlm.policies.mutual import Mutual as MutualPolicy
from cdlm.policies.policy import Policy
from cdlm.sampling.requests import Request, canvases

INF, LENGTH = math.inf, 8

POLICIES: tuple[Policy, ...] = (
    LLaDA(8),
    LLaDA(4),
    LLaDA(12),
    LLaDA(8, block=4),
    LLaDA(4, block=2),
    LLaDA(16, block=4),
    LLaDA(8, remasking="random"),
    LLaDA(4, block=4, remasking="random"),
    LLaDA(8, eos_last=True),
    LLaDA(8, block=4, no_eos=True),
    Dream(8),
    Dream(5),
    Dream(11),
    Dream(8, "origin"),
    Dream(6, "maskgit_plus"),
    Dream(8, "topk_margin", top_p=0.9, top_k=5),
    Dream(8, alg_temp=0.5),
    Dream(8, block=4),
    DreamThreshold(8, 0.5),
    DreamThreshold(4, 0.9),
    Threshold(0.6),
    Threshold(0.5, block=4),
    Factor(2.0),
    Factor(1.0, block=4),
    EntropyBound(1.0),
    EntropyBound(0.5, block=4),
    KLASS(0.4, 0.5),
    KLASS(0.3, 1.0, block=4),
    MutualPolicy(0.3, 2, 0.3),
    MutualPolicy(0.2, 2, 0.5, "parallel", exempt_first=True, block=4),
    Gaussian(8),
    Gaussian(6, block=2, first=4, first_steps=2),
    Adjust("layer", 3),
    Adjust("layer", 2, block=4, order="random"),
    Guided(Bag(), accept="topk", k=2, verify=3),
    Guided(Bag(1), "speculative", block=4),
    Guided(Bag(2), "speculative", "original"),
    CORE(8, every=2, candidates=3, replaced=2, protected=0, confidence=0.0),
    CORE(8, block=4, every=1, begin=0.5, end=1.0, candidates=2, protected=1, confidence=0.1, pick="random"),
    Editing(0.6, 0.3),
    Editing(0.5, 0.2, passes=2, block=4),
)
STRICT: tuple[Criterion, ...] = (
    Prophet(INF, INF, INF),
    Prophet(INF, INF, INF, region=(2, 5)),
    SchED(INF, INF),
    SchED(INF, INF, "linear", variant="paper"),
    JoT(1e30, 1e29),
    Patience(99),
    Entropy(1e-300),  # below what a mean can be
    KL(1e-300),
    StableAndConfident(99),
    Mutual(0.0, 99, INF),
    FixedSteps(99),
    For(Prophet(0.0, 0.0, 0.0), 99) | Patience(99),
    FixedSteps(1) & SchED(INF, INF),
)
MIDDLE: tuple[Criterion, ...] = (
    Prophet(1.3, 0.9, 0.7),
    Prophet(1.5, 1.0, 0.7, region=(2, 5)),
    SchED(1.0, 0.2),
    SchED(1.5, 0.6, "linear", variant="paper"),
    Patience(2),
    Entropy(1.3),
    KL(0.05, warmup=0.1),
    StableAndConfident(1, 1.6),
    Mutual(0.2, 2, 0.2),
    FixedSteps(4),
    Patience(1) & Entropy(1.6),
    For(Prophet(1.5, 1.5, 1.5), 2) | FixedSteps(6),
)
JOTS: tuple[Criterion, ...] = (JoT(20.0, 2.0), FromStep(JoT(5.0), 3) | Patience(3))

every_policy = pytest.mark.parametrize("policy", POLICIES, ids=repr)
both_temperatures = pytest.mark.parametrize("temperature", [0.0, 0.7])


def asked(n: int = 1) -> list[Request]:
    """Prompts of different lengths, one with a hole, and a token that is given among those to generate."""
    return canvases([[3, 4, 5], [6], [7, None, 8]], LENGTH, n, constraints={5: 9})


def scheduled(policy: Policy) -> TypeGuard[LLaDA | Dream]:
    return isinstance(policy, LLaDA | Dream)


def fitting(policy: Policy, rules: Sequence[Criterion]) -> list[Criterion]:
    """Those of some rules that a policy can be run with: one that revises knows none that freezes."""
    return [rule for rule in rules if not (policy.revises and rule.freezes)]


@cache
def plain(policy: Policy, temperature: float = 0.0, rule: Criterion | None = None) -> dict[int, Row]:
    """The run without a rule, or that of another, with its logits."""
    record = frozenset[str]() if policy.revises else frozenset({"logits"})
    rows = decoded(Toy(), unmasking(policy, rule or Full(), temperature, record=record), asked())
    return {i: row if record else row._replace(logits=said(asked()[i], row)) for i, row in rows.items()}


def said(request: Request, row: Row) -> list[Tensor]:
    """What the toy says at each step of a row, since nothing is recorded of one that is revised."""
    begin = request.tokens.masked_fill(~request.given, MASK)
    before = torch.stack([begin, *map(torch.tensor, row.canvases[:-1])])
    valid = None if request.valid is None else request.valid.expand_as(before)
    return list(Toy().logits(before, valid).index_fill(-1, torch.tensor(MASK), -INF))


def same(one: dict[int, Row], two: dict[int, Row]) -> bool:
    return {i: row[:4] for i, row in one.items()} == {i: row[:4] for i, row in two.items()}


# --- thresholds that nothing reaches ---


@pytest.mark.parametrize("rule", STRICT, ids=repr)
def test_a_rule_that_nothing_reaches_is_the_plain_run(rule: Criterion) -> None:
    # Full is the plain run: every rule includes it. Never also takes the steps in which nothing may change.
    for policy in POLICIES[STRICT.index(rule) % 5 :: 5]:
        if rule not in fitting(policy, STRICT):
            continue
        assert same(decoded(Toy(), unmasking(policy, rule), asked()), plain(policy)), policy


@every_policy
@both_temperatures
def test_nor_do_all_of_them_together_change_any_policy(policy: Policy, temperature: float) -> None:
    rule = reduce(or_, fitting(policy, STRICT))
    assert same(decoded(Toy(), unmasking(policy, rule, temperature), asked()), plain(policy, temperature))


@every_policy
@both_temperatures
def test_to_stop_when_full_costs_no_more_and_changes_no_text(policy: Policy, temperature: float) -> None:
    full, never = plain(policy, temperature), plain(policy, temperature, Never())
    for i, row in full.items():
        assert row.tokens == never[i].tokens
        assert row.nfe <= never[i].nfe
        assert len(never[i].canvases) == policy.steps if scheduled(policy) else len(row.canvases)
        assert never[i].reason == ("budget" if scheduled(policy) else "full")


def test_full_leaves_out_the_idle_steps_alone() -> None:
    # Blocks of 4 in 8 steps each: 4 are idle in the first, 5 in the second, where one position is given.
    assert [row.nfe for row in plain(LLaDA(16, block=4), 0.0, Never()).values()] == [16, 16, 16]
    assert [row.nfe for row in plain(LLaDA(16, block=4)).values()] == [7, 7, 8]


# --- thresholds that everything reaches ---


def first_quiet(row: Row) -> int | None:
    """The first step, from 0, at which something is open, and no argmax there differs from the step before."""
    for step in range(1, len(row.canvases)):
        open_ = torch.tensor(row.canvases[step - 1]) == MASK
        if bool(open_.any()) and bool((row.logits[step].argmax(-1) == row.logits[step - 1].argmax(-1))[open_].all()):
            return step
    return None


AT_ONCE: tuple[Criterion, ...] = (
    Prophet(-INF, -INF, -INF),
    Prophet(-INF, -INF, -INF, region=(1, 3)),
    SchED(-INF, -INF, variant="paper"),
    Entropy(1e9),
    StableAndConfident(0, 1e9),
    Mutual(0.0, 1, INF),
    FixedSteps(1),
    JoT(0.5, 0.4),
    Prophet(-INF, -INF, -INF) & FixedSteps(1),
    Prophet(INF, INF, INF) | Entropy(1e9),
)
AT_FIRST_QUIET: tuple[Criterion, ...] = (
    SchED(-INF, -INF),
    Patience(1),
    SchED(-INF, -INF) & Prophet(-INF, -INF, -INF),
)


@every_policy
def test_what_is_reached_at_once_ends_at_the_first_call(policy: Policy) -> None:
    for rule in fitting(policy, AT_ONCE):
        for row in decoded(Toy(), unmasking(policy, rule), asked()).values():
            assert (row.nfe, row.reason) == (1, "full" if rule.freezes else "halted"), rule


@every_policy
@both_temperatures
def test_what_waits_for_a_quiet_step_ends_there(policy: Policy, temperature: float) -> None:
    base = plain(policy, temperature)
    for rule in AT_FIRST_QUIET:
        for i, row in decoded(Toy(), unmasking(policy, rule, temperature), asked()).items():
            step = first_quiet(base[i])
            expected = (len(base[i].canvases), base[i].reason) if step is None else (step + 1, "halted")
            assert (len(row.canvases), row.reason) == expected, rule


def test_sched_ends_dream_at_the_second_call_since_the_first_commits_nothing() -> None:
    for row in decoded(Toy(), unmasking(Dream(8), SchED(-INF, -INF)), canvases([[3, 4]], 8, n=3)).values():
        assert (row.nfe, row.reason) == (2, "halted")


@every_policy
def test_a_divergence_needs_a_step_before_it(policy: Policy) -> None:
    base = plain(policy)
    for i, row in decoded(Toy(), unmasking(policy, KL(1e9, warmup=0.0)), asked()).items():
        assert row.nfe == min(2, base[i].nfe)


# --- rows and batches ---


def alone(model: Toy, decoder: Setup, requests: Sequence[Request]) -> dict[int, Row]:
    return {request.index: decoded(model, decoder, [request], 1)[request.index] for request in requests}


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"cfg_scale": 0.8},
    {"temperature": 1.2, "cfg_scale": 2.0},
)


@every_policy
def test_a_row_is_the_same_in_any_batch(policy: Policy) -> None:
    rules, at = fitting(policy, (Full(), Never(), *MIDDLE, *JOTS)), POLICIES.index(policy)
    for i in range(4):  # the policies take turns, so that all rules come up with many of them
        if isinstance(policy, Adjust) and "cfg_scale" in SETTINGS[i]:
            continue  # its layer knows no guidance
        decoder = unmasking(policy, rules[(4 * at + i) % len(rules)], **SETTINGS[i])
        model = Toy(SHIFTED if isinstance(policy, Dream | DreamThreshold) else PLAIN)
        assert same(decoded(model, decoder, asked(), batch_size=2), alone(model, decoder, asked())), decoder


@settings(max_examples=12)
@given(
    pair=st.sampled_from([(policy, rule) for policy in POLICIES for rule in fitting(policy, (*MIDDLE, *JOTS))]),
    temperature=st.sampled_from([0.0, 1.0]), order=st.permutations(range(6)), batch_size=st.integers(1, 7),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_order_and_batch_size_do_not_matter(
    pair: tuple[Policy, Criterion], temperature: float, order: list[int], batch_size: int, seed: int
) -> None:
    decoder, requests = unmasking(*pair, temperature, seed=seed), asked(2)
    one = decoded(Toy(seed=seed), decoder, [requests[i] for i in order], batch_size)
    assert same(one, decoded(Toy(seed=seed), decoder, requests, 6))


@every_policy
def test_padding_changes_nothing(policy: Policy) -> None:
    rules = fitting(policy, (Full(), *MIDDLE, *JOTS))
    rule = rules[POLICIES.index(policy) % len(rules)]
    prompts = [[3, 4, 5], [6], [7, None]]
    padded = decoded(Toy(), unmasking(policy, rule, 0.7), canvases(prompts, LENGTH))
    for i, prompt in enumerate(prompts):
        row = decoded(Toy(), unmasking(policy, rule, 0.7), canvases([prompt], LENGTH, first=i))[i]
        assert padded[i].tokens[3 - len(prompt) :] == row.tokens
        assert padded[i].result[1:] == row.result[1:]


def test_padding_on_the_right_changes_nothing_either() -> None:
    tokens = torch.tensor([3, 4, 0, 0, 0, 0, 0, 0])
    given_, valid = torch.arange(8) < 2, torch.arange(8) < 6
    padded = Request(0, tokens, given_ | ~valid, valid)
    short = Request(0, tokens[:6], given_[:6])
    for policy in (LLaDA(4, block=2), Dream(4), Threshold(0.5, block=2)):
        for rule in (Full(), *MIDDLE, *JOTS):
            if isinstance(rule, Prophet) and rule.region:
                continue  # it does not fit
            decoder = unmasking(policy, rule, 0.7)
            one, two = decoded(Toy(), decoder, [padded])[0], decoded(Toy(), decoder, [short])[0]
            assert (one.tokens[:6], *one.result[1:]) == (two.tokens, *two.result[1:]), decoder


def test_padding_that_reads_as_the_mask_is_no_mask() -> None:
    rows = decoded(Toy(Constants(0)), unmasking(LLaDA(4)), canvases([[3], [4, 5]], 4))
    assert [row.nfe for row in rows.values()] == [4, 4]


def test_samples_of_a_prompt_differ_by_their_index_and_seed_alone() -> None:
    def texts(seed: int, first: int) -> list[tuple[int, ...]]:
        decoder = unmasking(LLaDA(8, remasking="random"), temperature=1.5, seed=seed)
        return [row.tokens for _, row in sorted(decoded(Toy(), decoder, canvases([[3]], 8, 4, first=first)).items())]

    assert len({*texts(0, 0), *texts(1, 0)}) == 8
    assert texts(0, 2)[:2] == texts(0, 0)[2:]


# --- a run that halts is a prefix ---


@both_temperatures
@pytest.mark.parametrize("rule", MIDDLE, ids=repr)
def test_a_halted_row_is_a_prefix_filled_with_the_likeliest(rule: Criterion, temperature: float) -> None:
    halted = 0
    for policy in POLICIES[MIDDLE.index(rule) % 4 :: 4]:
        base = plain(policy, temperature)
        for i, row in plain(policy, temperature, rule).items():
            steps = len(row.canvases)
            assert all(torch.equal(a, b) for a, b in zip(row.logits, base[i].logits[:steps], strict=True))
            if row.reason != "halted":
                assert row[:4] == base[i][:4]
                continue
            assert row.canvases[:-1] == base[i].canvases[: steps - 1]
            before = (
                torch.tensor(row.canvases[-2]) if steps > 1 else asked()[i].tokens.masked_fill(~asked()[i].given, MASK)
            )
            assert row.tokens == tuple(torch.where(before == MASK, row.logits[-1].argmax(-1), before).tolist())
            halted += steps < len(base[i].canvases)
    assert halted >= 3


@both_temperatures
def test_a_rule_that_freezes_leaves_the_run_alone_until_it_does(temperature: float) -> None:
    for policy in POLICIES[::3]:
        if policy.revises:
            continue
        base, late = plain(policy, temperature), plain(policy, temperature, FromStep(JoT(5.0), 4))
        assert all(row.canvases[:3] == base[i].canvases[:3] for i, row in late.items())


# --- strict and loose settings ---

STRICTEST: tuple[tuple[Policy, Policy], ...] = (
    (Threshold(1.0), LLaDA()),
    (Factor(1e-9), LLaDA()),
    (EntropyBound(0.0), LLaDA()),
    (KLASS(1.0, 0.0), LLaDA()),
    (MutualPolicy(1.0, 99, 0.0), LLaDA()),
    (Editing(1.0, 1.0), LLaDA()),
    (Adjust("layer", 1), LLaDA()),
    (Adjust("layer", 1, order="random"), LLaDA(remasking="random")),
    (DreamThreshold(8, 1.0), LLaDA()),
    (Gaussian(4, first_std=1e-6), LLaDA(4)),  # a bell that is wide
    (CORE(4, every=1, begin=0.0, end=1.0, replaced=0), LLaDA(4)),
)
"""Settings at which a policy is a plain sampler: one position a call, or even quotas."""


@pytest.mark.parametrize(("strict", "sampler"), STRICTEST, ids=repr)
def test_at_its_strictest_a_policy_is_a_plain_sampler(strict: Policy, sampler: Policy) -> None:
    requests = canvases([[3, 4, 5], [6], []], LENGTH)
    one, two = (decoded(Toy(), unmasking(policy, Full()), requests) for policy in (strict, sampler))
    passes = isinstance(strict, Editing)  # a call more, which goes over the full block and edits nothing
    for i, row in one.items():
        assert row.canvases[: LENGTH if passes else None] == two[i].canvases
        assert (row.tokens, row.nfe, row.settled) == (two[i].tokens, two[i].nfe + passes, two[i].settled)


LADDERS: tuple[Sequence[Policy], ...] = (
    Threshold.sweep(),
    Factor.sweep(),
    EntropyBound.sweep(),
    [KLASS(confidence, 0.01) for confidence in (0.9, 0.6, 0.3, 0.2, 0.0)],
    MutualPolicy.sweep(commit="parallel"),
    [Editing(tau, 1.0) for tau in (0.9, 0.6, 0.3, 0.2, 0.0)],
    Adjust.sweep(path="layer"),
    [Guided(Bag(), accept="topk", k=k) for k in range(1, VOCAB)],
    [Guided(Bag(1), accept="dynamic_threshold", chance=chance) for chance in (0.9, 0.5, 0.2, 0.1, 0.03, 0.0)],
)
"""Settings of a policy, from strict to loose."""


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: type(ladder[0]).__name__)
def test_a_looser_setting_never_takes_more_calls(ladder: Sequence[Policy]) -> None:
    # Where positions do not hang together, as for freezing below.
    each = [decoded(Toy(sway=0.0), unmasking(policy, Full()), asked()) for policy in ladder]
    calls = [[row.nfe for row in rows.values()] for rows in each]
    for strict, loose in pairwise(calls):
        assert all(many >= few for many, few in zip(strict, loose, strict=True))
    assert sum(calls[0]) > sum(calls[-1])


# --- calls ---


@every_policy
def test_freezing_never_costs_a_call(policy: Policy) -> None:
    # Where positions do not hang together: else other contexts can make a threshold's positions less sure.
    model, drawn = Toy(sway=0.0), isinstance(policy, Dream) and (policy.alg == "origin" or policy.alg_temp is not None)
    for rule in fitting(policy, (JoT(20.0, 2.0), JoT(3.0))):
        base = decoded(model, unmasking(policy, Never() if drawn else Full()), asked())
        for i, row in decoded(model, unmasking(policy, rule), asked()).items():
            assert row.nfe <= base[i].nfe
    if scheduled(policy) and not policy.revises:
        assert policy.steps is not None
        rows = plain(policy, 0.0, JoT(20.0, 2.0)).values()
        assert all(row.nfe <= policy.steps for row in rows)


def test_freezing_saves_calls_and_reaches_into_later_blocks() -> None:
    logits = confident([0.2, 0.2, 0.99, 0.3])
    model = Scripted(lambda tokens: logits.expand(len(tokens), -1, -1))
    row = decoded(model, unmasking(LLaDA(4, block=2), JoT(50.0, 40.0)), canvases([[]], 4))[0]
    assert row.canvases == [(3, MASK, 3, MASK), (3, 3, 3, MASK), (3, 3, 3, 3)]


def looks(policy: Policy, row: Row) -> int:
    """Calls that the policy itself makes for a row whose blocks take all their steps."""
    if not isinstance(policy, CORE):
        return 0
    steps = (policy.steps or 0) // (LENGTH // (policy.block or LENGTH))
    return sum(policy.looks(step % steps, steps) for step in range(len(row.canvases)))


@every_policy
def test_guidance_costs_two_calls_a_step(policy: Policy) -> None:
    model = Toy()
    if isinstance(policy, Adjust):
        assert "a layer that knows no guidance" in refused(policy, [[3]], cfg_scale=1.5)
        return
    rule = Never() if isinstance(policy, CORE) else Full()  # so that its blocks take all their steps
    rows = decoded(model, unmasking(policy, rule, cfg_scale=1.5), asked())
    assert all(row.nfe == 2 * (len(row.canvases) + looks(policy, row)) for row in rows.values())
    assert model.rows == sum(row.nfe for row in rows.values())
    assert model.calls == max(row.nfe // 2 for row in rows.values())


def test_guidance_pulls_away_from_what_is_said_without_the_prompt() -> None:
    model, request = Toy(), canvases([[3, 4]], 6)
    decoder = unmasking(LLaDA(6), cfg_scale=1.5, record=frozenset({"logits"}))
    row = decoded(model, decoder, request)[0]
    told = model.logits(torch.tensor([[3, 4] + [MASK] * 6]))
    free = model.logits(torch.tensor([[MASK] * 8]))
    wanted = (free + 2.5 * (told - free))[0].index_fill(-1, torch.tensor(MASK), -INF)
    assert torch.equal(row.logits[0], wanted)


def test_a_shifted_model_is_read_one_place_to_the_left() -> None:
    record = frozenset({"logits"})
    row = decoded(Toy(SHIFTED), unmasking(Dream(6), record=record), canvases([[3, 4]], 6))[0]
    raw = Toy().logits(torch.tensor([[3, 4] + [MASK] * 6]))[0].index_fill(-1, torch.tensor(MASK), -INF)
    assert torch.equal(row.logits[0], raw[[0, 0, 1, 2, 3, 4, 5, 6]])


def test_why_rows_leave() -> None:
    def reasons(policy: Policy, rule: Criterion) -> set[str]:
        return {row.reason for row in decoded(Toy(), unmasking(policy, rule), asked()).values()}

    assert reasons(LLaDA(8), Never()) == {"budget"}
    assert reasons(LLaDA(8), Full()) == {"full"}
    assert reasons(LLaDA(8), FixedSteps(8)) <= {"halted", "full"}
    assert reasons(LLaDA(8), FixedSteps(7)) <= {"halted", "full"}
    assert reasons(Threshold(0.0), Never()) == {"full"}
    assert reasons(Threshold(0.0), FixedSteps(1)) == {"halted"}  # a row that is halted and full is halted


def test_text_is_settled_when_nothing_is_open_before_its_first_end() -> None:
    # Sure of every place but the first two, and of an end at the third.
    logits = confident([0.5, 0.6, 0.99, 0.98, 0.97, 0.96])
    logits[2, [3, EOS]] = logits[2, [EOS, 3]]
    model = Scripted(lambda tokens: logits.expand(len(tokens), -1, -1))
    row = decoded(model, unmasking(LLaDA(6)), canvases([[]], 6))[0]
    assert row.tokens == (3, 3, EOS, 3, 3, 3)
    assert (row.settled, row.nfe) == (6, 6)  # the two before the end are the last to be decided
    row = decoded(model, unmasking(LLaDA(6, block=2)), canvases([[]], 6))[0]
    assert (row.settled, row.nfe) == (3, 6)
    row = decoded(model, unmasking(LLaDA(6, block=2), cfg_scale=1.0), canvases([[]], 6))[0]
    assert (row.settled, row.nfe) == (6, 12)
    assert decoded(model, unmasking(LLaDA(5)), canvases([[EOS]], 5))[0].settled == 5  # a prompt's end is none


# --- the cache ---

BLOCKS: tuple[Policy, ...] = (
    LLaDA(8, block=4),
    LLaDA(4, block=2),
    LLaDA(16, block=4),
    LLaDA(8, block=4, remasking="random"),
    LLaDA(8),
    Dream(8, block=4),
    Dream(8, "origin", block=2),
    Dream(8, "maskgit_plus", 0.5, block=4, top_p=0.9),
    Threshold(0.5, block=4),
    Threshold(0.5, block=3),  # the last block is shorter
    Threshold(0.6),
    Factor(1.0, block=2),
    EntropyBound(0.5, block=4),
)
CACHES: tuple[Literal["prefix", "dual"], ...] = ("prefix", "dual")
both_caches = pytest.mark.parametrize("kind", CACHES)
all_caches = pytest.mark.parametrize("kind", get_args(CacheKind))


@all_caches
@pytest.mark.parametrize("policy", BLOCKS, ids=repr)
@pytest.mark.parametrize("constants", [PLAIN, SHIFTED], ids=["plain", "shifted"])
def test_where_keys_do_not_change_the_cache_changes_nothing(kind: Any, policy: Policy, constants: Constants) -> None:
    requests = canvases([[3, 4, 5], [6], [7, 8]], LENGTH, constraints={5: 9})
    for rule, temperature in ((Full(), 0.0), (Never(), 0.7)):
        whole = decoded(Toy(constants), unmasking(policy, rule, temperature), requests)
        cached = unmasking(policy, rule, temperature, cache=kind)
        assert same(decoded(Toy(constants), cached, requests, 2), whole)


@all_caches
@pytest.mark.parametrize("policy", [LLaDA(4), Dream(4, block=2), Threshold(0.6, block=2)], ids=repr)
def test_a_hole_in_the_prompt_is_filled_with_a_cache_too(kind: Any, policy: Policy) -> None:
    requests = canvases([[3, None, 4, None, 5]], 4)
    for seed in range(4):
        whole = decoded(Toy(seed=seed), unmasking(policy), requests)
        assert MASK not in decoded(Toy(seed=seed), unmasking(policy, cache=kind), requests)[0].tokens
        assert same(decoded(Toy(seed=seed), unmasking(policy, cache=kind), requests), whole)


@all_caches
def test_a_shifted_row_that_starts_at_once_changes_none_beside_it(kind: Any) -> None:
    requests = canvases([[]], LENGTH, 4)
    for seed in (3, 4, 6):
        decoder = unmasking(Threshold(0.5, block=2), temperature=0.7, cache=kind, seed=seed)
        model = Toy(SHIFTED, seed)
        assert same(decoded(model, decoder, requests, 3), alone(model, decoder, requests))


@both_caches
@pytest.mark.parametrize("rule", [*MIDDLE, *JOTS], ids=repr)
def test_rules_with_a_cache_leave_rows_alone(kind: Any, rule: Criterion) -> None:
    requests = canvases([[3, 4, 5], [6]], LENGTH, 2)
    for policy in (LLaDA(8, block=2), Threshold(0.5, block=2)):
        decoder = unmasking(policy, rule, 0.5, cache=kind)
        assert same(decoded(Toy(), decoder, requests, 3), alone(Toy(), decoder, requests))


@both_caches
def test_with_a_cache_rules_look_at_whole_calls_alone(kind: Any) -> None:
    one_a_step = Threshold(1.0, block=4)
    for steps, calls in ((1, 1), (2, 5), (5, 5), (6, 8)):
        row = decoded(Toy(), unmasking(one_a_step, FixedSteps(steps), cache=kind), canvases([[3]], 8))[0]
        assert (row.nfe, row.reason) == (calls, "full" if calls == 8 else "halted")


def tiny(running: bool = False) -> Tiny:
    return Tiny(GOLDEN / "models" / "tiny_sharp.safetensors", Constants(63, 1, shift=running), running)


@all_caches
@pytest.mark.parametrize("running", [False, True])
def test_the_call_that_fills_the_cache_is_a_whole_one(kind: Any, running: bool) -> None:
    requests = canvases([[5, 9, 12], [7]], 12)
    for policy in (Threshold(0.0), LLaDA(1), Dream(1)):  # one call
        whole = decoded(tiny(running), unmasking(policy), requests)
        assert same(decoded(tiny(running), unmasking(policy, cache=kind), requests), whole)
    for policy in (Threshold(0.6), LLaDA(12), Dream(12)):  # one block
        whole, cached = tiny(running), tiny(running)
        first = decoded(whole, unmasking(policy), requests), decoded(cached, unmasking(policy, cache=kind), requests)
        for i in range(2):
            assert first[0][i].canvases[0] == first[1][i].canvases[0]


@all_caches
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("policy", [LLaDA(12, block=4), Threshold(0.7, block=4), Dream(12, block=4)], ids=repr)
def test_rows_of_a_cache_in_flight_are_what_they_are_alone(kind: Any, running: bool, policy: Policy) -> None:
    prompts = [[5, 9, 12], [7], [3, 8, 20, 21, 22], [30, 31]]
    requests, decoder = canvases(prompts, 12), unmasking(policy, temperature=0.3, cache=kind)
    together = decoded(tiny(running), decoder, requests, 3)
    for i, request in enumerate(requests):
        row = decoded(tiny(running), decoder, [request], 1)[i]
        assert row.result == together[i].result
        if running:  # positions count real tokens, so padding moves nothing
            bare = decoded(tiny(running), decoder, canvases([prompts[i]], 12, first=i), 1)[i]
            assert bare.tokens == row.tokens[5 - len(prompts[i]) :]


@both_caches
def test_a_cache_computes_a_block_and_not_the_row(kind: Any) -> None:
    widths: list[int] = []

    class Watched(Toy):
        def partial(self, tokens: Tensor, *rest: Any, **more: Any) -> Tensor:
            widths.append(tokens.shape[1])
            return super().partial(tokens, *rest, **more)

    decoded(Watched(), unmasking(LLaDA(6, block=3), cache=kind), canvases([[3, 4]], 6))
    assert widths == ([3] * 4 if kind == "dual" else [6, 6, 3, 3])
    widths.clear()
    decoded(Watched(SHIFTED), unmasking(LLaDA(6, block=3), cache=kind), canvases([[3, 4]], 6))
    assert widths == ([4] * 4 if kind == "dual" else [7, 7, 4, 4])  # and what predicts the block's first position


READ_OPEN = (
    SchED(1.0, 0.2, variant="paper"), Patience(2), Entropy(1.3), KL(0.05, warmup=0.1), StableAndConfident(1, 1.6),
    FixedSteps(4), For(Prophet(1.5, 1.5, 1.5), 2) | FixedSteps(6),
)  # fmt: skip
"""Rules that read open positions alone."""


@pytest.mark.parametrize("rule", [rule for rule in READ_OPEN if rule.needs.isdisjoint(OF_EACH)], ids=repr)
@pytest.mark.parametrize("constants", [PLAIN, SHIFTED], ids=["plain", "shifted"])
def test_rules_see_all_that_is_open_with_a_free_cache(rule: Criterion, constants: Constants) -> None:
    requests = canvases([[3, 4, 5], [6], [7, None, 8]], LENGTH, 2, constraints={5: 9})
    for policy in (LLaDA(8), LLaDA(8, block=2), Threshold(0.5, block=3), Dream(8, block=4)):
        for temperature in (0.0, 0.7):
            decoder = unmasking(policy, rule, temperature)
            whole = decoded(Toy(constants), decoder, requests)
            assert same(decoded(Toy(constants), decoder.but(cache="free"), requests, 3), whole)


def test_rules_of_what_is_decided_are_refused_with_a_free_cache() -> None:
    for rule in (JoT(), SchED(), Prophet(region=(2, 5))):
        if not rule.needs.isdisjoint(OF_EACH):
            assert "reads positions that are decided" in refused(LLaDA(8), [[3]], criterion=rule, cache="free")
    for quirks in (Quirks(extra_call=True), Quirks(first_from_full=True)):
        with pytest.raises(CdlmError, match="of Fast-dLLM's caches"):
            unmasking(LLaDA(8), cache="free", quirks=quirks)


@pytest.mark.parametrize(("shift", "more"), [(False, 0), (True, 1)])
def test_a_free_cache_computes_a_token_once_more_and_keeps_it(shift: bool, more: int) -> None:
    widths: list[int] = []

    class Watched(Toy):
        def partial(self, tokens: Tensor, *rest: Any, **more: Any) -> Tensor:
            widths.append(tokens.shape[1])
            return super().partial(tokens, *rest, **more)

        def fill(self, tokens: Tensor, *rest: Any, **more: Any) -> Any:
            widths.append(0)
            return super().fill(tokens, *rest, **more)

    model = Watched(SHIFTED if shift else PLAIN)
    decoded(model, unmasking(LLaDA(6, block=3), cache="free"), canvases([[3, 4]], 6))
    # The step after a block is done reads its tokens, so that what is kept is of them and of no mask.
    assert widths == [0, *(width + more for width in (6, 6, 6, 3, 3))]
    widths.clear()
    decoded(model, unmasking(LLaDA(40), cache="free"), canvases([[3, 4]], 40))  # without blocks: 32 positions at a time
    assert widths[0] == 0
    assert set(widths[1:]) <= {40 + more, 8 + more}


# --- bad input, each refused in one line ---


FLAT = Scripted(lambda tokens: torch.zeros(*tokens.shape, VOCAB, dtype=torch.float64))


def refused(policy: Policy, prompts: Any, length: int = 8, model: Any = None, **settings_: Any) -> str:
    with pytest.raises(CdlmError) as caught:
        decoded(model or Toy(), unmasking(policy, **settings_), canvases(prompts, length))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_prompts_that_cannot_be_continued() -> None:
    assert f"holds the mask, token {MASK}" in refused(LLaDA(8), [[3, MASK]])
    with pytest.raises(CdlmError, match="leaves nothing to generate"):
        decoded(Toy(), unmasking(LLaDA(2)), canvases([[3]], 2, constraints={0: 4, 1: 5}))
    wrong: list[tuple[list[Any], str]] = [
        ([[], 4], "no prompts"),
        ([[[3]], 0], "length is the number of tokens to generate"),
        ([[[3]], -1], "length is the number of tokens to generate"),
        ([[[3]], 4, 0], "n is the number of samples"),
        ([[[3, -2]], 4], "whole number >= 0, got -2"),
        ([[[3]], 4, 1, {4: 5}], "a constraint at 4 lies outside"),
        ([[[3]], 4, 1, {-1: 5}], "a constraint at -1"),
    ]
    for arguments, message in wrong:
        with pytest.raises(CdlmError, match=message):
            canvases(*arguments)


@pytest.mark.parametrize(
    ("policy", "length", "message"),
    [
        (LLaDA(8, block=4), 10, "multiple of its block 4, got 10: 8 and 12 fit"),
        (Dream(8, block=4), 10, "multiple of its block 4, got 10: 8 and 12 fit"),
        (LLaDA(6, block=2), 8, "multiple of its 4 blocks (length 8, block 2), got 6: 4 and 8 fit"),
        (Dream(6, block=2), 8, "multiple of its 4 blocks (length 8, block 2), got 6: 4 and 8 fit"),
        (LLaDA(8, block=8), 5, "multiple of its block 8, got 5: 8 fits"),
        (LLaDA(3, block=2), 8, "multiple of its 4 blocks (length 8, block 2), got 3: 4 fits"),
        (DreamThreshold(3), 8, "divides the length 8, got 3: these do: 1, 2, 4, 8"),
    ],
)  # fmt: skip
def test_lengths_and_steps_that_do_not_fit_each_other(policy: Policy, length: int, message: str) -> None:
    assert message in refused(policy, [[3]], length)


def test_a_broken_model() -> None:
    def broken(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[-1, -1, 4] = math.nan
        return logits

    for policy in (LLaDA(8), Dream(8), Threshold(), KLASS(), MutualPolicy()):
        assert "not numbers" in refused(policy, [[3]], model=Scripted(broken))


def test_a_broken_call_of_a_block() -> None:
    class Broken(Toy):
        def partial(self, *arguments: Any, **more: Any) -> Tensor:
            return super().partial(*arguments, **more).fill_(math.nan)

    assert "not numbers" in refused(LLaDA(8, block=4), [[3]], model=Broken(), cache="dual")


@pytest.mark.parametrize("shape", [(1, 8, VOCAB), (2, 9, VOCAB), (9, VOCAB), (1, 9, VOCAB, 1)])
def test_logits_of_another_shape(shape: tuple[int, ...]) -> None:
    assert "expected [1, 9] positions" in refused(LLaDA(8), [[3]], model=Scripted(lambda _: torch.zeros(shape)))


@pytest.mark.parametrize("vocabulary", [MASK, 1])
def test_logits_of_another_vocabulary(vocabulary: int) -> None:
    message = refused(LLaDA(8), [[3]], model=Scripted(lambda tokens: torch.zeros(*tokens.shape, vocabulary)))
    assert f"at least {MASK + 1}" in message


@pytest.mark.parametrize("rows", [1, 3])
def test_guidance_of_a_model_that_answers_for_other_rows(rows: int) -> None:
    message = refused(LLaDA(8), [[3]], model=Scripted(lambda _: torch.zeros(rows, 9, VOCAB)), cfg_scale=1.0)
    assert "the model gave logits of shape" in message


def test_a_prompt_of_another_vocabulary() -> None:
    assert "at least 51" in refused(LLaDA(8), [[50]], model=FLAT)


@pytest.mark.parametrize("policy", [LLaDA(8, no_eos=True), LLaDA(8, eos_last=True)], ids=repr)
def test_ends_that_the_model_does_not_have(policy: Policy) -> None:
    assert "give eos_id" in refused(policy, [[3]], model=Toy(Constants(MASK)))
    assert "another vocabulary" in refused(policy, [[3]], model=Toy(Constants(MASK, 50)))


@pytest.mark.parametrize("rule", [NormConvergence(0.1), AngleConvergence(0.1), FixedSteps(2) | NormConvergence(0.1)])
def test_rules_of_an_embedding_space(rule: Criterion) -> None:
    assert "a masked model has none" in refused(LLaDA(8), [[3]], criterion=rule)


def test_a_record_of_what_there_is_not() -> None:
    assert "a masked model has none" in refused(LLaDA(8), [[3]], record=frozenset({"x0_norm"}))
    assert "no signal 'typo'" in refused(LLaDA(8), [[3]], record=frozenset({"typo"}))


def test_an_answer_outside_the_canvas() -> None:
    assert "does not fit" in refused(LLaDA(8), [[3], [4, 5]], criterion=Prophet(region=(4, 9)))


@all_caches
def test_what_cannot_be_decoded_with_a_cache(kind: Any) -> None:
    assert "keeps no keys and values" in refused(LLaDA(8), [[3]], model=FLAT, cache=kind)
    for policy in (KLASS(), MutualPolicy()):
        assert "reads whole rows" in refused(policy, [[3]], cache=kind)
    assert "reads whole rows" in refused(Dream(8, pooled=True), [[3]], cache=kind)
    assert "guidance" in refused(LLaDA(8), [[3]], cache=kind, cfg_scale=1.0)
    assert "record" in refused(LLaDA(8), [[3]], cache=kind, record=frozenset({"tokens"}))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": -0.1}, "number temperature >= 0, got -0.1"),
        ({"temperature": math.nan}, "number temperature >= 0"),
        ({"temperature": INF}, "number temperature >= 0"),
        ({"cfg_scale": -1.0}, "number cfg_scale >= 0"),
        ({"cfg_scale": math.nan}, "number cfg_scale >= 0"),
        ({"seed": -1}, "whole number seed >= 0"),
    ],
)  # fmt: skip
def test_settings_out_of_range(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(CdlmError, match=message):
        unmasking(**settings_)


def test_a_batch_of_none() -> None:
    with pytest.raises(CdlmError, match="batch_size must be >= 1"):
        UnmaskingLoop(Toy(), *unmasking(), 0)
