"""Laws of generation in blocks, on the oracle denoiser in float64, bit for bit, and on a small SSD-LM."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from setups import Setup, diffusion
from torch import Tensor
from toys import VOCAB, tokenizer

from cdlm.api import generate
from cdlm.cli.main import main
from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.grids import UpperEnds
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.projections import Drawn, MultiHot
from cdlm.continuous.sampler import Diffusion, DiffusionLoop, DiffusionRows
from cdlm.continuous.solvers import Ancestral, Euler, Heun, Renoise, Solver, TorchDiffEq
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.ssd import SSD
from cdlm.core.errors import CdlmError
from cdlm.core.rng import StepNoise
from cdlm.core.types import Condition, Prediction
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
    StableAndConfident,
)
from cdlm.sampling.requests import Request

N, V = 7, 7
SOLVERS = (Euler(), Heun(), Ancestral(), Renoise(), TorchDiffEq("midpoint", double=True))
RULES = (
    Full(),
    FixedSteps(4),
    Patience(2),
    For(NormConvergence(0.3), 2),
    FromStep(KL(0.5, warmup=0.0), 3) | Entropy(0.2),
    StableAndConfident(1, 0.3),
    Mutual(0.5, 2, 0.2),
    JoT(),
    JoT() & Patience(2),
)
PAIRS = [(solver, Never()) for solver in SOLVERS] + [(SOLVERS[i % 2 * 3], rule) for i, rule in enumerate(RULES)]
"""Each solver, and each rule on a solver without and with noise."""


def requests(indices, prompt: int = 0) -> list[Request]:
    return [Request(int(i), torch.arange(N) % V, torch.arange(N) < prompt) for i in indices]


def template(index: int, open_: list[int], valid: list[bool] | None = None) -> Request:
    """A request in which only these positions are to be generated."""
    told = torch.ones(N, dtype=torch.bool)
    told[open_] = False
    return Request(index, torch.arange(N) % V, told, None if valid is None else torch.tensor(valid))


def outcomes(
    sampler: Setup, asked: list[Request], batch_size: int = 4, denoiser: Denoiser | None = None,
    run: type[DiffusionLoop] = DiffusionLoop,
) -> dict[int, tuple]:  # fmt: skip
    """Each sample's tokens, calls, steps, and why it left."""
    out = {}
    for step in run(denoiser or Oracle(), *sampler, batch_size).steps(asked):
        for place, tokens in zip(step.done.nonzero().squeeze(1).tolist(), step.tokens, strict=True):
            counts = (int(step.state.nfe[place]), step.counts.taken[place])
            out[int(step.state.row[place])] = (
                tuple(tokens.tolist()), *counts, bool(step.halted[place]), bool(step.full[place])
            )  # fmt: skip
    return out


def traces(sampler: Setup, asked: list[Request], denoiser: Denoiser | None = None) -> dict[int, list[Tensor]]:
    """What every step of each sample predicts."""
    seen: dict[int, list[Tensor]] = {}
    watching = sampler.but(record=sampler.options.record | {"logits"})
    for step in DiffusionLoop(denoiser or Oracle(), *watching, 4).steps(asked):
        for row, logits in zip(step.state.row.tolist(), step.state.logits, strict=True):
            seen.setdefault(row, []).append(logits)
    return seen


