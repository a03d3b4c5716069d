"""Threads that read requests: pictures are decoded, and fetched, beside the event loop and not in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Made = TypeVar("Made")

SWITCH_SECONDS = 1e-4
"""How long a thread may keep the interpreter while another wants it: Python's 5 ms are more than a request takes."""
_READERS = 4
"""Requests whose pictures are decoded at a time."""
_FETCHERS = 8
"""Requests whose pictures are fetched at a time: they may be slow, and others must not wait for them."""


class ReadingThreads:
    """Four that decode, eight that fetch first."""

    def __init__(self) -> None:
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetcher")

    async def run(self, fetches: bool, function: Callable[..., Made], *given: object) -> Made:
        """What a function makes, in a thread; `fetches`: it may wait for the network."""
        place = self._fetchers if fetches else self._readers
        return await asyncio.get_running_loop().run_in_executor(place, function, *given)

    def close(self) -> None:
        """Take nothing more, and wait for nothing."""
        for pool in (self._readers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)
