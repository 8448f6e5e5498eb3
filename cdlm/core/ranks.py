"""Processes that a launcher (torchrun, srun) has started, on one machine or several: who they are, and how the first
one gives work to the others.

The first process runs the command. The others serve: each takes a piece of work, does it with what it has opened, and
sends back the result, until the first one says goodbye. They meet at torch's store, where the first one leaves its port
and a fresh key; then they talk over connections that ask for that key, because messages are pickled and would run code.
Collectives of gloo are not used: they cannot be interrupted, and to send waits until the other side receives.
"""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING, Any

from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch._C._distributed_c10d import Store

JOIN_SECONDS = 600.0
"""How long processes wait for each other when a command starts."""
_GOODBYE = b""


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that a launcher has started.

    Args:
        rank: its number among all.
        size: how many there are, at least two.
        local: its number on its machine.
        each: how many there are on each machine; None where the launcher does not say.
        address: machine of the first one.
        port: where that one listens first.
    """

    rank: int
    size: int
    local: int
    each: int | None
    address: str
    port: int

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local < self.size and 0 <= self.port < 2**16):
            raise CdlmError(
                f"the environment says that this is process {self.rank} of {self.size}, number {self.local} of its"
                f" machine, at port {self.port}, which cannot be: start it with torchrun or srun"
            )


def launched(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place of this process by the variables of torchrun, or of a step of SLURM; None if it is the only one.

    Raises:
        CdlmError: a variable is missing or is no number.
    """
    if {"RANK", "WORLD_SIZE"} <= environ.keys():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_STEP_ID" in environ and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    else:
        return None
    rank, size, local = (number_in(environ, name, 0) for name in names[:3])
    if size <= 1:
        return None
    each = number_in(environ, names[3], 0) or None
    if "MASTER_ADDR" in environ or not names[0].startswith("SLURM"):
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise CdlmError(
                f"{names[0]} says that this is one process of {size}, and {' and '.join(missing)} not where they meet:"
                " start them with torchrun or srun, or set the variables"
            )
        return Place(rank, size, local, each, environ["MASTER_ADDR"], number_in(environ, "MASTER_PORT", 0))
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "127.0.0.1"))
    port = 15000 + number_in(environ, "SLURM_JOB_ID", 0) % 10_000  # as Lightning has it
    return Place(rank, size, local, each, SLURMEnvironment.resolve_root_node_address(nodes), port)


def number_in(environ: Mapping[str, str], name: str, default: int) -> int:
    """A variable of the environment that is a whole number >= 0."""
    text = environ.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise CdlmError(f"the variable {name} is {shown(text)} in the environment, expected a whole number >= 0")
    return int(text)


class Group:
    """All processes of a command, as the first one sees them.

    Args:
        peers: a connection to each of the others.
        machines: on how many machines all of them are.
    """

    def __init__(self, peers: list[Connection], machines: int):
        self.peers, self.machines, self._opened = peers, machines, 0

    def __len__(self) -> int:
        return len(self.peers) + 1

    def number(self) -> int:
        """A new number for something that the others open."""
        self._opened += 1
        return self._opened

    def give(self, peer: int, message: bytes) -> None:
        """Send a piece of work."""
        with self._speaking(peer):
            self.peers[peer].send_bytes(message)

    def gather(self, peers: int) -> list[Any]:
        """The results of the first of the others, in their order; all are waited for before an error is raised.

        Raises:
            CdlmError: that of the work, or a process has ended.
            RuntimeError: the work failed in another way; has the traceback.
        """
        answers = [self._answer(peer) for peer in range(peers)]
        for peer, (kind, value) in enumerate(answers, 1):
            if kind == "refused":
                raise CdlmError(value)
            if kind == "failed":
                raise RuntimeError(f"process {peer} failed:\n{value}")
        return [value for _, value in answers]

    def _answer(self, peer: int) -> tuple[str, Any]:
        with self._speaking(peer):
            return pickle.loads(self.peers[peer].recv_bytes())  # a process of this command: it knew the key

    @contextmanager
    def _speaking(self, peer: int) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            self.drop()
            raise CdlmError(
                f"process {peer + 1} of {len(self)} ended before its work was done, perhaps for lack of memory: what it"
                " said stands in its own output"
            ) from error

    @property
    def open(self) -> bool:
        """Whether the others can be given work."""
        return bool(self.peers) and not any(peer.closed for peer in self.peers)

    def forget(self, number: int) -> None:
        """Let the others forget what they have opened under a number."""
        for peer in self.peers if self.open else ():
            with suppress(OSError):
                peer.send_bytes(str(number).encode())

    def drop(self) -> None:
        """Hang up; the others end at once, with an error."""
        for peer in self.peers:
            peer.close()

    def close(self) -> None:
        """Say goodbye; the others end well."""
        if self.open:
            for peer in self.peers:
                with suppress(OSError):
                    peer.send_bytes(_GOODBYE)
        self.drop()


