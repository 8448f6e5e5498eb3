"""EDIT: both forms of the rule beside what their texts say, the map, the quotas, and whom it is refused to."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int
from masked_toys import MASK, Row, Toy, decoded
from setups import unmasking
from torch import Tensor, nn
from toys import masked_with_tokenizer, with_tokenizer

import cdlm
from cdlm.core.errors import CdlmError
from cdlm.core.tensors import specs_of, write_tensors
from cdlm.halting import EDIT, Criterion, For, FromStep, Full, Never, Patience, for_transformers, parse_criterion, sweep
from cdlm.halting.replay import check_recorded, check_replayable
from cdlm.halting.rules.edit import along, divergence_over, turn
from cdlm.halting.update_map import FILE, UpdateMap, read_map, row_norms, write_map
from cdlm.masked.sampler import Unmasking, UnmaskingLoop
from cdlm.models.activations import Watch
from cdlm.policies import parse_policy
from cdlm.policies.confidence import Threshold
from cdlm.policies.gaussian import Gaussian
from cdlm.policies.llada import LLaDA
from cdlm.policies.policy import Policy, plan_of
from cdlm.policies.quotas import gaussian
from cdlm.sampling.requests import Request, canvases
from cdlm.sampling.session import Session
from tests.test_masked_replay import recording

WIDTH, NAMES = 4, ("first", "second.lora_B.default")
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 2, 3]]


class Watched(Toy):
    """The toy with modules that say something of each position, its neighbours and their masks."""

    def __init__(self, seed: int = 0):
        super().__init__(seed=seed)
        generator = torch.Generator().manual_seed(seed + 100)
        self.network = nn.Module()
        self.network.add_module("first", nn.Identity())
        self.network.add_module("second", nn.ModuleDict({"lora_B": nn.ModuleDict({"default": nn.Identity()})}))
        self.tables = torch.randint(-8, 9, (2, 3, 12, WIDTH), generator=generator).float()

    def features(self, tokens: Int[Tensor, "b n"], module: int, real: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        own, left, right = self.tables[module]
        before, after = (torch.roll(tokens, way, 1) for way in (1, -1))
        before = torch.where(torch.roll(real, 1, 1), before, 0)
        return own[tokens] * 2 + left[before] + right[after]

    def logits(
        self, tokens: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*s v"]:  # fmt: skip
        real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        for module, name in enumerate(NAMES):
            self.network.get_submodule(name)(self.features(tokens, module, real))
        return super().logits(tokens, valid, positions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a map of the toy's modules."""
    place = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(5)
    directions = {name: torch.randn(WIDTH, 3, generator=generator) for name in NAMES}
    write_map(place, UpdateMap(directions, "tensors:toy", 7))
    return place


def asked(n: int = 1, length: int = 16) -> list[Request]:
    return canvases(PROMPTS, length, n)


def run(rule: Criterion, policy: Policy | None = None, batch_size: int = 8, **settings: Any) -> dict[int, Row]:
    return decoded(Watched(), unmasking(policy or LLaDA(16, block=8), rule, **settings), asked(), batch_size)


def calls(rows: dict[int, Row]) -> list[int]:
    return [rows[i].nfe for i in sorted(rows)]


# --- what is published ---


