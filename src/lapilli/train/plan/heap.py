"""How large the C library's heap grows when blocks come and go in a given order.

On the CPU a training process keeps the memory that it frees (`train.device.cpu`), and what it holds at its worst is not
what is alive: freed blocks lie between living ones. glibc asks for more room than an aligned block needs, so that a
hole left by a block can't take another of its size unless its neighbour is free too; and the slivers around aligned
blocks go to small objects, as tensors and nodes of the autograd graph, that keep such neighbours apart for as long as
the block lives that they were made with. That adds a third to what is alive, or doubles it, depending on the order of
every step; so the order is played through.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

_ALIGN = 64
"""What PyTorch asks for."""
_HEADER = 8
_GRAIN = 16
_SMALLEST = 32
_SLIVER = 1032
"""Up to this size glibc keeps freed pieces for small objects."""
BESIDE = 1.165
"""What a heap holds beyond the blocks that are played: small objects and buffers inside operations. The one number
here that was fitted: to four runs of a 25M model (benchmarks/plan.py)."""


class Heap:
    """Best fit with coalescing, growing at its end, never shrinking: glibc's malloc for one thread."""

    def __init__(self) -> None:
        self.top = 0
        """Where the unused end begins; `high` is the farthest it has been."""
        self.high = 0
        self._free: list[tuple[int, int]] = []
        """(size, start), sorted."""
        self._by_start: dict[int, int] = {}
        self._by_end: dict[int, int] = {}
        self._blocks: dict[Hashable, tuple[int, int]] = {}
        self._slivers: list[tuple[int, int]] = []
        """Left since the last block; the next one's small objects take them."""
        self._beside: dict[Hashable, list[tuple[int, int]]] = {}

    def take(self, key: Hashable, size: int) -> None:
        """Allocate an aligned block under a name."""
        if self._slivers:
            self._beside[key], self._slivers = self._slivers, []
        need = max(_SMALLEST, -(-(size + _HEADER) // _GRAIN) * _GRAIN)
        start, room = self._chunk(need + _ALIGN + _SMALLEST)
        lead = -(start + 2 * _HEADER) % _ALIGN
        if 0 < lead < _SMALLEST:
            lead += _ALIGN
        rest = room - lead - need
        if lead:
            self._leave(start, lead)
        if rest >= _SMALLEST:
            self._leave(start + lead + need, rest)
            rest = 0
        self._blocks[key] = (start + lead, need + rest)

    def free(self, key: Hashable) -> None:
        """Give a block back; one that is not known is ignored."""
        block = self._blocks.pop(key, None)
        if block is not None:
            self._release(*block)
        for sliver in self._beside.pop(key, ()):
            self._release(*sliver)

    def _leave(self, start: int, size: int) -> None:
        if size <= _SLIVER:
            self._slivers.append((start, size))
        else:
            self._release(start, size)

    def _chunk(self, need: int) -> tuple[int, int]:
        place = bisect_left(self._free, (need, -1))
        if place < len(self._free):
            size, start = self._free.pop(place)
            del self._by_start[start], self._by_end[start + size]
            if size - need >= _SMALLEST:
                self._insert(start + need, size - need)
                size = need
            return start, size
        start = self.top
        self.top += need
        self.high = max(self.high, self.top)
        return start, need

    def _release(self, start: int, size: int) -> None:
        before = self._by_end.get(start)
        if before is not None:
            size += start - before
            self._remove(before)
            start = before
        after = self._by_start.get(start + size)
        if after is not None:
            self._remove(start + size)
            size += after
        if start + size == self.top:
            self.top = start
        else:
            self._insert(start, size)

    def _insert(self, start: int, size: int) -> None:
        insort(self._free, (size, start))
        self._by_start[start], self._by_end[start + size] = size, start

    def _remove(self, start: int) -> None:
        size = self._by_start.pop(start)
        del self._by_end[start + size]
        del self._free[bisect_left(self._free, (size, start))]
