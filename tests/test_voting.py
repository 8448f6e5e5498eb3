"""Laws and known answers of temporal self-consistency: weights, votes on answers and tokens, and the rule of a decided
vote."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_toys import MASK, Toy
from oracle import Oracle
from setups import Setup, diffusion, unmasking

from cdlm.continuous.sampler import DiffusionLoop
from cdlm.core.answers import PARSERS, answer_of, boxed, last_number
from cdlm.core.errors import CdlmError
from cdlm.halting import FixedSteps, For, FromStep, Full, Patience, VoteDecided, parse_criterion
from cdlm.halting.replay import replay
from cdlm.halting.voting import Ballots, Vote, lead, semantic_entropy, winner
from cdlm.masked.sampler import UnmaskingLoop
from cdlm.policies.confidence import Threshold
from cdlm.policies.llada import LLaDA
from cdlm.recording.file import Recording
from cdlm.recording.record import Switches
from cdlm.sampling.requests import Request, canvases
from cdlm.sampling.samples import Samples, collect
from cdlm.sampling.voting import AnswerPoll, AnswerReader, StepAnswers, TokenPoll, Voters, voted_tokens

VOTES = [Vote("fixed"), Vote("linear"), Vote(), Vote(alpha=11.0)]
every_vote = pytest.mark.parametrize("vote", VOTES, ids=repr)


class Parity(AnswerReader):
    """Reads an answer off the first generated token, and none of a row whose second one is small: no text is made."""

    def __init__(self) -> None:
        self.end_ids = ()

    def __call__(self, tokens: Any, generated: Any, valid: Any, parser: str = "marked") -> list[str | None]:
        assert bool((valid | ~generated).all())
        rows = [row[made].tolist() for row, made in zip(tokens, generated, strict=True)]
        return [None if row[1] < 2 else str(row[0] % 3) for row in rows]


READ = Parity()

# --- weights ---


@pytest.mark.parametrize(
    ("vote", "weights"),
    [
        (Vote("exponential", 5.0), (1, 3.4903, 12.1825, 42.5211)),
        (Vote("linear"), (0.25, 0.5, 0.75, 1)),
        (Vote("fixed"), (1, 1, 1, 1)),
        (Vote("exponential", 0.0), (1, 1, 1, 1)),
    ],
)
def test_known_weights(vote: Vote, weights: Sequence[float]) -> None:
    found = vote.weight(np.arange(4), np.array(4))
    np.testing.assert_allclose(found, weights, atol=5e-5)
    for step in range(4):
        assert vote.left(step, 4) == pytest.approx(sum(found[step + 1 :]))


@every_vote
def test_the_largest_alpha_has_numbers(vote: Vote) -> None:
    assert math.isfinite(Vote(alpha=500.0).left(0, 4096))
    assert vote.left(9, 10) == 0.0


# --- ballots ---


def cast(answers: Sequence[str | None], weights: Sequence[float]) -> dict[str, float]:
    ballots = Ballots.of(1)
    for answer, weight in zip(answers, weights, strict=True):
        ballots = ballots.cast([answer], np.array([weight]))
    return ballots.votes[0]


def test_the_winner_by_hand() -> None:
    votes = cast(["4", None, "7", "4", "9"], [1.0, 2.0, 3.0, 1.0, 0.5])
    assert votes == {"4": 2.0, "7": 3.0, "9": 0.5}
    assert (winner(votes), lead(votes)) == ("7", 1.0)
    assert winner(cast(["9", "4", "4", "9"], [1.0] * 4)) == "9"  # a tie: the one seen first
    assert (winner({}), lead({}), semantic_entropy({})) == (None, 0.0, 0.0)
    assert lead({"1": 2.0}) == 2.0


def test_ballots_are_not_written_over() -> None:
    before = Ballots.of(2)
    after = before.cast(["1", None], np.ones(2))
    after.cast(["1", "2"], np.ones(2))
    assert before.votes == [{}, {}]
    assert after.votes == [{"1": 1.0}, {}]


def test_semantic_entropy_is_that_of_the_shares() -> None:
    assert semantic_entropy({"1": 3.0}) == 0.0
    assert semantic_entropy({"1": 1.0, "2": 1.0}) == pytest.approx(math.log(2))
    assert semantic_entropy({"1": 3.0, "2": 1.0}) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


answers_ = st.lists(st.sampled_from([None, "1", "2", "3"]), min_size=1, max_size=24)


@given(answers=answers_, more=st.integers(0, 3), vote=st.sampled_from(VOTES))
@settings(max_examples=200)
def test_what_is_decided_is_the_winner_of_the_full_vote(answers: list, more: int, vote: Vote) -> None:
    """Whatever comes later, and also if the row ends before its budget."""
    budget = len(answers) + more
    weights = vote.weight(np.arange(len(answers)), np.array(budget)).tolist()
    full = winner(cast(answers, weights))
    decided = False
    for step in range(len(answers)):
        votes = cast(answers[: step + 1], weights[: step + 1])
        now = vote.decided(votes, step, budget)
        assert now or not (decided and answers[step] == winner(votes))  # it stays decided while the winner is said
        decided = now
        if now:
            assert winner(votes) == full
    if set(answers) == {"1"} and more == 0:
        assert decided


@given(answers=answers_)
def test_a_vote_is_decided_when_nothing_else_can_win(answers: list) -> None:
    """The converse, of whole numbers: while it is not decided, steps that all say the next answer can win or tie."""
    vote, budget = Vote("fixed"), len(answers) + 5
    votes = cast(answers, [1.0] * len(answers))
    step = len(answers) - 1
    rivals = sorted((weight for answer, weight in votes.items() if answer != winner(votes)), reverse=True)
    assert vote.decided(votes, step, budget) == (max(votes.values(), default=0.0) > (rivals or [0.0])[0] + 5)


# --- live, recorded, halted ---

PROMPTS = [[3, 4], [5, None, 6, 7], [8], []]


def loop_of(kind: str, setup: Setup, size: int) -> Any:
    return UnmaskingLoop(Toy(seed=3), *setup, size) if kind == "masked" else DiffusionLoop(Oracle(), *setup, size)


def requests_of(kind: str) -> list[Request]:
    if kind == "masked":
        return canvases(PROMPTS, 8, 2)
    place = torch.arange(8)
    valid = [place < 6 + i % 3 for i in range(5)]
    return [Request(i, place % 7, (place < i % 3) | ~valid[i], valid[i]) for i in range(5)]


def setups_of(kind: str) -> list[Setup]:
    if kind == "masked":
        return [
            unmasking(LLaDA(8), Full()),
            unmasking(LLaDA(4, block=4), Full(), 0.7),
            unmasking(Threshold(0.3), Full()),
        ]
    return [diffusion(12), diffusion(12, commit=Threshold(0.8))]


def run(kind: str, setup: Setup, size: int = 3, *polls: Any) -> Samples:
    """The samples with their record, watched by some polls."""
    sampling, options = setup
    if sampling.recorded - options.record:
        setup = setup.but(record=sampling.recorded)
    loop, asked = loop_of(kind, setup, size), requests_of(kind)
    steps = loop.steps(asked)
    for poll in polls:
        steps = poll.watch(steps)
    mask = MASK if kind == "masked" else None
    return collect(steps, asked, None, budget=loop.budget(asked), seed=0, record=True, mask_id=mask)


both = pytest.mark.parametrize("kind", ["masked", "continuous"])


class Watched(NamedTuple):
    """A full run that all votes have watched."""

    setup: Setup
    samples: Samples
    answers: list[AnswerPoll]
    tokens: list[TokenPoll]


@cache
def watched(kind: str) -> list[Watched]:
    voters, made = Voters.of(requests_of(kind)), []
    for setup in setups_of(kind):
        polls = [AnswerPoll(vote, voters, READ) for vote in VOTES], [TokenPoll(vote, voters) for vote in VOTES]
        made.append(Watched(setup, run(kind, setup, 3, *polls[0], *polls[1]), *polls))
    return made


@both
def test_live_votes_are_those_of_the_record(kind: str) -> None:
    for _, samples, on_answers, on_tokens in watched(kind):
        steps = StepAnswers.of(samples, READ)
        for poll in on_answers:
            live, kept = poll.voted(samples.tokens), steps.vote(poll.vote)
            assert live.answers == kept.answers
            assert live.ballots.votes == kept.ballots.votes
            assert [list(votes) for votes in live.ballots.votes] == [list(votes) for votes in kept.ballots.votes]
            np.testing.assert_array_equal(live.entropy, kept.entropy)
        for poll in on_tokens:
            np.testing.assert_array_equal(poll.voted(samples.tokens), voted_tokens(samples, poll.vote))


@both
def test_a_vote_does_not_depend_on_the_batch(kind: str) -> None:
    setup, other, *_ = watched(kind)[0]
    one, vote = run(kind, setup, 1), Vote()
    assert StepAnswers.of(one, READ).vote(vote).answers == StepAnswers.of(other, READ).vote(vote).answers
    np.testing.assert_array_equal(voted_tokens(one, vote), voted_tokens(other, vote))


@both
@every_vote
def test_votes_on_tokens_by_hand(kind: str, vote: Vote) -> None:
    for _, samples, *_ in watched(kind):
        assert samples.record is not None
        found, record = voted_tokens(samples, vote), samples.record
        frames = list(record.walk(samples.tokens))
        for i, row in enumerate(found):
            weights = vote.weight(np.arange(record.steps), record.budgets[[i]])
            for place, token in enumerate(row):
                if samples.given[i, place]:
                    assert token == samples.tokens[i, place]
                    continue
                votes: dict[int, float] = {}
                for step in np.flatnonzero(record.nfe[:, i] > 0):
                    said = int(frames[step][i, place])
                    votes[said] = votes.get(said, 0.0) + weights[step]
                assert votes[token] >= max(votes.values()) * (1 - 1e-12)


def test_of_equal_tokens_the_first_seen_is_voted() -> None:
    poll = TokenPoll(Vote("fixed"), Voters(np.arange(1), np.ones((1, 2), bool), np.ones((1, 2), bool)))
    for tokens in ([7, 3], [5, 3], [5, 4], [7, 4]):
        poll.add(np.arange(1), np.array([tokens]), np.ones(1))
    assert poll.voted(np.zeros((1, 2), np.int64)).tolist() == [[7, 3]]


@both
@pytest.mark.parametrize("vote", [Vote("linear"), Vote()], ids=repr)
def test_a_decided_vote_has_the_answer_of_the_full_vote(kind: str, vote: Vote) -> None:
    """Live and replayed: the same calls, the same tokens, and the voted answer of the whole run."""
    rule = VoteDecided(vote.weights, vote.alpha)
    halts = 0
    for setup, full, *_ in watched(kind):
        whole = StepAnswers.of(full, READ)
        halted = run(kind, setup.but(criterion=rule.reading(READ)), 2)
        assert StepAnswers.of(halted, READ).vote(vote).answers == whole.vote(vote).answers
        assert full.record is not None
        settings_ = {"policy": ""} if kind == "masked" else {}
        recording = Recording(full.record, full.tokens, full.given, full.valid, full.index, 0, "toy", "none", settings_)
        again = replay(recording, rule.reading(READ))
        np.testing.assert_array_equal(again.tokens, halted.tokens)
        np.testing.assert_array_equal(again.nfe, halted.nfe)
        assert whole.vote(vote, again.steps - 1).answers == whole.vote(vote).answers
        assert bool((again.nfe <= full.nfe).all())
        halts += int((again.nfe < full.nfe).sum())
    assert halts > 0


def test_the_fixed_vote_is_decided_past_half_of_the_steps() -> None:
    class One(Parity):
        def __call__(self, tokens: Any, generated: Any, valid: Any, parser: str = "marked") -> list[str | None]:
            return ["1"] * len(tokens)

    for vote, step in ((Vote("fixed"), 5), (Vote("linear"), 6), (Vote("exponential", 5.0), 7)):
        weights = vote.weight(np.arange(8), np.array(8))
        first = next(s for s in range(8) if weights[: s + 1].sum() > weights[s + 1 :].sum()) + 1
        assert first == step
        rule = VoteDecided(vote.weights, vote.alpha).reading(One())
        assert set(run("masked", unmasking(LLaDA(8), rule)).nfe.tolist()) == {step}


def test_without_answers_nothing_is_decided_and_the_final_text_speaks() -> None:
    class Late(Parity):
        """Has an answer of the final tokens alone."""

        def __call__(self, tokens: Any, generated: Any, valid: Any, parser: str = "marked") -> list[str | None]:
            return [None] * len(tokens)

    samples = run("masked", unmasking(LLaDA(8), VoteDecided().reading(Late())))
    assert set(samples.nfe.tolist()) == {8}
    steps = StepAnswers.of(samples, Late())
    assert steps.vote(Vote()).answers == [None] * 8
    assert steps.vote(Vote(), final=["5"] * 8).answers == ["5"] * 8


@pytest.mark.parametrize(
    "rule", [For(VoteDecided(), 2), FromStep(VoteDecided(), 7), VoteDecided() | Patience(99)], ids=repr
)
def test_rules_around_it_read_answers_too(rule: Any) -> None:
    halted = run("masked", unmasking(LLaDA(8), rule.reading(READ)))
    plain = run("masked", unmasking(LLaDA(8), VoteDecided().reading(READ)))
    assert bool((halted.nfe >= plain.nfe).all())
    assert rule.reading(READ) == rule


# --- what answers are ---


def test_parsers() -> None:
    text = "3 * 4 = 12. It is \\boxed{ \\frac{1}{2} } of $1,234.50. #### 19"
    assert PARSERS["marked"] is answer_of
    assert (answer_of(text), last_number(text), boxed(text)) == ("19", "19", "\\frac{1}{2}")
    assert last_number("2, 3, and -04.0.") == "-4"
    assert [last_number("none"), boxed("\\boxed{1"), boxed("\\boxed{ }"), boxed("no box")] == [None] * 4
    assert boxed("\\boxed{1} \\boxed{2}") == "2"


# --- texts and what is refused ---


def test_the_rule_is_its_own_configuration() -> None:
    rule = VoteDecided("linear", parser="boxed")
    assert parse_criterion(repr(rule)) == rule == rule.reading(READ)
    assert repr(rule.reading(READ)) == repr(rule)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("VoteDecided('cubic')", "one of fixed, linear, exponential"), ("VoteDecided(alpha=-1.0)", "0 <= alpha <= 500"),
        ("VoteDecided(alpha=inf)", "alpha"), ("VoteDecided(parser='eval')", "one of marked, number, boxed"),
    ],
)  # fmt: skip
def test_settings_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(CdlmError, match=message) as caught:
        parse_criterion(text)
    assert "\n" not in str(caught.value)


def test_votes_need_the_tokens_of_the_steps() -> None:
    samples = run("masked", unmasking(LLaDA(8), Full()))
    assert samples.record is not None
    none = Switches(*(part[:0] for part in samples.record.switches))
    without = replace(samples, record=replace(samples.record, switches=none))
    for read in (lambda one: StepAnswers.of(one, READ), lambda one: voted_tokens(one, Vote())):
        with pytest.raises(CdlmError, match="does not keep the tokens of every position"):
            read(without)
        with pytest.raises(CdlmError, match="draw the samples with record=True"):
            read(replace(samples, record=None))
    poll = AnswerPoll(Vote(), Voters.of(requests_of("masked")), READ)
    with pytest.raises(CdlmError, match="ask for the signal 'tokens'"):
        list(poll.watch(loop_of("masked", unmasking(), 2).steps(requests_of("masked"))))


def test_runs_in_blocks_of_their_own_cannot_vote() -> None:
    setup = diffusion(4, block=3).but(record=frozenset({"tokens"}))
    poll = TokenPoll(Vote(), Voters.of(requests_of("continuous")))
    with pytest.raises(CdlmError, match="a run in blocks"):
        list(poll.watch(loop_of("continuous", setup, 2).steps(requests_of("continuous"))))


def test_without_a_tokenizer_the_rule_is_refused_in_one_line() -> None:
    with pytest.raises(CdlmError, match="there is no tokenizer here") as caught:
        run("masked", unmasking(LLaDA(8), VoteDecided() | FixedSteps(3)))
    assert "\n" not in str(caught.value)
