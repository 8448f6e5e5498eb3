"""Watch samples form, in a page of one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdlm import api
from cdlm.cli.groups import PromptOptions, asked, flat_settings, session_on
from cdlm.continuous.sampler import DiffusionSettings
from cdlm.core.devices import MachineOptions
from cdlm.core.files import check_files
from cdlm.core.progress import announce, to_stderr
from cdlm.halting import Criterion
from cdlm.masked.sampler import UnmaskingSettings
from cdlm.sampling.prompts import Prompt
from cdlm.sampling.samples import Samples
from cdlm.sampling.watch.page import check_page, checked_rules, write_page

PROMPTS, MACHINE = PromptOptions(n=4), MachineOptions()
DIFFUSION, UNMASKING = DiffusionSettings(), UnmaskingSettings()


def watch(
    models: list[str],
    *,
    out: Path,
    rules: list[str] | None = None,
    steps: int | None = None,
    prompts: PromptOptions = PROMPTS,
    diffusion: DiffusionSettings = DIFFUSION,
    unmasking: UnmaskingSettings = UNMASKING,
    machine: MachineOptions = MACHINE,
) -> None:
    """Draw samples of one or more models, and write a page in which one watches them form. It needs no network.

    Args:
        models: run folders or Hub ids; several are shown side by side, from the same prompts.
        out: the page, such as page.html.
        rules: halting rules, such as "Patience(8)" "Entropy(0.1)": where they would have halted, and what would then
            have been read; by default some that suit the model.
        steps: as of cdlm sample.
    """
    check_page(out)
    check_files(out)
    chosen = None if rules is None else checked_rules(rules)
    settings = flat_settings(diffusion, unmasking, steps=steps)
    texts = prompts.texts()
    runs = [_drawn(model, settings, chosen, (texts, prompts), machine, len(models) > 1) for model in models]
    write_page(out, runs[0], chosen, runs[1:])
    if not machine.quiet:
        to_stderr(f"{out}: {out.stat().st_size:,} bytes; open it in a browser")


def _drawn(
    model: str, settings: dict[str, Any], rules: list[Criterion] | None,
    wanted: tuple[list[Prompt] | None, PromptOptions], machine: MachineOptions, several: bool,
) -> Samples:  # fmt: skip
    """The samples of a model, with all that a page shows.

    Args:
        several: the model is one of several: settings of other families are passed over, and the page says which rules
            do not suit it.
    """
    with session_on(machine, model, wanted[1].seed) as opened:
        session = opened.with_sampling(api.sampling_of(opened.model, None, settings, lenient=several))
        session.check_made_for([] if several else rules or [])
        requests, _ = asked(session, *wanted)
        session.check_recordable(requests, "watched")
        if not machine.quiet:
            count = "1 sample" if len(requests) == 1 else f"{len(requests)} samples"
            announce(f"cdlm: {session.model.name} draws {count}")
        return session.watched().run(requests)
