"""Plaid: the published code's traces, the released network, and control by single tokens."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Int
from oracle import Oracle, draws, loop
from safetensors.torch import load_file
from setups import diffusion
from torch import Tensor

from cdlm.continuous.grids import Grid
from cdlm.continuous.guidance import Control, Guidance, Term
from cdlm.continuous.objectives import squared_error
from cdlm.continuous.published.plaid import PlaidLayout, ReleasedTransformer
from cdlm.continuous.sampler import DiffusionLoop, DiffusionRows
from cdlm.continuous.schedules import Schedule, TimeWarp, _cumulative, alpha_of, gamma_of, t_of_gamma
from cdlm.continuous.solvers import Advance, Ancestral, Euler, Interval, Solver
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.plaid import LearnedGamma, Plaid
from cdlm.core.errors import CdlmError
from cdlm.core.rng import StepNoise
from cdlm.core.types import Batch, Condition, Prediction
from cdlm.halting import Patience
from cdlm.models.system import row_cross_entropy
from cdlm.runs.config import build_system
from cdlm.sampling.requests import Request

GOLDEN = Path(__file__).parent / "golden" / "plaid"
ARRAYS = load_file(GOLDEN / "arrays.safetensors")
CASES = json.loads((GOLDEN / "cases.json").read_text())
N, V, D = 12, 64, 16
SMALL = {"width": 16, "depth": 2, "heads": 2, "dim": 4, "network": "released"}


def cases(kind: str) -> list[Any]:
    found = CASES["cdcd"]["losses"] if kind == "cdcd_loss" else CASES[kind]
    return [pytest.param(case, arrays(f"{kind}.{case['index']}"), id=str(case["index"])) for case in found]


def arrays(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): a for name, a in ARRAYS.items() if name.startswith(f"{prefix}.")}


def near(ours: Tensor, theirs: Tensor | float, tolerance: float = 1e-6) -> None:
    theirs = torch.as_tensor(theirs)
    torch.testing.assert_close(ours.detach().to(theirs), theirs, rtol=tolerance, atol=tolerance)


@cache
def single() -> EmbeddingDiffusion:
    """The recorded model in float32."""
    official = PlaidLayout(N).read(GOLDEN / "weights")
    model = build_system(official.config)
    model.load_state_dict({name: content() for name, (_, content) in official.tensors.items()})
    assert isinstance(model, EmbeddingDiffusion)
    return model.eval()


@cache
def recorded() -> EmbeddingDiffusion:
    """The recorded model in float64."""
    import copy

    return copy.deepcopy(single()).double()


def schedule() -> LearnedGamma:
    found = recorded().schedule
    assert isinstance(found, LearnedGamma)
    return found


def at(u: float | Tensor, rows: int) -> Tensor:
    """The level t at u, for each row."""
    return schedule().t_of_u(torch.full((rows,), float(u), dtype=torch.float64)).detach()


def nothing_given(z: Tensor, x0: Tensor | None = None, valid: Tensor | None = None) -> Condition:
    open_ = torch.ones(z.shape[:2], dtype=torch.bool) if valid is None else valid
    return Condition(z * 0, open_, z * 0 if x0 is None else x0, valid)


# --- schedule and embedding ---


def test_the_schedule_is_the_published_one_also_outside_its_range() -> None:
    there = arrays("schedule")
    near(schedule().shape(there["t"])[0], there["noise_schedule"])
    near(gamma_of(schedule().t_of_u(there["t"])), there["gamma"])
    near(
        gamma_of(torch.tensor([schedule().t_min, schedule().t_max])), torch.stack([there["gamma_0"], there["gamma_1"]])
    )


def test_every_embedding_is_the_published_unit_vector() -> None:
    near(recorded().embedding.table(), arrays("schedule")["embedding_matrix"], 1e-4)


# --- the network ---


@pytest.mark.parametrize(("case", "there"), cases("forward"))
def test_forward(case: Mapping[str, Any], there: dict[str, Tensor]) -> None:
    """`selfcond_mask` there cuts gradients alone: the estimate is read in every row."""
    model = recorded()
    t = t_of_gamma(there["gamma"].double())
    z, x0 = there["z"].double() / alpha_of(t)[:, None, None], there["x_selfcond"].double()
    logits = torch.zeros(2, N, V, dtype=torch.float64)
    for valid in pieces(case["cu_seqlens"]):
        features, level = model.network_input(z, t, nothing_given(z, x0, valid))
        own = case["bias_scale"] * model.output_prior(z, t, model.embedding)  # pyright: ignore[reportOptionalCall]
        whole = model.run_network(features, level, valid) + own
        logits = torch.where(valid[..., None], whole, logits)
    near(logits, there["logits_f64"])
    near(model.expect(logits), there["x_reconst_f64"])


def pieces(borders: list[int] | None) -> list[Tensor]:
    """Where each of the sequences lies that are packed into the rows; one call sees one sequence of each row.

    Rotary attention sees differences of positions alone, so it does not matter where in its row a sequence stands.
    """
    if borders is None:
        return [torch.ones(2, N, dtype=torch.bool)]
    place = torch.arange(2 * N)
    number = torch.bucketize(place, torch.tensor(borders[1:]), right=True).view(2, N)
    number = number - number[:, :1]
    return [number == i for i in range(int(number.max()) + 1)]


@torch.no_grad()
def test_the_float32_network_is_the_released_one() -> None:
    there = arrays("forward.0")
    t = t_of_gamma(there["gamma"].double())
    z = there["z"] / alpha_of(t).float()[:, None, None]
    made = single().denoise(z, t, nothing_given(z, there["x_selfcond"]))
    near(made.logits, there["logits_f32"], 1e-3)
    near(made.x0, there["x_reconst_f32"], 1e-3)


def released(seed: int = 0, **settings: Any) -> EmbeddingDiffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Plaid(**{**SMALL, **settings}).build(11)


def lively() -> EmbeddingDiffusion:
    """A float64 system in which no matrix is zero, as after training."""
    model, generator = released(output_prior_warmup=0).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("schedule"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_an_untrained_network_says_nothing_and_knows_no_level() -> None:
    network = ReleasedTransformer(7, width=16, depth=1, heads=2)
    features = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    assert network(features, torch.linspace(-3, 3, 3)).abs().max() == 0


@torch.no_grad()
def test_padding_is_not_seen_and_a_shift_of_the_row_changes_nothing() -> None:
    model, generator = lively(), torch.Generator().manual_seed(1)
    z = torch.randn(1, 6, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.7], dtype=torch.float64)
    alone = model.logits(z, t, nothing_given(z))
    padded = torch.cat([torch.full_like(z[:, :3], 9.0), z, torch.full_like(z[:, :2], -9.0)], 1)
    place = torch.arange(padded.shape[1])
    valid = ((place >= 3) & (place < 9))[None]
    near(model.logits(padded, t, nothing_given(padded, valid=valid))[:, 3:9], alone, 1e-10)


@torch.no_grad()
def test_the_network_is_blind_for_what_is_given() -> None:
    model = lively()
    assert not model.sees_given
    z = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.7, 2.0], dtype=torch.float64)
    told = Condition(z, torch.arange(6).expand(2, 6) > 2, z * 0)
    assert torch.equal(model.logits(z, t, told), model.logits(z, t, nothing_given(z)))


@torch.no_grad()
def test_prompts_are_kept_and_seen_as_noisy_tokens() -> None:
    model = lively()
    tokens = torch.arange(6)
    request = Request(0, tokens, tokens < 3)
    done = [
        f
        for f in DiffusionLoop(model, *diffusion(steps=8, criterion=Patience(8)), 4).steps([request])
        if bool(f.done.any())
    ]
    assert done[0].tokens[0, :3].tolist() == [0, 1, 2]


def test_a_training_step_reaches_every_parameter() -> None:
    model, generator = released(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (
            model.network.get_parameter("output.weight"),
            model.network_input.get_parameter("estimate.weight"),
        ):
            parameter.normal_(0, 0.1, generator=generator)
    model.train()
    tokens = torch.randint(11, (8, 6), generator=generator)
    loss = model(Batch(tokens, None, torch.ones(8, 6, dtype=torch.bool), generator))
    loss.total.backward()
    assert bool(loss.total.isfinite())
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_a_few_steps_of_training_lower_the_bound() -> None:
    model, generator = released(output_prior_warmup=0), torch.Generator().manual_seed(3)
    tokens = torch.arange(6).expand(16, 6).contiguous()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    target = torch.ones(16, 6, dtype=torch.bool)

    def bound() -> float:
        with torch.no_grad():
            return model.eval()(Batch(tokens, None, target, torch.Generator().manual_seed(0))).total.item()

    before = bound()
    for _ in range(40):
        optimizer.zero_grad()
        model.train()(Batch(tokens, None, target, generator)).total.backward()
        optimizer.step()
    assert bound() < 0.8 * before  # the tokens are known, their order is not yet


def test_the_published_model_has_its_published_size() -> None:
    with torch.device("meta"):
        model = Plaid(network="released", width=2048, depth=24, heads=32).build(32_768)
    counted = sum(p.numel() for p in model.network.parameters()) - 32_768 * 2049
    assert round(counted / 1e9, 1) == 1.2  # without the output's
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == 1.3


@pytest.mark.parametrize("bad", [{"base_width": 0}, {"dim": 0}])
def test_bad_settings_are_said_in_one_line(bad: dict[str, Any]) -> None:
    with pytest.raises(CdlmError, match=next(iter(bad))):
        Plaid(**bad)


# --- sampling ---


@dataclass(frozen=True, eq=False)
class Recorded(StepNoise):
    """The noise that the published sampler drew in one step."""

    noise: Tensor | None = None

    def normal(self, like: Float[Tensor, "b ..."], purpose: int = 0) -> Float[Tensor, "b ..."]:
        assert self.noise is not None
        return self.noise.to(like)


def noise_of(there: dict[str, Tensor], step: int, rows: int) -> Recorded:
    drawn = there.get("step_noise", torch.empty(0))
    return Recorded(0, range(rows), [step] * rows, drawn[step] if step < len(drawn) else None)


def guidance(case: Mapping[str, Any]) -> Guidance:
    terms = tuple(Term(*term) for term in case.get("guidance", []))
    return Guidance(score_temperature=case["score_temp"], control=Control(terms) if terms else None)


@dataclass(frozen=True, eq=False)
class Published(Grid):
    """The levels at which the published loop asks the network: those of u, and once more the last."""

    u: Tensor

    def levels(self, schedule: Schedule, steps: int) -> Tensor:
        assert steps == len(self.u) + 1
        return schedule.t_of_u(torch.cat([self.u, self.u[-1:]])).detach()


@dataclass(frozen=True, eq=False)
class OneStep(Solver):
    """The published loop steps from u to u - 1/T and takes the state for one at the next of its linspace(1, 0, T),
    which is 1/(T-1) below u. After u = 0 it asks once more, of the state as it is."""

    solver: Solver
    u: Tensor

    def advance(self, memory: Any, interval: Interval, estimate: Any) -> tuple[Any, Advance]:
        z, _, _, t_next, draws = interval
        step, total = draws.step[0], len(self.u)
        if step == total - 1:
            return memory, Advance(z, None, [0] * len(z))
        below = at(self.u[step] - 1 / total, len(z))
        memory, moved = self.solver.advance(memory, interval._replace(t_next=below), estimate)
        return memory, moved._replace(z=moved.z * (alpha_of(below) / alpha_of(t_next))[:, None, None])


class FromNoise(DiffusionLoop):
    """The loop on recorded noise."""

    there: dict[str, Tensor]

    def _start(self, index: list[int], before: list[int], like: Tensor) -> Tensor:
        return self.there["initial_noise"][index].to(like)

    def _draws(self, live: DiffusionRows) -> StepNoise:
        return noise_of(self.there, live.known.step[0], len(live.row))


@pytest.mark.parametrize(("case", "there"), cases("sample"))
def test_sampling(case: Mapping[str, Any], there: dict[str, Tensor]) -> None:
    """Our loop, on the published grid and noise, walks through the published states."""
    model, rows, steps, u = recorded(), case["n_samples"], case["sampling_timesteps"], there["t"].double()
    solver = OneStep(Euler() if case.get("ddim_sampler") else Ancestral(), u)
    run = loop(
        model, rows, kind=FromNoise, steps=steps + 1, grid=Published(u), solver=solver, guidance=guidance(case),
        record={"z", "x0", "logits"},
    )  # fmt: skip
    assert isinstance(run, FromNoise)
    run.there = there
    *walked, last = list(run.steps([free_row(N, i) for i in range(rows)]))
    assert len(walked) == steps == len(u)
    for i, step in enumerate(walked):
        state = step.state
        near(gamma_of(state.t), there["gamma_t"][i].expand(rows))
        near(gamma_of(at(u[i] - 1 / steps, rows)), there["gamma_s"][i].expand(rows))
        if i < len(there["z_before_update_f64"]):
            near(state.z * alpha_of(state.t)[:, None, None], there["z_before_update_f64"][i])
        closest = (state.x0 @ model.embedding.table().T).argmax(-1)
        assert closest.tolist() == case["nearest_token_per_call"][i]
    near(last.state.z * alpha_of(last.state.t)[:, None, None], there["z_final_f64"])
    near(last.state.logits, there["logits_final_f64"])
    assert last.tokens.tolist() == case["final_f64"]


def test_our_grid_has_no_gap() -> None:
    """The published sampler's last state is at t = 1/(T-1) - 1/T and read as one at 0; ours ends at the least level."""
    levels = released().defaults.grid.levels(schedule(), 8)
    near(levels, schedule().t_of_u(torch.linspace(1, 0, 8, dtype=torch.float64)), 1e-12)
    assert levels[-1].item() == pytest.approx(schedule().t_min)


