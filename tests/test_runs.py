"""Training runs from Python: run folders, starting from a trained model, resuming, model cards."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cdlm.api import generate, load
from cdlm.cli import train as command
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.errors import CdlmError
from cdlm.data.masking import MASKINGS
from cdlm.data.order import fixed_batches
from cdlm.data.sources import Files, Stories
from cdlm.masked.model import MaskedModel
from cdlm.masked.system import Masked
from cdlm.models import hub
from cdlm.models.foreign import tokenizer_hash
from cdlm.models.system import System
from cdlm.runs import train as runs
from cdlm.runs.config import RunConfig, read_run
from cdlm.runs.train import RunText, train
from cdlm.training.files import AtomicCheckpoints
from cdlm.training.folder import checkpoint_of
from cdlm.training.options import TrainOptions
from cdlm.training.stop import Interrupted
from cdlm.training.validation import losses_by_level

SIZE: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "dim": 8}
STEPS = 3
OPTIONS = TrainOptions(steps=STEPS, accelerator="cpu", warmup=1, checkpoint_every=2, log_every=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def settings(cache: str) -> Callable[..., RunConfig]:
    """The configuration of a run that takes a second."""

    def make(**changes: Any) -> RunConfig:
        given = dict(
            source=Stories(n=60), system=Masked(**SIZE), vocab_size=300, length=16, batch_size=4, validation_rows=20,
            preview=0, cache=cache, training=OPTIONS,
        )  # fmt: skip
        return RunConfig(**{**given, **changes})

    return make


@pytest.fixture(scope="module", params=[Masked, CDCD])
def trained(
    request: pytest.FixtureRequest, settings: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Path, System]:
    """A finished run of each family: its configuration, folder and model."""
    config, out = settings(system=request.param(**SIZE)), tmp_path_factory.mktemp("trained") / "run"
    return config, out, train(config, out, progress=False)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def validation(config: RunConfig, system: System) -> Tensor:
    """Nats of each noise level on the text of a configuration."""
    text = RunText.of(config, system.tokenizer)
    batches = fixed_batches(text.valid, config.batch_size, config.validation_rows)
    law = MASKINGS.parse(config.masking).bind(text.tokenizer)
    return losses_by_level(system.eval(), batches, law, config.training.seed)[0]


# --- the folder and the model ---


def test_a_finished_run_recommends_what_its_folder_does(
    trained: tuple[RunConfig, Path, System], tmp_path: Path
) -> None:
    config, out, system = trained
    old = tmp_path / "old"
    shutil.copytree(out, old)
    settings = json.loads((old / "config.json").read_text())
    settings.pop("sampling", None)
    (old / "config.json").write_text(json.dumps(settings))
    again = train(config, old, resume=True, progress=False)
    assert (again.preset, again.sampling) == ({}, load(old).sampling)
    assert train(config, out, resume=True, progress=False).preset == system.preset


def test_the_model_that_training_returns_is_the_model_in_the_folder(trained: tuple[RunConfig, Path, System]) -> None:
    _, out, system = trained
    saved = hub.read(out)
    assert (system.length, system.ends) == (saved.length, saved.ends) == (16, False)
    assert system.state_dict().keys() == saved.weights.keys()
    assert all(torch.equal(value, saved.weights[name]) for name, value in system.state_dict().items())
    assert not system.training
    assert (system.preset, system.sampling) == (load(out).preset, load(out).sampling)
    assert bool(system.preset) == isinstance(system, EmbeddingDiffusion)
    assert isinstance(system, EmbeddingDiffusion | MaskedModel)
    assert generate(system, n=2, length=8).tokens.shape == (2, 8)


def test_the_settings_of_a_run_can_be_read_back(trained: tuple[RunConfig, Path, System]) -> None:
    config, out, _ = trained
    assert read_run(out) == config


def test_training_leaves_the_global_generator_alone(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(settings(), tmp_path / "run", progress=False)
    assert torch.equal(before, torch.get_rng_state())


# --- starting from a trained model ---


def test_a_run_that_starts_from_another_begins_at_its_validation_loss(
    trained: tuple[RunConfig, Path, System], tmp_path: Path
) -> None:
    """With learning rates of zero it also stays there, and so it ends with its first weights."""
    config, out, system = trained
    still = replace(OPTIONS, lr=0.0, muon_lr=0.0, schedule_lr=0.0, steps=1)
    begun = train(replace(config, training=still), tmp_path / "new", start=out, progress=False)
    for name, value in system.named_parameters():
        assert torch.equal(value, begun.get_parameter(name)), name
    torch.testing.assert_close(validation(config, begun), validation(config, system), rtol=0.02, atol=0)
    if isinstance(config.system, Masked):
        assert metrics(tmp_path / "new")[-1]["valid_nats"] == metrics(out)[-1]["valid_nats"]


def test_the_tokenizer_comes_along_to_another_text(trained: tuple[RunConfig, Path, System], tmp_path: Path) -> None:
    config, out, system = trained
    other = replace(config, source=Stories(n=60, seed=5), length=12, vocab_size=400)
    begun = train(other, tmp_path / "new", start=out, progress=False)
    assert system.tokenizer is not None
    assert begun.tokenizer is not None
    assert tokenizer_hash(begun.tokenizer) == tokenizer_hash(system.tokenizer)
    assert tokenizer_hash(hub.read_tokenizer(tmp_path / "new")) == tokenizer_hash(system.tokenizer)
    assert begun.length == 12
    kept = read_run(tmp_path / "new")
    assert (kept.vocab_size, kept.source) == (len(system.tokenizer), other.source)
    more = replace(kept, training=replace(OPTIONS, steps=STEPS + 1))
    train(more, tmp_path / "new", resume=True, progress=False)
    assert metrics(tmp_path / "new")[-1]["step"] == str(STEPS + 1)


@pytest.mark.parametrize(
    ("change", "names"), [({"width": 32}, "width is 16 there and 32 here"), ({"heads": 1}, "heads is 2 there")]
)
def test_a_different_architecture_is_refused(
    trained: tuple[RunConfig, Path, System], tmp_path: Path, change: dict[str, int], names: str
) -> None:
    config, out, _ = trained
    with pytest.raises(CdlmError, match=names) as raised:
        train(replace(config, system=replace(config.system, **change)), tmp_path / "new", start=out, progress=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists()


def test_another_family_is_refused(trained: tuple[RunConfig, Path, System], tmp_path: Path) -> None:
    config, out, _ = trained
    other = CDCD(**SIZE) if isinstance(config.system, Masked) else Masked(**SIZE)
    with pytest.raises(CdlmError, match=r"a different system .*system is"):
        train(replace(config, system=other), tmp_path / "new", start=out, progress=False)


def test_a_run_is_resumed_or_started_from_another(trained: tuple[RunConfig, Path, System]) -> None:
    config, out, _ = trained
    with pytest.raises(CdlmError, match="resume or start, not both"):
        train(config, out, resume=True, start=out, progress=False)


def test_the_command_takes_system_and_length_from_the_model(
    trained: tuple[RunConfig, Path, System], cache: str, tmp_path: Path
) -> None:
    config, out, _ = trained
    words = ["--start", str(out), "--out", str(tmp_path / "new"), "--cache", cache, "--steps", "1", "--quiet"]
    command.run([*words, "--source.n", "60", "--device", "cpu", "--preview", "0", "--batch-size", "4"])
    made = read_run(tmp_path / "new")
    assert (made.system, made.length, made.vocab_size) == (config.system, 16, config.vocab_size)
    with pytest.raises(CdlmError, match="width is 16 there and 64 here"):
        command.run([*words[:3], str(tmp_path / "other"), *words[4:], "--source.n", "60", "--width", "64"])


# --- resuming ---


def test_a_finished_run_says_so_and_stays_as_it_is(
    trained: tuple[RunConfig, Path, System], capsys: pytest.CaptureFixture[str]
) -> None:
    config, out, system = trained
    before = content(out)
    again = train(config, out, resume=True)
    assert capsys.readouterr().err == f"{out} is finished, at step {STEPS}: more steps continue it\n"
    assert content(out) == before
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in system.state_dict().items())
    train(config, out, resume=True, progress=False)
    assert capsys.readouterr().err == ""


def resumed(config: RunConfig, out: Path, **changes: Any) -> str:
    """Why a run cannot be resumed with such changes."""
    longer = replace(config, training=replace(config.training, steps=STEPS + 2), **changes)
    with pytest.raises(CdlmError) as raised:
        train(longer, out, resume=True, progress=False)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_resuming_with_another_batch_size_says_what_may_change_and_how_to_go_on(
    trained: tuple[RunConfig, Path, System],
) -> None:
    config, out, _ = trained
    message = resumed(config, out, batch_size=2)
    assert "batch_size was 4, is 2" in message
    assert "resuming may change steps, learning rates" in message
    assert f"--start {out}" in message


def test_the_size_of_a_vocabulary_is_settled_by_the_text_and_then_stays(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, out = settings(vocab_size=None), tmp_path / "run"
    train(config, out, progress=False)
    found = len(hub.read_tokenizer(out))
    assert found > 300
    assert read_run(out).vocab_size == found
    assert "tokenizer was one trained to" in resumed(config, out, vocab_size=found - 1)
    more = replace(config, training=replace(config.training, steps=STEPS + 2))
    train(more, out, resume=True, progress=False)
    assert read_run(out).vocab_size == found


def test_resuming_with_other_text_names_the_texts(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    lines = [f"{who} sat {where} and saw {what}.\n" for who in "abcdefgh" for where in "ijklmn" for what in "opqrst"]
    first.write_text("".join(lines))
    second.write_text("".join(reversed(lines)))
    config = settings(source=Files((str(first),)), vocab_size=270)
    train(config, tmp_path / "run", progress=False)
    message = resumed(config, tmp_path / "run", source=Files((str(second),)))
    assert f"data was Files(paths=('{first}',)" in message
    assert f"is Files(paths=('{second}',)" in message
    first.write_text("".join(lines[::-1]))
    changed = resumed(config, tmp_path / "run")
    assert f"the content of Files(paths=('{first}',)" in changed
    for text in (message, changed):
        assert RunText.of(config).train.key.split("-")[-1][:16] not in text  # no digests


def test_a_checkpoint_of_an_earlier_version_is_refused_with_the_way_to_go_on(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    train(settings(), tmp_path, progress=False)
    checkpoint = torch.load(checkpoint_of(tmp_path), weights_only=True)
    del checkpoint["cdlm"]["format"]
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name.replace("ema.", "average."): value for name, value in weights.items()}
    AtomicCheckpoints().save_checkpoint(checkpoint, checkpoint_of(tmp_path))
    assert f"--start {tmp_path}" in resumed(settings(), tmp_path)


def test_a_damaged_checkpoint_is_one_line(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    checkpoint_of(tmp_path).parent.mkdir()
    checkpoint_of(tmp_path).write_bytes(b"PK no checkpoint")
    assert "truncated or damaged" in resumed(settings(), tmp_path)


# --- the model card ---


def test_the_card_of_an_interrupted_run_counts_the_steps_that_were_done(
    settings: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(config: RunConfig, system: System, folder: Path, step: int) -> None:
        real(config, system, folder, step)
        if step == 2:
            raise Interrupted("stopped", 15)

    real = runs.export
    monkeypatch.setattr(runs, "export", stop)
    with pytest.raises(Interrupted):
        train(settings(), tmp_path / "cut", progress=False)
    assert "2 of 3 steps of 4 rows of 16 tokens" in (tmp_path / "cut" / "README.md").read_text()
    monkeypatch.undo()
    train(settings(), tmp_path / "whole", progress=False)
    assert ", 3 steps of 4 rows of 16 tokens" in (tmp_path / "whole" / "README.md").read_text()


def test_the_card_holds_no_folder_of_this_machine(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    text = tmp_path / "my" / "text.txt"
    config = settings(source=Files((str(text), "other/*.txt")), tokenizer=str(tmp_path / "tokens"))
    with torch.device("meta"):
        system = CDCD(**SIZE).build(300)
    card = runs.card(config, system, 1)
    assert str(tmp_path) not in card
    assert config.cache not in card
    assert all(name in card for name in ("text.txt", "other/*.txt", "Files", "tokens"))
    assert json.loads(card.split("```json\n")[1].split("```")[0])["model"] == system.config
