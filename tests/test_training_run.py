"""Training runs: resuming, stopping, files."""

from __future__ import annotations

import copy
import csv
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from toys import weight_of

from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.errors import CdlmError
from cdlm.core.rng import generator
from cdlm.core.types import Batch
from cdlm.training.context import check_same
from cdlm.training.module import TRAINING
from cdlm.training.optimizers import build_optimizer, set_rates
from cdlm.training.options import TrainOptions
from cdlm.training.run import train
from cdlm.training.stop import Interrupted

VOCAB, ROWS, LENGTH = 11, 6, 5


class Loader:
    """Batch i is a function of i; remembers which batches were asked for, and can misbehave at one of them."""

    def __init__(self, act: Any = None, rank: int = 0):
        self.batches, self.act, self.rank = 0, act, rank
        self.seen: list[int] = []

    def batch(self, index: int) -> Batch:
        g = torch.Generator().manual_seed(1000 * self.rank + index)
        tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=g)
        valid = torch.rand(tokens.shape, generator=g) < 0.9
        return Batch(tokens, valid, valid)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            index, self.batches = self.batches, self.batches + 1
            self.seen.append(index)
            if self.act is not None:
                self.act(index)
            yield self.batch(index)

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


def masking(tokens: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    target = torch.rand(valid.shape, generator=generator) < 0.7
    target[:, 0] = True
    return target


def tiny() -> EmbeddingDiffusion:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    system = CDCD(width=8, depth=1, heads=2, dim=4).build(VOCAB)
    torch.set_rng_state(state)
    return system


def valid_batches() -> list[Batch]:
    return [Loader().batch(1000), Loader().batch(1001)]


DEFAULTS: dict[str, Any] = dict(
    steps=12, accelerator="cpu", warmup=3, validate_every=6, checkpoint_every=4, log_every=3, ema=0.9
)


def run(
    folder: Path, *, act: Any = None, resume: bool = False, context: Any = None, system: Any = None, **changes: Any
) -> Loader:
    loader = Loader(act)
    train(
        system or tiny(), loader, valid_batches, masking, TrainOptions(**{**DEFAULTS, **changes}), folder,
        samples=lambda system: [str(system.get_parameter("embedding.weight").sum().item())], resume=resume,
        progress=False, context=context,
    )  # fmt: skip
    return loader


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def state(folder: Path) -> dict[str, Any]:
    """All that a run's future depends on."""
    return {name: saved(folder)[name] for name in ("state_dict", "optimizer_states", "global_step", "cdlm")}


def rows(folder: Path) -> list[dict[str, str]]:
    """Metrics without the one that watches the clock."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


def assert_same(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


def assert_same_run(first: Path, second: Path) -> None:
    assert_same(state(first), state(second))
    assert rows(first) == rows(second)
    samples = {path.name: path.read_text() for path in (first / "samples").iterdir()}
    assert samples == {path.name: path.read_text() for path in (second / "samples").iterdir()}


class Crash(Exception):
    pass


def crash_at(batch: int) -> Any:
    def act(index: int) -> None:
        if index == batch:
            raise Crash

    return act


def signal_at(batch: int, number: int) -> Any:
    return lambda index: os.kill(os.getpid(), number) if index == batch else None


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"optimizer": "muon"}], ids=str)
@pytest.mark.parametrize("batch", [2, 5, 10])
def test_a_crashed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, batch: int, changes: dict) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, **changes)
    with pytest.raises(Crash):
        run(cut, act=crash_at(batch), **changes)
    run(cut, resume=True, **changes)
    assert_same_run(whole, cut)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_consumes_the_batches_that_were_not_yet_used(tmp_path: Path, accumulate: int) -> None:
    with pytest.raises(Crash):
        run(tmp_path, act=crash_at(7 * accumulate), accumulate=accumulate)
    used = saved(tmp_path)["cdlm"]["batches"]
    assert used == 4 * accumulate
    loader = run(tmp_path, resume=True, accumulate=accumulate)
    assert loader.seen[:-1] == list(range(used, 12 * accumulate))  # the last is Lightning's look ahead


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_signal_saves_the_step_and_resuming_goes_on_from_it(tmp_path: Path, number: int, accumulate: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, accumulate=accumulate)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted, match=r"after step 5 of 12.*resume") as raised:
        run(cut, act=signal_at(5 * accumulate - 1 + (accumulate == 1), number), accumulate=accumulate)
    assert raised.value.signal == number
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert saved(cut)["global_step"] == 5
    run(cut, resume=True, accumulate=accumulate)
    assert_same_run(whole, cut)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def act(index: int) -> None:
        if index == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="at once"):
        run(tmp_path, act=act, accumulate=2)
    assert saved(tmp_path)["global_step"] == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_resumes_to_itself_and_to_more_steps(tmp_path: Path) -> None:
    run(tmp_path)
    before = state(tmp_path)
    run(tmp_path, resume=True)
    assert_same(state(tmp_path), before)
    run(tmp_path, resume=True, steps=15, lr=1e-4)
    assert saved(tmp_path)["global_step"] == 15
    assert saved(tmp_path)["cdlm"]["batches"] == 15


def test_resuming_may_change_the_learning_rate(tmp_path: Path) -> None:
    run(tmp_path, steps=6, optimizer="adamw")
    run(tmp_path, steps=9, resume=True, optimizer="adamw", lr=1e-5, schedule_lr=1e-4, final_lr_ratio=1.0)
    groups = saved(tmp_path)["optimizer_states"][0]["param_groups"]
    assert {group["name"]: group["lr"] for group in groups} == {"matrices": 1e-5, "rest": 1e-5, "schedule": 1e-4}


def test_resuming_with_other_data_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, steps=4, context={"data": "abc", "tokenizer": "xyz"})
    with pytest.raises(CdlmError, match=r"data changed \(data was abc, is def\)"):
        run(tmp_path, resume=True, context={"data": "def", "tokenizer": "xyz"})
    with pytest.raises(CdlmError, match="seed changed"):
        run(tmp_path, resume=True, seed=1, context={"data": "abc", "tokenizer": "xyz"})


@pytest.mark.parametrize(("name", "value"), [("batch_size", 8), ("devices", 4), ("accumulate", 2), ("seed", 1)])
def test_a_change_that_resuming_does_not_allow_is_one_line_with_the_way_to_go_on(name: str, value: int) -> None:
    before = {"batch_size": 4, "devices": 2, "accumulate": 1, "seed": 0, "data": "a.txt", "data.digest": "99"}
    check_same(before, before, Path("runs/a"))
    with pytest.raises(CdlmError) as raised:
        check_same(before, before | {name: value}, Path("runs/a"))
    message = str(raised.value)
    assert "\n" not in message
    assert f"{name} changed ({name} was {before[name]}, is {value})" in message
    assert "resuming may change steps, learning rates" in message
    assert message.endswith("--start runs/a")


def test_data_are_compared_by_their_digest_and_shown_by_their_name() -> None:
    def why(now: dict[str, str]) -> str:
        with pytest.raises(CdlmError) as raised:
            check_same({"data": "a.txt", "data.digest": "99"}, now, Path("runs/a"))
        return str(raised.value)

    check_same({"data": "a.txt", "data.digest": "99"}, {"data": "moved/a.txt", "data.digest": "99"}, Path("runs/a"))
    assert "data changed (data was a.txt, is b.txt)" in why({"data": "b.txt", "data.digest": "98"})
    assert "data changed (the content of a.txt is not what it was)" in why({"data": "a.txt", "data.digest": "98"})
    assert "9" not in why({"data": "b.txt", "data.digest": "98"})


def test_a_changed_system_is_not_promised_a_start() -> None:
    with pytest.raises(CdlmError, match=r"start a new run$"):
        check_same({"system.width": 8}, {"system.width": 16}, Path("runs/a"))


def test_a_run_is_neither_overwritten_nor_invented(tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match="nothing to resume"):
        run(tmp_path, resume=True)
    run(tmp_path, steps=3)
    with pytest.raises(CdlmError, match="would be overwritten"):
        run(tmp_path, steps=3)


def poison(system: EmbeddingDiffusion) -> None:
    with torch.no_grad():
        weight_of(system).fill_(torch.nan)


def test_nan_stops_at_its_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    system, loader = tiny(), Loader()
    loader.act = lambda index: poison(system) if index == 7 else None
    with pytest.raises(CdlmError, match=r"NaN or infinite at step 7; last good checkpoint: .*last\.ckpt; resume"):
        train(system, loader, valid_batches, masking, TrainOptions(**DEFAULTS), tmp_path, progress=False)
    assert saved(tmp_path)["global_step"] == 4
    run(tmp_path, resume=True)
    assert saved(tmp_path)["global_step"] == 12


def test_weights_that_became_nan_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    system = tiny()
    real = system.schedule.after_step
    calls: list[None] = []

    def after_step() -> None:
        calls.append(None)
        if len(calls) == 8:
            poison(system)
        real()

    system.schedule.after_step = after_step  # type: ignore[method-assign]
    with pytest.raises(CdlmError, match="weights became NaN or infinite at step 8"):
        train(system, Loader(), valid_batches, masking, TrainOptions(**DEFAULTS), tmp_path, progress=False)
    assert saved(tmp_path)["global_step"] == 4


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def act(index: int) -> None:
        if index == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a write beyond fails as on a full disk

    try:
        with pytest.raises(
            CdlmError, match=r"cannot write .*last\.ckpt \((?i:file too large)\).*is kept and can be resumed"
        ):
            run(tmp_path, act=act)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved(tmp_path)["global_step"] == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    run(tmp_path, resume=True)
    assert saved(tmp_path)["global_step"] == 12


def test_metrics_have_losses_and_every_noise_level(tmp_path: Path) -> None:
    run(tmp_path)
    table = {int(row["step"]): row for row in rows(tmp_path)}
    assert list(table) == [0, 3, 6, 9, 12]
    assert float(table[0]["prior_mismatch"]) == pytest.approx(0.5 / 18.75**2)
    assert all(float(table[12][name]) > 0 for name in ("loss", "nats_per_token", "lr", "gradient_norm", "t_q50"))
    levels = [float(table[6][f"nats_u{i}"]) for i in range(10)]
    assert float(table[6]["valid_nats"]) == pytest.approx(sum(levels) / 10)
    assert not table[3]["valid_nats"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_000006.txt", "step_000012.txt"]


def test_validation_and_logging_do_not_change_training(tmp_path: Path) -> None:
    run(tmp_path / "often", validate_every=1, log_every=1, checkpoint_every=1)
    run(tmp_path / "never", validate_every=99, log_every=99, checkpoint_every=99)
    assert_same(state(tmp_path / "often"), state(tmp_path / "never"))


def test_exports_get_averaged_weights_after_each_checkpoint(tmp_path: Path) -> None:
    got: list[dict[str, Tensor]] = []
    system = tiny()
    train(
        system, Loader(), valid_batches, masking, TrainOptions(**DEFAULTS), tmp_path, progress=False,
        export=lambda average, folder, step: got.append(copy.deepcopy(average.state_dict())),
    )  # fmt: skip
    assert len(got) == 4  # steps 0, 4, 8, 12
    weights = saved(tmp_path)["state_dict"]
    assert_same({f"ema.system.{name}": value for name, value in got[-1].items()}, {
        name: value for name, value in weights.items() if name.startswith("ema.")
    })  # fmt: skip
    assert not torch.equal(got[-1]["embedding.weight"], weight_of(system))


def test_resuming_a_complete_run_exports_what_was_lost(tmp_path: Path) -> None:
    run(tmp_path)
    got: list[Tensor] = []
    train(
        tiny(), Loader(), valid_batches, masking, TrainOptions(**DEFAULTS), tmp_path, progress=False, resume=True,
        export=lambda average, folder, step: got.append(average.get_parameter("embedding.weight").clone()),
    )  # fmt: skip
    assert len(got) == 1
    assert torch.equal(got[0], saved(tmp_path)["state_dict"]["ema.system.embedding.weight"])


def test_resuming_with_fewer_steps_than_were_taken_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    before = saved(tmp_path)
    with pytest.raises(CdlmError, match="at step 12 already, beyond 7"):
        run(tmp_path, steps=7, resume=True)
    assert_same(saved(tmp_path)["state_dict"], before["state_dict"])


def test_a_signal_during_the_last_step_finds_the_run_complete(tmp_path: Path) -> None:
    run(tmp_path, act=signal_at(12, signal.SIGTERM))
    assert saved(tmp_path)["global_step"] == 12


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_bf16_and_tensorboard(tmp_path: Path) -> None:
    run(tmp_path, precision="bf16", loggers=("tensorboard",))
    assert list((tmp_path / "tensorboard").glob("events.*"))
    told = yaml.safe_load((tmp_path / "tensorboard" / "hparams.yaml").read_text())
    assert (told["lr"], told["precision"], told["optimizer"]) == (TrainOptions().lr, "bf16", TrainOptions().optimizer)
    assert all(value.dtype != torch.bfloat16 for value in saved(tmp_path)["state_dict"].values())


def test_lines_show_loss_speed_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(), Loader(), valid_batches, masking, TrainOptions(**DEFAULTS), tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    device, first, *_, last = err.splitlines()
    assert device == "training on cpu"
    assert first.startswith("step 3/12  loss ")
    assert all(word in first for word in ("nats/token", "tokens/s", "ETA"))
    assert "valid" in last
    assert last.endswith("ETA 0:00:00")


PREAMBLE = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import torch
torch.set_num_threads(1)
from test_training_run import *
"""


def script(folder: Path, text: str) -> list[str]:
    path = folder / "script.py"
    path.write_text(PREAMBLE + textwrap.dedent(text))
    return [sys.executable, str(path)]


def test_kill_minus_nine_at_random_points_loses_nothing(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, steps=30)
    points = sorted(torch.randperm(26)[:3].add(2).tolist())
    command = script(tmp_path, """
        folder = Path(sys.argv[1])
        for point in map(int, sys.argv[2:]):
            child = os.fork()  # this process has imported everything and used nothing
            if child == 0:
                run(folder, act=signal_at(point, signal.SIGKILL), steps=30, resume=folder.exists())
                os._exit(0)
            assert os.waitpid(child, 0)[1] == (signal.SIGKILL if point < 30 else 0), point
    """)  # fmt: skip
    subprocess.run([*command, str(cut), *map(str, points), "999"], check=True)
    assert_same_run(whole, cut)


def options_of(strategy: str) -> TrainOptions:
    """Five steps with an optimiser that the strategy allows."""
    return TrainOptions(**{**DEFAULTS, "steps": 5, "optimizer": "adamw" if strategy == "fsdp" else "muon"})


PROCESSES = """
    from dataclasses import replace
    from cdlm.training.options import rank_and_world
    folder, strategy, stop, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "stop", sys.argv[3] == "resume"
    nodes = 2 if "NODE_RANK" in os.environ and "LOCAL_RANK" not in os.environ else 1
    options = replace(options_of(strategy), devices=2 // nodes, num_nodes=nodes, strategy=strategy)
    rank, world = rank_and_world(options)
    loader = Loader(signal_at(3, signal.SIGTERM) if stop and rank == 1 else None, rank)
    try:
        train(
            tiny(), loader, valid_batches, masking, options, folder, progress=False, resume=resume,
            samples=lambda system: [str(weight_of(system).sum().item())],
            export=lambda system, path, step: torch.save(system.state_dict(), path / "export.pt"),
        )
    except Interrupted:
        assert stop
    torch.save({"rank": rank, "world": world, "seen": loader.seen}, folder / f"rank{rank}.pt")
"""


def test_a_torch_that_cannot_spread_weights_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cdlm.training.sharding.fully_shard", lambda module, *, mesh: module)  # as in torch 2.6
    with pytest.raises(CdlmError, match=r"strategy 'fsdp' needs a newer torch than .*: take 'ddp'"):
        run(tmp_path, strategy="fsdp", optimizer="adamw")


@pytest.mark.parametrize(
    ("strategy", "calls"),
    [
        ("ddp", ["whole"]),
        pytest.param("ddp", ["stop", "resume"], marks=pytest.mark.slow),
        pytest.param("fsdp", ["stop", "resume"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one_that_averages_both_gradients(tmp_path: Path, strategy: str, calls: list[str]) -> None:
    command, folder = script(tmp_path, PROCESSES), tmp_path / "run"
    for call in calls:
        subprocess.run([*command, str(folder), strategy, call], check=True, timeout=200)
        for rank in (0, 1):
            told = torch.load(folder / f"rank{rank}.pt", weights_only=True)
            assert (told["rank"], told["world"]) == (rank, 2)
            assert told["seen"][0] == (3 if call == "resume" else 0)
        assert saved(folder)["global_step"] == (3 if call == "stop" else 5)
    assert (folder / "samples" / "step_000005.txt").exists()
    averaged = {k: v for k, v in saved(folder)["state_dict"].items() if k.startswith("ema.")}
    exported = torch.load(folder / "export.pt", weights_only=True)
    assert_same({f"ema.system.{name}": value for name, value in exported.items()}, averaged)
    for name, value in by_hand(options_of(strategy)).items():
        torch.testing.assert_close(saved(folder)["state_dict"][f"system.{name}"], value, rtol=1e-3, atol=1e-5, msg=name)
    if calls == ["whole"]:  # and two machines with a process each are one with two, bit for bit
        on_two_machines(command, tmp_path / "machines", strategy)
        for name in ("state_dict", "optimizer_states"):
            assert_same(saved(folder)[name], saved(tmp_path / "machines")[name])


def on_two_machines(command: list[str], folder: Path, strategy: str) -> None:
    """The whole run, as two machines with a process each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    here = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [*command, str(folder), strategy, "whole"]
    machines = [subprocess.Popen(command, env={**here, "NODE_RANK": rank}) for rank in ("0", "1")]
    assert [machine.wait(200) for machine in machines] == [0, 0]
    told = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [(one["rank"], one["world"]) for one in told] == [(0, 2), (1, 2)]


def by_hand(options: TrainOptions) -> dict[str, Tensor]:
    """Weights after steps whose gradient is the mean over two ranks, computed without a trainer."""
    system, loaders = tiny(), [iter(Loader(rank=rank)) for rank in (0, 1)]
    groups = system.parameter_groups()
    optimizer = build_optimizer(groups, options)
    for step in range(options.steps):
        optimizer.zero_grad()
        for rank, loader in enumerate(loaders):
            batch, noise = next(loader), generator(0, TRAINING, step, rank)
            (system(batch.masked(masking, noise)).total / 2).backward()
        torch.nn.utils.clip_grad_norm_(groups["matrices"] + groups["rest"], options.clip)
        set_rates(optimizer, step, options)
        optimizer.step()
        system.schedule.after_step()
    return system.state_dict()


@pytest.mark.slow
def test_a_compiled_run_has_the_same_names_and_nearly_the_same_weights(tmp_path: Path) -> None:
    run(tmp_path / "plain", steps=3)
    # In a process of its own: the compiler sees neither run-time type checks nor warnings that are errors.
    subprocess.run(
        [*script(tmp_path, "run(Path(sys.argv[1]), steps=3, compile=True)"), str(tmp_path / "c")], check=True
    )
    plain, compiled = (saved(tmp_path / name)["state_dict"] for name in ("plain", "c"))
    assert plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], compiled[name], rtol=1e-3, atol=1e-4, msg=name)