@pytest.mark.parametrize(("width", "nats"), [(0.1, 7.0591), (1.0, 0.2401)])
def test_the_divergence_of_a_token_has_the_known_values(width: float, nats: float) -> None:
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    now = along(torch.tensor([[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]]), directions)
    before = along(torch.tensor([[[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]]), directions)
    for visible, wanted in (([True, False], nats), ([False, True], 0.0), ([True, True], nats / 2), ([False] * 2, 0.0)):
        found = turn(before, now, torch.tensor([visible]), torch.tensor([width]))
        assert float(found) == pytest.approx(wanted, abs=1e-4)


def directions_of(folder: Path) -> list[list[list[float]]]:
    found = read_map(folder)[0].directions
    return [found[name].tolist() for name in NAMES]


def by_code(
    model: Watched, folder: Path, prompt: list[int], block: int, blocks: int, steps: int, rule: EDIT
) -> tuple[list[int], int]:
    """The published rule on one row, position by position and number by number: tokens and calls."""
    maps, x, spent = directions_of(folder), prompt + [MASK] * block * blocks, 0
    for index in range(blocks):
        begin, end = len(prompt) + index * block, len(prompt) + (index + 1) * block
        first = index == 0
        delta = rule.delta if rule.first_delta is None or not first else rule.first_delta
        span = rule.span if rule.first_span is None or not first else rule.first_span
        quotas = [block // steps + (i < block % steps) for i in range(steps)]
        history: list[float] = []
        before: list[list[list[float]]] = []
        step = 0
        while step < len(quotas) and MASK in x[begin:end]:
            masked = [token == MASK for token in x]
            acts = [model.features(torch.tensor([x]), m, torch.ones(1, len(x)).bool())[0].tolist() for m in (0, 1)]
            x, spent = committed(model, x, end, quotas[step]), spent + 1
            visible = [i for i in range(begin, end) if not masked[i]]
            nats = math.inf if not before else mean_turn(maps, before, acts, visible)
            history, before = [*history, nats], acts
            small = sum(value < delta for value in history[-span:])
            if len(history) >= span and small >= (rule.required or span) and len(quotas) == steps:
                polish = min(2 if rule.polish is None else rule.polish, steps - step - 1)
                left = x[:end].count(MASK)
                if not polish and left:
                    x = committed(model, x, end, left, of=masked)
                quotas = quotas[: step + 1] + [
                    left // max(1, polish) + (i < left % max(1, polish)) for i in range(polish)
                ]
                history = [math.inf] * 99
            step += 1
    return x, spent


def committed(model: Watched, x: list[int], end: int, count: int, of: list[bool] | None = None) -> list[int]:
    """The likeliest masked positions before `end`, decided; of the logits of this canvas, or of one that was masked."""
    seen = x if of is None else [MASK if hidden else token for token, hidden in zip(x, of, strict=True)]
    logits = Toy.logits(model, torch.tensor([seen]))[0]
    logits[:, MASK] = -math.inf
    best = logits.softmax(-1).max(-1)
    order = sorted((i for i in range(end) if x[i] == MASK), key=lambda i: (-float(best.values[i]), i))
    return [int(best.indices[i]) if i in order[:count] else token for i, token in enumerate(x)]


def mean_turn(maps: list, before: list, now: list, visible: list[int]) -> float:
    """Mean over modules of the mean over visible tokens, at the temperature of a block that began all masked."""
    if not visible:
        return 0.0
    total = 0.0
    for directions, old, new in zip(maps, before, now, strict=True):
        for i in visible:
            k, q = (
                soft([cosine(side[i], column) / 0.1 for column in zip(*directions, strict=True)]) for side in (old, new)
            )
            total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(k, q, strict=True)) / len(visible) / len(maps)
    return total


def cosine(one: Any, two: Any) -> float:
    lengths = math.hypot(*one) * math.hypot(*two)
    return sum(a * b for a, b in zip(one, two, strict=True)) / lengths if lengths else 0.0


def soft(values: list[float], floor: float = 1e-8) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) + floor for power in powers]


@pytest.mark.parametrize(
    "settings",
    [
        {"delta": 1.9, "span": 2}, {"delta": 3.0, "span": 2, "polish": 1}, {"delta": 10.0, "span": 3, "polish": 3},
        {"delta": 2.0, "span": 2, "polish": 0}, {"delta": 3.2, "span": 3, "required": 2},
        {"delta": 2.0, "span": 2, "first_delta": 0.3, "first_span": 3}, {"delta": 100.0, "span": 1},
    ],
)  # fmt: skip
def test_the_rule_of_the_code_ends_blocks_as_published(folder: Path, settings: dict[str, Any]) -> None:
    rule, ended = EDIT(str(folder), **settings), 0
    found = run(rule)
    for index, request in enumerate(asked()):
        prompt = request.tokens[
            request.given & (request.valid if request.valid is not None else request.given)
        ].tolist()
        tokens, spent = by_code(Watched(), folder, prompt, 8, 2, 8, rule)
        assert list(found[index].tokens)[-len(tokens) :] == tokens
        assert found[index].nfe == spent
        ended += spent < 16
    assert ended


