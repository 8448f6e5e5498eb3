"""ELF: a flow in an encoder's space, and what its steps say of their tokens."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from toys import VOCAB, tokenizer

from cdlm.api import load
from cdlm.continuous.distillation import Distillation
from cdlm.continuous.encoder_space import EncoderSpace
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.learned_space import LearnedSpace
from cdlm.continuous.readouts import Decoder, NoReadOut, Probe, ReadOut
from cdlm.continuous.sampler import Diffusion, DiffusionLoop
from cdlm.continuous.solvers import Churn, Euler
from cdlm.continuous.systems.elf import ELF, Flow, FlowMatching
from cdlm.core.errors import CdlmError
from cdlm.core.rng import generator
from cdlm.core.types import Batch, Condition
from cdlm.data.sources import Stories
from cdlm.halting import FixedSteps, Patience
from cdlm.models import hub
from cdlm.models.in_context import TOKENS, InContextTransformer, rotate_pairs, sinusoid
from cdlm.policies.confidence import Threshold
from cdlm.runs.config import RunConfig, build_system
from cdlm.runs.distill import DistillSettings, distill
from cdlm.runs.train import train
from cdlm.sampling.loop import RunOptions
from cdlm.sampling.samples import Samples
from cdlm.sampling.session import Session
from cdlm.training.options import TrainOptions

LENGTH, DIM, STEPS = 10, 8, 6


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with random weights and the tokenizer of the toys."""
    folder = tmp_path_factory.mktemp("encoder")
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = transformers.BertModel(config)
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    network.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def settings(encoder: str, **changes: Any) -> ELF:
    return ELF(encoder=encoder, width=16, depth=2, heads=2, bottleneck=4, **changes)


