"""Guided diffusion: against one written draft by draft, its laws, and guides of Hugging Face on foreign checkpoints."""

import math
import pickle
import socket
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_toys import random_judge, tiny_gpt2
from foreign import copy_of, write_tokenizer
from masked_toys import EOS, EOT, MASK, PLAIN, SHIFTED, VOCAB, Bag, Scripted, Toy, decoded
from setups import unmasking
from torch import Tensor

import cdlm
from cdlm.api import decode
from cdlm.continuous.sampler import Diffusion
from cdlm.core.errors import CdlmError
from cdlm.masked.model import Constants
from cdlm.models.causal import Causal
from cdlm.policies import parse_policy
from cdlm.policies.guided import ACCEPTS, Guided
from cdlm.policies.policy import Choice, Policy, View, proposal
from cdlm.policies.quotas import best
from cdlm.sampling.requests import canvases

PROMPTS = [[3, 4], [5], [], [6, None, 7], [8, 3, 9, 4]]


def flat(tokens: Tensor, positions: Tensor) -> Tensor:
    """A guide to which all tokens are alike."""
    return torch.zeros(len(positions), VOCAB)


def never(tokens: Tensor, positions: Tensor) -> Tensor:
    """A guide that expects the mask, which nobody proposes."""
    return torch.nn.functional.one_hot(torch.full_like(positions, MASK), VOCAB) * 50.0


@dataclass(frozen=True)
class LeftToRight(Policy):
    """One position a call, the first."""

    def choose(self, view: View) -> Choice:
        return Choice(best(-view.place.float(), view.candidates, torch.ones_like(view.row)), proposal(view)[0])


def expects(policy: Guided, logits: Tensor, draft: int) -> bool:
    """Whether a draft is accepted."""
    p = logits.softmax(-1)
    order = sorted(range(VOCAB), key=lambda t: -float(p[t]))
    match policy.accept:
        case "deterministic":
            return draft == order[0]
        case "topk":
            return draft in order[: policy.k or 5]
        case "topk_relative":
            return draft in order[: policy.k or 2] and float(p[draft]) >= policy.rho * float(p.max())
        case "dynamic_threshold":
            return float(p[draft]) > policy.chance
        case _:
            before = sum(float(p[t]) for t in order[: order.index(draft)])
            return draft in order[: policy.k or 5] or float(p[draft]) > 0.05 or before < 0.95


