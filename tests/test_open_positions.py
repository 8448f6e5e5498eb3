"""Logits are computed of those positions alone that a step can decide or a signal reads, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked_toys import MASK, PLAIN, SHIFTED, VOCAB, Bag, Toy
from setups import unmasking
from test_masked_pretrained import ARRAYS, MODELS, case
from test_own_rules import Confident
from torch import Tensor

import cdlm
from cdlm.core.errors import CdlmError
from cdlm.core.trees import take
from cdlm.halting import KL, Criterion, Entropy, Full, JoT, Never, Patience, Prophet, SchED
from cdlm.masked.model import Constants, Function
from cdlm.masked.sampler import UnmaskingLoop
from cdlm.masked.system import Masked
from cdlm.policies.adjust import Adjust
from cdlm.policies.confidence import Threshold
from cdlm.policies.core import CORE
from cdlm.policies.dream import Dream
from cdlm.policies.editing import Editing
from cdlm.policies.entropy import EntropyBound
from cdlm.policies.gaussian import Gaussian
from cdlm.policies.guided import Guided
from cdlm.policies.klass import KLASS
from cdlm.policies.llada import LLaDA
from cdlm.policies.mutual import Mutual
from cdlm.policies.policy import Policy, enter
from cdlm.sampling.requests import canvases
from cdlm.sampling.texts import Special

PROMPTS = [[3, 4], [5, 6, 7, 8], [9]]
LENGTH = 8
POLICIES: tuple[Policy, ...] = (
    LLaDA(8), LLaDA(4, block=4), LLaDA(8, eos_last=True), Dream(8), Dream(8, top_p=0.9, alg_temp=0.5),
    Threshold(0.4, block=4), EntropyBound(0.5), KLASS(0.3, 1.0), Mutual(0.3, 2, 0.5),
)  # fmt: skip
RULES: tuple[Criterion, ...] = (Full(), Never(), Patience(2), Entropy(0.5), KL(0.05), Prophet(), SchED(), JoT())
both_kinds = pytest.mark.parametrize("constants", [PLAIN, SHIFTED], ids=["plain", "shifted"])


class Asked:
    """A function of tokens that notes which positions it was asked for."""

    def __init__(self, constants: Constants):
        self.toy, self.seen = Toy(constants), list[list[int]]()

    def whole(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        return self.toy.logits(tokens, valid)

    def some(self, tokens: Tensor, valid: Tensor | None, positions: Tensor) -> Tensor:
        self.seen.append(positions.tolist())
        return self.toy.logits(tokens, valid, positions)


@both_kinds
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_function_of_positions_decodes_as_one_of_all(constants: Constants, policy: Policy) -> None:
    asked = Asked(constants)
    for rule in RULES:
        for temperature in (0.0, 0.8):
            settings: dict[str, Any] = {"policy": policy, "halt": rule, "temperature": temperature, "cfg_scale": 0.5}
            one, two = (
                cdlm.decode(function, PROMPTS, LENGTH, constants=constants, record=False, **settings)
                for function in (asked.some, asked.whole)
            )
            assert (one.tokens == two.tokens).all(), (rule, temperature)
            assert one.nfe.tolist() == two.nfe.tolist()


def wanted(policy: Policy, rule: Criterion, constants: Constants = PLAIN, **more: Any) -> list[list[int]]:
    """What is asked for at each step of one row, whose first position to generate is at 2."""
    asked = Asked(constants)
    cdlm.decode(asked.some, [[3, 4]], LENGTH, constants=constants, policy=policy, halt=rule, temperature=0.0, **more)
    return asked.seen


def test_what_is_asked_for() -> None:
    every, blocks = list(range(2, 10)), LLaDA(8, block=4)
    sizes = [
        [len(step) for step in wanted(blocks, rule)] for rule in (Full(), Entropy(1e-9), Prophet(99.0, 99.0, 99.0))
    ]
    assert sizes == [[4, 3, 2, 1] * 2, [8, 7, 6, 5, 4, 3, 2, 1], [8] * 8]
    assert wanted(blocks, Full())[0] == [2, 3, 4, 5]
    assert wanted(blocks, Entropy(1e-9))[0] == every
    assert wanted(Dream(8), Full(), SHIFTED)[0] == list(range(1, 9))  # the position before each
    asked = Asked(PLAIN)
    cdlm.decode(asked.some, [[3, 4]], LENGTH, constants=PLAIN, policy=LLaDA(8), halt=Full(), cfg_scale=1.0)
    assert asked.seen[0] == [*every, *(10 + place for place in every)]  # those of the call that sees no prompt as well


def test_a_position_that_nothing_stands_before_keeps_its_own() -> None:
    asked = Asked(SHIFTED)
    cdlm.decode(asked.some, [[None, 3]], 2, constants=SHIFTED, policy=Dream(), halt=Full())
    assert asked.seen[0] == [0, 1, 2]


@both_kinds
def test_a_rule_may_sum_over_all_positions_what_it_masks(constants: Constants) -> None:
    """The rule of the README, beside the same one of the package: what is given must not turn its sums into NaN."""
    model = Toy(constants)
    for nats in (0.5, 1.0, 1.5, 2.0):
        own, ours = (cdlm.decode(model, PROMPTS, LENGTH, halt=rule(nats)) for rule in (Confident, Entropy))
        assert own.nfe.tolist() == ours.nfe.tolist()


def test_what_else_is_read_changes_no_signal() -> None:
    """A rule sees the same whether or not another one reads the logits, at what is given and decided too."""

    class Reads(Full):
        def __init__(self, *needs: str):
            object.__setattr__(self, "needs", frozenset(needs))

    names = ("tokens", "entropy", "switches", "mean_kl", "max_jsd", "min_confidence", "span_margin")
    runs = [
        list(UnmaskingLoop(Toy(), *unmasking(LLaDA(4), Reads(*names, *more)), 2).steps(canvases([[3, 4], [5]], 4)))
        for more in ((), ("logits",))
    ]
    for one, two in zip(*runs, strict=True):
        for name in names:
            over = one.state.open if name == "entropy" else ...
            assert torch.equal(one.state.signals[name][over], two.state.signals[name][over]), name


def test_masks_that_are_written_over_a_prompt_are_filled() -> None:
    """The quirk of Dream's sampler, where a rule reads what is decided too."""
    policy, prompts = Dream(4, eps=1e-3, block=1, pooled=True), [[3, None, 2, None, None], [5, 2, 0, 2]]
    for seed in range(20):
        samples = cdlm.decode(Toy(seed=seed), prompts, 2, policy=policy, halt=Prophet(99.0, 99.0, 99.0))
        assert not (samples.tokens == MASK).any()


