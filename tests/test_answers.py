"""The likelihood of answers: exact values by enumeration, prompts that are given and not scored, and the command."""

import csv
import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from foreign import TINY, copy_of, write_tokenizer
from jaxtyping import Float
from masked_toys import MASK, PLAIN, SHIFTED, Toy
from torch import Tensor

import cdlm
from cdlm.cli.main import main
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import BOUND, LikelihoodSettings, Ode, stratified_error
from cdlm.core.trees import take
from cdlm.evaluation.answers import text_of
from cdlm.masked import likelihood
from cdlm.masked.checkpoints.model import ForeignModel, open_checkpoint
from cdlm.masked.likelihood import nelbo
from cdlm.masked.model import Constants, Function, MaskedModel
from cdlm.sampling.prompts import encode_pair

MODELS = {family: open_checkpoint(folder) for family, folder in TINY.items()}
PAIRS = [([3, 4, 5], [6, 7, 3]), ([8], [9, 4]), ([], [5, 3, 7, 4]), ([4, 4, 3, 9, 7], [6])]


def log_p(model: MaskedModel, tokens: Tensor) -> Float[Tensor, "n v"]:
    """Log-probabilities of each position of one row, written out."""
    logits = model.logits(tokens[None])[0].double()
    rows = [logits[max(i - 1, 0)] if model.constants.shift else logits[i] for i in range(len(tokens))]
    return torch.stack(rows).log_softmax(-1)


def exact(model: MaskedModel, prompt: list[int], answer: list[int]) -> float:
    """The bound over all subsets of the answer: the mean over sizes, of the mean over subsets, of what they cost."""
    tokens, size = torch.tensor([*prompt, *answer]), len(answer)
    total = 0.0
    for k in range(1, size + 1):
        subsets = list(combinations(range(len(prompt), len(prompt) + size), k))
        for subset in subsets:
            hidden = tokens.clone()
            hidden[list(subset)] = model.constants.mask_id
            total -= sum(float(log_p(model, hidden)[i, tokens[i]]) for i in subset) / k / len(subsets)
    return total


# --- known answers ---


