"""kill -9 at any time: a training goes on bit for bit, and what other commands write is whole or not there.

The slow test is the soak: `KILLS` of each command.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

KILLS = 50
SCRIPT = """
import os, random, shutil, signal, sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
from test_runs import SIZE
import cdlm
from cdlm.cli.main import main
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.data.sources import Stories
from cdlm.runs.train import train
from cdlm.runs.config import read_run
from cdlm.training.files import steps_done
from cdlm.training.folder import checkpoint_of
from cdlm.training.folder import LOCK
from cdlm.training.options import TrainOptions

folder, what, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
chance = random.Random(what)
config = cdlm.RunConfig(
    source=Stories(n=60), system=CDCD(**SIZE), vocab_size=300, length=16, batch_size=4, validation_rows=8, preview=1,
    cache=str(folder / "cache"),
    training=TrainOptions(steps=120, accelerator="cpu", warmup=1, checkpoint_every=3, validate_every=20, log_every=2),
)


def fork(work):
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(folder / "output", "w")
        try:
            work()
        except BaseException as error:
            import traceback
            traceback.print_exc()
            os._exit(0 if isinstance(error, SystemExit) and not error.code else 1)
        os._exit(0)
    return child


def whole(work):
    began = time.monotonic()
    status = os.waitpid(fork(work), 0)[1]
    assert status == 0, (folder / "output").read_text()
    return time.monotonic() - began


def killed(work, seconds):
    child = fork(work)
    time.sleep(chance.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, (folder / "output").read_text()


def content(place):
    return {{str(p.relative_to(place)): p for p in place.rglob("*") if p.is_file()}}


def go_on(run):
    there = checkpoint_of(run).exists()
    train(read_run(run) if there else config, run, resume=there, progress=False)


{body}
"""
TRAINING = """
seconds = whole(lambda: go_on(folder / "whole"))
cut, rounds, done = folder / "cut", 0, 0
while done < kills:
    killed(lambda: go_on(cut), seconds / 4)
    done += 1
    if checkpoint_of(cut).exists() and steps_done(checkpoint_of(cut)) == config.training.steps:
        cut, rounds = folder / f"cut{done}", rounds + 1
for cut in sorted(folder.glob("cut*")):
    whole(lambda: go_on(cut))
    first, second = (torch.load(checkpoint_of(f), weights_only=True) for f in (folder / "whole", cut))
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    same = content(folder / "whole").keys() - {"metrics.csv", "checkpoints/last.ckpt", "tokenizer_config.json"}
    odd = content(cut).keys() ^ content(folder / "whole").keys()
    assert not odd, odd
    for name in same:
        assert (folder / "whole" / name).read_bytes() == (cut / name).read_bytes(), name
    columns = ["tokens_per_second"]
    import csv
    rows = [[{k: v for k, v in row.items() if k not in columns} for row in csv.DictReader((f / "metrics.csv").open())]
            for f in (folder / "whole", cut)]
    assert rows[0] == rows[1]
"""
COMMAND = """
whole(lambda: go_on(folder / "run"))
def call(out, words):
    names = {{"run": folder / "run", "samples": folder / "given.jsonl", "recording": folder / "recording", "out": out}}
    return lambda: main([word.format(**names) for word in words])
whole(call(folder, {before!r}))
seconds = whole(call(folder / "first", {words!r}))
for _ in range(kills):
    killed(call(folder / "cut", {words!r}), seconds)
whole(call(folder / "cut", {words!r}))
left = [name for name in content(folder) if ".writing" in name or ".building" in name]
assert not left, left
written = sorted(str(path) for path in content(folder).values() if "first" in str(path))
assert written
for path in written:
    assert Path(path).read_bytes() == Path(path.replace("first", "cut")).read_bytes(), path
"""
ON_CPU = ["--device", "cpu", "--quiet"]
SHORT = ["--n", "8", "--steps", "8", *ON_CPU]
BEFORE = ["sample", "{run}", *SHORT, "--record", "{recording}", "--out", "{samples}"]
"""What the commands need."""
COMMANDS = {
    "sample": ["sample", "{run}", *SHORT, "--out", "{out}.jsonl"],
    "record": ["sample", "{run}", *SHORT, "--record", "{out}"],
    "evaluate": ["evaluate", "{run}", "{samples}", "--judge-steps", "2", "--splits", "2", "--out", "{out}", *ON_CPU],
    "train-judge": ["train-judge", "{run}", "{out}", "--steps", "2", *ON_CPU],
    "train-encoder": ["train-encoder", "{run}", "{out}", "--steps", "2", *ON_CPU],
    "compare": ["compare", "{run}", *SHORT, "--judge-steps", "2", "--rules", "Patience", "--live", "0", "--no-rivals",
                "--out", "{out}"],
}  # fmt: skip
"""Each writes what a second call writes too, byte for byte."""


def soak(folder: Path, name: str, body: str, kills: int) -> None:
    script = folder / "script.py"
    tests = Path(__file__).parent
    script.write_text(SCRIPT.format(tests=str(tests), root=str(tests.parent), body=textwrap.dedent(body)))
    done = subprocess.run(
        [sys.executable, str(script), str(folder), name, str(kills)], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_ends_bit_for_bit_as_if_it_was_not(tmp_path: Path) -> None:
    soak(tmp_path, "train", TRAINING, KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_was_killed_leaves_nothing_and_can_be_given_again(tmp_path: Path, name: str) -> None:
    soak(tmp_path, name, COMMAND.format(words=COMMANDS[name], before=BEFORE), KILLS)
