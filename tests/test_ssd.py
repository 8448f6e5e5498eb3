"""SSD-LM: the traces of its release, its files, its network, and training it."""

import copy
import json
import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import draws
from safetensors.torch import load_file, save_file
from setups import Setup, diffusion
from tokenizers import Tokenizer, models
from torch import Tensor
from toys import loaded
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from cdlm.continuous.grids import UpperEnds
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.projections import MultiHot, Projection, Uneven, nucleus
from cdlm.continuous.published.ssd import Roberta, RobertaInput, SSDLayout
from cdlm.continuous.sampler import DiffusionLoop, DiffusionRows
from cdlm.continuous.schedules import alpha_of
from cdlm.continuous.solvers import Renoise
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.ssd import SSD, Cosine, Simplex
from cdlm.core.errors import CdlmError
from cdlm.core.rng import StepNoise
from cdlm.core.trees import take
from cdlm.core.types import Batch, Condition
from cdlm.data.masking import Block
from cdlm.models import hub
from cdlm.models.system import Loss
from cdlm.runs.config import RunConfig, build_system
from cdlm.runs.convert import convert
from cdlm.sampling.requests import Request
from cdlm.training.ema import EMA

GOLDEN = Path(__file__).parent / "golden" / "ssdlm"
ARRAYS = load_file(GOLDEN / "arrays.safetensors")
CASES = json.loads((GOLDEN / "cases.json").read_text())
V = 64


