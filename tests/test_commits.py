"""Commits of continuous models: a decided position is given from then on, as a prompt is."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from setups import Setup, diffusion
from torch import Tensor
from toys import lively, with_tokenizer

from cdlm.api import generate, open_session
from cdlm.cli.main import main
from cdlm.continuous.grids import LogT
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.sampler import Diffusion, DiffusionLoop, behind
from cdlm.continuous.solvers import Ancestral, Euler, Heun, Interval, Solver, TwoStep
from cdlm.core.errors import CdlmError
from cdlm.core.types import Condition, Decision, HaltReason, NewRows, Prediction, StepState
from cdlm.halting import KL, Criterion, Entropy, FixedSteps, JoT, Never, Patience
from cdlm.halting.criterion import Memory
from cdlm.halting.replay import replay
from cdlm.policies import POLICIES, parse_policy
from cdlm.policies.confidence import Factor, FallingThreshold, Threshold
from cdlm.policies.dream import Dream, DreamThreshold
from cdlm.policies.entropy import EntropyBound
from cdlm.policies.klass import KLASS
from cdlm.policies.llada import LLaDA
from cdlm.policies.mutual import Mutual
from cdlm.policies.policy import Policy
from cdlm.recording.file import Recording, read_folder
from cdlm.sampling.recordings import find_recording, recording_of, replayed
from cdlm.sampling.requests import Request

N, V, STEPS = 6, 7, 12
ASK: tuple[Policy, ...] = (
    Threshold(0.8), FallingThreshold(0.95, 0.3, 2.0, 0.5), Factor(0.5), EntropyBound(0.3), KLASS(0.6, 0.2),
    Mutual(0.6, 2, 0.2), Mutual(0.5, 3, 0.3, "parallel", exempt_first=True),
    LLaDA(STEPS, remasking="random"), Threshold(0.7, block=2), Dream(STEPS, alg="origin"),
)  # fmt: skip
FORCED: tuple[Policy, ...] = (LLaDA(), LLaDA(STEPS), DreamThreshold(3))
"""These commit by quota, sure or not."""
SOLVERS: tuple[Solver, ...] = (Euler(), Heun(), Ancestral())


class Watched(Oracle):
    """An oracle that remembers what it was told, and cannot be asked for what is given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.told: list[Condition] = []

    def denoise(self, z: Tensor, t: Tensor, condition: Condition) -> Prediction:
        self.told.append(condition)
        made = super().denoise(z, t, condition)
        return made._replace(logits=made.logits * condition.target[..., None])  # flat where a token is given


def requests(indices, prompt: int = 0) -> list[Request]:
    return [Request(int(i), torch.arange(N) % V, torch.arange(N) < prompt) for i in indices]


def outcomes(setup: Setup, asked: list[Request], batch_size: int = 4, denoiser: Oracle | None = None) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for step in DiffusionLoop(denoiser or Oracle(), *setup, batch_size).steps(asked):
        rows = step.done.nonzero().squeeze(1).tolist()
        for row, tokens in zip(rows, step.tokens.tolist(), strict=True):
            index = int(step.state.row[row])
            found[index] = tuple(tokens), int(step.state.nfe[row]), bool(step.full[row]), bool(step.halted[row])
    return found


def setup(commit: Policy | None, criterion: Criterion | None = None, **changes: Any) -> Setup:
    return diffusion(**{"steps": STEPS, "grid": LogT(), "commit": commit, "criterion": criterion or Never(), **changes})


# --- what every policy keeps ---


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("policy", [*ASK, *FORCED], ids=repr)
def test_a_row_is_the_same_in_any_batch(policy: Policy, solver: Solver) -> None:
    alone = {i: outcomes(setup(policy, solver=solver), requests([i], 1), 1)[i] for i in range(5)}
    for order, size in (([0, 1, 2, 3, 4], 5), ([3, 1, 4, 0, 2], 2)):
        assert outcomes(setup(policy, solver=solver), requests(order, 1), size) == alone


@pytest.mark.parametrize("policy", [*ASK, *FORCED], ids=repr)
def test_what_is_committed_is_told_and_stays(policy: Policy) -> None:
    for index in range(4):
        oracle = Watched()
        tokens, calls, full, _ = outcomes(setup(policy), requests([index], 2), 1, oracle)[index]
        assert calls == len(oracle.told) <= STEPS
        clean = oracle.table[torch.tensor(tokens)]
        opened = [condition.target[0] for condition in oracle.told]
        for condition in oracle.told:
            assert torch.equal(condition.clean[0], clean * ~condition.target[0][:, None])
        assert all(not (after & ~before).any() for before, after in itertools.pairwise(opened))
        assert full or calls == STEPS
        assert tokens[:2] == (0, 1)


