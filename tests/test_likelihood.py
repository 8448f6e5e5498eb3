"""Likelihoods against known answers: closed-form posteriors, brute-force Jacobians, languages of known entropy."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Int
from langflow_evaluator import langflow_evaluator_score
from oracle import Oracle
from torch import Tensor, nn

from cdlm.cli.main import main
from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.likelihood import (
    Estimate,
    Walk,
    bound,
    by_block,
    check_text,
    ode_nats,
    walk_nats,
)
from cdlm.continuous.schedules import TimeWarp
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import BOUND, METHODS, ODE, LikelihoodSettings, Nats, Ode, Text, stratified_error
from cdlm.core.trees import take
from cdlm.core.types import Batch, Condition, Prediction
from cdlm.evaluation.metrics.likelihood import Likelihood, Measure
from cdlm.masked.likelihood import nelbo
from cdlm.masked.model import Constants, Function
from cdlm.masked.system import MaskedDiffusion
from cdlm.runs import caches
from cdlm.runs.config import parse_run

Score = Callable[[Denoiser, Text], Nats]


def by_ode(method: str) -> Score:
    return lambda denoiser, text: ode_nats(denoiser, text, Ode(steps=3, method=method, probes=2))


SCORES: dict[str, Score] = {
    "bound": lambda denoiser, text: bound(denoiser, text, levels=3),
    **{method: by_ode(method) for method in METHODS},
}


def whole(tokens: Int[Tensor, "b n"]) -> Text:
    """All positions, nothing given."""
    key = torch.arange(len(tokens))[:, None]
    return Text(tokens, torch.ones_like(tokens, dtype=torch.bool), None, key)


def drawn(oracle: Oracle, rows: int, n: int) -> Text:
    """Text of the oracle's own source."""
    source = torch.Generator().manual_seed(1)
    return whole(torch.multinomial(oracle.frequencies, rows * n, replacement=True, generator=source).view(rows, n))


def truth(oracle: Oracle, text: Text) -> Float[Tensor, " b"]:
    """-ln p of each row."""
    return -oracle.frequencies.log()[text.tokens].sum(1)


def toy_text(n: int = 5, rows: int = 3, vocab: int = 11) -> Text:
    return whole(torch.randint(vocab, (rows, n), generator=torch.Generator().manual_seed(2)))


def basis(rows: int, n: int, d: int) -> Float[Tensor, "p b n d"]:
    """Directions along which the mean of u J u is the trace itself."""
    axes = math.sqrt(n * d) * torch.eye(n * d, dtype=torch.float64)
    return axes.view(n * d, 1, n, d).expand(n * d, rows, n, d)


def walk(denoiser: Denoiser, text: Text, steps: int, probe: Float[Tensor, "p b n d"] | None = None) -> Walk:
    """A start of its own, and by default the exact trace."""
    shape = (*text.tokens.shape, denoiser.dim)
    levels = denoiser.schedule.t_of_u(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).detach()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    along = basis(len(text.tokens), text.tokens.shape[1], denoiser.dim) if probe is None else probe
    return Walk(levels, noise, lambda: along)


class Blind(Oracle):
    """Sees nothing: uniform logits, and the origin as its estimate."""

    def __init__(self, std: float = 1.0):
        super().__init__()
        self.std = std

    @property
    def prior_std(self) -> float:
        return self.std * self.schedule.t_max

    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        return Prediction(z.new_zeros(*z.shape[:2], len(self.table)), 0 * z)


# --- the exact posterior ---


@pytest.mark.parametrize("above", [None, 1.0, 3.0, 10.0])
def test_the_bound_of_the_exact_posterior_is_the_negative_log_probability(above: float | None) -> None:
    """Wherever the tokens are read out: what the posterior leaves open there is what the integral lacks."""
    oracle = Oracle()
    text = drawn(oracle, 24, 16)
    read_out = None if above is None else above * oracle.schedule.t_min
    found = bound(oracle, text, levels=48, read_out=read_out)
    assert above != 10.0 or found.terms["reconstruction"].sum() / 384 > 0.3
    off, tokens = (found.total - truth(oracle, text)).sum() / 384, found.positions.sum()
    error = found.error.square().sum().sqrt() / tokens
    assert tokens == 384
    assert error < 0.05
    assert off.abs() < 3 * error + 0.002  # the prior's mismatch
    entropy = -(oracle.frequencies * oracle.frequencies.log()).sum()
    spread = -oracle.frequencies.log()[text.tokens].flatten()
    assert (found.total.sum() / tokens - entropy).abs() < 3 * (error + spread.std() / math.sqrt(384))


