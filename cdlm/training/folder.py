"""A run folder while a training writes into it: held by one process, with nothing in it that leads elsewhere."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cdlm.core.errors import CdlmError
from cdlm.core.files import cannot_write, real_path, remove_leftovers
from cdlm.core.progress import announce

CHECKPOINT = "checkpoints/last.ckpt"
"""The file in a run folder that a run is resumed from."""
LOCK = "training.lock"
WRITTEN = (
    LOCK, "checkpoints", CHECKPOINT, "samples", "metrics.csv", "tensorboard", "wandb", "config.yaml",
    "config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
"""What a training writes in its folder."""
_OLD_LEFTOVER = re.compile(
    r"\.(last\.ckpt|model\.safetensors|config\.(json|yaml)|README\.md|metrics\.csv|(special_)?token\w*\.json|step_\d+\.txt)"
    r"\.[0-9a-f]{8}"
)
"""What earlier versions were writing when they were killed."""
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def checkpoint_of(run_dir: Path) -> Path:
    """The file that a run is resumed from."""
    return run_dir / CHECKPOINT


def check_folder(run_dir: Path, resume: bool) -> None:
    """A new run needs a folder without a model and without a checkpoint, a resumed one a folder with a checkpoint.

    Raises:
        CdlmError: it is otherwise, or no folder.
    """
    checkpoint, settings = checkpoint_of(run_dir), run_dir / "config.yaml"
    # What exists is False of a name that is too long, which writing will tell.
    there, trained = os.path.exists(checkpoint), os.path.exists(run_dir / "model.safetensors")
    if os.path.exists(run_dir) and not os.path.isdir(run_dir):
        raise CdlmError(f"cannot write {run_dir}, it is no folder; choose another folder")
    if resume and not there:
        again = "start it"
        if trained:  # packed, or without its checkpoints, or killed between its first model and its checkpoint
            again = f"begin from its model with --start {run_dir}, in another folder"
        elif os.path.exists(settings):
            again = f"begin it again with --config {settings} --out {run_dir}"
        raise CdlmError(f"nothing to resume, {checkpoint} does not exist: {again}")
    if not resume and there:
        raise CdlmError(f"{checkpoint} would be overwritten: go on with --resume {run_dir}, or choose another folder")
    if not resume and trained:
        raise CdlmError(
            f"the model in {run_dir} would be overwritten: choose another folder; --start {run_dir} goes on from it"
        )


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold a run folder, made if it is not there, so that no second training writes into it meanwhile.

    The lock ends with the process, however it ends; processes that it starts do not keep it. What a killed process was
    writing is removed. A folder that stays empty is removed again.

    Raises:
        CdlmError: another process holds it, a link in it leads out of it, or it cannot be written.
    """
    try:
        check_links(run_dir)
        made = not run_dir.exists()
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _locked(run_dir)
    except (OSError, ValueError) as error:  # a NUL in the name
        raise cannot_write(run_dir, error if isinstance(error, OSError) else OSError(str(error))) from error
    process = os.getpid()
    try:
        _remove_leftovers(run_dir)
        yield
    finally:
        if os.getpid() == process:  # not in a fork
            _release(run_dir, lock)
            if made:
                with suppress(OSError):  # it has content
                    run_dir.rmdir()


def check_links(run_dir: Path) -> None:
    """Refuse a folder in which a training would write to another place.

    Raises:
        CdlmError: something that it writes is a link that leads out of the folder.
    """
    inside = real_path(run_dir)
    for path in (run_dir / name for name in WRITTEN):
        if path.is_symlink() and not real_path(path).is_relative_to(inside):
            raise CdlmError(
                f"{path} is a link that leads out of the run folder, to {real_path(path)}: put a file or folder of its"
                " own in its place, or choose another run folder"
            )


def _locked(run_dir: Path) -> list[int]:
    """The lock file, open and locked; a list that is empty once it is released."""
    path = run_dir / LOCK
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(run_dir, number)
            if _is_still(path, number):
                os.ftruncate(number, 0)
                os.pwrite(number, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return _forgotten_by_children([number])
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # its former owner has removed it since


def _forgotten_by_children(lock: list[int]) -> list[int]:
    os.register_at_fork(after_in_child=lambda: _close(lock))
    return lock


def _lock(run_dir: Path, number: int) -> None:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CdlmError(
            f"{run_dir} is being trained by {_owner(number)}: wait for it, stop it, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        announce(f"{run_dir} is on a file system without locks: see to it that no second training writes there")


def _owner(number: int) -> str:
    words = os.pread(number, 300, 0).decode("ascii", "replace").split()
    if len(words) != 2 or not words[0].isdigit() or not re.fullmatch(r"[\w.-]+", words[1]):
        return "another process"
    return f"process {words[0]} on {words[1]}"


def _is_still(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except FileNotFoundError:
        return False


def _release(run_dir: Path, lock: list[int]) -> None:
    with suppress(OSError):
        (run_dir / LOCK).unlink()
    _close(lock)


def _close(lock: list[int]) -> None:
    while lock:
        os.close(lock.pop())


def _remove_leftovers(run_dir: Path) -> None:
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "samples"):
        remove_leftovers(folder)
        for path in folder.glob(".*"):
            if _OLD_LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
