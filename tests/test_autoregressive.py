"""Laws of the autoregressive model: its order, its likelihood, its samples, its folder, and what it refuses."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import (
    TEXT,
    VOCAB,
    autoregressive,
    autoregressive_with_tokenizer,
    lively_autoregressive,
    masked,
    masked_with_tokenizer,
    tokenizer,
)  # fmt: skip

import cdlm
from cdlm import api
from cdlm.autoregressive.sampler import LeftToRight, LeftToRightLoop
from cdlm.autoregressive.system import Autoregressive, AutoregressiveModel
from cdlm.cli.main import main
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import BOUND, LikelihoodSettings, Ode, Text
from cdlm.core.types import Batch, HaltReason
from cdlm.halting import FixedSteps, Full, Never, Patience
from cdlm.runs.config import RunConfig, build_system, parse_run
from cdlm.runs.train import PREVIEW_STEPS, preview
from cdlm.sampling.loop import RunOptions
from cdlm.sampling.requests import Request, canvases
from cdlm.sampling.samples import Samples
from cdlm.sampling.session import run_loop
from cdlm.sampling.texts import Special

V, B, N = 11, 6, 7


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(rows: int = B, length: int = N, seed: int = 5, vocab: int = V) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=rng(seed))


def everything(tokens: Tensor) -> Tensor:
    return torch.ones_like(tokens, dtype=torch.bool)


def text_of(tokens: Tensor, target: Tensor | None = None, valid: Tensor | None = None) -> Text:
    return Text(tokens, everything(tokens) if target is None else target, valid, torch.arange(len(tokens))[:, None])


def nats_of(model: AutoregressiveModel, text: Text) -> Tensor:
    return model.nats(text, LikelihoodSettings())[BOUND].total


def every_row(vocab: int, length: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(vocab), repeat=length)))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- order ---


@given(seed=st.integers(0, 1000), place=st.integers(0, N - 1))
@settings(max_examples=20)
@torch.no_grad()
def test_a_token_changes_the_logits_after_it_and_no_others(seed: int, place: int) -> None:
    model, tokens = lively_autoregressive(), words(seed=seed)
    other = tokens.clone()
    other[:, place] = (other[:, place] + 1) % V
    before, after = model.logits(tokens), model.logits(other)
    close(before[:, : place + 1], after[:, : place + 1])
    assert place == N - 1 or bool(((before - after)[:, place + 1].abs() > 1e-6).any(-1).all())


@torch.no_grad()
def test_logits_of_a_prefix_are_those_of_the_whole_row_and_rows_do_not_see_each_other() -> None:
    model, tokens = lively_autoregressive(), words()
    whole = model.logits(tokens)
    for length in range(1, N + 1):
        close(model.logits(tokens[:, :length]), whole[:, :length])
    for row in range(B):
        close(model.logits(tokens[row : row + 1]), whole[row : row + 1])


@torch.no_grad()
def test_the_first_token_is_predicted_from_the_end_of_text_alone() -> None:
    model, tokens = lively_autoregressive(), words()
    assert bool((model.logits(tokens)[:, 0].diff(dim=0).abs() < 1e-12).all())
    after_an_end = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1)
    seen: list[Tensor] = []
    model.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.logits(tokens)
    assert torch.equal(seen[0], after_an_end[:, :-1])


# --- the loss ---


@torch.no_grad()
def test_the_loss_is_the_chain_rule_one_token_at_a_time() -> None:
    model, tokens = lively_autoregressive(), words()
    loss = model(Batch(tokens, None, everything(tokens)))
    for row in tokens:
        surprise = 0.0
        for place in range(N):
            chances = model.logits(row[None, : place + 1])[0, place].softmax(-1)
            surprise -= math.log(float(chances[row[place]]))
        assert float(nats_of(model, text_of(row[None]))) == pytest.approx(surprise, rel=1e-12)
    close(loss.nats * N, nats_of(model, text_of(tokens)))
    close(loss.total, loss.nats.mean())
    assert (loss.count.tolist(), loss.t.tolist()) == ([N] * B, [0.0] * B)


@torch.no_grad()
def test_every_token_is_scored_whatever_the_masking_law_says() -> None:
    model, tokens = lively_autoregressive(), words()
    some = torch.rand(tokens.shape, generator=rng(1)) < 0.5
    whole, part = (model(Batch(tokens, None, target)) for target in (everything(tokens), some))
    assert torch.equal(whole.total, part.total)
    assert torch.equal(whole.count, part.count)


@torch.no_grad()
def test_padding_is_neither_scored_nor_seen() -> None:
    model, tokens = lively_autoregressive(), words()
    valid = torch.arange(N) < torch.arange(1, B + 1)[:, None]
    first, second = (model(Batch(torch.where(valid, tokens, other), valid, valid)) for other in (3, 7))
    close(first.nats, second.nats)
    assert first.count.tolist() == list(range(1, B + 1))
    for row in range(B):
        cut = tokens[row : row + 1, : row + 1]
        close(first.nats[row : row + 1], model(Batch(cut, None, everything(cut))).nats)
    close(first.total, (first.nats * first.count).sum() / first.count.sum())


def test_the_loss_reaches_every_part_and_its_numbers_are_detached() -> None:
    model, tokens = lively_autoregressive().train(), words()
    loss = model(Batch(tokens, None, everything(tokens)))
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 0, name
    assert not loss.nats.requires_grad


def markov(rows: int, length: int, generator: torch.Generator, stay: float = 0.95) -> Tensor:
    """Two tokens that follow themselves with probability `stay`: ln 2 nats a token without a look back, 0.2 with."""
    change = (torch.rand(rows, length, generator=generator) > stay).long()
    change[:, 0] = torch.randint(2, (rows,), generator=generator)
    return 1 + change.cumsum(1) % 2


def test_a_few_steps_on_a_markov_chain_bring_the_loss_under_the_unigram_entropy() -> None:
    model, noise = autoregressive(4).train(), rng()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        tokens = markov(32, 24, noise)
        loss = model(Batch(tokens, None, everything(tokens))).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    rate = -(0.95 * math.log(0.95) + 0.05 * math.log(0.05))
    assert losses[0] == pytest.approx(math.log(4), rel=0.2)  # it begins with no knowledge
    assert 0.8 * rate < sum(losses[-10:]) / 10 < 0.5 * math.log(2)


# --- the likelihood ---


@pytest.mark.parametrize("seed", range(3))
def test_the_likelihoods_of_all_rows_sum_to_one(seed: int) -> None:
    model, rows = lively_autoregressive(3, seed), every_row(3, 4)
    assert float((-nats_of(model, text_of(rows))).exp().sum()) == pytest.approx(1, abs=1e-12)
    ends = text_of(rows[:9] + torch.tensor([2, 1, 0, 0]), torch.tensor([[False, False, True, True]]).expand(9, -1))
    assert float((-nats_of(model, ends)).exp().sum()) == pytest.approx(1, abs=1e-12)  # given the first two tokens


def test_the_likelihood_is_without_noise_and_adds_up_over_a_row() -> None:
    model, tokens = lively_autoregressive(), words()
    late = (torch.arange(N) >= 3).expand(B, -1)
    whole, rest = (model.nats(text_of(tokens, target), LikelihoodSettings())[BOUND] for target in (None, late))
    close(whole.total, rest.total + nats_of(model, text_of(tokens[:, :3])))
    assert whole.error.tolist() == [0.0] * B
    assert (whole.positions.tolist(), rest.positions.tolist()) == ([N] * B, [N - 3] * B)
    other = model.nats(text_of(tokens), LikelihoodSettings(levels=3, seed=9, batch_size=2))[BOUND]
    close(whole.total, other.total)


@pytest.mark.parametrize(
    ("asked", "text", "message"),
    [
        (LikelihoodSettings(ode=Ode()), {}, "has no ODE: leave out ode_steps"),
        (LikelihoodSettings(read_out=0.1), {}, "has no noise levels: leave out read_out"),
        (LikelihoodSettings(), {"target": torch.arange(N) < 3}, "fills no holes"),
        (LikelihoodSettings(), {"target": torch.arange(N) > 2, "valid": torch.arange(N) > 1}, "padding at the end"),
    ],
    ids=["ode", "read_out", "hole", "padding"],
)
def test_a_likelihood_that_it_has_not_is_refused(asked: LikelihoodSettings, text: dict[str, Any], message: str) -> None:
    tokens = words()
    with pytest.raises(CdlmError, match=message) as caught:
        autoregressive().nats(text_of(tokens, **{k: v.expand(B, -1) for k, v in text.items()}), asked)
    assert "\n" not in str(caught.value)


# --- samples ---


def asked(prompts: Sequence[Sequence[int]], length: int, n: int = 1) -> list[Request]:
    """Rows of one length that begin with prompts."""
    rows = [torch.tensor([*prompt, *[0] * (length - len(prompt))]) for prompt in prompts]
    told = [torch.arange(length) < len(prompt) for prompt in prompts]
    return [Request(i, rows[i // n], told[i // n]) for i in range(n * len(rows))]


def undecided(vocab: int = V, seed: int = 0) -> AutoregressiveModel:
    """A lively model whose logits are so small that every token has a chance."""
    model = lively_autoregressive(vocab, seed)
    with torch.no_grad():
        model.network.get_parameter("output.weight").mul_(0.04)
        model.network.get_parameter("output.bias").zero_()
    return model


def drawn(
    model: AutoregressiveModel, requests: Sequence[Request], temperature: float = 1.0, seed: int = 0, batch: int = 64
) -> Samples:
    return run_loop(LeftToRightLoop(model, LeftToRight(temperature), RunOptions(seed=seed), batch), model, requests)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_distribution_of_the_model(temperature: float) -> None:
    model, rows, count = undecided(3), every_row(3, 3), 2000
    with torch.no_grad():
        log_p = (model.logits(rows) / temperature).log_softmax(-1).gather(-1, rows[..., None]).sum((1, 2))
    samples = torch.from_numpy(drawn(model, asked([[]], 3, count), temperature, batch=count).tokens)
    seen, expected = torch.bincount((samples * torch.tensor([9, 3, 1])).sum(1), minlength=27), count * log_p.exp()
    cell = torch.where(expected < 5, 0, torch.arange(27) + 1).unique(return_inverse=True)[1]  # the rare ones are one
    seen, expected = (
        torch.zeros(28).double().index_add_(0, cell, x.double())[: cell.max() + 1] for x in (seen, expected)
    )
    freedom = len(seen) - 1
    assert freedom > 10
    assert float(((seen - expected).square() / expected).sum()) < freedom + 4 * math.sqrt(2 * freedom)


PROMPTS = [[], [3], [4, 5, 6], [7, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_sample_is_the_same_in_any_batch(temperature: float, ends: bool) -> None:
    model, requests = undecided(VOCAB if ends else V), asked(PROMPTS, N, 2)
    if ends:
        model.ends, model.tokenizer = True, tokenizer()
        with torch.no_grad():
            model.network.get_parameter("output.bias")[model.eos_id] = 3.5  # so that rows leave at different steps
    whole = drawn(model, requests, temperature)
    assert not ends or len(set(whole.nfe.tolist())) > (1 if temperature == 0 else 2)
    for batch in (1, 3):
        other = drawn(model, requests[::-1], temperature, batch=batch)
        assert (other.tokens[::-1] == whole.tokens).all()
        assert (other.nfe[::-1] == whole.nfe).all()


def test_samples_of_one_prompt_and_of_two_seeds_differ() -> None:
    model, requests = undecided(), asked([[]], N, 12)
    one, two = drawn(model, requests), drawn(model, requests, seed=1)
    assert len({tuple(row) for row in one.tokens.tolist()}) > 6
    assert (one.tokens != two.tokens).any(1).sum() > 6


def test_a_prefix_is_kept_and_costs_no_call() -> None:
    model = undecided()
    samples = drawn(model, asked(PROMPTS, N, 2))
    for i, row in enumerate(samples.tokens.tolist()):
        prompt = PROMPTS[i // 2]
        assert row[: len(prompt)] == prompt
        assert samples.nfe[i] == samples.steps[i] == N - len(prompt)
    assert samples.reason == [HaltReason.BUDGET] * len(samples)
    assert samples.budget == N
    assert (samples.calls_after_end == 0).all()


def test_a_shorter_sample_is_the_beginning_of_a_longer_one() -> None:
    model = undecided()
    short, long = (drawn(model, asked(PROMPTS, length, 2)).tokens for length in (N, N + 5))
    assert (short == long[:, :N]).all()


@torch.no_grad()
def test_temperature_0_takes_the_likeliest_token_whatever_the_seed() -> None:
    model, requests = undecided(), asked(PROMPTS, N)
    one, two = (drawn(model, requests, 0.0, seed).tokens for seed in (0, 1))
    assert (one == two).all()
    for prompt, row in zip(PROMPTS, one.tolist(), strict=True):
        text = list(prompt)
        while len(text) < N:
            text.append(int(model.logits(torch.tensor([[*text, 0]]))[0, -1].argmax()))
        assert row == text
    assert (drawn(model, requests, 1e-6).tokens == one).all()


@pytest.mark.parametrize("ends", [False, True])
def test_a_text_ends_at_its_first_end_if_the_model_was_trained_on_whole_documents(ends: bool) -> None:
    model = autoregressive_with_tokenizer(length=8)
    model.ends = ends
    eos, word = 0, tokenizer().encode("a", add_special_tokens=False)[0]
    with torch.no_grad():  # writes the end or the letter a, whatever it sees
        model.network.get_parameter("output.weight").zero_()
        bias = model.network.get_parameter("output.bias").fill_(-100.0)
        bias[[eos, word]] = 0.0
    samples = cdlm.generate(model, n=12, seed=1)
    for text, row, calls, reason in zip(
        samples.texts, samples.tokens.tolist(), samples.nfe, samples.reason, strict=True
    ):
        written = row.index(eos) + 1 if ends and eos in row else 8
        assert calls == written
        assert text == "".join("a" if token == word else "\n" for token in row[:written]).rstrip("\n" if ends else "")
        assert row[written:] == [eos] * (8 - written)
        assert reason is (HaltReason.FULL if ends and eos in row else HaltReason.BUDGET)
    assert any(eos in row[:-1] for row in samples.tokens.tolist())


def test_a_template_that_ends_in_its_hole_ends_there() -> None:
    model = autoregressive_with_tokenizer()
    samples = cdlm.generate(model, ["the [3]", "the cat [2]"], n=2)
    told = [len(tokenizer().encode(text, add_special_tokens=False)) for text in ("the", "the cat")]
    assert samples.valid.sum(1).tolist() == [told[0] + 3, told[0] + 3, told[1] + 2, told[1] + 2]
    assert samples.nfe.tolist() == [3, 3, 2, 2]
    assert all(one.text.startswith("the") for one in samples)


@pytest.mark.parametrize("rule", [Never(), Full()])
def test_rules_that_never_halt_change_nothing(rule: Never | Full) -> None:
    model = autoregressive_with_tokenizer()
    model.ends = True
    ours, theirs = (cdlm.generate(model, n=4, halt=halt) for halt in (rule, None))
    assert (ours.tokens == theirs.tokens).all()
    assert (ours.nfe == theirs.nfe).all()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"prompts": ["the [3] sat"]}, "continues a prefix and fills no holes"),
        ({"prompts": ["[2] the [3]"]}, "continues a prefix and fills no holes"),
        ({"prompts": ["the cat sat on the mat " * 9]}, "shorten it"),
        ({"halt": "FixedSteps(3)"}, "would cut off an autoregressive text"),
        ({"halt": "Never() | FixedSteps(3)"}, "would cut off an autoregressive text"),
        ({"halt": "Patience(3)"}, "no signal 'switches' here: an autoregressive model decides each token once"),
        ({"halt": "NormConvergence(0.1)"}, "no signal 'x0_norm' here"),
        ({"record": True}, "nothing to halt by or to record"),
        ({"steps": 4}, "one step for each token, got steps=4"),
        ({"temperature": -1.0}, "temperature >= 0, got -1.0"),
        ({"temperature": math.nan}, "temperature"),
        ({"policy": "Threshold(0.9)"}, "policy is a setting of masked models, and this one is autoregressive"),
        ({"solver": "Heun()"}, "solver is a setting of continuous models, and this one is autoregressive"),
        ({"new_tokens": 3}, "new_tokens is a setting of masked models, and this one is autoregressive"),
        ({"chat": True, "prompts": ["a"]}, "chat is a setting of masked models"),
        ({"sampling": cdlm.Diffusion()}, "is sampled by LeftToRight"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_one_line(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(CdlmError, match=message) as caught:
        cdlm.generate(autoregressive_with_tokenizer(), **wanted)
    assert "\n" not in str(caught.value)


def test_rows_that_are_no_prefixes_are_refused() -> None:
    model = autoregressive()
    for requests in (canvases([[1, None, 3]], 2), canvases([[1], [1, 2, 3]], 2)):
        with pytest.raises(CdlmError, match="padding at the end alone"):
            drawn(model, requests)
    with pytest.raises(CdlmError, match="nothing to generate"):
        drawn(model, asked([[1, 2]], 2))
    with pytest.raises(CdlmError, match="decode needs a masked model"):
        cdlm.decode(model, [[1]], 3)  # type: ignore[arg-type]  # what a caller may try


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = autoregressive()
    with torch.no_grad():
        model.network.get_parameter("output.bias")[3] = math.nan
    with pytest.raises(CdlmError, match="not numbers"):
        drawn(model, asked([[]], 3))


def test_a_session_says_what_it_has_no_use_for() -> None:
    session = api.open_session(autoregressive_with_tokenizer(), temperature=0.5)
    assert session.settings == {"temperature": 0.5}
    assert "nothing to halt by" in session.refuses(Patience(3))
    assert session.refuses(FixedSteps(3)) == session.refuses(Never()) == ""  # it is the run that refuses to cut
    (request,) = session.requests()
    assert session.steps_of(request) == 12
    assert session.sampling.fewer_steps([4], request) == []
    assert session.sampling.rivals() == {}
    assert session.sampling.with_temperature_times(0.5) == LeftToRight(0.25)


# --- the system ---


@pytest.mark.parametrize("changes", [{}, {"gates": True, "dim": 4, "width": 32}], ids=str)
def test_it_has_the_parameters_of_the_masked_model(changes: dict[str, Any]) -> None:
    ours, theirs = autoregressive(VOCAB, **changes), masked(VOCAB, **changes)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    groups = ours.parameter_groups()
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(id(p) for p in ours.parameters())


@pytest.mark.parametrize("changes", [{}, {"gates": True, "dim": 4}], ids=str)
def test_the_configuration_rebuilds_the_system(changes: dict[str, Any]) -> None:
    model = autoregressive(**changes)
    again = build_system(json.loads(json.dumps(model.config)))
    assert isinstance(again, AutoregressiveModel)
    assert (again.config, again.eos_id) == (model.config, model.eos_id)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("bad", [{"dim": 0}, {"width": 18}, {"heads": 0}, {"depth": 0}], ids=str)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(CdlmError, match=next(iter(bad))):
        Autoregressive(**bad)


@pytest.mark.parametrize("special", [None, Special(), Special(mask_id=0)])
def test_a_vocabulary_without_an_end_of_text_is_refused(special: Special | None) -> None:
    with pytest.raises(CdlmError, match=r"^an autoregressive model predicts the first token .*: set its eos_token.*$"):
        Autoregressive().build(V, special)


@pytest.mark.parametrize("ends", [False, True])
def test_a_loaded_model_is_the_saved_one(tmp_path: Path, ends: bool) -> None:
    model = autoregressive_with_tokenizer(seed=3)
    model.ends = ends
    model.save_pretrained(tmp_path / "model")
    again = api.load(tmp_path / "model", device="cpu")
    assert isinstance(again, AutoregressiveModel)
    assert (again.ends, again.length, again.config, again.training) == (ends, model.length, model.config, False)
    ours, theirs = (cdlm.generate(m, ["the"], n=3, seed=2) for m in (model, again))
    assert (ours.tokens == theirs.tokens).all()
    assert ours.texts == theirs.texts
    assert "Language model: autoregressive" in (tmp_path / "model" / "README.md").read_text()
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize("make", [autoregressive_with_tokenizer, masked_with_tokenizer])
def test_previews_of_long_rows_take_few_steps_where_there_is_a_number_of_steps(make: Callable[..., Any]) -> None:
    model = make(length=PREVIEW_STEPS + 6, depth=1)
    assert len(preview(RunConfig(preview=2), model)) == 2


# --- the command line ---


def test_a_file_and_the_command_line_name_the_system(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("system: {class_path: Autoregressive, init_args: {width: 64}}\n")
    assert parse_run(["--config", str(file)]).system == Autoregressive(width=64)
    assert parse_run(["--system", "Autoregressive", "--system.dim", "8"]).system == Autoregressive(dim=8)
    with pytest.raises(CdlmError, match="weight"):
        parse_run(["--system", "Autoregressive", "--system.weight", "flat"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on whole documents."""
    place = tmp_path_factory.mktemp("autoregressive")
    (place / "text.txt").write_text("".join(f"{line}\n" for line in TEXT))
    main([
        "train", "--text", str(place / "text.txt"), "--out", str(place / "run"), "--cache", str(place / "cache"),
        "--system", "Autoregressive", "--system.width", "16", "--system.depth", "1", "--system.heads", "2",
        "--rows", "document", "--judge_share", "0", "--unread_share", "0",
        "--length", "32", "--vocab_size", str(VOCAB), "--batch_size", "4",
        "--validation_rows", "4", "--preview", "1", "--training.steps", "2", "--training.accelerator", "cpu", "--quiet",
    ])  # fmt: skip
    return place / "run"