# --- the bound ---


class Told(EmbeddingDiffusion):
    """The recorded model, noised with what was recorded."""

    eps: Tensor

    def noisy(
        self, clean: Float[Tensor, "b n d"], t: Float[Tensor, " b"], batch: Batch,
        shown: Int[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Condition]:  # fmt: skip
        z = clean + t[:, None, None] * self.eps
        condition = nothing_given(z)
        return z, condition._replace(x0=self._first_pass(z, t, condition))


def told(eps: Tensor) -> Told:
    model = recorded()
    made = Told(
        model.embedding, model.schedule, model.network, network_input=model.network_input, objective=model.objective,
        output_prior=model.output_prior, self_conditioning=0.25, unit_prior=True, config=model.config,
    )  # fmt: skip
    made.eps = eps
    return made.eval()


@torch.no_grad()
@pytest.mark.parametrize(("case", "there"), cases("nll"))
def test_the_bound(case: Mapping[str, Any], there: dict[str, Tensor]) -> None:
    """There the first rows, at t = 0, make the reconstruction term and the others the diffusion term."""
    tokens, wanted, first = there["x"], case["result_f64"], int(case["result_f64"]["reconst_bs"])
    model, u, open_ = told(there["noise"].double()), there["t"], torch.ones_like(there["x"], dtype=torch.bool)
    t, slope = schedule().t_of_u(u), schedule().slope(u)
    near(gamma_of(t), there["gamma"])
    near((2 * slope / t)[first:], there["gamma_prime"][first:])
    batch = Batch(tokens, None, open_, torch.Generator(), u)
    clean = model.embed(tokens)
    z, condition = model.noisy(clean, t, batch)
    made = model.denoise(z, t, condition)
    nats, count = row_cross_entropy(made.logits, tokens, open_)
    error = slope / t**3 * squared_error(made.x0, clean, open_) / count
    near(error[first:], there["diffusion_loss_per_example_f64"][first:])
    near((nats / count)[:first], there["reconst_loss_per_example_f64"])
    prior = model.prior_nats(at(1.0, 1))[0]
    near(prior, wanted["prior"])
    near(error[first:].mean() + (nats / count)[:first].mean() + prior, wanted["loss"])
    # Our own evaluation makes all three terms of every row.
    near(model.objective(model, batch).nats - prior, error + read_out(model, batch))


def read_out(model: Told, batch: Batch) -> Tensor:
    """Cross-entropy of each row at the least noise, in nats per token."""
    low = at(0.0, len(batch.tokens))
    z, condition = model.noisy(model.embed(batch.tokens), low, batch)
    nats, count = row_cross_entropy(model.logits(z, low, condition), batch.tokens, batch.target)
    return nats / count


# --- CDCD's warp, as Plaid's authors implemented it ---


class PublishedWarp(TimeWarp):
    """The floor, 1e-3 on the linear axis, is added to the heights in nats: the CDF is the fitted curve, up to scale."""

    def _edges(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        edges_t = super()._edges(logits)[0]
        edges_u = _cumulative(self._heights(logits))
        return edges_t, edges_u / edges_u[-1]


@cache
def warp() -> PublishedWarp:
    """Their floor, 1e-3, is added to the heights in nats and not to their shares."""
    args, found = CASES["cdcd"]["args"], load_file(GOLDEN / "cdcd_warp.safetensors")
    made = PublishedWarp(args["t_min"], args["t_max"], "linear", floor=1e-3)
    logits = torch.stack([found["l_t"], found["l_u"]])
    made.load_state_dict({"logits": logits, "averaged": logits})
    return made


@torch.no_grad()
def test_the_warp_is_the_published_map() -> None:
    there = {name.removeprefix("cdcd."): a for name, a in ARRAYS.items() if name.startswith("cdcd.")}
    near(warp().t_of_u(there["u"]), there["t_of_u_f64"])
    near(warp().u_of_t(there["t"]), there["u_of_t_normalized_f64"])
    near(warp().u_of_t(there["t"]) * height(), there["u_of_t_f64"])
    near(warp().u_of_t(warp().t_of_u(there["u"])), there["round_trip_f64"])


def height() -> Tensor:
    """The fitted curve at t_max, in nats."""
    return (warp().logits[1].double().exp() + warp().floor).sum().detach()


@torch.no_grad()
@pytest.mark.parametrize(("case", "there"), cases("cdcd_loss"))
def test_the_loss_of_the_warp(case: Mapping[str, Any], there: dict[str, Tensor]) -> None:
    """Their weights are 1e-5 over the slope of the curve in nats; ours have mean 1, and are otherwise the same."""
    t, nats, weights = there["t_f64"], there["xent_per_example_f64"], there["imp_weights_f64"]
    near(warp().t_of_u(there["u_f64"]), t)
    near(1e-5 / (warp().density(t) * height()), weights, 1e-10)
    near(warp().fit(t, nats) * weights.mean(), case["result_f64"]["cdf_loss"])


def test_the_raw_floor_makes_the_map_the_fitted_curve() -> None:
    made = PublishedWarp(1.0, 10.0, "linear", bins=5, floor=0.1)
    with torch.no_grad():
        made.logits.copy_(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
        made.averaged.copy_(made.logits)
    t = torch.linspace(1, 10, 40, dtype=torch.float64)
    curve = made.u_of_t(t) * (made.logits[1].double().exp() + 0.1).sum().detach()
    near(made.fit(t, curve), 0.0, 1e-12)


# --- control ---

TOKEN, ROWS = 3, 4


def moved(term: Term, t: float = 1.5, complement_of: int | None = None) -> tuple[Oracle, Prediction, Tensor, Tensor]:
    oracle = Oracle()
    z = torch.randn(ROWS, 6, oracle.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels, open_ = torch.full((ROWS,), t, dtype=torch.float64), torch.ones(ROWS, 6, dtype=torch.bool)
    condition = Condition(z * 0, open_, z * 0)
    made, driving = Guidance(control=Control((term,))).predict(oracle, z, levels, condition, draws(ROWS))
    return oracle, made, driving, made.logits.log_softmax(-1)


def test_a_wanted_token_is_the_estimate() -> None:
    """Of independent tokens, the posterior mean of a position whose token is known is that token's embedding."""
    oracle, made, driving, _ = moved(Term(TOKEN, 1.0, 2))
    near(driving[:, 2], oracle.table[TOKEN].expand(ROWS, -1), 1e-9)
    others = torch.arange(6) != 2
    near(driving[:, others], made.x0[:, others], 1e-12)
    near(moved(Term(TOKEN, 1.0, -4))[2], driving, 1e-12)


def test_an_unwanted_token_leaves_the_mean_of_the_others() -> None:
    oracle, _, driving, log_p = moved(Term(TOKEN, 1.0, "all", True))
    p = log_p.exp().index_fill(-1, torch.tensor(TOKEN), 0)
    near(driving, p / p.sum(-1, keepdim=True) @ oracle.table, 1e-9)


def test_a_token_wanted_somewhere_pulls_each_position_by_its_share() -> None:
    oracle, made, driving, log_p = moved(Term(TOKEN, 1.0, "any"))
    share = log_p[..., TOKEN].softmax(-1)[..., None]
    near(driving, made.x0 + share * (oracle.table[TOKEN] - made.x0), 1e-9)


@given(weight=st.floats(-3, 3), temperature=st.floats(0.5, 2))
def test_control_adds_to_what_the_temperature_makes(weight: float, temperature: float) -> None:
    oracle = Oracle()
    z = torch.randn(1, 3, oracle.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, condition = torch.ones(1, dtype=torch.float64), nothing_given(z)
    control = Control((Term(TOKEN, weight, 0),))
    plain, free = Guidance(score_temperature=temperature).predict(oracle, z, t, condition, draws())
    _, driving = Guidance(score_temperature=temperature, control=control).predict(oracle, z, t, condition, draws())
    near((driving - free)[0, 0], weight * (oracle.table[TOKEN] - plain.x0[0, 0]), 1e-9)


def test_the_score_of_any_and_all_is_over_positions_to_generate() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    open_ = torch.tensor([[True] * 5, [True, False, True, False, False]])
    log_p = logits.log_softmax(-1)[..., TOKEN]
    mean = torch.stack([row[kept].exp().mean() for row, kept in zip(log_p, open_, strict=True)])
    near(Term(TOKEN, 2.0, "any").score(logits, open_), 2 * mean.log(), 1e-12)
    near(Term(TOKEN, 2.0, "any", True).score(logits, open_), 2 * (1 - mean).log(), 1e-12)
    near(Term(TOKEN, 2.0, "all").score(logits, open_), 2 * (log_p * open_).sum(1), 1e-12)


def test_an_unwanted_token_that_is_certain_still_has_a_gradient() -> None:
    logits = torch.zeros(1, 1, 7)
    logits[..., TOKEN] = 50.0  # its probability rounds to 1
    logits.requires_grad_()
    Term(TOKEN, 1.0, "all", True).score(logits, torch.ones(1, 1, dtype=torch.bool)).sum().backward()
    assert logits.grad is not None
    near(logits.grad[0, 0, TOKEN], -1.0)


def test_a_prompt_can_be_asked_for() -> None:
    oracle, prompt = Oracle(), torch.tensor([4, 6, 1, 0, 0, 2])
    # The published way to a prefix, infix or suffix for a model that was trained without prompts.
    control = Control(tuple(Term(int(prompt[place]), 2.0, place) for place in (0, 1, 2, 5)))
    sampler = diffusion(steps=12, guidance=Guidance(control=control))
    finished = list(DiffusionLoop(oracle, *sampler, 2).steps([free_row(6)]))
    assert finished[-1].tokens[0, [0, 1, 2, 5]].tolist() == [4, 6, 1, 2]
    assert finished[-1].state.nfe.tolist() == [12]


def free_row(n: int, index: int = 0) -> Request:
    return Request(index, torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.bool))


def test_control_leaves_no_gradient_behind() -> None:
    model = lively()
    sampler = diffusion(steps=2, guidance=Guidance(control=Control((Term(3),))), record=frozenset({"logits"}))
    finished = list(DiffusionLoop(model, *sampler, 2).steps([free_row(6)]))
    assert not finished[0].state.logits.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    oracle, control = Oracle(), Control((Term(2, 1.0, "any"), Term(1, 1.0, "all", True)))
    sampler = diffusion(steps=6, guidance=Guidance(control=control))
    requests = [free_row(4, i) for i in range(3)]

    def tokens(batch: int) -> list[list[int]]:
        found = {}
        for item in DiffusionLoop(oracle, *sampler, batch).steps(requests):
            found.update(zip(item.state.row[item.done].tolist(), item.tokens.tolist(), strict=True))
        return [found[i] for i in range(3)]

    assert tokens(1) == tokens(3)


def test_settings_name_the_control_only_when_there_is_one() -> None:
    assert "control" not in Guidance().settings
    assert Guidance(control=Control((Term(5),))).settings["control"] == (
        "Control(terms=(Term(token=5, weight=2.0, position='any', complement=False),))"
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Term(-1), "token"),
        (lambda: Term(1, math.inf), "weight"),
        (lambda: Control(()), "Control"),
        (lambda: moved(Term(99)), "vocabulary"),
        (lambda: moved(Term(1, 1.0, 40)), "position"),
        (lambda: moved(Term(1, 1.0, -7)), "position"),
    ],
)
def test_a_bad_control_is_said_in_one_line(make: Any, named: str) -> None:
    with pytest.raises(CdlmError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)
