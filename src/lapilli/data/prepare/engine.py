"""Who carries out a preparation: processes of this machine, or the workers of a Ray cluster.

Both are given chunks of records and return finished shards; what is in a shard does not depend on them. On a cluster
sources and output folder must lie where every node sees them under the same path, and lapilli must be installed there.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Literal

from lapilli.base.errors import DataError, RunError
from lapilli.data.prepare.work import Job, Part, make_shard
from lapilli.data.read.record import RawRecord
from lapilli.data.workers import forked, in_order

Engine = Literal["local", "ray"]
Records = Sequence[tuple[int, RawRecord]]
Submit = Callable[[int, Records], Future[Part]]

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
        there: set[int] = set()

        def asked_for() -> Iterator[Future[Part]]:
            for number, chunk in chunks:
                done = Part.load(job.out, number)
                if done is None:
                    yield submit(number, chunk)
                    continue
                there.add(number)
                future: Future[Part] = Future()
                future.set_result(done)
                yield future

        for part in in_order(asked_for(), 2 * processes):
            yield part, part.number in there


@contextmanager
def _local(job: Job, processes: int) -> Iterator[Submit]:
    with forked(job, processes, f"give fewer --processes and {LOST}") as submit:
        yield lambda number, records: submit(_make_here, (number, records))


def _make_here(job: Job, numbered: tuple[int, Records]) -> Part:
    return make_shard(job, *numbered)


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
            refuse_silence(address)
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


def refuse_silence(address: str) -> None:
    """Raise OSError if nothing listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _make_there(job: Job, number: int, records: Records) -> Part:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return make_shard(job, number, records)
