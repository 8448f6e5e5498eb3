"""Halting rules against each other and against fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

from cdlm import api
from cdlm.cli.groups import GoalOptions, JudgeOptions, flat_settings, session_on
from cdlm.continuous.sampler import DiffusionSettings
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_places, write_text
from cdlm.core.progress import to_stderr
from cdlm.evaluation.bench import check_answers, fewest, longest
from cdlm.evaluation.compare import Comparison, Point, markdown, panels, save_json, terminal, too_few, write_csv
from cdlm.evaluation.plots.figure import Style, look_of
from cdlm.evaluation.plots.pareto import plot_pareto
from cdlm.evaluation.rivals import check_students, students_of
from cdlm.halting import Criterion, sweep
from cdlm.halting.calibration import Goal
from cdlm.halting.replay import check_recorded
from cdlm.masked.sampler import UnmaskingSettings
from cdlm.sampling.session import Session

RULES_TO_COMPARE = (
    "Patience", "Entropy", "KL", "NormConvergence", "AngleConvergence", "FixedPoint(..., relative=True)",
    "StableAndConfident", "Mutual", "Prophet", "SchED", "SchED(..., variant='paper')", "JoT", "Full()", "FixedSteps",
)  # fmt: skip


@dataclass(frozen=True)
class FullRunOptions:
    """The full runs."""

    steps: list[int] | None = None
    """Steps of the full runs, one or more; by default 200, of a masked model one for each position."""
    n: int = 1024
    """Samples of each full run: settings are chosen on one half of them and reported on the other."""
    length: int | None = None
    """Tokens of a sample; by default as in training."""
    workload: str | None = None
    """What the samples are asked for, from the text that each run holds out: "MixedPrompts()", "MixedLengths()" or, of
    runs on arithmetic problems, "Arithmetic()"; by default they are drawn from nothing."""
    seed: int = 0
    """Of the samples."""
    recordings: Path | None = None
    """Folder with a folder of recordings for each model, by its name; by default the runs are drawn."""


@dataclass(frozen=True)
class RivalOptions:
    """What rules are measured on, and against."""

    live: int = 32
    """Samples of each half of what must be run for each rule: those that freeze tokens, every rule on a model that
    generates in blocks, and wall time; 0 leaves these out. Fewer than the bound needs (299 by default) give rows
    without a bound."""
    fewer: list[int] | None = None
    """Steps of the plain sampler that the rules are compared with; by default shares of the full run's."""
    rivals: bool = True
    """Compare each chosen setting with its rivals: a fixed step, and the plain sampler with fewer steps on the best
    grid, with its own solver and with ancestral steps. It takes about as long as all else."""

    students: list[str] | None = None
    """Folders of students that a model was distilled to (cdlm distill): each is a row of the table, in its own steps,
    and a rival of the rules that take as many calls or more."""

    def __post_init__(self) -> None:
        if self.live < 0 or min(self.fewer or [1]) < 1:
            raise CdlmError(f"a comparison needs live >= 0 and fewer >= 1, got {self.live} and {self.fewer}")


FULL, RIVAL, GOAL, JUDGE, MACHINE = FullRunOptions(), RivalOptions(), GoalOptions(), JudgeOptions(), MachineOptions()
DIFFUSION, UNMASKING = DiffusionSettings(), UnmaskingSettings()