def by_paper(model: Watched, folder: Path, prompt: list[int], length: int, rule: EDIT) -> int:
    """The step at which the described rule ends a row; all of them if it does not."""
    maps = [[math.hypot(*row) for row in directions] for directions in directions_of(folder)]
    x, history = prompt + [MASK] * length, list[float]()
    past: list[list[float]] = []
    seen: set[int] = set()
    for step in range(length):
        acts = [model.features(torch.tensor([x]), m, torch.ones(1, len(x)).bool())[0].tolist() for m in (0, 1)]
        now = [[cosine(vector, map_) for vector in module] for module, map_ in zip(acts, maps, strict=True)]
        visible = {i for i in range(len(prompt), len(x)) if x[i] != MASK}
        both, nats = sorted(visible & seen), 0.0
        for old, new in zip(past, now, strict=False):
            p, q = (soft([side[i] for i in both], 0.0) if both else [] for side in (old, new))
            nats += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)) / len(maps)
        history.append(nats if len(both) > 1 else math.inf)
        past, seen = now, visible
        if len(history) >= rule.span and all(value < rule.delta for value in history[-rule.span :]):
            return step + 1
        x = committed(model, x, len(x), 1)
    return length


@pytest.mark.parametrize("delta", [1e-4, 0.002, 0.02, 0.1])
def test_the_rule_of_the_paper_halts_rows_as_described(folder: Path, delta: float) -> None:
    rule = EDIT(str(folder), "paper", delta=delta, span=2)
    found = run(rule, LLaDA(16))
    for index, prompt in enumerate(PROMPTS):
        assert found[index].nfe == by_paper(Watched(), folder, prompt, 16, rule)
    assert delta < 0.1 or min(calls(found)) < 16


def test_one_token_in_common_says_nothing() -> None:
    one = torch.tensor([[True, False, False]])
    assert float(divergence_over(torch.rand(1, 3), torch.rand(1, 3), one)) == 0  # so that it must not count
    assert torch.equal(row_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]])), torch.tensor([5.0, 2.0]))


# --- laws of every rule ---


EITHER = [{"variant": "code", "polish": 1}, {"variant": "code", "polish": 0}, {"variant": "paper"}]


@pytest.mark.parametrize("form", EITHER, ids=str)
def test_a_threshold_of_nothing_is_the_plain_run(folder: Path, form: dict[str, Any]) -> None:
    for policy in (LLaDA(16, block=8), LLaDA(8, block=4), Threshold(0.5, block=8)):
        assert run(EDIT(str(folder), delta=0.0, span=1, **form), policy) == run(Full(), policy)


@pytest.mark.parametrize("form", EITHER, ids=str)
def test_a_looser_threshold_never_ends_a_row_of_one_block_later(folder: Path, form: dict[str, Any]) -> None:
    taken = [
        calls(run(EDIT(str(folder), delta=delta, span=2, **form), LLaDA(16)))
        for delta in (0.0, 1e-3, 0.01, 0.5, 2.0, 50.0)
    ]
    for strict, loose in pairwise(taken):
        assert all(later <= sooner for sooner, later in zip(strict, loose, strict=True))
    assert sum(taken[-1]) < sum(taken[0])


@pytest.mark.parametrize("form", EITHER, ids=str)
@pytest.mark.parametrize("policy", [LLaDA(16, block=8), LLaDA(16), Gaussian(16, block=8)], ids=repr)
def test_a_row_is_the_same_in_any_batch(folder: Path, form: dict[str, Any], policy: Policy) -> None:
    rule = EDIT(str(folder), delta=5.0 if form["variant"] == "code" else 0.004, span=1, **form)
    together = run(rule, policy)
    assert sum(calls(together)) < sum(calls(run(Full(), policy)))
    for size in (1, 2):
        apart = run(rule, policy, size)
        assert {i: row.result for i, row in apart.items()} == {i: row.result for i, row in together.items()}


def test_rules_are_joined(folder: Path) -> None:
    rule = EDIT(str(folder), "paper", delta=0.1, span=1)
    for joined in (rule | Patience(99), rule & Patience(1), For(rule, 2), FromStep(rule, 3)):
        assert joined.modules == rule.modules
        assert calls(run(joined, LLaDA(16))) >= calls(run(rule, LLaDA(16)))


def test_what_is_open_is_shared_among_the_steps_to_polish(folder: Path) -> None:
    rule = EDIT(str(folder), delta=100.0, span=1, polish=3)
    for row in run(rule, LLaDA(16)).values():
        open_ = [16, *(canvas.count(MASK) for canvas in row.canvases)]
        # The first step has none before it; the second one is quiet, and what it leaves is decided in three.
        assert [a - b for a, b in pairwise(open_)] == [1, 1, 5, 5, 4]


