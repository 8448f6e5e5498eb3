"""The machine that a model runs on: which device, how many processes, which arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cdlm.core.checks import MOST_DEVICES, MOST_ROWS, check_whole, shown
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.progress import announce
from cdlm.core.ranks import Group, Place, join, launched, serve

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Precision = Literal["fp32", "bf16"]
"""Arithmetic of a network."""


def resolve_device(device: str | torch.device) -> str:
    """The name of a device; for auto, cuda if there is one, else mps if there is one, else cpu.

    Raises:
        CdlmError: this machine does not have the device.
    """
    import torch

    if isinstance(device, torch.device):
        device = str(device)
    if not isinstance(device, str):
        raise _unusable(device, "it is named by a text")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise _unusable(device, first_line(error)) from error
    if wanted.type == "meta":
        raise _unusable(device, "it computes nothing")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise _unusable(device, f"CUDA devices here: {torch.cuda.device_count()}")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise _unusable(device, "MPS is not available here")
    return device


def _unusable(device: object, reason: str) -> CdlmError:
    return CdlmError(f"device {shown(device)} cannot be used ({reason}); use auto, or cpu")


COARSE = frozenset({"mps"})
"""Kinds of devices without float64."""


def fine(device: torch.device | str) -> torch.dtype:
    """The finest numbers that a device has: float64, on Apple's GPUs float32."""
    import torch

    return torch.float32 if torch.device(device).type in COARSE else torch.float64


def refined(numbers: Tensor) -> Tensor:
    """The same numbers, as fine as their device has them."""
    return numbers.to(fine(numbers.device))


def read_columns(*columns: Tensor) -> list[list[int]]:
    """Truth values and whole numbers, one of each row, read from the device at once; of no column, nothing is read."""
    import torch

    return torch.stack(columns).tolist() if len(columns) > 1 else [column.tolist() for column in columns]


def places(chosen: Tensor, count: int | None = None) -> Tensor:
    """Places of what is true in a mask of one axis, int64.

    Args:
        count: how many there are, where that is known: then nothing has to be read from the device to find out.
    """
    import torch

    if count is None or chosen.device.type not in ("cpu", "cuda"):
        return chosen.nonzero().squeeze(1)
    return torch.nonzero_static(chosen, size=count).squeeze(1)


@dataclass(frozen=True)
class DeviceOptions:
    """The device."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ...; auto is cuda if there is one, else mps if there is one, else cpu."""
    quiet: bool = False
    """Print errors only: no progress, no device, no texts and no tables; files are written as ever."""

    def ready(self) -> DeviceOptions:
        """The same with the device that auto stands for, which is announced unless `quiet`.

        Raises:
            CdlmError: this machine does not have the device, or a launcher has started several processes.
        """
        if place := launched():
            raise CdlmError(
                f"this command is the work of one process, and {place.size} were started: start it without torchrun or"
                " srun"
            )
        return replace(self, device=self._announced(resolve_device(self.device)))

    def close(self) -> None:
        """The work is done."""

    def _announced(self, device: str, shared: str = "") -> str:
        if not self.quiet:
            announce(f"device: {device}{shared}")
        return device


@dataclass(frozen=True)
class MachineOptions(DeviceOptions):
    """The machine that the model runs on."""

    devices: int | Group = 1
    """Processes of this machine that share the work, each with a device of its own; with torchrun or srun there is one
    for each that they start, on several machines too."""
    precision: Precision | None = None
    """Arithmetic of the network; by default fp32, and of another library's model as in its files."""
    batch_size: int | None = None
    """Samples or rows that are worked on at a time."""

    def __post_init__(self) -> None:
        if not isinstance(self.devices, Group):
            check_whole("the machine", largest=MOST_DEVICES, devices=self.devices)
        check_whole("the machine", largest=MOST_ROWS, optional=True, batch_size=self.batch_size)

    def ready(self) -> MachineOptions:
        """The same with the device that auto stands for, and with the processes that share the work.

        Of several that a launcher has started only the first one returns; the others serve it.

        Raises:
            CdlmError: this machine does not have the devices, or the processes do not meet.
            SystemExit: this was one of the others, and the work is done.
        """
        place, device = launched(), resolve_device(self.device)
        if place is None:
            assert isinstance(self.devices, int)
            return replace(self, device=self._announced(device, _shared_by(self.devices, device)))
        if self.devices != 1:
            raise CdlmError(
                f"{place.size} processes were started, and each has one device: leave out --devices {self.devices}"
            )
        own = _own_device(device, place)
        group = join(place)
        if not isinstance(group, Group):
            serve(group, own)
            raise SystemExit(0)
        machines = "one machine" if group.machines == 1 else f"{group.machines} machines"
        said = f", the first of {len(group)} processes on {machines}"
        return replace(self, device=self._announced(own, said), devices=group)

    @property
    def processes(self) -> int:
        """How many share the work."""
        return len(self.devices) if isinstance(self.devices, Group) else self.devices

    def close(self) -> None:
        if isinstance(self.devices, Group):
            self.devices.close()


def _shared_by(devices: int, device: str) -> str:
    """What is announced of several processes of this machine; checks that each has a device."""
    if devices == 1:
        return ""
    if device == "cuda":
        resolve_device(f"cuda:{devices - 1}")
        return f", {devices} processes with a GPU each"
    return f", shared by {devices} processes"


def _own_device(device: str, place: Place) -> str:
    """The device of one process of several."""
    if ":" in device:
        raise CdlmError(f"several processes need a kind of device, got {device!r}: say {device.split(':')[0]!r}")
    if device != "cuda":
        return device
    import torch

    # A launcher may let each process see its own GPU alone.
    return device if torch.cuda.device_count() == 1 else resolve_device(f"cuda:{place.local}")
