"""Published checkpoints to model folders and back: the same weights, little memory, and one line for what is broken."""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import SMALL, loaded, with_tokenizer

from cdlm import api
from cdlm.continuous.objectives import Variational
from cdlm.continuous.published.plaid import PlaidLayout
from cdlm.continuous.systems.plaid import Plaid
from cdlm.core.errors import CdlmError
from cdlm.core.tensors import Spec, lazy_tensors, write_tensors
from cdlm.core.types import Condition
from cdlm.runs.convert import convert

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent / "golden" / "plaid"
FILES = {"noise_schedule.pt", "gamma_bounds.pt", "embedding_matrix.pt", "model.pt"}
LAYOUT = PlaidLayout(12)


@cache
def words(size: int) -> "PreTrainedTokenizerFast":
    """A tokenizer of so many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", clean_up_tokenization_spaces=False)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A published archive, and the tokenizer that belongs to it."""
    folder = tmp_path / "archive"
    shutil.copytree(GOLDEN / "weights", folder)
    words(64).save_pretrained(folder)
    return folder


@pytest.fixture
def ours(archive: Path, tmp_path: Path) -> Path:
    convert(LAYOUT, archive, tmp_path / "ours")
    return tmp_path / "ours"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def states(folder: Path) -> dict[str, Tensor]:
    there = {name: torch.load(folder / name, weights_only=True) for name in FILES}
    return {f"{file}: {name}": value for file, state in there.items() for name, value in state.items()}


def refused(source: Path, out: Path, *named: str, tokenizer: str | None = None, layout: PlaidLayout = LAYOUT) -> None:
    """One line with these words, and nothing written."""
    before = set(out.parent.iterdir())
    with pytest.raises(CdlmError) as caught:
        convert(layout, source, out, tokenizer)
    line = str(caught.value)
    assert "\n" not in line
    assert [word for word in named if word not in line] == [], line
    assert set(out.parent.iterdir()) == before


# --- identity ---


def test_a_converted_archive_is_a_model_that_generates(ours: Path) -> None:
    model = loaded(ours)
    z = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5, 9.0], dtype=torch.float64)
    made = model.denoise(z, t, Condition(z * 0, torch.ones(2, 12, dtype=torch.bool), z * 0))
    assert made.logits.shape == (2, 12, 64)
    samples = api.generate(model, n=2, steps=3, prompts=["w5 w9"])
    assert samples.tokens[:, :2].tolist() == [[5, 9]] * 2
    assert model.length == 12