class Watched(Oracle):
    """Remembers what it was told, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Condition] = []

    def denoise(self, z: Tensor, t: Tensor, condition: Condition) -> Prediction:
        self.told.append(condition)
        return super().denoise(z, t, condition)


class Sure(Oracle):
    """Predicts the same at every step, and is certain of it from step to step."""

    def denoise(self, z: Tensor, t: Tensor, condition: Condition) -> Prediction:
        self.calls += len(z)
        logits = 50.0 * torch.eye(V, dtype=z.dtype)[torch.arange(N) % V].expand(len(z), N, V)
        return Prediction(logits, self.expect(logits))


class SameNoise(DiffusionLoop):
    """Every block starts from the same noise, and its steps draw the same."""

    def _start(self, index: list[int], before: list[int], like: Tensor) -> Tensor:
        return super()._start(index, [0] * len(before), like)

    def _draws(self, live: DiffusionRows) -> StepNoise:
        return StepNoise(self.options.seed, live.known.row, live.known.step)


# --- which positions, in which order ---


@settings(max_examples=15)
@given(
    open_=st.sets(st.integers(0, N - 1), min_size=1), block=st.integers(1, 9),
    rule=st.sampled_from([Never(), Patience(2), JoT()]),
)  # fmt: skip
def test_every_position_is_generated_once_in_order_and_told_to_the_next(
    open_: set[int], block: int, rule: Criterion
) -> None:
    wanted, oracle = sorted(open_), Watched()
    sampler = diffusion(steps=4, block=block, criterion=rule)
    ((tokens, calls, steps, *_),) = outcomes(sampler, [template(0, wanted)], 1, oracle).values()
    assert calls == steps == len(oracle.told)
    parts = [wanted[i : i + block] for i in range(0, len(wanted), block)]
    shown = [c.target[0].nonzero().squeeze(1).tolist() for c in oracle.told]
    at = [next(i for i, part in enumerate(parts) if now[0] in part) for now in shown]
    assert at == sorted(at)
    assert set(at) == set(range(len(parts)))
    assert len(parts) == sampler.sampling.blocks_of(template(0, wanted))
    clean, first = oracle.table[torch.tensor(tokens)], [at.index(i) for i in range(len(parts))]
    for i, (condition, now) in enumerate(zip(oracle.told, shown, strict=True)):
        later = {place for part in parts[at[i] + 1 :] for place in part}
        told = torch.tensor([place not in later and place not in now for place in range(N)])
        assert torch.equal(condition.clean[0], clean * told[:, None])
        assert set(now) <= set(parts[at[i]])
        if i in first or not rule.freezes:  # what is frozen is no longer asked for
            assert now == parts[at[i]]
    assert all(not oracle.told[i].x0.any() for i in first)  # no estimate of another block


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_prompts_are_kept(solver: Solver) -> None:
    sampler = diffusion(steps=3, block=2, solver=solver)
    for tokens, *_ in outcomes(sampler, requests(range(5), prompt=3)).values():
        assert tokens[:3] == (0, 1, 2)
    for tokens, *_ in outcomes(sampler, [template(i, [1, 2, 5]) for i in range(5)]).values():
        assert [tokens[i] for i in (0, 3, 4, 6)] == [0, 3, 4, 6]


def test_padding_is_not_generated() -> None:
    valid = [True] * 5 + [False] * 2
    asked = [template(i, [2, 3, 4], valid) for i in range(3)]
    for tokens, calls, *_ in outcomes(diffusion(steps=3, block=2), asked, 2).values():
        assert tokens[5:] == (5, 6)
        assert calls == 2 * 3


def test_blocks_of_a_request() -> None:
    counts = [Diffusion(block=block).blocks_of(requests([0], prompt=2)[0]) for block in (None, 1, 2, 4, 5, 6)]
    assert counts == [1, 5, 3, 2, 1, 1]
    assert "block" not in Diffusion().settings
    assert Diffusion(block=3).settings["block"] == 3
    for block in (0, -1):
        with pytest.raises(CdlmError, match="one position or more"):
            Diffusion(block=block)


# --- the same run ---


@pytest.mark.parametrize(("solver", "rule"), PAIRS, ids=repr)
def test_a_batch_equals_its_members_alone(solver: Solver, rule: Criterion) -> None:
    record = frozenset({"switches", "score_cosine", "mean_kl"})
    sampler = diffusion(steps=5, solver=solver, criterion=rule, block=3, record=record)
    asked = [*requests([0]), *requests([1], prompt=3), template(2, [1, 5])]  # three blocks, two and one
    assert outcomes(sampler, asked, 2) == {i: outcomes(sampler, [r], 1)[i] for i, r in enumerate(asked)}


@settings(max_examples=6)
@given(order=st.permutations(range(4)), batch_size=st.integers(1, 7), block=st.integers(1, 8))
def test_order_and_batch_size_do_not_matter(order: list[int], batch_size: int, block: int) -> None:
    sampler = diffusion(steps=4, criterion=Patience(1), solver=Renoise(), block=block)
    assert outcomes(sampler, requests(order), batch_size) == outcomes(sampler, requests(range(4)), 4)


@pytest.mark.parametrize(("solver", "rule"), PAIRS, ids=repr)
@pytest.mark.parametrize("block", [N - 2, 100])
def test_a_block_that_holds_all_is_no_block(solver: Solver, rule: Criterion, block: int) -> None:
    whole = diffusion(steps=4, solver=solver, criterion=rule)
    asked = requests(range(2), prompt=2)
    assert outcomes(whole, asked) == outcomes(whole.but(block=block), asked)
    once, again = (traces(sampler, asked) for sampler in (whole, whole.but(block=block)))
    assert once.keys() == again.keys()
    for row, steps in once.items():
        assert len(steps) == len(again[row])
        assert all(torch.equal(a, b) for a, b in zip(steps, again[row], strict=True))


def test_every_block_has_noise_of_its_own() -> None:
    starts: list[Tensor] = []
    sampler = diffusion(steps=3, block=2, record=frozenset({"z"}))
    for step in DiffusionLoop(Oracle(), *sampler, 1).steps(requests([0])):
        if int(step.state.step[0]) == 0:
            starts.append(step.state.z[0])
    assert len(starts) == 4
    for i, a in enumerate(starts):
        assert not any(torch.isclose(a, b).any() for b in starts[:i])


def test_the_loop_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    outcomes(diffusion(steps=3, block=2, solver=Renoise()), requests(range(3)))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("solver", [Euler(), Ancestral()], ids=repr)
def test_samples_reproduce_the_token_frequencies(solver: Solver) -> None:
    oracle, count, rows = Oracle(), Counter(), 400
    for step in DiffusionLoop(oracle, *diffusion(steps=40, block=4, solver=solver), rows).steps(requests(range(rows))):
        count.update(step.tokens.flatten().tolist())
    expected = oracle.frequencies.numpy() * rows * N
    seen = np.array([count[i] for i in range(V)])
    assert ((seen - expected) ** 2 / expected).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001


# --- what it costs, and halting in each block ---


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_calls_reported_are_calls_made(solver: Solver, guidance: float) -> None:
    oracle = Oracle()
    sampler = diffusion(5, criterion=Patience(3), solver=solver, guidance=Guidance(scale=guidance), block=3)
    told = outcomes(sampler, requests(range(5)), 2, oracle)
    assert sum(calls for _, calls, *_ in told.values()) == oracle.calls


def test_without_a_rule_every_block_takes_all_its_steps() -> None:
    per_block = {Euler(): 6, Heun(): 11, Renoise(): 6}
    for solver, calls in per_block.items():
        for _, nfe, taken, halted, full in outcomes(diffusion(6, solver=solver, block=3), requests(range(3))).values():
            assert (nfe, taken, halted, full) == (3 * calls, 3 * 6, False, False)


@pytest.mark.parametrize("patience", [1, 3, 5])
def test_the_memory_of_a_rule_starts_anew_with_every_block(patience: int) -> None:
    sampler = diffusion(20, criterion=Patience(patience), block=2)
    for tokens, nfe, taken, halted, _ in outcomes(sampler, requests(range(3)), 2, Sure()).values():
        assert (nfe, taken, halted) == (4 * (patience + 1), 4 * (patience + 1), True)
        assert tokens == tuple(range(N))


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_fixed_steps_spends_them_on_every_block(steps: int) -> None:
    sampler = diffusion(6, criterion=FixedSteps(steps), block=3)
    for _, nfe, taken, halted, _ in outcomes(sampler, requests(range(3))).values():
        assert (nfe, taken, halted) == (3 * steps, 3 * steps, True)


@pytest.mark.parametrize("rule", [Patience(8), FixedSteps(99), KL(1e-300), Full(), JoT(1e14, 1e13)])
def test_a_rule_that_never_fires_changes_nothing(rule: Criterion) -> None:
    full, ruled = (diffusion(8, criterion=c, solver=Renoise(), block=2) for c in (Never(), rule))
    plain, told = outcomes(full, requests(range(4))), outcomes(ruled, requests(range(4)))
    assert [sample[:3] for sample in plain.values()] == [sample[:3] for sample in told.values()]


def test_a_halted_first_block_is_a_prefix_and_what_follows_has_steps_of_its_own() -> None:
    full, halted = (traces(diffusion(20, criterion=c, block=4), requests(range(6))) for c in (Never(), Patience(3)))
    assert any(len(halted[i]) < len(full[i]) for i in full)
    told = outcomes(diffusion(20, criterion=Patience(3), block=4), requests(range(6)))
    for i in full:
        assert len(halted[i]) == told[i][2]
        same = [torch.equal(a, b) for a, b in zip(halted[i], full[i], strict=False)]
        assert all(same[:4])
        assert not all(same) or len(halted[i]) == len(full[i])


def test_rows_of_one_batch_stand_at_different_blocks() -> None:
    apart = 0
    for step in DiffusionLoop(Oracle(), *diffusion(20, criterion=Patience(3), block=2), 6).steps(requests(range(6))):
        apart += len(set((torch.tensor(step.counts.taken) - step.state.step).tolist())) > 1
        assert (step.state.step < 20).all()
        assert (torch.tensor(step.counts.taken) > step.state.step).all()
    assert apart > 0


@pytest.mark.parametrize("rule", [JoT(), JoT(1e6), For(JoT(), 2)], ids=repr)
def test_rules_that_freeze_fill_one_block_after_the_other(rule: Criterion) -> None:
    filled, frozen, finals = 0, dict[tuple[int, int], int](), dict[int, list[int]]()
    before: dict[int, tuple[Tensor, Tensor]] = {}
    for step in DiffusionLoop(Oracle(), *diffusion(20, criterion=rule, block=4), 3).steps(requests(range(4))):
        for place, row in enumerate(step.state.row.tolist()):
            if int(step.state.step[place]) > 0:  # what closed within a block keeps the token that it had then
                was, tokens = before[row]
                closed = was & ~step.state.open[place]
                frozen |= {(row, i): int(tokens[i]) for i in closed.nonzero().squeeze(1).tolist()}
            before[row] = step.state.open[place], step.state.tokens[place]
        for place, tokens in zip(step.done.nonzero().squeeze(1).tolist(), step.tokens, strict=True):
            finals[int(step.state.row[place])] = tokens.tolist()
            filled += bool(step.full[place])
    assert filled > 0
    assert len(frozen) > 0
    assert all(finals[row][i] == token for (row, i), token in frozen.items())


@pytest.mark.parametrize("rule", [JoT(), JoT(50.0, 1.5)], ids=repr)
def test_to_a_rule_later_blocks_are_not_there_yet(rule: Criterion) -> None:
    """They are not decided: nothing freezes because of them, as nothing does because of padding."""

    def opened(valid: list[bool] | None) -> dict[int, list[list[bool]]]:
        asked = [template(i, [2, 3, 4] if valid else [2, 3, 4, 5, 6], valid) for i in range(4)]
        seen: dict[int, list[list[bool]]] = {}
        for step in DiffusionLoop(Oracle(), *diffusion(20, criterion=rule, block=3), 4).steps(asked):
            for place, row in enumerate(step.state.row.tolist()):
                if int(step.state.nfe[place]) == int(step.state.step[place]) + 1:  # the first block
                    seen.setdefault(row, []).append(step.state.open[place].tolist())
        return seen

    assert opened(None) == opened([True] * 5 + [False] * 2)


# --- what a block sees ---


def toy(block: int | None = 3, seed: int = 0) -> EmbeddingDiffusion:
    """A float64 SSD-LM in which no weight is zero, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        system = SSD(width=16, depth=2, heads=2, dim=8, block=3).build(V).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    system.block = block
    return system.eval()


