"""Choose a rule's setting by how much it may change."""

from __future__ import annotations

from pathlib import Path

from cdlm import api
from cdlm.cli.groups import GoalOptions, JudgeOptions, flat_settings, session_on
from cdlm.continuous.sampler import DiffusionSettings
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.progress import to_stderr
from cdlm.evaluation.bench import calibrate as calibrated
from cdlm.evaluation.bench import check_answers, longest
from cdlm.halting import sweep
from cdlm.halting.calibration import check_readable, write_calibration
from cdlm.halting.replay import check_recorded
from cdlm.masked.sampler import UnmaskingSettings
from cdlm.models import shipped

GOAL, JUDGE, MACHINE = GoalOptions(), JudgeOptions(), MachineOptions()
DIFFUSION, UNMASKING = DiffusionSettings(), UnmaskingSettings()


def calibrate(
    run: str,
    *,
    rule: str = "Patience",
    n: int = 512,
    length: int | None = None,
    workload: str | None = None,
    steps: int | None = None,
    seed: int = 1000,
    recordings: Path | None = None,
    goal: GoalOptions = GOAL,
    diffusion: DiffusionSettings = DIFFUSION,
    unmasking: UnmaskingSettings = UNMASKING,
    judge: JudgeOptions = JUDGE,
    machine: MachineOptions = MACHINE,
) -> None:
    """Choose a rule's setting by how much it may change, and write it beside the weights for --halt auto.

    Args:
        run: run folder of the model; halting.json is written there.
        rule: the rule to set, such as Patience, "KL(..., warmup=0.3)" or "FromStep(Patience(...), 40)".
        n: samples to draw.
        length: tokens of a sample; by default as in training.
        workload: what the samples are asked for, such as "MixedPrompts()"; the choice then holds for it alone, and by
            default for samples from nothing.
        steps: of the full run; see cdlm sample.
        seed: of the calibration samples; use others than those you will report.
        recordings: folder of cdlm sample --record with the full runs; by default they are drawn.
    """
    if shipped.is_shipped(run):
        raise CdlmError(
            f"{run} comes with cdlm, whose folder is not written to: calibrate a copy, cdlm pack {run} COPY"
        )
    bound = goal.goal
    bound.check(n)
    settings = flat_settings(diffusion, unmasking, steps=steps)
    with session_on(machine, run, seed, **settings) as session:
        folder = session.model.folder
        if folder is None:
            raise CdlmError(f"{run} has no folder to write the choice to: calibrate a model of your own")
        requests, work = api.ask(session, n, length, workload)
        check_answers(goal.measure, work)
        candidates = sweep(rule, session.steps_of(longest(requests)))
        check_recorded(candidates)
        session.check_made_for(candidates)
        check_readable(folder)
        bench = api.open_bench(
            session, n, length=length, workload=workload, judge=judge.judge, judge_steps=judge.judge_steps,
            recordings=recordings,
        )  # fmt: skip
        found = calibrated(bench, candidates, bound, goal.measure)
    if not machine.quiet:
        for trial in found.trials:
            verdict = "" if trial.passed else "  too much"
            differ = "" if trial.differ is None else f", tokens {trial.differ:.2%}, at most {trial.differ_upper:.2%}"
            print(f"{trial.calls:8.1f} calls, saved {trial.saved:6.1%}, {goal.measure} {trial.loss:+8.4f}, "
                  f"at most {trial.upper:7.4f}{differ}  {trial.rule}{verdict}")  # fmt: skip
    model = session.model
    file = write_calibration(folder, model.need_fingerprint(), model.has_weights, found)
    if not machine.quiet:
        to_stderr(f"{found.rule} is now --halt auto for these settings: {file}")
