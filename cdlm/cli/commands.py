"""The commands that work on a trained run; the command line takes their settings from these signatures."""

from __future__ import annotations

import sys
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cdlm import api, generation
from cdlm import config as names
from cdlm.config import criterion, read_run, sweep
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.sampler import Sampler
from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.core.likelihood import LikelihoodSettings, Ode
from cdlm.core.types import HaltReason
from cdlm.evaluation import calibrate as calibration
from cdlm.evaluation.bench import Machine, open_bench
from cdlm.evaluation.compare import Comparison, Point, markdown, panels, too_few_live, write_csv
from cdlm.evaluation.evaluate import evaluate_files
from cdlm.evaluation.likelihood import likelihood as measure_likelihood
from cdlm.evaluation.metrics.mauve import check as check_mauve
from cdlm.evaluation.plots.figure import check_plot_path
from cdlm.evaluation.plots.pareto import plot_pareto
from cdlm.evaluation.plots.trajectories import plot_samples
from cdlm.evaluation.small_judge import open_judge
from cdlm.evaluation.texts import HeldOut, read_texts
from cdlm.halting import Full
from cdlm.halting.calibration import Goal, check_file
from cdlm.halting.replay import check_kept, check_replayable
from cdlm.masked.sampler import Decoder
from cdlm.models import hub
from cdlm.models.hub import Folder
from cdlm.models.system import Precision
from cdlm.recording.file import check_same_model, read_folder
from cdlm.sampling.requests import requests
from cdlm.sampling.samples import Samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def sample(
    run: str,
    n: int = 8,
    steps: int | None = None,
    halt: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    record: Path | None = None,
    prompt: str | None = None,
    prompts: Path | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    solver: str | None = None,
    grid: str | None = None,
    projection: str | None = None,
    softmax_temperature: float = 1.0,
    score_temperature: float = 1.0,
    guidance: float = 1.0,
    init_scale: float | None = None,
    policy: str | None = None,
    temperature: float | None = None,
    cfg_scale: float | None = None,
    cache: Literal["prefix", "dual"] | None = None,
    new_tokens: int | None = None,
    chat: bool = False,
    precision: Precision | None = None,
    device: str = "cpu",
    devices: int = 1,
    plot: Path | None = None,
    quiet: bool = False,
) -> None:
    """Draw samples from a trained model, with adaptive halting.

    Args:
        run: run folder or Hub id, also of LLaDA and Dream in their published format.
        n: samples, of each prompt if there are any.
        steps: grid points, by default 200, of each block if the model generates in blocks; of a masked model steps, by
            default one for each position.
        halt: halting rule, such as "Patience(20)" or "For(NormConvergence(0.01), 5) | Patience(40)"; auto is the one
            that cdlm calibrate has chosen.
        seed: fixes every sample, whatever the batch and the number of devices.
        out: JSONL file to write; by default the texts are printed.
        record: folder to keep the steps of full-length runs in, for cdlm replay.
        prompt: a prefix, or a template such as "The [8] sat on the [2]." whose numbers are tokens to generate.
        prompts: file with one prompt a line.
        length: tokens of a sample; by default as in training.
        batch_size: samples in flight; by default 64, of a foreign model 4.
        solver: of a continuous model, Euler(), Heun(), TorchDiffEq("rk4"), ("dopri5"), ..., Ancestral() or Renoise();
            by default that of its paper.
        grid: of a continuous model, Warped(), LogT(), UniformT() or UpperEnds(); by default that of its paper.
        projection: of a continuous model, how its logits drive the state: Expectation(), Greedy(), Drawn(0.9),
            MultiHot(0.2) or Uneven(0.2); by default that of its paper.
        softmax_temperature: of a continuous model, divides the logits; below 1 sharpens.
        score_temperature: of a continuous model, divides the score; below 1 sharpens.
        guidance: of a continuous model, classifier-free guidance scale; 1 is off, others double the calls.
        init_scale: of a continuous model, scale of the starting noise, 1 unless given.
        policy: of a masked model: LLaDA(64, block=32), Dream(64), DreamThreshold(64, 0.9), Threshold(0.9, block=32),
            Factor(1.0), KLASS(), EntropyBound(0.01); by default LLaDA's in random order, of a foreign model the
            published one.
        temperature: of a masked model's proposals; without a policy 1 of our own models, else 0 unless given.
        cfg_scale: of a masked model, classifier-free guidance; 0 is off, others double the calls.
        cache: of LLaDA and Dream, keep keys and values while a block is decoded.
        new_tokens: of a masked model, tokens after each prompt, in place of length.
        chat: the prompts are a user's messages to a foreign model, put into its chat template.
        precision: arithmetic of the network, fp32 unless given; of a foreign model as in its files.
        device: cpu, cuda, cuda:1, ...
        devices: processes to spread the samples over.
        plot: .png, .pdf or .svg file for switches, norms and angles against the step.
        quiet: show no progress.
    """
    if plot is not None:
        check_plot_path(plot)
    if record is not None and not isinstance(criterion(halt), Full):
        raise CdlmError("a recording is of full-length runs, on which cdlm replay tries rules: leave out --halt")
    steered = (softmax_temperature, score_temperature, guidance) != (1.0, 1.0, 1.0)
    settings = {
        "solver": solver, "grid": grid, "projection": projection, "init_scale": init_scale, "policy": policy,
        "temperature": temperature, "cfg_scale": cfg_scale, "cache": cache, "new_tokens": new_tokens, "chat": chat,
        "guidance": Guidance(softmax_temperature, score_temperature, guidance) if steered else None,
    }  # fmt: skip
    asked = _prompts(prompt, prompts)
    if hub.is_foreign(hub.locate(run)):
        if record is not None or plot is not None or devices > 1:
            raise CdlmError("record, plot and devices are for our own models: leave them out")
        system = generation.load(run, device, precision)
        tokenizer = generation.tokenizer_of(system)
        samples = generation.generate(
            system, n, length, steps, halt, seed, asked, batch_size, progress=not quiet, **settings
        )
    else:
        folder = hub.read(run)
        tokenizer = folder.tokenizer
        if record is not None:
            check_same_model(record, hub.fingerprint(folder.path))
        keeps = plot is not None or record is not None
        about = generation.About.of(folder)
        requested, sampler = generation.prepare(about, n, length, steps, halt, seed, asked, keeps, **settings)
        if keeps:
            generation.check_one_block(sampler, requested, "plotted" if record is None else "recorded")
        samples = generation.draw_spread(
            run, sampler, requested, batch_size=batch_size, precision=precision, device=device, devices=devices,
            progress=not quiet,
        )  # fmt: skip
        if record is not None:
            recording = api.recording_of(samples, sampler, folder, precision or "fp32")
            file = api.keep(recording, tokenizer, record)
            print(f"{file}: {file.stat().st_size:,} bytes", file=sys.stderr)
        if plot is not None:
            plot_samples(samples, plot, f"{run}, {samples.budget} steps, {halt or 'no halting'}")
    _show(samples, tokenizer, out, record is not None)