def test_a_rule_that_reads_the_logits_has_them_all() -> None:
    class Reads(Full):
        needs = frozenset({"logits"})

    loop = UnmaskingLoop(Toy(), *unmasking(LLaDA(8), Reads()), 2)
    for step in loop.steps(canvases([[3, 4]], 8)):
        assert step.state.signals["logits"].shape == (1, 10, VOCAB)


@both_kinds
def test_a_step_that_ends_the_row_fills_what_is_open(constants: Constants) -> None:
    """The last step of a budget decides positions that the policy did not choose from."""
    samples = cdlm.decode(
        Asked(constants).some, PROMPTS, 8, constants=constants, policy=Threshold(1.0, block=4, calls=1), halt=Full()
    )
    assert not (samples.tokens == MASK).any()


@pytest.mark.parametrize("family", ["llada", "Dream"])
@pytest.mark.parametrize("name", ["full", "left_pad"])
def test_foreign_models_give_the_logits_of_positions(family: str, name: str) -> None:
    tokens, valid = case(family, name)
    model, some = MODELS[family], torch.tensor([3, 1, tokens.numel() - 1, 3])
    whole = model.logits(tokens, valid)
    torch.testing.assert_close(model.logits(tokens, valid, some), whole.flatten(0, 1)[some])
    logits, cache = model.fill(tokens, valid, some)
    torch.testing.assert_close(logits, whole.flatten(0, 1)[some])
    slots = torch.arange(2, 6).expand(len(tokens), 4)
    part = model.partial(tokens.gather(1, slots), slots, cache, valid, torch.tensor([1, 6]))
    torch.testing.assert_close(part, torch.stack([whole[0, 3], whole[1, 4]]))
    assert model.logits(tokens, valid, some[:0]).shape == (0, whole.shape[-1])


