"""The same work on several processes, with Lightning Fabric: each takes every N-th item."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from cdlm.core.errors import CdlmError

T = TypeVar("T")


def spread(work: Callable[[int, int, str], T], devices: int, device: str = "cpu") -> list[T]:
    """Results of `work(rank, world, device)` from `devices` processes, in the order of the ranks.

    One device runs here, without Fabric. `work` and its results travel between processes: functions of a module, or
    partial calls of them, with plain data.

    Args:
        device: "cpu", or "cuda" for one GPU per process.
    """
    if devices < 1:
        raise CdlmError(f"devices is a number of processes and must be >= 1, got {devices}")
    if devices == 1:
        return [work(0, 1, device)]
    from lightning.fabric import Fabric

    if ":" in device:
        raise CdlmError(f"several devices need a kind of device, got {device!r}: say {device.split(':')[0]!r}")
    fabric = Fabric(accelerator="gpu" if device == "cuda" else device, devices=devices, strategy="ddp_spawn")
    launch: Callable[..., Any] = fabric.launch  # its own type forgets the arguments of the function
    return launch(_collect, work, device).results


class _Parcel:
    """Fabric walks through dataclasses on their way back and refuses frozen ones; other objects it lets pass."""

    def __init__(self, results: list[Any]):
        self.results = results


def _collect(fabric: Any, work: Callable[[int, int, str], T], device: str) -> Any:
    import torch

    here = f"{device}:{fabric.local_rank}" if device == "cuda" else device
    threads = max(1, torch.get_num_threads() // (fabric.world_size if device == "cpu" else 1))
    torch.set_num_threads(threads)
    results: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(results, work(fabric.global_rank, fabric.world_size, here))
    return _Parcel(results)
