"""Known answers and laws of unmasking policies, quotas and draws."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from masked_toys import EOS, EOT, MASK, VOCAB, Row, Scripted, Toy, confident, decoded
from setups import unmasking
from torch import Tensor

from cdlm.core.errors import CdlmError
from cdlm.core.parsing import brief
from cdlm.core.rng import ORDER, TOKENS, PositionNoise, Site, _mixed
from cdlm.halting import Full, Never
from cdlm.masked.model import Constants
from cdlm.policies import POLICIES, parse_policy, sweep_policy
from cdlm.policies.confidence import Factor, Threshold
from cdlm.policies.dream import Dream, DreamThreshold, filtered
from cdlm.policies.entropy import EntropyBound, entropy_bounded
from cdlm.policies.klass import KLASS
from cdlm.policies.llada import LLaDA
from cdlm.policies.mutual import Mutual
from cdlm.policies.policy import Policy
from cdlm.policies.quotas import best, even, falling, ranked, transfer_share, transfer_shares
from cdlm.sampling.requests import canvases

INF = math.inf


def row_of(policy: Policy, p: Sequence[float], **settings_: Any) -> Row:
    """A row whose positions are as sure as `p` says, whatever stands beside them."""
    return rows_of(policy, confident(p), 1, **settings_)[0]


def rows_of(policy: Policy, logits: Float[Tensor, "n v"], n: int, **settings_: Any) -> dict[int, Row]:
    model = Scripted(lambda tokens: logits.expand(len(tokens), -1, -1))
    return decoded(model, unmasking(policy, **settings_), canvases([[]], len(logits), n), n)


def order_of(row: Row) -> list[set[int]]:
    """Positions that each step decides."""
    decided = [{i for i, token in enumerate(canvas) if token != MASK} for canvas in row.canvases]
    return [now - before for before, now in pairwise([set(), *decided])]


def counts(row: Row) -> list[int]:
    return [len(step) for step in order_of(row)]


def chi_square(seen: Sequence[int], chance: Sequence[float]) -> float:
    total = sum(seen)
    return sum((s - total * c) ** 2 / (total * c) for s, c in zip(seen, chance, strict=True))


chances = st.integers(150, 999).map(lambda x: x / 1000)  # no two so near that rounding makes them equal
sure = st.lists(chances, min_size=1, max_size=9)
few = settings(max_examples=15)

# --- quotas ---


def spent(masks: int, steps: int, eps: float | None = None) -> list[int]:
    """Tokens of each step of a schedule."""
    total, out = torch.tensor([masks]), []
    shares = None if eps is None else transfer_shares([steps], steps, eps)
    for step in range(steps):
        now, all_ = torch.tensor([step]), torch.tensor([steps])
        out.append(int(even(total, all_, now) if shares is None else falling(total - sum(out), shares, all_, now)))
    return out


def test_even_quotas() -> None:
    assert spent(10, 4) == [3, 3, 2, 2]
    assert spent(32, 12) == [3] * 8 + [2] * 4
    assert spent(3, 5) == [1, 1, 1, 0, 0]


def test_falling_quotas() -> None:
    assert spent(10, 4, 1e-3) == [2, 2, 2, 4]
    assert spent(8, 8, 1e-3) == [0, 1, 1, 1, 1, 1, 1, 2]
    assert spent(32, 12, 1e-3) == [2] * 5 + [3] * 6 + [4]
    assert spent(1024, 1024, 1e-3) == [0, 0, *[1] * 1021, 3]


@few
@given(masks=st.integers(0, 60), steps=st.integers(1, 70))
def test_quotas_spend_all(masks: int, steps: int) -> None:
    shares = spent(masks, steps)
    assert sum(shares) == masks == sum(spent(masks, steps, 1e-3))
    assert shares == sorted(shares, reverse=True)
    assert max(shares) - min(shares) <= 1


def test_the_share_of_a_step() -> None:
    # With t = 1, 0.75, 0.5, 0.25, 0: a quarter of all at each step.
    for eps, expected in ((0.0, [1 / 4, 1 / 3, 1 / 2, 1.0]), (1.0, [0.0, 0.0, 0.0, 1.0])):
        shares = transfer_shares([4] * 4, 4, eps)
        torch.testing.assert_close(transfer_share(shares, torch.arange(4)), torch.tensor(expected))
    # Rows with fewer steps than others, and steps after the last.
    shares = transfer_shares([2, 4], 4, 0.0)
    torch.testing.assert_close(shares, torch.tensor([[1 / 2, 1, 1, 1], [1 / 4, 1 / 3, 1 / 2, 1]]))
    assert transfer_share(shares, torch.tensor([9, 4])).tolist() == [1, 1]


def test_rows_have_quotas_of_their_own() -> None:
    masks, steps, step = torch.tensor([10, 3]), torch.tensor([4, 4]), torch.tensor([0, 3])
    assert even(masks, steps, step).tolist() == [3, 0]
    assert falling(masks, transfer_shares([4, 4], 4, 1e-3), steps, step).tolist() == [2, 3]


def test_of_equals_the_first_is_best() -> None:
    score = torch.tensor([[0.5, 0.7, 0.7, 0.7, 0.9]])
    candidates = torch.tensor([[True, True, True, True, False]])
    assert best(score, candidates, torch.tensor([2])).tolist() == [[False, True, True, False, False]]
    assert best(score, candidates, torch.tensor([9])).tolist() == candidates.tolist()
    assert not best(score, candidates, torch.tensor([0])).any()
    assert ranked(score, candidates)[0, :4].tolist() == [1, 2, 3, 0]


# --- how many at once ---

GOLDEN: list[tuple[Sequence[float], tuple[int, int, int]]] = [
    ((0.99, 0.9001, 0.80, 0.70), (2, 3, 4)),
    ((0.99, 0.9001, 0.50), (2, 2, 3)),
    ((0.60, 0.10), (1, 1, 2)),
    ((0.20,), (1, 1, 1)),
    ((0.97,) * 30, (30, 30, 30)),
]


@pytest.mark.parametrize(("p", "expected"), GOLDEN)
def test_first_commits_of_the_parallel_rules(p: Sequence[float], expected: tuple[int, int, int]) -> None:
    for policy, count in zip((Threshold(0.9), Factor(1.0), Factor(1.0, last_rank=True)), expected, strict=True):
        for sequence in (p, p[::-1]):  # the order of the positions does not matter
            assert counts(row_of(policy, sequence))[0] == count


def test_the_ranks_of_factor_start_anew_at_each_step() -> None:
    assert counts(row_of(Factor(1.0), (0.99, 0.9, 0.8, 0.7))) == [3, 1]
    assert counts(row_of(Factor(1.0), (0.7, 0.7, 0.7, 0.7))) == [2, 2]  # from 2/3 at the second, 3/4 at the third
    assert counts(row_of(Factor(1e-9), (0.9, 0.9, 0.9))) == [1, 1, 1]
    assert counts(row_of(Factor(9.0), (0.2, 0.2, 0.2))) == [3]


@few
@given(p=sure)
def test_a_threshold_above_one_is_one_position_a_step_and_zero_is_all(p: list[float]) -> None:
    one = row_of(Threshold(1.0), p)
    assert counts(one) == [1] * len(p)
    chosen = [p[min(step)] for step in order_of(one)]
    assert chosen == sorted(p, reverse=True)
    assert counts(row_of(Threshold(0.0), p)) == [len(p)]


@few
@given(p=sure, tau=st.floats(0.1, 0.9), more=st.floats(0.0, 0.1))
def test_a_lower_threshold_commits_more_at_once(p: list[float], tau: float, more: float) -> None:
    strict, loose = row_of(Threshold(tau + more), p), row_of(Threshold(tau), p)
    assert order_of(strict)[0] <= order_of(loose)[0]
    assert strict.nfe >= loose.nfe
    assert order_of(loose)[0] >= {i for i, x in enumerate(p) if x >= tau + 1e-9}


@few
@given(p=sure, f=st.floats(1e-9, 3.0), more=st.floats(0.0, 1.0))
def test_a_larger_factor_commits_more_at_once(p: list[float], f: float, more: float) -> None:
    strict, loose = row_of(Factor(f), p), row_of(Factor(f + more), p)
    assert order_of(strict)[0] <= order_of(loose)[0]
    assert strict.nfe >= loose.nfe


@few
@given(p=sure, nats=st.floats(0.0, 2.0), more=st.floats(0.0, 1.0))
def test_a_larger_bound_of_entropy_commits_more_at_once(p: list[float], nats: float, more: float) -> None:
    strict, loose = row_of(EntropyBound(nats), p), row_of(EntropyBound(nats + more), p)
    assert order_of(strict)[0] <= order_of(loose)[0]
    assert strict.nfe >= loose.nfe


def test_no_bound_of_entropy_is_one_call_a_block_and_none_one_position_a_call() -> None:
    rows = canvases([[3, 4], [5]], 8, 2)
    assert {row.nfe for row in decoded(Toy(), unmasking(EntropyBound(INF, block=4)), rows).values()} == {2}
    assert {row.nfe for row in decoded(Toy(), unmasking(EntropyBound(INF)), rows).values()} == {1}
    assert {row.nfe for row in decoded(Toy(), unmasking(EntropyBound(0.0)), rows).values()} == {8}


def test_the_bound_of_entropy_by_hand() -> None:
    # In the order of the score: sums 0.5, 0.6, 1.5, 1.7, of which all but the largest are 0, 0.1, 0.6, 0.8.
    entropy, score = torch.tensor([[0.1, 0.5, 0.2, 0.9, 7.0]]), torch.tensor([[0.8, 0.9, 0.1, 0.5, 1.0]])
    candidates = torch.tensor([[True, True, True, True, False]])
    for nats, places in ((0.0, {1}), (0.11, {0, 1}), (0.59, {0, 1}), (0.61, {0, 1, 3}), (0.81, {0, 1, 2, 3})):
        commit = entropy_bounded(entropy, score, candidates, nats)
        assert set(commit[0].nonzero().squeeze(1).tolist()) == places


def test_a_batch_has_a_bound_for_each_row() -> None:
    # A maximum over the batch instead of the positions would let the first row commit more.
    entropy = torch.tensor([[0.4, 0.3, 0.3], [3.0, 0.1, 0.1]])
    score, candidates = torch.tensor([[0.9, 0.8, 0.7]] * 2), torch.ones(2, 3, dtype=torch.bool)
    assert entropy_bounded(entropy, score, candidates, 0.35).sum(1).tolist() == [2, 3]


def test_dream_with_a_threshold_owes_what_it_refuses() -> None:
    p = (0.9, 0.4, 0.8, 0.7)
    assert counts(row_of(DreamThreshold(2, 0.3), p)) == [2, 2]
    assert counts(row_of(DreamThreshold(2, 0.5), p)) == [2, 1, 1]  # goes on when the steps are over
    assert counts(row_of(DreamThreshold(4, 1.1), p)) == [1, 1, 1, 1]
    assert counts(row_of(DreamThreshold(1, 0.5), p)) == [3, 1]
    told = {4: (0.9, 0.3, 0.3, 0.3), 3: (0.9, 0.9, 0.9, 0.9)}
    model = Scripted(lambda tokens: torch.stack([confident(told[int((row == MASK).sum())]) for row in tokens]))
    row = decoded(model, unmasking(DreamThreshold(2, 0.5)), canvases([[]], 4))[0]
    assert counts(row) == [1, 3]  # one of two; then two and the one that it owes


# --- fixed schedules ---


@few
@given(p=st.lists(chances, min_size=2, max_size=9, unique=True), steps=st.integers(1, 12))
def test_llada_commits_an_even_quota_the_surest_first(p: list[float], steps: int) -> None:
    row = row_of(LLaDA(steps), p)
    assert counts(row) == spent(len(p), steps)
    chosen = [sorted((p[i] for i in step), reverse=True) for step in order_of(row)]
    assert [x for step in chosen for x in step] == sorted(p, reverse=True)


@few
@given(n=st.integers(1, 10), steps=st.integers(1, 12), alg=st.sampled_from(["entropy", "maskgit_plus", "topk_margin"]))
def test_dream_commits_a_falling_quota(n: int, steps: int, alg: Any) -> None:
    assert counts(row_of(Dream(steps, alg), [0.5] * n)) == spent(n, steps, 1e-3)


@pytest.mark.parametrize("policy", [LLaDA(6, block=3), Dream(6, block=3), LLaDA(12, block=3)], ids=repr)
def test_each_block_has_a_schedule_of_its_own(policy: Any) -> None:
    row = row_of(policy, [0.2, 0.3, 0.4, 0.9, 0.8, 0.7], criterion=Never())
    one = spent(3, policy.steps // 2, None if isinstance(policy, LLaDA) else 1e-3)
    assert counts(row) == one * 2
    assert set().union(*order_of(row)[: len(one)]) == {0, 1, 2}


BLOCKED: tuple[Policy, ...] = (
    LLaDA(8, block=2),
    LLaDA(4, block=4, remasking="random"),
    Dream(8, "origin", block=4),
    Dream(8, alg_temp=1.0, block=2),
    Threshold(0.5, block=3),
    Factor(3.0, block=2),
    EntropyBound(1.0, block=4),
    KLASS(0.2, 2.0, block=2),
    Mutual(0.2, 2, 0.5, block=2),
)


@pytest.mark.parametrize("policy", BLOCKED, ids=repr)
def test_blocks_are_decoded_from_left_to_right(policy: Any) -> None:
    rows = decoded(Toy(), unmasking(policy, Full(), 0.7), canvases([[3], [4, None, 5]], 8, 3, constraints={2: 6}))
    for row in rows.values():
        for canvas in row.canvases:
            open_ = [max(-1, (i - 3) // policy.block) for i, token in enumerate(canvas) if token == MASK]
            first = max(0, min(open_, default=9))
            ahead = [i for i in range(3 + policy.block * (first + 1), 11) if i != 5]
            assert all(canvas[i] == MASK for i in ahead), "a later block was decided before this one"


@pytest.mark.parametrize(
    "policy",
    [
        LLaDA(5), Dream(5), Dream(5, "topk_margin"), Threshold(1.0), Factor(1e-9), EntropyBound(0.0), KLASS(1.0),
        Mutual(persistence=10**9), Mutual(0.0, 10**9, INF, "parallel"),
        DreamThreshold(5, 1.1),
    ],
    ids=repr,
)  # fmt: skip
def test_of_equals_the_first_goes_first(policy: Policy) -> None:
    places = [i for step in order_of(row_of(policy, [0.5] * 5)) for i in sorted(step)]
    assert places == [0, 1, 2, 3, 4]


def test_the_confidences_of_dream_rank_differently() -> None:
    # Place 0 has the largest probability, place 1 the largest margin, place 2 the least entropy.
    places = [[0.0] * 3 + [0.48, 0.40, 0.04, 0.02, 0.02, 0.02, 0.02], [0.40] + [0.06] * 10, [0.45, 0.44, 0.11]]
    p = torch.tensor([place + [0.0] * (VOCAB - len(place)) for place in places], dtype=torch.float64)
    algorithms: dict[Any, int] = {"maskgit_plus": 0, "topk_margin": 1, "entropy": 2}
    for alg, place in algorithms.items():
        steps = order_of(rows_of(Dream(3, alg, eps=0.0), p.log().clamp(min=-60), 1)[0])
        assert steps[0] == {place}


# --- KLASS ---


def test_klass_by_hand() -> None:
    """Six positions; p of each before every step, which the number of masks tells."""
    told = {
        6: (0.70, 0.50, 0.30, 0.90, 0.91, 0.99),  # nothing is before it: the best alone, position 5
        5: (0.70, 0.50, 0.80, 0.90, 0.95, 0.99),  # only one divergence yet: the best alone, position 4
        4: (0.71, 0.50, 0.80, 0.90, 0.95, 0.99),  # 0 and 3 are stable and sure; 2 moved one step ago; 1 is not sure
        3: (0.71, 0.50, 0.80, 0.90, 0.95, 0.99),  # a stricter bound comes here: 0 is stable in a step
        2: (0.71, 0.50, 0.80, 0.90, 0.95, 0.99),  # 2 is stable by now
        1: (0.71, 0.50, 0.80, 0.90, 0.95, 0.99),  # none is ready: the best alone
    }

    def script(tokens: Tensor) -> Tensor:
        return torch.stack([confident(told[int((row == MASK).sum())]) for row in tokens])

    row = decoded(Scripted(script), unmasking(KLASS(0.6, 0.01)), canvases([[]], 6))[0]
    assert order_of(row) == [{5}, {4}, {0, 3}, {2}, {1}]
    strict = decoded(Scripted(script), unmasking(KLASS(0.6, 0.0001)), canvases([[]], 6))[0]
    assert order_of(strict)[:3] == [{5}, {4}, {3}]  # 0 moved by 2.4e-4 nats


def test_klass_on_what_never_moves_is_all_that_is_sure_at_the_third_call() -> None:
    assert order_of(row_of(KLASS(0.6, 0.01), (0.9, 0.95, 0.8, 0.61, 0.5))) == [{1}, {0}, {2, 3}, {4}]


# --- tokens that are held back ---


def test_ends_come_last() -> None:
    logits = confident([0.5, 0.99, 0.6, 0.9])
    logits[1, [3, EOS]] = logits[1, [EOS, 3]]
    logits[3, [3, EOT]] = logits[3, [EOT, 3]]
    assert order_of(rows_of(LLaDA(4), logits, 1)[0]) == [{1}, {3}, {2}, {0}]
    for temperature in (0.0, 0.01):
        row = rows_of(LLaDA(4, eos_last=True), logits, 1, temperature=temperature)[0]
        assert order_of(row) == [{2}, {0}, {1}, {3}]
        assert row.tokens == (3, EOS, 3, EOT)


def test_ends_can_be_ruled_out() -> None:
    logits = confident([0.5, 0.99, 0.6, 0.9])
    logits[1, [3, EOS]] = logits[1, [EOS, 3]]
    rows = rows_of(LLaDA(4, no_eos=True), logits, 200, temperature=1.5)
    assert all(EOS not in row.tokens for row in rows.values())
    assert any(EOS in row.tokens for row in rows_of(LLaDA(4), logits, 20, temperature=1.5).values())


@pytest.mark.parametrize(
    "policy", [LLaDA(2), Dream(2, "origin"), Threshold(), Factor(), EntropyBound(), KLASS()], ids=repr
)
def test_the_mask_is_never_proposed(policy: Policy) -> None:
    logits = torch.zeros(4, VOCAB, dtype=torch.float64)
    logits[:, MASK], logits[:, 7] = 9.0, 5.0
    assert rows_of(policy, logits, 1)[0].tokens == (7, 7, 7, 7)  # decoded() looks for masks that are left
    assert rows_of(policy, logits, 40, temperature=2.0)


# --- draws ---


def test_a_random_order_is_any_with_the_same_chance() -> None:
    rows = rows_of(LLaDA(3, remasking="random"), confident([0.3, 0.9, 0.5]), 900)
    seen = Counter(tuple(min(step) for step in order_of(row)) for row in rows.values())
    assert chi_square([seen[order] for order in permutations(range(3))], [1 / 6] * 6) < 20.5  # 5 degrees, 0.1 %


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("policy", [Threshold(0.0), Dream(1)], ids=repr)
def test_tokens_are_drawn_from_the_tempered_distribution(policy: Policy, temperature: float) -> None:
    z = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.3, *[-INF] * 7], dtype=torch.float64)
    rows = rows_of(policy, z.expand(8, -1), 250, temperature=temperature)
    seen = Counter(token for row in rows.values() for token in row.tokens)
    chance = (z / temperature).softmax(-1)[:5].tolist()
    assert chi_square([seen[token] for token in range(5)], chance) < 18.5  # 4 degrees, 0.1 %


def test_a_filter_cuts_what_is_drawn() -> None:
    z = torch.tensor([0.5, 0.3, 0.15, 0.05, *[0.0] * 8], dtype=torch.float64).log()
    rows = rows_of(Dream(1, top_p=0.7), z.expand(8, -1), 150, temperature=1.0)
    seen = Counter(token for row in rows.values() for token in row.tokens)
    assert chi_square([seen[0], seen[1]], [0.625, 0.375]) < 10.9  # 1 degree, 0.1 %
    assert set(seen) == {0, 1}


def a_site(rows: int, steps: int, places: int, row: int = 0, step: int = 0, place: int = 0) -> Site:
    """Positions of some rows at some steps, one after the other."""
    axes = torch.arange(rows) + row, torch.arange(steps) + step, torch.arange(places) + place
    return Site(*(part.flatten() for part in torch.meshgrid(*axes, indexing="ij")))


def test_the_first_of_a_drawn_order_has_the_chance_of_its_score() -> None:
    score = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    site = Site(torch.arange(1500)[:, None], torch.zeros(1, 1, dtype=torch.int64), torch.arange(4))
    drawn = PositionNoise(0).order(site, score.expand(1500, 4))
    seen = Counter(drawn.argmax(1).tolist())
    assert chi_square([seen[i] for i in range(4)], score.softmax(0).tolist()) < 16.3  # 3 degrees, 0.1 %


def test_draws_are_a_function_of_seed_purpose_sample_step_and_position() -> None:
    site = a_site(4, 4, 4)
    drawn = torch.stack([PositionNoise(s).uniform(site, p) for s in range(3) for p in (TOKENS, ORDER)])
    assert len(drawn.unique()) == drawn.numel()
    assert torch.equal(PositionNoise(2).uniform(site, ORDER), drawn[5])
    some = torch.tensor([5, 60, 17])
    assert torch.equal(PositionNoise(1).uniform(site.at(some), TOKENS), drawn[2][some])
    logits = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    tokens = PositionNoise(0).token(site, logits, 1.0)
    assert torch.equal(PositionNoise(0).token(site.at(some), logits[some], 1.0), tokens[some])


def test_the_bits_of_the_draws_are_those_of_splitmix() -> None:
    """The finaliser against the published generator from seed 0 (its first numbers are in many test suites), so that
    the draws are the same on every device and in every version."""
    golden = 0x9E3779B97F4A7C15
    states = [(i * golden) % 2**64 for i in (1, 2, 3)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [x % 2**64 for x in _mixed(signed).tolist()] == expected
    drawn = PositionNoise(0).uniform(a_site(1, 1, 4), TOKENS)
    assert (drawn * 2**24).long().tolist() == FIRST_DRAWS


FIRST_DRAWS = [9665031, 5960007, 4126550, 2503892]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_draws_are_even_and_neighbours_know_nothing_of_each_other(axis: int) -> None:
    """Along samples, steps and positions: uniform numbers, exponential ones, and no correlation of neighbours."""
    size = [3, 3, 3]
    size[axis] = 20_000
    u = PositionNoise(5).uniform(a_site(*size), ORDER).view(size).movedim(axis, 0).flatten(1).T.double()
    assert 0 <= float(u.min()) < float(u.max()) < 1
    cells = torch.stack([torch.histc(row, 64, 0, 1) for row in u])
    assert float(((cells - 312.5) ** 2 / 312.5).sum(1).max()) < 63 + 5 * (2 * 63) ** 0.5
    between = torch.corrcoef(torch.cat([u[:, 1:], u[:, :-1]]))
    assert float((between - torch.eye(len(between))).abs().max()) < 5.5 / 20_000**0.5
    e = PositionNoise(5).exponential(a_site(*size), ORDER).double()
    assert abs(float(e.mean()) - 1) < 5 / len(e) ** 0.5
    assert abs(float((e < 0.01).double().mean()) - -math.expm1(-0.01)) < 5 * (0.01 / len(e)) ** 0.5


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """Of 2,000 tokens, each with a probability of 2e-6, 0.4 % in all; and one with the rest."""
    logits = torch.full((4_000, 2_001), math.log(2e-6))
    logits[:, -1] = math.log(1 - 2_000 * 2e-6)
    drawn = PositionNoise(1).token(a_site(4_000, 1, 1), logits, 1.0)
    assert 2 <= int((drawn < 2_000).sum()) <= 36  # 16 expected


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e-3, 1.0, 1e3])
def test_a_constant_that_is_added_to_the_logits_changes_no_draw(temperature: float) -> None:
    """At a small temperature the logits are large, and what is drawn among equals must not be rounded away."""
    logits = torch.tensor([0.0, 1.5, 1.5, 0.25]).expand(1000, 4)
    drawn = PositionNoise(0).token(a_site(1000, 1, 1), logits, temperature)
    assert torch.equal(PositionNoise(0).token(a_site(1000, 1, 1), logits + 64, temperature), drawn)
    assert temperature > 1e-3 or 400 < int((drawn == 1).sum()) == 1000 - int((drawn == 2).sum()) < 600


def test_dream_origin_decides_each_position_at_a_step_with_the_chance_of_its_time() -> None:
    steps, eps = 5, 0.2
    rows = rows_of(Dream(steps, "origin", eps=eps), confident([0.5] * 8), 250, criterion=Never())
    seen = torch.tensor([counts(row) for row in rows.values()]).sum(0).tolist()
    times = torch.linspace(1, eps, steps + 1).tolist()
    chance = [times[i] - times[i + 1] for i in range(steps - 1)]
    assert chi_square(seen, [*chance, times[steps - 1]]) < 18.5  # 4 degrees, 0.1 %


# --- filters ---


def kept(p: Sequence[float], top_p: float | None = None, top_k: int | None = None) -> list[int]:
    logits = torch.tensor([p], dtype=torch.float64).log()
    out = filtered(logits, top_p, top_k)
    least = torch.finfo(torch.float64).min
    assert torch.equal(out[out != least], logits[out != least])
    return (out[0] != least).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize(
    ("top_p", "top_k", "expected"),
    [
        (None, None, [0, 1, 2, 3, 4]),
        (1.0, None, [0, 1, 2, 3, 4]),
        (0.45, None, [1, 3]),  # 0.4, then 0.7: the first that exceeds it stays
        (0.39, None, [1]),
        (0.0, None, [1]),
        (0.71, None, [0, 1, 3]),  # of the two at 0.1, the first
        (None, 1, [1]),
        (None, 2, [1, 3]),
        (None, 3, [0, 1, 2, 3, 4]),  # the third largest, 0.1, is three times there
        (None, 99, [0, 1, 2, 3, 4]),
        (0.45, 1, [1]),
    ],
)
def test_what_filters_keep(top_p: float | None, top_k: int | None, expected: list[int]) -> None:
    assert kept([0.1, 0.4, 0.1, 0.3, 0.1], top_p, top_k) == expected


def test_a_mass_that_is_reached_is_not_exceeded() -> None:
    assert kept([0.25] * 4, 0.5) == [0, 1, 2]


@few
@given(
    z=st.lists(st.integers(-400, 400).map(lambda x: x / 100), min_size=2, max_size=9, unique=True),
    top_p=st.floats(0.01, 0.99),
)
def test_a_filter_keeps_the_fewest_that_exceed_its_mass(z: list[float], top_p: float) -> None:
    p = torch.tensor(z, dtype=torch.float64).softmax(0).tolist()
    mass, stay = 0.0, []
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass > top_p:
            break
        stay.append(i)
        mass += p[i]
    assert kept(p, top_p) == sorted(stay)


# --- settings out of range, each refused in one line ---


@pytest.mark.parametrize(
    ("policy", "settings_", "message"),
    [
        (LLaDA, {"steps": 0}, "LLaDA needs a whole number steps >= 1, got 0"),
        (LLaDA, {"block": 0}, "LLaDA needs a whole number block >= 1, got 0"),
        (Dream, {"steps": -1}, "Dream needs a whole number steps >= 1"),
        (Dream, {"block": -4}, "Dream needs a whole number block >= 1"),
        (Dream, {"eps": 1.5}, "Dream needs a number 0 <= eps <= 1"),
        (Dream, {"eps": -0.1}, "Dream needs a number 0 <= eps <= 1"),
        (Dream, {"alg_temp": -1.0}, "Dream needs a number alg_temp >= 0"),
        (Dream, {"alg_temp": math.nan}, "Dream needs a number alg_temp"),
        (Dream, {"top_p": 1.1}, "Dream needs a number 0 <= top_p <= 1"),
        (Dream, {"top_k": 0}, "Dream needs a whole number top_k >= 1"),
        (DreamThreshold, {"steps": 0}, "DreamThreshold needs a whole number steps >= 1"),
        (DreamThreshold, {"steps": 2, "tau": -0.1}, "DreamThreshold needs a number tau >= 0"),
        (Threshold, {"tau": -0.1}, "Threshold needs a number 0 <= tau <= 1, got -0.1"),
        (Threshold, {"tau": math.nan}, "Threshold needs a number 0 <= tau"),
        (Threshold, {"block": 0}, "Threshold needs a whole number block >= 1"),
        (Threshold, {"calls": 0}, "Threshold needs a whole number calls >= 1"),
        (Factor, {"f": -1.0}, "Factor needs a finite number f > 0"),
        (EntropyBound, {"nats": -1.0}, "EntropyBound needs a number nats >= 0"),
        (EntropyBound, {"nats": math.nan}, "EntropyBound needs a number nats"),
        (KLASS, {"confidence": 1.5}, "KLASS needs a number 0 <= confidence <= 1"),
        (KLASS, {"nats": -1.0}, "KLASS needs a number nats >= 0"),
        (Mutual, {"persistence": 0}, "Mutual needs a whole number persistence >= 1"),
        (Mutual, {"commit": "all"}, "Mutual needs commit to be one of frontier, parallel"),
        (KLASS, {"block": 0}, "KLASS needs a whole number block >= 1"),
        (Constants, {"mask_id": -1}, "mask_id is a token, a whole number >= 0, got -1"),
        (Constants, {"mask_id": 3, "eos_id": 3}, "eos_id and mask_id are both 3"),
    ],
)
def test_settings_out_of_range(policy: Any, settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(CdlmError) as caught:
        policy(**settings_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", [EntropyBound(INF), Threshold(1.0), Factor(1e9)], ids=repr)
def test_an_infinite_setting_is_written_and_read(policy: Policy) -> None:
    assert parse_policy(repr(policy)) == policy


# --- texts ---


@pytest.mark.parametrize("name", POLICIES)
def test_a_brief_text_is_the_policy(name: str) -> None:
    fixed = {"DreamThreshold": "(..., steps=8)", "Adjust": "(..., path='layer')"}.get(name, "(...)")
    if name == "Guided":
        return  # a guide that is a function has no text
    tried = sweep_policy(name + fixed)
    assert len(tried) > 1
    assert all(parse_policy(brief(policy)) == policy for policy in tried)
    assert all(len(brief(policy)) <= len(repr(policy)) for policy in tried)


def test_a_sweep_keeps_what_is_fixed() -> None:
    assert sweep_policy("Threshold(..., block=16)") == Threshold.sweep(block=16)
    assert sweep_policy("Threshold(0.7)") == [Threshold(0.7)]
    with pytest.raises(CdlmError, match=r"cannot sweep 'Threshold\(\.\.\., tau=0\.5\)'"):
        sweep_policy("Threshold(..., tau=0.5)")
    with pytest.raises(CdlmError, match="stands for all of its settings"):
        sweep_policy("Threshold(..., 0.5)")
    with pytest.raises(CdlmError, match="DreamThreshold has no settings to sweep"):
        sweep_policy("DreamThreshold")
    with pytest.raises(CdlmError, match="did you mean Threshold"):
        sweep_policy("Treshold(...)")
