"""Policies that take back what they have committed: CORE against one written step by step, Editing, and their laws."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_toys import EOS, MASK, PLAIN, SHIFTED, VOCAB, Row, Scripted, Toy, decoded
from setups import unmasking
from toys import masked_with_tokenizer

from cdlm.api import decode
from cdlm.cli import main as cli
from cdlm.core.errors import CdlmError
from cdlm.halting import Full, Patience
from cdlm.halting.rules import Entropy, JoT
from cdlm.masked.sampler import Unmasking
from cdlm.policies import parse_policy
from cdlm.policies.confidence import Threshold
from cdlm.policies.core import CORE
from cdlm.policies.editing import Editing
from cdlm.policies.llada import LLaDA
from cdlm.policies.policy import Policy
from cdlm.policies.quotas import even
from cdlm.sampling.requests import canvases

OFTEN = CORE(6, every=1, begin=0.0, end=1.0, candidates=4, replaced=2, protected=0, confidence=0.0)
REVISING = [
    OFTEN,
    replace(OFTEN, block=6, steps=6),
    replace(OFTEN, pick="margin"),
    replace(OFTEN, pick="random"),
    CORE(12, every=2, candidates=3, protected=2, confidence=0.1),
    Editing(0.5, 0.2),
    Editing(0.5, 0.2, passes=0),
    Editing(0.3, 0.1, passes=3, block=4),
]
PROMPTS = [[3, 4], [5], [], [6, None, 7]]


def revised(row: Row) -> int:
    """How often a token was replaced or taken back."""
    pairs = zip(row.canvases, row.canvases[1:], strict=False)
    return sum(old not in (new, MASK) for before, after in pairs for old, new in zip(before, after, strict=True))


def core_by_hand(model: Toy, policy: CORE, prompt: list[int], n: int) -> tuple[list[int], int]:
    """A row in one block, step by step, as the paper's code does it: final tokens and calls."""
    canvas = torch.tensor([prompt + [MASK] * n])
    calls, steps = 0, policy.steps
    assert steps is not None
    for i in range(steps):
        if not bool((canvas == MASK).any()):
            break
        logits = model.logits(canvas)[0]
        logits[:, MASK] = -math.inf
        calls += 1
        p = logits.softmax(-1)
        quota = int(even(torch.tensor([n]), torch.tensor([steps]), torch.tensor([i])))
        open_ = [j for j in range(len(prompt), len(prompt) + n) if int(canvas[0, j]) == MASK]
        chosen = sorted(open_, key=lambda j: -float(p[j].max()))[:quota]
        new = {j: int(p[j].argmax()) for j in chosen}
        if i % policy.every == 0 and int(policy.begin * steps) <= i < int(policy.end * steps):
            held = [j for j in range(len(prompt), len(prompt) + n - policy.protected) if int(canvas[0, j]) != MASK]
            two = p.topk(2, -1).values
            doubtful = sorted(held, key=lambda j: float(two[j, 0] - two[j, 1]))[: policy.candidates]
            hidden = canvas.clone()
            hidden[0, doubtful] = MASK
            again = model.logits(hidden)[0]
            again[:, MASK] = -math.inf
            calls += 1
            q = again.softmax(-1)
            worse = {j: float(q[j, canvas[0, j]]) for j in doubtful if int(q[j].argmax()) != int(canvas[0, j])}
            worse = {j: chance for j, chance in worse.items() if float(q[j].max()) >= policy.confidence}
            for j in sorted(worse, key=lambda j: worse[j])[: min(policy.replaced, quota)]:
                new[j] = int(q[j].argmax())
        for j, token in new.items():
            canvas[0, j] = token
    return canvas[0].tolist(), calls


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "policy", [OFTEN, replace(OFTEN, steps=12, protected=3), CORE(12, every=2, confidence=0.2)], ids=repr
)
def test_core_is_what_its_code_does(policy: CORE, seed: int) -> None:
    model = Toy(seed=seed, sway=2.0)
    row = decoded(model, unmasking(policy), canvases([[3, 4]], 12), 1)[0]
    assert (list(row.tokens), row.nfe) == core_by_hand(Toy(seed=seed, sway=2.0), policy, [3, 4], 12)


def test_something_is_revised_in_these_tests() -> None:
    for policy in REVISING:
        rows = [decoded(Toy(seed=s, sway=2.0), unmasking(policy), canvases([[3]], 12), 1)[0] for s in range(8)]
        assert sum(map(revised, rows)) > 0, policy