def _show(samples: Samples, tokenizer: PreTrainedTokenizerFast, out: Path | None, quiet: bool) -> None:
    lines = api.lines(samples, tokenizer)
    if out is not None:
        api.write_lines(out, lines)
    elif not quiet:
        for line in lines:
            print(f"--- sample {line['index']}, {line['nfe']} calls, {line['reason']}\n{line['text'].strip()}")
    late = samples.calls_after_end.mean()
    after = f", {late:.1f} of them after the end of the text" if late > 0 else ""
    print(
        f"{len(samples)} samples, {samples.nfe.mean():.1f} calls a sample of {samples.budget} steps{after}",
        file=sys.stderr,
    )


def replay(recordings: Path, halt: list[str] | None = None, out: Path | None = None) -> None:
    """Tell what halting rules would have done to recorded runs, without the model.

    Args:
        recordings: folder that cdlm sample --record wrote.
        halt: halting rules, one or more.
        out: folder for one JSONL file of samples a rule; by default only the summary is printed.
    """
    if not halt:
        raise CdlmError('replay needs rules to try: --halt "Patience(20)" "Entropy(0.05)"')
    rules = [criterion(rule) for rule in halt]
    kept = read_folder(recordings)
    tokenizer = hub.read_tokenizer(recordings)
    for recording, rule in product(kept.values(), rules):
        check_replayable(recording, rule)
    print(f"{'steps':>6} {'seed':>5} {'n':>6} {'calls':>8} {'saved':>7} {'halted':>7} {'as full':>8}  rule")
    for (name, recording), (number, rule) in product(kept.items(), enumerate(halt, 1)):
        samples = api.replayed(recording, rule, tokenizer)
        saved = 1 - samples.nfe.sum() / recording.record.nfe[-1].sum()
        halted = sum(reason is HaltReason.CRITERION for reason in samples.reason) / len(samples)
        same = api.agreement(samples.tokens, recording).mean()
        print(
            f"{samples.budget:6} {samples.seed:5} {len(samples):6} {samples.nfe.mean():8.1f} {saved:7.1%}"
            f" {halted:7.1%} {same:8.2%}  {rule}"
        )
        if out is not None:
            api.write_lines(out / f"{name}-rule-{number}.jsonl", api.lines(samples, tokenizer))


