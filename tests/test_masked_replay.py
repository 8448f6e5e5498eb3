"""A recorded masked run tells what a rule would have done: the live run of the same rule, token for token."""

from pathlib import Path

import numpy as np
import pytest
from setups import Setup, unmasking

from cdlm.core.errors import CdlmError
from cdlm.halting import (
    KL,
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
from cdlm.halting.replay import replay
from cdlm.masked.sampler import Unmasking, UnmaskingLoop
from cdlm.policies.adjust import Adjust
from cdlm.policies.confidence import Threshold
from cdlm.policies.dream import Dream
from cdlm.policies.gaussian import Gaussian
from cdlm.policies.guided import Guided
from cdlm.policies.klass import KLASS
from cdlm.policies.llada import LLaDA
from cdlm.policies.mutual import Mutual as MutualPolicy
from cdlm.policies.policy import Policy
from cdlm.recording.file import Recording
from cdlm.recording.record import Record
from cdlm.sampling.recordings import recording_of
from cdlm.sampling.requests import canvases
from cdlm.sampling.samples import Samples, collect
from cdlm.sampling.session import Session
from tests.masked_toys import MASK, Bag, Toy

POLICIES = (
    LLaDA(8), LLaDA(8, block=4), LLaDA(16, block=4), LLaDA(8, remasking="random"), Dream(6), Threshold(0.3, block=4),
    KLASS(0.2, 0.5), MutualPolicy(0.2, 2, 0.5), Gaussian(8), Adjust("layer", 2, order="random"),
    Guided(Bag(), "speculative", "original", verify=3),
)  # fmt: skip
RULES = (
    Never(), Full(), FixedSteps(3), Patience(1), Patience(2), Entropy(1.4), KL(0.5, warmup=0.0), Prophet(0.9, 0.8, 0.7),
    SchED(2.0, 0.4), SchED(1.0, 0.5, variant="paper"), StableAndConfident(1, 1.5), For(Entropy(1.6), 2) | FixedSteps(6),
    FromStep(Patience(1), 4) & Entropy(2.0), Mutual(0.2, 2, 0.3),
)  # fmt: skip
PROMPTS = [[3, 4], [5, None, 6, 7], [8]]


def run(decoder: Setup, record: bool = False) -> Samples:
    requests = canvases(PROMPTS, 8, 2)
    decoding = UnmaskingLoop(Toy(seed=3), *decoder, 4)
    seed, budget = decoder.options.seed, decoding.budget(requests)
    return collect(
        decoding.steps(requests), requests, None, budget=budget, seed=seed, record=record, mask_id=MASK
    )  # fmt: skip


def recording(policy: Policy, temperature: float) -> Recording:
    idles = policy == LLaDA(16, block=4)  # its idle steps inside blocks are passed over by every rule but Never
    rule = Full() if idles else Never()
    samples = run(unmasking(policy, rule, temperature, record=Unmasking.recorded), record=True)
    assert samples.record is not None
    return Recording(
        samples.record, samples.tokens, samples.given, samples.valid, samples.index, samples.seed, "toy", "0" * 64, {}
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_replay_is_the_live_run(policy: Policy, temperature: float) -> None:
    kept, halted = recording(policy, temperature), 0
    for rule in RULES:
        if isinstance(rule, Never) and policy == LLaDA(16, block=4):
            continue
        live, replayed = run(unmasking(policy, rule, temperature)), replay(kept, rule)
        assert replayed.tokens.tolist() == live.tokens.tolist(), rule
        assert replayed.nfe.tolist() == live.nfe.tolist(), rule
        assert replayed.steps.tolist() == live.steps.tolist(), rule
        halted += int(replayed.halted.sum())
    assert halted > 12  # rules that never fire would prove nothing


def test_a_recording_comes_back_from_its_file(tmp_path: Path) -> None:
    kept = recording(LLaDA(8), 0.0)
    kept.write(tmp_path / "one.safetensors")
    read = Recording.read(tmp_path / "one.safetensors")
    for rule in (Full(), Patience(1), Entropy(1.4)):
        for before, after in zip(replay(kept, rule), replay(read, rule), strict=True):
            assert np.array_equal(before, after)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_canvases_of_a_record_are_those_of_the_run(policy: Policy) -> None:
    kept = recording(policy, 0.0)
    frames = kept.record.canvases(kept.tokens, kept.given, MASK)
    requests = canvases(PROMPTS, 8, 2)
    seen = {}
    rule = Full() if policy == LLaDA(16, block=4) else Never()
    for finished in UnmaskingLoop(Toy(seed=3), *unmasking(policy, rule), 4).steps(requests):
        assert finished.canvas is not None
        for i, row in enumerate(finished.state.row.tolist()):
            seen[int(finished.state.step[i]), row] = finished.canvas[i].tolist()
    for (step, row), canvas in seen.items():
        assert frames[step, row].tolist() == canvas
    assert np.array_equal(frames[-1], kept.tokens)


def test_parts_of_a_recording_join_to_the_whole() -> None:
    kept = recording(Threshold(0.3, block=4), 0.0)
    order = np.array([4, 0, 2])
    rest = np.array([1, 3, 5])
    joined = Record.join([kept.record.select(order), kept.record.select(rest)])
    back = joined.select(np.argsort(np.concatenate([order, rest])))
    assert np.array_equal(back.nfe, kept.record.nfe)
    assert np.array_equal(back.budgets, kept.record.budgets)
    ours, theirs = (r.canvases(kept.tokens, kept.given, MASK) for r in (back, kept.record))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("rule", "why"), [(JoT(), "freezes positions"), (NormConvergence(0.1), "x0_norm")], ids=repr)
def test_what_cannot_be_replayed_is_refused(rule: Criterion, why: str) -> None:
    with pytest.raises(CdlmError, match=why) as caught:
        replay(recording(LLaDA(8), 0.0), rule)
    assert "\n" not in str(caught.value)


def test_a_run_that_idles_inside_its_blocks_is_not_recorded() -> None:
    with pytest.raises(CdlmError, match=r"record with the rule Full\(\)"):
        run(unmasking(LLaDA(16, block=4), record=Unmasking.recorded), record=True)


def test_a_run_that_a_rule_cut_short_is_no_full_run() -> None:
    decoder = unmasking(LLaDA(8), FixedSteps(3), record=Unmasking.recorded)
    with pytest.raises(CdlmError, match="6 of 6 samples halted early"):
        recording_of(run(decoder, record=True), Session(Toy(), *decoder))