def built(encoder: str, stirred: bool = True, **changes: Any) -> Flow:
    """A system; if `stirred`, with weights that are not those of the beginning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = settings(encoder, **changes).build(VOCAB)
        if stirred:
            for weight in system.parameters():
                torch.nn.init.normal_(weight, std=0.3)
    system.tokenizer, system.length = tokenizer(), LENGTH
    batch = some(64)
    assert isinstance(system.space, EncoderSpace)
    system.space.fit([(batch.tokens, torch.ones_like(batch.target))])
    return system.eval()


@pytest.fixture(scope="module")
def system(encoder: str) -> Flow:
    return built(encoder)


def some(rows: int = 5, seed: int = 0, given: int = 3) -> Batch:
    """Random rows, the first positions given and the last two of the first row padding."""
    tokens = torch.randint(3, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    valid, place = torch.ones_like(tokens, dtype=torch.bool), torch.arange(LENGTH)
    valid[0, -2:] = False
    return Batch(tokens, valid, valid & (place >= given), generator(seed, 1))


def run(
    system: Flow, n: int = 3, halt: Any = None, prompts: Any = None, record: bool = False, **changes: Any
) -> Samples:
    sampling = replace(system.defaults, steps=STEPS, **changes)
    options = RunOptions() if halt is None else RunOptions(criterion=halt)
    session = Session(system, sampling, options).recorded(record)
    return session.run(session.requests(prompts, n=n))


# The network


def test_what_is_told_stands_in_front_and_is_cut_off() -> None:
    network = InContextTransformer(DIM, VOCAB, bottleneck=4, width=16, depth=1, heads=2)
    level = torch.tensor([[0.3, 3.0, 0.0], [0.3, 3.0, 1.0]])
    assert network.asked(level).shape == (2, 3 * TOKENS, 16)
    vectors, tokens = network.asked(level)
    assert torch.equal(vectors[: 2 * TOKENS], tokens[: 2 * TOKENS])
    assert not vectors[2 * TOKENS :].any()  # zero vectors, which stay in the sequence
    assert tokens[2 * TOKENS :].any()
    assert network(torch.randn(2, LENGTH, 2 * DIM), level, None).shape == (2, LENGTH, 16)


def test_the_paper_s_base_size_has_105_million_parameters() -> None:
    with torch.device("meta"):
        network = InContextTransformer(512, 32128, bottleneck=128, width=768, depth=12, heads=12)
    assert round(sum(weight.numel() for weight in network.parameters()) / 1e6, 1) == 104.6


def test_rotation_keeps_products_of_positions_equally_far_apart() -> None:
    angles = torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.3]))
    q, k = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    turned = [rotate_pairs(x.expand(1, 1, 9, 4), angles.cos(), angles.sin())[0, 0] for x in (q, k)]
    products = turned[0] @ turned[1].T
    torch.testing.assert_close(products[3, 1], products[8, 6])
    torch.testing.assert_close(products[4, 4], q @ k)


def test_a_scalar_is_told_by_cosines_then_sines() -> None:
    made = sinusoid(torch.tensor([0.5]), 4)
    expected = torch.tensor([[0.5, 0.5 / 100]])  # at frequencies 1 and 1 / sqrt(10,000)
    torch.testing.assert_close(made, torch.cat([expected.cos(), expected.sin()], -1))


def test_the_token_head_has_the_published_gelu() -> None:
    """The tanh form, which is what jax.nn.gelu means."""
    head = InContextTransformer(2, 3, bottleneck=1, width=4, depth=1, heads=1).tokens
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * 4
    x = head[0](hidden)
    inner = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(head(hidden), head[2](inner))


def test_padding_is_seen_by_nobody(system: Flow) -> None:
    batch, t = some(), torch.full((5,), 2.0, dtype=torch.float64)
    _, z, condition = system.draw(batch, t)
    assert batch.valid is not None
    other = torch.where(batch.valid[..., None], z, 7.0)
    ours, theirs = (system.denoise(x, t, condition).x0[batch.valid] for x in (z, other))
    torch.testing.assert_close(ours, theirs)


# The system


def test_the_first_estimate_is_zero(encoder: str) -> None:
    fresh = built(encoder, stirred=False)
    batch, t = some(), torch.full((5,), 2.0, dtype=torch.float64)
    _, z, condition = fresh.draw(batch, t)
    assert not fresh.denoise(z, t, condition).x0.any()


def test_levels_are_times_of_the_flow(system: Flow) -> None:
    tau = system.time(system.schedule.t_of_u(torch.linspace(0, 1, 5, dtype=torch.float64)))
    wanted = torch.tensor([0.276796, 0.182426, 0.115108], dtype=torch.float64)  # the quantiles at 3/4, 1/2, 1/4
    torch.testing.assert_close(tau[1:4], wanted, atol=1e-6, rtol=1e-5)
    assert tau[0] == pytest.approx(1, abs=2e-4)
    assert tau[-1] == pytest.approx(0, abs=2e-4)


def test_sampling_starts_from_noise_alone(system: Flow) -> None:
    start = torch.tensor([system.schedule.t_max], dtype=torch.float64)
    assert system.prior_std * system.time(start).item() == pytest.approx(system.settings.noise_scale)


def test_given_positions_are_encoded_by_themselves(system: Flow) -> None:
    batch = some()
    other = replace(batch, tokens=torch.where(batch.target, 5, batch.tokens), generator=generator(0, 1))
    t = torch.full((5,), 2.0, dtype=torch.float64)
    ours, theirs = (system.draw(one, t)[2].clean for one in (batch, other))
    assert torch.equal(ours, theirs)
    assert ours[:, :3].any()
    assert not ours[:, 3:].any()


def test_a_hidden_prompt_is_hidden_from_the_encoder_too(encoder: str) -> None:
    hiding = built(encoder, guidance_dropout=1.0).train()
    batch = some()
    other = replace(batch, tokens=torch.where(batch.target, batch.tokens, 5), generator=generator(0, 1))
    t = torch.full((5,), 2.0, dtype=torch.float64)
    (ours, _, condition), (theirs, _, _) = (hiding.draw(one, t) for one in (batch, other))
    torch.testing.assert_close(ours * batch.target[..., None], theirs * batch.target[..., None])
    assert not condition.clean.any()


def test_guidance_is_log_uniform_in_training_and_absent_in_evaluation(encoder: str) -> None:
    flow = built(encoder)
    t = torch.full((4000,), 2.0, dtype=torch.float64)
    drawn = flow.train().draw(some(4000), t)[2].guidance
    assert drawn is not None
    assert 0.5 <= drawn.min() < 0.51
    assert 4.95 < drawn.max() <= 5
    assert (1 + drawn).log().mean().item() == pytest.approx(torch.tensor([1.5, 6.0]).log().mean().item(), abs=0.02)
    told = flow.eval().draw(some(4), t[:4])[2].guidance
    assert told is not None
    assert (told == 1).all()


def test_what_has_no_meaning_is_refused(system: Flow) -> None:
    with pytest.raises(CdlmError, match="no mixture"):
        system.mix(torch.ones(1, LENGTH, VOCAB))
    for guidance in (Guidance(score_temperature=0.9, scale=3.0), Guidance(softmax_temperature=0.9, scale=3.0)):
        with pytest.raises(CdlmError, match="temperature has no meaning"):
            run(system, guidance=guidance)
    with pytest.raises(CdlmError, match=r"knows guidance from 0\.5 to 5, got 9"):
        run(system, guidance=Guidance(scale=9.0))
    with pytest.raises(CdlmError, match="set read_out to one of Decoder, Probe, NoReadOut"):
        run(system, read_out=None)
    with pytest.raises(CdlmError, match=r"set read_out to Decoder\(\)"):
        run(system, commit=Threshold(0.9))


# Training


def test_the_decoder_branch_leaves_the_head_of_vectors_alone(encoder: str) -> None:
    flow = built(encoder, decoder_share=1.0).train()
    flow(some()).total.backward()
    head = flow.get_submodule("network.output")
    assert not any(weight.grad is not None and weight.grad.any() for weight in head.parameters())
    assert any(
        weight.grad.any() for weight in flow.get_submodule("network.tokens").parameters() if weight.grad is not None
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_batch_of_one_branch_has_a_loss_and_gradients_that_are_numbers(encoder: str, share: float) -> None:
    flow = built(encoder, decoder_share=share).train()
    loss = flow(some())
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in flow.parameters())


def test_without_guidance_the_target_is_the_clean_vector(encoder: str) -> None:
    flow = built(encoder, decoder_share=0.0)
    batch, t = some(), torch.full((5,), 3.0, dtype=torch.float64)
    drawn = flow.draw(batch, t)
    clean, z, condition = drawn
    error, _ = FlowMatching(flow.settings)._velocity(
        flow, clean, z, t, condition, replace(batch, generator=generator(5))
    )
    first = flow.denoise(z, t, condition).x0
    x0 = flow.denoise(z, t, condition._replace(x0=first)).x0
    weight = (1 / (1 - flow.time(t)).square()).float()
    expected = ((x0 - clean).square().mean(-1) * batch.target).sum(1) * weight
    torch.testing.assert_close(error, expected)


def test_guidance_moves_the_target_by_what_the_estimate_adds(encoder: str) -> None:
    """At w the target is x + (1 - 1/w) (x_c - x_u), so that the loss of its own estimate is known."""
    flow = built(encoder, decoder_share=0.0, self_conditioning=1.0)
    batch, t = some(), torch.full((5,), 3.0, dtype=torch.float64)
    clean, z, condition = flow.draw(batch, t)
    condition = condition._replace(guidance=torch.full((5,), 4.0))
    error, _ = FlowMatching(flow.settings)._velocity(
        flow, clean, z, t, condition, replace(batch, generator=generator(5))
    )
    blind = flow.denoise(z, t, condition).x0
    seeing = flow.denoise(z, t, condition._replace(x0=blind)).x0
    target = clean + 0.75 * (seeing - blind)
    weight = (1 / (1 - flow.time(t)).square()).float()
    torch.testing.assert_close(error, ((seeing - target).square().mean(-1) * batch.target).sum(1) * weight)


def test_the_probe_teaches_the_network_nothing(encoder: str) -> None:
    grads = []
    for probe in (True, False):
        flow = built(encoder, probe=probe, stirred=False).train()
        torch.nn.init.ones_(flow.get_parameter("network.output.weight"))
        flow(some()).total.backward()
        grads.append({n: w.grad.clone() for n, w in flow.network.named_parameters() if w.grad is not None})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])


def test_a_gradient_step_lowers_the_loss(encoder: str) -> None:
    flow = built(encoder, stirred=False)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=3e-3)
    before = flow(some(32)).nats.mean()
    for step in range(60):
        optimizer.zero_grad()
        flow.train()(replace(some(32), generator=generator(step))).total.backward()
        optimizer.step()
    assert flow.eval()(some(32)).nats.mean() < 0.9 * before


def test_copies_and_checkpoints_hold_no_encoder(system: Flow) -> None:
    names = set(system.state_dict())
    assert {name for name in names if name.startswith("space.")} == {"space.mean", "space.std"}
    assert copy.deepcopy(system).space.encoder is system.space.encoder


def test_a_student_learns_where_the_teacher_gets_to(encoder: str) -> None:
    """Of an untrained student, whose estimate is 0, the loss is the mean square of the target and the decoder's."""
    teacher, student = built(encoder), built(encoder, stirred=False).train()
    student.space.load_state_dict(teacher.space.state_dict())
    objective = Distillation(teacher, student.objective, steps=2, teacher_steps=8, read_out=0.0)
    student.objective = objective
    batch = replace(some(6), generator=generator(9))
    lesson = objective.lesson(student, replace(batch, generator=generator(9)))
    loss = student(batch)
    expected = (lesson.x0.square().mean(-1) * batch.target).sum() / batch.target.sum()
    torch.testing.assert_close(loss.total, expected)
    loss.total.backward()
    assert lesson.condition.guidance is not None
    assert lesson.condition.guidance.unique().numel() == 6  # each row was told its own
    objective.share = 0.5
    assert torch.isfinite(student(replace(batch, generator=generator(9))).total)