# --- hooks ---


def test_the_activations_are_those_of_the_call_and_nothing_stays_at_the_model(folder: Path) -> None:
    model, rule = Watched(), EDIT(str(folder), delta=0.0)
    loop = UnmaskingLoop(model, *unmasking(LLaDA(16, block=8), rule, cfg_scale=1.0), 8)
    for step in loop.steps(asked()):
        assert set(step.state.activations) == set(NAMES)
        assert all(value.shape == (*step.state.open.shape, WIDTH) for value in step.state.activations.values())
    assert all(not part._forward_hooks for part in model.network.modules())
    with pytest.raises(ZeroDivisionError), Watch(model.modules_named(NAMES)).kept(1):
        raise ZeroDivisionError
    assert all(not part._forward_hooks for part in model.network.modules())


def test_without_a_rule_that_reads_them_there_are_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "register_forward_hook", lambda *_: pytest.fail("a hook"))
    for rule in (Full(), Patience(2)):
        assert all(row.reason for row in run(rule).values())


def test_a_module_that_says_nothing_of_positions_is_refused() -> None:
    part = nn.Linear(2, 3)
    with pytest.raises(CdlmError, match="module it gives no features of each position"), Watch({"it": part}).kept(1):
        part(torch.zeros(4, 2))


# --- blocks and quotas ---


@given(
    masks=st.integers(0, 600), steps=st.integers(1, 200), center=st.floats(0.5, 20), std=st.floats(0.1, 20),
    more=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60)
def test_gaussian_quotas_are_all_of_the_masks(masks: int, steps: int, center: float, std: float, more: int) -> None:
    many = torch.tensor([masks, 7]), torch.tensor([steps, 1]), torch.tensor([center, 4.0]), torch.tensor([std, 4.0])
    quotas = gaussian(*many, steps + more)
    assert quotas.shape == (2, steps + more)
    assert quotas.sum(1).tolist() == [masks, 7]
    assert int(quotas.min()) >= 0
    assert not quotas[0, steps:].any()
    assert not quotas[1, 1:].any()


PUBLISHED = {  # set, positions: policy, and steps after which every block is full (of all, half the positions)
    ("Countdown", 128): ("Gaussian(64, block=64, center=4.0, std=4.0)", 47),
    ("Countdown", 256): ("Gaussian(128, block=192, first=64, first_steps=32, center=4.0, std=4.0)", 95),
    ("Countdown", 512): ("Gaussian(256, block=64, center=4.0, std=5.0)", 176),
    ("GSM8K", 128): ("Gaussian(64, block=64, center=4.0, std=3.0)", 51),
    ("GSM8K", 256): ("Gaussian(128, block=64, center=4.0, std=4.0)", 97),
    ("GSM8K", 512): ("Gaussian(256, block=64, center=4.0, std=4.0)", 197),
    ("MATH500", 128): ("Gaussian(64, block=64, center=4.0, std=5.0)", 44),
    ("MATH500", 256): ("Gaussian(128, block=64, center=4.0, std=3.0)", 109),
    ("MATH500", 512): ("Gaussian(256, block=64, center=4.0, std=6.0)", 162),
    ("Sudoku", 128): ("Gaussian(64, block=64, center=4.0, std=3.0)", 51),
    ("Sudoku", 256): ("Gaussian(128, block=64, center=6.0, std=5.0)", 82),
    ("Sudoku", 512): ("Gaussian(256, block=64, center=6.0, std=4.0)", 183),
}  # fmt: skip


@pytest.mark.parametrize(("which", "published"), PUBLISHED.items(), ids=str)
def test_the_published_schedules_leave_as_many_steps_idle(which: tuple[str, int], published: tuple[str, int]) -> None:
    policy, length = parse_policy(published[0]), which[1]
    assert isinstance(policy, Gaussian)
    assert parse_policy(repr(policy)) == policy
    assert policy.steps == length // 2
    open_ = torch.ones(1, length, dtype=torch.bool)
    plan = plan_of(policy, open_, torch.tensor([0]), torch.tensor([length]), open_.long())
    full = 0
    for block in range(int(plan.last) + 1):
        number = torch.tensor([block])
        masks = policy.due(plan.block_of, number, plan.block_of == block)
        steps = policy.steps_of(plan, number)
        here = plan._replace(block=number, masks=masks, steps=steps)
        quotas = [int(policy.quota(here._replace(inner=torch.tensor([i])))) for i in range(int(steps))]
        assert sum(quotas) == int(masks)
        full += max(i for i, quota in enumerate(quotas) if quota) + 1
    assert full == published[1]