def test_rows_end_when_all_is_committed() -> None:
    found = outcomes(setup(FallingThreshold(0.9, 0.0, 2.0, 0.5)), requests(range(8)), 3).values()
    assert all(full and calls < STEPS for _, calls, full, _ in found)
    assert {calls for _, calls, _, _ in outcomes(setup(Threshold(0.0)), requests(range(3))).values()} == {1}


def test_of_none_that_is_sure_nothing_is_committed() -> None:
    """A call of a continuous model moves the state without a commit: the run is then the plain one."""
    noisy = Oracle(t_min=0.5)  # never quite sure
    plain = outcomes(setup(None), requests(range(5)), denoiser=noisy)
    never = Threshold(1.0), Factor(1e-9), EntropyBound(0.0), KLASS(1.0, 0.0), FallingThreshold(1.0, 1.0)
    for policy in (*never, Mutual(1.0, 10**9)):
        assert outcomes(setup(policy), requests(range(5)), denoiser=noisy) == plain, policy


def test_commits_change_the_run_of_a_model_that_reads_them() -> None:
    system = lively()
    asked = [Request(i, torch.zeros(N, dtype=torch.long), torch.zeros(N, dtype=torch.bool)) for i in range(8)]
    runs = [
        {i: tokens for s in DiffusionLoop(system, *setup(policy), 4).steps(asked)
         for i, tokens in zip(s.state.row[s.done].tolist(), s.tokens.tolist(), strict=True)}
        for policy in (None, Threshold(0.2))
    ]  # fmt: skip
    assert runs[0] != runs[1]


class Doubter(Watched):
    """It is sure of what is open, and finds every given token wrong."""

    doubts = True

    def denoise(self, z: Tensor, t: Tensor, condition: Condition) -> Prediction:
        made = super().denoise(z, t, condition)
        wrong = made.logits.scatter(-1, made.logits.argmax(-1, keepdim=True), -50.0)
        return made._replace(logits=torch.where(condition.target[..., None], made.logits, wrong))


class Loyal(Oracle):
    """It finds every given token right, for its state is held there."""

    doubts = True


def test_what_is_doubted_is_open_again() -> None:
    oracle = Doubter()
    outcomes(setup(Threshold(0.9), reopen=0.5), requests([0], 2), 1, oracle)
    opened = torch.stack([condition.target[0] for condition in oracle.told])
    given = ~opened[:, 2:]
    assert given.any()
    assert not (given[1:] & given[:-1]).any()  # given for one call, in which it is doubted
    assert not opened[:, :2].any()  # a prompt is not taken back
    for condition in oracle.told:
        assert torch.equal(condition.clean[0].any(-1), ~condition.target[0])


@pytest.mark.parametrize(("oracle", "reopen"), [(Loyal(), 0.5), (Doubter(), 0.0)], ids=["loyal", "never"])
def test_nothing_is_taken_back_that_is_not_doubted(oracle: Oracle, reopen: float) -> None:
    oracle.doubts = True
    with_it = outcomes(setup(Threshold(0.8), reopen=reopen), requests(range(5), 1), denoiser=oracle)
    assert with_it == outcomes(setup(Threshold(0.8)), requests(range(5), 1), denoiser=type(oracle)())


def test_rows_with_second_thoughts_are_the_same_in_any_batch() -> None:
    system = lively(wrong_given=0.1)
    asked = [Request(i, torch.zeros(N, dtype=torch.long), torch.arange(N) < i % 3) for i in range(7)]

    def run(batch_size: int) -> dict[int, list[int]]:
        loop = DiffusionLoop(system, *setup(Threshold(0.2), reopen=0.3), batch_size)
        return {i: tokens for s in loop.steps(asked)
                for i, tokens in zip(s.state.row[s.done].tolist(), s.tokens.tolist(), strict=True)}  # fmt: skip

    assert run(1) == run(3) == run(7)


@dataclass(frozen=True)
class FreezeAll(Criterion):
    """Everything at the first look."""

    freezes = True
    needs = frozenset({"tokens"})

    def start(self, rows: NewRows) -> Memory:
        return ()

    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        return memory, Decision(torch.zeros_like(state.row, dtype=torch.bool), state.open)


