"""What a checkpoint must hold before a run goes on from it: every value in its place, of its type, and finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
from lightning.pytorch import LightningModule
from msgspec import Meta
from torch import Tensor, nn
from torch.optim import Optimizer

from cdlm.core.errors import CdlmError
from cdlm.core.schema import Whole, checked
from cdlm.training.optimizers import CombinedOptimizer

COLUMNS = 4
"""Of a row of the window: loss, nats, generated tokens, all tokens."""
Version = Annotated[str, Meta(pattern=r"^[2-9]\.\d+\.\d+\S{0,20}$", max_length=40)]


class Ours(TypedDict):
    """What `TrainingModule` adds to a checkpoint."""

    format: NotRequired[Whole]
    batches: Whole
    context: dict[str, str | int]
    window: Any
    moments: NotRequired[Whole]
    """How many parameters had optimiser state; earlier versions did not count them."""


Checkpoint = TypedDict("Checkpoint", {
    "global_step": Whole, "epoch": Literal[0], "pytorch-lightning_version": Version, "state_dict": dict[str, Any],
    "loops": dict[str, Any], "callbacks": Annotated[dict[str, Any], Meta(max_length=0)],
    "optimizer_states": list[Any], "lr_schedulers": Annotated[list[Any], Meta(max_length=0)], "cdlm": Ours,
})  # fmt: skip
"""The plain values of a checkpoint, and where its tensors are."""


def advice_for(file: Path) -> str:
    """What to do about a checkpoint that cannot be resumed."""
    return f"copy it again, or start a new run from the model with --start {file.parent.parent}"


def check_plain(checkpoint: Any, file: Path) -> None:
    """Check all of a checkpoint that is no tensor, and needs no model to be judged.

    Raises:
        CdlmError: a value is missing or of a wrong kind.
    """
    try:
        checked(checkpoint, Checkpoint, str(file), advice_for(file))
    except (AttributeError, TypeError) as error:  # a tensor that stands for plain values
        raise CdlmError(f"{file} has a tensor where plain values belong ({error}); {advice_for(file)}") from error


def check_tensors(checkpoint: Mapping[str, Any], module: LightningModule, optimizer: Optimizer, file: Path) -> None:
    """Check that a checkpoint fits a module and its optimiser: tensors, optimiser state and progress.

    Args:
        optimizer: one like that of the run, without state.

    Raises:
        CdlmError: it does not; names the part that is wrong.
    """
    step, ours = checkpoint["global_step"], checkpoint["cdlm"]
    loops, like = checkpoint["loops"].get("fit_loop"), module.trainer.fit_loop.state_dict()
    checks = [_window(ours["window"]), _progress(loops, like, "loops.fit_loop", step, ours)]
    if "state_dict" in checkpoint:  # weights that are spread over devices are read in slices, by the trainer alone
        checks += [
            _weights(checkpoint["state_dict"], module.state_dict()),
            _moments(checkpoint["optimizer_states"], optimizer, step, ours.get("moments")),
        ]
    for what in chain.from_iterable(checks):
        raise CdlmError(f"{file} cannot be resumed: {what}; {advice_for(file)}")


def count_moments(states: Any) -> int:
    """Parameters that have optimiser state, of all parts of an optimiser."""
    if not isinstance(states, dict):
        return sum(map(count_moments, states)) if isinstance(states, list) else 0
    own = len(states["state"]) if isinstance(states.get("state"), dict) else 0
    return own + sum(count_moments(part) for name, part in states.items() if name not in ("state", "param_groups"))


def _weights(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> Iterator[str]:
    for what, odd in (("misses", expected.keys() - found.keys()), ("has an unknown", found.keys() - expected.keys())):
        if odd:
            yield f"it {what} tensor {min(odd)!r} ({len(odd)} in all)"
    for name, like in expected.items():
        yield from _tensor(f"tensor {name!r}", found[name], like.shape, like.dtype)


def _tensor(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[str]:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        yield f"{name} is no plain tensor"
    elif tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        yield f"{name} is {value.dtype} {tuple(value.shape)}, expected {dtype} {tuple(shape)}"
    elif value.is_floating_point() and not bool(value.isfinite().all()):
        yield f"{name} has values that are NaN or infinite"


def _window(value: Any) -> Iterator[str]:
    name = "the window of metrics"
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_contiguous():
        yield f"{name} is no table"
    else:
        yield from _tensor(name, value, (len(value), COLUMNS), torch.float64)


def _progress(found: Any, like: Any, place: str, step: int, ours: Mapping[str, Any]) -> Iterator[str]:
    """Whether counts have the names of a trainer's own, and those of steps and batches are those of the checkpoint."""
    if isinstance(like, dict):
        if not isinstance(found, dict) or found.keys() < like.keys():
            yield f"{place} lacks {', '.join(sorted(like.keys() - (found if isinstance(found, dict) else {})))}"
            return
        for name, value in like.items():
            yield from _progress(found[name], value, f"{place}.{name}", step, ours)
        return
    if type(found) is not type(like):
        yield f"{place} is {found!r}, expected a value like {like!r}"
    elif type(found) is int and not 0 <= found <= ours["batches"] + 1:
        yield f"{place} is {found}, expected a count of at most {ours['batches']} batches"
    elif place.endswith("optimizer.step.total.completed") and found != step:
        yield f"{place} is {found}, expected {step}, the step of the checkpoint"
    elif place.endswith("epoch_loop.batch_progress.total.ready") and found != ours["batches"]:
        yield f"{place} is {found}, expected {ours['batches']}, the batches of the checkpoint"


