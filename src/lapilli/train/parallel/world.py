"""The processes of a run: how many there are, which one this is, and what they tell each other.

torchrun's variables and SLURM's say how a run was started, without a flag. What the processes agree on beside gradients
(the samples of a step, wishes to stop, errors) goes through one exchange, as JSON: whoever fails says so in the place
of its answer, so that an error of one process is an error of all of them, and nobody waits for one that is gone.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from lapilli.base.errors import LapilliError, RunError
from lapilli.train.device.choose import back_ends

CONNECTING = timedelta(minutes=30)
"""How long processes wait for each other at the start, and for the others' gradients."""
WAITING = timedelta(days=1)
"""How long one waits for what another does alone: an index, a checkpoint. One that ends is noticed at once, because
its connection is closed."""
_MESSAGE_BYTES = 1024
"""What an exchange carries in one round; longer messages take a second one."""
_LENGTH_BYTES = 8
_GLANCE_SECONDS = 0.2
"""How often a process that waits for others does what it was told to do meanwhile."""
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections."""


class EndedElsewhere(RunError):
    """Another process of the run stopped with an error, whose first line this one repeats."""


class ProcessLost(RunError):
    """Another process of the run is gone, so that nothing more can be agreed with it."""


@dataclass(frozen=True)
class Launch:
    """How a process was started: number `rank` of `size`, `local_rank` on its machine; rank 0 listens at `address`."""

    rank: int
    size: int
    local_rank: int
    address: str


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """Return what torchrun's or SLURM's variables say; None for a process that was started alone.

    SLURM sets most of its variables in a batch script too, where one process runs; only what srun starts counts. Raises
    RunError, naming them, for variables that are incomplete or no numbers.
    """
    if "WORLD_SIZE" in environment:
        absent = [name for name in _TORCHRUN if name not in environment]
        size = _number(environment, "WORLD_SIZE")
        if size == 1:
            return None
        if absent:
            raise RunError(f"WORLD_SIZE is {size}, but {', '.join(absent)} not set; start with torchrun, or set them")
        rank = _number(environment, "RANK")
        local = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else 0
        address = f"{environment['MASTER_ADDR']}:{_number(environment, 'MASTER_PORT')}"
        return _checked(Launch(rank, size, local, address))
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        size = _number(environment, tasks)
        if size == 1:
            return None
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        host = environment.get("MASTER_ADDR") or first_host(nodes)
        if not host:
            raise RunError("SLURM_JOB_NODELIST is not set, so that rank 0 is not known; set MASTER_ADDR")
        port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else _port(environment)
        local = _number(environment, "SLURM_LOCALID")
        return _checked(Launch(_number(environment, "SLURM_PROCID"), size, local, f"{host}:{port}"))
    return None


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `rack1-07` of `rack1-[07-09,12],rack2-[01-04]`."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert head is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head.group())


def _port(environment: Mapping[str, str]) -> int:
    # The same for all processes of a job step, and another one for most other steps of the same machine.
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    return _PORTS[(job * 7 + step) % len(_PORTS)]


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError) as error:
        raise RunError(f"{name} is {environment.get(name, 'not set')}; a process of a run needs its number") from error


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.size:
        raise RunError(f"this process is number {launch.rank} of {launch.size}; numbers begin with 0")
    return launch


class World:
    """All processes of a run, as one of them sees them; by itself, one process alone.

    Every method is called by all of them, in the same order.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, control: dist.ProcessGroup | None = None
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._control = control
        self.severed = False
        """Whether this process left the others in the middle of a pass, so that they can't be told anything."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def exchange(self, value: Any, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        """Return the `value` that each process gave, by rank; values are what JSON holds.

        `meanwhile` is called a few times a second while the others are waited for. Raises EndedElsewhere if one of them
        failed instead, and ProcessLost if one is gone or not in a state to go on.
        """
        if self.size == 1:
            return [value]
        messages = self._messages({"value": value}, meanwhile)
        failed = [(rank, message) for rank, message in enumerate(messages) if "error" in message]
        if failed:
            rank, message = failed[0]
            kind = EndedElsewhere if message["orderly"] else ProcessLost
            raise kind(f"process {self.rank} of {self.size} ends, because process {rank} did: {message['error']}")
        return [message["value"] for message in messages]

    def together(self) -> AbstractContextManager[None]:
        """An error inside becomes one of all processes: the others meet it in the exchange that they are in, or next.

        Only for work between whose exchanges nothing else is sent.
        """
        return _Together(self)

    def tell(self, error: Exception) -> None:
        """Let the others' exchange fail with the first line of this error."""
        if self.size > 1:
            orderly = isinstance(error, LapilliError)
            lines = str(error).splitlines() or [""]
            said = lines[0] if orderly else f"{type(error).__name__}: {lines[0]}"
            self._messages({"error": said, "orderly": orderly})

    def from_first(self, work: Callable[[], Any], meanwhile: Callable[[], None] | None = None) -> Any:
        """Have the first process do `work` while the others wait; return its result, which JSON holds, to all.

        Inside `together`, so that its errors end the others too. `meanwhile` as in `exchange`, for those that wait.
        """
        return self.exchange(work() if self.first else None, None if self.first else meanwhile)[0]

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor, in place, by the sum over all processes. Raises ProcessLost."""
        for tensor in tensors if self.size > 1 else ():
            with self._reaching():
                dist.all_reduce(tensor)

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor, in place, by that of the first process. Raises ProcessLost."""
        for tensor in tensors if self.size > 1 else ():
            with self._reaching():
                dist.broadcast(tensor, 0)

    def bytes_of_all(self, tensor: torch.Tensor, meanwhile: Callable[[], None] | None = None) -> list[torch.Tensor]:
        """Return the tensor of every process, by rank: uint8 (n,) on the CPU, n the same for all."""
        if self.size == 1:
            return [tensor]
        received = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._reaching():
            sent = dist.all_gather(received, tensor.contiguous(), group=self._control, async_op=True)
            assert sent is not None
            while meanwhile is not None and not sent.is_completed():
                meanwhile()
                time.sleep(_GLANCE_SECONDS)
            sent.wait()
        return received

    def _messages(self, content: dict[str, Any], meanwhile: Callable[[], None] | None = None) -> list[dict[str, Any]]:
        text = json.dumps(content).encode()
        head = len(text).to_bytes(_LENGTH_BYTES, "little") + text[: _MESSAGE_BYTES - _LENGTH_BYTES]
        texts, lengths = [], []
        for received in self.bytes_of_all(_padded(head, _MESSAGE_BYTES), meanwhile):
            whole = received.numpy().tobytes()
            lengths.append(int.from_bytes(whole[:_LENGTH_BYTES], "little"))
            texts.append(whole[_LENGTH_BYTES:])
        longest = max(lengths)
        if longest > _MESSAGE_BYTES - _LENGTH_BYTES:
            texts = [received.numpy().tobytes() for received in self.bytes_of_all(_padded(text, longest))]
        return [json.loads(text[:length]) for text, length in zip(texts, lengths, strict=True)]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises for closed connections and time-outs
            raise ProcessLost(
                f"process {self.rank} of {self.size}: another process of this run is gone or does not answer; its own "
                f"last words, or the launcher's, say why ({str(error).splitlines()[0]})"
            ) from error