def test_what_is_frozen_now_is_not_doubted_by_the_prediction_that_froze_it() -> None:
    unsure = Loyal(t_min=1.0)
    once = outcomes(setup(Threshold(1.0), FreezeAll()), requests([0, 1], 2), 2, unsure)
    assert outcomes(setup(Threshold(1.0), FreezeAll(), reopen=0.9), requests([0, 1], 2), 2, unsure) == once


def test_a_token_that_is_taken_back_is_no_estimate_of_the_step_before() -> None:
    """The first step of second order after it is one of Euler's."""

    class Spy(TwoStep):
        def advance(self, memory: Any, interval: Interval, estimate: Any) -> Any:
            extrapolated.append(~torch.isclose(memory.x0, interval.x0).all(-1)[0])
            return super().advance(memory, interval, estimate)

    extrapolated, opened = list[Tensor](), list[Tensor]()
    asked = [Request(0, torch.zeros(12, dtype=torch.long), torch.zeros(12, dtype=torch.bool))]
    loop = DiffusionLoop(lively(wrong_given=0.1), *setup(Threshold(0.6), solver=Spy(), reopen=0.9, steps=20), 1)
    stepped = loop.step

    def step(live: Any) -> Any:
        opened.append(live.open[0].clone())
        return stepped(live)

    loop.step = step  # ty: ignore
    for _ in loop.steps(asked):
        pass
    back = [now & ~before for before, now in itertools.pairwise(opened)]
    assert sum(int(places.sum()) for places in back) > 5
    assert not any(bool((moved & places).any()) for moved, places in zip(extrapolated, back, strict=False))
    assert torch.stack(extrapolated).any()


def test_bad_second_thoughts_are_refused() -> None:
    with pytest.raises(CdlmError, match="takes back what was committed, and nothing is"):
        Diffusion(reopen=0.5)
    with pytest.raises(CdlmError, match="reopen"):
        Diffusion(commit=Threshold(0.9), reopen=1.5)
    with pytest.raises(CdlmError, match="train it with wrong_given"):
        outcomes(setup(Threshold(0.8), reopen=0.5), requests([0]))
    session = open_session(with_tokenizer(wrong_given=0.1), commit=Threshold(0.8), reopen=0.5, steps=3)
    assert not session.replayable(session.requests(n=2))
    with pytest.raises(CdlmError, match="cannot be plotted: leave out reopen"):
        session.check_recordable(session.requests(n=2), "plotted")
    with pytest.raises(CdlmError, match="cannot be recorded"):
        session.recorded().run(session.requests(n=2))
    assert session.run(session.requests(n=2)).tokens.shape[0] == 2


@pytest.mark.parametrize("rule", [FixedSteps(5), Patience(2)], ids=repr)
def test_a_halted_row_is_the_beginning_of_one_that_is_not(rule: Criterion) -> None:
    policy, asked = Threshold(0.9), requests(range(6))
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    for step in DiffusionLoop(Oracle(), *setup(policy, record={"tokens"}), 3).steps(asked):
        for row, at, tokens in zip(
            step.state.row.tolist(), step.state.step.tolist(), step.state.tokens.tolist(), strict=True
        ):
            seen[row, at] = tuple(tokens)
    for index, (tokens, calls, full, halted) in outcomes(setup(policy, rule), asked, 2).items():
        assert halted != full or calls == STEPS
        if halted:
            assert tokens == seen[index, calls - 1]


def test_the_signal_of_tokens_has_what_was_committed() -> None:
    steps = list(DiffusionLoop(Watched(), *setup(Threshold(0.8), record={"tokens"}), 1).steps(requests([0])))
    final = steps[-1].tokens[0]
    for step in steps:
        decided = ~step.state.open[0]
        assert torch.equal(step.state.tokens[0][decided], final[decided])
    assert 0 < sum(int((~s.state.open[0]).sum()) for s in steps)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(score_temperature=0.8, scale=2.0)], ids=repr)
def test_the_state_of_a_committed_position_follows_its_token(guidance: Guidance) -> None:
    oracle = Oracle()
    run = setup(Threshold(0.9), guidance=guidance, record={"z"})
    steps = list(DiffusionLoop(oracle, *run, 1).steps(requests([2])))
    target = oracle.embed(steps[-1].tokens)[0]
    checked = 0
    for before, after in itertools.pairwise(steps):
        held = ~after.state.open[0]
        z, t, z_next, t_next = before.state.z[0], before.state.t[0], after.state.z[0], after.state.t[0]
        assert torch.equal(z_next[held], (target + (t_next / t) * (z - target))[held])
        checked += int(held.sum())
    assert checked > 0


