"""Halting rules in transformers' own generation loop of DiffusionGemma, on a tiny model of random weights."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from cdlm.core.errors import CdlmError
from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting import (
    KL,
    AngleConvergence,
    Criterion,
    Entropy,
    FixedSteps,
    For,
    FromStep,
    JoT,
    Never,
    NormConvergence,
    Patience,
    Prophet,
    SchED,
    StableAndConfident,
    Stateless,
    for_transformers,
)

# transformers' loop imports a part of torch that uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")

GOLDEN = Path(__file__).parent / "golden" / "diffusion_gemma"
CASES = json.loads((GOLDEN / "cases.json").read_text())["generate"]
N, V, STEPS, CANVASES = 8, 64, 12, 2

RULES = (
    Patience(1),
    Patience(3),
    Entropy(0.15),
    KL(1.0, warmup=0.0),
    KL(3.0, warmup=0.6),
    StableAndConfident(1, 0.12),
    StableAndConfident(0, 0.3),
    FixedSteps(4),
    Prophet(9.0, 7.0, 6.0),
    Prophet(10.0, 6.0, 6.0, region=(1, 4), one_based=True),
    SchED(14.0, 5.0),
    SchED(14.0, 5.0, schedule="linear", variant="paper"),
    For(Entropy(0.3), 2),
    FromStep(Patience(1), 8),
    Entropy(0.2) & Patience(1),
    (Entropy(0.1) & SchED(14.0, 0.0)) | KL(0.1),
    Never(),
)
SWEEPS = (
    [Patience(k) for k in (4, 3, 2, 1)],
    [Entropy(x) for x in (0.01, 0.05, 0.15, 0.4)],
    [KL(x, warmup=0.0) for x in (0.01, 0.3, 2.0, 6.0)],
    [StableAndConfident(1, x) for x in (0.001, 0.05, 0.15, 0.4)],
    [FixedSteps(k) for k in (12, 7, 3, 1)],
    [Prophet(3 * x, 2 * x, x) for x in (20.0, 10.0, 5.0, 1.0)],
    [SchED(3 * x, x) for x in (20.0, 10.0, 5.0, 1.0)],
    [SchED(3 * x, x, schedule="exp", variant="paper") for x in (20.0, 10.0, 5.0, 1.0)],
    [Entropy(x) | Patience(k) for x, k in ((0.01, 6), (0.05, 3), (0.1, 2), (0.3, 1))],
)


# --- the loop of transformers ---


@cache
def model(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import DiffusionGemmaForBlockDiffusion

    # The other implementations of experts know no float64.
    options: dict[str, Any] = {"dtype": dtype, "experts_implementation": "eager"}
    return DiffusionGemmaForBlockDiffusion.from_pretrained(GOLDEN / "model", **options).eval()


class Watch:
    """A streamer that keeps the logits of every step of every canvas, as the rule sees them."""

    _takes_logits = True

    def __init__(self) -> None:
        self.canvases: list[list[Tensor]] = [[]]

    def put(self, value: Tensor) -> None:
        self.canvases.append([])

    def put_draft(self, logits: Tensor) -> None:
        self.canvases[-1].append(logits)

    def end(self) -> None:
        self.canvases = [canvas for canvas in self.canvases if canvas]


class Recorded:
    """The draws of a recorded run, in their order."""

    def __init__(self, case: dict):
        steps, self.left = iter(case["steps"]), []
        counts = [step["cur_step"] for step in case["steps"]] + [math.inf]
        ends = [i + 1 for i, (now, after) in enumerate(pairwise(counts)) if after >= now]
        for start, end, canvas in zip([0, *ends], ends, case["initial_canvas"], strict=False):
            self.left.append(canvas)
            for _ in range(start, end):
                step = next(steps)
                self.left += [step["denoiser_canvas"], step["random_canvas"]]
        self.lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def canvas(self) -> Tensor:
        return torch.tensor(self.left.pop(0))

    def token(self, probabilities: Tensor) -> Tensor:
        return torch.tensor(self.left.pop(0)).view(-1, 1)


@dataclass
class Seeded:
    """Draws that depend on the row, the canvas and the step alone, not on the batch."""

    rows: Sequence[int]
    at: list[int] = field(default_factory=lambda: [-1, 0])
    """Canvas and step."""
    drawn: bool = False

    def uniform(self, kind: int) -> Tensor:
        def one(row: int) -> Tensor:
            seed = hash((row, kind, *self.at)) % 2**31
            return torch.rand(N, generator=torch.Generator().manual_seed(seed))

        return torch.stack([one(row) for row in self.rows])

    def canvas(self) -> Tensor:
        if not self.drawn:  # no token was drawn since the last one: this opens a canvas
            self.at = [self.at[0] + 1, 0]
        self.drawn = False
        return (self.uniform(0) * V).long()

    def token(self, probabilities: Tensor) -> Tensor:
        self.at, self.drawn = [self.at[0], self.at[1] + 1], True
        below = probabilities.cumsum(-1) < self.uniform(1).view(-1, 1)
        return below.sum(-1, keepdim=True).clamp(max=V - 1)


@contextmanager
def drawing(draws: Recorded | Seeded) -> Iterator[None]:
    """transformers' loop with these draws for its own."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSampler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EntropyBoundSampler, "initialize_canvas", lambda self, batch_size, device: draws.canvas())
        patch.setattr(torch, "multinomial", lambda probabilities, num_samples: draws.token(probabilities))
        yield