def near(ours: Tensor, theirs: Tensor) -> None:
    """Equal as far as their precision goes."""
    tolerance = 1e-6 if theirs.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def built(config: Any, vocab: int = 11, seed: int = 0) -> EmbeddingDiffusion:
    """A fresh system; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build(vocab)


@cache
def published() -> EmbeddingDiffusion:
    """The recorded network."""
    official = SSDLayout().read(GOLDEN)
    system = build_system(official.config)
    system.load_state_dict({name: content() for name, (_, content) in official.tensors.items()})
    assert isinstance(system, EmbeddingDiffusion)
    return system.eval()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- schedule, simplex, projections ---


@pytest.mark.parametrize("total", [10, 1000])
def test_the_schedule_is_the_published_one(total: int) -> None:
    t = ARRAYS[f"schedule.{total}.t"].double()
    told = {name: ARRAYS[f"schedule.{total}.{name}_f64"] for name in ("alpha_t_bar", "alpha_t_minus_bar", "alpha_t",
                                                                      "beta_t", "beta_t_til")}  # fmt: skip

    def bar(times: Tensor) -> Tensor:
        signal = alpha_of(Cosine().t_of_u(times / total) / 5).square()
        return torch.where(times > 0, signal, 1.0)  # time 0 is never asked for

    now, before = bar(t), bar(t - 1)
    near(now, told["alpha_t_bar"])
    near(before, told["alpha_t_minus_bar"])
    near(now / before, told["alpha_t"])
    near(1 - now / before, told["beta_t"])
    near((1 - before) / (1 - now) * (1 - now / before), told["beta_t_til"])


def test_the_next_level_of_the_grid_is_the_time_before() -> None:
    for total in (10, 1000):
        t = ARRAYS[f"schedule.{total}.t"].long()
        signal = alpha_of(UpperEnds().levels(Cosine(), total) / 5).square()
        near(signal[total - t], ARRAYS[f"schedule.{total}.alpha_t_bar_f64"])
        later = t > 1  # after time 1 there is no step: the tokens are read out there
        near(signal[total - t[later] + 1], ARRAYS[f"schedule.{total}.alpha_t_minus_bar_f64"][later])


@given(u=st.lists(st.floats(2e-4, 1), min_size=2, max_size=9), k=st.floats(0.1, 20))
@settings(max_examples=30)
def test_the_schedule_is_a_rising_map_and_its_density_is_its_derivative(u: list[float], k: float) -> None:
    schedule, points = Cosine(k), torch.tensor(sorted(u), dtype=torch.float64)
    t = schedule.t_of_u(points)
    assert (t.diff() >= 0).all()
    torch.testing.assert_close(schedule.u_of_t(t), points, rtol=0, atol=1e-7)
    inner = points.clamp(2.1e-4, 0.99)
    t, step = schedule.t_of_u(inner), 1e-6
    rise = (schedule.t_of_u(inner + step) - schedule.t_of_u(inner - step)) / (2 * step)
    torch.testing.assert_close(schedule.slope(inner), rise, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(schedule.density(t), 1 / rise, rtol=1e-3, atol=0.0)


def test_noise_at_the_end_is_all_there_is() -> None:
    schedule = Cosine()
    assert float(alpha_of(torch.tensor(schedule.t_max / 5, dtype=torch.float64))) < 1e-15
    assert schedule.t_min == pytest.approx(5 * math.sqrt(math.tan(math.pi / 2 * 3e-4 / 1.0001) ** 2 / 1), rel=0.2)


def test_simplex_arrays() -> None:
    tokens, t = ARRAYS["simplex.tokens"], ARRAYS["simplex.t"]
    vertices = Simplex(V)(tokens)
    near(vertices, ARRAYS["simplex.almost_one_hot"])
    near(vertices.softmax(-1), ARRAYS["simplex.softmax"])
    level = Cosine().t_of_u(t / 10)[:, None, None]
    noisy = alpha_of(level / 5) * (vertices + level * ARRAYS["simplex.noise"])
    near(noisy.float(), ARRAYS["simplex.noisy"])


@given(k=st.floats(0.5, 9), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_the_simplex_is_an_embedding(k: float, seed: int) -> None:
    simplex = Simplex(7, k).double()
    table, tokens = simplex.table(), torch.randint(7, (2, 3), generator=rng(seed))
    torch.testing.assert_close(table.norm(dim=-1), torch.full((7,), simplex.rho, dtype=torch.float64))
    assert torch.equal(simplex(tokens), table[tokens])
    z = torch.randn(2, 3, 7, generator=rng(seed), dtype=torch.float64)
    torch.testing.assert_close(simplex.dot(z), z @ table.T)
    torch.testing.assert_close(simplex.mix(z.softmax(-1)), z.softmax(-1) @ table)


@pytest.mark.parametrize("case", CASES["projection"], ids=lambda case: f"top_p={case['top_p']}")
def test_projections_are_the_published_ones(case: dict) -> None:
    logits, name = ARRAYS["projection.logits"], f"projection.{case['index']}"
    system = built(SSD(k=case["one_hot_value"]), V)
    kept = nucleus(logits, case["top_p"])
    # Which of the last tokens has less than 1 before it is a matter of rounding, which machines do in their own ways.
    counts, then = kept.sum(-1), torch.tensor(case["kept_per_place"])
    same = counts == then
    assert same.all() or case["top_p"] == 1
    tail = logits.softmax(-1).sort(-1, descending=True).values.flip(-1).cumsum(-1).flip(-1)
    beyond = tail.gather(-1, torch.minimum(counts, then).clamp(max=V - 1)[..., None]).squeeze(-1)
    assert (beyond[~same] < 1e-6).all()
    near(MultiHot(case["top_p"])(system, logits, draws(2))[same], ARRAYS[f"{name}.multi_hot"][same])
    near(Uneven(case["top_p"])(system, logits, draws(2))[same], ARRAYS[f"{name}.uneven"][same])
    drawn = ARRAYS[f"{name}.sampling"]
    near(system.embed(drawn.argmax(-1)), drawn)
    assert kept.gather(-1, drawn.argmax(-1, keepdim=True)).all()


# --- decoding ---


class Told(StepNoise):
    """Recorded noise of one step."""

    def __init__(self, recording: "Recording", step: int):
        super().__init__(0, [0], [0])
        object.__setattr__(self, "recording", recording)
        object.__setattr__(self, "at", step)

    def normal(self, like: Tensor, purpose: int = 0) -> Tensor:
        return self.__dict__["recording"].noise(self.__dict__["at"], like, 1)


class Recording(DiffusionLoop):
    """The loop on recorded noise; all rows walk in step."""

    def __init__(self, case: dict, system: EmbeddingDiffusion, sampler: Setup):
        super().__init__(system, *sampler, case["batch"])
        self.case, self.used = case, list[int]()

    def noise(self, taken: int, like: Tensor, offset: int) -> Tensor:
        block, step = divmod(taken, self.case["steps_per_block"])
        place = block * self.case["normal_draws_per_block"] + step + offset
        self.used.append(place)
        start = self.case["context_size"] + block * self.case["block_length"]
        out = torch.zeros_like(like)
        out[:, start : start + self.case["block_length"]] = ARRAYS[f"decode.{self.case['index']}.normal"][place]
        return out

    def _start(self, index: list[int], before: list[int], like: Tensor) -> Tensor:
        return self.noise(before[0], like, 0)

    def _draws(self, live: DiffusionRows) -> StepNoise:
        return Told(self, live.known.taken[0])


class Sampled(Projection):
    """The tokens that were drawn when the run was recorded, which lie in the nucleus."""

    def __init__(self, case: dict, start: int):
        self.case, self.start, self.calls = case, start, 0

    def __call__(self, denoiser: Any, logits: Tensor, draws: StepNoise) -> Tensor:
        places = slice(self.start, self.start + self.case["block_length"])
        drawn = ARRAYS[f"decode.{self.case['index']}.sampled_tokens"][self.calls]
        assert nucleus(logits[:, places], self.case["top_p"]).gather(-1, drawn[..., None]).all()
        self.calls += 1
        tokens = logits.argmax(-1)
        tokens[:, places] = drawn
        return denoiser.embed(tokens)


def asked_of(case: dict) -> tuple[list[Request], int]:
    """The context is given, and so is what the run leaves out at the end, which nobody must see."""
    tokens = ARRAYS[f"decode.{case['index']}.input_ids"]
    first, count = case["context_size"], case["blocks"] * case["block_length"]
    assert tokens.shape[1] == first + count + case["decode_truncate_len"]
    place = torch.arange(tokens.shape[1])
    told = (place < first) | (place >= first + count)
    return [Request(i, row, told) for i, row in enumerate(tokens)], first


@pytest.mark.parametrize("case", CASES["decode"], ids=lambda case: f"{case['index']}-{case['projection']}")
def test_decoding_is_the_published_one(case: dict) -> None:
    requests, first = asked_of(case)
    projection = Sampled(case, first) if case["projection"] == "sampling" else MultiHot(case["top_p"])
    sampler = diffusion(
        case["steps_per_block"], solver=Renoise(), grid=UpperEnds(), guidance=Guidance(projection=projection),
        block=case["block_length"], record=frozenset({"logits", "tokens", "z"}),
    )  # fmt: skip
    run = Recording(case, published(), sampler)
    steps = list(run.steps(requests))
    assert len(steps) == case["model_calls"] == len(case["t_per_step"])
    logits = ARRAYS[f"decode.{case['index']}.logits"]
    for call, step in enumerate(steps):
        block, at = divmod(call, case["steps_per_block"])
        places = slice(first + block * case["block_length"], first + (block + 1) * case["block_length"])
        level = run.denoiser.schedule.u_of_t(step.state.t[:1])
        assert float(level) * case["steps_per_block"] == pytest.approx(case["t_per_step"][call], abs=1e-6)
        near(step.state.logits[:, places], logits[call])
        assert step.state.tokens[:, places].tolist() == case["argmax_logits_per_step"][call]
        if case["projection"] == "multi_hot":
            kept = nucleus(step.state.logits[:, places], case["top_p"]).sum(-1)
            assert kept.tolist() == case["kept_per_place_per_step"][call]
        if at > 0:  # the state after the step before
            assert step.state.z[:, places].argmax(-1).tolist() == case["argmax_xt_per_step"][call - 1]
    last = steps[-1]
    assert last.tokens[:, first : first + len(case["final"][0])].tolist() == case["final"]
    assert last.state.nfe.tolist() == [case["model_calls"]] * case["batch"]
    # What the release adds in the last step of a block, times zero, is never asked for.
    per_block = case["normal_draws_per_block"]
    assert run.used == [i for i in range(per_block * case["blocks"]) if (i + 1) % per_block]


# --- the published files ---


def words(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many tokens."""
    table = {f"w{i}": i for i in range(vocab)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(table, unk_token="w0")), eos_token="w2")


