"""Checkpoints that were damaged or altered: a run goes on from what it wrote, or one line says what is wrong."""

from __future__ import annotations

import copy
import math
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_run import run, saved

from cdlm.core.errors import CdlmError
from cdlm.training.files import AtomicCheckpoints, steps_done
from cdlm.training.folder import checkpoint_of

Checkpoint = dict[str, Any]
Change = Callable[[Any], Any]
STEPS = 3
ODD = (None, -1, 2.5, "x", True, [1], {"a": 1}, torch.zeros(2), 10**30, math.nan)
WRONG_TENSORS: dict[str, Change] = {
    "shape": lambda x: x.flatten()[:1].clone(), "double": lambda x: x.double(), "whole": lambda x: x.long(),
    "truth": lambda x: x.bool(), "half": lambda x: x.half(), "complex": lambda x: x.to(torch.complex64),
    "NaN": lambda x: x * math.nan, "infinite": lambda x: x + math.inf, "none": lambda x: None,
    "list": lambda x: x.tolist(), "sparse": lambda x: x.to_sparse(), "meta": lambda x: x.to("meta"),
}  # fmt: skip


class Evil:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('this ran')",)


@pytest.fixture(scope="module", params=["muon", "adamw"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    run(folder, steps=STEPS, optimizer=request.param)
    return folder, request.param


def paths_of(values: dict[Any, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything is in nested mappings."""
    for name, value in values.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from paths_of(value, (*path, name))


def parts(checkpoint: Checkpoint) -> list[Any]:
    state = checkpoint["optimizer_states"][0]
    return [state] if "state" in state else list(state.values())


def at(checkpoint: Any, path: tuple[Any, ...]) -> Any:
    return at(checkpoint[path[0]], path[1:]) if path else checkpoint


def changes(checkpoint: Checkpoint) -> Iterator[tuple[str, Change]]:
    """Names and changes in place. One that returns a text did not apply."""
    yield from taken_or_odd(checkpoint)
    yield from of_tensors(checkpoint)
    yield from of_the_optimizer()
    yield "a step more", lambda c: c.update(global_step=STEPS + 1)
    yield "a batch more", lambda c: c["cdlm"].update(batches=STEPS + 1)
    yield "no fit loop", lambda c: c["loops"].pop("fit_loop")
    yield "an old version", lambda c: c.update({"pytorch-lightning_version": "0.1.0"})
    yield "a large window", lambda c: c["cdlm"].update(window=torch.zeros(1, 4, dtype=torch.float64).expand(10**9, 4))


def taken_or_odd(checkpoint: Checkpoint) -> Iterator[tuple[str, Change]]:
    for name in checkpoint:
        yield f"no {name}", lambda c, name=name: c.pop(name)
    for path in [(name,) for name in checkpoint] + [("cdlm", name) for name in checkpoint["cdlm"]]:
        for odd in ODD:
            yield f"{'.'.join(path)} is {odd!r:.20}", lambda c, p=path, odd=odd: put(c, p, odd)
    for path in paths_of(checkpoint["loops"]["fit_loop"], ("loops", "fit_loop")):
        yield f"no {'.'.join(path)}", lambda c, path=path: at(c, path[:-1]).pop(path[-1])
        for odd in (None, -1, "x", 2.5, 10**12):
            yield f"{'.'.join(path)} is {odd!r}", lambda c, p=path, odd=odd: put(c, p, odd)


def put(checkpoint: Checkpoint, path: tuple[Any, ...], value: Any) -> str | None:
    place, name = at(checkpoint, path[:-1]), path[-1]
    if type(place[name]) is type(value) and name != "global_step" and not isinstance(value, int | torch.Tensor | dict):
        return "as it was"
    place[name] = value
    return None


def of_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Change]]:
    yield "an unknown tensor", lambda c: c["state_dict"].update(unknown=torch.zeros(2))
    yield "no average", lambda c: [c["state_dict"].pop(n) for n in list(c["state_dict"]) if n.startswith("ema.")]
    for name in ("system.embedding.weight", "ema.system.embedding.weight", "ema.system.schedule.averaged"):
        yield f"no {name}", lambda c, name=name: c["state_dict"].pop(name)
        for how, change in WRONG_TENSORS.items():
            yield f"{name}: {how}", lambda c, n=name, f=change: put(c, ("state_dict", n), f(c["state_dict"][n]))


def of_the_optimizer() -> Iterator[tuple[str, Change]]:
    yield "no states", lambda c: [part["state"].clear() for part in parts(c)]
    yield "half of the states", lambda c: [part["state"].pop(k) for part in parts(c) for k in list(part["state"])[::2]]
    yield "one state less", lambda c: parts(c)[-1]["state"].pop(0)
    yield "no groups", lambda c: [part["param_groups"].clear() for part in parts(c)]
    yield "groups without parameters", lambda c: [g.pop("params") for part in parts(c) for g in part["param_groups"]]
    yield "no optimizer", lambda c: c["optimizer_states"].clear()
    yield "an empty optimizer", lambda c: c.update(optimizer_states=[{}])
    yield "other constants", lambda c: [g.update(eps=-1.0) for part in parts(c) for g in part["param_groups"]]
    yield (
        "negative squares",
        lambda c: parts(c)[-1]["state"][0].update(exp_avg_sq=-parts(c)[-1]["state"][0]["exp_avg_sq"] - 1),
    )
    yield "a step of its own", lambda c: parts(c)[-1]["state"][0].update(step=torch.tensor(-1.0))
    for name in ("exp_avg", "exp_avg_sq", "step"):
        for how, change in WRONG_TENSORS.items():
            if (name, how) not in (("step", "list"), ("step", "shape")):
                yield (
                    f"{name}: {how}",
                    lambda c, n=name, f=change: parts(c)[-1]["state"][0].update({n: f(parts(c)[-1]["state"][0][n])}),
                )


def refused(folder: Path, optimizer: str) -> str:
    """Why the run cannot go on."""
    before = (folder / "metrics.csv").read_bytes()
    with pytest.raises(CdlmError) as raised:
        run(folder, resume=True, steps=STEPS + 1, optimizer=optimizer)
    assert (folder / "metrics.csv").read_bytes() == before
    return str(raised.value)


KINDS = [
    "no ",
    "global_step",
    "epoch",
    "pytorch",
    "state_dict",
    "loops",
    "callbacks",
    "optimizer",
    "lr_sched",
    "cdlm",
    "",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_not_what_was_written_is_one_line(finished: tuple[Path, str], kind: str) -> None:
    """Every change of a kind, of which a few are tried here and all in a soak of `-m slow`."""
    names = [name for name, _ in changes(saved(finished[0])) if of_kind(name) == kind]
    assert names
    for name in random.Random(kind).sample(names, min(3, len(names))):
        check(finished, name)


def of_kind(name: str) -> str:
    return next(kind for kind in KINDS if name.startswith(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_change_of_a_checkpoint_is_one_line(finished: tuple[Path, str], kind: str) -> None:
    for name, _ in changes(saved(finished[0])):
        if of_kind(name) == kind:
            check(finished, name)


def check(finished: tuple[Path, str], name: str) -> None:
    folder, optimizer = finished
    file, whole = checkpoint_of(folder), checkpoint_of(folder).read_bytes()
    checkpoint = copy.deepcopy(saved(folder))
    try:
        if dict(changes(checkpoint))[name](checkpoint) == "as it was" or name in ("no cdlm.moments",):
            return
        torch.save(checkpoint, file)
        message = refused(folder, optimizer)
        assert "\n" not in message, name
        assert len(message) < 700, name
        assert str(folder) in message or "cannot resume" in message, name
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_checkpoint_is_one_line(finished: tuple[Path, str], tmp_path: Path, share: float) -> None:
    whole = checkpoint_of(finished[0]).read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: int(share * len(whole))])
    for read in (steps_done, AtomicCheckpoints().load_checkpoint):
        with pytest.raises(CdlmError, match=r"last\.ckpt cannot be read.*copy it again"):
            read(tmp_path / "last.ckpt")


def test_no_byte_of_a_tensor_can_change_unseen(finished: tuple[Path, str], tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    whole = checkpoint_of(finished[0]).read_bytes()
    with zipfile.ZipFile(checkpoint_of(finished[0])) as archive:
        places = [part.header_offset + 200 for part in archive.infolist() if part.file_size > 400]
    assert len(places) > 5
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CdlmError, match=r"last\.ckpt"):
            AtomicCheckpoints().load_checkpoint(file)


def test_no_checkpoint_runs_code(finished: tuple[Path, str], tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({**saved(finished[0]), "more": Evil()}, file)
    planted = [file.read_bytes(), pickle.dumps({"global_step": 1, "more": Evil()}), b"", b"garbage" * 99]
    for content in planted:
        file.write_bytes(content)
        for read in (steps_done, AtomicCheckpoints().load_checkpoint):
            with pytest.raises(CdlmError, match=r"last\.ckpt"):
                read(file)