def test_there_and_back_is_the_identity(ours: Path, tmp_path: Path) -> None:
    convert(LAYOUT, ours, tmp_path / "official")
    assert set(contents(tmp_path / "official")) >= FILES
    convert(LAYOUT, tmp_path / "official", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(ours)


def test_a_model_that_was_trained_comes_back_as_it_was(tmp_path: Path) -> None:
    """Length, settings, and how training was going: none of it is in the archive."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Plaid(**{**SMALL, "network": "released", "output_prior_warmup": 2, "self_conditioning": 0.5}).build(64)
    model.tokenizer, model.length = words(64), 12
    model.after_step()
    model.after_step()
    assert isinstance(model.objective, Variational)
    model.objective.moments.copy_(torch.tensor([[0.1, 0.7], [1 / 3, 5.0]]))
    model.save_pretrained(tmp_path / "trained")
    convert(PlaidLayout(99), tmp_path / "trained", tmp_path / "out")
    convert(PlaidLayout(99), tmp_path / "out", tmp_path / "again")
    first, second = contents(tmp_path / "trained"), contents(tmp_path / "again")
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first["config.json"] == second["config.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"length": 12}', '{"length": "x", "settings": {}, "tensors": {}}'])
def test_what_we_wrote_beside_an_archive_is_read_with_care(archive: Path, tmp_path: Path, text: str) -> None:
    (archive / "cdlm.json").write_text(text)
    refused(archive, tmp_path / "out", "cdlm.json")


def test_back_and_there_is_the_identity(archive: Path, ours: Path, tmp_path: Path) -> None:
    convert(LAYOUT, ours, tmp_path / "official")
    first, second = states(archive), states(tmp_path / "official")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.shape == second[name].shape, name
        assert torch.equal(value, second[name]), name
    for name in FILES:  # each tensor in a storage of its own
        assert (tmp_path / "official" / name).stat().st_size < 1.2 * (archive / name).stat().st_size + 2000


def test_a_model_of_ours_goes_there_once_its_own_position_term_is_in_full(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Plaid(**{**SMALL, "network": "released", "output_prior_warmup": 2}).build(64)
    model.tokenizer, model.length = words(64), 12
    model.save_pretrained(tmp_path / "young")
    refused(tmp_path / "young", tmp_path / "out", "own-position", "0 of 2")
    for _ in range(2):
        model.after_step()
    model.save_pretrained(tmp_path / "trained")
    convert(LAYOUT, tmp_path / "trained", tmp_path / "out")
    convert(LAYOUT, tmp_path / "out", tmp_path / "again")
    z = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    question = z, torch.tensor([2.0], dtype=torch.float64), Condition(z * 0, torch.ones(1, 5, dtype=torch.bool), z)
    a, b = (loaded(tmp_path / name).denoise(*question).logits for name in ("trained", "again"))
    assert torch.equal(a, b)


def test_the_card_says_where_it_comes_from(ours: Path) -> None:
    card = (ours / "README.md").read_text()
    assert "igul222/plaid" in card
    assert "licence" in card


# --- files of tensors ---


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
    made = {f"x{i}": torch.randn(3, i + 1, generator=generator).to(kind) for i, kind in enumerate(kinds)}
    return {**made, "one": torch.tensor(7), "none": torch.zeros(0, 4), "turned": torch.randn(4, 3).T}


def test_the_file_is_the_one_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {name: value.contiguous() for name, value in some_tensors().items()}
    specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    write_tensors(tmp_path / "ours", specs, {name: (lambda v=value: v) for name, value in tensors.items()})
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_reading_one_by_one_is_reading_all(tmp_path: Path) -> None:
    save_file({name: value.contiguous() for name, value in some_tensors().items()}, tmp_path / "file", {"a": "b"})
    whole, found = load_file(tmp_path / "file"), lazy_tensors(tmp_path / "file")
    assert found.keys() == whole.keys()
    for name, (spec, content) in found.items():
        assert spec == Spec(tuple(whole[name].shape), whole[name].dtype)
        assert content().dtype == whole[name].dtype
        assert torch.equal(content(), whole[name])
        assert content().untyped_storage().nbytes() == whole[name].nbytes


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: data[:6],
        lambda data: b"",
        lambda data: b"\xff" * 40 + data,
        lambda data: data[:8] + b"{[" + data[10:],
        lambda data: data.replace(b"F32", b"F99"),
    ],
)
def test_a_damaged_file_is_said_in_one_line(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = tmp_path / "file"
    save_file(some_tensors() | {"turned": torch.zeros(1)}, file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CdlmError, match="damaged") as caught:
        lazy_tensors(file)
    assert "\n" not in str(caught.value)


# --- what is broken ---


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_module(archive: Path, tmp_path: Path, name: str) -> None:
    (archive / name).unlink()
    refused(archive, tmp_path / "out", name)


def change(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    torch.save(how(torch.load(file, weights_only=True)), file)


def without(state: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize(
    ("file", "how", "named"),
    [
        ("model.pt", lambda s: without(s, "1.attn_out"), ["blocks.1.attn_out.weight", "misses"]),
        ("model.pt", lambda s: without(s, "blocks.0"), ["blocks.0", "misses"]),
        ("model.pt", lambda s: without(s, "blocks"), ["blocks.0", "misses"]),
        ("model.pt", lambda s: {**s, "blocks.1.bias": torch.zeros(2)}, ["blocks.1.bias", "unknown"]),
        ("model.pt", lambda s: {**s, "input_linear.weight": torch.zeros(3)}, ["input_linear", "(3,)"]),
        ("model.pt", lambda s: {**s, "output_linear.bias": torch.zeros(60)}, ["output", "(60,)", "(64,)"]),
        ("model.pt", lambda s: {**s, "rotary_emb.inv_freq": torch.ones(7)}, ["frequencies", "(7,)"]),
        ("gamma_bounds.pt", lambda s: {"gamma_0": s["gamma_0"]}, ["gamma_1"]),
        ("noise_schedule.pt", lambda s: {**s, "W1": torch.zeros(512, 1)}, ["schedule.w1", "(512,)"]),
        ("embedding_matrix.pt", lambda s: {"matrix": torch.zeros(60, 16)}, ["(64, 32)", "(60, 32)"]),
        ("embedding_matrix.pt", lambda s: {"matrix": "text"}, ["embedding_matrix.pt"]),
        ("embedding_matrix.pt", lambda s: [torch.zeros(2)], ["state dict"]),
        ("embedding_matrix.pt", lambda s: {"matrix": Path("x")}, ["embedding_matrix.pt"]),
    ],
)
def test_an_archive_that_does_not_fit(
    archive: Path, tmp_path: Path, file: str, how: Callable[[dict[str, Any]], Any], named: list[str]
) -> None:
    change(archive / file, how)
    refused(archive, tmp_path / "out", *named)


@pytest.mark.parametrize("keep", [0, 100, 1000])
def test_a_truncated_file(archive: Path, tmp_path: Path, keep: int) -> None:
    (archive / "model.pt").write_bytes((archive / "model.pt").read_bytes()[:keep])
    refused(archive, tmp_path / "out", "model.pt", "copy it again")


def test_a_file_that_ends_in_its_weights_leaves_nothing_behind(archive: Path, tmp_path: Path) -> None:
    official = LAYOUT.read(archive)
    torn = official._replace(tensors={**official.tensors, "network.output.bias": (Spec((64,), torch.float32), fails)})

    class Torn(PlaidLayout):
        def read(self, folder: Path) -> Any:
            return torn

    before = set(tmp_path.iterdir())
    with pytest.raises(CdlmError, match="no space"):
        convert(Torn(12), archive, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def fails() -> Tensor:
    raise OSError(28, "No space left on device")


def test_the_tokenizer(archive: Path, tmp_path: Path) -> None:
    for size in (60, 70):
        words(size).save_pretrained(tmp_path / str(size))
        refused(archive, tmp_path / "out", "64", str(size), tokenizer=str(tmp_path / str(size)))
    (tmp_path / "broken.json").write_text("{}")
    refused(archive, tmp_path / "out", "broken.json", tokenizer=str(tmp_path / "broken.json"))
    shutil.move(archive / "tokenizer.json", tmp_path / "own.json")
    refused(archive, tmp_path / "out", "tokenizer.json")
    convert(LAYOUT, archive, tmp_path / "out", str(tmp_path / "own.json"))
    assert loaded(tmp_path / "out").need_tokenizer().encode("w3 w4") == [3, 4]


def test_the_folders(archive: Path, ours: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "out", "nowhere")
    refused(archive, ours, "there already")
    before = contents(ours)
    refused(archive, archive / "model.pt", "there already")
    assert contents(ours) == before
    (tmp_path / "empty").mkdir()
    convert(LAYOUT, archive, tmp_path / "empty")
    assert contents(tmp_path / "empty") == before


def test_systems_without_the_format(ours: Path, tmp_path: Path) -> None:
    with_tokenizer().save_pretrained(tmp_path / "cdcd")
    refused(tmp_path / "cdcd", tmp_path / "out", "cdcd", "Plaid")
    config = json.loads((ours / "config.json").read_text())
    config["model"]["base_width"] = 128
    (ours / "config.json").write_text(json.dumps(config))
    refused(ours, tmp_path / "out", "base_width", "128")
    config["model"] |= {"base_width": 256, "depth": 3}
    (ours / "config.json").write_text(json.dumps(config))
    refused(ours, tmp_path / "out", "network.blocks.2", "misses")


# --- memory ---

FORGET = Path("/proc/self/clear_refs")


def most(function: Callable[[], None]) -> int:
    """Bytes by which the process grew at most during the call."""
    FORGET.write_text("5")  # the high-water mark starts anew
    before = high_water()
    function()
    return high_water() - before


def high_water() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_no_more_than_a_part_of_the_weights_is_in_memory(archive: Path, ours: Path, tmp_path: Path) -> None:
    if not os.access(FORGET, os.W_OK):
        pytest.skip("needs Linux to measure memory")
    rotary = torch.load(archive / "model.pt", weights_only=True)["rotary_emb.inv_freq"]
    change(archive / "model.pt", lambda s: {**wide(s, 768), "rotary_emb.inv_freq": rotary})
    size = sum((archive / name).stat().st_size for name in FILES)
    assert size > 50e6
    assert most(lambda: convert(LAYOUT, archive, tmp_path / "big")) < 0.5 * size
    # Back, all that is mapped of one file is counted, which the system can take back at any time.
    assert most(lambda: convert(LAYOUT, tmp_path / "big", tmp_path / "back")) < 1.2 * size


def wide(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """The same network with a width of `width` in place of 32."""

    fixed = {("gamma_linear.weight", 1), ("input_linear.weight", 1), ("selfcond_linear.weight", 1),
             ("output_linear.weight", 0), ("output_linear.bias", 0)}  # fmt: skip

    def size(name: str, axis: int, n: int) -> int:
        return n if (name, axis) in fixed else n // 32 * width

    return {
        name: torch.randn([size(name, axis, n) for axis, n in enumerate(value.shape)]) for name, value in state.items()
    }
