"""Where to compute."""

from __future__ import annotations

import torch


def resolve_device(device: str) -> str:
    """`auto` as the device that this machine has: a CUDA GPU, else Apple's, else the CPU; others stay."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
