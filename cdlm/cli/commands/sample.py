"""Draw samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from cdlm import api, generation
from cdlm.config import criterion
from cdlm.continuous.guidance import Guidance
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_places
from cdlm.halting import Full
from cdlm.models import hub
from cdlm.recording.file import check_same_model
from cdlm.sampling.samples import Samples

MACHINE = MachineOptions()


def sample(
    run: str,
    *,
    n: int = 8,
    steps: int | None = None,
    halt: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    record: Path | None = None,
    prompt: str | None = None,
    prompts: Path | None = None,
    length: int | None = None,
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
    plot: Path | None = None,
    machine: MachineOptions = MACHINE,
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
        plot: PNG file for switches, norms and angles against the step.
    """
    if record is not None and not isinstance(criterion(halt), Full):
        raise CdlmError("a recording is of full-length runs, on which cdlm replay tries rules: leave out --halt")
    check_places(out, record, plot)
    steered = (softmax_temperature, score_temperature, guidance) != (1.0, 1.0, 1.0)
    settings = {
        "solver": solver, "grid": grid, "projection": projection, "init_scale": init_scale, "policy": policy,
        "temperature": temperature, "cfg_scale": cfg_scale, "cache": cache, "new_tokens": new_tokens, "chat": chat,
        "guidance": Guidance(softmax_temperature, score_temperature, guidance) if steered else None,
    }  # fmt: skip
    asked = _prompts(prompt, prompts)
    if hub.is_foreign(hub.locate(run)):
        if record is not None or plot is not None or machine.devices > 1:
            raise CdlmError("record, plot and devices are for our own models: leave them out")
        system = generation.load(run, machine.device, machine.precision)
        tokenizer = generation.tokenizer_of(system)
        samples = generation.generate(
            system, n, length, steps, halt, seed, asked, machine.batch_size, progress=not machine.quiet, **settings
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
            run, sampler, requested, batch_size=machine.batch_size, precision=machine.precision,
            device=machine.device, devices=machine.devices, progress=not machine.quiet,
        )  # fmt: skip
        if record is not None:
            recording = api.recording_of(samples, sampler, folder, machine.precision or "fp32")
            file = api.keep(recording, tokenizer, record)
            _tell(f"{file}: {file.stat().st_size:,} bytes", machine)
        if plot is not None:
            api.plot(samples, plot, f"{run}, {samples.budget} steps, {halt or 'no halting'}")
    lines = api.lines(samples, tokenizer)
    if out is not None:
        api.write_lines(out, lines)
    if not machine.quiet:
        _show(samples, [] if out is not None or record is not None else lines)


def _tell(line: str, machine: MachineOptions) -> None:
    if not machine.quiet:
        print(line, file=sys.stderr)


def _show(samples: Samples, texts: list[dict[str, Any]]) -> None:
    for line in texts:
        print(f"--- sample {line['index']}, {line['nfe']} calls, {line['reason']}\n{line['text'].strip()}")
    late = samples.calls_after_end.mean()
    after = f", {late:.1f} of them after the end of the text" if late > 0 else ""
    print(
        f"{len(samples)} samples, {samples.nfe.mean():.1f} calls a sample of {samples.budget} steps{after}",
        file=sys.stderr,
    )


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
