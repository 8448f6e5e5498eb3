"""LangFlow: laws of its schedule, its recorded traces, its files, and training."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from langflow_evaluator import langflow_evaluator_score
from safetensors.torch import load_file, save_file
from setups import diffusion
from torch import Tensor
from toys import loaded

from cdlm.api import generate
from cdlm.continuous.grids import Grid
from cdlm.continuous.likelihood import Walk
from cdlm.continuous.published.langflow import LangFlowLayout
from cdlm.continuous.published.layout import Official
from cdlm.continuous.sampler import DiffusionLoop
from cdlm.continuous.schedules import Schedule, alpha_of, gamma_of, t_of_gamma
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.langflow import Gumbel, LangFlow, open_langflow
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import Ode, Text
from cdlm.core.tensors import Spec, lazy_tensors
from cdlm.core.types import Batch, Condition, LoopStep
from cdlm.runs.convert import convert
from cdlm.sampling.requests import Request
from cdlm.training.options import TrainOptions
from cdlm.training.run import train

GOLDEN = Path(__file__).parent / "golden" / "langflow"
MODELS = ("main", "no_self_cond")
VOCAB = 11
SMALL: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "dim": 16}
NETWORKS: dict[str, dict[str, Any]] = {"shared": {}, "released": {"network": "released", "dropout": 0.1, "cond": 24}}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(seed: int = 0, **changes: Any) -> EmbeddingDiffusion:
    """A fresh system; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LangFlow(**{**SMALL, **changes}).build(VOCAB)


