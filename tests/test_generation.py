"""What `generate` and `decode` promise, on small masked systems with random weights."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from masked_toys import EOS, EOT, MASK, PLAIN, Toy
from toys import masked_with_tokenizer, tokenizer, with_tokenizer

import cdlm
from cdlm.core.errors import CdlmError
from cdlm.masked.system import MaskedDiffusion
from cdlm.sampling.samples import Samples
from cdlm.sampling.texts import shown_of


@pytest.fixture(scope="module")
def model() -> MaskedDiffusion:
    return masked_with_tokenizer(length=14)


def test_a_row_takes_a_step_for_each_of_its_own_positions_whatever_stands_beside_it(model: MaskedDiffusion) -> None:
    alone = cdlm.generate(model, prompts=["the cat sat on"], halt="SchED(0.1, 0.0)")
    beside = cdlm.generate(model, prompts=["the", "the cat sat on"], halt="SchED(0.1, 0.0)", batch_size=2)
    # Its number, which fixes what is drawn, is another one: only the budget must be its own.
    plain = [cdlm.generate(model, prompts=prompts) for prompts in (["the cat sat on"], ["the", "the cat sat on"])]
    assert plain[0].nfe[0] == plain[1].nfe[1] == (~plain[0].given[0]).sum()
    assert len(alone) + 1 == len(beside)


def test_prompts_may_be_tensors_and_arrays(model: MaskedDiffusion) -> None:
    def tokens(prompts: Any) -> list[list[int]]:
        return cdlm.decode(model, prompts, 4, policy="LLaDA").tokens.tolist()

    lists = [[5, 9, 3], [4, 4, 4]]
    assert (
        tokens(lists) == tokens(torch.tensor(lists)) == tokens(np.array(lists)) == tokens([np.array(r) for r in lists])
    )


BAD: list[tuple[Callable[[MaskedDiffusion], object], str]] = [
    (lambda m: cdlm.decode(m, [[1, 9999]], 4, policy="LLaDA"), "holds token 9999, and the model has 270"),
    (lambda m: cdlm.decode(m, [[1]], 4, policy="LLaDA", constraints={1: 9999}), "holds token 9999"),
    (lambda m: cdlm.decode(m, [[1]], 4, policy="LLaDA", constraints={1: -7}), "whole number >= 0, got -7"),
    (lambda m: cdlm.decode(m, [[1]], 4, policy="LLaDA", constraints={4: 7}), "outside the generated positions 0 to 3"),
    (lambda m: cdlm.decode(m, [[1.0, 2]], 4, policy="LLaDA"), "got 1.0"),
    (lambda m: cdlm.decode(m, ["hello"], 4, policy="LLaDA"), "a prompt is a list of tokens, got 'hello'"),
    (lambda m: cdlm.decode(m, [1, 2, 3], 4, policy="LLaDA"), "a prompt is a list of tokens, got 1"),
    (lambda m: cdlm.generate(m, prompts=[], new_tokens=2), "there are no prompts"),
    (lambda m: cdlm.generate(m, prompts=["a"], new_tokens=2, length=9), "no length beside it"),
    (lambda m: cdlm.generate(m, sovler="Euler()"), "no setting 'sovler'"),
    (lambda m: cdlm.generate(m, batch_size=0), "batch_size must be >= 1"),
    (lambda m: cdlm.generate(m, prompts=["a"], new_tokens=2, chat=True), "no chat template"),
    (lambda m: cdlm.decode(with_tokenizer(), [[1]], 4, policy="LLaDA"), "a masked model or a function"),
]


@pytest.mark.parametrize(("call", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_calls_end_with_one_line(
    model: MaskedDiffusion, call: Callable[[MaskedDiffusion], object], says: str
) -> None:
    with pytest.raises(CdlmError, match=re.escape(says)) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_only_what_follows_the_last_given_position_ends_a_text() -> None:
    tokens = np.array([[5, 0, 6, 7, 0, 8], [5, 6, 0, 0, 8, 9]])
    given = np.array([[True, False, True, False, False, False], [True, True, False, False, False, True]])
    valid = np.array([[True] * 6, [True, True, True, True, True, False]])  # the last is padding
    shown = shown_of(tokens, given, valid, (0,))
    assert shown.tolist() == [[True, True, True, True, False, False], [True, True, False, False, False, False]]
    assert shown_of(tokens, given, valid, ()).tolist() == valid.tolist()


def test_in_packed_text_an_end_is_a_line_break_and_nothing_is_spent_after_it(model: MaskedDiffusion) -> None:
    packed = cdlm.generate(model, n=6, steps=4)
    assert packed.calls_after_end.tolist() == [0] * 6
    assert packed.shown.all()
    whole = masked_with_tokenizer(length=14)
    whole.ends = True
    ended = cdlm.generate(whole, n=6, steps=4)
    assert ended.tokens.tolist() == packed.tokens.tolist()
    eos = tokenizer().eos_token_id
    for text, row, shown in zip(ended.texts, ended.tokens, ended.shown, strict=True):
        assert shown.sum() == (row.tolist().index(eos) if eos in row else len(row))
        assert text == tokenizer().decode(row[shown])


def test_a_turn_ends_at_the_first_stop_token_of_any_kind() -> None:
    """In texts, in what is settled, and in the calls after the end."""
    toy = Toy(seed=4)
    samples = cdlm.decode(toy, [[3], [4], [5, 6]], 10, n=6, temperature=2.0, policy="LLaDA(10)", record=True)
    ends = [[i for i, token in enumerate(row) if token in (EOS, EOT)] for row in samples.tokens.tolist()]
    found = {samples.tokens[i][end[0]] for i, end in enumerate(ends) if end}
    assert found == {EOS, EOT}
    assert samples.record is not None
    for i, end in enumerate(ends):
        first = end[0] if end else samples.tokens.shape[1]
        assert samples.shown[i].tolist() == [bool(v) and j < first for j, v in enumerate(samples.valid[i])]
        canvases = samples.record.canvases(samples.tokens, samples.given, mask_id=MASK)[:, i]
        done = [MASK not in canvas[:first] and (not end or canvas[first] != MASK) for canvas in canvases]
        assert samples.settled[i] <= done.index(True) + 1
    assert samples.calls_after_end.max() > 0
    assert Toy(PLAIN).end_ids == (EOS, EOT)


def test_merged_shares_have_the_largest_budget(model: MaskedDiffusion) -> None:
    long, short = (cdlm.generate(model, length=length, policy="Threshold(0.9)") for length in (14, 9))
    assert long.budget == 14
    assert short.budget == 9
    same = cdlm.generate(model, length=14, policy="Threshold(0.9)", n=2)
    assert Samples.merge([same, same]).budget == 14
