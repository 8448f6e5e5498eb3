"""Progressive distillation: what a student is to say, what it keeps of its teacher, and its folder."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle, SelfConditioned, loop
from torch import Tensor
from toys import langflow, lively_masked, masked_with_tokenizer, plaid, ssd, system, with_tokenizer

from cdlm import api
from cdlm.cli.main import main
from cdlm.continuous.distillation import (
    Distillation,
    Teacher,
    check_distillable,
    check_steps,
    graduate,
    held,
    path,
    shares,
    walk_of,
)
from cdlm.continuous.grids import UpperEnds
from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.errors import CdlmError
from cdlm.core.types import Batch, Condition
from cdlm.data.sources import Stories
from cdlm.evaluation.compare import Comparison, Point, markdown, panels
from cdlm.evaluation.rivals import STUDENT, Duel, students_of, verdict
from cdlm.halting import FixedSteps
from cdlm.halting.calibration import Goal
from cdlm.masked.system import Masked
from cdlm.runs.config import RunConfig, read_run
from cdlm.runs.distill import DistillSettings, distill
from cdlm.runs.train import train
from cdlm.sampling.requests import Request
from cdlm.sampling.session import Student
from cdlm.training.options import TrainOptions

VOCAB, B, N = 11, 10, 6
SIZE: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "dim": 8}
MAKERS: list[Callable[..., EmbeddingDiffusion]] = [system, langflow, plaid]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(rows: int = B, seed: int = 5, u: Tensor | None = None) -> Batch:
    """Rows with two given positions."""
    tokens = torch.randint(VOCAB, (rows, N), generator=rng(seed))
    return Batch(tokens, None, (torch.arange(N) >= 2).expand(rows, N).clone(), rng(seed), u)


def lively(make: Callable[..., EmbeddingDiffusion] = system, **settings: Any) -> EmbeddingDiffusion:
    """A float64 system in which no weight is zero."""
    made = make(**settings).double()
    with torch.no_grad():
        for i, weight in enumerate(made.network.parameters()):
            weight.add_(0.1 * torch.randn(weight.shape, generator=rng(i), dtype=weight.dtype))
    return made


def pupil(teacher: EmbeddingDiffusion, steps: int = 4, teacher_steps: int = 16, **settings: Any) -> EmbeddingDiffusion:
    """A student at its start: the teacher again, in training."""
    made = copy.deepcopy(teacher)
    made.keep_space()
    made.objective = Distillation(teacher, made.objective, steps, teacher_steps, **settings)
    return made.train()


def objective_of(student: EmbeddingDiffusion) -> Distillation:
    assert isinstance(student.objective, Distillation)
    return student.objective


def levels_of(schedule: Any, edges: Tensor) -> Tensor:
    return schedule.t_of_u(edges.flatten()).detach().view(edges.shape)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- the target -------------------------------------------------------------------------------------------------------


def flow_target(z: Tensor, z_end: Tensor, tau: float, tau_end: float) -> Tensor:
    """The target in a flow's own units, z = tau x + (1 - tau) eps."""
    return z + (1 - tau) / (tau_end - tau) * (z_end - z)


def test_the_known_answer_in_a_flows_units_is_four() -> None:
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    assert flow_target(one, two, 0.25, 0.5).item() == 4
    # The same span in units of noise over signal, t = (1 - tau) / tau and z / tau, in one step and in two.
    for levels, x0 in (([3.0, 1.0], [4.0]), ([3.0, 1.5, 1.0], [3.0, 5.0])):
        t = torch.tensor([levels], dtype=torch.float64)
        z = torch.tensor([1 / 0.25], dtype=torch.float64)
        for here, there, estimate in zip(levels, levels[1:], x0, strict=False):
            z = there / here * z + (1 - there / here) * estimate
        assert z.item() == pytest.approx(2 / 0.5)
        assert (shares(t)[0] * torch.tensor(x0)).sum().item() == pytest.approx(4)


