"""Laws of the model folder: what is saved is what is loaded, and what is broken is said in one line."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import loaded, tokenizer, with_tokenizer

from cdlm import api
from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.solvers import Ancestral
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing, write_text
from cdlm.core.types import Condition
from cdlm.policies import Threshold
from cdlm.runs.config import build_system

OURS = {"config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def model() -> EmbeddingDiffusion:
    return with_tokenizer()


@pytest.fixture
def folder(model: EmbeddingDiffusion, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def logits(model: EmbeddingDiffusion) -> torch.Tensor:
    z = torch.randn(2, 5, model.dim, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5, 9.0], dtype=torch.float64)
    return model.denoise(z, t, Condition(z * 0, torch.ones(2, 5, dtype=torch.bool), z)).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- identity ---


def test_a_loaded_model_is_the_saved_one(model: EmbeddingDiffusion, folder: Path) -> None:
    again = loaded(folder)
    assert torch.equal(logits(again), logits(model))
    assert again.config == model.config
    assert again.length == model.length
    assert not again.training
    ours, theirs = (api.generate(m, n=3, steps=5, prompts=["the"]) for m in (model, again))
    assert (ours.tokens == theirs.tokens).all()
    assert ours.texts == theirs.texts


def test_the_schedule_travels_with_the_model(model: EmbeddingDiffusion, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["schedule.averaged"] = torch.randn(weights["schedule.averaged"].shape)
    save_file(weights, folder / "model.safetensors")
    u = torch.tensor([0.3], dtype=torch.float64)
    assert not torch.equal(loaded(folder).schedule.t_of_u(u), model.schedule.t_of_u(u))


def test_the_recommended_sampler_travels_with_the_model(folder: Path, tmp_path: Path) -> None:
    assert "sampling" not in json.loads((folder / "config.json").read_text())
    edit(lambda c: c.update(sampling={"steps": 3, "solver": "Ancestral()", "commit": "Threshold(0.7)"}))(folder)
    found = loaded(folder)
    assert found.sampling == Diffusion(3, solver=Ancestral(), commit=Threshold(0.7))
    found.save_pretrained(tmp_path / "again")
    assert loaded(tmp_path / "again").preset == found.preset
    assert loaded(tmp_path / "again").sampling == found.sampling


def test_saving_what_was_loaded_changes_no_byte(folder: Path, tmp_path: Path) -> None:
    loaded(folder).save_pretrained(tmp_path / "again")
    before, after = contents(folder), contents(tmp_path / "again")
    for files in (before, after):
        del files["tokenizer_config.json"]  # transformers notes where it loaded from
        files.pop("special_tokens_map.json", None)  # an older one writes it, and spells the tokens out the next time
    assert after == before


def test_the_folder_holds_its_files_and_nothing_pickled(folder: Path) -> None:
    found = contents(folder)
    assert set(found) >= OURS
    assert set(found) <= OURS | {"special_tokens_map.json"}
    for name, data in found.items():
        assert not data.startswith((b"\x80", b"PK")), name


def test_other_files_stay_and_nothing_else_is_left(model: EmbeddingDiffusion, folder: Path) -> None:
    before = set(contents(folder))
    (folder / "config.yaml").write_text("mine\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"mine")
    model.save_pretrained(folder)
    assert set(contents(folder)) == before | {"config.yaml", "checkpoints/last.ckpt"}
    assert (folder / "config.yaml").read_text() == "mine\n"


def test_the_card_shows_the_configuration(folder: Path, model: EmbeddingDiffusion) -> None:
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: cdlm\n")
    for name, value in model.config.items():
        assert f'"{name}": {json.dumps(value)}' in card


def test_the_given_card_is_written(model: EmbeddingDiffusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, card="# Mine\n")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


# --- errors ---


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return break_it


def settle(**settings: Any) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return break_it


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        for change in changes:
            change(folder)

    return break_it


def weigh(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return break_it


def cut(share: float) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(share * len(data))])

    return break_it


def cast(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    weights["network.input.weight"] = weights["network.input.weight"].to(dtype)


def spoil(weights: dict[str, torch.Tensor], value: float) -> None:
    weights["network.input.weight"][-1, -1] = value


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return break_it


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (drop("config.json"), "no config.json"),
    "empty config": (write("config.json", b""), "not valid JSON"),
    "broken config": (write("config.json", b'{"cdlm_format": 1,'), "not valid JSON"),
    "config that is no text": (write("config.json", b"\xff\xfe\x00"), "not UTF-8"),
    "config that is a list": (write("config.json", b"[]"), "not a JSON object"),
    "foreign config": (write("config.json", b'{"model_type": "gpt2"}'), "model_type is 'gpt2', expected one of"),
    "later format": (edit(lambda c: c.update(cdlm_format=99)), "cdlm_format 2"),
    "ends of no kind": (edit(lambda c: c.update(ends="no")), "expected truth, got text in 'ends'"),
    "texts that end without an end": (
        both(edit(lambda c: c.update(ends=True)), settle(eos_token=None)),
        "without an end-of-text token",
    ),
    "another mask": (edit(lambda c: c["model"].update(mask_id=1)), "has mask_id 1 and a tokenizer with 2"),
    "settings of a tokenizer": (lambda f: settle(model_max_length={"a": 1})(f), "in 'model_max_length'"),
    "no model": (edit(lambda c: c.pop("model")), "model"),
    "model that is no object": (edit(lambda c: c.update(model=3)), "model"),
    "no length": (edit(lambda c: c.pop("length")), "length"),
    "length that is no number": (edit(lambda c: c.update(length="x")), "length"),
    "another vocabulary": (
        edit(lambda c: c["model"].update(vocab=480)),
        "weights of 480 tokens and a tokenizer of 270",
    ),
    "unknown system": (edit(lambda c: c["model"].update(system="os.system")), "'os.system'"),
    "system that is a list": (edit(lambda c: c["model"].update(system=["cdcd"])), "system"),
    "no system": (edit(lambda c: c["model"].pop("system")), "expected a field system"),
    "unknown field": (edit(lambda c: c["model"].update(colour="red")), "colour"),
    "field of a wrong kind": (
        edit(lambda c: c["model"].update(depth="two")),
        "expected whole number, got text in 'dep",
    ),
    "truth for a number": (
        edit(lambda c: c["model"].update(depth=True)),
        "expected whole number, got truth in 'depth'",
    ),
    "number for a truth": (edit(lambda c: c["model"].update(gates=1)), "expected truth, got whole number in 'gates'"),
    "text that is no choice": (edit(lambda c: c["model"].update(axis="nope")), "unknown choice 'nope' in 'axis'"),
    "number that is none": (edit(lambda c: c["model"].update(t_max=float("nan"))), "t_max"),
    "more layers than tensors": (edit(lambda c: c["model"].update(depth=10**6)), "has depth 1000000, and the weights"),
    "width of terabytes": (edit(lambda c: c["model"].update(width=2**20)), "config.json asks for"),
    "width that no tensor has": (edit(lambda c: c["model"].update(width=2**62)), "width <= "),
    "length that no row has": (edit(lambda c: c.update(length=2**70)), "length"),
    "mask beyond the vocabulary": (
        edit(lambda c: c["model"].update(mask_id=270)),
        "has mask_id 270 and a tok",
    ),
    "nested settings": (
        write("config.json", b'{"cdlm_format": 2, "model": ' + b'{"a": ' * 50_000 + b"1" + b"}" * 50_001),
        "nested too deeply",
    ),
    "field out of range": (edit(lambda c: c["model"].update(t_min=-1.0)), "t_min"),
    "no vocabulary": (edit(lambda c: c["model"].pop("vocab")), "expected a field vocab"),
    "another size": (edit(lambda c: c["model"].update(dim=16)), "config.json asks for"),
    "sampling that is no object": (edit(lambda c: c.update(sampling=3)), "has sampling 3"),
    "unknown setting of sampling": (edit(lambda c: c.update(sampling={"stepps": 3})), "expected some of commit"),
    "sampling of another family": (edit(lambda c: c.update(sampling={"policy": "LLaDA()"})), "expected some of commit"),
    "unknown solver": (edit(lambda c: c.update(sampling={"solver": "Eulr()"})), "there is no solver 'Eulr'"),
    "solver that is a call": (edit(lambda c: c.update(sampling={"solver": "open('x')"})), "there is no solver 'open'"),
    "steps that are no number": (edit(lambda c: c.update(sampling={"steps": "many"})), "sampling that cannot be used"),
    "number of thousands of digits": (
        edit(lambda c: c.update(sampling={"commit": f"Threshold(0x{'F' * 8000})"})),
        "is below 2**63",
    ),
    "steps of a policy that are endless": (
        edit(lambda c: c.update(sampling={"commit": f"LLaDA(0x{'F' * 8000})"})),
        "is below 2**63",
    ),
    "more steps than anybody takes": (edit(lambda c: c.update(sampling={"steps": 10**9})), "more than 100,000 steps"),
    "sampling that the model cannot run": (
        edit(lambda c: c.update(sampling={"commit": "Threshold(0.7)", "reopen": 0.5})),
        "train it with wrong_given",
    ),
    "steps that are none": (edit(lambda c: c.update(sampling={"steps": 0})), "needs a whole number steps >= 1"),
    "no weights": (drop("model.safetensors"), "no model.safetensors"),
    "empty weights": (cut(0.0), "truncated or damaged"),
    "truncated header": (cut(0.01), "truncated or damaged"),
    "truncated weights": (cut(0.9), "truncated or damaged"),
    "weights that are none": (write("model.safetensors", b"\x80\x04." * 100), "truncated or damaged"),
    "missing tensor": (weigh(lambda w: w.__delitem__("network.input.bias")), "misses tensor 'network.input.bias'"),
    "unexpected tensor": (weigh(lambda w: w.update(extra=torch.zeros(1))), "unknown tensor 'extra'"),
    "wrong shape": (weigh(lambda w: w.update({"embedding.weight": torch.zeros(3, 8)})), "has shape (3, 8)"),
    "weights of whole numbers": (weigh(lambda w: cast(w, torch.int32)), "is int32, expected floats, such as float32"),
    "weights of truths": (weigh(lambda w: cast(w, torch.bool)), "is bool, expected floats, such as float32"),
    "weights of eight bits": (weigh(lambda w: cast(w, torch.float8_e4m3fn)), "is F8_E4M3, expected one of"),
    "weights that are not numbers": (weigh(lambda w: spoil(w, float("nan"))), "values that are no numbers"),
    "weights without end": (weigh(lambda w: spoil(w, float("-inf"))), "values that are no numbers"),
    "no tokenizer": (drop("tokenizer.json"), "no tokenizer.json"),
    "broken tokenizer": (write("tokenizer.json", b"{"), "tokenizer"),
    "broken tokenizer settings": (write("tokenizer_config.json", b"{"), "tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(folder: Path, case: str) -> None:
    break_it, message = BROKEN[case]
    break_it(folder)
    with pytest.raises(CdlmError) as caught:
        api.load(folder)
    assert message in str(caught.value)
    said = str(caught.value)
    assert "\n" not in said


def test_an_unknown_precision_is_refused(folder: Path) -> None:
    with pytest.raises((CdlmError, TypeError), match="fp16"):  # the type checks of these tests come first
        api.load(folder, precision="fp16")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "runs/nowhere", "a/b/c", "~/nowhere", ""])
def test_no_folder(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CdlmError, match=r"expected|write a path"):
        api.load(name)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(CdlmError, match="not a model folder"):
        api.load(folder / "config.json")


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CdlmError, match="could not be fetched from the Hub") as caught:
        api.load("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there(folder: Path) -> None:
    for device in ("cuda:99", "abacus"):
        with pytest.raises(CdlmError, match="use auto, or cpu"):
            api.load(folder, device=device)


@pytest.mark.parametrize("config", [{}, {"system": None}, {"system": "cdcd"}, {"system": "cdcd", "vocab": 5, "x": 1}])
def test_configurations_that_are_none_build_nothing(config: dict[str, Any]) -> None:
    with pytest.raises(CdlmError):
        build_system(config)


# --- a full disk ---


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may be longer than 64 KiB, in this process; what is written beyond fails."""
    limit, former = resource.RLIMIT_FSIZE, signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (1 << 16, before[1]))
    yield
    resource.setrlimit(limit, before)
    signal.signal(signal.SIGXFSZ, former)


