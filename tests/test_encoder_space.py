"""A frozen encoder's space, its cache, and the small encoder that `cdlm train-encoder` trains."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign import edit
from torch import Tensor
from toys import TEXT, VOCAB, tokenizer

from cdlm.cli.main import main
from cdlm.continuous.encoder_space import ENOUGH, EncoderSpace
from cdlm.continuous.vector_cache import VectorCache
from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.data.tokenizer import encode_batch, load_tokenizer, train_tokenizer
from cdlm.models.encoder import fingerprint_of
from cdlm.models.foreign import tokenizer_hash
from cdlm.models.hub import read_tokenizer
from cdlm.runs.config import parse_run
from cdlm.sampling.texts import save_tokenizer

LENGTH, WIDTH = 12, 8
BERT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": LENGTH,
}  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
T5: dict[str, Any] = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
    "masked bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**{**BERT, "max_position_embeddings": LENGTH + 2})
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "t5 encoder": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
}
"""Networks of transformers with random weights; those of BERT have dropout."""


def write(folder: Path, kind: str = "bert", seed: int = 0) -> Path:
    """A tiny encoder with the tokenizer of the toys."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ENCODERS[kind]()
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    network.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny encoder of each kind."""
    place = tmp_path_factory.mktemp("encoders")
    return {kind: write(place / kind.replace(" ", "-"), kind) for kind in ENCODERS}


@pytest.fixture
def space(folders: dict[str, Path]) -> EncoderSpace:
    return EncoderSpace.open(str(folders["bert"]))


def some(rows: int = 4, seed: int = 0, share: float = 0.6) -> tuple[Tensor, Tensor]:
    """Random tokens, about `share` of them seen."""
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, LENGTH), generator=source)
    return tokens, torch.rand((rows, LENGTH), generator=source) < share


def refused(call: Callable[[], object]) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(CdlmError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the vectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
def test_what_is_not_seen_changes_nothing_and_is_zero(folders: dict[str, Path], kind: str) -> None:
    space = EncoderSpace.open(str(folders[kind]))
    tokens, seen = some()
    seen[1], seen[2] = True, False
    vectors = space(tokens, seen)
    assert vectors.shape == (4, LENGTH, WIDTH)
    assert vectors.dtype == torch.float32
    assert vectors[seen].isfinite().all()
    assert vectors[seen].abs().sum(-1).min() > 0
    assert not vectors[~seen].any()
    assert torch.equal(space(torch.where(seen, tokens, (tokens + 7) % VOCAB), seen), vectors)
    more = seen.clone()
    more[0, ~seen[0]] = True
    assert not torch.allclose(space(tokens, more)[0, seen[0]], vectors[0, seen[0]], atol=1e-3)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_row_is_the_same_in_any_batch(folders: dict[str, Path], kind: str) -> None:
    space = EncoderSpace.open(str(folders[kind]))
    tokens, seen = some(seed=1)
    seen[3] = False
    alone = torch.cat([space(tokens[i : i + 1], seen[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(space(tokens, seen), alone, atol=1e-5, rtol=1e-5)
    assert space(tokens[:0], seen[:0]).shape == (0, LENGTH, WIDTH)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_vectors_are_the_last_hidden_states_of_transformers(folders: dict[str, Path], kind: str) -> None:
    tokens, seen = some()
    seen[:] = True
    network = transformers.AutoModel.from_pretrained(folders[kind]).eval()
    network = network.get_encoder() if kind == "t5" else network
    with torch.no_grad():
        expected = network(input_ids=tokens).last_hidden_state
    space = EncoderSpace.open(str(folders[kind]))
    torch.testing.assert_close(space(tokens, seen), expected, atol=1e-5, rtol=1e-5)
    space.mean.fill_(0.5)
    space.std.fill_(2.0)
    torch.testing.assert_close(space(tokens, seen), (expected - 0.5) / 2, atol=1e-5, rtol=1e-5)


def test_an_encoder_that_looks_back_alone_is_causal_and_the_others_are_not(folders: dict[str, Path]) -> None:
    tokens, seen = some()
    seen[:] = True
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    for kind, causal in {"gpt2": True, "bert": False, "t5": False}.items():
        space = EncoderSpace.open(str(folders[kind]))
        same = torch.allclose(space(tokens, seen)[:, :-1], space(changed, seen)[:, :-1], atol=1e-6)
        assert same == causal, kind


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_fitted_vectors_have_mean_zero_and_standard_deviation_one(space: EncoderSpace, share: float) -> None:
    batches = [some(rows=8, seed=seed, share=share) for seed in range(3)]
    space.fit(batches)
    vectors = torch.cat([space(tokens, seen)[seen] for tokens, seen in batches]).double()
    assert abs(vectors.mean().item()) < 1e-6
    assert abs(vectors.std(correction=0).item() - 1) < 1e-6


def test_fitting_takes_no_more_text_than_it_needs(space: EncoderSpace) -> None:
    taken = 0

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal taken
        tokens, seen = some(rows=1000)
        seen[:] = True
        while True:
            taken += tokens.numel()
            yield tokens, seen

    space.fit(endless())
    assert ENOUGH <= taken < ENOUGH + 1000 * LENGTH


def test_fitting_needs_tokens_that_are_seen(space: EncoderSpace) -> None:
    tokens, seen = some()
    for batches in ([], [(tokens, torch.zeros_like(seen))]):
        assert "fitted on text, got none" in refused(lambda b=batches: space.fit(b))
    assert (space.mean.item(), space.std.item()) == (0.0, 1.0)


def test_the_encoder_is_frozen_float32_and_in_evaluation_mode_whatever_its_owner_is(space: EncoderSpace) -> None:
    tokens, seen = some()
    expected = space(tokens, seen)
    owner = torch.nn.ModuleList([space]).train().double()
    with torch.autocast("cpu", torch.bfloat16):
        vectors = space(tokens, seen)
    assert torch.equal(vectors, expected)  # BERT has dropout
    assert not vectors.requires_grad
    assert list(owner.parameters()) == []
    assert not any(weight.requires_grad for weight in space.encoder.network.parameters())


def test_the_global_random_state_stays(folders: dict[str, Path]) -> None:
    """BERT's pooling head is not in the weights of a masked language model: transformers draws it."""
    before = torch.get_rng_state()
    EncoderSpace.open(str(folders["masked bert"]))(*some())
    assert torch.equal(before, torch.get_rng_state())