def compare(
    models: list[str],
    *,
    rules: list[str] | None = None,
    out: Path = Path("comparison"),
    style: Style = "screen",
    full: FullRunOptions = FULL,
    rival: RivalOptions = RIVAL,
    goal: GoalOptions = GOAL,
    diffusion: DiffusionSettings = DIFFUSION,
    unmasking: UnmaskingSettings = UNMASKING,
    judge: JudgeOptions = JUDGE,
    machine: MachineOptions = MACHINE,
) -> None:
    """Draw quality over calls of halting rules, and of the plain sampler with fewer steps: table, CSV and plot.

    A model is sampled as in its paper but for the settings given, whatever sampler it recommends.

    Args:
        models: run folders, of continuous and of masked models; settings of the other family do not matter to a model.
        rules: names to sweep, such as Patience or "KL(..., warmup=0.3)", or whole rules; by default all.
        out: folder for compare.json, compare.csv, compare.md and compare.png.
        style: paper makes the picture a .pdf, of a column's width and with small serif letters.
    """
    check_places(out / "compare.csv")
    with ExitStack() as stack:
        sessions = {
            model: stack.enter_context(session_on(machine, model, full.seed)) for model in dict.fromkeys(models)
        }
        students = [stack.enter_context(session_on(machine, name, full.seed)) for name in rival.students or ()]
        check_students(students, [session.model for session in sessions.values()])
        settings = flat_settings(diffusion, unmasking)
        plans = [
            _plan(
                model, session, {**settings, **({} if steps is None else {"steps": steps})}, rules, full, goal.measure
            )
            for (model, session), steps in product(sessions.items(), dict.fromkeys(full.steps or [None]))
        ]
        needed = fewest(goal.goal, goal.measure)
        for plan in plans:
            if (warning := plan.warning(rival.live, full.n // 2, goal.goal, needed)) and not machine.quiet:
                to_stderr(f"cdlm: {warning}")
            if plan.not_in_calls and not machine.quiet:
                to_stderr(f"cdlm: {plan.not_in_calls}")
        points: list[Point] = []
        for plan in plans:
            recordings = None if full.recordings is None else full.recordings / Path(plan.model).name
            bench = api.open_bench(
                plan.session, full.n, length=full.length, workload=full.workload, judge=judge.judge,
                judge_steps=judge.judge_steps, recordings=recordings,
            )  # fmt: skip
            comparison = Comparison(
                bench, goal.goal, goal.measure, plan.model, rival.live, rival.fewer or (), rival.rivals,
                students_of(plan.session.model, students),
            )  # fmt: skip
            points += comparison.table(plan.families)
            write_csv(points, out / "compare.csv")  # after each model: long work is not lost
            save_json(points, goal.goal, goal.measure, out / "compare.json")
    write_text(out / "compare.md", markdown(points, goal.goal, goal.measure))
    plot_pareto(panels(points), out / f"compare{look_of(style).ending}", equal=True, style=style)
    if not machine.quiet:
        print(terminal(points, goal.goal, goal.measure))
        print(f"all columns, and what they mean: {out / 'compare.md'}")


class _Plan(NamedTuple):
    """One model at one number of steps, and the rules to try on it."""

    model: str
    session: Session
    families: dict[str, list[Criterion]]
    in_blocks: bool

    def warning(self, live: int, n: int, goal: Goal, needed: int) -> str:
        """What cannot have a bound, before any work."""
        return too_few(self.model, self.families, self.in_blocks, live, n, goal, needed)

    @property
    def not_in_calls(self) -> str:
        """What else than calls of the model is spent, before any work; empty if nothing."""
        policy = getattr(self.session.sampling, "policy", None)
        if policy is None or not policy.counts:
            return ""
        what = " and ".join(name.replace("_", " ") for name in policy.counts)
        return (
            f"calls are those of {self.model}, and its {what} are not among them: cdlm sample says how many there are"
        )


def _plan(
    model: str, session: Session, settings: dict[str, object], rules: Sequence[str] | None, full: FullRunOptions,
    measure: str,
) -> _Plan:  # fmt: skip
    session = session.with_sampling(api.sampling_of(session.model, session.model.plain, settings, lenient=True))
    requests, work = api.ask(session, full.n, full.length, full.workload)
    check_answers(measure, work)
    families = {rule: sweep(rule, session.steps_of(longest(requests))) for rule in rules or RULES_TO_COMPARE}
    check_recorded(chain.from_iterable(families.values()))
    session.check_made_for(chain.from_iterable(families.values()))
    return _Plan(model, session, families, not session.replayable(requests))
