"""Parts of training: options, learning rates, gradients, averages, files."""

from __future__ import annotations

import copy
import errno
import io
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from test_training_run import DEFAULTS, Loader, assert_same, masking, tiny, valid_batches
from toys import weight_of

from cdlm.core.errors import CdlmError
from cdlm.core.rng import generator
from cdlm.core.types import Batch
from cdlm.training.ema import EMA
from cdlm.training.files import METRICS, AtomicCheckpoints, MetricsFile
from cdlm.training.module import TRAINING
from cdlm.training.optimizers import Muon, build_optimizer, lr_factor, orthogonal, set_rates
from cdlm.training.options import TrainOptions
from cdlm.training.progress import reporter
from cdlm.training.run import train
from cdlm.training.validation import losses_by_level, validation_metrics


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("accumulate", 0), ("lr", -1e-3), ("lr", math.nan), ("schedule_lr", 11.0), ("weight_decay", -1.0),
     ("warmup", -1), ("final_lr_ratio", 1.5), ("clip", 0.0), ("ema", 1.0), ("devices", 0), ("log_every", 0),
     ("validate_every", 0), ("checkpoint_every", 0), ("seed", -1),
     ("clip", -math.inf), ("lr", math.inf)],
)  # fmt: skip
def test_options_out_of_range_are_named_with_their_range(name: str, value: Any) -> None:
    with pytest.raises(CdlmError, match=rf"^training needs .*\b{name}\b.*, got "):
        TrainOptions(**{name: value})


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(CdlmError, match=r"fsdp.*adamw"):
        TrainOptions(strategy="fsdp", optimizer="muon")


@given(st.integers(0, 50), st.integers(1, 200), st.floats(0, 1))
def test_learning_rate_rises_to_its_peak_and_falls_to_its_end(warmup: int, more: int, ratio: float) -> None:
    options = TrainOptions(steps=warmup + more, warmup=warmup, final_lr_ratio=ratio)
    factors = [lr_factor(step, options) for step in range(options.steps + 1)]
    rise, fall = factors[:warmup], factors[warmup:]
    assert rise == [(k + 1) / warmup for k in range(warmup)]
    assert fall[0] == 1
    assert fall[-1] == pytest.approx(ratio)
    assert all(a >= b for a, b in itertools.pairwise(fall))
    assert all(0 <= factor <= 1 for factor in factors)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("step", [0, 50, 99])
def test_only_the_schedule_keeps_its_learning_rate(kind: Any, step: int) -> None:
    options = TrainOptions(steps=100, warmup=10, optimizer=kind, weight_decay=0.1)
    system = tiny()
    optimizer = build_optimizer(system.parameter_groups(), options)
    set_rates(optimizer, step, options)
    groups = {group["name"]: group for group in optimizer.param_groups}
    peak = options.muon_lr if kind == "muon" else options.lr
    assert groups["matrices"]["lr"] == pytest.approx(peak * lr_factor(step, options))
    assert groups["rest"]["lr"] == pytest.approx(options.lr * lr_factor(step, options))
    assert groups["schedule"]["lr"] == options.schedule_lr
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay == {"matrices": 0.1, "rest": 0, "schedule": 0}
    held = [p for group in groups.values() for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in system.parameters()}
    assert len(held) == len(list(system.parameters()))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_goes_on_from_its_saved_state(kind: Any) -> None:
    options = TrainOptions(steps=10, warmup=0, optimizer=kind)

    def advance(system: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for k in steps:
            batch = Loader().batch(k)
            optimizer.zero_grad()
            system(replace(batch, generator=generator(k))).total.backward()
            set_rates(optimizer, k, options)
            optimizer.step()

    whole, first, second = tiny(), tiny(), tiny()
    advance(whole, build_optimizer(whole.parameter_groups(), options), range(5))
    optimizer = build_optimizer(first.parameter_groups(), options)
    advance(first, optimizer, range(3))
    second.load_state_dict(first.state_dict())
    restored = build_optimizer(second.parameter_groups(), options)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(second, restored, range(3, 5))
    assert_same(second.state_dict(), whole.state_dict())


def test_muon_moves_a_matrix_by_an_orthogonal_step() -> None:
    options = TrainOptions(steps=10, warmup=0, optimizer="muon", muon_lr=0.5)
    system = tiny()
    matrix = system.parameter_groups()["matrices"][0]
    before = matrix.detach().clone()
    optimizer = build_optimizer(system.parameter_groups(), options)
    matrix.grad = torch.randn(matrix.shape, generator=generator(0))
    set_rates(optimizer, 0, options)
    optimizer.step()
    rows, columns = matrix.shape
    moved = torch.linalg.svdvals(matrix.detach() - before) / (0.5 * math.sqrt(max(1, rows / columns)))
    assert bool(((moved > 0.5) & (moved < 1.5)).all())  # five Newton-Schulz steps are not exact


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_muon_takes_matrices_alone(shape: tuple[int, ...]) -> None:
    with pytest.raises(CdlmError, match="give it to AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(shape))])


def test_without_matrices_all_is_for_adamw() -> None:
    bias = torch.nn.Parameter(torch.ones(3))
    groups = {"matrices": [], "rest": [bias], "schedule": []}
    for name in ("muon", "adamw"):
        found = build_optimizer(groups, TrainOptions(steps=1, optimizer=name))
        assert isinstance(found, torch.optim.AdamW)
        assert found.param_groups[0]["params"] == [bias]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it since 2.9")
def test_muon_is_that_of_torch_up_to_its_rounding() -> None:
    """Matrices of one shape go together, in float32; torch takes them one by one, in bfloat16, and rounds more."""
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16)]
    noise = generator(3)
    first = [torch.nn.Parameter(torch.randn(shape, generator=noise)) for shape in shapes]
    second = [torch.nn.Parameter(matrix.detach().clone()) for matrix in first]
    ours = Muon(first, lr=0.1, weight_decay=0.05)
    theirs = torch.optim.Muon(second, lr=0.1, weight_decay=0.05, adjust_lr_fn="original")
    for _ in range(4):
        for mine, other in zip(first, second, strict=True):
            mine.grad = torch.randn(mine.shape, generator=noise)
            other.grad = mine.grad.clone()
        first[2].grad = second[2].grad = None  # a matrix that was not used stays as it is
        ours.step()
        theirs.step()
    for mine, other in zip(first, second, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0.02)
    assert [*ours.state_dict()["state"]] == [*theirs.state_dict()["state"]]


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)], ids=str)
def test_newton_schulz_keeps_singular_vectors_and_treats_each_matrix_alone(shape: tuple[int, int]) -> None:
    matrices = torch.randn(6, *shape, generator=generator(1), dtype=torch.float64)
    many = orthogonal(matrices)
    for matrix, found in zip(matrices, many, strict=True):
        torch.testing.assert_close(orthogonal(matrix[None])[0], found)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        core = left.T @ found @ right.T
        torch.testing.assert_close(core, core.diagonal().diag(), rtol=0, atol=1e-9)