def test_our_own_model_gives_the_logits_of_positions() -> None:
    torch.manual_seed(0)
    model = Masked(width=32, depth=2, heads=2).build(40, Special(39, 0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        tokens, some = torch.randint(0, 39, (3, 7)), torch.tensor([20, 0, 9])
        torch.testing.assert_close(model.logits(tokens, None, some), model.logits(tokens).flatten(0, 1)[some])


def test_positions_of_padded_rows_of_llada_count_from_the_first_real_token() -> None:
    tokens, valid = case("llada", "left_pad")
    assert valid is not None
    for row in range(len(tokens)):
        bare = MODELS["llada"].logits(tokens[row, valid[row]][None])[0]
        torch.testing.assert_close(MODELS["llada"].logits(tokens, valid)[row, valid[row]], bare)
    torch.testing.assert_close(
        MODELS["llada"].logits(tokens, valid)[valid], ARRAYS["llada"]["left_pad.logits"][valid], rtol=1e-4, atol=1e-4
    )


def test_a_function_that_ignores_the_positions_is_told() -> None:
    def ignores(tokens: Tensor, valid: Tensor | None, positions: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, VOCAB)

    with pytest.raises(
        CdlmError, match=r"asked for the logits of 8 positions, expected \[8, vocabulary\], got \[1, 9, 12\]"
    ):
        cdlm.decode(ignores, [[3]], 8, constants=PLAIN)


UNCALLABLE: dict[str, Callable[..., Any]] = {
    "too many positional arguments": lambda tokens: tokens,
    "missing a required argument: 'places'": lambda tokens, mask, places: tokens,
    "positional.only": lambda tokens, mask, positions, /: tokens,
}


@pytest.mark.parametrize("says", UNCALLABLE)
def test_a_function_that_cannot_be_called_is_refused_before_it_is(says: str) -> None:
    with pytest.raises(CdlmError, match=rf"logits_fn\(tokens, attention_mask\), .* this one cannot be: .*{says}"):
        cdlm.decode(UNCALLABLE[says], [[1]], 4, constants=Constants(0))


def test_a_function_may_give_half_precision_and_keeps_its_own_logits() -> None:
    kept = torch.zeros(1, 9, VOCAB, dtype=torch.bfloat16)
    given = Function(lambda tokens, valid: kept, PLAIN)
    assert given.logits(torch.zeros(1, 9, dtype=torch.int64), None, torch.tensor([2])).dtype == torch.float32
    whole = Function(lambda tokens, valid: kept.float(), PLAIN).logits(torch.zeros(1, 9, dtype=torch.int64))
    whole.fill_(3)
    assert (kept == 0).all()


BLOCKED: tuple[Policy, ...] = (
    *POLICIES, Threshold(0.4, block=2, calls=1), LLaDA(12, block=4), Gaussian(6, block=2, first=4, first_steps=2),
    CORE(8, block=4, every=1, begin=0.5, end=1.0, protected=0, confidence=0.0), Editing(0.5, 0.2, passes=2, block=4),
    Adjust("layer", 3, block=4), Guided(Bag(), "speculative", block=4),
)  # fmt: skip


@pytest.mark.parametrize("policy", BLOCKED, ids=repr)
def test_the_host_knows_which_rows_leave_their_block(policy: Policy) -> None:
    """`_moves` says on the host what `enter` says on the device."""
    for rule in (Full(), Never()):
        loop = UnmaskingLoop(Toy(), *unmasking(policy, rule), 3)
        live = loop.admit(canvases(PROMPTS, LENGTH), None)
        while len(live.row):
            finished, carried = loop.step(live)
            carried = take(carried, torch.tensor(finished.counts.staying, dtype=torch.int64))
            moved = enter(policy, carried.plan, carried.open, rule.waits).block != carried.plan.block
            assert loop._moves(carried.known) == moved.tolist()
            live = loop.advance(carried) if len(carried.row) else carried