@pytest.mark.parametrize("constants", [PLAIN, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_mean_of_many_draws_is_the_sum_over_all_subsets(
    constants: Constants, pair: tuple[list[int], list[int]]
) -> None:
    """The mask itself is not suppressed: what a model gives it is lost."""
    model = Toy(constants, seed=3)
    many = take(text_of([pair], model), torch.zeros(300, dtype=torch.int64))
    draws = nelbo(model, many._replace(key=torch.arange(300)[:, None]), levels=6)
    error = float(draws.mean(1).std()) / math.sqrt(300)
    assert abs(float(draws.mean()) - exact(model, *pair)) < 4 * error + 1e-9
    assert error < 0.2


@pytest.mark.parametrize("family", MODELS)
def test_a_single_token_costs_what_the_network_says_of_it(family: str) -> None:
    """One token has one way to be masked, so there is no noise; Dream's comes from the position before it."""
    model, prompt, answer = MODELS[family], [5, 9, 31, 7], 44
    with torch.no_grad():
        logits = model.network(input_ids=torch.tensor([[*prompt, 126]])).logits[0]
    by_hand = -logits[3 if family == "Dream" else 4].double().log_softmax(-1)[answer]
    draws = nelbo(model, text_of([(prompt, [answer])], model), levels=3)
    torch.testing.assert_close(draws, by_hand.expand(1, 3), rtol=0, atol=1e-5)


def test_the_shift_by_hand() -> None:
    """Each token is predicted from the one before it, by a table: 2 follows 1, and the mask says nothing."""
    table = torch.zeros(4, 4, dtype=torch.float64)
    table[1, 2] = 5.0

    def model(tokens: Tensor, valid: Tensor | None) -> Tensor:
        return table[tokens]

    text = text_of([([0, 1], [2])], Function(model, Constants(3)))
    sure, blind = math.log(1 + 3 * math.exp(-5)), math.log(4)
    for shift, nats in ((True, sure), (False, blind)):
        found = Function(model, Constants(3, shift=shift)).nats(text, LikelihoodSettings())[BOUND]
        assert found.total.tolist() == pytest.approx([nats])
        assert found.error.tolist() == pytest.approx([0.0], abs=1e-12)


def test_the_chain_rule_of_an_autoregressive_model() -> None:
    model = toys.autoregressive_with_tokenizer(length=40)
    prompts, answers = ["the cat", "a bird sang"], [" sat on the mat.", " on the roof"]
    given = cdlm.likelihood(model, prompts, answers)
    joined = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    before, whole = (cdlm.likelihood(model, ["", ""], texts) for texts in (prompts, joined))
    summed = given.nats[BOUND].total + before.nats[BOUND].total
    assert whole.nats[BOUND].positions.tolist() == (given.nats[BOUND].positions + before.nats[BOUND].positions).tolist()
    torch.testing.assert_close(whole.nats[BOUND].total, summed, rtol=1e-5, atol=0)
    assert given.totals[0].error == 0


# --- prompts are given ---


def test_a_prompt_is_never_masked_and_never_scored() -> None:
    seen: list[Tensor] = []
    toy = Toy()

    def spied(tokens: Tensor, valid: Tensor | None) -> Tensor:
        seen.append(tokens)
        return toy.logits(tokens, valid)

    model = Function(spied, PLAIN)
    text = text_of(PAIRS, model)
    found = model.nats(text, LikelihoodSettings(levels=4))[BOUND]
    assert found.positions.tolist() == [len(answer) for _, answer in PAIRS]
    assert len(seen) == 4
    for tokens in seen:
        open_ = tokens == MASK
        order = sorted(range(4), key=lambda i: -len(PAIRS[i][0]) - len(PAIRS[i][1]))
        rows, targets = text.tokens[order], text.target[order]
        assert bool((open_ & targets).any(1).all())
        assert torch.equal(tokens[~open_], rows[~open_])
        assert not bool((open_ & ~targets).any())


def models() -> dict[str, Any]:
    return {"plain": Toy(), "shifted": Toy(SHIFTED), **MODELS, "masked": toys.lively_masked(), "cdcd": toys.lively()}


@pytest.mark.parametrize("name", models())
def test_an_answer_does_not_depend_on_those_beside_it(name: str) -> None:
    """Neither on the batch, nor on how long others are, nor on what stands in the padding."""
    model = models()[name]
    text = text_of(PAIRS, model)
    together = model.nats(text, LikelihoodSettings(levels=3))[BOUND]
    for size in (1, 2):
        apart = model.nats(text, LikelihoodSettings(levels=3, batch_size=size))[BOUND]
        torch.testing.assert_close(apart.total, together.total, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(apart.error, together.error, rtol=1e-4, atol=1e-5)
    assert text.valid is not None
    other = text._replace(tokens=torch.where(text.valid, text.tokens, 8))
    torch.testing.assert_close(
        model.nats(other, LikelihoodSettings(levels=3))[BOUND].total, together.total, rtol=1e-5, atol=1e-5
    )
    for row, pair in enumerate(PAIRS):
        alone = text_of([pair], model)._replace(key=torch.tensor([[row]]))
        found = model.nats(alone, LikelihoodSettings(levels=3))[BOUND]
        torch.testing.assert_close(found.total, together.total[row : row + 1], rtol=1e-5, atol=1e-5)


def test_the_noise_of_the_ode_does_not_depend_on_the_padding() -> None:
    system, asked = toys.lively(), LikelihoodSettings(levels=1, ode=Ode(2, probes=2))
    together = system.nats(text_of(PAIRS, system), asked)["ODE"]
    for row, pair in enumerate(PAIRS):
        found = system.nats(text_of([pair], system)._replace(key=torch.tensor([[row]])), asked)["ODE"]
        torch.testing.assert_close(found.total, together.total[row : row + 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["plain", "llada", "cdcd"])
def test_the_prompt_counts(name: str) -> None:
    model = models()[name]
    one, other = (
        model.nats(text_of([(prompt, [6, 7])], model), LikelihoodSettings())[BOUND].total for prompt in ([3, 4], [9, 5])
    )
    assert abs(float(one - other)) > 1e-3


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["Dream"]
    text = text_of(PAIRS, model)
    whole = nelbo(model, text)
    monkeypatch.setattr(likelihood, "PIECE", 1)
    torch.testing.assert_close(nelbo(model, text), whole)


def test_a_text_of_another_vocabulary_is_refused() -> None:
    short = Function(lambda tokens, valid: torch.zeros(*tokens.shape, 5), Constants(3))
    with pytest.raises(CdlmError, match="of another vocabulary"):
        short.nats(text_of([([1], [7])], short), LikelihoodSettings())


# --- texts ---


def test_where_an_answer_begins() -> None:
    reader = toys.tokenizer()

    def ids(text: str) -> list[int]:
        return reader(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    assert encode_pair(reader, "the cat", " sat") == (ids("the cat"), ids(" sat"))
    assert encode_pair(reader, "the cat ", "sat") == (ids("the cat"), ids(" sat"))
    assert encode_pair(reader, "the cat\n", "sat") == (ids("the cat\n"), ids("sat"))
    assert encode_pair(reader, "", "sat") == ([], ids("sat"))
    assert encode_pair(reader, r"a\[8]", "<|endoftext|> [8]") == (ids("a[8]"), ids("<|endoftext|> [8]"))
    assert encode_pair(reader, "a[8]", "b", template=False) == (ids("a[8]"), ids("b"))
    with pytest.raises(CdlmError, match=r"the prompt 'a\[8\]' has a hole"):
        encode_pair(reader, "a[8]", "b")


@pytest.mark.parametrize("family", TINY)
def test_an_answer_in_a_chat(family: str, tmp_path: Path) -> None:
    write_tokenizer(copy_of(family, tmp_path), family)
    model = cdlm.load(tmp_path, device="cpu")
    assert isinstance(model, ForeignModel)
    talk = [{"role": "system", "content": "the door"}, {"role": "user", "content": "the cat"}]
    found = cdlm.likelihood(model, ["the cat"], ["sat on the mat"], chat=True, system="the door", levels=3)
    spelt = cdlm.likelihood(model, [talk], ["sat on the mat"], chat=True, levels=3)
    assert json.loads(found.prompts[0]) == talk
    torch.testing.assert_close(found.nats[BOUND].total, spelt.nats[BOUND].total)
    prompt, answer = encode_pair(model.need_tokenizer(), talk, "sat on the mat", chat=True)
    draws = nelbo(model, text_of([(prompt, answer)], model), levels=3)
    torch.testing.assert_close(found.nats[BOUND].total, draws.mean(1))
    torch.testing.assert_close(found.nats[BOUND].error, stratified_error(draws))


def test_the_numbers_of_answers() -> None:
    model = toys.masked_with_tokenizer(length=40)
    prompts, answers = ["the cat", "the dog", "a bird"], [" sat", " saw the cat.", " sang on the roof"]
    found = cdlm.likelihood(model, prompts, answers, levels=4, batch_size=2)
    rows, (total,), (measure,) = found.rows(), found.totals, found.summary.measures
    assert [row["answer"] for row in rows] == answers
    assert len(found) == 3
    assert total.nats == pytest.approx(sum(row["nats"] for row in rows))
    assert total.error == pytest.approx(math.hypot(*(row["error"] for row in rows)))
    spread = torch.tensor([row["nats"] for row in rows], dtype=torch.float64).std().item()
    assert total.standard_error == pytest.approx(spread / math.sqrt(3))
    assert measure.nats_per_token == pytest.approx(total.nats / sum(row["tokens"] for row in rows))
    for row in rows:
        assert row["nats_per_token"] == pytest.approx(row["nats"] / row["tokens"])
        assert row["error_per_token"] == pytest.approx(row["error"] / row["tokens"])
    single = cdlm.likelihood(model, prompts[:1], answers[:1], levels=1)
    assert (single.totals[0].error, single.totals[0].standard_error, single.rows()[0]["error"]) == (None, None, None)
    assert "saw the cat." in repr(found)
    assert list(found.to_pandas()["tokens"]) == [row["tokens"] for row in rows]


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: cdlm.likelihood(speaking(), ["a", "b"], ["c"]), "got 2 prompts and 1 answers"),
    (lambda: cdlm.likelihood(speaking(), ["a"], [""]), "answer 1 has no tokens"),
    (lambda: cdlm.likelihood(speaking(), ["a"], ["the cat " * 9]), "the model's length is 12: shorten one"),
    (lambda: cdlm.likelihood(speaking(), ["a"], []), "there are no answers"),
    (lambda: cdlm.likelihood(speaking(), ["a"], ["b"], chat=True), "no chat template"),
    (lambda: cdlm.likelihood(speaking(), ["a"], ["b"], system="c"), "system is a message before conversations"),
    (lambda: cdlm.likelihood(speaking(), ["a"], ["b"], levels=0), "levels >= 1"),
    (lambda: cdlm.likelihood(speaking(), ["a"], ["b"], ode=Ode()), "a masked model has no ODE"),
    (lambda: cdlm.likelihood(speaking(), ["a"], ["\ud800"]), "not valid Unicode"),
    (lambda: cdlm.likelihood(Function(lambda x, _: x, Constants(2)), ["a"], ["b"]), "no tokenizer"),
]


def speaking() -> Any:
    return toys.masked_with_tokenizer()


@pytest.mark.parametrize(("call", "says"), BAD, ids=[says for _, says in BAD])
def test_answers_that_cannot_be_scored(call: Callable[[], object], says: str) -> None:
    with pytest.raises(CdlmError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- the command ---


def files(folder: Path) -> tuple[Path, Path, Path]:
    """Prompts and answers, a line each, and both in one file."""
    prompts, answers, both = (folder / name for name in ("prompts.txt", "answers.txt", "both.jsonl"))
    texts = [("the cat", " sat on the mat"), ("the dog ", "sat")]
    prompts.write_text("".join(f"{prompt}\n" for prompt, _ in texts))
    answers.write_text("".join(f"{answer}\n" for _, answer in texts))
    both.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in texts))
    return prompts, answers, both


def run_of(kind: str, folder: Path) -> Path:
    """A folder of a model: of the toolkit's own or in a published format."""
    if kind in TINY:
        write_tokenizer(copy_of(kind, folder / kind), kind)
    else:
        systems = {
            "masked": toys.masked_with_tokenizer,
            "cdcd": toys.with_tokenizer,
            "ar": toys.autoregressive_with_tokenizer,
        }
        systems[kind](length=30).save_pretrained(folder / kind)
    return folder / kind


@pytest.mark.parametrize("kind", [*TINY, "masked", "cdcd", "ar"])
def test_the_command_scores_what_the_function_scores(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, (prompts, answers, both), out = run_of(kind, tmp_path), files(tmp_path), tmp_path / "out"
    call = ["evaluate", str(run), "--likelihood", "--levels", "3", "--seed", "5", "--device", "cpu", "--out", str(out)]
    main([*call, "--prompts", str(prompts), "--answers", str(answers)])
    shown = capsys.readouterr()
    kept = json.loads((out / "answers.json").read_text())
    model = cdlm.load(run, device="cpu")
    found = cdlm.likelihood(model, ["the cat", "the dog "], [" sat on the mat", "sat"], levels=3, seed=5)
    assert kept["answers"] == found.rows()
    assert f"{found.totals[0].nats:.4f}" in shown.out
    assert f"{kept['measures'][0]['nats_per_token']:.4f}" in shown.out
    assert kept["made_by"]["model"] == kind
    with (out / "answers.csv").open() as file:
        assert [float(row["nats"]) for row in csv.DictReader(file)] == [row["nats"] for row in found.rows()]
    assert shown.err.splitlines() == ["device: cpu", "bound: 2 of 2"]
    main([*call, "--answers", str(both), "--quiet", "--batch-size", "1"])
    assert capsys.readouterr() == ("", "")
    again = json.loads((out / "answers.json").read_text())["answers"]
    assert [row["nats"] for row in again] == pytest.approx([row["nats"] for row in found.rows()], rel=1e-5)


def test_the_run_folder_keeps_the_numbers_and_the_folders_of_others_do_not(tmp_path: Path) -> None:
    both = files(tmp_path)[2]
    for kind, written in (("masked", True), ("llada", False)):
        run = run_of(kind, tmp_path)
        main(["evaluate", str(run), "--likelihood", "--levels", "1", "--device", "cpu", "--answers", str(both)])
        assert (run / "answers.json").exists() == written
        assert (run / "answers.csv").exists() == written


LINE = '{"prompt": "a", "answer": "b"}\n'
CALLS: dict[str, tuple[list[str], str, str]] = {
    "no likelihood": (["--answers", "{both}"], "", "answers are measured by their likelihood: add --likelihood"),
    "prompts alone": (["--likelihood", "--prompts", "{prompts}"], "", "give --answers FILE beside prompts"),
    "chat alone": (["--likelihood", "--chat", "--no-template"], "", "give --answers FILE beside chat and no-template"),
    "other numbers": (["--likelihood", "--prompts", "{prompts}", "--answers", "{bad}"], "b\n", "got 2 prompts in"),
    "text alone": (["--likelihood", "--answers", "{answers}"], "", "or one .jsonl file with both"),
    "nothing": (["--likelihood", "--answers", "{bad}"], " \n", "holds no answers"),
    "no file": (["--likelihood", "--answers", "nowhere.jsonl"], "", "cannot read nowhere.jsonl"),
    "no answer": (["--likelihood", "--answers", "{bad}"], LINE + '{"prompt": "a"}\n', "line 2: expected"),
    "a number": (["--likelihood", "--answers", "{bad}"], LINE + '{"prompt": "a", "answer": 5}\n', "line 2: expected"),
    "too much": (["--likelihood", "--answers", "{bad}"], LINE + '{"prompt": "a", "answer": "b", "x": 1}\n', "line 2"),
    "half a sign": (["--likelihood", "--answers", "{bad}"], '{"prompt": "a", "answer": "\\ud800"}\n', "line 1"),
    "too long": (["--likelihood", "--answers", "{bad}"], json.dumps({"prompt": "a", "answer": "x" * 99}), "is 30"),
    "a hole": (["--likelihood", "--answers", "{bad}"], '{"prompt": "a [8]", "answer": "b"}\n', "has a hole"),
    "no talk": (["--likelihood", "--chat", "--answers", "{both}"], "", "no chat template"),
    "no chat": (["--likelihood", "--system", "x", "--answers", "{both}"], "", "system is a message"),
    "an ODE": (["--likelihood", "--ode-steps", "3", "--answers", "{both}"], "", "a masked model has no ODE"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_bad_calls(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, content, message = CALLS[case]
    prompts, answers, both = files(tmp_path)
    (tmp_path / "bad.jsonl").write_text(content)
    (tmp_path / "bad.txt").write_text(content)
    bad = "bad.txt" if case == "other numbers" else "bad.jsonl"
    places = {"prompts": prompts, "answers": answers, "both": both, "bad": tmp_path / bad}
    run = run_of("masked", tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", str(run), *(word.format(**places) for word in more), "--device", "cpu"])
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert message in shown.err
    assert (shown.err.count("\n"), shown.out) == (1, "")
    assert not (run / "answers.json").exists()


def test_nothing_to_show_and_nowhere_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, both = run_of("Dream", tmp_path), files(tmp_path)[2]
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--likelihood", "--answers", str(both), "--quiet", "--device", "cpu"])
    assert "give --out, or leave out --quiet" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    run, both = run_of("masked", tmp_path), files(tmp_path)[2]
    for devices in ("1", "2"):
        main(["evaluate", str(run), "--likelihood", "--answers", str(both), "--out", str(tmp_path / devices),
              "--device", "cpu", "--devices", devices, "--batch-size", "1"])  # fmt: skip
    assert (tmp_path / "1" / "answers.csv").read_text() == (tmp_path / "2" / "answers.csv").read_text()