def of_a_run(encoder: str, cache: Path, steps: int, **changes: Any) -> RunConfig:
    given = dict(
        source=Stories(n=60), system=settings(encoder), tokenizer=encoder, length=LENGTH, batch_size=4,
        validation_rows=8, preview=1, cache=str(cache), training=TrainOptions(steps=steps, warmup=1, accelerator="cpu"),
    )  # fmt: skip
    return RunConfig(**{**given, **changes})


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_that_is_resumed_ends_as_one_that_is_not(encoder: str, tmp_path: Path, kept: bool) -> None:
    flow = settings(encoder, cache_latents=kept)
    whole = train(of_a_run(encoder, tmp_path / "a", 4, system=flow), tmp_path / "whole", progress=False)
    train(of_a_run(encoder, tmp_path / "b", 2, system=flow), tmp_path / "parts", progress=False)
    parts = train(of_a_run(encoder, tmp_path / "b", 4, system=flow), tmp_path / "parts", resume=True, progress=False)
    ours, theirs = whole.state_dict(), parts.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["space.std"] != 1  # fitted
    assert any(tmp_path.glob("a/vectors/*.sqlite")) == kept
    assert load(tmp_path / "parts").sampling == flow.sampling


def test_a_run_has_to_use_the_encoder_s_tokenizer(encoder: str, tmp_path: Path) -> None:
    config = of_a_run(encoder, tmp_path / "cache", 2, tokenizer=None, vocab_size=300)
    with pytest.raises(CdlmError, match="set tokenizer"):
        train(config, tmp_path / "run", progress=False)