# --- what is saved and copied -----------------------------------------------------------------------------------------


def test_only_mean_and_standard_deviation_are_saved_and_copies_share_the_encoder(space: EncoderSpace) -> None:
    space.fit([some()])
    assert list(space.state_dict()) == ["mean", "std"]
    twin = copy.deepcopy(space)
    assert twin.encoder.network is space.encoder.network
    twin.mean.fill_(9.0)
    assert space.mean.item() != 9.0


def test_a_space_needs_no_encoder_until_vectors_are_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "encoder")
    opened = EncoderSpace.open(str(folder))
    opened.fit([some()])
    shutil.rmtree(folder)
    later = EncoderSpace(opened.source, opened.dim, opened.fingerprint)
    later.load_state_dict(opened.state_dict())
    assert later.std.item() == opened.std.item() != 1.0
    assert len(pickle.dumps(opened)) < 20_000
    said = refused(lambda: later(*some()))
    assert str(folder) in said
    assert "is not there: copy the one that the model was trained with" in said
    assert opened.fingerprint[:24] in said


def test_a_moved_encoder_is_the_same_one_and_another_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["bert"]
    found = EncoderSpace.open(str(folder))
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert fingerprint_of(moved) == found.fingerprint
    tokens, seen = some()
    assert torch.equal(EncoderSpace(str(moved), WIDTH, found.fingerprint)(tokens, seen), found(tokens, seen))
    other = write(tmp_path / "other", seed=1)
    said = refused(lambda: EncoderSpace(str(other), WIDTH, found.fingerprint)(tokens, seen))
    assert "is another one, of fingerprint encoder:" in said


@pytest.mark.parametrize(
    ("file", "change"), [("config.json", {"layer_norm_eps": 1e-3}), ("tokenizer_config.json", {"eos_token": "<|pad|>"})]
)
def test_the_fingerprint_is_of_settings_and_tokenizer_too(
    folders: dict[str, Path], tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "encoder")
    before = fingerprint_of(folder)
    edit(folder / "config.json", transformers_version="4.0.0")
    assert fingerprint_of(folder) == before
    edit(folder / file, **change)
    assert fingerprint_of(folder) != before


# --- bad folders ------------------------------------------------------------------------------------------------------

BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "settings of no model": (lambda f: (f / "config.json").write_text("{}"), "holds no encoder of Hugging Face"),
    "no hidden size": (
        lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), "no hidden_size and vocab_size",
    ),
    "code of its own": (
        lambda f: edit(f / "config.json", model_type="odd", auto_map={"AutoConfig": "odd.Odd"}),
        "holds no encoder of Hugging Face",
    ),
    "no fast tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json: take an encoder with a fast"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be read"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "neither model.safetensors nor",
    ),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 4), "truncated or damaged"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), "take the unquantised model"),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_a_folder_that_is_no_encoder_is_refused(folders: dict[str, Path], tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "encoder")
    break_it, message = BREAKS[what]
    break_it(folder)
    assert message in refused(lambda: EncoderSpace.open(str(folder)))


def test_a_place_that_is_not_there_is_refused() -> None:
    assert "nowhere is not a model folder" in refused(lambda: EncoderSpace.open("nowhere"))


def test_rows_longer_than_the_encoder_can_read_are_refused(folders: dict[str, Path]) -> None:
    tokens = torch.zeros(1, LENGTH + 1, dtype=torch.long)
    for kind in ("bert", "roberta", "gpt2"):
        space = EncoderSpace.open(str(folders[kind]))
        assert f"longer than the encoder {space.source} can read, {LENGTH}" in refused(
            lambda s=space: s(tokens, tokens == 0)
        )
    assert EncoderSpace.open(str(folders["t5"]))(tokens, tokens == 0).isfinite().all()


def test_the_tokenizer_must_be_the_encoders_own(space: EncoderSpace, folders: dict[str, Path], tmp_path: Path) -> None:
    space.check_tokenizer(tokenizer())
    space.check_tokenizer(load_tokenizer(str(folders["bert"])))
    other = train_tokenizer([*TEXT, "something else entirely, something else"] * 8, VOCAB)
    said = refused(lambda: space.check_tokenizer(other))
    assert f"set tokenizer: {folders['bert']} in the run" in said
    folder = write(tmp_path / "small")
    larger = train_tokenizer([*TEXT, "something else entirely, something else"] * 8, VOCAB + 2)
    larger.save_pretrained(folder)
    said = refused(lambda: EncoderSpace.open(str(folder)).check_tokenizer(larger))
    assert f"has {VOCAB + 2} tokens, and its weights know {VOCAB}" in said