def test_the_bound_of_each_token_is_its_own() -> None:
    oracle = Oracle(t_min=0.1)
    text = whole(torch.arange(7)[:, None].repeat_interleave(40, 0).expand(280, 16).contiguous())
    off = (bound(oracle, text, levels=32).total - truth(oracle, text)).view(7, 40) / 16
    error = off.std(1) / math.sqrt(40)
    assert (error < 0.06).all()
    assert (off.mean(1).abs() < 3 * error + 0.002).all()
    assert oracle.frequencies.log().diff().abs().max() > 0.5  # they differ by far more


@pytest.mark.parametrize(("method", "steps"), [("rk4", 64), ("heun3", 90), ("heun2", 300)])
def test_with_the_exact_trace_each_draw_of_the_ode_is_the_negative_log_probability(method: str, steps: int) -> None:
    oracle = Oracle(t_max=2000.0)
    text = drawn(oracle, 6, 3)
    found = walk_nats(oracle, text, walk(oracle, text, steps), Ode(method=method))
    torch.testing.assert_close(found.total, truth(oracle, text), atol=0.01, rtol=0)
    assert found.terms["reconstruction"].abs().max() < 1e-6
    assert found.terms["prior"].abs().max() > 0.1


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
@pytest.mark.parametrize(("method", "steps"), [("rk4", 24), ("heun2", 64)])
@pytest.mark.parametrize("read_out", [None, 1.0])
def test_the_ode_agrees_with_the_entropy_within_its_error(
    method: str, steps: int, law: str, read_out: float | None
) -> None:
    oracle = Oracle()
    text = drawn(oracle, 64, 16)
    ode = Ode(steps=steps, method=method, probes=2, law=law)  # pyright: ignore[reportArgumentType]
    found = ode_nats(oracle, text, ode, read_out=read_out)
    assert read_out is None or found.terms["reconstruction"].sum() / 1024 > 0.1
    error = found.error.square().sum().sqrt() / 1024
    assert 0 < error < 0.05
    assert (found.total - truth(oracle, text)).sum().abs() / 1024 < 3 * error + 0.01


def test_a_denoiser_that_is_wrong_about_the_source_pays_for_it() -> None:
    oracle, wrong = Oracle(), Oracle()
    wrong.frequencies = wrong.frequencies.flip(0)
    text = drawn(oracle, 24, 16)
    worse = (bound(wrong, text, levels=32).total - bound(oracle, text, levels=32).total).sum()
    expected = (truth(wrong, text) - truth(oracle, text)).sum()
    assert expected > 30
    assert (worse - expected).abs() < 0.25 * expected  # the noise is the same in both


# --- closed forms ---


@pytest.mark.parametrize("std", [1.0, 0.5, 3.0])
def test_a_blind_denoiser_has_closed_forms(std: float) -> None:
    blind, text = Blind(std), toy_text(4, vocab=7)
    t_max, d = blind.schedule.t_max, blind.dim
    clean, prior = blind.embed(text.tokens), torch.distributions.Normal(torch.tensor(0.0).double(), std * t_max)
    noisiest = torch.distributions.Normal(clean, torch.tensor(t_max).double())
    found = bound(blind, text, levels=200)
    kl = torch.distributions.kl_divergence(noisiest, prior).sum((1, 2))
    torch.testing.assert_close(found.terms["prior"], kl)
    torch.testing.assert_close(found.terms["reconstruction"], torch.full_like(kl, 4 * math.log(7)))
    for read_out in (None, blind.schedule.t_min, 2 * blind.schedule.t_min, t_max / 2):
        lost = 4 * d / 2 * ((read_out or blind.schedule.t_min) ** -2 - t_max**-2)
        within = bound(blind, text, levels=200, read_out=read_out).terms["diffusion"]
        torch.testing.assert_close(within, torch.full_like(kl, lost), rtol=0.01, atol=0)

    asked = walk(blind, text, 4)
    solved = walk_nats(blind, text, asked, Ode(method="euler"))
    y = clean / blind.schedule.t_min + asked.noise  # nothing moves it
    density = torch.distributions.Normal(torch.tensor(0.0).double(), std).log_prob(y)
    proposal = torch.distributions.Normal(torch.tensor(0.0).double(), 1.0).log_prob(asked.noise)
    torch.testing.assert_close(solved.terms["prior"], (proposal - density).sum((1, 2)))
    torch.testing.assert_close(solved.terms["flow"], torch.zeros_like(kl))


