"""Draw samples from a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cdlm import api
from cdlm.cli.groups import OutputOptions, PromptOptions, asked, flat_settings, session_on
from cdlm.continuous.grids import Warped
from cdlm.continuous.sampler import DiffusionSettings
from cdlm.core.devices import MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_files, check_places
from cdlm.core.parsing import brief
from cdlm.core.progress import announce, show_announced, to_stderr
from cdlm.core.types import HaltReason
from cdlm.evaluation.plots.figure import short_names
from cdlm.evaluation.plots.trajectories import plot_samples
from cdlm.halting import Full, parse_criterion
from cdlm.masked.sampler import UnmaskingSettings
from cdlm.recording.file import check_same_model
from cdlm.sampling.recordings import recording_of, write_recording
from cdlm.sampling.requests import Request
from cdlm.sampling.samples import Sample, Samples
from cdlm.sampling.session import Session
from cdlm.sampling.watch.terminal import onlooker_on

PROMPTS, OUTPUT, MACHINE = PromptOptions(), OutputOptions(), MachineOptions()
_OFF = re.compile(r"\b\w+=(?:None|False)(?:, )?")
"""Arguments of a call that leave something out."""
DIFFUSION, UNMASKING = DiffusionSettings(), UnmaskingSettings()


def sample(
    run: str,
    *,
    steps: int | None = None,
    halt: str | None = None,
    device_map: str | None = None,
    watch: bool = False,
    prompts: PromptOptions = PROMPTS,
    output: OutputOptions = OUTPUT,
    diffusion: DiffusionSettings = DIFFUSION,
    unmasking: UnmaskingSettings = UNMASKING,
    machine: MachineOptions = MACHINE,
) -> None:
    """Draw samples from a trained model, with adaptive halting.

    Args:
        run: run folder, name of a model that comes with cdlm, or Hub id, also of LLaDA, Dream and LangFlow in their
            published formats.
        steps: of a continuous model grid points, by default 200 or what the model recommends, of each block if it
            generates in blocks; of a masked model steps, by default one for each position.
        halt: halting rule, such as "Patience(20)" or "For(NormConvergence(0.01), 5) | Patience(40)"; auto is the one
            that cdlm calibrate has chosen.
        device_map: of LLaDA and Dream, "auto" divides a model that one GPU does not hold among those of this machine,
            and its memory (needs accelerate).
        watch: in a terminal, show the text of some samples while it forms; on one device.
    """
    if output.record is not None and (halt == "auto" or not isinstance(parse_criterion(halt), Full)):
        raise CdlmError("a recording is of full-length runs, on which cdlm replay tries rules: leave out --halt")
    texts = prompts.texts()
    check_files(output.out, output.plot)
    check_places(output.record)
    settings = flat_settings(diffusion, unmasking, steps=steps)
    with session_on(machine, run, prompts.seed, device_map, **settings) as session:
        if watch and session.workers is not None:
            raise CdlmError("--watch draws the samples of one process: leave it out, or leave out --devices")
        requests, work = asked(session, texts, prompts)
        session = api.with_halt(session, halt, requests, work)
        if not machine.quiet:
            _say_how(session, requests, settings)
        if output.record is not None:
            check_same_model(output.record, session.model.has_weights)
        if output.record is not None or output.plot is not None:
            session.check_recordable(requests, "plotted" if output.record is None else "recorded")
            session = session.recorded()
        if watch and not machine.quiet and (onlooker := onlooker_on(sys.stderr, session.model)):
            show_announced()
            session = session.with_onlooker(onlooker)
        samples = session.run(requests)
    if halt is not None and not machine.quiet and not isinstance(session.options.criterion, Full):
        _say_unhalted(halt, session, samples)
    commit = getattr(session.sampling, "commit", None)
    ends = halt or ("no halting" if commit is None else f"commits by {brief(commit)}")
    title = f"{short_names([run])[run]}, {samples.budget} steps, {ends}"
    _write(samples, session, output, title, machine.quiet, marked=work is not None)


def _say_how(session: Session, requests: Sequence[Request], settings: Mapping[str, Any]) -> None:
    """What is to be known of the sampler before it runs."""
    most = max(int((~request.given).sum()) for request in requests)
    model = session.model
    untouched = model.recommends(settings) and model.preset.keys().isdisjoint(settings)
    recommended = ", as the model recommends" if untouched else ""
    announce(f"cdlm: {most} tokens to generate{recommended}; {_how(session)}")
    if (student := session.model.student) is not None:
        announce(f"cdlm: it is a student of {student.steps} steps of {student.name}")
    if warning := api.warning_of_commits(session):
        to_stderr(f"cdlm: {warning}")


def _how(session: Session) -> str:
    """The settings of the sampler, without numbers that are as in the paper, and without what is off."""
    paper = session.model.defaults.settings
    said = {
        name: _OFF.sub("", str(value)).replace(", )", ")")
        for name, value in session.settings.items()
        if not (isinstance(value, float) and value == paper.get(name))
    }
    return ", ".join(f"{name} {value}" for name, value in said.items() if value != "None")


def _say_unhalted(halt: str, session: Session, samples: Samples) -> None:
    """What most often keeps a rule from halting anything, if this one did not."""
    if any(why is HaltReason.CRITERION for why in samples.reason):
        return
    why = "try a looser setting, or more steps"
    if isinstance(getattr(session.sampling, "grid", None), Warped):
        why = 'on the grid Warped() tokens change until late; try --grid "LogT()"'
    if getattr(session.sampling, "commit", None) is not None:
        why = "rows end by their commits before it; --commit none leaves those out"
    to_stderr(f"cdlm: {halt} halted no sample: {why}")


def _write(samples: Samples, session: Session, output: OutputOptions, title: str, quiet: bool, marked: bool) -> None:
    if output.record is not None:
        file = write_recording(recording_of(samples, session), session, output.record)
        if not quiet:
            to_stderr(f"{file}: {file.stat().st_size:,} bytes")
    if output.plot is not None:
        plot_samples(samples, output.plot, title, output.style)
    if output.out is not None:
        samples.save(output.out)
    if quiet:
        return
    if output.out is None and output.record is None:
        for one in samples.select(np.array(samples.originals)):
            text = _marked(one) if marked else one.text
            print(f"--- sample {one.index}, {one.nfe} calls, {one.reason.name.lower()}\n{text.strip()}")
        if marked:
            to_stderr("what was given stands in [ ]")
    _say_what(samples)


def _say_what(samples: Samples) -> None:
    """What a person should know of the samples."""
    if (computed := len(samples.originals)) < len(samples):
        to_stderr(
            f"nothing is drawn at random with these settings: {computed} of {len(samples)} samples were computed, the"
            " others are copies"
        )
    if not any(text.strip() for text in samples.texts):
        to_stderr("no sample has any text: a model that was trained to answer, such as arithmetic, needs a --prompt")
    late = samples.calls_after_end.mean()
    after = f", {late:.1f} of them after the end of the text" if late > 0 else ""
    count = "1 sample" if len(samples) == 1 else f"{len(samples)} samples"
    to_stderr(
        f"{count}, {samples.nfe.mean():.1f} calls a sample of {samples.budget} steps{after}{samples.counted_text}"
    )


def _marked(sample: Sample) -> str:
    """The text with what was given in square brackets."""
    parts, end = [], 0
    for start, stop in sample.given:
        parts += [sample.text[end:start], f"[{sample.text[start:stop]}]"]
        end = stop
    return "".join([*parts, sample.text[end:]])
