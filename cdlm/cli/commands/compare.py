"""Draw quality over calls of halting rules."""

from __future__ import annotations

import sys
from itertools import chain, product
from pathlib import Path

from cdlm import generation
from cdlm.cli.commands.calibrate import full_sampler, share
from cdlm.cli.groups import JudgeOptions
from cdlm.config import sweep
from cdlm.continuous.guidance import Guidance
from cdlm.core.devices import MachineOptions
from cdlm.core.files import check_places, write_text
from cdlm.evaluation.bench import Machine, open_bench
from cdlm.evaluation.compare import Comparison, Point, markdown, panels, too_few_live, write_csv
from cdlm.evaluation.metrics.mauve import check as check_mauve
from cdlm.evaluation.plots.pareto import plot_pareto
from cdlm.halting.calibration import Goal
from cdlm.halting.replay import check_kept
from cdlm.models import hub
from cdlm.sampling.requests import requests

JUDGE, MACHINE = JudgeOptions(), MachineOptions(precision="fp32", batch_size=64)

RULES_TO_COMPARE = (
    "Patience", "Entropy", "KL", "NormConvergence", "AngleConvergence", "StableAndConfident", "Prophet", "SchED",
    "SchED(..., variant='paper')", "JoT", "Full()", "FixedSteps",
)  # fmt: skip


def compare(
    models: list[str],
    *,
    rules: list[str] | None = None,
    steps: list[int] | None = None,
    n: int = 512,
    out: Path = Path("comparison"),
    max_loss: str = "1%",
    confidence: float = 0.95,
    live: int = 32,
    fewer: list[int] | None = None,
    mauve: bool = False,
    mauve_seeds: int = 5,
    seed: int = 0,
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
    """Draw quality over calls of halting rules, and of the plain sampler with fewer steps: table, CSV and plot.

    Args:
        models: run folders, of continuous and of masked models.
        rules: names to sweep, such as Patience or "KL(..., warmup=0.3)", or whole rules; by default all.
        steps: steps of the full runs, one or more; by default 200, of a masked model one for each position.
        n: samples of each full run.
        out: folder for compare.csv, compare.md and compare.png.
        max_loss: of AR-NLL, for the setting of each rule that the table shows.
        confidence: of that bound.
        live: samples of what must be run for each rule: those that freeze tokens, every rule on a model that generates
            in blocks, and wall time; 0 leaves these out. A rule that is run has a row only if these are as many as
            max_loss and confidence need, 299 by default.
        fewer: steps of the plain sampler that the rules are up against; by default shares of the full run's.
        mauve: MAUVE of the full run and of each rule's setting; needs the mauve-text package.
        mauve_seeds: see cdlm evaluate.
        seed: of the samples.
        solver: see cdlm sample.
        grid: see cdlm sample.
        softmax_temperature: see cdlm sample.
        score_temperature: see cdlm sample.
        guidance: see cdlm sample.
        init_scale: see cdlm sample.
        policy: of masked models, see cdlm sample; its steps are those of the full run.
        temperature: of masked models, see cdlm sample.
        recordings: folder with a folder of recordings for each model, by its name; by default the runs are drawn.
    """
    goal = Goal(share(max_loss), confidence)
    where = Machine(machine.batch_size or 64, machine.precision or "fp32", machine.device, machine.devices,
                    not machine.quiet)  # fmt: skip
    check_places(out / "compare.csv")
    if mauve:
        check_mauve(n)
    steering = Guidance(softmax_temperature, score_temperature, guidance)
    runs = []
    for model, asked in product(dict.fromkeys(models), dict.fromkeys(steps or [None])):
        given = (solver, grid, steering, init_scale, policy, temperature)
        folder = hub.read(model)
        budget, sampler = full_sampler(folder, asked, seed, *given)
        families = {rule: sweep(rule, budget) for rule in rules or RULES_TO_COMPARE}
        check_kept(chain.from_iterable(families.values()))
        blocks = generation.blocks_of(sampler, requests(None, 1, folder.length, folder.tokenizer))
        runs.append((model, sampler, families, too_few_live(model, families, blocks > 1, live, n, goal)))
    points: list[Point] = []
    for model, sampler, families, short in runs:
        kept = None if recordings is None else recordings / Path(model).name
        bench = open_bench(model, sampler, n, where, recordings=kept, judge=judge.judge, judge_steps=judge.judge_steps)
        if short and not machine.quiet:
            print(f"cdlm: {short}", file=sys.stderr)
        points += Comparison(bench, goal, live, mauve_seeds if mauve else 0, fewer or ()).table(families)
        write_csv(points, out / "compare.csv")  # after each model: long work is not lost
    text = markdown(points, goal)
    write_text(out / "compare.md", text)
    plot_pareto(panels(points), out / "compare.png")
    if not machine.quiet:
        print(text)