def test_a_run_is_sampled_at_the_temperature_of_the_command_line(trained: Path, tmp_path: Path) -> None:
    texts = []
    for temperature in ([], ["--temperature", "0"]):
        out = tmp_path / f"{len(texts)}.jsonl"
        main(["sample", str(trained), "--n", "3", "--prompt", "the", *temperature, "--out", str(out), "--quiet"])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert all(row["text"].startswith("the") for row in rows)
        assert all(row["nfe"] == len(row["tokens"]) - 1 + (row["reason"] == "full") for row in rows)
        texts.append([row["text"] for row in rows])
    assert len(set(texts[0])) > 1
    assert len(set(texts[1])) == 1  # the likeliest text is one
    assert texts[0] == cdlm.generate(cdlm.load(trained, device="cpu"), ["the"], n=3).texts


def test_a_run_has_a_likelihood(trained: Path, tmp_path: Path) -> None:
    main(["evaluate", str(trained), "--likelihood", "--rows", "4", "--out", str(tmp_path), "--device", "cpu",
          "--quiet"])  # fmt: skip
    (measure,) = json.loads((tmp_path / "likelihood.json").read_text())["measures"]
    assert (measure["name"], measure["error"]) == (BOUND, 0.0)
    assert measure["terms"] == {"autoregressive": measure["nats_per_token"]}
    assert measure["nats_per_token"] < 1.05 * math.log(VOCAB)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "--prompt", "the [3] sat"], "fills no holes"),
        (["sample", "--halt", "FixedSteps(3)"], "would cut off"),
        (["sample", "--halt", "Entropy(0.5)"], "nothing to halt by"),
        (["sample", "--record", "recordings"], "nothing to halt by or to record"),
        (["sample", "--plot", "plot.png"], "nothing to halt by or to record"),
        (["sample", "--steps", "5"], "one step for each token"),
        (["evaluate", "--likelihood", "--ode-steps", "4"], "has no ODE"),
        (["calibrate", "--n", "512"], "nothing to halt by or to record"),
        (["compare", "--n", "8", "--live", "0"], "nothing to halt by or to record"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_commands_refuse_in_one_line(
    command: list[str], message: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(trained.iterdir())
    with pytest.raises(SystemExit) as caught:
        main([command[0], str(trained), *command[1:], "--quiet"])
    shown = capsys.readouterr()
    assert (caught.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert message in shown.err
    assert sorted(trained.iterdir()) == before
