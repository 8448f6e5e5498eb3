"""Devices: what auto stands for, what is not there, and options of the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cdlm.core.devices import DeviceOptions, MachineOptions, resolve_device
from cdlm.core.errors import CdlmError
from cdlm.core.progress import drop_announced, show_announced


def machine(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool) -> None:
    """Let torch find so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "auto"), [(1, False, "cuda"), (1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_is_the_best_that_is_there(cuda: int, mps: bool, auto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda, mps)
    assert resolve_device("auto") == auto
    assert resolve_device(resolve_device("auto")) == auto
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_a_gpu_that_is_there_is_taken_as_it_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2, False)
    assert resolve_device(device) == device


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda:2", "CUDA devices here: 2"), ("mps", "MPS is not available"), ("abacus", "device"), ("cuda:x", "device")],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(
    device: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 2, False)
    with pytest.raises(CdlmError, match=f"device '{device}' cannot be used") as caught:
        resolve_device(device)
    assert reason in str(caught.value)
    assert "use auto, or cpu" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quiet", [False, True])
def test_the_device_is_announced_unless_quiet(
    quiet: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 0, False)
    drop_announced()
    assert MachineOptions(quiet=quiet).ready() == MachineOptions("cpu", quiet)
    assert DeviceOptions(quiet=quiet).ready() == DeviceOptions("cpu", quiet)
    show_announced()
    assert capsys.readouterr().err == ("" if quiet else "device: cpu\n")  # said once
    assert MachineOptions(quiet=quiet, devices=2).ready() == MachineOptions("cpu", quiet, devices=2)
    show_announced()
    assert capsys.readouterr().err == ("" if quiet else "device: cpu, shared by 2 processes\n")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2, False)
    assert MachineOptions(devices=2, quiet=True).ready().device == "cuda"
    with pytest.raises(CdlmError, match="CUDA devices here: 2"):
        MachineOptions(devices=3).ready()


@pytest.mark.parametrize("setting", ["devices", "batch_size"])
def test_a_machine_has_one_of_each_at_least(setting: str) -> None:
    with pytest.raises(CdlmError, match=f"{setting} >= 1, got 0"):
        replace(MachineOptions(), **{setting: 0})