def calibrate(
    run: str,
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
    judge: str | None = None,
    judge_steps: int = 500,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: str = "cpu",
    devices: int = 1,
    quiet: bool = False,
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
        judge: see cdlm evaluate.
        judge_steps: see cdlm evaluate.
        batch_size: samples in flight.
        precision: arithmetic of the network.
        device: cpu, cuda, cuda:1, ...
        devices: processes to spread the samples over.
        quiet: show no progress.
    """
    goal = Goal(_share(max_loss), confidence)
    folder = hub.read(run)
    steps, sampler = _full(
        folder, steps, seed, solver, grid, Guidance(softmax_temperature, score_temperature, guidance), init_scale,
        policy, temperature,
    )  # fmt: skip
    candidates = sweep(rule, steps)
    check_kept(candidates)
    goal.check(n)
    check_file(folder.path)
    machine = Machine(batch_size, precision, device, devices, not quiet)
    bench = open_bench(run, sampler, n, machine, recordings=recordings, judge=judge, judge_steps=judge_steps)
    found = calibration.calibrate(bench, candidates, goal, measure)
    for trial in found.trials:
        verdict = "" if trial.passed else "  too much"
        print(f"{trial.calls:8.1f} calls, saved {trial.saved:6.1%}, loss {trial.loss:7.2%}, "
              f"at most {trial.upper:7.2%}  {trial.rule}{verdict}")  # fmt: skip
    file = calibration.keep(bench, found)
    print(f"{found.rule} is now --halt auto for these settings: {file}", file=sys.stderr)


RULES_TO_COMPARE = (
    "Patience", "Entropy", "KL", "NormConvergence", "AngleConvergence", "StableAndConfident", "Prophet", "SchED",
    "SchED(..., variant='paper')", "JoT", "Full()", "FixedSteps",
)  # fmt: skip


def compare(
    models: list[str],
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
    judge: str | None = None,
    judge_steps: int = 500,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: str = "cpu",
    devices: int = 1,
    quiet: bool = False,
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
        judge: see cdlm evaluate.
        judge_steps: see cdlm evaluate.
        batch_size: samples in flight.
        precision: arithmetic of the network.
        device: cpu, cuda, cuda:1, ...
        devices: processes to spread the samples over.
        quiet: show no progress.
    """
    goal, machine = Goal(_share(max_loss), confidence), Machine(batch_size, precision, device, devices, not quiet)
    if mauve:
        check_mauve(n)
    steering = Guidance(softmax_temperature, score_temperature, guidance)
    runs = []
    for model, asked in product(dict.fromkeys(models), dict.fromkeys(steps or [None])):
        given = (solver, grid, steering, init_scale, policy, temperature)
        folder = hub.read(model)
        budget, sampler = _full(folder, asked, seed, *given)
        families = {rule: sweep(rule, budget) for rule in rules or RULES_TO_COMPARE}
        check_kept(chain.from_iterable(families.values()))
        blocks = generation.blocks_of(sampler, requests(None, 1, folder.length, folder.tokenizer))
        runs.append((model, sampler, families, too_few_live(model, families, blocks > 1, live, n, goal)))
    points: list[Point] = []
    for model, sampler, families, short in runs:
        kept = None if recordings is None else recordings / Path(model).name
        bench = open_bench(model, sampler, n, machine, recordings=kept, judge=judge, judge_steps=judge_steps)
        if short:
            print(f"cdlm: {short}", file=sys.stderr)
        points += Comparison(bench, goal, live, mauve_seeds if mauve else 0, fewer or ()).table(families)
        write_csv(points, out / "compare.csv")  # after each model: long work is not lost
    text = markdown(points, goal)
    write_text(out / "compare.md", text)
    plot_pareto(panels(points), out / "compare.png")
    print(text)


def _full(
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


def _share(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise CdlmError(f"expected a share such as 1% or 0.01, got {text!r}") from error


def _prompts(prompt: str | None, file: Path | None) -> list[str] | None:
    if prompt is not None and file is not None:
        raise CdlmError("give either prompt or prompts, not both")
    if prompt is not None:
        return [prompt]
    if file is None:
        return None
    try:
        found = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise CdlmError(f"cannot read prompts from {file} ({reason}): give a text file, one prompt a line") from error
    if not found:
        raise CdlmError(f"{file} holds no prompts: write one a line")
    return found


def evaluate(
    run: str,
    samples: Path | None = None,
    baseline: Path | None = None,
    n: int | None = None,
    judge: str | None = None,
    judge_steps: int = 500,
    mauve: bool = True,
    mauve_seeds: int = 5,
    likelihood: bool = False,
    rows: int = 128,
    levels: int = 8,
    read_out: float | None = None,
    ode_steps: int = 0,
    probes: int = 1,
    method: str = "heun2",
    seed: int = 0,
    batch_size: int = 32,
    precision: Precision = "fp32",
    out: Path | None = None,
    device: str = "cpu",
    devices: int = 1,
    quiet: bool = False,
) -> None:
    """Measure samples beside held-out real text and the same text with its tokens shuffled; or the model itself, by the
    likelihood of held-out text.

    Args:
        run: the run folder whose text the samples are compared with.
        samples: file of texts: of cdlm sample --out, or any .jsonl, .csv or .parquet with a field or column text, or a
            .txt with one text a line; what such a file does not know is left blank. May be left out with --likelihood.
        baseline: a second such file for the same table, for instance of the full run without halting.
        n: samples of each file to use; by default as many as the shorter file has.
        judge: any Hugging Face causal language model, by folder or Hub id; by default a small GPT-2 is trained on the
            run's text once and kept.
        judge_steps: training steps of that small judge.
        mauve: compute MAUVE, which needs the mauve-text package.
        mauve_seeds: k-means seeds of MAUVE; its mean and deviation are over them.
        likelihood: compute the bound on the negative log likelihood of held-out text.
        rows: of held-out text, for the likelihood.
        levels: noise levels that the bound of each row is drawn at.
        read_out: of continuous models, noise level at which tokens are read out; by default the least there is.
        ode_steps: of continuous models, intervals of the ODE whose likelihood is computed beside the bound; 0 leaves it
            out.
        probes: draws of the ODE likelihood of each row; its error is estimated from 2 or more.
        method: of torchdiffeq, with a fixed grid, such as heun2 or rk4.
        seed: of the likelihood's noise.
        batch_size: rows at a time, for the likelihood.
        precision: arithmetic of the model's network, for the likelihood; the ODE refuses bf16.
        out: folder for evaluation.json, evaluation.md and likelihood.json; by default the run folder.
        device: where the judge and the model run.
        devices: processes to spread the work over.
        quiet: show no progress.
    """
    if samples is None and not likelihood:
        raise CdlmError("evaluate needs samples to measure, a file of texts, or --likelihood")
    if samples is None and baseline is not None:
        raise CdlmError("baseline is a second file of samples, and there is no first: name it as samples")
    if n is not None and n < 1:
        raise CdlmError(f"n is a number of samples >= 1, got {n}: leave it out to use all")
    if ode_steps < 0:
        raise CdlmError(f"ode_steps is a number of intervals >= 0, got {ode_steps}: 0 leaves out the ODE")
    if not likelihood and (ode_steps or read_out is not None):
        raise CdlmError("ode_steps and read_out are settings of the likelihood: add --likelihood")
    ode = Ode(max(1, ode_steps), method, probes)  # its settings are checked even where it is left out
    settings = LikelihoodSettings(levels, ode if ode_steps else None, seed, batch_size, read_out)
    if likelihood and hub.is_foreign(hub.locate(run)):
        raise CdlmError(f"{run} is another library's model, and a likelihood is of our own systems: give a run folder")
    paths = [path for path in (samples, baseline) if path is not None]
    files = {f"{path.absolute().parent.name}/{path.stem}": read_texts(path) for path in paths}
    place, config = out or Path(run), read_run(run)
    data = api.Data.of(config, hub.read_tokenizer(Path(run)))
    held_out = HeldOut(data.valid, data.tokenizer, config.source)
    if likelihood:
        session = generation.open_session(
            run, device=device, devices=devices, precision=precision, progress=not quiet
        )  # fmt: skip
        known = measure_likelihood(session, held_out, rows, settings)
        known.save(place)
        print(known.terminal())
    if files:
        count = min([len(texts) for texts in files.values()] + ([] if n is None else [n]))
        small = generation.small_judge(config, data, judge_steps)
        result = evaluate_files(
            {name: texts[:count] for name, texts in files.items()}, held_out,
            partial(open_judge, judge, small, progress=not quiet), mauve_seeds=mauve_seeds if mauve else 0,
            device=device, devices=devices,
        )  # fmt: skip
        result.save(place)
        print(result.terminal())


def convert(layout: str, source: Path, out: Path, tokenizer: str | None = None) -> None:
    """Convert published weights to a model folder, or a model folder to its published format.

    Args:
        layout: plaid, ssd or langflow.
        source: folder of the published files; or a model folder, which is written in the published format.
        out: folder to write, a new one.
        tokenizer: tokenizer.json, folder or Hub id; by default that of source.
    """
    from cdlm.convert import convert as converted

    converted(names.layout(layout), source, out, tokenizer)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes", file=sys.stderr)


def train_judge(run: str, out: Path, steps: int = 500, device: str = "cpu", quiet: bool = False) -> None:
    """Train a small GPT-2 on a run's text, as a judge of AR-NLL.

    Args:
        run: run folder whose text and tokenizer are used.
        out: folder to write; a Hugging Face model like any other.
        steps: training steps.
        device: where to train.
        quiet: show no progress.
    """
    config = read_run(run)
    data = api.Data.of(config, hub.read_tokenizer(Path(run)))
    generation.small_judge(config, data, steps).open(device, not quiet).save(out)
