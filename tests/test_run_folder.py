"""A run folder: one training at a time, nothing that leads out of it, and no leftovers of killed processes."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_runs import OPTIONS, SIZE

from cdlm.api import generate, load
from cdlm.autoregressive.system import Autoregressive
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.continuous.systems.langflow import LangFlow
from cdlm.continuous.systems.plaid import Plaid
from cdlm.continuous.systems.ssd import SSD
from cdlm.core.errors import CdlmError
from cdlm.data.sources import Stories
from cdlm.masked.system import Masked
from cdlm.runs import train as runs
from cdlm.runs.config import RunConfig, read_run
from cdlm.runs.train import train
from cdlm.training.files import steps_done
from cdlm.training.folder import LOCK, WRITTEN, checkpoint_of, held
from cdlm.training.options import TrainOptions


def config(cache: Path, **changes: Any) -> RunConfig:
    given = dict(
        source=Stories(n=60), system=Masked(**SIZE), vocab_size=300, length=16, batch_size=4, validation_rows=8,
        preview=0, cache=str(cache), training=OPTIONS,
    )  # fmt: skip
    return RunConfig(**{**given, **changes})


# --- one training at a time ---


def test_a_folder_is_held_by_one_and_free_afterwards(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with held(run):
        for _ in range(2):
            with (
                pytest.raises(CdlmError, match=rf"^{run} is being trained by process {os.getpid()} on \S+: wait"),
                held(run),
            ):
                pass
    assert not run.exists()  # it was made for this, and stayed empty
    run.mkdir()
    with held(run):
        (run / "kept").touch()
    assert [path.name for path in run.iterdir()] == ["kept"]


def test_a_training_and_a_resume_are_refused_while_another_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(tmp_path / "cache"), run, progress=False)
    longer = config(tmp_path / "cache", training=TrainOptions(steps=5, accelerator="cpu", warmup=1))
    before = checkpoint_of(run).read_bytes()
    with held(run):
        with pytest.raises(CdlmError, match="is being trained by process"):
            train(longer, run, resume=True, progress=False)
        train(config(tmp_path / "cache"), run, resume=True, progress=False)  # it is finished, and only read
        load(run)
    assert checkpoint_of(run).read_bytes() == before


def test_the_lock_ends_with_its_process_and_not_with_its_children(tmp_path: Path) -> None:
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with held(tmp_path):
            if os.fork() == 0:
                os.write(write, b"%d" % os.getpid())
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
        os._exit(0)
    child = int(os.read(read, 20))
    try:
        with pytest.raises(CdlmError, match=f"process {holder} on"), held(tmp_path):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert (tmp_path / LOCK).exists()
        with held(tmp_path):  # though the child is still there
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("content", [b"", b"\x1b[31m x\n", b"1 a\nb\n", b"9" * 400, b"x y"])
def test_what_stands_in_a_lock_is_not_repeated(tmp_path: Path, content: bytes) -> None:
    with held(tmp_path):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(CdlmError, match="is being trained by another process: wait"), held(tmp_path):
            pass


def test_leftovers_are_removed_and_other_hidden_files_stay(tmp_path: Path) -> None:
    for name in ("checkpoints/.last.ckpt.0a1b2c3d", ".model.safetensors.00000000", "samples/.step_000002.txt.ffffffff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in (".notes", ".last.ckpt", ".mine.12345678", "checkpoints/.keep"):
        (tmp_path / name).touch()
    with held(tmp_path):
        left = sorted(path.name for path in tmp_path.rglob(".*"))
    assert left == [".keep", ".last.ckpt", ".mine.12345678", ".notes"]


# --- nothing leads out of it ---


@pytest.mark.parametrize("name", WRITTEN)
def test_a_link_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / name).parent.mkdir(parents=True)
    outside.mkdir()
    for target in (outside, outside / "nothing", Path("..") / ("../outside" if "/" in name else "outside")):
        (run / name).symlink_to(target)
        with (
            pytest.raises(CdlmError, match=rf"{re.escape(name)} is a link that leads out of the run folder"),
            held(run),
        ):
            pass
        (run / name).unlink()
    assert not list(outside.iterdir())


def test_links_that_stay_and_a_linked_folder_are_fine(tmp_path: Path) -> None:
    (tmp_path / "run" / "elsewhere").mkdir(parents=True)
    (tmp_path / "run" / "samples").symlink_to("elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with held(tmp_path / "link"):
        pass


def test_resuming_does_not_write_through_a_link(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    train(config(tmp_path / "cache"), run, progress=False)
    outside.mkdir()
    (run / "samples").symlink_to(outside)
    longer = config(tmp_path / "cache", preview=1, training=TrainOptions(steps=5, accelerator="cpu", warmup=1))
    with pytest.raises(CdlmError, match="samples is a link that leads out"):
        train(longer, run, resume=True, progress=False)
    assert not list(outside.iterdir())


# --- a folder can always go on ---


def test_settings_and_tokenizer_come_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def kill(*args: Any) -> None:
        raise Killed

    run, given = tmp_path / "run", config(tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(runs, "export", kill)
        with pytest.raises(Killed):
            train(given, run, progress=False)
    assert read_run(run) == given
    assert (run / "tokenizer.json").exists()
    with pytest.raises(CdlmError, match=r"nothing to resume.* begin it again with --config \S+config\.yaml --out "):
        train(given, run, resume=True, progress=False)
    train(read_run(run), run, progress=False)
    assert steps_done(checkpoint_of(run)) == OPTIONS.steps


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run", "/dev/null", "x" * 300, "x/" * 3000, "a\0b"])
def test_a_place_that_cannot_be_written_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CdlmError, match=r"cannot write .*; choose another folder") as raised:
        train(config(tmp_path / "cache"), tmp_path / place, progress=False)
    assert "\n" not in str(raised.value)


# --- a run that goes astray ---


SYSTEMS = {
    "cdcd": CDCD(**SIZE), "plaid": Plaid(**SIZE), "langflow": LangFlow(**SIZE),
    "ssd": SSD(width=16, depth=1, heads=2, block=4),
    "masked": Masked(**SIZE), "autoregressive": Autoregressive(**SIZE),
}  # fmt: skip
RATES = {
    "lr": {"lr": 10.0},
    "schedule": {"schedule_lr": 10.0},
    "all": {"lr": 10.0, "schedule_lr": 10.0, "muon_lr": 10.0},
}


def _failure(call: Callable[[], object]) -> str | None:
    """The error that the call ends with, if any."""
    try:
        call()
    except CdlmError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("every", [2, 50])
def test_what_diverges_says_when_and_leaves_a_good_model(name: str, rates: str, every: int, tmp_path: Path) -> None:
    options = TrainOptions(
        steps=10, warmup=0, accelerator="cpu", checkpoint_every=every, validate_every=7, log_every=5, clip=float("inf"),
        final_lr_ratio=1.0,
    )  # fmt: skip
    options = replace(options, **RATES[rates])
    masking = {"masking": "Block(4)"} if name == "ssd" else {}
    given, run = config(tmp_path.parent / "cache", system=SYSTEMS[name], training=options, **masking), tmp_path / "run"
    message = r"^.* (at|before) step \d+; last good checkpoint: \S+last\.ckpt; resume with a lower learning rate$"
    said = _failure(partial(train, given, run, progress=False))
    assert said is None or re.fullmatch(message, said)
    ends_well = said is None
    if rates != "lr":  # with lr alone it depends on the processor, in whose arithmetic Muon multiplies
        assert ends_well == (rates == "schedule" and name != "plaid")
    assert (steps_done(checkpoint_of(run)) == options.steps) == ends_well
    steps = None if name in ("masked", "autoregressive") else 4
    samples = generate(load(run), n=1, length=8, steps=steps)
    assert samples.tokens.shape == (1, 8)