def generate(model: Any, rule: Criterion, prompt: Tensor, draws: Recorded | Seeded, **options: Any) -> tuple:
    """What transformers' `generate` returns under the rule, and the logits of each canvas [step, row, place, token]."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

    watch, sampler = Watch(), EntropyBoundSamplerConfig(options.pop("entropy_bound"))
    with drawing(draws), for_transformers(rule).on(model):
        out = model.generate(prompt, streamer=watch, sampler_config=sampler, **options)
    return out, [torch.stack(canvas) for canvas in watch.canvases]


def run(rule: Criterion, rows: Sequence[int], canvases: int = CANVASES, steps: int = STEPS) -> tuple:
    """Some rows, each with a prompt of its own. Steps feed on what rounding leaves, therefore float64."""
    prompt = torch.stack([torch.randint(2, 60, (5,), generator=torch.Generator().manual_seed(row)) for row in rows])
    size = {"max_new_tokens": canvases * N, "max_denoising_steps": steps, "t_min": 0.1, "t_max": 0.8}
    none = {"eos_token_id": None, "pad_token_id": None}
    return generate(model(torch.float64), rule, prompt, Seeded(rows), entropy_bound=2.0, **size, **none)


def calls(out: Any, canvases: int = CANVASES) -> list[int]:
    """Denoising steps of each row over all canvases, as transformers counts them."""
    return (canvases * N / out.tokens_per_forward).round().long().tolist()


# --- golden ---


def test_the_model_gives_the_recorded_logits() -> None:
    recorded = load_file(GOLDEN / "arrays.safetensors")
    ids, canvas = recorded["forward.input_ids"], recorded["forward.canvas"]
    with torch.no_grad():
        plain = model()(input_ids=ids, decoder_input_ids=canvas).logits
        conditioned = model()(input_ids=ids, decoder_input_ids=canvas, self_conditioning_logits=plain).logits
    for name, logits in (("logits", plain), ("logits_self_conditioned", conditioned)):
        assert ((logits - recorded[f"forward.{name}"]).abs() <= 1e-4 * (1 + logits.abs())).all(), name


@pytest.mark.parametrize("case", CASES, ids=["one_canvas", "batch", "end_token", "budget"])
def test_generates_as_transformers_did_with_its_own_rule(case: dict) -> None:
    rule = StableAndConfident(case["stability_threshold"], case["confidence_threshold"])
    options = (
        "max_new_tokens",
        "max_denoising_steps",
        "t_min",
        "t_max",
        "eos_token_id",
        "pad_token_id",
        "entropy_bound",
    )
    draws = Recorded(case)
    lengths = draws.lengths
    prompt = torch.tensor(case["prompt"])
    out, canvases = generate(model(), rule, prompt, draws, **{name: case[name] for name in options})
    assert out.sequences.tolist() == case["sequences"]
    assert out.tokens_per_forward.tolist() == case["tokens_per_forward"]
    assert [len(canvas) for canvas in canvases] == lengths
    assert not draws.left
    drafts = [step.argmax(-1).tolist() for canvas in canvases for step in canvas]
    assert drafts == [step["argmax_canvas"] for step in case["steps"]]
    stop, finished = for_transformers(rule, case["max_denoising_steps"]), []
    for canvas in canvases:
        finished += latched(stop, canvas)
    assert finished == [step["finished"] for step in case["steps"]]


def latched(stop: Any, canvas: Tensor) -> list[list[bool]]:
    """The rows that are done after each step of a canvas [step, row, place, token]."""
    stop.reset()
    said = torch.stack([stop(logits.argmax(-1), logits) for logits in canvas])
    return (said.cumsum(0) > 0).tolist()


# --- any rule ---


def signals(logits: Tensor, before: Tensor | None) -> dict[str, Tensor]:
    """What rules read of one row's logits [place, token] and those of the step before, by their definitions."""
    log, tokens = logits.double().log_softmax(-1), logits.argmax(-1)
    top = logits.topk(2).values
    past = None if before is None else before.double().log_softmax(-1)
    values = {
        "tokens": tokens,
        "top1": top[:, 0],
        "top2": top[:, 1],
        "switches": torch.tensor(N) if before is None else (tokens != before.argmax(-1)).sum(),
        "mean_entropy": -(log.exp() * log).sum(-1).mean(),
        "mean_kl": torch.tensor(math.inf) if past is None else (log.exp() * (log - past)).sum(-1).mean(),
        "margin": (top[:, 0] - top[:, 1]).mean(),
    }
    values["span_margin"] = values["margin"]
    return {name: value[None] for name, value in values.items()}


