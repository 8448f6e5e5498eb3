"""Laws of the embedding, the system, its loss and the guidance of its predictions."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, draws
from torch import Tensor, nn
from toys import lively, system, weight_of

from cdlm.continuous.embedding import OutputPrior, TokenEmbedding
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.inputs import ConcatenatedInput
from cdlm.continuous.schedules import TimeWarp
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.errors import CdlmError
from cdlm.core.trees import take
from cdlm.core.types import Batch, Condition, Prediction
from cdlm.models.system import Loss, stratified
from cdlm.runs.config import build_system

VOCAB, B, N, D = 11, 8, 6, 8


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(rows: int = B, seed: int = 5) -> Tensor:
    return torch.randint(VOCAB, (rows, N), generator=rng(seed))


def target(given_positions: int = 2) -> Tensor:
    return (torch.arange(N) >= given_positions).expand(B, N).clone()


def question(model: EmbeddingDiffusion, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Condition]:
    """A state, levels and a condition with two given positions and an earlier estimate."""
    open_ = target() if valid is None else target() & valid
    clean = model.embed(tokens()) * (~open_)[..., None]
    z, x0 = (torch.randn(B, N, D, generator=rng(seed), dtype=clean.dtype) for seed in (1, 2))
    return z, torch.linspace(0.2, 20, B, dtype=torch.float64), Condition(clean.detach(), open_, x0, valid)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- the table ---


@given(dim=st.integers(1, 30), scale=st.floats(1e-3, 1e3))
@settings(max_examples=20)
def test_every_embedding_has_the_norm_rho(dim: int, scale: float) -> None:
    embedding = TokenEmbedding(7, dim, init_std=scale).double()
    assert embedding.rho == math.sqrt(dim)
    close(embedding.table().norm(dim=-1), torch.full((7,), math.sqrt(dim), dtype=torch.float64))


def test_gradients_of_the_table_are_tangent() -> None:
    model = lively()
    model(Batch(tokens(), None, target(), rng())).total.backward()
    weight = weight_of(model)
    assert weight.grad is not None
    assert float(weight.grad.norm()) > 0
    close((weight.grad * weight).sum(-1), torch.zeros(VOCAB, dtype=torch.float64))


# --- the architecture ---


def test_the_published_model_has_147_million_parameters() -> None:
    published = CDCD(width=1024, depth=8, heads=16, dim=256, t_min=1 / 16, t_max=300 / 16, axis="linear", gates=False)
    with torch.device("meta"):
        model = build_system({"system": "cdcd", "vocab": 100, **published.__dict__})
    per_token = 256 + 1024 + 1
    counted = sum(p.numel() for p in model.parameters()) + (32_000 - 100) * per_token
    assert round(counted / 1e6, 1) == 147.0
    assert isinstance(model, EmbeddingDiffusion)
    assert model.schedule.t_min == 1
    assert model.schedule.t_max == 300


def test_every_tensor_is_a_parameter_or_a_buffer() -> None:
    model = system().to("meta")
    left = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    assert left == []
    everything = [*model.parameters(), *model.buffers()]
    assert all(tensor.device.type == "meta" for tensor in everything)
    assert len(model.state_dict()) == len(everything)


def test_the_configuration_rebuilds_the_system() -> None:
    model = system(axis="linear", gates=False, output_prior=True)
    again = build_system(model.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert again.config == model.config


def test_the_groups_share_out_the_parameters() -> None:
    model = system()
    groups = model.parameter_groups()
    ids = [id(p) for group in groups.values() for p in group]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}
    assert [p.shape for p in groups["schedule"]] == [model.schedule.get_parameter("logits").shape]
    assert all(p.ndim == 2 for p in groups["matrices"])
    assert len(groups["matrices"]) == 4 * 2  # qkv, attention_out and two of the MLP, in each of two blocks


@pytest.mark.parametrize(
    "bad",
    [
        {"width": 18}, {"width": 20, "heads": 4}, {"self_conditioning": -0.1}, {"self_conditioning": 1.5},
        {"guidance_dropout": 2.0}, {"guidance_dropout": math.nan}, {"t_min": 0.0}, {"t_min": 5.0, "t_max": 5.0},
        {"t_min": 6.0, "t_max": 5.0}, {"t_max": math.inf}, {"heads": 0}, {"depth": 0}, {"dim": 0}, {"mlp_ratio": 0},
        {"width": 0}, {"width": -16},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(CdlmError):
        system(**bad)


# --- what a prediction depends on ---


@pytest.mark.parametrize("output_prior", [False, True])
def test_the_state_at_given_positions_changes_nothing(output_prior: bool) -> None:
    model = lively(output_prior=output_prior)
    z, t, condition = question(model)
    before = model.denoise(z, t, condition).logits
    for noise in (0.0, 1e3):
        changed = torch.where(condition.target[..., None], z, noise)
        assert torch.equal(model.denoise(changed, t, condition).logits, before)
    hidden = condition._replace(x0=torch.where(condition.target[..., None], condition.x0, 7.0))
    assert torch.equal(model.denoise(z, t, hidden).logits, before)


def test_the_prompt_the_state_the_level_and_the_estimate_matter() -> None:
    model = lively()
    z, t, condition = question(model)
    before = model.denoise(z, t, condition).logits
    for other in (
        model.denoise(z + 1, t, condition),
        model.denoise(z, t * 1.1, condition),
        model.denoise(z, t, condition._replace(clean=condition.clean * 0)),
        model.denoise(z, t, condition._replace(x0=condition.x0 * 0)),
    ):
        assert (other.logits - before).abs().max().item() > 1e-3


def test_padding_is_as_if_it_were_not_there() -> None:
    model = lively(output_prior=True)
    valid = (torch.arange(N) < 4).expand(B, N)
    z, t, condition = question(model, valid)
    padded = model.denoise(z, t, condition).logits[:, :4]
    filled = condition._replace(clean=torch.where(valid[..., None], condition.clean, 9.0))
    close(model.denoise(torch.where(valid[..., None], z, 99.0), t, filled).logits[:, :4], padded)
    cut = Condition(condition.clean[:, :4], condition.target[:, :4], condition.x0[:, :4])
    close(model.denoise(z[:, :4], t, cut).logits, padded)


def test_padding_is_neither_noised_nor_scored() -> None:
    model = lively(self_conditioning=0.5)
    valid = (torch.arange(N) < 4).expand(B, N)
    open_ = target() & valid
    first = model(Batch(tokens(), valid, open_, rng()))
    second = model(Batch(torch.where(valid, tokens(), 3), valid, open_, rng()))
    close(first.nats, second.nats)
    assert first.count.tolist() == [2] * B


def test_rows_do_not_see_each_other() -> None:
    model = lively(output_prior=True)
    z, t, condition = question(model)
    together = model.denoise(z, t, condition)
    for i in range(B):
        alone: Prediction = model.denoise(*take((z, t, condition), torch.tensor([i])))
        close(alone.logits, together.logits[i : i + 1])
        close(alone.x0, together.x0[i : i + 1])


def test_the_estimate_is_the_mean_embedding() -> None:
    model = lively()
    prediction = model.denoise(*question(model))
    expected = torch.einsum("bnv,vd->bnd", prediction.logits.softmax(-1), model.embedding.table())
    close(prediction.x0, expected)
    close(model.expect(prediction.logits), expected)
    certain = nn.functional.one_hot(tokens(), VOCAB).double() * 1e4
    close(model.expect(certain), model.embed(tokens()))


class Frequencies(nn.Module):
    """A network that knows how often each token comes and nothing else."""

    def __init__(self, frequencies: Tensor):
        super().__init__()
        self.frequencies = frequencies

    def forward(self, features: Tensor, level: Tensor, valid: Tensor | None) -> Tensor:
        return self.frequencies.log().expand(*features.shape[:2], -1)


@given(seed=st.integers(0, 1000), t=st.floats(0.05, 30))
@settings(max_examples=25)
def test_own_position_and_token_frequencies_are_the_exact_posterior(seed: int, t: float) -> None:
    oracle = Oracle()
    embedding = TokenEmbedding(7, oracle.dim).double()
    embedding.weight.data.copy_(oracle.table)
    model = EmbeddingDiffusion(
        embedding, TimeWarp(0.1, 30.0), Frequencies(oracle.frequencies), output_prior=OutputPrior(), config={}
    )
    level = torch.full((3,), t, dtype=torch.float64)
    words = torch.randint(7, (3, 4), generator=rng(seed))
    z = oracle.embed(words) + t * torch.randn(3, 4, oracle.dim, generator=rng(seed), dtype=torch.float64)
    condition = Condition(z * 0, words >= 0, z * 0)
    ours, exact = model.denoise(z, level, condition), oracle.denoise(z, level, condition)
    close(ours.logits.softmax(-1), exact.logits.softmax(-1), 1e-8)
    close(ours.x0, exact.x0, 1e-8)


def test_bf16_is_the_arithmetic_of_the_network_alone() -> None:
    model = system(output_prior=True)
    with torch.no_grad():
        model.network.get_parameter("output.weight").mul_(50)
        z, t, condition = question(model)
        exact = model.denoise(z, t, condition)
        model.precision = "bf16"
        rough = model.denoise(z, t, condition)
        assert rough.logits.dtype == rough.x0.dtype == torch.float32
        assert not torch.equal(rough.logits, exact.logits)
        torch.testing.assert_close(rough.logits, exact.logits, rtol=0.1, atol=0.5)  # logits are 50 times as large
        loss = model(Batch(tokens(), None, target(), rng()))
    assert loss.nats.dtype == loss.total.dtype == torch.float32


# --- the loss ---


@pytest.mark.parametrize("gates", [True, False])
def test_the_first_loss_is_that_of_guessing(gates: bool) -> None:
    model = system(vocab=300, gates=gates)
    words = torch.randint(300, (64, N), generator=rng(1))
    nats = model(Batch(words, None, torch.ones(64, N, dtype=torch.bool), rng())).nats
    assert float(nats.mean()) == pytest.approx(math.log(300), abs=0.05)


def test_the_loss_reaches_every_part() -> None:
    model = lively()
    loss: Loss = model(Batch(tokens(), None, target(), rng()))
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 0, name
    assert not loss.nats.requires_grad
    assert not loss.t.requires_grad


def test_the_fit_of_the_schedule_reaches_the_schedule_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(model: EmbeddingDiffusion) -> dict[str, Tensor | None]:
        model(Batch(tokens(), None, target(), rng())).total.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    with_fit, without = lively(), lively()
    monkeypatch.setattr(without.schedule, "fit", lambda t, nats: nats.new_zeros(()))
    ours, plain = gradients(with_fit), gradients(without)
    assert plain.pop("schedule.logits") is None
    assert ours.pop("schedule.logits") is not None
    assert all(
        a is not None and b is not None and torch.equal(a, b)
        for a, b in zip(ours.values(), plain.values(), strict=False)
    )


def test_the_loss_is_a_function_of_its_generator() -> None:
    model = lively()
    before = torch.random.get_rng_state()
    one, same, other = (model(Batch(tokens(), None, target(), rng(seed))) for seed in (3, 3, 4))
    assert torch.equal(one.total, same.total)
    assert torch.equal(one.t, same.t)
    assert not torch.equal(one.total, other.total)
    assert torch.equal(before, torch.random.get_rng_state())


def test_fixed_levels_are_used() -> None:
    model, u = lively(), torch.linspace(0, 1, B, dtype=torch.float64)
    assert torch.equal(model(Batch(tokens(), None, target(), rng(), u)).t, model.schedule.t_of_u(u))


def test_the_mean_counts_tokens_alike() -> None:
    model = lively()
    ragged = torch.arange(N) >= torch.arange(B)[:, None] % N
    loss = model(Batch(tokens(), None, ragged, rng()))
    assert loss.count.tolist() == ragged.sum(1).tolist()
    fit = model.schedule.fit(loss.t, loss.nats)
    close(loss.total.detach(), ((loss.nats * loss.count).sum() / loss.count.sum() + fit).detach())


def seen_by(model: EmbeddingDiffusion) -> list[Tensor]:
    """Features of every call of the network from now on."""
    calls: list[Tensor] = []
    model.network.register_forward_pre_hook(lambda _, args: calls.append(args[0].detach()))
    return calls


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_that_share_of_the_rows_gets_a_first_pass(share: float) -> None:
    model = lively(self_conditioning=share).train()
    calls = seen_by(model)
    model(Batch(tokens(), None, target(), rng()))
    rows = round(share * B)
    assert [len(features) for features in calls] == ([rows, B] if rows else [B])
    estimates = calls[-1][..., 2 * D : 3 * D].abs().sum((1, 2))
    assert int((estimates > 0).sum()) == rows
    if rows:
        assert float(calls[0][..., 2 * D : 3 * D].abs().sum()) == 0


@pytest.mark.parametrize(("share", "hidden"), [(0.0, 0), (1.0, B)])
def test_guidance_dropout_hides_the_prompt_and_not_the_mask(share: float, hidden: int) -> None:
    model = lively(guidance_dropout=share, self_conditioning=0.0).train()
    calls = seen_by(model)
    model(Batch(tokens(), None, target(), rng()))
    clean, mask = calls[0][..., D : 2 * D], calls[0][..., -1]
    assert int((clean.abs().sum((1, 2)) == 0).sum()) == hidden
    assert torch.equal(mask == 1, target())


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_a_share_of_the_given_positions_shows_wrong_tokens(wrong: float) -> None:
    model = lively(wrong_given=wrong, guidance_dropout=0.0, self_conditioning=0.0).train()
    calls, rows, own = seen_by(model), 200, rng()
    shown = torch.arange(rows * N).view(rows, N) % VOCAB
    given = torch.zeros(rows, N, dtype=torch.bool)
    given[:, ::2] = True
    model(Batch(shown, None, ~given, own))
    clean = calls[0][..., D : 2 * D]
    assert isinstance(model.network_input, ConcatenatedInput)
    right = (clean - model.network_input.unit * model.embed(shown)).abs().sum(-1) < 1e-9
    assert float(clean[~given].abs().sum()) == 0
    # a token that is drawn in place of another is the same one in 1 of VOCAB cases
    assert 1 - float(right[given].double().mean()) == pytest.approx(wrong * (1 - 1 / VOCAB), abs=0.06)


def of_the_given(model: EmbeddingDiffusion, batch: Batch) -> float:
    """The part of the loss that is beside the positions to generate and the schedule."""
    loss = model(batch)
    reported = (loss.nats * loss.count).sum() / loss.count.sum()
    return (loss.total - reported - model.schedule.fit(loss.t, loss.nats)).item()


def test_wrong_given_tokens_count_in_the_loss_beside_what_is_reported() -> None:
    batch = Batch(tokens(), None, target(), rng())
    assert of_the_given(lively(self_conditioning=0.0).train(), batch) == pytest.approx(0, abs=1e-9)
    assert of_the_given(lively(wrong_given=0.1, self_conditioning=0.0).train(), batch) > 0.1


def test_hidden_prompts_padding_and_evaluation_teach_no_doubt() -> None:
    doubting: dict[str, Any] = {"wrong_given": 0.5, "self_conditioning": 0.0}
    batch = Batch(tokens(), None, target(), rng())
    assert of_the_given(lively(**doubting, guidance_dropout=1.0).train(), batch) == pytest.approx(0, abs=1e-9)
    padded = replace(batch, valid=target())  # all that is not to be generated is padding
    assert of_the_given(lively(**doubting).train(), padded) == pytest.approx(0, abs=1e-9)
    assert of_the_given(lively(**doubting).eval(), batch) == pytest.approx(0, abs=1e-9)


def test_in_evaluation_every_row_gets_a_first_pass_and_sees_its_prompt() -> None:
    model = lively(guidance_dropout=1.0, self_conditioning=0.25).eval()
    calls = seen_by(model)
    model(Batch(tokens(), None, target(), rng()))
    assert [len(features) for features in calls] == [B, B]
    assert int((calls[1][..., D : 2 * D].abs().sum((1, 2)) == 0).sum()) == 0


@given(rows=st.integers(1, 70), seed=st.integers(0, 10_000))
@settings(max_examples=40)
def test_stratified_draws_have_one_in_each_cell(rows: int, seed: int) -> None:
    u = stratified(rows, rng(seed))
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())
    offset = float(u.min())
    cells = ((u - offset) * rows).round().long()
    assert sorted(cells.tolist()) == list(range(rows))
    if offset * rows > 1e-6:
        assert sorted((u * rows).floor().long().tolist()) == list(range(rows))


def test_stratified_draws_are_uniform_row_by_row() -> None:
    first = torch.stack([stratified(4, rng(seed))[0] for seed in range(1000)])
    assert float(first.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(first.var()) == pytest.approx(1 / 12, abs=0.01)


# --- guidance ---


def estimate(guidance: Guidance, model: EmbeddingDiffusion) -> Tensor:
    return guidance.predict(model, *question(model), draws())[1]


def test_the_neutral_steering_is_the_prediction() -> None:
    model = lively()
    plain = model.denoise(*question(model))
    prediction, x0 = Guidance().predict(model, *question(model), draws())
    assert torch.equal(x0, plain.x0)
    assert torch.equal(prediction.logits, plain.logits)
    close(estimate(Guidance(softmax_temperature=1 + 1e-13, score_temperature=1 + 1e-13), model), plain.x0)
    close(estimate(Guidance(scale=1 + 1e-13), model), plain.x0)


@given(scale=st.floats(-2, 6), softmax=st.floats(0.3, 3), score=st.floats(0.3, 3))
@settings(max_examples=15)
def test_guidance_is_linear_in_the_estimate(scale: float, softmax: float, score: float) -> None:
    model = lively()
    base = Guidance(softmax, score)
    none, full, some = (estimate(replace(base, scale=g), model) for g in (0.0, 1.0, scale))
    close(some, none + scale * (full - none), 1e-8)


def test_no_guidance_is_the_prediction_without_the_prompt() -> None:
    model = lively()
    z, t, condition = question(model)
    free = model.denoise(z, t, condition._replace(clean=condition.clean * 0))
    close(estimate(Guidance(scale=0.0), model), free.x0)
    assert Guidance(scale=0.0).calls == 2
    assert Guidance().calls == 1


@given(temperature=st.floats(0.2, 5))
@settings(max_examples=15)
def test_temperatures_divide_the_score_and_thelogits(temperature: float) -> None:
    model = lively()
    z, t, condition = question(model)
    plain = model.denoise(z, t, condition)
    tempered = estimate(Guidance(score_temperature=temperature), model)
    squared = t.square()[:, None, None]
    close((tempered - z) / squared, (plain.x0 - z) / squared / temperature, 1e-8)
    close(estimate(Guidance(temperature), model), model.expect(plain.logits / temperature), 1e-8)


def test_the_steered_estimate_leaves_the_prediction_alone() -> None:
    model = lively()
    plain = model.denoise(*question(model))
    prediction, _ = Guidance(0.5, 0.8, 3.0).predict(model, *question(model), draws())
    assert torch.equal(prediction.logits, plain.logits)
    assert torch.equal(prediction.x0, plain.x0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_temperatures_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(CdlmError, match="softmax_temperature"):
        Guidance(softmax_temperature=value)
    with pytest.raises(CdlmError, match="score_temperature"):
        Guidance(score_temperature=value)


def test_a_system_without_self_conditioning_reads_no_estimate() -> None:
    model = lively(self_conditioning=0.0)
    z, t, condition = question(model)
    told = condition._replace(x0=torch.ones_like(condition.x0))
    assert torch.equal(model.denoise(z, t, told).logits, model.denoise(z, t, condition._replace(x0=told.x0 * 0)).logits)
