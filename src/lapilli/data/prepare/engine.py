"""Who carries out a preparation: processes of this machine, or the workers of a Ray cluster.

Both are given chunks of records and return finished shards; what is in a shard does not depend on them. On a cluster
sources and output folder must lie where every node sees them under the same path, and lapilli must be installed there.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Literal

from lapilli.base.errors import DataError, RunError
from lapilli.data.prepare.work import Job, Part, make_shard
from lapilli.data.read.record import RawRecord

Engine = Literal["local", "ray"]
Records = Sequence[tuple[int, RawRecord]]
Submit = Callable[[int, Records], Future[Part]]

PARENT_SECONDS = 0.5
"""How often a worker looks whether its parent still lives."""
CONNECT_SECONDS = 10.0
LOST = "start again: what is finished is kept"


def make_parts(
    job: Job, chunks: Iterable[tuple[int, Records]], engine: Engine, processes: int, address: str | None
) -> Iterator[tuple[Part, bool]]:
    """Every shard in order, and whether it was there already.

    `processes` are those of this machine (below 2: this one), or the tasks that a Ray cluster has at a time; `address`
    is the cluster's (None: one that is started here for the while). Raises DataError if a worker is lost, RunError
    without Ray.
    """
    if engine == "local" and processes < 2:
        for number, chunk in chunks:
            done = Part.load(job.out, number)
            yield (make_shard(job, number, chunk), False) if done is None else (done, True)
        return
    with _local(job, processes) if engine == "local" else _ray(job, processes, address) as submit:
        waiting: deque[Future[Part] | Part] = deque()
        for number, chunk in chunks:
            waiting.append(Part.load(job.out, number) or submit(number, chunk))
            if len(waiting) > 2 * processes:  # so that memory does not grow with the file
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(waiting: Future[Part] | Part) -> tuple[Part, bool]:
    return (waiting, True) if isinstance(waiting, Part) else (waiting.result(), False)


@contextmanager
def _local(job: Job, processes: int) -> Iterator[Submit]:
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _Worker.start, (job, os.getpid())) as pool:
        try:
            yield lambda number, records: pool.submit(_Worker.make, number, records)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that prepared the data was killed, probably for want of memory; give fewer --processes and "
                f"{LOST}"
            ) from error


class _Worker:
    """What a forked process inherits."""

    job: Job

    @classmethod
    def start(cls, job: Job, parent: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        cls.job = job
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()

    @classmethod
    def make(cls, number: int, records: Records) -> Part:
        return make_shard(cls.job, number, records)


def _end_with_parent(parent: int) -> None:
    """End this worker when the process that started it is gone: a killed one leaves its workers waiting for ever."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


@contextmanager
def _ray(job: Job, processes: int, address: str | None) -> Iterator[Submit]:
    if importlib.util.find_spec("ray") is None:
        raise RunError('--engine ray needs Ray: pip install "lapilli[ray]"')
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        if address is None:
            ray.init(num_cpus=processes, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            _refuse_silence(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"--address {address}: no Ray cluster answers there ({str(error).splitlines()[0]})") from error
    try:
        held: Any = ray.put(job)
        make: Any = ray.remote(num_cpus=1)(_make_there)
        yield lambda number, records: make.remote(held, number, records).future()
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, DataError) else DataError(f"a Ray task failed ({error}); {LOST}")) from error
    except RayError as error:
        raise DataError(f"the Ray cluster lost a task ({str(error).splitlines()[0]}); {LOST}") from error
    finally:
        ray.shutdown()


def _refuse_silence(address: str) -> None:
    """Raise OSError if nothing listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _make_there(job: Job, number: int, records: Records) -> Part:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return make_shard(job, number, records)