def lively(seed: int = 0, **changes: Any) -> EmbeddingDiffusion:
    """A float64 system with the released network in which no weight is zero."""
    made, source = built(**{**NETWORKS["released"], **changes}).double(), rng(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith("schedule"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    return made.eval()


# --- the schedule -----------------------------------------------------------------------------------------------------

places = {"mu": st.floats(-3, 6), "beta": st.floats(0.1, 3)}


def even(points: int = 101) -> Tensor:
    return torch.linspace(0, 1, points, dtype=torch.float64)


@given(**places)
@settings(max_examples=30)
def test_level_and_quantile_are_inverse(mu: float, beta: float) -> None:
    schedule = Gumbel(mu, beta, 5.0)
    torch.testing.assert_close(schedule.u_of_t(schedule.t_of_u(even())), even(), rtol=0, atol=1e-9)


@given(**places)
@settings(max_examples=30)
def test_the_density_is_the_slope_of_the_quantile(mu: float, beta: float) -> None:
    schedule = Gumbel(mu, beta, 5.0)
    t = schedule.t_of_u(torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    step = 1e-5 * t
    slope = (schedule.u_of_t(t + step) - schedule.u_of_t(t - step)) / (2 * step)
    torch.testing.assert_close(schedule.density(t), slope, rtol=1e-6, atol=0)


def test_levels_are_drawn_where_the_modelled_entropy_changes() -> None:
    schedule = Gumbel(2.0, 0.7, 5.0)
    t = schedule.t_of_u(even(21))
    modelled = 5.0 * (-(-(gamma_of(t) - 2.0) / 0.7).exp()).exp()
    torch.testing.assert_close(
        modelled.diff(), torch.full((20,), 5.0 * (1 - 2e-5) / 20), rtol=1e-6, atol=0, check_dtype=False
    )


@given(**places, cutoff=st.sampled_from([1e-5, 1e-3, 0.1]))
@settings(max_examples=30)
def test_the_ends_are_quantiles_of_the_cutoff_and_follow_the_parameters(mu: float, beta: float, cutoff: float) -> None:
    schedule = Gumbel(0.0, 1.0, 5.0, cutoff=cutoff)
    with torch.no_grad():
        schedule.mu.fill_(mu)
        schedule.beta.fill_(beta)
    for t, q in ((schedule.t_min, cutoff), (schedule.t_max, 1 - cutoff)):
        assert 2 * math.log(t) == pytest.approx(mu - beta * math.log(-math.log(q)), rel=1e-6, abs=1e-6)


def test_the_fit_finds_the_curve_of_the_loss() -> None:
    truth, schedule = Gumbel(3.0, 0.6, 4.5), Gumbel(1.0, 1.0, 6.0)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.1, betas=(0.9, 0.99))
    for step in range(200):
        t = schedule.t_of_u(torch.rand(64, generator=rng(step), dtype=torch.float64)).detach()
        nats = 4.5 * (truth.u_of_t(t) * (1 - 2e-5) + 1e-5)
        optimizer.zero_grad()
        schedule.fit(t, nats.float()).backward()
        optimizer.step()
        schedule.after_step()
    found = [schedule.mu.item(), schedule.beta.item(), schedule.entropy.item()]
    assert found == pytest.approx([3.0, 0.6, 4.5], abs=0.002)


def test_nothing_is_fitted_before_the_delay_is_over() -> None:
    schedule, t = Gumbel(1.0, 1.0, 6.0, delay=2), torch.tensor([1.0, 2.0], dtype=torch.float64)
    for fitted in (False, False, True):
        schedule.zero_grad()
        schedule.fit(t, torch.zeros(2)).backward()
        assert all((p.grad is not None and bool(p.grad != 0)) == fitted for p in schedule.parameters())
        schedule.after_step()


def test_the_scale_stays_above_that_of_a_step_function() -> None:
    schedule = Gumbel(1.0, 1.0, 6.0)
    with torch.no_grad():
        schedule.beta.fill_(-1.0)
    schedule.after_step()
    assert schedule.beta.item() == pytest.approx(0.05)
    assert math.isfinite(schedule.t_max)


# --- the recorded traces ----------------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """A recorded model in float64, and what its release computes with it."""

    system: EmbeddingDiffusion
    arrays: dict[str, Tensor]
    cases: dict[str, Any]


@cache
def trace(model: str) -> Trace:
    folder = GOLDEN / model
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    return Trace(open_langflow(folder).double(), load_file(folder / "arrays.safetensors"), cases)


def equal(ours: Tensor, recorded: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, recorded.to(ours.dtype), rtol=tolerance, atol=tolerance)


def exploding(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Variance-exploding states and levels of variance-preserving states at gamma."""
    t = t_of_gamma(gamma.double())
    return z.double() / alpha_of(t)[:, None, None], t


def logits(system: EmbeddingDiffusion, z: Tensor, t: Tensor, x0: Tensor | None = None) -> Tensor:
    everything = torch.ones(z.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        return system.denoise(z, t, Condition(z * 0, everything, z * 0 if x0 is None else x0.to(z))).logits


@pytest.mark.parametrize("model", MODELS)
def test_embeddings_are_the_recorded_ones(model: str) -> None:
    system, arrays, _ = trace(model)
    equal(system.embedding.table(), arrays["embedding_matrix_f64"])


@pytest.mark.parametrize("model", MODELS)
def test_the_schedule_is_the_recorded_one_without_the_rounding_of_the_release(model: str) -> None:
    system, arrays, cases = trace(model)
    assert isinstance(system.schedule, Gumbel)
    q, cutoff = arrays["proposal.q"], system.schedule.cutoff
    ours = gamma_of(system.schedule.t_of_u((q.double() - cutoff) / (1 - 2 * cutoff)))
    equal(ours, arrays["proposal.gamma_f64"])
    # What the release has in float32 is torch's own inverse, which squeezes q.
    inverse = torch.distributions.Gumbel(system.schedule.mu.float(), system.schedule.beta.float()).icdf(q)
    equal(torch.as_tensor(inverse), arrays["proposal.gamma_f32"])
    assert 0.005 < (ours - arrays["proposal.gamma_f32"]).abs().max() < 0.011
    ends = [2 * math.log(system.schedule.t_min), 2 * math.log(system.schedule.t_max)]
    assert ends == pytest.approx([cases["proposal"]["gamma_min"], cases["proposal"]["gamma_max"]], abs=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", range(4))
def test_logits_are_the_recorded_ones(model: str, case: int) -> None:
    system, arrays, _ = trace(model)
    z, t = exploding(*(arrays[f"forward.{case}.{name}"] for name in ("noisy_embeds", "timesteps")))
    equal(logits(system, z, t, arrays.get(f"forward.{case}.x_self_cond")), arrays[f"forward.{case}.logits_f64"])


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_clean_tokens_are_the_recorded_ones(model: str) -> None:
    system, arrays, cases = trace(model)
    clean = system.embed(arrays["forward_clean.input_ids"]).detach()
    z, t = exploding(clean, torch.full((len(clean),), cases["proposal"]["gamma_min"]))
    equal(logits(system, z, t), arrays["forward_clean.logits_f64"])


def test_logits_in_float32_are_close_to_those_in_float64() -> None:
    system, arrays = open_langflow(GOLDEN / "main"), trace("main").arrays
    z, t = exploding(arrays["forward.2.noisy_embeds"], arrays["forward.2.timesteps"])
    equal(logits(system, z.float(), t, arrays["forward.2.x_self_cond"]), arrays["forward.2.logits_f64"], 1e-4)


class Recorded(Grid):
    """A grid from its recorded gammas."""

    def __init__(self, gamma: Tensor):
        self.gamma = gamma.double()

    def levels(self, schedule: Schedule, steps: int) -> Tensor:
        assert len(self.gamma) == steps
        return t_of_gamma(self.gamma)


class FromNoise(DiffusionLoop):
    """A run whose rows start from recorded noise of the variance-preserving state."""

    noise: Tensor

    def _start(self, index: list[int], before: list[int], like: Tensor) -> Tensor:
        # The recorded grid starts a little below the schedule's end, for which the prior is made.
        scale = math.sqrt(1 + self.walk.begin**2) / self.denoiser.prior_std
        return scale * self.noise[index].to(like)


def sampled(model: str, case: dict[str, Any]) -> list[LoopStep]:
    system, arrays, _ = trace(model)
    name, rows, length = f"sample.{case['index']}", case["num_samples"], case["seq_length"]
    grid = Recorded(arrays[f"{name}.gamma_f32"])
    sampler = diffusion(case["num_steps"], grid=grid, record=frozenset({"z", "logits", "tokens"}))
    run = FromNoise(system, *sampler, rows)
    run.noise = arrays[f"{name}.initial_noise"]
    nothing = torch.zeros(length, dtype=torch.bool)
    return list(run.steps(Request(i, torch.zeros(length, dtype=torch.int64), nothing) for i in range(rows)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", range(3))
def test_sampling_walks_through_the_recorded_states(model: str, case: int) -> None:
    told, arrays = trace(model).cases["sample"][case], trace(model).arrays
    steps = sampled(model, told)
    states = [step.state.z * alpha_of(step.state.t)[:, None, None] for step in steps]
    assert [step.state.tokens.tolist() for step in steps] == told["argmax_tokens_per_call"]
    if told["num_steps"] <= 8:
        equal(torch.stack(states), arrays[f"sample.{case}.z_per_call_f64"])
    equal(states[-1], arrays[f"sample.{case}.z_last_f64"])
    last = steps[-1].state.signals["logits"]
    equal(last, arrays[f"sample.{case}.logits_last_f64"])
    assert steps[-1].tokens.tolist() == told["final"]
    assert steps[-1].state.nfe.tolist() == [told["model_calls"]] * told["num_samples"]
    assert len(steps) == told["model_calls"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", range(4))
def test_the_evaluator_of_the_release_is_reproduced(model: str, case: int) -> None:
    system, arrays, cases = trace(model)
    told = cases["nll"][case]
    own = {name.removeprefix(f"nll.{case}."): value for name, value in arrays.items()}
    tokens, eps, grid = own["x0"], own["eps"].double(), own["gamma_grid_f32"].double()
    scored = own.get("attention_mask", torch.ones_like(tokens)).bool()
    text = Text(tokens, scored, None, torch.arange(len(tokens))[:, None])
    probes = own["hutchinson"].double()

    def score(gamma: Tensor, eps: Tensor) -> tuple[dict[str, Tensor], int]:
        left = iter(probes)
        walk = Walk(t_of_gamma(gamma), eps, lambda: next(left)[None])
        passes = told["use_self_cond"] and system.self_conditioning > 0
        nats = langflow_evaluator_score(system, text, walk, Ode(method=told["ode_method"]), passes)
        return dict(nats.terms), len(probes) - len(list(left))

    # The release starts at the exact end, from which the first point of its own float32 grid is 1e-4 away.
    end = torch.tensor(cases["proposal"]["gamma_min"], dtype=torch.float64)
    read_out, _ = score(torch.cat([end[None], grid[1:]]), eps)
    shift = ((-end / 2).exp() - (-grid[0] / 2).exp()) * system.embed(tokens)
    walked, calls = score(grid, eps + shift.detach())
    terms = {"reconst_nll": read_out["reconstruction"], "flow_nll": walked["flow"], "prior_nll": walked["prior"]}
    terms["nll"] = torch.stack(list(terms.values())).sum(0)
    for name, ours in terms.items():
        equal(ours, torch.tensor(told["result"][name]["f64"], dtype=torch.float64))
    assert calls == told["function_evaluations"]
    assert scored.sum(1).tolist() == told["num_valid_tokens"]


# --- the released network ---------------------------------------------------------------------------------------------


def question(system: EmbeddingDiffusion, rows: int = 3, n: int = 5) -> tuple[Tensor, Tensor, Condition]:
    z, x0 = (3 * torch.randn(rows, n, system.dim, generator=rng(i), dtype=torch.float64) for i in (1, 2))
    open_ = torch.ones(rows, n, dtype=torch.bool)
    return z, torch.tensor([0.5, 2.0, 9.0], dtype=torch.float64), Condition(z * 0, open_, x0)


def test_the_published_size_has_132_million_parameters_beside_its_embeddings() -> None:
    with torch.device("meta"):
        system = LangFlow(width=768, dim=768, depth=12, heads=12, network="released").build(50_257)
    inner = [value for name, value in system.named_parameters() if name != "embedding.weight"]
    assert round(sum(p.numel() for p in inner) / 1e6) == 132


@torch.no_grad()
def test_a_fresh_network_says_what_the_own_position_says() -> None:
    system = built(**NETWORKS["released"], output_prior_warmup=0).double().eval()
    z, t, condition = question(system)
    assert system.output_prior is not None
    own = system.output_prior(z, t, system.embedding)
    torch.testing.assert_close(system.denoise(z, t, condition).logits, own)
    bare = built(**NETWORKS["released"], output_prior=False).double().eval()
    assert not bare.denoise(z, t, condition).logits.any()


@torch.no_grad()
def test_nobody_attends_to_padding() -> None:
    system = lively()
    z, t, condition = question(system)
    valid = torch.arange(5).expand(3, 5) < 3
    padded = system.denoise(z, t, condition._replace(valid=valid)).logits[:, :3]
    other = torch.where(valid[..., None], z, 7.0)
    torch.testing.assert_close(system.denoise(other, t, condition._replace(valid=valid)).logits[:, :3], padded)
    short = Condition(condition.clean[:, :3], condition.target[:, :3], condition.x0[:, :3])
    torch.testing.assert_close(system.denoise(z[:, :3], t, short).logits, padded)


@torch.no_grad()
def test_without_self_conditioning_there_is_nothing_that_reads_the_estimate() -> None:
    for share in (0.25, 0.0):
        system = lively(self_conditioning=share)
        z, t, condition = question(system)
        first, second = (system.denoise(z, t, condition._replace(x0=k * condition.x0)).logits for k in (1, 2))
        assert torch.equal(first, second) == (share == 0)
        assert ("network_input.self_cond_proj.weight" in system.state_dict()) == (share > 0)


def test_dropout_is_a_function_of_the_generator_and_of_nothing_else() -> None:
    system, plain = (lively(dropout=share).train() for share in (0.1, 0.0))
    tokens, everything = torch.randint(VOCAB, (4, 5), generator=rng()), torch.ones(4, 5, dtype=torch.bool)

    def loss(one: EmbeddingDiffusion) -> float:
        return one(Batch(tokens, None, everything, rng(1))).total.item()

    before = torch.get_rng_state()
    assert loss(system) == loss(system)
    assert torch.equal(torch.get_rng_state(), before)
    assert loss(plain) != loss(system)
    assert loss(plain.eval()) == loss(system.eval())


def test_a_prompt_stays_although_the_network_does_not_know_that_it_is_given() -> None:
    system, length = lively(), 6
    prompt = torch.tensor([4, 7, 0, 0, 0, 0])
    run = DiffusionLoop(system, *diffusion(8, record=frozenset({"z"})), 1)
    *_, last = run.steps([Request(0, prompt, torch.arange(length) < 2)])
    assert last.tokens[0, :2].tolist() == [4, 7]
    clean, t = system.embed(prompt[None]), system.schedule.t_min
    noise = (last.state.z[0, :2] - clean[0, :2]) / t  # the state of a given token has the noise of its level
    start = DiffusionLoop(system, *diffusion(8), 1).admit([Request(0, prompt, torch.arange(length) < 2)], None).z[0, :2]
    torch.testing.assert_close(noise, (start - clean[0, :2]) / system.schedule.t_max, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": "released", "dim": 8}, "dim = width"),
        ({"network": "released", "mlp_ratio": 2}, "mlp_ratio=4"),
        ({"network": "released", "gates": False}, "gates"),
        ({"dropout": 0.1}, "shared network has no dropout"),
        ({"network": "released", "dropout": 1.0}, "0 <= dropout < 1"),
        ({"cutoff": 0.5}, "cutoff"),
        ({"cond": 0}, "cond >= 1"),
        ({"fit_delay": -1}, "fit_delay"),
        ({"self_conditioning": 1.5}, "self_conditioning"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CdlmError, match=said):
        LangFlow(**{**SMALL, **changes})


# --- the files --------------------------------------------------------------------------------------------------------


def copy_of(model: str, folder: Path, **changes: Any) -> Path:
    """A copy of the released files, with fields of config.json changed; `...` removes one."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / model / name, folder)
    said = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: x for name, x in said.items() if x is not ...}))
    return folder