def test_blocks_have_their_own_sizes_and_steps() -> None:
    policy = Gaussian(32, block=48, first=16, first_steps=8)
    rows = decoded(Toy(), unmasking(policy, Never()), canvases([[3]], 64, 1))
    open_ = [canvas[1:17].count(MASK) for canvas in rows[0].canvases]
    later = [canvas[17:].count(MASK) for canvas in rows[0].canvases]
    assert rows[0].nfe == 32
    assert open_[7] == 0
    assert later[:8] == [48] * 8
    assert later[8] < 48


def test_full_and_never_give_the_same_tokens_with_blocks_of_their_own_steps() -> None:
    for policy in (Gaussian(16, block=12, first=4, first_steps=4), Gaussian(16, block=8), Gaussian(9)):
        one, two = run(Full(), policy), run(Never(), policy)
        assert {i: row.tokens for i, row in one.items()} == {i: row.tokens for i, row in two.items()}
        assert set(calls(two)) == {policy.steps}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Gaussian()", "needs a number of steps"), ("Gaussian(8, block=8, first=4)", "first_steps beside first"),
        ("Gaussian(8, first_steps=4)", "a block for those that follow"),
        ("Gaussian(8, block=8, center=0.0)", "center > 0"),
        ("Gaussian(8, block=8, first_steps=8)", "below steps"),
    ],
)  # fmt: skip
def test_a_schedule_that_there_cannot_be_is_one_line(text: str, why: str) -> None:
    with pytest.raises(CdlmError, match=why):
        parse_policy(text)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Gaussian(8, block=5), "multiple of its block"), (Gaussian(9, block=8), "multiple of its 2 blocks"),
        (Gaussian(8, block=8, first=16, first_steps=4), "beyond its first block"),
        (Gaussian(8, block=8, first=4, first_steps=4), "behind its first block"),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_the_length_is_one_line(policy: Gaussian, why: str) -> None:
    with pytest.raises(CdlmError, match=why):
        run(Full(), policy)


def test_idle_steps_of_the_schedule_cannot_be_replayed() -> None:
    record = Unmasking.recorded
    with pytest.raises(CdlmError, match="idle steps cannot be replayed"):
        run(Never(), Gaussian(12, block=8), record=record)
    run(Full(), Gaussian(12, block=8), record=record)


# --- the map's file, and whom it is refused to ---


def test_a_map_is_read_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    found, digest = read_map(folder)
    assert (found.weights, found.steps, len(digest)) == ("tensors:toy", 7, 8)
    assert found.size == 2 * 4 * WIDTH * 3
    assert found.size_of_vectors == 2 * 4 * WIDTH
    write_map(tmp_path, found)
    assert (tmp_path / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_a_rule_is_its_text_and_knows_its_map(folder: Path, tmp_path: Path) -> None:
    rule = EDIT(str(folder), delta=0.1, only="lora_B")
    assert rule.modules == {NAMES[1]}
    assert parse_criterion(repr(rule)) == rule == EDIT(str(folder), delta=0.1, only="lora_B", digest=rule.digest)
    assert sweep(f"EDIT(..., path={str(folder)!r})", 9) == list(EDIT.sweep(9, path=str(folder)))
    write_map(tmp_path, UpdateMap({"first": torch.ones(2, 2)}, "tensors:toy", 1))
    with pytest.raises(CdlmError, match=f"set for the map {rule.digest}, and .* has "):
        EDIT(str(tmp_path), digest=rule.digest)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"delta": -1.0}, "delta >= 0"), ({"span": 0}, "span >= 1"), ({"variant": "both"}, "one of code, paper"),
    ({"required": 7}, "required <= 6"), ({"polish": -1}, "polish >= 0"), ({"only": "o_proj"}, "holds 'o_proj'"),
    ({"variant": "paper", "polish": 1}, "variant='code' for polish"), ({"delta": math.nan}, "delta >= 0"),
    ({"variant": "paper", "first_span": 3}, "variant='code' for first_span"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "why"), MISTAKES, ids=str)