def test_a_frozen_position_is_given_too() -> None:
    oracle = Watched()
    ((tokens, *_),) = outcomes(setup(None, JoT(30.0, 2.0)), requests([1]), 1, oracle).values()
    clean = oracle.table[torch.tensor(tokens)]
    assert any(not c.target.all() for c in oracle.told)
    for condition in oracle.told:
        assert torch.equal(condition.clean[0], clean * ~condition.target[0][:, None])


# --- blocks ---


def test_blocks_of_a_policy_are_committed_from_left_to_right() -> None:
    oracle = Watched()
    outcomes(setup(Threshold(0.5, block=2)), requests([0]), 1, oracle)
    for condition in oracle.told:
        left = condition.target[0].nonzero().squeeze(1)
        decided = (~condition.target[0]).nonzero().squeeze(1)
        if len(decided) and len(left):
            assert int(decided.max()) < 2 * (int(left.min()) // 2 + 1)


def test_the_end_of_a_block_is_seen_when_it_is_committed_before_the_rest() -> None:
    block = torch.tensor([[False, True, True, True, False, False]])
    assert behind(block).tolist() == [[False, False, False, False, True, True]]
    oracle = Watched()
    outcomes(setup(LLaDA(3, remasking="random"), block=3, steps=3), requests([0]), 1, oracle)
    for i, condition in enumerate(oracle.told):
        assert condition.ahead is not None
        assert condition.ahead[0].tolist() == [i < 3 and place > 2 for place in range(N)]


class Broken(Oracle):
    """Its logits are not numbers at one position."""

    def denoise(self, z: Tensor, t: Tensor, condition: Condition) -> Prediction:
        made = super().denoise(z, t, condition)
        made.logits[:, 2] = torch.nan
        return made


@pytest.mark.parametrize("policy", [*ASK, *FORCED], ids=repr)
def test_logits_that_are_not_numbers_are_not_committed(policy: Policy) -> None:
    with pytest.raises(CdlmError, match="not numbers"):
        outcomes(setup(policy), requests(range(3)), denoiser=Broken())


@pytest.mark.parametrize("policy", [LLaDA(2, block=1), Dream(2, block=1)], ids=repr)
def test_a_schedule_shorter_than_its_blocks_has_a_step_for_each(policy: Policy) -> None:
    for tokens, calls, full, _ in outcomes(setup(policy), requests(range(3))).values():
        assert (len(tokens), calls, full) == (N, N, True)


def test_the_steps_of_a_policy_begin_anew_in_each_block() -> None:
    asked = [Request(0, torch.zeros(2 * N, dtype=torch.long), torch.zeros(2 * N, dtype=torch.bool))]
    loop = DiffusionLoop(Oracle(), *setup(DreamThreshold(3, 0.0), block=N), 1)
    decided = [int((step.canvas[0] >= 0).sum()) for step in loop.steps(asked) if step.canvas is not None]
    assert decided == [2, 4, 6, 8, 10, 12]


# --- policies ---


def test_the_falling_threshold() -> None:
    policy = FallingThreshold(0.9, 0.1, 2.0, 0.5)
    level = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    assert policy.tau(level).tolist() == pytest.approx([0.9, 0.9, 0.5, 0.1, 0.1])
    assert policy == parse_policy(repr(policy))
    wrongs: tuple[dict[str, Any], ...] = (
        {"begin": 0.5, "end": 0.5},
        {"end": 0.0},
        {"first": math.nan},
        {"first": math.inf},
        {"block": 0},
    )
    for wrong in wrongs:
        with pytest.raises(CdlmError, match="FallingThreshold"):
            FallingThreshold(**wrong)


@pytest.mark.parametrize(
    ("policy", "switch"),
    [(LLaDA(no_eos=True), "no_eos"), (LLaDA(eos_last=True), "eos_last"), (Dream(8, pooled=True), "pooled")],
)
def test_switches_of_masked_models_are_refused(policy: Policy, switch: str) -> None:
    with pytest.raises(CdlmError, match=f"{switch} of .* masked models alone"):
        Diffusion(commit=policy)


# --- as users meet them ---


def test_a_session_with_commits() -> None:
    model = with_tokenizer()
    session = open_session(model, steps=8, commit="Threshold(0.3)")
    assert session.settings["commit"] == repr(Threshold(0.3))
    assert "commit" not in open_session(model).settings
    rivals = session.sampling.rivals()
    assert all("commit" not in way.settings for ways in rivals.values() for way in ways)
    samples = session.run(session.requests(["the cat"], 3))
    same = generate(model, ["the cat"], n=3, steps=8, commit=Threshold(0.3))
    assert np.array_equal(samples.tokens, same.tokens)
    assert "commit=Threshold(tau=0.3" in samples.made_by["sampling"]


@pytest.mark.parametrize("rule", [Patience(2), FixedSteps(5), Entropy(0.5), KL(0.1, warmup=0.0)], ids=repr)
@pytest.mark.parametrize("policy", [Threshold(0.3), FallingThreshold(0.4, 0.0, 2.0, 0.5), KLASS(0.2, 0.5)], ids=repr)
def test_a_rule_is_replayed_on_a_run_with_commits_as_it_is_run(policy: Policy, rule: Criterion) -> None:
    session = open_session(with_tokenizer(), steps=9, commit=policy)
    asked = session.requests(["the", "a"], 4)
    full = session.recorded().run(asked)
    again, live = replay(recording_of(full, session), rule), session.with_criterion(rule).run(asked)
    assert np.array_equal(again.tokens, live.tokens)
    assert np.array_equal(again.nfe, live.nfe)
    plain = session.run(asked)
    assert np.array_equal(full.tokens, plain.tokens)
    assert np.array_equal(full.nfe, plain.nfe)


@pytest.mark.parametrize("policy", [Threshold(0.9), FallingThreshold(0.9, 0.0, 2.0, 0.5)], ids=repr)
def test_a_record_knows_its_commits(policy: Policy, tmp_path: Path) -> None:
    session = open_session(with_tokenizer(), steps=9, grid="LogT()", commit=policy)
    asked = session.requests(["the", "a"], 4)
    full = session.recorded().run(asked)
    recording = recording_of(full, session)
    recording.write(tmp_path / "run.safetensors")
    again = Recording.read(tmp_path / "run.safetensors")
    for rule in (Never(), Patience(2), FixedSteps(4)):
        live = session.with_criterion(rule).run(asked)
        made = replayed(again, rule, session.model.need_tokenizer())
        assert made.reason == live.reason
        assert np.array_equal(made.tokens, live.tokens)
        assert np.array_equal(made.nfe, live.nfe)
    assert full.record is not None
    last = full.record.canvases(full.tokens, full.given, -1)[-1]
    assert (last == -1).any(1).tolist() == [reason != HaltReason.FULL for reason in full.reason]
    if isinstance(policy, FallingThreshold):
        assert (full.nfe < 9).any()


def test_the_command_line_and_recordings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with_tokenizer().save_pretrained(tmp_path / "model")
    model, record = str(tmp_path / "model"), str(tmp_path / "recorded")
    ask = ["sample", model, "--n", "3", "--steps", "6", "--commit", "Threshold(0.3)"]
    main([*ask, "--record", record, "--out", str(tmp_path / "samples.jsonl")])
    (recording,) = read_folder(Path(record)).values()
    assert recording.settings["commit"] == repr(Threshold(0.3))
    session = open_session(model, steps=6)
    with pytest.raises(CdlmError, match="no recording of 3 samples"):
        find_recording(Path(record), session, session.requests(n=3))
    with pytest.raises(SystemExit):
        main([*ask[:-1], "Threshhold(0.5)"])
    assert "did you mean Threshold" in capsys.readouterr().err


MASKED_ALONE = frozenset({"Adjust", "CORE", "Editing", "Gaussian", "Guided"})


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - MASKED_ALONE))
def test_every_policy_is_tried_here(name: str) -> None:
    assert any(type(policy).__name__ == name for policy in (*ASK, *FORCED))


def test_a_run_whose_tokens_a_rule_settles_is_no_recording() -> None:
    session = open_session(with_tokenizer(), steps=6).with_criterion(JoT(1.01, 1.0)).recorded()
    samples = session.run(session.requests(n=3))
    with pytest.raises(CdlmError, match="settles tokens on the way"):
        recording_of(samples, session)


def test_text_is_settled_with_all_calls_live_and_replayed() -> None:
    model = with_tokenizer()
    session = open_session(model, steps=12, commit=LLaDA(12, block=1)).recorded()
    samples = session.run(session.requests(n=4))
    recording = recording_of(samples, session)
    again = replayed(recording, Never(), model.need_tokenizer())
    assert again.settled.tolist() == samples.settled.tolist() == samples.nfe.tolist()
