"""Processes of a launcher: what the environment says, and work that the first one gives to the others."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from cdlm.core.devices import DeviceOptions, MachineOptions
from cdlm.core.errors import CdlmError
from cdlm.core.ranks import Place, join, launched
from cdlm.training.options import TrainOptions, rank_and_world

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9",
}  # fmt: skip
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_JOB_ID": "120042", "SLURM_JOB_NAME": "cdlm",
}  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        (TORCHRUN, Place(3, 4, 1, 2, "a", 9)),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, None),
        (SRUN, Place(3, 4, 1, 2, "node07", 15042)),
        ({**SRUN, "MASTER_ADDR": "b", "MASTER_PORT": "7"}, Place(3, 4, 1, 2, "b", 7)),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, None),
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}, None),
        ({**SRUN, **TORCHRUN, "RANK": "2", "LOCAL_RANK": "0"}, Place(2, 4, 0, 2, "a", 9)),
    ],
)
def test_the_place_of_a_process_is_that_of_its_launcher(environ: dict[str, str], place: Place | None) -> None:
    assert launched(environ) == place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "4"}, "process 4 of 4"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"MASTER_PORT": "99999"}, "port 99999"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
    ],
)
def test_an_environment_that_cannot_be_is_one_line(change: dict[str, str | None], said: str) -> None:
    environ = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(CdlmError, match=said) as caught:
        launched(environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "options", "found"),
    [
        ({}, {}, (0, 1)),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, {"devices": 2}, (1, 2)),
        (
            {"NODE_RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "9"},
            {"devices": 2, "num_nodes": 2},
            (3, 4),
        ),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}, {"devices": 2, "num_nodes": 2}, (3, 4)),
        (SRUN, {"devices": 2, "num_nodes": 2}, (3, 4)),
        ({}, {"num_nodes": 2}, "not started as one of several machines"),
        (TORCHRUN, {}, "4 processes were started, 2 on each machine"),
        (TORCHRUN, {"devices": 1, "num_nodes": 4}, "4 processes were started, 2 on each machine"),
        (SRUN, {"devices": 2}, "4 processes were started"),
        ({"NODE_RANK": "1"}, {}, "NODE_RANK is 1"),
        ({**TORCHRUN, "NODE_RANK": "0"}, {"devices": 2, "num_nodes": 2}, "RANK is 3 in the environment, expected 1"),
    ],
)
def test_a_training_has_the_processes_that_were_started_or_none(
    environ: dict[str, str], options: dict[str, Any], found: tuple[int, int] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    if isinstance(found, tuple):
        assert rank_and_world(TrainOptions(**options)) == found
        return
    with pytest.raises(CdlmError, match=found) as caught:
        rank_and_world(TrainOptions(**options))
    assert "\n" not in str(caught.value)


def test_what_launched_processes_cannot_do_is_refused_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CdlmError, match="the work of one process, and 4 were started"):
        DeviceOptions("cpu").ready()
    with pytest.raises(CdlmError, match="leave out --devices 2"):
        MachineOptions("cpu", devices=2).ready()


def test_processes_that_do_not_come_are_not_waited_for_without_end() -> None:
    with pytest.raises(CdlmError, match="2 processes of this command could not meet") as caught:
        join(Place(0, 2, 0, 1, "127.0.0.1", free_port()), seconds=0.2)
    assert "\n" not in str(caught.value)


GROUP = """
    import os, signal, sys
    from cdlm.core.errors import CdlmError
    from cdlm.core.parallel import LaunchedWorkers, deal
    from cdlm.core.ranks import Place, join, serve

    def opened(device):
        return [device, os.getpid(), 0]

    def squares(model, share):
        model[2] += 1
        return [x * x for x in share], *model

    def refuses(model, share):
        if 2 in share:
            raise CdlmError("two is too much")
        return share

    def fails(model, share):
        return 1 // (1 - share[0])

    def dies(model, share):
        if model != "here":
            os.kill(os.getpid(), signal.SIGKILL)

    def error_of(work):
        try:
            workers.map(work, "here", shares)
        except (CdlmError, RuntimeError) as error:
            return str(error)

    port = int(sys.argv[1])
    for rank in (1, 2):
        if os.fork() == 0:
            serve(join(Place(rank, 3, rank, 3, "127.0.0.1", port), 60), f"device {rank}")
            os._exit(0)
    group = join(Place(0, 3, 0, 3, "127.0.0.1", port), 60)
    shares = deal(range(5), len(group))
    with LaunchedWorkers(opened, group) as workers:
        told = [workers.map(squares, ["here", 0, 0], shares) for _ in range(2)]
        errors = [error_of(refuses), error_of(fails), error_of(lambda model, share: share)]
        told += [workers.map(squares, ["here", 0, 0], shares[:2])]
    with LaunchedWorkers(opened, group) as workers:
        told += [workers.map(squares, ["here", 0, 0], shares[:2])]
        errors += [error_of(dies), error_of(squares)]
    group.close()
    statuses = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)]
    print([group.machines, told, errors, sorted(statuses)])
"""


def test_work_is_shared_and_an_error_anywhere_ends_it_in_one_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(GROUP))
    command = [sys.executable, str(script), str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    machines, told, (refused, failed, lost, ended, closed), statuses = ast.literal_eval(done.stdout)
    assert machines == 1
    first, second, after, anew = told
    assert [share[0] for share in first] == [[0, 9], [1, 16], [4]]
    assert [share[1] for share in first] == ["here", "device 1", "device 2"]
    processes = {share[2] for share in first[1:]}
    assert len(processes) == 2
    assert {share[2] for share in second[1:]} == processes
    assert [[share[3] for share in shares[1:]] for shares in (first, second, after)] == [[1, 1], [2, 2], [3]]
    assert anew[1][3] == 1  # opened again by the next workers
    assert refused == "two is too much"
    assert failed.startswith("process 1 failed:\nTraceback")
    assert "ZeroDivisionError" in failed
    assert lost.startswith("other processes cannot be given this work")
    assert ended.startswith("process 1 of 3 ended before its work was done")
    assert closed == "the session was closed and its processes have ended: open another"
    assert statuses[0] == -9
    assert all("\n" not in line for line in (refused, lost, ended, closed))