def simplex(projection: MultiHot | Drawn | None = None, **settings_: object) -> Setup:
    """The published way to sample."""
    guidance = Guidance(projection=projection or MultiHot(0.4))
    return diffusion(
        **{"steps": 4, "solver": Renoise(), "grid": UpperEnds(), "guidance": guidance, "block": 3, **settings_}
    )


@pytest.mark.parametrize("rule", [Never(), Patience(1), JoT()], ids=repr)
@pytest.mark.parametrize("projection", [MultiHot(0.0), MultiHot(0.7), Drawn(0.9)], ids=repr)
def test_a_batch_of_the_toy_equals_its_members_alone(projection: MultiHot | Drawn, rule: Criterion) -> None:
    system, asked = toy(), [*requests(range(2)), *requests([2], prompt=3), template(3, [1, 5])]
    sampler = simplex(projection, criterion=rule)
    together = outcomes(sampler, asked, 3, system)
    assert together == {i: outcomes(sampler, [r], 1, system)[i] for i, r in enumerate(asked)}


def test_what_comes_after_a_block_does_not_change_it() -> None:
    """Whether it is given, to be generated later, or padding."""
    system, asked = toy(), template(0, [1, 2, 3])
    reference = traces(simplex(), [asked], system)[0]
    others = [
        replace(asked, tokens=torch.tensor([0, 1, 2, 3, 6, 0, 1])),
        template(0, [1, 2, 3, 4, 5, 6]),
        template(0, [1, 2, 3], [True] * 4 + [False] * 3),
    ]
    for other in others:
        for a, b in zip(reference, traces(simplex(), [other], system)[0], strict=False):
            torch.testing.assert_close(a[1:4], b[1:4], rtol=1e-12, atol=1e-12)
    # The network itself would look.
    seeing = traces(simplex(), [asked], toy(block=None))[0]
    changed = traces(simplex(), [others[0]], toy(block=None))[0]
    assert not torch.allclose(seeing[0][1:4], changed[0][1:4], atol=1e-6)


