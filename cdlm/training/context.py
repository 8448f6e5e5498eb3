"""What must stay the same when a run is resumed, and how a change is reported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cdlm.core.errors import CdlmError

FORMAT = 2
"""Version of a checkpoint's content. Version 1 named its tensors otherwise and cannot be resumed."""
DIGEST = ".digest"
"""End of the name of a value that only stands for another one: `data.digest` is compared, `data` is shown."""

Context = Mapping[str, str | int]
"""Settings by name."""


def check_same(saved: Context, now: Context, run: Path) -> None:
    """Compare the settings of a checkpoint with those of the run that goes on from it.

    Args:
        run: folder of the run, for the advice.

    Raises:
        CdlmError: a setting changed; one line names it, both its values, and what to do.
    """
    names = sorted(saved.keys() | now.keys())
    shown = {name for name in names if name + DIGEST in names}
    changed = [name for name in names if name not in shown and saved.get(name) != now.get(name)]
    if not changed:
        return
    listed = " and ".join(name.removesuffix(DIGEST) for name in changed)
    how = ", ".join(_change(name.removesuffix(DIGEST), saved, now) for name in changed)
    raise CdlmError(f"cannot resume: {listed} changed ({how}): {_advice(changed, run)}")


def check_format(found: int, run: Path) -> None:
    """Refuse a checkpoint of another version in one line."""
    if found != FORMAT:
        raise CdlmError(
            f"cannot resume: the checkpoint in {run} is of another version of cdlm (format {found}, this one reads"
            f" {FORMAT}); start a new run from its weights with --start {run}"
        )


def _change(name: str, saved: Context, now: Context) -> str:
    if saved.get(name) == now.get(name):
        return f"the content of {saved.get(name)} is not what it was"
    return f"{name} was {saved.get(name)}, is {now.get(name)}"


def _advice(changed: list[str], run: Path) -> str:
    if any(name.startswith("system.") for name in changed):
        return "restore it, or start a new run"
    return (
        "restore it (resuming may change steps, learning rates, weight decay, warm-up, clipping, EMA, precision and"
        f" intervals), or start a new run from these weights with --start {run}"
    )