def join(place: Place, seconds: float = JOIN_SECONDS) -> Group | Connection:
    """The group for the first process, and the connection to that one for each of the others.

    Args:
        seconds: how long to wait for the others.

    Raises:
        CdlmError: not all have come.
    """
    from torch.distributed import DistError

    try:
        store = _store(place, seconds)
        return _lead(place, store) if place.rank == 0 else _follow(place, store)
    except (DistError, OSError, EOFError, ValueError) as error:
        raise CdlmError(
            f"the {place.size} processes of this command could not meet at {place.address}:{place.port} within"
            f" {seconds:g} s ({first_line(error)}): see that all were started, with the same command, and that the"
            " machines reach each other"
        ) from error


def _store(place: Place, seconds: float) -> Store:
    from torch.distributed.rendezvous import rendezvous

    url = f"tcp://{place.address}:{place.port}?rank={place.rank}&world_size={place.size}"
    return next(iter(rendezvous(url, timeout=timedelta(seconds=seconds))))[0]


def _lead(place: Place, store: Store) -> Group:
    key = secrets.token_hex(32)
    with Listener((place.address, 0), backlog=place.size, authkey=key.encode()) as listener:
        store.set("cdlm", f"{listener.address[1]} {key}")
        store.wait([f"cdlm {rank}" for rank in range(1, place.size)])
        found: dict[int, tuple[Connection, str]] = {}
        while len(found) < place.size - 1:
            connection = listener.accept()
            rank, host = connection.recv_bytes().decode().split()
            _keep_alive(connection)
            found[int(rank)] = connection, host
    hosts = {socket.gethostname(), *(host for _, host in found.values())}
    return Group([found[rank][0] for rank in range(1, place.size)], len(hosts))


def _follow(place: Place, store: Store) -> Connection:
    port, key = store.get("cdlm").decode().split()
    store.set(f"cdlm {place.rank}", "")
    connection = Client((place.address, int(port)), authkey=key.encode())
    connection.send_bytes(f"{place.rank} {socket.gethostname()}".encode())
    _keep_alive(connection)
    return connection


def _keep_alive(connection: Connection) -> None:
    """Let the system notice within minutes that the other machine is gone."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 8)):
            if hasattr(socket, name):  # not on every system
                same.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def serve(connection: Connection, device: str) -> None:
    """Do what the first process asks for, until it says goodbye.

    Args:
        device: where what it asks for is opened, once.

    Raises:
        SystemExit: the first process has ended without a goodbye.
    """
    opened: dict[int, Any] = {}
    while message := _next(connection):
        if message.isdigit():
            opened.pop(int(message), None)
            continue
        with _ending_with(connection):
            answer = pickle.dumps(_answer(opened, device, message))
        with suppress(OSError):  # the next message will not come either
            connection.send_bytes(answer)


def _next(connection: Connection) -> bytes:
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        raise SystemExit(2) from None


def _answer(opened: dict[int, Any], device: str, message: bytes) -> tuple[str, Any]:
    try:
        number, open_, work, share = pickle.loads(message)  # of the first process: it knew the key
        if number not in opened:
            opened[number] = open_(device)
        return "done", work(opened[number], share)
    except CdlmError as error:
        return "refused", str(error)
    except Exception:  # whatever it is: the first process, which waits, raises it
        return "failed", traceback.format_exc()


@contextmanager
def _ending_with(connection: Connection) -> Iterator[None]:
    """End this process, in the midst of its work, when the first one does."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            if connection.poll():  # nothing is sent to those who work: it has hung up
                os._exit(2)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def message(number: int, open_: Callable[[str], Any], work: object, share: object) -> bytes:
    """A piece of work, as it travels.

    Raises:
        CdlmError: it cannot travel.
    """
    try:
        return pickle.dumps((number, open_, work, share))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise cannot_travel(error) from error


def cannot_travel(error: Exception) -> CdlmError:
    """What to say of work that is no plain data and no function of a module."""
    return CdlmError(
        f"other processes cannot be given this work ({first_line(error)}): define rules at the top of a module, or use"
        " one device"
    )


def is_lost(error: RuntimeError) -> bool:
    """Whether torch says that another process of a training has ended or does not answer."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error) or "NCCL" in str(error)
