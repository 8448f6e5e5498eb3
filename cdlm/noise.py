"""Randomness keyed by what it is for: no result depends on the batch, the device or the history of a process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a pure function of non-negative integers such as (seed, purpose, index)."""
    # The length is a part of the key, since the hash does not tell (1,) from (1, 0).
    state = np.random.SeedSequence([len(key), *key]).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 32 | int(state[1]))


def row_normal(seed: int, indices: Sequence[int], *shape: int) -> Float[Tensor, "b ..."]:
    """Standard normal numbers [b, *shape]: sample i draws the same ones in any batch, order or batch size.

    Drawn on the CPU in float32, so that a run on a GPU starts from the noise of a run on a CPU.
    """
    return torch.stack([torch.randn(shape, generator=generator(seed, index)) for index in indices])