# A space that is learned along


def learned(**changes: Any) -> ELF:
    return ELF(learned=8, width=16, depth=2, heads=2, bottleneck=4, **changes)


def test_a_learned_space_is_taught_by_both_losses_and_keeps_its_size() -> None:
    flow, batch = learned().build(VOCAB).train(), some(32)
    assert isinstance(flow.space, LearnedSpace)
    for share in (0.0, 1.0):
        flow.zero_grad()
        flow.objective = FlowMatching(learned(decoder_share=share))
        flow(replace(batch, generator=generator(1))).total.backward()
        table = flow.space.embedding.weight.grad
        assert table is not None
        assert bool(table[batch.tokens.unique()].abs().sum(-1).gt(0).any())
    rows = flow.embed(batch.tokens)
    torch.testing.assert_close(rows.square().mean(-1), torch.ones(rows.shape[:2]))
    assert not flow.given(batch.tokens, torch.zeros_like(batch.target)).any()


def test_a_run_in_a_learned_space_has_any_tokenizer_and_is_resumed(encoder: str, tmp_path: Path) -> None:
    own = dict(tokenizer=None, vocab_size=300, system=learned())
    whole = train(of_a_run(encoder, tmp_path / "a", 4, **own), tmp_path / "whole", progress=False)
    train(of_a_run(encoder, tmp_path / "b", 2, **own), tmp_path / "parts", progress=False)
    parts = train(of_a_run(encoder, tmp_path / "b", 4, **own), tmp_path / "parts", resume=True, progress=False)
    ours, theirs = whole.state_dict(), parts.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    students = distill(
        tmp_path / "whole", tmp_path / "students", steps=[2], settings=DistillSettings(train_steps=2, teacher_steps=4),
        device="cpu", progress=False,
    )  # fmt: skip
    kept = students[2].state_dict()
    assert torch.equal(kept["space.embedding.weight"], ours["space.embedding.weight"])
    assert not torch.equal(kept["network.output.weight"], ours["network.output.weight"])