def test_shares_give_the_estimate_that_leads_to_the_end_of_the_path() -> None:
    teacher = SelfConditioned()
    edges = torch.linspace(0.9, 0.4, 6, dtype=torch.float64) - torch.linspace(0, 0.3, B, dtype=torch.float64)[:, None]
    levels = levels_of(teacher.schedule, edges)
    clean = teacher.embed(batch().tokens % 7)
    z = clean + levels[:, :1, None] * torch.randn(clean.shape, generator=rng(), dtype=torch.float64)
    condition = Condition(clean * 0, batch().target, clean * 0)
    steps = list(path(teacher, z, levels, condition, clean))
    end, r = z, (levels[:, -1] / levels[:, 0])[:, None, None]
    for i, step in enumerate(steps):
        close(step.z, end)
        ratio = (levels[:, i + 1] / levels[:, i])[:, None, None]
        end = ratio * step.z + (1 - ratio) * step.x0
    target = sum(share[:, None, None] * step.x0 for share, step in zip(shares(levels).T, steps, strict=True))
    assert isinstance(target, Tensor)
    close(target, (end - r * z) / (1 - r))
    close(shares(levels).sum(1), torch.ones(B, dtype=torch.float64))


def test_a_span_of_no_length_takes_the_first_estimate() -> None:
    levels = torch.tensor([[2.0, 2.0, 2.0], [2.0, 1.0, 1.0]], dtype=torch.float64)
    close(shares(levels), torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("make", MAKERS)
def test_of_one_step_the_target_is_the_teachers_own_estimate(make: Callable[..., EmbeddingDiffusion]) -> None:
    teacher = lively(make)
    student = pupil(teacher, steps=16, teacher_steps=16)
    lesson = objective_of(student).lesson(student, batch())
    close(lesson.x0, teacher.denoise(lesson.z, lesson.t, lesson.condition).x0)


@pytest.mark.parametrize("make", MAKERS)
def test_the_target_distribution_has_the_target_as_its_mean(make: Callable[..., EmbeddingDiffusion]) -> None:
    student = pupil(lively(make), loss="distribution")
    lesson = objective_of(student).lesson(student, batch())
    assert lesson.p is not None
    close(lesson.p.sum(-1), torch.ones(lesson.p.shape[:2], dtype=torch.float64))
    close(student.mix(lesson.p), lesson.x0)


@pytest.mark.parametrize("sees_given", [True, False])
def test_the_teachers_path_is_that_of_the_sampler(sees_given: bool) -> None:
    """A student of one step is taught the whole run of the library's own loop, prompt and estimates included."""
    steps, tokens = 8, torch.randint(7, (3, N), generator=rng())
    given = (torch.arange(N) < 2).expand(3, N)
    teacher = SelfConditioned()
    teacher.sees_given = sees_given
    asked: list[tuple[Tensor, Tensor, Tensor]] = []
    denoise = teacher.denoise

    def spy(z: Tensor, t: Tensor, condition: Condition) -> Any:
        asked.append((z.clone(), t.clone(), condition.x0.clone()))
        return denoise(z, t, condition)

    teacher.denoise = spy  # type: ignore[method-assign]
    requests = [Request(i, row, shown) for i, (row, shown) in enumerate(zip(tokens, given, strict=True))]
    list(loop(teacher, steps=steps, grid=UpperEnds()).steps(requests))
    sampled, asked = asked, []
    edges = torch.linspace(1, 0, steps + 1, dtype=torch.float64).expand(3, -1)
    clean = teacher.embed(tokens)
    condition = Condition(clean * given[..., None], ~given, clean * 0)
    list(path(teacher, sampled[0][0], levels_of(teacher.schedule, edges), condition, clean))
    assert len(asked) == len(sampled) == steps
    for mine, theirs in zip(asked, sampled, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            close(a, b)


def test_a_teacher_that_is_sure_teaches_its_answer_whatever_the_span() -> None:
    class Sure(Oracle):
        def denoise(self, z: Tensor, t: Tensor, condition: Condition) -> Any:
            made = super().denoise(z, t, condition)
            return made._replace(x0=self.embed(tokens))

    tokens = batch().tokens % 7
    teacher = Sure()
    clean = teacher.embed(tokens)
    levels = levels_of(teacher.schedule, torch.linspace(1, 0, 9, dtype=torch.float64).expand(B, -1))
    steps = path(teacher, torch.zeros_like(clean), levels, Condition(clean * 0, batch().target, clean * 0), clean)
    found = sum(share[:, None, None] * step.x0 for share, step in zip(shares(levels).T, steps, strict=True))
    assert isinstance(found, Tensor)
    close(found, clean)


def test_given_positions_are_held_only_where_the_network_takes_them_for_noisy() -> None:
    teacher, rows = Oracle(), batch()
    clean = teacher.embed(rows.tokens % 7)
    assert held(teacher, clean * 0, rows.target, clean).abs().sum() == 0
    teacher.sees_given = False
    close(held(teacher, clean * 0, rows.target, clean), clean * ~rows.target[..., None])


# --- a batch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_rows_stand_at_the_levels_of_sampling_or_between_the_ends(steps: int) -> None:
    teacher = lively()
    own = UpperEnds().levels(teacher.schedule, steps)
    for on_grid in (0.0, 1.0):
        student = pupil(teacher, steps, 16, on_grid=on_grid)
        t = objective_of(student).lesson(student, batch(64)).t
        assert float(t.max()) <= float(own[0]) + 1e-9
        assert float(t.min()) >= float(own[-1]) - 1e-9
        near = (t[:, None] - own).abs().min(1).values < 1e-9
        assert bool(near.all()) is (on_grid == 1 or steps == 1)
        if on_grid == 1:
            assert {int((x - own).abs().argmin()) for x in t} == set(range(steps))


def test_half_of_the_rows_see_an_estimate_of_the_teacher() -> None:
    teacher = lively()
    student = pupil(teacher)
    lesson = objective_of(student).lesson(student, batch())
    shown = lesson.condition.x0.flatten(1).abs().sum(1) > 0
    assert shown.tolist() == [True] * (B // 2) + [False] * (B // 2)
    blank = lesson.condition._replace(x0=torch.zeros_like(lesson.condition.x0))
    close(lesson.condition.x0[shown], teacher.denoise(lesson.z, lesson.t, blank).x0[shown])
    alone = lively(self_conditioning=0.0)
    student = pupil(alone)
    assert not objective_of(student).lesson(student, batch()).condition.x0.any()


@pytest.mark.parametrize("loss", ["x0", "distribution"])
def test_a_student_that_says_the_target_has_no_loss_but_that_of_reading_out(loss: Any) -> None:
    teacher = lively()
    student = pupil(teacher, 16, 16, loss=loss, read_out=0.0)  # of one step the teacher itself is perfect
    student.guidance_dropout = 0.0
    assert student(batch()).total.item() == pytest.approx(0, abs=1e-12)
    other = pupil(teacher, 4, 16, loss=loss, read_out=0.0)
    assert other(batch()).total.item() > 1e-6


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("loss", ["x0", "distribution"])
def test_training_moves_the_network_and_neither_schedule_nor_embeddings(
    make: Callable[..., EmbeddingDiffusion], loss: Any
) -> None:
    teacher = lively(make)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = pupil(teacher, loss=loss)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.1)
    for seed in range(3):
        optimizer.zero_grad()
        found = student(batch(seed=seed))
        assert found.nats.isfinite().all()
        assert found.count.tolist() == [N - 2] * B
        found.total.backward()
        optimizer.step()
        student.after_step()
    assert student.learned_schedule is None
    graduate(student)
    changed = {name.partition(".")[0] for name, value in student.state_dict().items() if (value != before[name]).any()}
    assert changed == {"network"}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_batch_is_a_function_of_its_generator() -> None:
    student = pupil(lively())
    one, same, other = (student(batch(seed=seed)).total for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_teacher_is_no_part_of_the_student_and_is_not_copied() -> None:
    teacher = lively()
    student = pupil(teacher)
    assert not any("teacher" in name for name in [*student.state_dict(), *dict(student.named_modules())])
    assert {id(p) for p in student.parameters()}.isdisjoint(id(p) for p in teacher.parameters())
    assert objective_of(copy.deepcopy(student)).teacher is objective_of(student).teacher
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert graduate(student).state_dict().keys() == teacher.state_dict().keys()


def test_in_evaluation_it_is_the_systems_own_objective() -> None:
    teacher = lively()
    student = pupil(teacher).eval()
    rows = batch(u=torch.linspace(0, 1, B, dtype=torch.float64))
    found = student(replace(rows, generator=rng(3))).nats
    assert torch.equal(found, teacher(replace(rows, generator=rng(3))).nats)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "of"), [(64, 64), (128, 64), (3, 64), (0, 64), (4, 4), (8, 4)])
def test_steps_that_no_student_can_have_are_refused(steps: int, of: int) -> None:
    with pytest.raises(CdlmError) as caught:
        check_steps(steps, of)
    assert "\n" not in str(caught.value)


def test_models_whose_way_is_no_flow_are_refused() -> None:
    for make in (lively, lambda: lively(langflow), lambda: lively(plaid)):
        check_distillable(make(), "model")
    for other, why in ((lively_masked(), "no continuous model"), (ssd(), "fresh draws"), (Oracle(), "no continuous")):
        with pytest.raises(CdlmError, match=why) as caught:
            check_distillable(other, "model")
        assert "\n" not in str(caught.value)


def test_settings_out_of_range_are_refused() -> None:
    teacher = lively()
    for settings in ({"on_grid": 1.5}, {"read_out": 1.0}):
        with pytest.raises(CdlmError):
            Distillation(teacher, teacher.objective, 4, 16, **settings)  # type: ignore[arg-type]
    for changes in ({"train_steps": 0}, {"lr": -1.0}, {"batch_size": 0}, {"seed": -1}, {"teacher_steps": 0}):
        with pytest.raises(CdlmError):
            DistillSettings(**changes)  # type: ignore[arg-type]


def test_a_student_takes_its_own_steps_and_no_others() -> None:
    model = with_tokenizer()
    model.student, model.preset = Student(4, "tensors:0", "it"), walk_of(4)
    session = api.open_session(model)
    assert session.sampling == Diffusion(steps=4, grid=UpperEnds())
    assert api.open_session(model, steps=4).sampling == session.sampling
    assert api.generate(model, n=2).nfe.tolist() == [4, 4]
    assert api.generate(model, n=2, halt="FixedSteps(2)").nfe.tolist() == [2, 2]
    request = session.requests(n=1)[0]
    assert session.fewer_steps([2], request) == []
    for ask in (
        lambda: session.with_steps(16),
        lambda: api.generate(model, steps=16),
        lambda: api.generate(model, grid="LogT()"),
        lambda: api.generate(model, sampling=Diffusion()),
    ):
        with pytest.raises(CdlmError, match="student of 4 steps") as caught:
            ask()
        assert "\n" not in str(caught.value)


# --- runs -------------------------------------------------------------------------------------------------------------

OPTIONS = TrainOptions(steps=2, accelerator="cpu", warmup=1, checkpoint_every=1, log_every=1, validate_every=2)
QUICK = DistillSettings(train_steps=2, teacher_steps=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a second."""
    folder = tmp_path_factory.mktemp("distillation")
    config = RunConfig(
        source=Stories(n=60), system=CDCD(**SIZE), vocab_size=300, length=16, batch_size=8, validation_rows=16,
        preview=1, cache=str(folder / "cache"), training=OPTIONS,
    )  # fmt: skip
    train(config, folder / "run", progress=False)
    masked_with_tokenizer().save_pretrained(folder / "masked")
    (folder / "masked" / "config.yaml").write_text(replace(config, system=Masked(**SIZE)).to_yaml())
    return folder / "run"


@pytest.fixture(scope="module")
def students(run: Path) -> Path:
    """Students of four steps and of two."""
    out = run.parent / "students"
    made = distill(run, out, steps=(2, 4), settings=QUICK, device="cpu", progress=False)
    assert list(made) == [4, 2]
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command line says of words that it refuses, which is one line."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    shown = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2
    return shown[-1]


def test_a_student_is_a_model_folder_that_says_whose_it_is(run: Path, students: Path) -> None:
    teacher = api.load(run)
    for steps in (4, 2):
        folder = students / str(steps)
        content = json.loads((folder / "config.json").read_text())
        assert content["student"] == {"steps": steps, "teacher": teacher.fingerprint, "name": "run"}
        assert content["sampling"] == walk_of(steps)
        assert content["model"] == json.loads((run / "config.json").read_text())["model"]
        assert f"A student of {steps} steps" in (folder / "README.md").read_text()
        assert read_run(folder).training.steps == QUICK.train_steps
        model = api.load(folder)
        assert model.student == Student(steps, teacher.need_fingerprint(), "run")
        assert model.fingerprint != teacher.fingerprint
        assert api.generate(model, n=2).nfe.tolist() == [steps, steps]


def test_a_student_that_is_saved_and_loaded_is_the_same(students: Path, tmp_path: Path) -> None:
    model = api.load(students / "4")
    model.save_pretrained(tmp_path / "copy")  # type: ignore[attr-defined]
    again = api.load(tmp_path / "copy")
    assert (again.student, again.preset, again.fingerprint) == (model.student, model.preset, model.fingerprint)


def test_the_schedule_of_a_student_is_its_teachers(run: Path, students: Path) -> None:
    teacher, student = api.load(run), api.load(students / "2")
    assert isinstance(teacher, EmbeddingDiffusion)
    assert isinstance(student, EmbeddingDiffusion)
    for part in ("schedule", "embedding"):
        mine, theirs = student.get_submodule(part).state_dict(), teacher.get_submodule(part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    weights = [[*model.network.parameters()] for model in (student, teacher)]
    assert any(not torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_checkpoint_has_neither_the_teacher_nor_what_is_frozen(students: Path) -> None:
    checkpoint = torch.load(students / "4" / "checkpoints" / "last.ckpt", weights_only=True)
    names = checkpoint["state_dict"]
    assert not any("teacher" in name for name in names)
    assert not {
        f"{who}.{what}" for who in ("system", "ema.system") for what in ("embedding.weight", "schedule.logits")
    } & {*names}
    assert any(name.startswith("system.network.") for name in names)


def test_finished_rounds_are_not_done_again_and_an_interrupted_one_goes_on(
    run: Path, students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in students.rglob("model.safetensors")}
    distill(run, students, steps=(4, 2), settings=QUICK, device="cpu")
    assert capsys.readouterr().err.count("is finished, at step 2") == 2
    assert before == {file: file.stat().st_mtime_ns for file in students.rglob("model.safetensors")}
    half = replace(QUICK, train_steps=1)
    constant = {"lr": 1e-3}
    part, whole = tmp_path / "part", tmp_path / "whole"
    distill(run, part, steps=(4,), settings=replace(half, **constant), device="cpu", progress=False)
    distill(run, part, steps=(4,), settings=replace(QUICK, **constant), device="cpu", progress=False)
    distill(run, whole, steps=(4,), settings=replace(QUICK, **constant), device="cpu", progress=False)
    assert "2," in (part / "4" / "metrics.csv").read_text()
    one, other = (api.load(out / "4") for out in (part, whole))
    assert one.student == other.student


def test_a_folder_of_another_student_is_refused(run: Path, students: Path) -> None:
    other = students.parent / "students-of-others"
    distill(
        students / "4", other, steps=(2,), settings=replace(QUICK, teacher_steps=None), device="cpu", progress=False
    )
    with pytest.raises(CdlmError, match="student of 2 steps of 4, expected one of 2 steps of 'run'"):
        distill(run, other, steps=(2,), settings=QUICK, device="cpu", progress=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", "distribution"),
        ("on_grid", 1.0),
        ("read_out", 0.5),
        ("teacher_steps", 16),
        ("seed", 5),
        ("batch_size", 2),
    ],
)
def test_a_finished_student_of_other_settings_is_refused(run: Path, students: Path, name: str, value: Any) -> None:
    other = replace(QUICK, **{name: value})
    with pytest.raises(CdlmError, match=f"was distilled with {name}.*choose another folder"):
        distill(run, students, steps=(4, 2), settings=other, device="cpu", progress=False)


def test_no_round_writes_over_another_model(run: Path, students: Path, tmp_path: Path) -> None:
    place = tmp_path / "4"
    place.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (place / file).write_bytes((run / file).read_bytes())
    with pytest.raises(CdlmError, match="holds a model that is no student"):
        distill(run, tmp_path, steps=(4,), settings=QUICK, device="cpu", progress=False)
    assert (place / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_student_teaches_fewer_steps_in_its_own_alone(students: Path, tmp_path: Path) -> None:
    quick = replace(QUICK, teacher_steps=None)
    for steps in ((4,), (8,)):
        with pytest.raises(CdlmError, match="fewer steps than its teacher's 4"):
            distill(students / "4", tmp_path, steps=steps, settings=quick, device="cpu", progress=False)
    with pytest.raises(CdlmError, match="teaches in no other number"):
        distill(students / "4", tmp_path, steps=(2,), settings=QUICK, device="cpu", progress=False)


def test_a_student_that_is_trained_on_is_none_any_more(students: Path, tmp_path: Path) -> None:
    config = replace(read_run(students / "4"), training=OPTIONS)
    train(config, tmp_path / "on", start=students / "4", progress=False)
    assert api.load(tmp_path / "on").student is None


def test_a_folder_whose_parts_contradict_each_other_is_refused(students: Path, tmp_path: Path) -> None:
    model = api.load(students / "4")
    model.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    content = json.loads((tmp_path / "config.json").read_text())
    for change in (
        {"sampling": {**content["sampling"], "steps": 8}}, {"sampling": {}}, {"student": {"steps": 4}},
        {"student": {**content["student"], "steps": 0}}, {"student": []},
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(CdlmError) as caught:
            api.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_the_command_line_refuses_in_one_line(
    run: Path, students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masked = run.parent / "masked"
    cpu = ("--device", "cpu", "--quiet")
    assert "no continuous model" in refused(capsys, "distill", masked, tmp_path, *cpu)
    assert "take some of" in refused(capsys, "distill", run, tmp_path, "--steps", 3, *cpu)
    assert "take some of" in refused(capsys, "distill", run, tmp_path, "--steps", 64, *cpu)
    assert "config.yaml" in refused(capsys, "distill", tmp_path, tmp_path, *cpu)
    assert "invalid choice" in refused(capsys, "distill", run, tmp_path, "--loss", "mse", *cpu)
    assert "leave out steps, or give 4" in refused(capsys, "sample", students / "4", "--steps", 16, *cpu)
    assert not any(tmp_path.iterdir())


def test_the_command_trains_and_the_folder_samples(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--steps", "2", "--train-steps", "1", "--teacher-steps", "4", "--loss", "distribution", "--device", "cpu"]
    main(["distill", str(run), str(tmp_path / "few"), *words])
    assert "2 steps a sample" in capsys.readouterr().err
    main(["sample", str(tmp_path / "few" / "2"), "--n", "1", "--steps", "2", "--device", "cpu"])
    assert "2.0 calls a sample of 2 steps" in capsys.readouterr().err


# --- beside halting rules ---------------------------------------------------------------------------------------------


GOAL = Goal(0.99)
"""So wide that a rule which changes anything is chosen."""


def compared(run: Path, students: Path, family: str) -> tuple[list[Point], Point]:
    """The table of a comparison with both students, and the chosen setting of the family."""
    session = api.open_session(run, device="cpu", steps=6)
    bench = api.open_bench(session, 12, judge_steps=2)
    rivals = students_of(session.model, [api.open_session(students / name, device="cpu") for name in ("2", "4")])
    made = Comparison(bench, GOAL, "nats", "run", live=0, with_rivals=True, students=rivals)
    points = made.table({family: [FixedSteps(5), FixedSteps(3)]})
    return points, next(point for point in points if point.chosen)


def test_students_are_rows_of_a_comparison_and_rivals_of_rules_with_as_many_calls(run: Path, students: Path) -> None:
    points, chosen = compared(run, students, "FixedSteps")
    rows = {point.family: point for point in points if point.family.startswith(STUDENT)}
    assert [(name, point.calls) for name, point in rows.items()] == [
        ("student of 4 steps", 4.0), ("student of 2 steps", 2.0)
    ]  # fmt: skip
    assert chosen.calls == 3
    assert {duel.rival for duel in chosen.duels if duel.rival.startswith(STUDENT)} == {"student of 2 steps"}
    duel = next(duel for duel in chosen.duels if duel.rival == "student of 2 steps")
    assert duel.ar_nll == pytest.approx(rows["student of 2 steps"].ar_nll)
    assert duel.difference == pytest.approx(chosen.ar_nll - duel.ar_nll)
    assert "student of 2 steps: 2 steps, UpperEnds(), Euler()" in markdown(points, GOAL, "nats")
    (line,) = (curve for panel in panels(points) for curve in panel.curves if curve.label == "students")
    assert (list(line.calls), line.rival) == ([4.0, 2.0], True)


def test_a_rule_that_loses_to_a_student_is_said_to() -> None:
    lost = Duel("student of 2 steps", "2, UpperEnds(), Euler()", 2.0, 1.0, 3.0, 0.5, 0.4, 0.6)
    won = replace(lost, rival="fewer steps", difference=-0.5, low=-0.6, high=-0.4)
    found = verdict([won, lost], 3.0, 100)
    assert found is not None
    assert (found.word, found.duel.rival) == ("worse", "student of 2 steps")


def test_only_students_of_the_model_are_compared_with_it(
    run: Path, students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = ("--n", 4, "--device", "cpu", "--quiet", "--out", tmp_path / "out", "--rules", "FixedSteps")
    assert "is no student" in refused(capsys, "compare", run, "--students", run, *cpu)
    assert "not those of 4" in refused(capsys, "compare", students / "4", "--students", students / "2", *cpu)
    assert "asked for steps 16" in refused(capsys, "compare", students / "4", "--steps", 16, *cpu)
    shutil.copytree(students / "2", tmp_path / "2")
    (tmp_path / "2" / "tokenizer.json").write_text(_with_a_change((tmp_path / "2" / "tokenizer.json").read_text()))
    assert "another tokenizer" in refused(capsys, "compare", run, "--students", tmp_path / "2", *cpu)
    two = students_of(api.load(run), [api.open_session(students / "2", device="cpu")])
    with pytest.raises(CdlmError, match="are both students of 2 steps"):
        students_of(api.load(run), [*two.values(), *two.values()])


def _with_a_change(tokenizer: str) -> str:
    """The same tokenizer with two tokens that have changed places."""
    content = json.loads(tokenizer)
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[20:22]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    return json.dumps(content)


def test_a_teacher_is_frozen_where_the_student_is() -> None:
    teacher = lively()
    student = copy.deepcopy(teacher).train()
    student.precision = "bf16"
    found = Teacher(teacher).beside(student, torch.device("cpu"))
    assert found is teacher
    assert found.precision == "bf16"
    assert not found.training