@pytest.mark.parametrize("constants", [PLAIN, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize("policy", REVISING, ids=repr)
def test_a_batch_is_its_rows_alone(policy: Policy, constants: Any) -> None:
    """Calls are counted as they are made: the toy counts the rows that it is called with."""
    requests = canvases(PROMPTS, 12, 2)
    model = Toy(constants, seed=3, sway=2.0)
    together = decoded(model, unmasking(policy), requests, 8)
    alone = {request.index: decoded(model, unmasking(policy), [request], 1)[request.index] for request in requests}
    two = decoded(model, unmasking(policy), requests, 2)
    for index, row in alone.items():
        assert row.canvases == together[index].canvases == two[index].canvases
        assert row.result == together[index].result == two[index].result


@pytest.mark.parametrize(
    ("policy", "plain"),
    [
        (replace(OFTEN, replaced=0), LLaDA(6)),
        (replace(OFTEN, protected=12), LLaDA(6)),
        (Editing(0.4, 1.0, passes=0), Threshold(0.4)),
        (Editing(0.4, 1.0, passes=0, block=4), Threshold(0.4, block=4)),
    ],
    ids=repr,
)  # fmt: skip
def test_at_its_limit_it_is_the_plain_sampler(policy: Policy, plain: Policy) -> None:
    model = Toy(seed=5, sway=2.0)
    rows, others = (decoded(model, unmasking(one), canvases(PROMPTS, 12), 4) for one in (policy, plain))
    assert [row.tokens for row in rows.values()] == [row.tokens for row in others.values()]
    if policy != replace(OFTEN, protected=12):  # which looks, and finds nothing that it may replace
        assert [row.nfe for row in rows.values()] == [row.nfe for row in others.values()]


def test_the_calls_of_core_are_known_beforehand() -> None:
    """As published: 128 steps, every 8th of those from 32 to 95."""
    model = Toy(seed=1)
    core = decoded(model, unmasking(CORE(128)), canvases([[]], 128), 1)[0]
    assert core.nfe == 128 + 8


def test_editing_goes_over_a_full_block_until_nothing_changes() -> None:
    """Each position wants one more than what stands before it, so that a wrong first one runs through the row."""

    def script(tokens: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.full_like(tokens[:, :1], 3), tokens[:, :-1]], 1)
        want = torch.where(before == MASK, 9, (before + 1) % 9)
        return torch.nn.functional.one_hot(want, VOCAB).float() * 20

    row = decoded(Scripted(script), unmasking(Editing(0.9, 0.9)), canvases([[]], 5), 1)[0]
    assert row.canvases[0] == (4, 9, 9, 9, 9)
    assert row.tokens == (4, 5, 6, 7, 8)
    assert (row.nfe, row.reason) == (6, "full")  # one to fill, four to correct, one that changes nothing
    cut = decoded(Scripted(script), unmasking(Editing(0.9, 0.9, passes=2)), canvases([[]], 5), 1)[0]
    assert (cut.canvases, cut.nfe) == (row.canvases[:3], 3)
    assert row.settled == 5  # when the last token changed


def test_a_text_that_is_reopened_is_settled_later() -> None:
    def script(tokens: torch.Tensor) -> torch.Tensor:
        full = (tokens != MASK).all(1, keepdim=True)
        want = torch.where(full, torch.tensor([[4, EOS, 5]]), torch.tensor([[EOS, 4, 5]]))
        return torch.nn.functional.one_hot(want, VOCAB).float() * 20

    row = decoded(Scripted(script), unmasking(Editing(0.9, 0.9)), canvases([[]], 3), 1)[0]
    assert (row.tokens, row.nfe, row.settled) == ((4, EOS, 5), 3, 2)


@pytest.mark.parametrize("rule", [Patience(1), Entropy(1.0), Full()], ids=repr)
@pytest.mark.parametrize("policy", REVISING, ids=repr)
def test_a_row_that_halts_is_whole(policy: Policy, rule: Any) -> None:
    rows = decoded(Toy(seed=2, sway=2.0), unmasking(policy, criterion=rule), canvases(PROMPTS, 12, 2), 4)
    assert all(MASK not in row.tokens for row in rows.values())


def test_what_was_revised_stands_beside_the_sample() -> None:
    model = Toy(seed=3, sway=2.0)
    samples = decode(model, [[3, 4], [5, 6]], 12, policy=OFTEN)
    rows = decoded(model, unmasking(OFTEN), canvases([[3, 4], [5, 6]], 12), 2)
    assert [row["revised"] for row in samples.rows()] == [revised(row) for row in rows.values()]
    assert samples.select(1 + torch.zeros(1).long().numpy()).rows()[0]["revised"] == revised(rows[1])
    assert "revised" not in decode(model, [[3, 4]], 12, policy=LLaDA(6)).rows()[0]
    mean = sum(map(revised, rows.values())) / 2
    assert repr(samples).splitlines()[0].endswith(f" steps; {mean:.1f} revised")
    assert ";" not in repr(decode(model, [[3, 4]], 12, policy=replace(OFTEN, replaced=0))).splitlines()[0]


def test_the_command_line_says_what_was_revised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked_with_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["--n=2", "--device=cpu", "--temperature=1", f"--out={tmp_path / 'samples.jsonl'}"]
    cli.main(["sample", str(tmp_path / "model"), "--policy=Editing(0.0, 0.0, passes=3)", *arguments])
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    mean = sum(row["revised"] for row in rows) / 2
    assert mean > 0
    assert f"; {mean:.1f} revised" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("policy", [OFTEN, Editing()], ids=repr)
def test_what_needs_tokens_to_stay_is_refused(policy: Policy) -> None:
    with pytest.raises(CdlmError, match="takes back what it has committed, and JoT"):
        decode(Toy(), [[3]], 12, policy=policy, halt=JoT())
    with pytest.raises(CdlmError, match="cannot be recorded: choose another policy"):
        decode(Toy(), [[3]], 12, policy=policy, record=True)
    with pytest.raises(CdlmError, match="decode without a cache"):
        Unmasking(policy, cache="prefix")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CORE(None)", "CORE needs a whole number steps"),
        ("CORE(8, every=0)", "every >= 1"),
        ("CORE(8, begin=2)", "begin"),
        ("CORE(8, pick='best')", "brittle, margin, random"),
        ("Editing(1.5)", "tau"),
        ("Editing(passes=-1)", "passes >= 0"),
    ],
)
def test_settings_out_of_range(text: str, message: str) -> None:
    with pytest.raises(CdlmError, match=message):
        parse_policy(text)