def test_a_space_is_an_encoder_s_or_learned(encoder: str) -> None:
    with pytest.raises(CdlmError, match="give encoder='' and no cache, or learned=0"):
        ELF(encoder=encoder, learned=8)
    with pytest.raises(CdlmError, match="give encoder='' and no cache, or learned=0"):
        learned(cache_latents=True)


# Sampling


def test_a_saved_model_samples_the_same_without_its_encoder(encoder: str, tmp_path: Path) -> None:
    flow = built(encoder)
    flow.save_pretrained(tmp_path / "model")
    folder = hub.read(tmp_path / "model")
    again = build_system({**folder.config, "encoder": "nowhere"})
    hub.load_weights(again, folder)
    assert isinstance(again, Flow)
    ours, theirs = run(flow), run(again.eval())
    assert np.array_equal(ours.tokens, theirs.tokens)
    with pytest.raises(CdlmError, match="nowhere"):
        run(again, prompts=["a b"])


@pytest.mark.parametrize("read_out", [NoReadOut(), Probe(), Decoder(), Decoder(4)])
def test_the_tokens_of_a_whole_run_are_decoded_at_its_end_whatever_is_read_before(
    system: Flow, read_out: ReadOut
) -> None:
    made = run(system, read_out=read_out)
    asked = read_out.calls * -(-STEPS // read_out.every)
    last = 0 if read_out == Decoder() else 1  # the last step is no 4th one
    assert made.nfe.tolist() == [STEPS + asked + last] * 3
    assert np.array_equal(made.tokens, run(system).tokens)


def test_the_tokens_are_those_of_the_decoder_at_the_estimate(system: Flow) -> None:
    """The whole run by hand: Euler over the times, then one call that decodes."""
    sampling = Diffusion(STEPS, Euler(), system.defaults.grid, Guidance(scale=3.0), read_out=NoReadOut())
    session = Session(system, sampling)
    made = session.run(session.requests(n=2))
    loop = sampling.loop(system, RunOptions(), 2)
    start = loop.admit(session.requests(n=2), None)
    tau = system.time(sampling.grid.levels(system.schedule, STEPS))
    z, x0 = start.z * tau[0].item(), start.z * 0  # of the flow
    condition = Condition(x0, start.open, x0, None, None, torch.full((2,), 3.0))
    for i in range(STEPS):
        level = system.settings.noise_scale * (1 - tau[i]) / tau[i]
        x0 = system.denoise(z / tau[i].item(), level.expand(2), condition._replace(x0=x0)).x0
        if i + 1 < STEPS:
            z = z + ((tau[i + 1] - tau[i]) / (1 - tau[i])).item() * (x0 - z)
    assert made.tokens.tolist() == system.decode(x0, condition).argmax(-1).tolist()


@pytest.mark.parametrize("churn", [Churn(0.0, "elf"), Churn(0.0, "exact")])
def test_without_churn_the_solver_is_euler(system: Flow, churn: Churn) -> None:
    assert np.array_equal(run(system, solver=churn).tokens, run(system, solver=Euler()).tokens)


@pytest.mark.parametrize("steps", [1, 3, STEPS])
def test_a_rule_that_reads_no_tokens_costs_one_call_more_than_its_steps(system: Flow, steps: int) -> None:
    assert run(system, halt=FixedSteps(steps)).nfe.tolist() == [steps + 1] * 3


def test_a_rule_of_tokens_needs_a_read_out(system: Flow) -> None:
    with pytest.raises(CdlmError, match="'switches' is about tokens"):
        run(system, halt=Patience(2))
    exact, probed = (run(system, n=8, halt=Patience(2), read_out=one) for one in (Decoder(), Probe()))
    assert (exact.nfe % 2 == 0).all()  # each step and its decoder
    assert (probed.nfe == probed.steps + 1).all()


@pytest.mark.parametrize("every", [2, 3])
def test_between_two_readings_a_rule_is_not_asked(system: Flow, every: int) -> None:
    made = run(system, n=8, halt=Patience(1), read_out=Decoder(every))
    steps = made.steps
    assert ((steps - 1) % every == 0)[steps < STEPS].all()


@pytest.mark.parametrize("read_out", [NoReadOut(), Decoder(2), Probe()])
def test_a_row_is_the_same_in_any_batch(system: Flow, read_out: ReadOut) -> None:
    sampling = replace(system.defaults, steps=STEPS, read_out=read_out)
    rule = FixedSteps(3) if read_out == NoReadOut() else Patience(1)
    whole, single = (Session(system, sampling, RunOptions(criterion=rule), size) for size in (4, 1))
    requests = whole.requests(n=4)
    ours, theirs = whole.run(requests), single.run(requests)
    assert np.array_equal(ours.tokens, theirs.tokens)
    assert ours.nfe.tolist() == theirs.nfe.tolist()


def test_a_halted_row_is_the_prefix_of_the_row_that_is_not(system: Flow) -> None:
    """What a rule returns is what the run would have read out at that step."""
    recorded = run(system, n=4, read_out=Decoder(), record=True)
    halted = run(system, n=4, halt=FixedSteps(3))
    assert recorded.record is not None
    shorter = run(system, n=4, halt=FixedSteps(3), read_out=Decoder())
    assert np.array_equal(halted.tokens, shorter.tokens)


def test_a_run_without_tokens_at_its_steps_cannot_be_recorded(system: Flow) -> None:
    with pytest.raises(CdlmError, match=r"set read_out to Decoder\(\), got Probe\(\)"):
        run(system, record=True, read_out=Probe())


def test_prompts_stay_as_they_are(system: Flow) -> None:
    made = run(system, n=2, prompts=["a b c"])
    wanted = tokenizer()("a b c", add_special_tokens=False)["input_ids"]
    assert made.tokens[:, : len(wanted)].tolist() == [wanted] * 2


def test_tokens_that_are_decided_are_held_at_their_estimate(system: Flow) -> None:
    made = run(system, n=4, commit=Threshold(0.2), read_out=Decoder())
    assert (made.steps <= STEPS).all()
    assert (made.nfe == 2 * made.steps).all()


def test_in_a_learned_space_a_decided_token_is_shown_as_its_own_vector() -> None:
    learned = ELF(learned=DIM, width=16, depth=1, heads=2, bottleneck=4).build(VOCAB)
    batch = some()
    assert torch.equal(learned.committed(batch.tokens, torch.zeros(5, LENGTH, DIM)), learned.embed(batch.tokens))


def test_guidance_is_told_and_not_paid_for(system: Flow) -> None:
    loop = DiffusionLoop(system, replace(system.defaults, steps=2), RunOptions(), 4)
    assert loop.sampling.guidance.scale == 3
    assert loop.calls == 1


def test_settings_are_checked(encoder: str) -> None:
    with pytest.raises(CdlmError, match="cdlm train-encoder"):
        ELF().build(VOCAB)
    with pytest.raises(CdlmError, match="decoder_share"):
        settings(encoder, decoder_share=1.5)
    with pytest.raises(CdlmError, match="noise_scale"):
        settings(encoder, noise_scale=0.0)


def test_other_systems_say_their_tokens_themselves() -> None:
    from oracle import Oracle

    with pytest.raises(CdlmError, match="leave out read_out"):
        DiffusionLoop(Oracle(), Diffusion(read_out=Decoder()), RunOptions(), 1)