class _Together:
    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        known = isinstance(error, EndedElsewhere | ProcessLost)
        if isinstance(error, Exception) and not known and not self._world.severed:
            self._world.tell(error)


def _padded(content: bytes, size: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)


ALONE = World()
"""A process without others."""


def _store(launch: Launch, environment: Mapping[str, str]) -> dist.Store:
    """Where the processes find each other's addresses, at the address of the first one.

    torchrun listens there itself, for longer than one start: after a restart it still has the addresses of processes
    that are gone, so that every start needs names of its own.
    """
    launcher_listens = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, _, port = launch.address.rpartition(":")
    store = dist.TCPStore(
        host,
        int(port),
        launch.size,
        is_master=launch.rank == 0 and not launcher_listens,
        timeout=CONNECTING,
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"start-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def open_world(environment: Mapping[str, str] | None = None) -> Iterator[World]:
    """Connect with the other processes of the run, if there are any; they are left at the end.

    Raises RunError if they can't be reached.
    """
    environment = os.environ if environment is None else environment
    launch = read_launch(environment)
    if launch is None:
        yield ALONE
        return
    backend = back_ends(launch.local_rank)
    try:
        dist.init_process_group(
            backend, store=_store(launch, environment), rank=launch.rank, world_size=launch.size, timeout=CONNECTING
        )
        control = dist.new_group(backend="gloo", timeout=WAITING)
        assert isinstance(control, dist.ProcessGroup)  # a number only for processes that are not in it
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"process {launch.rank} of {launch.size} can't reach the others at {launch.address}: {error}"
        ) from error
    try:
        yield World(launch.rank, launch.size, launch.local_rank, control)
    finally:
        dist.destroy_process_group()