def speak(folder: Path, tokens: int) -> None:
    """Write a tokenizer of so many words into the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"w0": 0, **{f"w{i}": i for i in range(tokens)}}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1").save_pretrained(folder)


def weights(official: Official) -> dict[str, Tensor]:
    return {name: content() for name, (_, content) in official.tensors.items()}


def assert_same(first: Official, second: Official) -> None:
    assert (first.config, first.length) == (second.config, second.length)
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("model", MODELS)
def test_released_files_are_read_and_written_as_they_were(model: str, tmp_path: Path) -> None:
    layout = LangFlowLayout()
    official = layout.read(GOLDEN / model)
    layout.write(official, tmp_path)
    assert_same(layout.read(tmp_path), official)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / model))
    assert ours == theirs


@pytest.mark.parametrize(
    "changes",
    [{}, {"self_conditioning": 0.0}, {"output_prior": False}, {"self_conditioning": 0.5, "cutoff": 1e-3}],
    ids=str,
)
def test_a_model_of_ours_survives_the_released_format(changes: dict[str, Any], tmp_path: Path) -> None:
    system = lively(output_prior_warmup=2, **changes)
    for _ in range(3):
        system.after_step()
    system.length = 5
    system.float().save_pretrained(tmp_path / "ours")
    official = Official(system.config, 5, lazy_tensors(tmp_path / "ours" / "model.safetensors"))
    LangFlowLayout().write(official, tmp_path)
    assert_same(LangFlowLayout().read(tmp_path), official)
    again = open_langflow(tmp_path)
    z, t, condition = question(system)
    z, condition = z.float(), condition._replace(clean=condition.clean.float(), x0=condition.x0.float())
    assert torch.equal(*(one.denoise(z, t, condition).logits for one in (again, system)))


def test_what_the_released_format_cannot_say_is_not_written(tmp_path: Path) -> None:
    shared = built()
    with pytest.raises(CdlmError, match="network=released"):
        LangFlowLayout().write(Official(shared.config, 5, {}), tmp_path)
    warming = lively(output_prior_warmup=2)
    state = {name: (Spec(tuple(x.shape), x.dtype), lambda x=x: x) for name, x in warming.state_dict().items()}
    with pytest.raises(CdlmError, match="output_prior_warmup"):
        LangFlowLayout().write(Official(warming.config, 5, state), tmp_path)
    assert not list(tmp_path.iterdir())


def test_conversion_there_and_back_is_the_identity(tmp_path: Path) -> None:
    released = copy_of("main", tmp_path)
    speak(released, 64)
    convert(LangFlowLayout(), released, tmp_path / "ours")
    convert(LangFlowLayout(), tmp_path / "ours", tmp_path / "back")
    assert_same(LangFlowLayout().read(tmp_path / "back"), LangFlowLayout().read(released))
    converted, direct = loaded(tmp_path / "ours"), loaded(released)
    assert converted.config == direct.config
    assert converted.length == direct.length == 16
    first, second = (generate(system, n=2, steps=4, record=False) for system in (converted, direct))
    assert (first.tokens == second.tokens).all()
    assert first.texts == second.texts


def test_an_opened_model_is_ready_to_sample_and_to_train() -> None:
    before = torch.get_rng_state()
    system = open_langflow(GOLDEN / "main")
    assert torch.equal(torch.get_rng_state(), before)
    assert (system.length, system.folder, system.tokenizer) == (16, GOLDEN / "main", None)
    assert not system.training
    assert {value.device.type for value in system.state_dict().values()} == {"cpu"}
    assert all(parameter.requires_grad for parameter in system.parameters())
    assert system.network.get_submodule("blocks.0.dropout").p == 0.1
    with pytest.raises(CdlmError, match=r"has no tokenizer: copy tokenizer\.json"):
        generate(system, n=1, steps=2)


def test_half_precision_weights_are_opened_in_float32(tmp_path: Path) -> None:
    folder = copy_of("main", tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({name: value.bfloat16() for name, value in state.items()}, folder / "model.safetensors")
    system = open_langflow(folder)
    assert {p.dtype for p in system.parameters()} == {torch.float32}
    assert torch.equal(system.get_parameter("network.output_layer.linear.bias"),
                       state["backbone.output_layer.linear.bias"].bfloat16().float())  # fmt: skip


def without(state: dict[str, Tensor]) -> None:
    del state["backbone.blocks.1.norm2.weight"]


def with_more(state: dict[str, Tensor]) -> None:
    state["backbone.blocks.2.norm1.weight"] = torch.ones(32)


def misshapen(state: dict[str, Tensor]) -> None:
    state["backbone.vocab_embed.embedding"] = torch.ones(65, 32)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without, r"misses tensor 'backbone\.blocks\.1\.norm2\.weight'"),
        (with_more, r"unknown tensor 'backbone\.blocks\.2\.norm1\.weight'"),
        (misshapen, r"'backbone\.vocab_embed\.embedding' .* has shape \(65, 32\), .* \(64, 32\)"),
    ],
)
def test_other_tensors_than_those_of_the_configuration_are_refused(
    damage: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    folder = copy_of("main", tmp_path)
    state = load_file(folder / "model.safetensors")
    damage(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CdlmError, match=said) as raised:
        open_langflow(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "model_type LangFlow"),
        ({"use_normalized_embedding": False}, "use_normalized_embedding False"),
        ({"embedding_norm_method": "l1"}, "embedding_norm_method 'l1'"),
        ({"n_blocks": ...}, "expected a field n_blocks"),
        ({"n_blocks": 10**6}, "has n_blocks 1000000, and the weights are"),
        ({"cdlm": {"settings": {"depth": 10**6}, "counts": {"schedule.steps": 0}}}, "has n_blocks 1000000"),
        ({"model_length": "long"}, "expected whole number, got text in 'model_length'"),
        ({"hidden_size": "wide"}, "expected whole number, got text in 'hidden_size'"),
        ({"hidden_size": 2**22}, "config.json asks for"),
        ({"n_heads": 0}, "in 'n_heads'"),
        ({"use_bias": 1}, "expected truth, got whole number in 'use_bias'"),
        ({"n_heads": 32}, "inv_freq"),
        ({"self_conditioning": False}, "unknown tensor 'backbone.self_cond_proj.weight'"),
        ({"gumbel_cutoff": 0.7}, "cutoff"),
        ({"cdlm": {"settings": {"odd": 1}, "counts": {"schedule.steps": 0}}}, "'odd'"),
        ({"cdlm": {"settings": {}, "counts": {}}}, "schedule.steps"),
        ({"cdlm": 5}, "in 'cdlm'"),
    ],
    ids=str,
)
def test_configurations_that_are_none_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match=said) as raised:
        open_langflow(copy_of("main", tmp_path, **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_or_missing_files_are_said(name: str, tmp_path: Path) -> None:
    folder = copy_of("main", tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:-50])
    with pytest.raises(CdlmError, match="copy it again"):
        open_langflow(folder)
    (folder / name).unlink()
    with pytest.raises(CdlmError, match=f"no {name}"):
        open_langflow(folder)


@pytest.mark.parametrize("tokens", [63, 65])
def test_the_tokenizer_has_as_many_tokens_as_the_weights(tokens: int, tmp_path: Path) -> None:
    folder = copy_of("main", tmp_path)
    speak(folder, tokens)
    with pytest.raises(CdlmError, match=f"weights of .* of 64 tokens, its tokenizer has {tokens}"):
        open_langflow(folder)


# --- training ---------------------------------------------------------------------------------------------------------


def batch(index: int, rows: int = 16) -> Batch:
    """Rows that repeat a random token, so that positions tell of each other."""
    first = torch.randint(VOCAB, (rows, 1), generator=rng(index))
    everything = torch.ones(rows, 6, dtype=torch.bool)
    return Batch(first.expand(rows, 6).clone(), everything, everything)


class Loader:
    """Batch i is a function of i; it can fail before one."""

    def __init__(self, stop: int | None = None):
        self.batches, self.stop = 0, stop

    def __iter__(self) -> Iterator[Batch]:
        while True:
            index, self.batches = self.batches, self.batches + 1
            if index == self.stop:
                raise InterruptedError
            yield batch(index)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


RECIPE: dict[str, Any] = {"output_prior_warmup": 20, "fit_delay": 10}


def held_out(system: EmbeddingDiffusion) -> float:
    """Mean loss of other rows, nats per token."""
    rows = replace(batch(999, 64), valid=None, generator=rng(1), u=torch.linspace(0.1, 0.9, 64))
    with torch.no_grad():
        return system.eval()(rows).nats.mean().item()


@pytest.mark.parametrize("network", NETWORKS)
def test_training_lowers_the_loss_and_learns_the_schedule(network: str) -> None:
    system, untrained = (
        built(**{**RECIPE, **changes}, **NETWORKS[network]) for changes in ({}, {"output_prior_warmup": 0})
    )
    first = {name: value.clone() for name, value in system.state_dict().items()}
    groups = system.parameter_groups()
    optimizer = torch.optim.Adam([{"params": groups["matrices"] + groups["rest"]},
                                  {"params": groups["schedule"], "lr": 0.03}], lr=5e-3)  # fmt: skip
    for index in range(40):
        optimizer.zero_grad()
        system.train()(replace(batch(index), valid=None, generator=rng(index))).total.backward()
        optimizer.step()
        system.after_step()
    last = system.state_dict()
    untrained.schedule.load_state_dict(system.schedule.state_dict())
    assert held_out(system) < 0.85 * held_out(untrained)  # which knows each position's own state only
    assert all(last[f"schedule.{name}"] != first[f"schedule.{name}"] for name in ("mu", "beta", "entropy"))
    assert int(last["schedule.steps"]) == int(last["output_prior.steps"]) == 40


def fit(folder: Path, resume: bool = False, stop: int | None = None, **changes: Any) -> dict[str, Tensor]:
    """A run of 12 steps, and its weights."""
    options = TrainOptions(
        steps=12, warmup=3, accelerator="cpu", validate_every=1000, checkpoint_every=5, log_every=100, ema=0.9
    )

    def everything(tokens: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
        return torch.ones_like(valid)

    system = built(**{**RECIPE, "fit_delay": 2}, **changes)
    train(system, Loader(stop), lambda: [batch(99)], everything, options, folder, resume=resume, progress=False)
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    changes = NETWORKS["released"]
    whole = fit(tmp_path / "whole", **changes)
    with pytest.raises(InterruptedError):
        fit(tmp_path / "cut", stop=9, **changes)
    cut = fit(tmp_path / "cut", resume=True, **changes)
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    assert int(whole["system.schedule.steps"]) == 12