def test_a_tokenizer_that_separates_texts_ends_them_with_its_separator(tmp_path: Path) -> None:
    """BERT's has no end of a text; what is saved in a run folder is the same one."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"])}
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    transformers.BertTokenizer(vocab=vocab).save_pretrained(tmp_path / "bert")
    loaded = load_tokenizer(str(tmp_path / "bert"))
    assert loaded.eos_token_id == vocab["[SEP]"]
    assert encode_batch(loaded, ["The cat"]) == [[5, 6]]
    loaded.save_pretrained(tmp_path / "run")
    assert tokenizer_hash(read_tokenizer(tmp_path / "run")) == tokenizer_hash(loaded)
    edit(tmp_path / "bert" / "tokenizer_config.json", eos_token="[CLS]")
    assert load_tokenizer(str(tmp_path / "bert")).eos_token_id == vocab["[CLS]"]


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_cache_gives_the_vectors_as_float16_the_first_time_and_later(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "encoder")
    space = EncoderSpace.open(str(folder))
    space.fit([some()])
    tokens, seen = some(seed=3)
    seen[2] = False
    direct = space.encoder(tokens, seen).half().float()
    expected = torch.where(seen[..., None], (direct - space.mean) / space.std, 0)
    space.use_cache(tmp_path / "vectors")
    assert torch.equal(space(tokens, seen), expected)
    shutil.rmtree(folder)
    later = EncoderSpace(str(folder), WIDTH, space.fingerprint)
    later.load_state_dict(space.state_dict())
    later.use_cache(tmp_path / "vectors")
    order = torch.tensor([3, 0, 2, 1, 0])
    assert torch.equal(later(tokens[order], seen[order]), expected[order])
    assert "is not there" in refused(lambda: later((tokens + 1) % VOCAB, seen))


def test_rows_that_differ_in_what_is_seen_are_kept_apart(space: EncoderSpace, tmp_path: Path) -> None:
    tokens, seen = some(rows=1)
    fewer = seen.clone()
    fewer[0, seen[0].nonzero()[0]] = False
    space.use_cache(tmp_path)
    for mask in (seen, fewer, seen):
        direct = space.encoder(tokens, mask).half().float()
        assert torch.equal(space(tokens, mask), torch.where(mask[..., None], direct, 0))


def test_the_cache_takes_two_bytes_a_number(space: EncoderSpace, tmp_path: Path) -> None:
    tokens, seen = some(rows=50)
    space.use_cache(tmp_path)
    space(tokens, seen)
    (file,) = tmp_path.glob("*.sqlite")
    connection = sqlite3.connect(file)
    held = connection.execute("SELECT SUM(LENGTH(content)), COUNT(*) FROM vectors").fetchone()
    connection.close()
    assert held == (int(seen.sum()) * WIDTH * 2, 50)


def test_what_was_kept_first_stays(tmp_path: Path) -> None:
    """So processes that compute the same row at the same time go on with the same vectors."""
    cache = VectorCache(tmp_path / "vectors.sqlite", 1)
    cache.write({b"a": b"12", b"b": b""})
    cache.write({b"a": b"34", b"c": b"56"})
    assert cache.read([b"a", b"b", b"c", b"d", b"a"]) == {b"a": b"12", b"b": b"", b"c": b"56"}


def test_a_cache_that_is_broken_or_cannot_be_written_is_refused(space: EncoderSpace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(lambda: space.use_cache(tmp_path / "file"))
    space.use_cache(tmp_path)
    tokens, seen = some()
    space(tokens, seen)
    (file,) = tmp_path.glob("*.sqlite")
    connection = sqlite3.connect(file)
    connection.execute("UPDATE vectors SET content = x'00'")
    connection.commit()
    connection.close()
    assert "was altered: delete it" in refused(lambda: space(tokens, seen))
    file.write_bytes(b"no database at all" * 100)
    assert "delete the file, or leave the cache out" in refused(lambda: space(tokens, seen))


def test_vectors_too_long_for_float16_are_not_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "encoder")
    network = transformers.BertModel.from_pretrained(folder)
    with torch.no_grad():
        network.get_parameter("encoder.layer.1.output.LayerNorm.bias").fill_(1e6)
    network.save_pretrained(folder)
    space = EncoderSpace.open(str(folder))
    space.use_cache(tmp_path / "vectors")
    assert "too long for float16" in refused(lambda: space(*some()))


# --- cdlm train-encoder -----------------------------------------------------------------------------------------------

SETTINGS = """
source: {{class_path: Files, init_args: {{paths: [{text}]}}}}
vocab_size: {vocab}
length: 12
rows: document
batch_size: 8
validation_rows: 40
judge_share: 0
unread_share: 0
cache: {cache}
training: {{steps: 1}}
"""
SMALL = ("--width", "16", "--depth", "1", "--heads", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a run on a text whose documents each repeat one of six letters."""
    place = tmp_path_factory.mktemp("text")
    lines = "".join(f"{letter * length}\n" for letter in "abcdef" for length in range(6, 12))
    (place / "text.txt").write_text(lines * 7)
    file = place / "run.yaml"
    file.write_text(SETTINGS.format(text=place / "text.txt", cache=place / "cache", vocab=259))
    return file


def told_by(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())["held_out"]


