"""Laws of the masked system: its loss, its folder, its training, and its settings in words."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_run import Crash, assert_same_run, crash_at, rows, run, saved
from torch import Tensor, nn
from toys import TEXT, VOCAB, lively_masked, masked, masked_with_tokenizer, tokenizer

from cdlm import api
from cdlm.cli.main import main
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.errors import CdlmError
from cdlm.core.types import Batch
from cdlm.data.sources import Files
from cdlm.data.store import DocumentRows, FilledRows, build_store
from cdlm.masked.model import Constants
from cdlm.masked.objective import EPS
from cdlm.masked.system import Masked, MaskedDiffusion
from cdlm.models.system import Loss
from cdlm.runs.config import build_system, parse_run, read_run
from cdlm.sampling.texts import Special
from cdlm.training.options import TrainOptions
from cdlm.training.run import train

V, B, N, MASK = 11, 8, 6, 2


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(rows: int = B, length: int = N, seed: int = 5) -> Tensor:
    """Tokens without the mask."""
    drawn = torch.randint(V - 1, (rows, length), generator=rng(seed))
    return drawn + (drawn >= MASK)


def everything(tokens: Tensor) -> Tensor:
    return torch.ones_like(tokens, dtype=torch.bool)


def some(tokens: Tensor, share: float = 0.7, seed: int = 6) -> Tensor:
    """Positions to generate, at least one a row."""
    chosen = torch.rand(tokens.shape, generator=rng(seed)) < share
    chosen[:, 0] = True
    return chosen


def watched(model: MaskedDiffusion) -> list[Tensor]:
    """Tokens of every call of the network from now on."""
    calls: list[Tensor] = []
    model.embedding.register_forward_pre_hook(lambda _, args: calls.append(args[0].clone()))
    return calls


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- the loss ---


def slow_nats(model: MaskedDiffusion, tokens: Tensor, seen: Tensor, t: Tensor, open_: Tensor) -> Tensor:
    """1 / t times the surprise of what is masked, per token to generate: one row and one position at a time."""
    out = []
    for row in range(len(tokens)):
        surprise = 0.0
        for place in range(tokens.shape[1]):
            if seen[row, place] != tokens[row, place]:
                chances = model.logits(seen[row : row + 1])[0, place].softmax(-1)
                surprise -= math.log(float(chances[tokens[row, place]]))
        out.append(surprise / float(t[row]) / int(open_[row].sum()))
    return torch.tensor(out, dtype=torch.float64)


@given(seed=st.integers(0, 1000), u=st.lists(st.floats(0, 1), min_size=3, max_size=3))
@settings(max_examples=10)
@torch.no_grad()
def test_the_loss_is_the_bound_computed_slowly(seed: int, u: list[float]) -> None:
    model, tokens = lively_masked(), words(3, seed=seed)
    open_, calls = some(tokens, seed=seed), watched(model)
    loss = model(Batch(tokens, None, open_, rng(seed), torch.tensor(u, dtype=torch.float64)))
    assert len(calls) == 1  # no second pass, whatever the settings
    assert loss.t.tolist() == pytest.approx([EPS + (1 - EPS) * x for x in u])
    close(loss.nats, slow_nats(model, tokens, calls[0], loss.t, open_))
    assert loss.count.tolist() == open_.sum(1).tolist()
    close(loss.total, (loss.nats * loss.count).sum() / loss.count.sum())


@torch.no_grad()
def test_each_open_position_is_masked_with_probability_t() -> None:
    """Against the sum over all ways to mask, for levels of each kind."""
    model, tokens, open_ = lively_masked(), words(1), torch.tensor([[False, True, True, False, True, False]])
    places, draws = open_[0].nonzero().squeeze(1).tolist(), 3000
    for u in (0.05, 0.5, 0.9):
        t = EPS + (1 - EPS) * u
        expected = 0.0
        for chosen in itertools.product([False, True], repeat=len(places)):
            at = [place for place, hidden in zip(places, chosen, strict=True) if hidden]
            surprise = slow_nats(model, tokens, tokens.index_fill(1, torch.tensor(at).long(), MASK), *one(t), open_)
            expected += t ** len(at) * (1 - t) ** (len(places) - len(at)) * float(surprise)
        level = torch.full((draws,), u, dtype=torch.float64)
        nats = model(Batch(tokens.expand(draws, -1), None, open_.expand(draws, -1), rng(), level)).nats
        assert float(nats.mean()) == pytest.approx(expected, abs=5 * float(nats.std()) / math.sqrt(draws))


def one(t: float) -> tuple[Tensor]:
    return (torch.tensor([t], dtype=torch.float64),)


@torch.no_grad()
def test_who_knows_nothing_pays_the_logarithm_of_the_vocabulary_without_the_mask() -> None:
    model, tokens = masked().eval(), words(1024, 64)
    model.network.get_parameter("output.weight").zero_()
    calls = watched(model)
    loss = model(Batch(tokens, None, everything(tokens), rng()))
    hidden = (calls[0] == MASK).sum(1)
    close(loss.nats.double(), math.log(V - 1) * hidden / (loss.t * 64), 1e-5)
    assert float(loss.nats.mean()) == pytest.approx(math.log(V - 1), rel=0.04)
    assert float(loss.total) == pytest.approx(float(loss.nats.mean()), rel=1e-5)


class Copier(nn.Module):
    """Knows that all tokens of a row are the same one: sure of it when it sees one, and of none when all are masked.

    Its features are one-hot tokens.
    """

    def forward(self, features: Tensor, level: Tensor, valid: Tensor | None) -> Tensor:
        seen = features.sum(1, keepdim=True)
        return (100 * seen.clamp(max=1) * (torch.arange(V) != MASK)).expand_as(features).clone()


@torch.no_grad()
def test_the_bound_of_the_exact_posterior_is_the_likelihood() -> None:
    embedding = nn.Embedding.from_pretrained(torch.eye(V, dtype=torch.float64))
    model = MaskedDiffusion(Copier(), embedding, Constants(MASK), flat=False, config={}).eval()
    tokens = words(40_000, 1).expand(-1, 4)
    nats = model(Batch(tokens, None, everything(tokens), rng())).nats * 4
    assert float(nats.mean()) == pytest.approx(math.log(V - 1), rel=0.02)  # one of v - 1 rows, all as likely


@pytest.mark.parametrize("training", [True, False])
def test_flat_weighs_masked_tokens_alike_in_training_and_is_the_bound_in_evaluation(training: bool) -> None:
    flat, plain = (lively_masked(weight=weight).train(training) for weight in ("flat", "elbo"))
    tokens = words()
    calls = watched(flat)
    ours, theirs = (model(Batch(tokens, None, some(tokens), rng())) for model in (flat, plain))
    assert torch.equal(ours.nats, theirs.nats)  # what is logged is the bound either way
    hidden = (calls[0] != tokens).sum()
    by_hand = (ours.nats * ours.count * ours.t).sum() / hidden
    close(ours.total, by_hand if training else theirs.total)
    assert (abs((ours.total - theirs.total).item()) > 1e-3) == training


@torch.no_grad()
def test_what_is_given_is_seen_and_costs_nothing() -> None:
    model, tokens = lively_masked(), words()
    open_ = torch.arange(N).expand(B, N) >= 3
    calls = watched(model)
    for seed in range(20):
        model(Batch(tokens, None, open_, rng(seed), torch.ones(B, dtype=torch.float64)))
    assert all(torch.equal(seen[:, :3], tokens[:, :3]) and bool((seen[:, 3:] == MASK).all()) for seen in calls)
    free = model(Batch(tokens, None, everything(tokens), rng(), torch.ones(B, dtype=torch.float64)))
    told = model(Batch(tokens, None, open_, rng(), torch.ones(B, dtype=torch.float64)))
    assert told.count.tolist() == [3] * B
    assert not torch.equal(told.nats, free.nats)  # and it is used


@torch.no_grad()
def test_padding_is_neither_masked_nor_scored_nor_seen() -> None:
    model, tokens = lively_masked(), words()
    valid = (torch.arange(N) < 4).expand(B, N)
    calls = watched(model)
    first, second = (model(Batch(torch.where(valid, tokens, other), valid, valid, rng())) for other in (3, 7))
    close(first.nats, second.nats)
    assert bool((calls[0][:, 4:] == 3).all())
    assert first.count.tolist() == [4] * B
    u = torch.ones(B, dtype=torch.float64)
    padded = model(Batch(tokens, valid, valid, rng(), u))
    cut = model(Batch(tokens[:, :4], None, valid[:, :4], rng(), u))
    close(padded.nats, cut.nats)


@pytest.mark.parametrize("weight", ["elbo", "flat"])
def test_text_that_holds_the_mask_is_finite_and_its_mask_costs_nothing(weight: str) -> None:
    model, tokens = lively_masked(weight=weight).train(), words()
    tokens[:, 1] = MASK
    loss: Loss = model(Batch(tokens, None, everything(tokens), rng(), torch.ones(B, dtype=torch.float64)))
    loss.total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert bool(loss.nats.isfinite().all())
    with torch.no_grad():
        log_p = model.logits(torch.full_like(tokens, MASK)).log_softmax(-1)
        places = [place for place in range(N) if place != 1]
        by_hand = -log_p[:, places].gather(-1, tokens[:, places, None]).sum((1, 2)) / N
    close(loss.nats, by_hand)


def test_the_mask_is_never_predicted() -> None:
    model, tokens = lively_masked(), words()
    logits = model.logits(torch.where(some(tokens), MASK, tokens))
    assert bool((logits[..., MASK] == -torch.inf).all())
    assert bool(logits[..., torch.arange(V) != MASK].isfinite().all())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_levels_rise_from_a_thousandth_to_one(u: list[float]) -> None:
    model = masked()
    t = model.levels(torch.tensor(sorted(u), dtype=torch.float32))
    assert t.dtype == torch.float64
    assert bool(((t >= 1e-3) & (t <= 1)).all())
    assert bool((t.diff() >= 0).all())
    ends = model.levels(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [pytest.approx(1e-3), 1.0]


def test_the_loss_reaches_every_part_and_its_numbers_are_detached() -> None:
    model, tokens = lively_masked().train(), words()
    loss = model(Batch(tokens, None, everything(tokens), rng()))
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 0 or name.endswith("qkv.weight"), name
    assert not loss.nats.requires_grad
    assert not loss.t.requires_grad


def test_the_loss_is_a_function_of_its_generator() -> None:
    model, tokens = lively_masked(), words()
    before = torch.random.get_rng_state()
    same, again, other = (model(Batch(tokens, None, some(tokens), rng(seed))).total for seed in (3, 3, 4))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert torch.equal(before, torch.random.get_rng_state())


# --- the system ---


def test_rows_do_not_see_each_other() -> None:
    model, tokens = lively_masked(), words()
    tokens[:, ::2] = MASK
    together = model.logits(tokens)
    for row in range(B):
        close(model.logits(tokens[row : row + 1]), together[row : row + 1])


def test_bf16_is_the_arithmetic_of_the_network_alone() -> None:
    model, tokens = masked(), words()
    with torch.no_grad():
        exact = model.logits(tokens)
        model.precision = "bf16"
        rough = model.logits(tokens)
        loss = model(Batch(tokens, None, everything(tokens), rng()))
    assert rough.dtype == loss.nats.dtype == loss.total.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.05)


def test_the_groups_share_out_the_parameters() -> None:
    model = masked()
    groups = model.parameter_groups()
    assert [id(p) for p in groups["schedule"]] == []
    held = [id(p) for group in groups.values() for p in group]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in model.averaged_parameters()} == set(held)
    assert model.learned_schedule is None
    assert model.facts() == {}


@pytest.mark.parametrize("changes", [{}, {"gates": True, "weight": "flat", "dim": 4}], ids=str)
def test_the_configuration_rebuilds_the_system(changes: dict) -> None:
    model = masked(**changes)
    again = build_system(model.config)
    assert isinstance(again, MaskedDiffusion)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert (again.config, again.constants, again.flat) == (model.config, model.constants, model.flat)


@pytest.mark.parametrize("bad", [{"dim": 0}, {"width": 18}, {"heads": 0}, {"depth": 0}], ids=str)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(CdlmError, match=next(iter(bad))):
        Masked(**bad)


@pytest.mark.parametrize("special", [None, Special(), Special(eos_id=0)])
def test_a_vocabulary_without_a_mask_is_refused(special: Special | None) -> None:
    with pytest.raises(CdlmError, match=r"^a masked model needs a tokenizer with a mask token: .*$"):
        Masked().build(V, special)


# --- the folder ---


@pytest.mark.parametrize("ends", [False, True])
def test_a_loaded_model_is_the_saved_one(tmp_path: Path, ends: bool) -> None:
    model = masked_with_tokenizer(weight="flat")
    model.ends = ends
    model.save_pretrained(tmp_path / "model")
    again = api.load(tmp_path / "model")
    assert isinstance(again, MaskedDiffusion)
    assert (again.ends, again.length, again.config) == (ends, model.length, model.config)
    assert (again.constants, again.flat, again.training) == (model.constants, True, False)
    ours, theirs = (api.generate(m, n=3, prompts=["the"], seed=2) for m in (model, again))
    assert (ours.tokens == theirs.tokens).all()
    assert ours.texts == theirs.texts
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize("ends", [False, True])
def test_a_text_ends_at_its_first_end_if_the_model_was_trained_on_whole_documents(ends: bool) -> None:
    model = masked_with_tokenizer(length=8)
    model.ends = ends
    eos, word = 0, tokenizer().encode("a", add_special_tokens=False)[0]
    with torch.no_grad():  # writes the end or the letter a, whatever it sees
        model.network.get_parameter("output.weight").zero_()
        bias = model.network.get_parameter("output.bias").fill_(-100.0)
        bias[[eos, word]] = 0.0
    samples = api.generate(model, n=6, seed=1)
    text_of = {eos: "\n", word: "a"}
    whole = ["".join(text_of[token] for token in row) for row in samples.tokens.tolist()]
    assert samples.texts == ([text.split("\n")[0] for text in whole] if ends else whole)
    assert any("\n" in text.rstrip("\n") for text in whole)


# --- training ---


def test_a_crashed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, system=masked())
    with pytest.raises(Crash):
        run(cut, system=masked(), act=crash_at(7))
    assert saved(cut)["global_step"] == 4
    run(cut, system=masked(), resume=True)
    assert_same_run(whole, cut)


class Echo:
    """Endless batches of rows that say one token over and over: of likelihood 1 / (v - 1)."""

    def batch(self, index: int) -> Batch:
        tokens = words(32, 1, seed=index).expand(-1, N)
        return Batch(tokens, everything(tokens), everything(tokens))

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, itertools.count())

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError("nothing is resumed here")


@pytest.mark.parametrize("weight", ["elbo", "flat"])
def test_training_brings_the_validation_bound_towards_the_likelihood(tmp_path: Path, weight: str) -> None:
    options = TrainOptions(
        steps=75, accelerator="cpu", warmup=5, validate_every=25, checkpoint_every=75, log_every=25, ema=0.5
    )
    held_out = [Echo().batch(1000 + index) for index in range(10)]
    train(
        masked(weight=weight), Echo(), lambda: held_out, lambda tokens, valid, generator: valid, options, tmp_path,
        progress=False,
    )  # fmt: skip
    measured = rows(tmp_path)
    nats = [float(row["valid_nats"]) for row in measured if row["valid_nats"]]
    likelihood = math.log(V - 1) / N
    assert math.log(V - 1) > nats[0] > nats[1] > nats[2] > 0.9 * likelihood
    assert nats[2] < 2 * likelihood
    buckets = [float(measured[-1][f"nats_u{i}"]) for i in range(10)]
    assert nats[2] == pytest.approx(sum(buckets) / 10)
    assert float(measured[-1]["loss"]) > 0


# --- settings in words ---

SMALL = ("--system.width", "16", "--system.depth", "1", "--system.heads", "2", "--system.dim", "8")


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("system: Masked", Masked()),
        ("system: {class_path: Masked, init_args: {width: 64, weight: flat}}", Masked(width=64, weight="flat")),
        ("system: {class_path: cdlm.masked.system.Masked}", Masked()),
        ("system: {width: 64}", CDCD(width=64)),
        ("system: CDCD", CDCD()),
        ("length: 9", CDCD()),
    ],
)
def test_a_file_names_its_system(yaml: str, expected: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml + "\n")
    config = parse_run(["--config", str(file)])
    assert config.system == expected
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert read_run(tmp_path) == config


def test_the_command_line_names_a_system() -> None:
    config = parse_run(["--system", "Masked", *SMALL, "--system.weight", "flat"])
    assert config.system == Masked(width=16, depth=1, heads=2, dim=8, weight="flat")
    with pytest.raises(CdlmError, match="axis"):
        parse_run(["--system", "Masked", "--system.axis", "linear"])
    with pytest.raises(CdlmError, match="weight"):
        parse_run(["--system", "Masked", "--system.weight", "heavy"])


def arguments(place: Path, *more: str) -> list[str]:
    (place / "text.txt").write_text("".join(f"{line}\n" for line in TEXT))
    return [
        "train", "--text", str(place / "text.txt"), "--out", str(place / "run"), "--cache", str(place / "cache"),
        "--system", "Masked", *SMALL, "--length", "16", "--batch_size", "4", "--validation_rows", "4",
        "--preview", "2", "--training.steps", "2", "--training.accelerator", "cpu", "--quiet",
        "--judge_share", "0", "--unread_share", "0", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("cut", ["pack", "filled"])
def test_a_run_from_text_to_samples(tmp_path: Path, cut: str) -> None:
    main(arguments(tmp_path, "--vocab_size", str(VOCAB), "--rows", cut))
    assert len((tmp_path / "run" / "samples" / "step_000002.txt").read_text().splitlines()) >= 2
    assert all(float(value) > 0 for value in (rows(tmp_path / "run")[-1][f"nats_u{i}"] for i in (0, 9)) if value)
    assert float(rows(tmp_path / "run")[-1]["valid_nats"]) > 0
    model = api.load(tmp_path / "run")
    assert isinstance(model, MaskedDiffusion)
    assert (model.length, model.ends) == (16, cut == "filled")
    assert model.constants == Constants(mask_id=2, eos_id=0)
    samples = api.generate(model, n=2, prompts=["the cat"])
    assert all(text.startswith("the cat") for text in samples.texts)
    main(["train", "--resume", str(tmp_path / "run"), "--training.steps", "3", "--quiet"])
    assert rows(tmp_path / "run")[-1]["step"] == "3"


def test_a_tokenizer_without_a_mask_token_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(tmp_path / "words")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments(tmp_path, "--tokenizer", str(tmp_path / "words")))
    shown = capsys.readouterr()
    assert (caught.value.code, shown.out) == (2, "")
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("cdlm: a masked model needs a tokenizer with a mask token")
    assert not (tmp_path / "run").exists()


def test_filled_rows_are_documents_filled_up_with_their_end(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in TEXT))
    store = build_store(Files((str(tmp_path / "text.txt"),)), "train", tokenizer(), tmp_path)
    for length in (5, 20, 60):
        filled, plain = FilledRows(store, length), DocumentRows(store, length)
        assert len(filled) == len(plain) == len(store)
        assert filled.key != plain.key
        cut = 0
        for ours, theirs in zip(map(filled.__getitem__, range(len(store))), map(plain.__getitem__, range(len(store))),
                                strict=True):  # fmt: skip
            assert ours.valid.all()
            assert np.array_equal(ours.tokens[theirs.valid], theirs.tokens[theirs.valid])
            assert (ours.tokens[~theirs.valid] == store.eos_id).all()
            cut += int(theirs.valid.all() and theirs.tokens[-1] != store.eos_id)
        assert (cut == len(store)) == (length == 5)
        assert filled[-1].tokens.tolist() == filled[len(filled) - 1].tokens.tolist()