def _moments(states: list[Any], optimizer: Optimizer, step: int, counted: int | None) -> Iterator[str]:
    """Whether the state of an optimiser is that of our parameters, all of it, and its constants are ours."""
    parts = optimizer.parts if isinstance(optimizer, CombinedOptimizer) else {"": optimizer}
    if len(states) != 1 or not isinstance(states[0], dict):
        yield f"it has the state of {len(states)} optimisers, expected that of one"
        return
    for name, part in parts.items():
        place = f"the state of optimiser {name or type(part).__name__.lower()}"
        state = states[0].get(name) if name else states[0]
        if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
            yield f"{place} is not there"
            return
        yield from _groups(place, state["param_groups"], part.state_dict()["param_groups"])
        yield from _states(place, state["state"], [p for group in part.param_groups for p in group["params"]], step)
    if counted is not None and count_moments(states) != counted:
        yield f"it has optimiser state of {count_moments(states)} parameters, expected {counted}"


def _groups(place: str, found: Any, expected: list[dict[str, Any]]) -> Iterator[str]:
    if not isinstance(found, list) or len(found) != len(expected) or not all(isinstance(g, dict) for g in found):
        yield f"{place} has no {len(expected)} groups of parameters"
        return
    for group, like in zip(found, expected, strict=True):
        for name in like.keys() - {"lr", "weight_decay"}:  # these are set anew at each step
            if name in group and (type(group[name]) is not type(like[name]) or group[name] != like[name]):
                yield f"{place} has {name} {str(group[name])[:60]} in a group of parameters, expected {like[name]}"
        if not {"name", "params"} <= group.keys():
            yield f"{place} has a group without name or parameters"


def _states(place: str, found: Any, parameters: list[nn.Parameter], step: int) -> Iterator[str]:
    if not isinstance(found, dict) or bool(found) != bool(step):
        yield f"{place} has {'none' if step else 'some'} of its parameters after {step} steps"
        return
    fields = next(iter(found.values())).keys() if found and isinstance(next(iter(found.values())), dict) else set()
    for index, values in found.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            yield f"{place} has a parameter {str(index)[:60]!r}, expected a number below {len(parameters)}"
        elif not isinstance(values, dict) or not values or values.keys() != fields:
            yield f"{place} of parameter {index} is not whole"
        else:
            for name, value in values.items():
                shape = () if name == "step" else parameters[index].shape
                yield from _tensor(f"{name} in {place} of parameter {index}", value, shape, torch.float32)
                if name == "step" and not 1 <= float(value) <= step:
                    yield f"{place} of parameter {index} has taken {float(value):g} steps, expected 1 to {step}"
                if name == "exp_avg_sq" and bool((value < 0).any()):
                    yield f"{name} in {place} of parameter {index} has negative values"