def by_hand(model: Toy, guide: Bag, policy: Guided, prompt: list[int | None], n: int) -> tuple[list[int], int, int]:
    """A row, draft by draft: tokens, calls of the model and of the guide."""
    canvas = [MASK if token is None else token for token in prompt] + [MASK] * n
    told = max((i for i, token in enumerate(canvas) if token != MASK), default=-1)
    begin = canvas.index(MASK)
    size, nfe, asked = policy.block or len(canvas), 0, 0
    while MASK in canvas:
        logits = model.logits(torch.tensor([canvas]))[0]
        logits[:, MASK] = -math.inf
        nfe += 1
        shift = model.constants.shift
        drafts = [int(logits[max(0, i - 1) if shift else i].argmax()) for i in range(len(canvas))]
        first = (canvas.index(MASK) - begin) // size
        here = [i for i, token in enumerate(canvas) if token == MASK and (i - begin) // size <= first]
        text, place, rejected = list(canvas), 0, False
        for place, i in enumerate(here):
            asked += place % policy.verify == 0
            before = [EOS, *text[:i]] if here[0] == 0 == canvas.index(MASK) else text[:i]
            found = guide(torch.tensor([before]), torch.tensor([len(before) - 1]))[0]
            rejected = not expects(policy, found, drafts[i])
            token = drafts[i]
            if rejected and policy.mode == "speculative":
                found[MASK] = -math.inf
                token = int(found.argmax())
            if not rejected or policy.mode == "speculative" or place == 0:
                text[i] = token
            if rejected or (drafts[i] in (EOS, EOT) and i > told):
                break
        ends = [i for i in here[: place + 1] if text[i] in (EOS, EOT) and i > told]
        if ends:
            text[ends[0] :] = [text[ends[0]]] * (len(text) - ends[0])
        canvas = text
    return canvas, nfe, asked


SURE: list[Any] = [accept for accept in ACCEPTS if accept != "original"]


@pytest.mark.parametrize("mode", ["assisted", "speculative"])
@pytest.mark.parametrize("accept", SURE)
def test_it_is_what_is_written_draft_by_draft(mode: Any, accept: Any) -> None:
    for seed, constants, verify, block in ((0, PLAIN, 32, None), (1, SHIFTED, 2, None), (2, PLAIN, 3, 4)):
        policy = Guided(Bag(seed), mode, accept, verify=verify, block=block, chance=0.2)
        prompts = [prompt for prompt in PROMPTS if block is None or None not in prompt]
        samples = decode(Toy(constants, seed), prompts, 10, policy=policy)
        for i, prompt in enumerate(prompts):
            tokens, nfe, asked = by_hand(Toy(constants, seed), Bag(seed), policy, prompt, 10)
            assert samples.tokens[i][samples.valid[i]].tolist() == tokens
            assert (samples.nfe[i], samples.counted[i]) == (nfe, {"guide_calls": asked})


def test_something_is_accepted_and_something_rejected_in_these_tests() -> None:
    modes: tuple[Any, ...] = ("assisted", "speculative")
    for mode in modes:
        for accept in SURE:
            rows = [
                decode(Toy(seed=s), [[3]], 10, policy=Guided(Bag(s), mode, accept), halt="Full()") for s in range(4)
            ]
            assert 1 < sum(int(row.nfe[0]) for row in rows) < 40, (mode, accept)


MODES: list[Any] = ["assisted", "speculative"]
HOW: list[Any] = list(ACCEPTS)
EACH = [Guided(Bag(4), mode, accept, verify=3) for mode in MODES for accept in HOW]


@pytest.mark.parametrize("policy", [*EACH, replace(EACH[1], block=4)], ids=lambda p: f"{p.mode} {p.accept} {p.block}")
def test_a_batch_is_its_rows_alone_and_calls_are_counted_as_they_are_made(policy: Guided) -> None:
    for temperature, constants in ((0.0, SHIFTED), (0.7, PLAIN)):
        requests, guide = canvases(PROMPTS, 8), Bag(4)
        policy = replace(policy, guide=guide)
        model = Toy(constants, seed=3)
        together = decoded(model, unmasking(policy, temperature=temperature), requests, 4)
        for request in requests:
            alone = decoded(model, unmasking(policy, temperature=temperature), [request], 1)[request.index]
            assert alone.canvases == together[request.index].canvases
            assert alone.result == together[request.index].result
        guide.rows = 0
        samples = decode(model, PROMPTS, 8, n=2, policy=policy, temperature=temperature, batch_size=3)
        computed = samples.select(np.array(samples.originals))
        assert sum(row["guide_calls"] for row in computed.rows()) == guide.rows
        assert int(computed.nfe.sum()) <= guide.rows


@pytest.mark.parametrize("mode", ["assisted", "speculative"])
def test_a_guide_that_accepts_all_ends_in_one_call(mode: Any) -> None:
    """All tokens are among the likeliest of all tokens."""
    for guide in (Bag(), flat):
        policy = Guided(guide, mode, "topk", k=VOCAB, verify=4)
        samples = decode(Toy(), [[3, 4]], 10, policy=policy, constants=None)
        plain = decode(Toy(), [[3, 4]], 10, policy="Threshold(0.0)")
        ends = [i for i, token in enumerate(plain.tokens[0]) if token in (EOS, EOT)]
        upto = ends[0] if ends else len(plain.tokens[0])
        assert samples.nfe.tolist() == [1]
        assert samples.tokens[0][:upto].tolist() == plain.tokens[0][:upto].tolist()
        scored = min(10, upto + 1 - 2)
        assert samples.counted == [{"guide_calls": -(-scored // 4)}]


@pytest.mark.parametrize("constants", [PLAIN, SHIFTED, Constants(MASK, EOS)], ids=["plain", "shifted", "no turns"])
def test_a_guide_that_rejects_all_is_left_to_right_one_token_a_call(constants: Constants) -> None:
    for accept in ("deterministic", "topk_relative", "dynamic_threshold"):
        policy, requests = Guided(never, accept=accept), canvases(PROMPTS, 8)
        rows = decoded(Toy(constants, 2), unmasking(policy), requests)
        plain = decoded(Toy(constants, 2), unmasking(LeftToRight()), requests)
        for index, row in rows.items():
            # Up to the end of the text, behind which all is filled.
            steps = len(row.canvases)
            assert row.canvases[: steps - 1] == plain[index].canvases[: steps - 1]
            assert steps == plain[index].settled


def greedy(guide: Bag, prompt: list[int], n: int) -> list[int]:
    """What the guide writes by itself."""
    text = list(prompt)
    for _ in range(n):
        logits = guide(torch.tensor([text or [EOS]]), torch.tensor([max(0, len(text) - 1)]))[0]
        logits[MASK] = -math.inf
        text.append(int(logits.argmax()))
        if text[-1] in (EOS, EOT):
            break
    return text + text[-1:] * (len(prompt) + n - len(text))


def test_a_speculative_guide_that_accepts_its_likeliest_writes_its_own_text() -> None:
    """Whatever the model proposes: that decides how many calls it takes."""
    for seed in range(4):
        samples = decode(Toy(seed=seed), [[3, 4], [9]], 8, policy=Guided(Bag(seed + 1), "speculative"))
        for i, prompt in enumerate(([3, 4], [9])):
            assert samples.tokens[i][samples.valid[i]].tolist() == greedy(Bag(seed + 1), prompt, 8)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_speculative_guide_that_accepts_at_random_draws_from_itself(temperature: float) -> None:
    """Rejected drafts are replaced by another token, so that both together are a draw of the guide."""
    count, guide = 1500, Bag(5)
    policy = Guided(guide, "speculative", "original")
    samples = decode(Toy(Constants(MASK), 1), [[3]], 2, n=count, policy=policy, temperature=temperature, batch_size=750)
    seen = Counter(tuple(row[1:].tolist()) for row in samples.tokens)
    first = guide(torch.tensor([[3]]), torch.tensor([0]))[0].softmax(-1)
    error, cells = 0.0, 0
    for a in range(VOCAB - 1):
        second = guide(torch.tensor([[3, a]]), torch.tensor([1]))[0].softmax(-1)
        for b in range(VOCAB - 1):
            # The guide gives the mask some probability too, which nobody writes: little, and it falls to the others.
            expected = count * float(first[a] / (1 - first[MASK]) * second[b] / (1 - second[MASK]))
            if expected >= 8:
                error, cells = error + (seen[(a, b)] - expected) ** 2 / expected, cells + 1
    assert cells > 20
    assert error < cells + 4 * math.sqrt(2 * cells)


def test_looser_settings_commit_more_at_once() -> None:
    def first(seed: int, **settings: Any) -> int:
        row = decoded(Toy(seed=seed), unmasking(Guided(Bag(seed), **settings)), canvases([[3]], 10), 1)[0]
        return sum(token != MASK for token in row.canvases[0])

    for seed in range(3):
        by_k = [first(seed, accept="topk", k=k) for k in (1, 2, 3, 5, VOCAB)]
        assert by_k == sorted(by_k)
        assert by_k[0] == first(seed)
        by_chance = [first(seed, accept="dynamic_threshold", chance=c) for c in (0.9, 0.3, 0.1, 0.03, 0.0)]
        assert by_chance == sorted(by_chance)
        by_rho = [first(seed, accept="topk_relative", k=5, rho=rho) for rho in (1.0, 0.5, 0.1, 0.0)]
        assert by_rho == sorted(by_rho)
        assert by_rho[0] == by_k[0]
        assert by_rho[-1] == by_k[3]


def told(*want: int) -> Scripted:
    """A model that is sure of these tokens."""
    return Scripted(lambda tokens: torch.nn.functional.one_hot(torch.tensor([want] * len(tokens)), VOCAB).double() * 20)


def test_a_text_that_ends_is_filled_and_its_rest_is_not_asked_for() -> None:
    policy = Guided(flat, accept="topk", k=VOCAB, verify=2)
    samples = decode(told(3, 4, EOT, 5, 6, 7, 8, 9), [[3]], 7, policy=policy)
    assert samples.tokens.tolist() == [[3, 4, EOT, EOT, EOT, EOT, EOT, EOT]]
    assert (samples.nfe.tolist(), samples.counted) == ([1], [{"guide_calls": 1}])
    # One in a hole is a token like any other: the text goes on behind it.
    holes = decode(told(3, EOS, 5, 6, EOS, 8), [[3, None, 5]], 3, policy=policy)
    assert holes.tokens.tolist() == [[3, EOS, 5, 6, EOS, EOS]]
    # And one in a model whose texts do not end.
    endless = told(3, 4, EOS, 5, 6, 7)
    endless.ends = False
    assert decode(endless, [[3]], 5, policy=policy).tokens.tolist() == [[3, 4, EOS, 5, 6, 7]]
    # A first draft that is rejected may end a text too.
    assert decode(told(3, EOS, 5), [[3]], 2, policy=Guided(never)).tokens.tolist() == [[3, EOS, EOS]]


def test_the_guide_reads_tokens_of_its_own() -> None:
    """Tokens 3 and 4 are the other way round for it, and the end of a text is its token 9."""
    swap = {3: 4, 4: 3, EOS: 9}

    def renamed(tokens: Tensor, positions: Tensor) -> Tensor:
        back = torch.arange(VOCAB)
        back[[3, 4, 9]] = torch.tensor([4, 3, EOS])
        logits = guide(back[tokens], positions)
        logits[:, [3, 4, 9]] = logits[:, [4, 3, EOS]]
        return logits

    guide = Bag(7)
    for mode in ("assisted", "speculative"):
        for prompts in ([[3, 4], []], [[5, 3]]):
            plain = decode(Toy(seed=2), prompts, 8, policy=Guided(guide, mode, "topk", k=2))
            policy = Guided(renamed, mode, "topk", k=2, ids=tuple(swap.items()))
            samples = decode(Toy(seed=2), prompts, 8, policy=policy)
            same = (plain.tokens == samples.tokens).all(1) | (plain.tokens == 9).any(1)  # which is EOS to the guide
            assert same.all()


# --- guides of Hugging Face ---


def guide_folder(folder: Path, family: str, seed: int = 0, **changes: int) -> Path:
    """A random GPT-2 with the tokenizer of a tiny checkpoint."""
    tiny_gpt2(seed, vocab_size=128, **changes).save_pretrained(folder)
    made = copy_of(family, folder.parent / f"{folder.name}-{family}")
    write_tokenizer(made, family)
    cdlm.load(str(made)).need_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_a_guide_of_hugging_face_leads_a_foreign_checkpoint(family: str, tmp_path: Path) -> None:
    write_tokenizer(copy_of(family, tmp_path / "model"), family)
    folder = guide_folder(tmp_path / "guide", family)
    model: Any = cdlm.load(str(tmp_path / "model"))
    guide = Causal.load(str(folder))
    policy = f"Guided({str(folder)!r}, 'speculative', verify=4)"
    prompts = ["the cat", "the dog sat on the"]
    samples = cdlm.generate(model, prompts, new_tokens=8, policy=policy, temperature=0.0)
    for row in samples.rows():
        assert row["guide_calls"] >= row["nfe"] >= 1
    ends = model.constants.end_ids
    for tokens, real, shown in zip(samples.tokens, samples.valid, samples.shown, strict=True):
        text = torch.tensor(tokens[real])[None]
        logits = guide.network(input_ids=text).logits[0]
        logits[:, model.mask_id] = -math.inf
        length = text.shape[1]
        last = min((i for i in range(length - 8, length) if int(text[0, i]) in ends), default=length - 1)
        for place in range(text.shape[1] - 8, last + 1):
            assert int(logits[place - 1].argmax()) == int(text[0, place])
        assert shown.any()


def test_a_policy_with_a_guide_is_written_and_read(tmp_path: Path) -> None:
    random_judge().save(tmp_path / "judge")
    policy = Guided(str(tmp_path / "judge"), accept="topk", ids=((3, 4),))
    for again in (parse_policy(repr(policy)), pickle.loads(pickle.dumps(policy)), replace(policy)):
        assert again == policy
        assert hash(again) == hash(policy)
    assert str(tmp_path / "judge") in repr(policy)
    random_judge(seed=1).save(tmp_path / "judge")
    with pytest.raises(CdlmError, match="was set for the guide tensors:"):
        parse_policy(repr(policy))
    assert Guided(str(tmp_path / "judge"), accept="topk", ids=((3, 4),)) != policy


def test_logits_of_some_places_are_those_of_all(tmp_path: Path) -> None:
    random_judge().save(tmp_path / "judge")
    guide = Causal.load(str(tmp_path / "judge"))
    tokens = torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(0))
    some = torch.tensor([2, 3, 12, 20])
    whole = guide.network(input_ids=tokens).logits.flatten(0, 1)
    torch.testing.assert_close(guide(tokens, some), whole[some])
    assert guide(tokens, some).dtype == torch.float32


# --- bad input, each refused in one line ---


def refused(folder: Path, guide: Path, new_tokens: int = 8, **settings: Any) -> str:
    def run() -> None:
        policy = Guided(str(guide), **settings)
        cdlm.generate(cdlm.load(str(folder)), ["the cat"], new_tokens=new_tokens, policy=policy)

    with pytest.raises(CdlmError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_guide_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("something is fetched"))
    write_tokenizer(copy_of("llada", tmp_path / "model"), "llada")
    other = guide_folder(tmp_path / "other", "Dream")
    own = guide_folder(tmp_path / "own", "llada")
    short = guide_folder(tmp_path / "short", "llada", n_positions=8)
    random_judge().save(tmp_path / "bytes")
    assert "has another tokenizer than model: token 121" in refused(tmp_path / "model", other)
    assert "has another tokenizer than model" in refused(tmp_path / "model", tmp_path / "bytes")
    assert "reads 8: take fewer new_tokens" in refused(tmp_path / "model", short)
    assert "ids name token 500" in refused(tmp_path / "model", own, ids=((3, 500),))
    assert "no config.json" in refused(tmp_path / "model", tmp_path / "model" / "..")
    assert "expected a causal language model" in refused(tmp_path / "model", Path("nobody/nothing"))
    assert "there is no folder" in refused(tmp_path / "model", tmp_path / "nothing")
    assert "expected a causal language model" in refused(tmp_path / "model", tmp_path / "model")


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"guide": Bag}, "Guided needs a guide"),
        ({"mode": "both"}, "assisted, speculative"),
        ({"accept": "all"}, "deterministic, topk"),
        ({"k": 0}, "k >= 1"),
        ({"verify": 0}, "verify >= 1"),
        ({"rho": 1.5}, "0 <= rho <= 1"),
        ({"chance": -0.5}, "0 <= chance <= 1"),
        ({"block": 0}, "block >= 1"),
        ({"ids": ((-1, 2),)}, "pairs of tokens"),
        ({"digest": "tensors:0"}, "has no weights"),
    ],
)
def test_settings_out_of_range(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(CdlmError) as caught:
        Guided(**{"guide": flat, **settings_})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["Guided(5)", "Guided()", "Guided", "Guided(None)", "Guided('x', ids=((1,),))"])
def test_texts_that_are_no_guide(text: str) -> None:
    with pytest.raises(CdlmError, match="Guided") as caught:
        parse_policy(text)
    assert "\n" not in str(caught.value).strip() or "annotations" in str(caught.value)  # as the tests check types


def test_what_a_guide_must_give() -> None:
    def wrong(made: Any) -> str:
        with pytest.raises(CdlmError) as caught:
            decode(Toy(), [[3]], 4, policy=Guided(lambda tokens, places: made(places)))
        return str(caught.value)

    assert "gives logits [places, vocabulary]" in wrong(lambda places: torch.zeros(VOCAB))
    assert "got None" in wrong(lambda places: None)
    assert "not numbers" in wrong(lambda places: torch.full((len(places), VOCAB), math.nan))
    with pytest.raises(CdlmError, match="give a prompt, or Constants with an eos_id"):
        decode(Toy(Constants(MASK)), [[]], 4, policy=Guided(flat))
    with pytest.raises(CdlmError, match="makes sense for masked models alone"):
        Diffusion(commit=Guided(flat))