def copied(folder: Path, **changes: Any) -> Path:
    """The recorded model with other settings in its config.json; None takes one out."""
    shutil.copytree(GOLDEN, folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_files_of_the_release_and_back(tmp_path: Path) -> None:
    layout = SSDLayout()
    official = layout.read(GOLDEN)
    assert official.length == 38
    settings = SSD(network="roberta", width=32, depth=2, heads=2, mlp_ratio=2, positions=38)
    assert official.config == built(settings, V).config
    layout.write(official, tmp_path)
    again, ours = load_file(tmp_path / "model.safetensors"), load_file(GOLDEN / "model.safetensors")
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    for file in ("embed_sum_layer.pt", "timestep_layer.pt"):
        before, after = (torch.load(folder / file, weights_only=True) for folder in (GOLDEN, tmp_path))
        assert {name.removeprefix("module.") for name in before} == after.keys()
        assert all(torch.equal(value, after[name.removeprefix("module.")]) for name, value in before.items())
    told, known = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN))
    assert told == {**known, "cdlm": {"length": 38, "block": 25, "k": 5.0, "top_p": 0.2}}
    twice = layout.read(tmp_path)
    assert (twice.config, twice.length) == (official.config, official.length)
    assert all(torch.equal(lazy(), official.tensors[name][1]()) for name, (_, lazy) in twice.tensors.items())
    network = RobertaForMaskedLM.from_pretrained(tmp_path)  # what the release reads it with
    assert torch.equal(network.state_dict()["lm_head.decoder.weight"], ours["lm_head.decoder.weight"])


