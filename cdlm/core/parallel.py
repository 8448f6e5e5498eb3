"""The same work on several processes: each opens what it needs once, then serves many calls."""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.reduction import ForkingPickler
from pickle import PicklingError
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Shaped

from cdlm.core.checks import MOST_DEVICES, shown
from cdlm.core.errors import CdlmError
from cdlm.core.ranks import Group, cannot_travel, message

M = TypeVar("M")
S = TypeVar("S")
T = TypeVar("T")


class Workers(ABC, Generic[M]):
    """This process and others that share its work.

    Everything that travels between processes must be picklable: functions of a module, or partial calls of them, with
    plain data. Close the workers, or use them in a `with` statement.
    """

    @abstractmethod
    def __len__(self) -> int:
        """How many processes there are, this one too."""

    @abstractmethod
    def map(self, work: Callable[[M, S], T], here: M, shares: Sequence[S]) -> list[T]:
        """`work(opened, share)` for each share, one a process at most, in the order of the shares; the first share is
        done in this process with `here`.

        Raises:
            CdlmError: that of the work, whichever process it comes from; it cannot travel; or a process has ended.
        """

    @abstractmethod
    def close(self) -> None:
        """The others forget what they have opened, or end."""

    def __enter__(self) -> Workers[M]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def workers_on(devices: int | Group, open_: Callable[[str], M], device: str = "cpu") -> Workers[M]:
    """Workers on the devices of this machine, or on the processes of a group."""
    return LaunchedWorkers(open_, devices) if isinstance(devices, Group) else LocalWorkers(open_, devices, device)


class LocalWorkers(Workers[M]):
    """This process and `devices` - 1 others that it starts, one for each device.

    Args:
        open_: gives what the work needs on a device, such as a loaded model; each further process calls it once.
        devices: number of processes, >= 1.
        device: "cpu", or "cuda" for one GPU per process.
    """

    def __init__(self, open_: Callable[[str], M], devices: int, device: str = "cpu"):
        if type(devices) is not int or not 1 <= devices <= MOST_DEVICES:
            raise CdlmError(
                f"devices is a number of processes, must be >= 1 and at most {MOST_DEVICES}, got {shown(devices)}"
            )
        if devices > 1 and ":" in device:
            raise CdlmError(f"several devices need a kind of device, got {device!r}: say {device.split(':')[0]!r}")
        context = multiprocessing.get_context("spawn")
        self.threads = max(1, torch.get_num_threads() // devices) if device == "cpu" else None
        self._open = open_
        self._places = [f"{device}:{rank}" if device == "cuda" else device for rank in range(1, devices)]
        self._pools = [ProcessPoolExecutor(1, context) for _ in self._places]
        self._closed = False

    def __len__(self) -> int:
        return len(self._pools) + 1

    def map(self, work: Callable[[M, S], T], here: M, shares: Sequence[S]) -> list[T]:
        if self._closed:
            raise _closed()
        if len(shares) > 1:
            _check_travels(work)
        try:
            calls = [
                pool.submit(_serve, self._open, place, self.threads, work, share)
                for pool, place, share in zip(self._pools, self._places, shares[1:], strict=False)
            ]
            first = self._here(work, here, shares[0], alone=not calls)
            return [first, *(call.result() for call in calls)]
        except BrokenProcessPool as error:
            raise CdlmError(
                "a process ended before its work was done, perhaps for lack of memory: use fewer devices, or a smaller"
                " batch_size; a script starts its work under if __name__ == '__main__'"
            ) from error

    def _here(self, work: Callable[[M, S], T], here: M, share: S, alone: bool) -> T:
        before = torch.get_num_threads()
        torch.set_num_threads(before if alone or self.threads is None else self.threads)
        try:
            return work(here, share)
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        self._closed = bool(self._pools)
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


class LaunchedWorkers(Workers[M]):
    """The processes of a command that a launcher has started; see `cdlm.core.ranks`.

    Args:
        open_: gives what the work needs on a device; each of the others calls it once, on its own.
        group: of the first process.
    """

    def __init__(self, open_: Callable[[str], M], group: Group):
        self._open, self._group, self._number = open_, group, group.number()
        self._closed = False

    def __len__(self) -> int:
        return len(self._group)

    def map(self, work: Callable[[M, S], T], here: M, shares: Sequence[S]) -> list[T]:
        if self._closed or not self._group.open:
            raise _closed()
        for peer, sent in enumerate([message(self._number, self._open, work, share) for share in shares[1:]]):
            self._group.give(peer, sent)
        try:
            first = work(here, shares[0])
        except BaseException:
            self._group.drop()
            raise
        return [first, *self._group.gather(len(shares) - 1)]

    def close(self) -> None:
        if not self._closed:
            self._group.forget(self._number)
        self._closed = True


def _closed() -> CdlmError:
    return CdlmError("the session was closed and its processes have ended: open another")


def _check_travels(work: object) -> None:
    """Raise unless other processes can be given the work."""
    try:
        ForkingPickler.dumps(work)
    except (PicklingError, AttributeError, TypeError) as error:
        raise cannot_travel(error) from error


_opened: dict[Any, Any] = {}
"""In a further process: what it has opened. Nothing is kept here in the first one."""


def _serve(open_: Callable[[str], Any], device: str, threads: int | None, work: Callable[[Any, S], T], share: S) -> T:
    if "it" not in _opened:
        if threads is not None:
            torch.set_num_threads(threads)
        _opened["it"] = open_(device)
    return work(_opened["it"], share)


def deal(items: Sequence[T], hands: int) -> list[Sequence[T]]:
    """Every `hands`-th item for each of as many processes; fewer if there are fewer items."""
    return [items[hand::hands] for hand in range(min(hands, len(items)))]


def interleaved(shares: Sequence[Shaped[np.ndarray, "_ ..."]]) -> Shaped[np.ndarray, "_ ..."]:
    """What `deal` has divided, put together again along the first axis."""
    whole = np.empty((sum(map(len, shares)), *shares[0].shape[1:]), shares[0].dtype)
    for hand, share in enumerate(shares):
        whole[hand :: len(shares)] = share
    return whole