class Watch(Callback):
    """Gradients of each optimiser step, before and after clipping."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, torch.Tensor]] = []

    def _gradients(self, module: LightningModule) -> dict[str, torch.Tensor]:
        return {n: p.grad.clone() for n, p in module.get_submodule("system").named_parameters() if p.grad is not None}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before.append(self._gradients(pl_module))

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if gradients := self._gradients(pl_module):
            self.after.append(gradients)


def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Watch:
    from cdlm.training import run

    watch, real = Watch(), run.Trainer

    def trainer(**kwargs: Any) -> Trainer:
        kwargs["callbacks"] = [*kwargs["callbacks"], watch]
        return real(**kwargs)

    monkeypatch.setattr(run, "Trainer", trainer)
    options = TrainOptions(**{**DEFAULTS, **changes})
    train(tiny(), Loader(), valid_batches, masking, options, tmp_path, progress=False)
    return watch


def test_accumulated_gradients_are_the_mean_of_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched(tmp_path, monkeypatch, accumulate=3, steps=1, clip=math.inf)
    system, total = tiny(), 0.0
    for index in range(3):
        batch, noise = Loader().batch(index), generator(0, TRAINING, index, 0)
        total = total + system(batch.masked(masking, noise)).total / 3
    assert isinstance(total, torch.Tensor)
    total.backward()
    expected = {name: p.grad for name, p in system.named_parameters()}
    assert watch.before[-1].keys() == expected.keys()
    for name, gradient in watch.before[-1].items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_clipping_bounds_the_network_and_leaves_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched(tmp_path, monkeypatch, steps=2, clip=1e-3)
    for before, after in zip(watch.before, watch.after, strict=False):
        torch.testing.assert_close(after["schedule.logits"], before["schedule.logits"], rtol=0, atol=0)
        network = [value.norm() for name, value in after.items() if name != "schedule.logits"]
        assert torch.stack(network).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_batch_of_the_loader_reaches_the_objective(tmp_path: Path) -> None:
    """Its tensors are never copied on the way: the objective sees those that the loader gave."""
    system, loader, given, seen = tiny(), Loader(), list[Batch](), list[Batch]()
    make, objective = loader.batch, system.objective.forward
    loader.batch = lambda index: given.append(make(index)) or given[-1]  # type: ignore[method-assign]
    system.objective.forward = lambda system, batch: seen.append(batch) or objective(system, batch)
    train(system, loader, list, masking, TrainOptions(**{**DEFAULTS, "steps": 3}), tmp_path, progress=False)
    assert len(seen) == 3
    for ours, theirs in zip(seen, given, strict=False):
        assert ours.tokens is theirs.tokens
        assert ours.valid is theirs.valid
        assert ours.generator is not None


def test_ranks_and_batches_have_noise_of_their_own() -> None:
    draws = {
        torch.rand(1, generator=generator(0, TRAINING, index, rank)).item() for index in range(20) for rank in range(4)
    }
    assert len(draws) == 80


@given(st.floats(0, 0.999), st.integers(1, 12))
def test_the_average_is_the_recursion_it_claims(decay: float, steps: int) -> None:
    system = tiny()
    average = EMA(system, decay)
    expected = weight_of(system).detach().double()
    for k in range(1, steps + 1):
        with torch.no_grad():
            for parameter in system.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator(1, k)))
        average.update(system, k)
        d = min(decay, (1 + k) / (10 + k))
        expected = d * expected + (1 - d) * weight_of(system).detach().double()
    torch.testing.assert_close(
        average.system.get_parameter("embedding.weight").double(), expected, rtol=1e-4, atol=1e-5
    )
    assert_same(average.system.get_submodule("schedule").state_dict(), system.schedule.state_dict())
    if decay == 0:
        assert_same(average.system.state_dict(), system.state_dict())


def test_validation_is_repeatable_and_weighs_tokens() -> None:
    system = tiny().eval()
    first, second = (losses_by_level(system, valid_batches(), masking, 0) for _ in range(2))
    assert torch.equal(first, second)
    metrics = validation_metrics(torch.tensor([[2.0, 9.0] + [0.0] * 8, [1.0, 3.0] + [0.0] * 8], dtype=torch.float64))
    assert metrics == {"nats_u0": 2.0, "nats_u1": 3.0, "valid_nats": 2.5}
    assert validation_metrics(torch.zeros(2, 10, dtype=torch.float64)) == {}


def test_validation_gives_each_row_its_own_level() -> None:
    system, levels = tiny(), []
    system.register_forward_hook(lambda module, args, loss: levels.append((args[0].u, loss)))
    loader = Loader()
    first, second = loader.batch(1), loader.batch(2)
    tokens, valid = (torch.cat([getattr(b, name) for b in (first, second)]) for name in ("tokens", "valid"))
    batches = [loader.batch(0), Batch(tokens, valid, valid)]
    sums = losses_by_level(system, batches, masking, 0)
    u = torch.cat([u for u, _ in levels])
    assert u.tolist() == pytest.approx([(i % 10 + 0.5) / 10 for i in range(18)])
    nats = torch.cat([loss.nats.double() * loss.count for _, loss in levels])
    count = torch.cat([loss.count for _, loss in levels])
    for i in range(10):
        torch.testing.assert_close(sums[:, i], torch.stack([nats[i::10].sum(), count[i::10].sum()]))


@pytest.mark.parametrize("fails", ["torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_keeps_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"step": 1}, path)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(fails, full)
        with pytest.raises(CdlmError, match=r"no space left to write .*last\.ckpt: [\d,]+ bytes are free; .* is kept"):
            AtomicCheckpoints().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_cannot_be_written_for_other_reasons_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        AtomicCheckpoints().save_checkpoint({"no": lambda: None}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    AtomicCheckpoints().save_checkpoint({"path": tmp_path}, tmp_path / "last.ckpt")
    with pytest.raises(CdlmError, match=r"last\.ckpt .* or holds more than tensors and plain data"):
        AtomicCheckpoints().load_checkpoint(tmp_path / "last.ckpt")


NO_ROWS = [
    "garbage",
    "-1" + "," * 19,
    "1.5" + "," * 19,
    "9" * 5000 + "," * 19,
    "1,x" + "," * 18,
    "1",
    "",
    ",",
    "\0" * 50,
]


def test_lines_that_are_no_rows_of_metrics_are_dropped_and_counted(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    for step in (0, 10):
        file.log_metrics({"loss": step / 3}, step)
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + b"".join(line.encode() + b"\n" for line in NO_ROWS) + b"\xff\xfe\n")
    assert file.cut(20) == len(NO_ROWS) + 1
    assert file.path.read_bytes() == whole
    assert file.cut(20) == 0


def test_metrics_are_cut_at_the_resumed_step_and_half_written_rows_go(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    for step in (0, 10, 20):
        file.log_metrics({"loss": step / 3}, step)
    whole = file.path.read_text()
    file.log_metrics({"loss": 1.0}, 30)
    with file.path.open("a") as open_file:
        open_file.write("4")
    file.cut(20)
    assert file.path.read_text() == whole
    assert whole.splitlines()[0] == ",".join(METRICS)


@pytest.mark.parametrize(("terminal", "start"), [(True, ""), (False, "training on cpu\nstep 10/40  loss 1.2500")])
def test_a_terminal_gets_a_bar_and_a_file_gets_lines(terminal: bool, start: str) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    shown = reporter(True, stream)
    shown.start(0, 40, "cpu")
    for step in range(1, 11):
        shown.advance(step)
    shown.show({"loss": 1.25, "nats_per_token": 1.0, "tokens_per_second": 1234.0})
    shown.close()
    text = stream.getvalue()
    assert text.startswith(start)
    assert ("━" in text) == terminal
    assert all(word in text for word in ("10/40", "loss 1.2500", "nats/token 1.0000", "1234 tokens/s", "ETA"))


def test_silence_on_request() -> None:
    stream = io.StringIO()
    shown = reporter(False, stream)
    shown.start(0, 2, "cpu")
    shown.advance(1)
    shown.show({"loss": 1.0})
    shown.close()
    assert stream.getvalue() == ""
