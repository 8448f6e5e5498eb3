"""Decoding equals the published decoders, token for token at every step and call for call, on recorded traces."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from setups import Setup, unmasking
from torch import Tensor

from cdlm.core.rng import TOKENS, PositionNoise, Site
from cdlm.halting import Criterion, Never, Prophet
from cdlm.masked.checkpoints.model import open_checkpoint
from cdlm.masked.model import CachedModel, Constants
from cdlm.masked.published import Quirks
from cdlm.masked.sampler import UnmaskingLoop
from cdlm.policies.confidence import Factor, Threshold
from cdlm.policies.dream import Dream, DreamThreshold
from cdlm.policies.entropy import entropy_bounded
from cdlm.policies.llada import LLaDA
from cdlm.policies.policy import Policy
from cdlm.sampling.requests import canvases
from tests.tiny import GOLDEN, Tiny

MASK, EOS, EOT = 63, 1, 2


def cases(name: str) -> list[Any]:
    found = json.loads((GOLDEN / name).read_text())["cases"]
    return [pytest.param(case, id=case["id"]) for case in found]


@dataclass(frozen=True)
class Recorded(PositionNoise):
    """What the published decoder of LLaDA drew, in the order of its steps."""

    arrays: Mapping[str, Tensor] = field(default_factory=dict)

    def uniform(self, site: Site, purpose: int) -> Float[Tensor, "..."]:
        return self.arrays["rand"][int(site.step[0])]

    def token(
        self, site: Site, logits: Float[Tensor, "k v"], temperature: float, purpose: int = TOKENS
    ) -> Int[Tensor, " k"]:
        """Its formula, without the exponential."""
        tiny = torch.finfo(torch.float64).tiny
        u = self.arrays["rand_like"][int(site.step[0])][site.row, site.place].double().clamp(min=tiny)
        return (logits.double() - temperature * (-u.log()).log()).argmax(-1)


@dataclass(frozen=True)
class Drawn(PositionNoise):
    """What the published decoder of Dream drew, one array a step: numbers and tokens in the order of the masked
    positions, or the positions of a drawn order."""

    arrays: Mapping[int, Tensor] = field(default_factory=dict)
    masked: tuple[Bool[Tensor, " n"], ...] = ()
    """At each step."""

    def uniform(self, site: Site, purpose: int) -> Float[Tensor, "..."]:
        step = int(site.step[0])
        numbers = torch.ones(1, len(self.masked[step]), dtype=torch.float64)
        return numbers.masked_scatter(self.masked[step], self.arrays[step].double())

    def category(self, site: Site, log_p: Float[Tensor, "k v"]) -> Int[Tensor, " k"]:
        step = int(site.step[0])
        before = self.masked[step].cumsum(0)[site.place] - 1
        return self.arrays[step].flatten()[before]

    def order(self, site: Site, score: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return torch.zeros_like(score).index_fill(1, self.arrays[int(site.step[0])].flatten(), 1.0)


def noise_of(folder: str, case: Mapping[str, Any]) -> PositionNoise | None:
    if case.get("noise_seed") is None:
        return None
    arrays = load_file(GOLDEN / folder / "arrays.safetensors")
    prefix = f"{case['id']}."
    own = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    if folder != "dream":
        return Recorded(0, own)
    length = len(case["tokens_after_step"][0][0])
    start = case["prompt"][0] + [MASK] * (length - len(case["prompt"][0]))
    before = [start, *(rows[0] for rows in case["tokens_after_step"])]
    numbers = {int(name.split(".")[0]): value for name, value in own.items() if name[0].isdigit()}
    return Drawn(0, numbers, tuple(torch.tensor(row) == MASK for row in before))


def replayed(
    model: CachedModel, decoder: Setup, case: Mapping[str, Any], length: int, noise: PositionNoise | None = None,
    constraints: Mapping[int, int] | None = None,
) -> tuple[list[Any], list[int], list[int]]:  # fmt: skip
    """The canvas after each step, and calls and steps of each row."""
    prompts = [[None if t == MASK else t for t in row] for row in case["prompt"]]
    requests = canvases(prompts, length, constraints=constraints)
    masks = case.get("attention_mask")
    if masks is not None:
        valid = [torch.tensor([*map(bool, row), *[True] * length]) for row in masks]
        requests = [replace(request, valid=real) for request, real in zip(requests, valid, strict=True)]
    run = UnmaskingLoop(model, *decoder, len(requests), noise=noise)
    seen, nfe, steps = [], [0] * len(requests), [0] * len(requests)
    canvas = [request.tokens.tolist() for request in requests]
    for finished in run.steps(requests):
        assert finished.canvas is not None
        rows = zip(finished.state.row.tolist(), finished.canvas.tolist(), finished.state.nfe.tolist(), strict=True)
        for row, tokens, calls in rows:
            canvas[row], nfe[row], steps[row] = tokens, calls, steps[row] + 1
        seen.append(list(canvas))
    return seen, nfe, steps


def llada(settings: Mapping[str, Any], **switches: Any) -> Policy:
    return LLaDA(settings["steps"], settings["block_length"], settings["remasking"], **switches)


LLADA_QUIRKS: dict[str, tuple[dict[str, bool], Quirks]] = {
    "mask_in_prompt": ({"block_quota": True}, Quirks(leave_masks=True)),
    "model_predicts_mask": ({}, Quirks(propose_mask=True, leave_masks=True)),
    "confidence_eos_eot_inf_temperature": ({"eot_only": True}, Quirks()),
}


@pytest.mark.parametrize("case", cases("llada/cases.json"))
def test_llada(case: Mapping[str, Any]) -> None:
    settings = case["settings"]
    switches, quirks = LLADA_QUIRKS.get(case["id"], ({}, Quirks()))
    ends = {"no_eos": settings.get("logits_eos_inf", False), "eos_last": settings.get("confidence_eos_eot_inf", False)}
    decoder = unmasking(
        llada(settings, **ends, **switches), temperature=settings["temperature"], cfg_scale=settings["cfg_scale"],
        quirks=quirks,
    )  # fmt: skip
    model = Tiny(GOLDEN / case["model"], Constants(MASK, EOS, EOT))
    seen, nfe, steps = replayed(model, decoder, case, settings["gen_length"], noise_of("llada", case))
    assert seen == case["tokens_after_step"]
    assert model.calls == case["model_calls"] == steps[0]
    assert model.rows == case["model_rows"] == sum(nfe)


FAST_QUIRKS: dict[str, tuple[dict[str, Any], Quirks]] = {
    "threshold_0.1_prefix_extra_call": ({}, Quirks(extra_call=True)),
    "threshold_0.9_dual_v1_runs_out": ({"calls": 3}, Quirks(leave_masks=True)),
    "factor_0.5_no_cache": ({"last_rank": True}, Quirks()),
    "factor_1.0_no_cache": ({"last_rank": True}, Quirks()),
    "factor_1.0_last_rank": ({"last_rank": True}, Quirks()),
}


def fast(case: Mapping[str, Any], model: CachedModel, folder: str) -> None:
    settings = case["settings"]
    switches, quirks = FAST_QUIRKS.get(case["id"], ({}, Quirks()))
    quota = "threshold" not in settings and "factor" not in settings
    if case["revision"] == "2506" and case["cache"] != "none" and not quota:
        quirks = Quirks(extra_call=True)
    if "threshold" in settings:
        policy: Policy = Threshold(settings["threshold"], settings["block_length"], **switches)
    elif "factor" in settings:
        policy = Factor(settings["factor"], settings["block_length"], **switches)
    else:
        policy = llada(settings)
    cache = None if case["cache"] == "none" else case["cache"]
    decoder = unmasking(policy, temperature=settings["temperature"], cache=cache, quirks=quirks)
    seen, _, steps = replayed(model, decoder, case, settings["gen_length"], noise_of(folder, case))
    assert seen == case["tokens_after_step"]
    assert max(steps) == case["nfe"]


@pytest.mark.parametrize("case", cases("fastdllm/cases.json"))
def test_fast_dllm(case: Mapping[str, Any]) -> None:
    fast(case, Tiny(GOLDEN / case["model"], Constants(MASK, EOS)), "fastdllm")


@pytest.mark.parametrize("case", cases("llada_arch/cases.json"))
def test_fast_dllm_on_the_architecture_of_llada(case: Mapping[str, Any]) -> None:
    fast(case, open_checkpoint(GOLDEN / "llada_arch"), "llada_arch")


@pytest.mark.parametrize("case", cases("prophet/cases.json"))
def test_prophet(case: Mapping[str, Any]) -> None:
    settings = case["settings"]
    rule: Criterion = Never()
    offset = settings.get("answer_start_offset")
    if settings.get("analyze_gap") and offset is not None:
        taus = settings.get("early_exit_thresholds") or {"high": 7.5, "mid": 5.0, "low": 2.5}
        end = min(offset + 5, settings["gen_length"])
        rule = Prophet(*(float(t) for t in taus.values()), region=(offset, end), one_based=True)
    decoder = unmasking(
        llada(settings), rule, settings["temperature"], cfg_scale=settings["cfg_scale"], quirks=Quirks(noisy_fill=True)
    )
    constraints = {int(k): v for k, v in (settings.get("constraints") or {}).items()}
    model = Tiny(GOLDEN / case["model"], Constants(MASK, EOS))
    seen, _, _ = replayed(model, decoder, case, settings["gen_length"], noise_of("prophet", case), constraints)
    assert seen == case["tokens_after_step"]
    assert model.calls == case["model_calls"]


def dream(settings: Mapping[str, Any], **switches: Any) -> Policy:
    return Dream(
        settings["steps"], settings["alg"], settings["alg_temp"], settings["eps"], settings.get("top_p"),
        settings.get("top_k"), **switches,
    )  # fmt: skip


@pytest.mark.parametrize("case", cases("dream/cases.json"))
def test_dream(case: Mapping[str, Any]) -> None:
    settings, odd = case["settings"], case["id"] == "uneven_batch"
    quirks = Quirks(leave_masks=odd)
    decoder = unmasking(dream(settings, pooled=odd), temperature=settings["temperature"], quirks=quirks)
    model = Tiny(GOLDEN / case["model"], Constants(MASK, EOS, shift=True), running=True)
    seen, _, _ = replayed(model, decoder, case, settings["max_new_tokens"], noise_of("dream", case))
    assert seen == case["tokens_after_step"]
    assert model.calls == case["model_calls"]


@pytest.mark.parametrize("case", cases("dream/fastdllm_cases.json"))
def test_fast_dllm_for_dream(case: Mapping[str, Any]) -> None:
    settings = case["settings"]
    quirks, cache = Quirks(), None
    if case["variant"] == "whole":
        policy: Policy = DreamThreshold(settings["steps"], settings["threshold"])
    else:
        quirks, cache = Quirks(first_from_full=True), "dual" if settings["dual_cache"] else "prefix"
        block = settings["block_length"]
        quota = Dream(settings["steps"], "entropy", eps=settings["eps"], block=block)
        policy = Threshold(settings["threshold"], block) if "threshold" in settings else quota
    decoder = unmasking(policy, temperature=settings["temperature"], cache=cache, quirks=quirks)
    model = Tiny(GOLDEN / case["model"], Constants(MASK, EOS, shift=True), running=True)
    seen, _, _ = replayed(model, decoder, case, settings["max_new_tokens"])
    assert seen == case["tokens_after_step"]
    assert model.calls == case["model_calls"]


def test_the_entropy_bound_accepts_what_the_sampler_of_diffusion_gemma_accepts() -> None:
    folder = GOLDEN.parent / "diffusion_gemma"
    entropy = load_file(folder / "arrays.safetensors")["entropy_bound.entropy"]
    every = torch.ones_like(entropy, dtype=torch.bool)
    for case in json.loads((folder / "cases.json").read_text())["entropy_bound"]:
        accepted = entropy_bounded(entropy, -entropy, every, case["entropy_bound"])  # its order is that of the entropy
        assert accepted.long().tolist() == case["accept_mask"]