def test_a_bad_setting_is_one_line(folder: Path, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(CdlmError, match=why) as raised:
        EDIT(str(folder), **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    ["nothing", "vectors", "integers", "no weights", "another version", "nan", "cut", "no columns", "many steps"],
)
def test_a_file_that_is_no_map_is_one_line(folder: Path, tmp_path: Path, damage: str) -> None:
    made = {"first": torch.ones(3, 2)}
    about = {"cdlm_update_map": "1", "weights": "tensors:x", "steps": "3"}
    if damage == "vectors":
        made = {"first": torch.ones(3)}
    elif damage == "no columns":
        made = {"first": torch.ones(3, 0)}
    elif damage == "many steps":
        about["steps"] = 5000 * "9"
    elif damage == "integers":
        made = {"first": torch.ones(3, 2, dtype=torch.int64)}
    elif damage == "no weights":
        del about["weights"]
    elif damage == "another version":
        about["cdlm_update_map"] = "2"
    elif damage == "nan":
        made["first"][0, 0] = math.nan
    if damage != "nothing":
        write_tensors(tmp_path / FILE, specs_of(made), {n: (lambda v=v: v) for n, v in made.items()}, about)
    if damage == "cut":
        (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-4])
    with pytest.raises(CdlmError) as raised:
        EDIT(str(tmp_path))
    assert "train" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_a_map_that_does_not_fit_its_modules_is_one_line(tmp_path: Path, variant: Any) -> None:
    model = masked_with_tokenizer()
    for name, rows, why in (
        ("blocks.0.qkv", 5, "has 5 features of blocks.0.qkv, which gives 48"),
        ("blocks", 5, "not called"),
    ):
        write_map(tmp_path, UpdateMap({name: torch.ones(rows, 2)}, model.need_fingerprint(), 1))
        with pytest.raises(CdlmError, match=why) as raised:
            cdlm.generate(model, n=1, halt=EDIT(str(tmp_path), variant))
        assert "\n" not in str(raised.value)


def test_it_is_refused_where_it_cannot_look(folder: Path) -> None:
    rule, paper = EDIT(str(folder)), EDIT(str(folder), "paper")
    model = masked_with_tokenizer()
    for one in (rule, paper | Patience(3)):
        with pytest.raises(CdlmError, match=r"has no module 'first', whose output the rule reads: load the adapter"):
            Session(model, model.sampling).with_criterion(one)
        assert "has no module" in Session(model, model.sampling).refuses(one)
        continuous = with_tokenizer()
        with pytest.raises(CdlmError, match=r"activations|signal"):
            Session(continuous, continuous.sampling).with_criterion(one)
    model.network.add_module("first", nn.Identity())
    model.network.add_module("second", nn.ModuleDict({"lora_B": nn.ModuleDict({"default": nn.Identity()})}))
    with pytest.raises(CdlmError, match=r"was made with other weights than these: load the adapter beside it"):
        Session(model, model.sampling).with_criterion(rule)
    with pytest.raises(CdlmError, match="leave out the cache"):
        UnmaskingLoop(Watched(), *unmasking(LLaDA(16, block=8), paper, cache="dual"), 8)


def test_recordings_hold_no_activations(folder: Path) -> None:
    kept = recording(LLaDA(8), 0.0)
    paper = EDIT(str(folder), "paper")
    with pytest.raises(CdlmError, match="other weights"):
        check_replayable(kept, paper)
    write_map(folder, UpdateMap(read_map(folder)[0].directions, kept.weights, 7))
    for rule in (EDIT(str(folder), "paper"), EDIT(str(folder))):
        with pytest.raises(CdlmError, match="run it live, with cdlm sample --halt"):
            check_replayable(kept, rule)
    check_recorded([EDIT(str(folder), "paper"), EDIT(str(folder))])  # they are always run
    with pytest.raises(CdlmError, match="reads activations, which transformers' loop does not give"):
        for_transformers(EDIT(str(folder), "paper"))


def test_the_text_of_a_mistake_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match=r"has no update_map.safetensors: train an adapter with cdlm train"):
        parse_criterion(f"EDIT({str(tmp_path)!r})")
