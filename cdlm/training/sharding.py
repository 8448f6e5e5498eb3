"""Weights spread over several devices: each holds a slice and gathers a block when it is needed (FSDP2)."""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cdlm.core.errors import CdlmError
from cdlm.models.system import System


def check_shards() -> None:
    """See that this torch can keep parameters whole beside sharded ones.

    Raises:
        CdlmError: it cannot, as 2.6.
    """
    if "ignored_params" not in signature(fully_shard).parameters:
        raise CdlmError(f"strategy 'fsdp' needs a newer torch than {torch.__version__}: take 'ddp', or update torch")


def shard(system: System, mesh: DeviceMesh) -> None:
    """Shard each block, then the rest, in place. The noise schedule, small and changing its own values, stays whole."""
    for block in system.blocks.children():
        fully_shard(block, mesh=mesh)
    fully_shard(system, mesh=mesh, ignored_params=set(system.parameter_groups()["schedule"]))


def gather(sharded: System, whole: System) -> None:
    """Copy the weights of all processes into `whole` on rank 0. Every process must call this."""
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if state:  # empty on the other ranks
        whole.load_state_dict(state)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients of whole parameters over the processes, which sharded ones do by themselves."""
    for parameter in parameters:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad.div_(torch.distributed.get_world_size()))


def local(x: Tensor) -> Tensor:
    """This process's slice of a tensor, or the tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x: Tensor) -> Tensor:
    """A small sharded tensor, gathered."""
    return x.full_tensor() if isinstance(x, DTensor) else x