def test_a_full_disk_leaves_the_old_weights(
    model: EmbeddingDiffusion, folder: Path, request: pytest.FixtureRequest
) -> None:
    before = contents(folder)
    request.getfixturevalue("full_disk")
    with pytest.raises(CdlmError, match=r"cannot write .*model\.safetensors \(file too large\)"):
        with_tokenizer(seed=9).save_pretrained(folder)
    assert contents(folder)["model.safetensors"] == before["model.safetensors"]
    assert set(contents(folder)) == set(before)
    assert torch.equal(logits(loaded(folder)), logits(model))


def test_files_have_the_modes_that_the_umask_gives(model: EmbeddingDiffusion, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {0o640}


# --- replacing ---


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_appears_whole_or_not_at_all(old: str | None, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.txt"
    if old is not None:
        write_text(path, old)
    with pytest.raises(KeyError), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        assert (path.read_text() if path.exists() else None) == old
        raise KeyError
    assert (path.read_text() if path.exists() else None) == old
    write_text(path, "new é")
    assert path.read_bytes() == "new é".encode()
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
        assert [p.name for p in path.iterdir()] == [content]
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.mkdir()
        (temporary / "three").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in path.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_cannot_be_put_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    path, move = tmp_path / "folder", os.replace
    path.mkdir()
    (path / "old").write_text("old")
    moves: list[str] = []

    def second_fails(source: Path, target: Path) -> None:
        moves.append(str(source))
        if len(moves) == 2:
            raise OSError(errno.EIO, "Input/output error")
        move(source, target)

    monkeypatch.setattr("os.replace", second_fails)
    with pytest.raises(CdlmError, match="cannot write"), replacing(path) as temporary:
        temporary.mkdir()
    assert (path / "old").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_how_much_is_free(number: int, tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match=r"no space left to write .* bytes are free"), replacing(tmp_path / "x"):
        raise OSError(number, "full")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CdlmError, match="cannot write") as caught:
        write_text(tmp_path / "file" / "below" / "x.txt", "text")
    assert "\n" not in str(caught.value)


def test_the_tokenizer_survives(folder: Path) -> None:
    again = loaded(folder).tokenizer
    assert again is not None
    text = "the cat — añ  <|endoftext|>\n"
    assert again.encode(text) == tokenizer().encode(text)
    assert again.eos_token_id == tokenizer().eos_token_id
    assert len(again) == len(tokenizer())