def test_a_folder_of_ours_and_back(tmp_path: Path) -> None:
    config = SSD(16, 1, 2, 3, network="roberta", block=3, k=4.0, top_p=0.9, positions=9, dropout=0.0)
    system = built(config, 12)
    system.tokenizer, system.length = words(12), 7
    system.save_pretrained(tmp_path / "ours")
    convert(SSDLayout(), tmp_path / "ours", tmp_path / "theirs")
    convert(SSDLayout(), tmp_path / "theirs", tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert (again.config, again.length) == (system.config, 7)
    state = system.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_the_release_is_converted_and_loaded(tmp_path: Path) -> None:
    words(V).save_pretrained(tmp_path / "words")
    convert(SSDLayout(), GOLDEN, tmp_path / "ours", str(tmp_path / "words"))
    system = loaded(tmp_path / "ours")
    state = published().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in system.state_dict().items())
    assert "names no licence" in (tmp_path / "ours" / "README.md").read_text()


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    words(V + 1).save_pretrained(tmp_path / "words")
    with pytest.raises(CdlmError, match=r"the weights are of 64 tokens, the tokenizer .* has 65"):
        convert(SSDLayout(), GOLDEN, tmp_path / "ours", str(tmp_path / "words"))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("left_out", ["", "lm_head.decoder.weight", "lm_head.decoder."])
def test_the_release_may_be_pickled_and_leave_out_copies(tmp_path: Path, left_out: str) -> None:
    folder = copied(tmp_path / "release")
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not (left_out and name.startswith(left_out))}
    (folder / "model.safetensors").unlink()
    torch.save({**kept, "roberta.embeddings.position_ids": torch.arange(40)}, folder / "pytorch_model.bin")
    tensors = SSDLayout().read(folder).tensors
    expected = published().state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(lazy(), expected[name]) for name, (_, lazy) in tensors.items())


def test_a_copy_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "release")
    state = load_file(folder / "model.safetensors")
    state["lm_head.decoder.weight"][0, 0] += 1
    save_file(state, folder / "model.safetensors")
    tensors = SSDLayout().read(folder).tensors
    with pytest.raises(CdlmError, match=r"'lm_head.decoder.weight' that differs"):
        tensors["network.roberta.embeddings.word_embeddings.weight"][1]()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "embed_sum_layer.pt", "timestep_layer.pt"])