def test_the_error_of_the_bound_is_that_of_its_draws() -> None:
    draws = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert stratified_error(draws).square().mean().item() == pytest.approx(1 / 6, rel=0.03)
    assert stratified_error(torch.arange(6.0)[None]).item() < torch.arange(6.0).std().item() / 6**0.5
    assert bool(stratified_error(draws[:, :1]).isnan().all())


def test_an_untrained_system_knows_nothing_and_a_schedule_that_misses_it_does_not_hide_it() -> None:
    """Its estimate is the mean embedding at all levels, so ||e||^2 / (2 t_min^2) is lost. The paper's linear axis, not
    yet fitted, puts less than one draw in a hundred where that happens."""
    for axis in ("linear", "log"):
        system, text = toys.system(axis=axis), whole(torch.arange(11)[:, None].expand(11, 8).contiguous())
        table = system.embed(torch.arange(11)[None])[0]
        spread = (table - table.mean(0)).square().sum(-1)
        found = bound(system, text, levels=48)
        lost = found.terms["diffusion"].mean() / 8
        assert lost.item() == pytest.approx(spread.mean().item() / 2 / system.schedule.t_min**2, rel=0.1)
        assert found.total.min() > 8 * math.log(11)


class Still(TimeWarp):
    """t stands at t_min for the lowest fifth of u."""

    def t_of_u(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return super().t_of_u((1.25 * u - 0.25).clamp(min=0))

    def density(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return 0.8 * super().density(t)

    def slope(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return torch.where(u > 0.2, super().slope(u), 0)


def test_levels_at_which_a_schedule_stands_still_count_for_nothing() -> None:
    blind, text = Blind(), toy_text(4, vocab=7)
    expected = 10 * (blind.schedule.t_min**-2 - blind.schedule.t_max**-2)
    blind.schedule = Still(blind.schedule.t_min, blind.schedule.t_max)
    found = bound(blind, text, levels=250).terms["diffusion"]
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0.03, atol=0)


# --- the trace ---


def brute_force(denoiser: Denoiser, text: Text, s: float, y: Tensor, detached: bool) -> Float[Tensor, " b"]:
    """The trace over the positions that are scored, from the whole Jacobian of two passes."""
    clean = denoiser.embed(text.tokens).detach() * ~text.target[..., None]
    t = torch.full((len(y),), 1 / s, dtype=torch.float64)

    def field(y: Tensor) -> Tensor:
        condition = Condition(clean, text.target, torch.zeros_like(clean))
        first = denoiser.denoise(y / s, t, condition).x0
        return denoiser.denoise(y / s, t, condition._replace(x0=first.detach() if detached else first)).x0

    whole_matrix = torch.autograd.functional.jacobian(field, y)  # [b n d, b n d]
    diagonal = torch.einsum("bndbnd->bnd", whole_matrix)
    return (diagonal * text.target[..., None]).sum((1, 2))


@pytest.mark.parametrize("detached", [False, True])
def test_the_trace_is_that_of_the_whole_jacobian(detached: bool) -> None:
    system, text = toys.lively(), toy_text()
    text.target[:, 1] = False  # one position is given
    asked = walk(system, text, 1)
    s = 1 / asked.levels
    score = langflow_evaluator_score if detached else walk_nats
    found = score(system, text, asked, Ode(method="euler"))
    y = s[0] * system.embed(text.tokens) + asked.noise
    expected = (s[0] - s[1]) * brute_force(system, text, s[0].item(), y.detach(), detached)
    torch.testing.assert_close(found.terms["flow"], expected)


def test_the_first_pass_counts() -> None:
    system, text = toys.lively(), toy_text()
    asked = walk(system, text, 2)
    one = [score(system, text, asked, None, False).terms["flow"] for score in (walk_nats, langflow_evaluator_score)]
    two = [score(system, text, asked).terms["flow"] for score in (walk_nats, langflow_evaluator_score)]
    torch.testing.assert_close(one[0], one[1])
    assert ((two[0] - two[1]).abs() > 1e-3).all()
    assert (two[0] - one[0]).abs().max() > 0.1


def test_without_self_conditioning_there_is_one_pass() -> None:
    assert not Estimate.of(toys.lively(self_conditioning=0.0), toy_text(), None).two_passes
    assert not Estimate.of(Oracle(), toy_text(vocab=7), None).two_passes


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_random_directions_find_the_trace(law: str) -> None:
    oracle = Oracle()
    text = whole(torch.tensor([[1, 2]]))
    exact = walk_nats(oracle, text, walk(oracle, text, 3)).terms["flow"]
    source = torch.Generator().manual_seed(4)
    directions = torch.randn(800, 1, 2, 5, generator=source, dtype=torch.float64)
    directions = directions.sign() if law == "rademacher" else directions
    found = walk_nats(oracle, text, walk(oracle, text, 3, directions)).terms["flow"]
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0)


def test_the_evaluator_asks_for_a_direction_at_each_evaluation_in_order() -> None:
    oracle, text = Oracle(), drawn(Oracle(), 2, 3)
    asked, given_out = walk(oracle, text, 5), list[int]()

    def probe() -> Tensor:
        given_out.append(len(given_out))
        return torch.full((1, 2, 3, 5), float(len(given_out)), dtype=torch.float64)

    langflow_evaluator_score(oracle, text, asked._replace(probe=probe), Ode(method="midpoint"))
    assert given_out == list(range(10))


# --- rows are independent ---


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("denoiser", [Oracle(), toys.lively(7)], ids=["oracle", "system"])
def test_a_row_does_not_depend_on_its_batch(score: Score, denoiser: Denoiser) -> None:
    text = toy_text(4, rows=4, vocab=7)
    together = score(denoiser, text)
    rtol = 1e-12 if isinstance(denoiser, Oracle) else 1e-9
    for rows in ([0], [3, 1], [2]):
        alone = score(denoiser, take(text, torch.tensor(rows)))
        torch.testing.assert_close(alone.total, together.total[rows], atol=1e-12, rtol=rtol)
        torch.testing.assert_close(alone.error, together.error[rows], atol=1e-9, rtol=rtol)


@pytest.mark.parametrize("score", [SCORES["bound"], SCORES["rk4"]], ids=["bound", "ode"])
def test_noise_follows_the_seed_and_the_key(score: Score) -> None:
    oracle, text = Oracle(), whole(torch.tensor([[1, 2], [1, 2]]))
    found = score(oracle, text)
    assert found.total[0] != found.total[1]
    torch.testing.assert_close(score(oracle, text._replace(key=text.key.flip(0))).total, found.total.flip(0))
    assert bound(oracle, text, seed=1).total[0] != bound(oracle, text).total[0]
    assert ode_nats(oracle, text, Ode(4), seed=1).total[0] != ode_nats(oracle, text, Ode(4)).total[0]


@pytest.mark.parametrize("score", [SCORES["bound"], SCORES["heun2"]], ids=["bound", "ode"])
def test_padding_does_not_matter(score: Score) -> None:
    system, text = toys.lively(), toy_text(6)
    valid = torch.arange(6).expand(3, 6) < torch.tensor([[6], [4], [1]])
    text = text._replace(valid=valid, target=valid)
    found = score(system, text)
    assert found.positions.tolist() == [6, 4, 1]
    other = text._replace(tokens=torch.where(valid, text.tokens, (text.tokens + 1) % 11))
    torch.testing.assert_close(score(system, other).total, found.total, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["dopri5", "explicit_adams", "implicit_adams", "magic"])
def test_methods_that_mix_rows_or_need_even_steps_are_refused(method: str) -> None:
    with pytest.raises(CdlmError, match="use one of euler, midpoint"):
        Ode(method=method)


# --- block by block ---


@given(st.integers(0, 2**30), st.integers(1, 7))
def test_blocks_take_each_position_once_and_see_only_what_is_before(seed: int, size: int) -> None:
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(9, (3, 12), generator=source)
    real = torch.arange(12).expand(3, 12) < torch.randint(1, 13, (3, 1), generator=source)
    target = real & (torch.rand(3, 12, generator=source) < 0.6)
    target[:, 0] = True
    parts, origin = by_block(Text(tokens, target, real, torch.arange(3)[:, None]), size)
    check_text(Oracle(), parts)
    taken = torch.zeros(3, 12, dtype=torch.int64).index_add_(0, origin, parts.target.long())
    assert torch.equal(taken, target.long())
    assert parts.target.sum(1).max() <= size
    assert len({tuple(key) for key in parts.key.tolist()}) == len(parts.tokens)
    assert torch.equal(parts.tokens, tokens[origin])
    assert parts.valid is not None
    for row, now, seen in zip(origin.tolist(), parts.target, parts.valid, strict=True):
        last = int(now.nonzero().max())
        assert torch.equal(seen, real[row] & (torch.arange(12) <= last))
        assert bool((taken[row] - now.long())[:last].sum() == (target[row] & ~now)[:last].sum())


def test_a_block_does_not_see_what_comes_after_it() -> None:
    system, text = toys.lively(), toy_text(6)
    parts, origin = by_block(text, 2)
    later = text._replace(tokens=torch.where(torch.arange(6) < 4, text.tokens, (text.tokens + 3) % 11))
    found, changed = bound(system, parts, 3), bound(system, by_block(later, 2)[0], 3)
    first = parts.key[:, 1] < 2
    torch.testing.assert_close(found.total[first], changed.total[first])
    assert (found.total - changed.total)[~first].abs().min() > 1e-6
    summed = found.summed(origin, 3)
    assert summed.positions.tolist() == [6, 6, 6]
    torch.testing.assert_close(summed.total, found.total.view(3, 3).sum(1))
    torch.testing.assert_close(summed.error, found.error.view(3, 3).square().sum(1).sqrt())


def test_a_system_of_blocks_is_scored_block_by_block() -> None:
    system, text = toys.lively(), toy_text(5)
    system.block = 2
    asked = LikelihoodSettings(levels=2, ode=Ode(3), batch_size=2)
    found = system.nats(text, asked)
    parts, origin = by_block(text, 2)
    torch.testing.assert_close(found[BOUND].total, bound(system, parts, 2).summed(origin, 3).total)
    torch.testing.assert_close(found[ODE].total, ode_nats(system, parts, Ode(3)).summed(origin, 3).total)
    assert found[BOUND].positions.tolist() == [5, 5, 5]


# --- what is refused ---


@pytest.mark.parametrize("state", [torch.float16, torch.bfloat16])
def test_a_state_in_half_precision_is_refused(state: torch.dtype) -> None:
    with pytest.raises(CdlmError, match="half precision loses it"):
        Ode(state=state)


def test_a_network_in_half_precision_is_refused() -> None:
    system, text = toys.system(), toy_text()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CdlmError, match="half precision"):
        ode_nats(system, text, Ode(2))
    system.precision = "bf16"
    with pytest.raises(CdlmError, match="half precision"):
        ode_nats(system, text, Ode(2))
    with pytest.raises(CdlmError, match="half precision"):
        system.nats(text, LikelihoodSettings(ode=Ode(2)))
    assert bool(bound(system, text, 2).total.isfinite().all())
    with pytest.raises(CdlmError, match="half precision"):
        ode_nats(toys.system().bfloat16(), text, Ode(2))