def test_a_later_block_is_what_follows_the_earlier_ones_as_a_prompt() -> None:
    system = toy()
    whole = outcomes(simplex(), requests(range(6)), 6, system, SameNoise)
    continued = {}
    for index, (tokens, *_) in whole.items():
        place, text = torch.arange(N), torch.tensor(tokens)
        for start in (3, 6):
            prompt = Request(index, torch.where(place < start, text, 0), (place < start) | (place >= start + 3))
            continued[index, start] = outcomes(simplex(), [prompt], 1, system, SameNoise)[index][0]
            assert continued[index, start][start : start + 3] == tokens[start : start + 3]


def test_a_later_block_depends_on_the_earlier_one() -> None:
    system = toy()
    place = torch.arange(N)
    texts = [torch.tensor([word] * N) for word in (1, 4)]
    first, second = (traces(simplex(), [Request(0, text, place < 3)], system)[0] for text in texts)
    assert not torch.allclose(first[0][3:6], second[0][3:6], atol=1e-6)


def test_samples_of_a_system_come_in_its_blocks() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = SSD(width=16, depth=1, heads=2, dim=8, block=5).build(VOCAB).eval()
    system.tokenizer, system.length = tokenizer(), 12
    samples = generate(system, n=3, steps=4)
    assert samples.nfe.tolist() == samples.steps.tolist() == [12] * 3
    assert samples.budget == 12
    halted = generate(system, n=3, steps=4, halt="FixedSteps(2)")
    assert halted.steps.tolist() == [6] * 3
    assert generate(system, n=3, steps=4).tokens.tolist() == samples.tokens.tolist()


def test_a_run_in_blocks_is_neither_recorded_nor_plotted_and_the_error_names_what_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = SSD(width=16, depth=1, heads=2, dim=8, block=5).build(VOCAB)
    system.tokenizer, system.length = tokenizer(), 12
    system.save_pretrained(tmp_path / "run")
    for option, done in (("--plot", "plotted"), ("--record", "recorded")):
        words = ("--n", "2", "--steps", "4", "--quiet", option, str(tmp_path / "x.png"))
        with pytest.raises(SystemExit) as caught:
            main(["sample", str(tmp_path / "run"), *words])
        assert caught.value.code == 2
        assert f"a run of 3 blocks cannot be {done}" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(CdlmError, match="a run of 3 blocks cannot be recorded"):
        generate(system, n=2, steps=4, record=True)
