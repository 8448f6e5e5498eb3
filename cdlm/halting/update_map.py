"""The map of an adapter's training: where AdamW moved the weights of LoRA, which the rule `EDIT` compares activations
with. It is kept beside the adapter, and is of no use to other weights.

After EDIT (arXiv 2512.00670). `cdlm train --lora` writes it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing
from cdlm.core.tensors import FLOATS, check_values, read_header, read_tensors, specs_of, write_tensors

FILE = "update_map.safetensors"
VERSION = "1"
_STEPS = re.compile("[1-9][0-9]{0,17}")
_AGAIN = "train the adapter again, with cdlm train --lora"


@dataclass(frozen=True, eq=False)
class UpdateMap:
    """The mean direction in which AdamW moved each module's LoRA B.

    Args:
        directions: U = m / (sqrt(v) + eps) of B, averaged over the logged steps, by the name of the module in the
            network; [d r], float32.
        weights: fingerprint of the weights that came out of the training, base and adapter.
        steps: logged steps.
    """

    directions: Mapping[str, Float[Tensor, "_d _r"]]
    weights: str
    steps: int

    @property
    def size(self) -> int:
        """Bytes of the matrices."""
        return sum(value.numel() * value.element_size() for value in self.directions.values())

    @property
    def size_of_vectors(self) -> int:
        """Bytes of one vector for each module, all that the paper's form of the rule needs."""
        return sum(len(value) * value.element_size() for value in self.directions.values())


def row_norms(directions: Float[Tensor, "d r"]) -> Float[Tensor, " d"]:
    """The length of each row: how far B was moved in each output feature."""
    return directions.norm(dim=1)


def write_map(folder: Path, made: UpdateMap) -> None:
    """Write the map, whole or not at all."""
    metadata = {"cdlm_update_map": VERSION, "weights": made.weights, "steps": str(made.steps)}
    with replacing(folder / FILE) as temporary:
        lazy = {name: (lambda v=value: v) for name, value in made.directions.items()}
        write_tensors(temporary, specs_of(made.directions), lazy, metadata)


def read_map(folder: Path) -> tuple[UpdateMap, str]:
    """The map in a folder, and its digest.

    Raises:
        CdlmError: there is none, or it is damaged.
    """
    file = folder / FILE
    if not file.exists():
        raise CdlmError(f"{folder} has no {FILE}: train an adapter with cdlm train --start MODEL --lora RANK --out DIR")
    header = read_header(file, _AGAIN)
    if header.metadata.get("cdlm_update_map") != VERSION:
        raise CdlmError(f"{file} is no map of version {VERSION}, which this program reads: {_AGAIN}")
    weights, steps = header.metadata.get("weights", ""), header.metadata.get("steps", "")
    fits = {n: len(shape) == 2 and 0 not in shape and dtype in FLOATS for n, (shape, dtype) in header.specs.items()}
    odd = next((name for name, fit in fits.items() if not fit), None)
    if odd is not None or not header.specs or not weights or not _STEPS.fullmatch(steps):
        what = "it lacks weights or steps" if odd is None else f"tensor {odd!r} is no matrix of floats"
        raise CdlmError(f"{file} is damaged ({what}): {_AGAIN}")
    tensors = read_tensors(file, _AGAIN)
    check_values(file, tensors)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return UpdateMap({name: value.to(torch.float32) for name, value in tensors.items()}, weights, int(steps)), digest