def test_a_file_that_is_missing_or_damaged(tmp_path: Path, name: str) -> None:
    folder = copied(tmp_path / "release")
    (folder / name).write_bytes(b"\x05{")
    with pytest.raises(CdlmError, match=name.partition(".")[0]):
        SSDLayout().read(folder)
    (folder / name).unlink()
    with pytest.raises(CdlmError, match=f"has no {name}"):
        SSDLayout().read(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "bert"}, {"type_vocab_size": 2}, {"pad_token_id": 0}, {"hidden_act": "relu"},
        {"is_decoder": True}, {"layer_norm_eps": 1e-12}, {"tie_word_embeddings": False}, {"hidden_size": None},
        {"hidden_size": "32"},
        {"intermediate_size": 65}, {"num_hidden_layers": 0}, {"vocab_size": None}, {"hidden_dropout_prob": 0.2},
        {"hidden_dropout_prob": None, "attention_probs_dropout_prob": None}, {"cdlm": {"block": 3}}, {"cdlm": 5},
        {"cdlm": {"length": 9, "speed": 1}}, {"cdlm": {"length": 9, "block": 39}},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_not_those_of_the_release(tmp_path: Path, change: dict) -> None:
    with pytest.raises(CdlmError) as error:
        SSDLayout().read(copied(tmp_path / "release", **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lm_head.bias", "roberta.encoder.layer.1.output.dense.weight", "lm_head.dense.more"])
def test_a_tensor_too_few_or_too_many(tmp_path: Path, name: str) -> None:
    folder = copied(tmp_path / "release")
    words(V).save_pretrained(folder)  # overwrites no model file
    state = load_file(folder / "model.safetensors")
    if state.pop(name, None) is None:
        state[name] = torch.zeros(3)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CdlmError, match=rf"network\.{name}"):
        convert(SSDLayout(), folder, tmp_path / "ours")


def test_the_shared_backbone_has_no_published_files(tmp_path: Path) -> None:
    system = built(SSD(16, 1, 2, dim=4), V)
    system.tokenizer, system.length = words(V), 30
    system.save_pretrained(tmp_path / "ours")
    with pytest.raises(CdlmError, match="only one with network=roberta has"):
        convert(SSDLayout(), tmp_path / "ours", tmp_path / "theirs")


# --- the network ---

SMALL: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2, "block": 3}
ROBERTA = SSD(**SMALL, network="roberta", positions=12)
SHARED = SSD(**SMALL, dim=8)
BOTH = pytest.mark.parametrize("config", [SHARED, ROBERTA], ids=["shared", "roberta"])
N = 8


def lively(config: SSD, seed: int = 0) -> EmbeddingDiffusion:
    """A float64 system in which no weight is zero, as after training."""
    system = built(config, seed=seed).double()
    generator = rng(seed)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return system.eval()


def question(system: EmbeddingDiffusion, rows: int = 3, context: int = 2) -> tuple[Tensor, Tensor, Condition]:
    """States with a context, a block and something after it."""
    tokens = torch.randint(11, (rows, N), generator=rng(1))
    place = torch.arange(N).expand(rows, N)
    target = (place >= context) & (place < context + 3)
    t = system.schedule.t_of_u(torch.linspace(0.2, 0.9, rows, dtype=torch.float64))
    clean = system.embed(tokens)
    z = clean + t[:, None, None] * torch.randn(clean.shape, generator=rng(2), dtype=clean.dtype)
    return z, t, Condition(clean * (~target)[..., None], target, torch.zeros_like(clean))