def test_a_trained_encoder_tells_masked_tokens_and_is_one_for_a_space(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    out, size = tmp_path / "encoder", ("--width", "32", "--depth", "1", "--heads", "2")
    words = ["train-encoder", str(settings), str(out), *size, "--steps", "250", "--lr", "0.01"]
    main([*words, "--device", "cpu", "--quiet"])
    assert torch.equal(before, torch.get_rng_state())
    assert capsys.readouterr().out == ""
    told = told_by(out)
    assert told["tokens"] > 20
    assert told["nats"] < math.log(6) / 2  # the letters are equally frequent, so ln 6 is what frequencies alone give
    assert told["accuracy"] > 2 / 6
    space = EncoderSpace.open(str(out))
    assert (space.dim, space.encoder.length) == (32, 12)
    space.check_tokenizer(load_tokenizer(str(out)))
    rows = torch.arange(96).reshape(8, 12)
    space.fit([(rows, rows > 5)])
    assert space.std.item() not in (0.0, 1.0)


def test_the_same_arguments_give_the_same_files(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(["train-encoder", str(settings), str(tmp_path / name), *SMALL, "--steps", "3", "--seed", seed])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == said[1] != said[2]
    told = told_by(tmp_path / "a")
    line = f"held-out text: {told['nats']:.3f} nats a masked token, {told['accuracy']:.1%} of {told['tokens']:,} told"
    assert said[0].startswith(line)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "abc"]
    assert files[0] == files[1]
    assert files[0]["model.safetensors"] != files[2]["model.safetensors"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files[0].keys()
    assert str(tmp_path) not in files[0]["README.md"].decode()


def test_a_run_folder_gives_its_text_and_tokenizer(settings: Path, tmp_path: Path) -> None:
    main(["train-encoder", str(settings), str(tmp_path / "before"), *SMALL, "--steps", "2", "--quiet"])
    run = tmp_path / "run"
    write_text(run / "config.yaml", parse_run(["--config", str(settings)]).to_yaml())
    save_tokenizer(load_tokenizer(str(tmp_path / "before")), run)
    main(["train-encoder", str(run), str(tmp_path / "of-run"), *SMALL, "--steps", "2", "--quiet"])
    of_run, before = (EncoderSpace.open(str(tmp_path / name)) for name in ("of-run", "before"))
    assert of_run.fingerprint == before.fingerprint
    of_run.check_tokenizer(read_tokenizer(run))


def test_settings_may_name_the_encoder_that_is_to_be_made(settings: Path, tmp_path: Path) -> None:
    out, named = tmp_path / "encoder", tmp_path / "run.yaml"
    named.write_text(settings.read_text() + f"tokenizer: {out}\n")
    made = list[str]()
    for _ in range(2):
        main(["train-encoder", str(named), str(out), *SMALL, "--steps", "2", "--quiet"])
        made.append(fingerprint_of(out))
    assert made[0] == made[1]


def without_mask(settings: Path, tmp_path: Path) -> Path:
    """Settings with a tokenizer that has no mask."""
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    edit(tmp_path / "tokenizer" / "tokenizer_config.json", mask_token=None)
    file = tmp_path / "masked.yaml"
    file.write_text(settings.read_text() + f"tokenizer: {tmp_path / 'tokenizer'}\n")
    return file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere is neither a run folder nor a file of settings"),
        (["empty", "out"], "has no config.yaml"),
        (["odd.yaml", "out"], "no setting 'colour'"),
        (["masked.yaml", "out"], "the tokenizer has no mask token"),
        (["run.yaml", "mine"], "expected an encoder of cdlm train-encoder or no folder"),
        (["run.yaml", "odd.yaml/below"], "cannot write"),
        (["run.yaml", "out", "--steps", "0"], "steps >= 1"),
        (["run.yaml", "out", "--width", "18"], "try width=16"),
        (["run.yaml", "out", "--width", "9", "--heads", "3"], "a multiple of 2 * heads"),
        (["run.yaml", "out", "--mask-share", "1"], "0 < mask_share < 1"),
        (["run.yaml", "out", "--lr", "0"], "lr > 0"),
        (["run.yaml", "out", "--seed", "-1"], "seed >= 0"),
        (["run.yaml", "out", "--colour", "red"], "no setting --colour"),
        (["run.yaml"], "out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(settings, "run.yaml")
    Path("odd.yaml").write_text("colour: red\n")
    Path("empty").mkdir()
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    without_mask(settings, tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["train-encoder", *arguments])
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.err.count("\n") == 1, shown.err
    assert message in shown.err
    assert shown.out == ""
    assert not Path("out").exists()
    assert Path("mine/thesis.txt").read_text() == "years of work"


def test_a_training_that_diverges_leaves_no_encoder(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["train-encoder", str(settings), str(out), *SMALL, "--steps", "9", "--lr", "1e30", "--quiet"])
    assert caught.value.code == 2
    assert "lower lr, which is 1e+30" in capsys.readouterr().err
    assert not out.exists()


def test_an_encoder_takes_the_place_of_an_encoder(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    widths = []
    for width in ("16", "32"):
        main(["train-encoder", str(settings), str(out), *SMALL, "--steps", "1", "--quiet", "--width", width])
        widths.append(EncoderSpace.open(str(out)).dim)
    assert widths == [16, 32]
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    assert math.isfinite(told_by(out)["nats"])