def by_hand(rule: Criterion, logits: Tensor, budget: int) -> int | None:
    """The step, from 1, at which the rule halts a row of logits [step, place, token]; None if it never does."""
    open_, one = torch.ones(1, N, dtype=torch.bool), torch.ones(1, dtype=torch.int64)
    memory = rule.start(NewRows(open_, one * budget, open_))
    for i, now in enumerate(logits):
        seen = signals(now, logits[i - 1] if i else None)
        state = StepState(one * 0, one * i, one * budget, torch.ones(1).double(), one * i + 1, open_, seen)
        memory, decision = rule.look(memory, state)
        if decision.halt.item():
            return i + 1
    return None


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_each_row_halts_where_the_rule_says(rule: Criterion) -> None:
    out, canvases = run(rule, [0, 1, 2])
    spent = torch.zeros(3, dtype=torch.int64)
    for number, canvas in enumerate(canvases):
        halts = [by_hand(rule, canvas[:, row], STEPS) for row in range(3)]
        steps = [STEPS if halt is None else halt for halt in halts]
        assert len(canvas) == max(steps)
        start = 5 + number * N
        for row, step in enumerate(steps):
            assert out.sequences[row, start : start + N].equal(canvas[step - 1, row].argmax(-1))
        spent += torch.tensor(steps)
    assert calls(out) == spent.tolist()
    assert (spent.min() < STEPS * CANVASES) == (rule != Never())


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_row_of_a_batch_ends_as_it_does_alone(rule: Criterion) -> None:
    together = run(rule, [0, 1, 2])[0]
    for row in range(3):
        alone = run(rule, [row])[0]
        assert alone.sequences[0].equal(together.sequences[row])
        assert calls(alone) == [calls(together)[row]]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: repr(sweep[0]))
def test_a_looser_rule_never_halts_later(sweep: Sequence[Criterion]) -> None:
    steps = [calls(run(rule, [0, 1, 2], 1)[0], 1) for rule in sweep]
    assert all(loose <= strict for one, other in pairwise(steps) for strict, loose in zip(one, other, strict=True))
    assert sum(steps[-1]) < sum(steps[0])


@pytest.mark.parametrize("budget", [1, 3, 12])
def test_the_budget_is_that_of_the_canvas(budget: int) -> None:
    late = Prophet(math.inf, math.inf, -math.inf)  # halts at the first step with two thirds of the budget behind it
    behind = min((k for k in range(budget) if k / budget >= 0.67), default=budget - 1)
    assert calls(run(late, [0], steps=budget)[0]) == [CANVASES * (behind + 1)]


# --- the object ---


@given(data=st.data(), stability=st.integers(0, 3), confidence=st.sampled_from([0.3, 0.6, 1.0]))
@settings(max_examples=30)
def test_decides_as_their_object_over_several_canvases(data: st.DataObject, stability: int, confidence: float) -> None:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import StableAndConfidentStoppingCriteria

    ours = for_transformers(StableAndConfident(stability, confidence), 8)
    other = StableAndConfidentStoppingCriteria(stability, confidence)
    for rows in data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        logits = torch.rand(rows, 4, 9, generator=generator) * 9
        ours.reset()
        other.reset()
        for _ in range(data.draw(st.integers(1, 8))):
            moved = torch.rand(rows, 1, 1, generator=generator) < 0.3
            logits = torch.where(moved, logits.roll(1, -1), logits * 1.1)
            tokens: Any = logits.argmax(-1)
            assert ours(tokens, logits).equal(other(tokens, logits))


