"""Work on records shared among forked processes, results in order, memory bounded.

Readers, encoders and settings are inherited, not sent. A worker ends with the process that started it, also when that
one is killed; and a worker that is killed is an error, not a wait for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from lapilli.base.errors import DataError

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

PARENT_SECONDS = 0.5
"""How often a worker looks whether its parent still lives."""


def shared(work: Callable[[S, T], R], state: S, items: Iterable[T], processes: int, killed_remedy: str) -> Iterator[R]:
    """`work(state, item)` for every item, in order: here if `processes` is below 2, else in that many forked ones.

    `work` is a function of a module. Raises DataError, ending with `killed_remedy`, if a process is killed.
    """
    if processes < 2:
        for item in items:
            yield work(state, item)
        return
    with forked(state, processes, killed_remedy) as submit:
        yield from in_order((submit(work, item) for item in items), 2 * processes)


@contextmanager
def forked(state: Any, processes: int, killed_remedy: str) -> Iterator[Callable[[Callable[[Any, T], R], T], Future[R]]]:
    """A pool that has inherited `state`: yields what runs `work(state, item)` in it. Raises DataError as `shared`."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _Worker.start, (state, os.getpid())) as pool:
        try:
            yield lambda work, item: pool.submit(_Worker.run, work, item)
        except BrokenProcessPool as error:
            raise DataError(f"a worker process was killed, probably for want of memory; {killed_remedy}") from error


def in_order(futures: Iterable[Future[R]], ahead: int) -> Iterator[R]:
    """The results of futures in order; no more than `ahead` are asked for before the first of them is taken."""
    waiting: deque[Future[R]] = deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Worker:
    """What a forked process inherits."""

    state: Any

    @classmethod
    def start(cls, state: Any, parent: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        cls.state = state
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()

    @classmethod
    def run(cls, work: Callable[[Any, T], R], item: T) -> R:
        return work(cls.state, item)


def _end_with_parent(parent: int) -> None:
    """A killed parent would leave its workers waiting for ever."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)