def test_a_state_in_float32_is_close_to_one_in_float64() -> None:
    oracle, text = Oracle(), drawn(Oracle(), 2, 3)
    single, double = (ode_nats(oracle, text, Ode(16, state=state)).total for state in (torch.float32, torch.float64))
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, double, rtol=0, atol=1e-3)
    assert not torch.equal(single, double)


def test_positions_that_cannot_be_scored() -> None:
    oracle, text = Oracle(), toy_text(4, vocab=7)
    nothing = text._replace(target=torch.zeros_like(text.target))
    padding = text._replace(valid=torch.arange(4).expand(3, 4) < 3)
    for score in (bound, ode_nats):
        for wrong in (nothing, padding):
            with pytest.raises(CdlmError, match="needs a position to score"):
                score(oracle, wrong)
    oracle.sees_given = False
    given_one = text._replace(target=torch.arange(4).expand(3, 4) > 0)
    for score in (bound, ode_nats):
        with pytest.raises(CdlmError, match="score whole rows"):
            score(oracle, given_one)
    assert bound(oracle, text).positions.tolist() == [4, 4, 4]
    assert bound(oracle, given_one._replace(valid=given_one.target)).positions.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ode(steps=0), "steps >= 1"),
        (lambda: Ode(probes=0), "probes >= 1"),
        (lambda: LikelihoodSettings(levels=0), "levels >= 1"),
        (lambda: bound(Oracle(t_min=0.5), toy_text(vocab=7), read_out=0.4), "read_out is a noise level"),
        (lambda: bound(Oracle(t_max=9.0), toy_text(vocab=7), read_out=30.0), "to below 20.12, got 30"),
        (lambda: toys.masked().nats(toy_text(), LikelihoodSettings(read_out=1.0)), "no noise levels"),
        (
            lambda: Measure.of("ODE", nats_of([1.0, math.nan], 0.1), np.ones(2, int), np.ones(2, int)),
            "the ODE of 1 of 2 rows is not a number",
        ),
        (lambda: LikelihoodSettings(batch_size=0), "batch_size >= 1"),
        (lambda: bound(Oracle(), toy_text(vocab=7), levels=0), "levels >= 1"),
        (lambda: nelbo(toys.masked(), toy_text(), levels=0), "levels >= 1"),
        (
            lambda: Function(lambda x, _: x, Constants(2)).nats(toy_text(), LikelihoodSettings()),
            "the model gave logits|floating-point logits",
        ),
        (lambda: toys.masked().nats(toy_text(), LikelihoodSettings(ode=Ode())), "a masked model has no ODE"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(CdlmError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# --- masked models ---


class Known(nn.Module):
    """In place of the network: logits from one-hot tokens."""

    def __init__(self, rule: Callable[[Float[Tensor, "b n v"]], Float[Tensor, "b n v"]]):
        super().__init__()
        self.rule = rule

    def forward(self, features: Tensor, level: Tensor, valid: Tensor | None, positions: Tensor | None = None) -> Tensor:
        logits = self.rule(features)
        return logits if positions is None else logits.flatten(0, 1)[positions]


def known(rule: Callable[[Float[Tensor, "b n v"]], Float[Tensor, "b n v"]], vocab: int = 6) -> MaskedDiffusion:
    """A masked system whose mask is token 2."""
    table = nn.Embedding.from_pretrained(torch.eye(vocab, dtype=torch.float64))
    return MaskedDiffusion(Known(rule), table, Constants(2), flat=False, config={})


def unmasked(text: Text) -> Text:
    return text._replace(tokens=torch.where(text.tokens == 2, 3, text.tokens))


def test_a_uniform_masked_model_pays_the_logarithm_of_its_vocabulary() -> None:
    text = unmasked(toy_text(vocab=6))
    draws = nelbo(known(torch.zeros_like), text)
    torch.testing.assert_close(draws, torch.full((3, 8), 5 * math.log(5), dtype=torch.float64))


def test_a_masked_model_of_independent_tokens_pays_their_log_probabilities_on_average() -> None:
    text, logits = unmasked(toy_text(vocab=6)), torch.tensor([0.3, -1.0, 9.0, 0.0, 1.2, 0.4]).double()
    log_p = logits.index_fill(0, torch.tensor([2]), -torch.inf).log_softmax(0)
    draws = nelbo(known(lambda x: logits + 0 * x), text, levels=400)
    found, error = draws.mean(1), stratified_error(draws)
    assert (error < 0.2).all()
    assert ((found + log_p[text.tokens].sum(1)).abs() < 4 * error).all()


def test_a_masked_model_of_a_copied_token_pays_for_it_once() -> None:
    """Two equal tokens, known as soon as one is seen: with one draw of each number of masks the bound is exact."""

    def other(x: Tensor) -> Tensor:
        seen = x.flip(1)
        return torch.where(seen[..., 2:3] == 1, 0.0, seen.log().clamp(min=-1e9))

    tokens = torch.tensor([[1, 1], [4, 4], [5, 5]])
    draws = nelbo(known(other), whole(tokens), levels=2)
    torch.testing.assert_close(draws.mean(1), torch.full((3,), math.log(5), dtype=torch.float64))
    assert draws[:, 0].tolist() == [0, 0, 0]


def test_a_mask_in_the_text_is_neither_scored_nor_counted() -> None:
    text = whole(torch.tensor([[1, 2, 3, 2, 4], [2, 2, 2, 2, 2]]))
    found = known(torch.zeros_like).nats(text, LikelihoodSettings(levels=3))[BOUND]
    assert found.positions.tolist() == [3, 0]
    torch.testing.assert_close(found.total, torch.tensor([3 * math.log(5), 0.0], dtype=torch.float64))


def test_a_masked_row_does_not_depend_on_its_batch() -> None:
    system, text = toys.lively_masked(), unmasked(toy_text(6, rows=4))
    valid = torch.arange(6).expand(4, 6) < torch.tensor([[6], [4], [1], [5]])
    text = text._replace(valid=valid, target=valid)
    together = nelbo(system, text)
    for rows in ([0], [3, 1], [2]):
        torch.testing.assert_close(nelbo(system, take(text, torch.tensor(rows))), together[rows])
    filled = text._replace(tokens=torch.where(valid, text.tokens, 7))
    torch.testing.assert_close(nelbo(system, filled), together)
    assert (nelbo(system, text, seed=1) != together).any()


def test_the_masked_bound_is_the_one_that_training_minimises() -> None:
    system, text = toys.lively_masked(), unmasked(toy_text(4, rows=1))
    with torch.no_grad():
        for parameter in (p for name, p in system.named_parameters() if "output" in name):
            parameter *= 0.2
    many = whole(text.tokens.expand(4000, -1).contiguous())
    trained = system(Batch(many.tokens, None, many.target, torch.Generator().manual_seed(0))).nats.double()
    draws = nelbo(system, take(many, torch.arange(1000)), levels=1) / 4
    error = math.hypot(trained.std() / 4000**0.5, draws.std() / 1000**0.5)
    assert error < 0.05 * draws.mean()
    assert (trained.mean() - draws.mean()).abs() < 3 * error
    assert draws.std() < trained.std()  # with less noise


# --- numbers and files ---


def nats_of(total: list[float], error: float) -> Nats:
    values = torch.tensor(total, dtype=torch.float64)
    return Nats(
        {"one": values / 4, "other": values * 3 / 4}, torch.full_like(values, error), torch.ones(len(total)).long()
    )


def test_the_numbers_of_a_likelihood(tmp_path: Path) -> None:
    tokens, chars = np.array([4, 6, 10]), np.array([12, 20, 28])
    found = {"bound": nats_of([8.0, 10.0, 22.0], 0.3), "ODE": nats_of([9.0, 9.0, 24.0], math.nan)}
    made = Likelihood.of(found, tokens, chars, {"levels": 8})
    first, second = made.measures
    assert (made.rows, made.tokens, made.chars) == (3, 20, 60)
    assert first.nats_per_token == pytest.approx(2.0)
    assert first.bits_per_char == pytest.approx(40 / math.log(2) / 60)
    assert first.perplexity == pytest.approx(math.exp(2))
    assert first.error == pytest.approx(math.sqrt(3) * 0.3 / 20)
    assert first.terms == {"one": pytest.approx(0.5), "other": pytest.approx(1.5)}
    low, high = first.interval95
    assert 10 / 6 <= low < 2.0 < high <= 2.2
    assert second.error is None
    made.save(tmp_path / "new")
    kept = json.loads((tmp_path / "new" / "likelihood.json").read_text())
    assert kept["measures"][0]["nats_per_token"] == first.nats_per_token
    assert kept["settings"] == {"levels": 8}
    shown = made.terminal()
    assert "2.0000" in shown
    assert "ode_steps" in shown
    hopeless = Likelihood.of({"bound": nats_of([9e5, 9e5, 9e5], 0.0)}, tokens, chars, {})
    assert hopeless.measures[0].perplexity is None
    assert hopeless.terminal().splitlines()[2].endswith(" -")
    with pytest.raises(CdlmError, match="hold no text"):
        Likelihood.of(found, tokens, 0 * chars, {})


def test_batches_change_nothing() -> None:
    reports: list[tuple[str, int, int]] = []
    text = toy_text(4, rows=5)
    for system in (toys.lively(), toys.lively_masked()):
        ode = Ode(2) if system.config["system"] == "cdcd" else None
        one, all_ = (system.nats(unmasked(text), LikelihoodSettings(2, ode, batch_size=size)) for size in (2, 5))
        for name, nats in one.items():
            torch.testing.assert_close(nats.total, all_[name].total)
    toys.lively().nats(text, LikelihoodSettings(1, batch_size=2), lambda *report: reports.append(report))
    assert reports == [("bound", 2, 5), ("bound", 4, 5), ("bound", 5, 5)]


# --- the command ---


LINES = (
    "".join(f"the {a} sat on the {b}.\n" for a in ("cat", "dog", "bird", "king") for b in ("mat", "roof", "tree")) * 8
)


def a_run(path: Path, masked: bool = False, rows: str = "pack", length: int = 12) -> Path:
    """The folder of a run, as training leaves it."""
    (path / "text.txt").write_text(LINES)
    system = toys.masked_with_tokenizer() if masked else toys.with_tokenizer()
    system.save_pretrained(path / "run")
    source = ["--source", "Files", "--source.paths", json.dumps([str(path / "text.txt")])]
    settings = ["--length", str(length), "--rows", rows, "--cache", str(path / "cache")]
    caches.mark(str(path / "cache"))
    (path / "run" / "config.yaml").write_text(parse_run([*source, *settings]).to_yaml())
    return path / "run"


def kept(run: Path) -> dict:
    return json.loads((run / "likelihood.json").read_text())


def test_the_command_prints_and_keeps_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path)
    call = ["evaluate", str(run), "--likelihood", "--rows", "3", "--levels", "2", "--ode_steps", "2", "--probes", "2"]
    main([*call, "--quiet"])
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
    found = kept(run)
    assert [measure["name"] for measure in found["measures"]] == ["bound", "ODE"]
    assert found["tokens"] == 36
    assert found["measures"][1]["error"] > 0
    assert found["settings"]["precision"] == "fp32"
    assert found["settings"]["state"] == "float64"
    main([*call, "--batch_size", "1", "--out", str(tmp_path / "other")])
    shown = capsys.readouterr()
    assert f"{found['measures'][0]['nats_per_token']:.4f}" in shown.out
    assert shown.err.splitlines() == ["device: cpu", "bound: 3 of 3", "ODE: 3 of 3"]
    again = kept(tmp_path / "other")["measures"][0]["nats_per_token"]
    assert f"{again:.4f}" in shown.out
    assert again == pytest.approx(found["measures"][0]["nats_per_token"], rel=1e-5)


def test_samples_and_the_likelihood_in_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, mine = a_run(tmp_path), tmp_path / "mine.jsonl"
    main(["sample", str(run), "--n", "2", "--steps", "3", "--out", str(mine)])
    rest = ["--likelihood", "--rows", "2", "--judge_steps", "2", "--mauve", "false"]
    main(["evaluate", str(run), str(mine), *rest])
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "AR-NLL" in shown
    assert {"likelihood.json", "evaluation.json"} <= {path.name for path in run.iterdir()}


def test_a_masked_run_has_a_bound(tmp_path: Path) -> None:
    run = a_run(tmp_path, masked=True)
    main(["evaluate", str(run), "--likelihood", "--rows", "4", "--quiet"])
    (measure,) = kept(run)["measures"]
    assert measure["nats_per_token"] == pytest.approx(math.log(toys.VOCAB), abs=0.3)
    assert list(measure["terms"]) == ["masked"]


def test_what_fills_a_row_is_no_text(tmp_path: Path) -> None:
    """Rows that end and rows that are filled up hold the same text: its tokens, one end, and one line break for it."""
    counted = []
    for rows in ("document", "filled"):
        (tmp_path / rows).mkdir()
        run = a_run(tmp_path / rows, rows=rows, length=40)
        main(["evaluate", str(run), "--likelihood", "--rows", "2", "--levels", "1", "--quiet"])
        found = kept(run)
        counted.append((found["tokens"], found["chars"]))
    assert counted[0] == counted[1]
    assert counted[0][0] < 80
    assert counted[0][1] == sum(len(line) + 1 for line in LINES.splitlines()[19:40:20])


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for devices in ("1", "2"):
        rest = ["--likelihood", "--rows", "5", "--devices", devices, "--out", str(tmp_path / devices)]
        main(["evaluate", str(run), *rest, "--batch_size", "1"])
    assert kept(tmp_path / "1") == kept(tmp_path / "2")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "needs samples to measure"),
        (["--n", "3"], "needs samples to measure"),
        (["a/x.jsonl", "a/x.csv"], "two files would be the row 'a/x'"),
        (["--likelihood", "--rows", "0"], "rows >= 1"),
        (["--likelihood", "--levels", "0"], "levels >= 1"),
        (["--likelihood", "--ode_steps", "-1"], "ode_steps"),
        (["--likelihood", "--ode_steps", "2", "--probes", "0"], "probes >= 1"),
        (["--likelihood", "--probes", "0"], "probes >= 1"),
        (["one.jsonl", "--ode_steps", "2"], "add --likelihood"),
        (["one.jsonl", "--n", "0"], "samples >= 1, got 0"),
        (["--likelihood", "--ode_steps", "2", "--method", "dopri5"], "no method 'dopri5'"),
        (["--likelihood", "--ode_steps", "2", "--precision", "bf16"], "half precision"),
        (["one.jsonl", "two.jsonl"], "cannot read samples from one.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_calls(more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", str(run), *more])
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not (run / "likelihood.json").exists()


def test_models_without_a_likelihood_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llada"}')
    for run, more, message in (
        (foreign, [], "another library's model"),
        (a_run(tmp_path, masked=True), ["--ode_steps", "2"], "a masked model has no ODE"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), "--likelihood", *more])
        assert message in capsys.readouterr().err
