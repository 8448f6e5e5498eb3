"""Try halting rules on recorded runs."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from cdlm.core.errors import CdlmError
from cdlm.core.files import check_places
from cdlm.core.types import HaltReason
from cdlm.halting import parse_criterion
from cdlm.halting.replay import check_replayable
from cdlm.models import hub
from cdlm.recording.file import Recording, read_folder
from cdlm.sampling.recordings import agreement, replayed
from cdlm.sampling.samples import Samples


def replay(recordings: Path, *, halt: list[str] | None = None, out: Path | None = None, quiet: bool = False) -> None:
    """Tell what halting rules would have done to recorded runs, without the model.

    Args:
        recordings: folder that cdlm sample --record wrote.
        halt: halting rules, one or more.
        out: folder for one JSONL file of samples a rule; by default only the summary is printed.
        quiet: print errors only; the files of out are written as ever.
    """
    if not halt:
        raise CdlmError('replay needs rules to try: --halt "Patience(20)" "Entropy(0.05)"')
    rules = [parse_criterion(rule) for rule in halt]
    check_places(None if out is None else out / "rules")
    runs = read_folder(recordings)
    tokenizer = hub.read_tokenizer(recordings)
    for recording, rule in product(runs.values(), rules):
        check_replayable(recording, rule)
    if not quiet:
        print(f"{'steps':>6} {'seed':>5} {'n':>6} {'calls':>8} {'saved':>7} {'halted':>7} {'as full':>8}  rule")
    for (name, recording), (number, rule) in product(runs.items(), enumerate(rules, 1)):
        samples = replayed(recording, rule, tokenizer)
        if not quiet:
            print(_line(samples, recording, halt[number - 1]))
        if out is not None:
            samples.save(out / f"{name}-rule-{number}.jsonl")


def _line(samples: Samples, recording: Recording, rule: str) -> str:
    saved = 1 - samples.nfe.sum() / recording.record.nfe.max(0).sum()  # a row may end before the others
    halted = sum(reason is HaltReason.CRITERION for reason in samples.reason) / len(samples)
    same = agreement(samples.tokens, recording).mean()
    return (
        f"{samples.budget:6} {samples.seed:5} {len(samples):6} {samples.nfe.mean():8.1f} {saved:7.1%}"
        f" {halted:7.1%} {same:8.2%}  {rule}"
    )