@BOTH
def test_a_block_sees_its_context_its_state_and_its_level(config: SSD) -> None:
    system = lively(config)
    z, t, condition = question(system)
    seen = condition.target
    logits = system.denoise(z, t, condition).logits[seen]

    def changed(z: Tensor = z, t: Tensor = t, condition: Condition = condition) -> bool:
        return not torch.equal(system.denoise(z, t, condition).logits[seen], logits)

    other = condition._replace(clean=condition.clean.roll(1, -1))
    assert changed(t=t * 1.5)
    assert changed(z=z.roll(1, -1))
    assert changed(condition=other)
    # Not what follows it, not the state where nothing is noisy, and no estimate of an earlier call.
    after = torch.arange(N) >= 5
    assert not changed(condition=condition._replace(clean=torch.where(after[:, None], other.clean, condition.clean)))
    assert not changed(z=torch.where(seen[..., None], z, 3.0))
    assert not changed(condition=condition._replace(x0=torch.ones_like(z)))


@BOTH
def test_rows_do_not_see_each_other_nor_padding(config: SSD) -> None:
    system = lively(config)
    z, t, condition = question(system)
    whole = system.denoise(z, t, condition).logits
    for row in range(3):
        alone = take((z, t, condition), torch.tensor([row]))
        torch.testing.assert_close(system.denoise(*alone).logits, whole[row : row + 1])
    short = Condition(condition.clean[:, :6], condition.target[:, :6], condition.x0[:, :6])
    padded = condition._replace(valid=(torch.arange(N) < 6).expand(3, N))
    without, with_ = (system.denoise(z[:, : c.target.shape[1]], t, c).logits for c in (short, padded))
    torch.testing.assert_close(with_[:, 2:5], without[:, 2:5])


@BOTH
def test_what_the_network_reads(config: SSD) -> None:
    system = lively(config)
    z, t, condition = question(system)
    hidden = condition._replace(clean=condition.clean * (torch.arange(N) != 0)[:, None])
    features, _ = system.network_input(z, t, hidden)
    assert torch.equal(features[:, 0], torch.zeros_like(features[:, 0]))  # nothing is given there
    table = (
        system.network.table()
        if isinstance(system.network, Roberta)
        else system.network_input.get_parameter("given.weight")
    )
    torch.testing.assert_close(features[:, 1], table[condition.clean[:, 1].argmax(-1)])
    shown = (z[:, 2] * alpha_of(t / 5)[:, None]).softmax(-1)
    noisy = shown @ system.network_input.get_parameter("noisy.weight").T
    if isinstance(system.network_input, RobertaInput):
        weight, bias = (system.network_input.get_parameter(f"timestep.{name}") for name in ("weight", "bias"))
        noisy = noisy + system.schedule.u_of_t(t)[:, None] * weight[:, 0] + bias
    torch.testing.assert_close(features[:, 2], noisy)


def test_the_recorded_logits_are_those_of_transformers() -> None:
    """Positions start after the padding token's, and the head is the table."""
    system, network = published(), RobertaForMaskedLM.from_pretrained(GOLDEN).eval()
    tokens = torch.randint(V, (2, 9), generator=rng())
    everything = torch.zeros(2, 9, dtype=torch.bool)
    with torch.no_grad():
        clean = system.embed(tokens)
        ask = Condition(clean, everything, clean * 0)
        features, level = system.network_input(clean, torch.ones(2, dtype=torch.float64), ask)
        torch.testing.assert_close(system.network(features, level), network(input_ids=tokens).logits)


def test_every_parameter_is_there_once_and_in_a_group(tmp_path: Path) -> None:
    system = built(ROBERTA)
    state = system.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    groups = system.parameter_groups()
    ids = [id(p) for group in groups.values() for p in group]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in system.parameters()}
    assert len(groups["matrices"]) == 6 * 2  # four of attention and two of the MLP, in each of two layers
    assert all(p.ndim == 2 for p in groups["matrices"])
    system.tokenizer, system.length = words(11), N
    system.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.config == system.config
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_the_published_model_is_roberta_large_and_two_layers() -> None:
    with torch.device("meta"):
        system = SSD(1024, 24, 16, network="roberta").build(50_265)
    own = sum(p.numel() for p in system.network_input.parameters())
    assert own == 50_265 * 1024 + 2 * 1024
    assert sum(p.numel() for p in system.parameters()) - own == 355_412_057