@pytest.mark.parametrize("rule", [Patience(1), KL(1e-3, warmup=0.0), SchED(-math.inf, -math.inf)], ids=repr)
def test_a_canvas_starts_without_memory(rule: Criterion) -> None:
    stop, logits = for_transformers(rule, 4), torch.rand(2, N, V)
    for _ in range(2):
        assert latched(stop, logits.expand(3, -1, -1, -1)) == [[False] * 2, [True] * 2, [True] * 2]


def test_half_precision_is_read_in_full() -> None:
    logits = (4 * torch.randn(1, 40, N, V, generator=torch.Generator().manual_seed(0))).bfloat16()
    levels = [signals(row, None)["mean_entropy"].item() for row in logits[0]]
    for low, high in pairwise(sorted(levels)):
        stop = for_transformers(Entropy((low + high) / 2), 1)
        assert latched(stop, logits) == [[level <= low for level in levels]]


def test_needs_the_budget_of_a_loop_that_it_does_not_know() -> None:
    logits = torch.rand(1, N, V)
    refused(lambda: for_transformers(Patience(1))(logits.argmax(-1), logits), "give it budget=")
    refused(lambda: for_transformers(Patience(1), 0), "whole number budget >= 1, got 0")


def test_refuses_a_budget_that_generate_does_not_have() -> None:
    with for_transformers(Patience(1), 6).on(model()):
        prompt = torch.tensor([[3, 4]])
        refused(lambda: model().generate(prompt, max_denoising_steps=5), "budget of 6, but .* max_denoising_steps=5")
        assert model().generate(prompt, max_denoising_steps=6, max_new_tokens=N).sequences.shape == (1, 2 + N)


def test_the_model_is_left_as_it_was() -> None:
    before = dict(vars(model()))
    with for_transformers(FixedSteps(2)).on(model()):
        with for_transformers(FixedSteps(3)).on(model()):
            assert stops_at() == 3
        assert stops_at() == 2
    with pytest.raises(ZeroDivisionError), for_transformers(FixedSteps(2)).on(model()):
        raise ZeroDivisionError
    assert vars(model()) == before
    assert stops_at() == 1


def stops_at() -> int:
    """Steps of a canvas under the rule that the model has now; its own halts at the first."""
    watch, own = Watch(), {"stability_threshold": 0, "confidence_threshold": 100.0}
    with drawing(Seeded([0])):
        model().generate(torch.tensor([[3, 4]]), streamer=watch, max_new_tokens=N, max_denoising_steps=6, **own)
    return len(watch.canvases[0])


# --- refusals ---


@dataclass(frozen=True)
class Reads(Stateless):
    """A rule that reads one signal."""

    signal: str

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.signal})

    def decide(self, state: StepState) -> Decision:
        raise AssertionError("it should not be asked")


def refused(act: Callable[[], object], match: str) -> None:
    """It raises one line that says so."""
    with pytest.raises(CdlmError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("signal", ["z", "x0", "score", "z_norm", "x0_norm", "score_cosine"])
def test_refuses_signals_of_embeddings(signal: str) -> None:
    refused(lambda: for_transformers(Patience(1) | Reads(signal)), f"'{signal}' describes a state in embedding space")


@pytest.mark.parametrize("rule", [NormConvergence(0.1), AngleConvergence(0.1) & Never()], ids=repr)
def test_refuses_rules_of_embeddings(rule: Criterion) -> None:
    refused(lambda: for_transformers(rule), "embedding space.* use a rule that reads")


@pytest.mark.parametrize("rule", [JoT(), For(JoT(), 2), FromStep(JoT(), 2), JoT() | Entropy(0.1)], ids=repr)
def test_refuses_rules_that_freeze(rule: Criterion) -> None:
    refused(lambda: for_transformers(rule), "only halt whole canvases")


def test_refuses_what_is_no_rule_and_what_is_no_signal() -> None:
    refused(lambda: for_transformers(Reads("mood")), "no signal 'mood'")


class Wrapper:
    """What passes on all that it is asked for, and nothing that it is told."""

    def __getattr__(self, name: str) -> Any:
        return getattr(model(), name)


def test_refuses_models_whose_loop_it_cannot_enter() -> None:
    for other in (torch.nn.Linear(1, 1), Wrapper()):
        refused(lambda other=other: for_transformers(Never()).on(other).__enter__(), f"got a {type(other).__name__}")
