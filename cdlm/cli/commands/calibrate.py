"""Choose a rule's setting by the quality it may lose."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from cdlm import generation
from cdlm.cli.groups import JudgeOptions
from cdlm.config import sweep
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.sampler import Sampler
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.evaluation import calibrate as calibration
from cdlm.evaluation.bench import Machine, open_bench
from cdlm.halting.calibration import Goal, check_file
from cdlm.halting.replay import check_kept
from cdlm.masked.sampler import Decoder
from cdlm.models import hub
from cdlm.models.hub import Folder

JUDGE, MACHINE = JudgeOptions(), MachineOptions(precision="fp32", batch_size=64)


def calibrate(
    run: str,
    *,
    rule: str = "Patience",
    max_loss: str = "1%",
    confidence: float = 0.95,
    measure: Literal["ar-nll", "agreement"] = "ar-nll",
    n: int = 512,
    steps: int | None = None,
    seed: int = 1000,
    solver: str | None = None,
    grid: str | None = None,
    softmax_temperature: float = 1.0,
    score_temperature: float = 1.0,
    guidance: float = 1.0,
    init_scale: float = 1.0,
    policy: str | None = None,
    temperature: float | None = None,
    recordings: Path | None = None,
    judge: JudgeOptions = JUDGE,
    machine: MachineOptions = MACHINE,
) -> None:
    """Choose a rule's setting by the quality it may lose, and keep it beside the weights for --halt auto.

    Args:
        run: run folder of the model; halting.json is written there.
        rule: the rule to set, such as Patience, "KL(..., warmup=0.3)" or "FromStep(Patience(...), 40)".
        max_loss: what may be lost at most, such as 1% or 0.01.
        confidence: how surely.
        measure: what is lost: relative AR-NLL, or the share of tokens that differ from the full run.
        n: samples to draw.
        steps: of the sampler that is calibrated, by default 200, of a masked model one for each position; the other
            settings of cdlm sample follow.
        seed: of the calibration samples; use others than those you will report.
        solver: see cdlm sample.
        grid: see cdlm sample.
        softmax_temperature: see cdlm sample.
        score_temperature: see cdlm sample.
        guidance: see cdlm sample.
        init_scale: see cdlm sample.
        policy: see cdlm sample.
        temperature: see cdlm sample.
        recordings: folder of cdlm sample --record with the full runs; by default they are drawn.
    """
    goal = Goal(share(max_loss), confidence)
    folder = hub.read(run)
    steps, sampler = full_sampler(
        folder, steps, seed, solver, grid, Guidance(softmax_temperature, score_temperature, guidance), init_scale,
        policy, temperature,
    )  # fmt: skip
    candidates = sweep(rule, steps)
    check_kept(candidates)
    goal.check(n)
    check_file(folder.path)
    where = Machine(machine.batch_size or 64, machine.precision or "fp32", machine.device, machine.devices,
                    not machine.quiet)  # fmt: skip
    bench = open_bench(run, sampler, n, where, recordings=recordings, judge=judge.judge, judge_steps=judge.judge_steps)
    found = calibration.calibrate(bench, candidates, goal, measure)
    file = calibration.keep(bench, found)
    if machine.quiet:
        return
    for trial in found.trials:
        verdict = "" if trial.passed else "  too much"
        print(f"{trial.calls:8.1f} calls, saved {trial.saved:6.1%}, loss {trial.loss:7.2%}, "
              f"at most {trial.upper:7.2%}  {trial.rule}{verdict}")  # fmt: skip
    print(f"{found.rule} is now --halt auto for these settings: {file}", file=sys.stderr)


def full_sampler(
    folder: Folder, steps: int | None, seed: int, solver: str | None, grid: str | None, guidance: Guidance,
    init_scale: float, policy: str | None, temperature: float | None,
) -> tuple[int, Sampler | Decoder]:  # fmt: skip
    """The sampler of a full run of a model, and its steps; settings of the other kind of model do not matter to it."""
    about = generation.About.of(folder)
    if about.kind == "continuous":
        budget = 200 if steps is None else steps
        return budget, generation.make_sampler(
            budget, None, seed, solver=solver, grid=grid, init_scale=init_scale, guidance=guidance, usual=about.sampled
        )
    if policy is not None and steps is not None:
        raise CdlmError(f"a policy has its own steps: write them in {policy}, or leave out the policy")
    asked, decoder = generation.prepare(about, 1, None, steps, None, seed, policy=policy, temperature=temperature)
    assert isinstance(decoder, Decoder)
    return decoder.steps(asked[0]), decoder


def share(text: str) -> float:
    """A share as 1% or 0.01."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise CdlmError(f"expected a share such as 1% or 0.01, got {text!r}") from error