def test_the_reader_of_a_copy_reads_the_copy() -> None:
    system = lively(ROBERTA)
    z, t, condition = question(system)
    before = system.denoise(z, t, condition).logits
    for twin in (copy.deepcopy(system), EMA(system, 0.5).system):
        assert isinstance(twin, EmbeddingDiffusion)
        torch.testing.assert_close(twin.denoise(z, t, condition).logits, before)
        with torch.no_grad():
            twin.network.get_parameter("roberta.embeddings.word_embeddings.weight").add_(1.0)
        assert not torch.equal(twin.network_input(z, t, condition)[0], system.network_input(z, t, condition)[0])
    assert torch.equal(system.denoise(z, t, condition).logits, before)


def test_rows_longer_than_the_positions_are_refused() -> None:
    system = built(replace(ROBERTA, positions=7))
    z, t, condition = question(system)
    with pytest.raises(CdlmError, match="has 7 positions, the rows have 8"):
        system.denoise(z.float(), t, Condition(condition.clean.float(), condition.target, z.float()))


@pytest.mark.parametrize(
    "bad",
    [
        {"block": 0}, {"dim": 0}, {"k": 0.0}, {"k": math.inf}, {"top_p": -0.1}, {"top_p": 1.1}, {"top_p": math.nan},
        {"start": "somewhere"}, {"positions": 100}, {"dropout": 0.2}, {"width": 18},
        {"network": "roberta", "dim": 8}, {"network": "roberta", "gates": False},
        {"network": "roberta", "positions": 24}, {"network": "roberta", "positions": 0},
        {"network": "roberta", "dropout": 1.0}, {"network": "roberta", "dropout": -0.1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(CdlmError):
        SSD(**bad)


def test_a_network_that_there_is_not_is_refused() -> None:
    config = copy.copy(SHARED)
    object.__setattr__(config, "network", "bert")  # as a config.json may say
    with pytest.raises(CdlmError, match="one of shared, roberta, got 'bert'"):
        config._check_network()


def test_a_block_fits_into_the_rows() -> None:
    RunConfig(system=SSD(block=64), length=64, masking="Block(64, 0.3)")
    RunConfig(system=SSD(block=64), length=64, masking="Mixture(((0.5, Block(64)), (0.5, Unconditional())))")
    with pytest.raises(CdlmError, match="a block of 65 does not fit into rows of 64"):
        RunConfig(system=SSD(block=65), length=64)


@pytest.mark.parametrize("law", ["Block(32)", "Unconditional()"])
def test_blocks_are_learned_with_their_own_law(law: str) -> None:
    with pytest.raises(CdlmError, match=r"masking Block\(64\), and got"):
        RunConfig(system=SSD(block=64), length=64, masking=law)
    with pytest.raises(CdlmError, match=r"masking Block\(25\), and got Mixture"):
        RunConfig(system=SSD())


# --- training ---


def loss_of(system: EmbeddingDiffusion, seed: int = 0, tokens: Tensor | None = None) -> Loss:
    """The loss of a batch under the law of blocks."""
    generator = rng(seed)
    tokens = pattern(16, generator) if tokens is None else tokens
    valid = torch.ones_like(tokens, dtype=torch.bool)
    return system(Batch(tokens, None, Block(3)(tokens, valid, generator), generator))


def pattern(rows: int, generator: torch.Generator) -> Tensor:
    """Texts that say one word."""
    return torch.randint(11, (rows, 1), generator=generator).expand(rows, N).contiguous()


@BOTH
def test_training_learns_and_sampling_continues_a_text(config: SSD) -> None:
    system = built(replace(config, depth=1, dropout=0.0) if config.network == "roberta" else replace(config, depth=1))
    first = loss_of(system.eval(), 999).nats.mean()
    optimizer = torch.optim.Adam(system.train().parameters(), lr=5e-3)
    for step in range(180):
        optimizer.zero_grad()
        loss_of(system, step).total.backward()
        optimizer.step()
    assert loss_of(system.eval(), 999).nats.mean() < 0.4 * first
    tokens = pattern(6, rng(5))
    requests = [Request(i, row, torch.arange(N) < 2) for i, row in enumerate(tokens)]
    for guidance in (1.0, 1.5):
        guidance = Guidance(scale=guidance, projection=MultiHot(0.0))
        sampler = diffusion(8, solver=Renoise(), grid=UpperEnds(), guidance=guidance, block=3)
        last = list(DiffusionLoop(system, *sampler, 6).steps(requests))[-1]
        assert (last.tokens == tokens).float().mean() > 0.8


@BOTH
def test_the_loss_reaches_every_part(config: SSD) -> None:
    system = built(config).train()
    with torch.no_grad():  # gates of zero let nothing through at first
        for parameter in system.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng(1)))
    loss_of(system).total.backward()
    unused = {name for name, p in system.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused == set()


def test_dropout_is_a_function_of_the_generator_and_off_in_evaluation() -> None:
    tokens = pattern(4, rng(3))
    system, still = built(ROBERTA).train(), built(replace(ROBERTA, dropout=0.0)).train()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    once = loss_of(system, 7, tokens).total
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(loss_of(system, 7, tokens).total, once)
    assert not torch.equal(loss_of(still, 7, tokens).total, once)
    assert torch.equal(loss_of(system.eval(), 7, tokens).total, loss_of(still.eval(), 7, tokens).total)


# --- from a RoBERTa checkpoint ---


PRETRAINED: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 14, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip


def checkpoint(folder: Path, **changes: Any) -> RobertaForMaskedLM:
    """A RoBERTa in transformers' own format."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = RobertaForMaskedLM(RobertaConfig(**{**PRETRAINED, **changes}))
    network.save_pretrained(folder)
    return network.eval()


def test_training_starts_from_a_checkpoint(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "roberta")
    system = built(replace(ROBERTA, start=str(tmp_path / "roberta")))
    weights = theirs.state_dict()
    for name, value in system.network.state_dict().items():
        assert torch.equal(value, weights[name])
    assert torch.equal(
        system.network_input.get_parameter("noisy.weight").T, weights["roberta.embeddings.word_embeddings.weight"]
    )
    assert system.config == built(ROBERTA).config  # what is saved does not ask for the checkpoint again
    shutil.rmtree(tmp_path / "roberta")
    build_system(system.config)


def test_a_checkpoint_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    checkpoint(tmp_path / "fetched")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: tmp_path / "fetched")
    assert hub.locate("someone/roberta") == tmp_path / "fetched"
    built(replace(ROBERTA, start="someone/roberta"))
    with pytest.raises(CdlmError, match="not a model folder"):
        built(replace(ROBERTA, start="./nowhere"))


def test_a_checkpoint_of_another_size_or_vocabulary(tmp_path: Path) -> None:
    checkpoint(tmp_path, num_hidden_layers=1, max_position_embeddings=30)
    with pytest.raises(CdlmError, match="set width=16, depth=1, heads=2, mlp_ratio=2, positions=28"):
        built(replace(ROBERTA, start=str(tmp_path)))
    fitting = replace(ROBERTA, depth=1, positions=28, start=str(tmp_path))
    built(fitting)
    with pytest.raises(CdlmError, match="has 11 tokens and the tokenizer 12"):
        built(fitting, vocab=12)


@pytest.mark.parametrize("name", ["lm_head.layer_norm.bias", "roberta.encoder.layer.0.output.dense.more"])
def test_a_checkpoint_with_other_weights(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path)
    config, whole = replace(ROBERTA, start=str(tmp_path)), load_file(tmp_path / "model.safetensors")
    state = dict(whole)
    if state.pop(name, None) is None:
        state[name] = torch.zeros(16)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CdlmError, match=f"tensor '{name}'"):
        built(config)
    places = "roberta.embeddings.position_embeddings.weight"
    save_file({**whole, places: torch.zeros(13, 16)}, tmp_path / "model.safetensors")
    with pytest.raises(CdlmError, match=rf"tensor '{places}' of .* has shape \(13, 16\)"):
        built(config)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CdlmError, match=r"has no model.safetensors"):
        built(config)
