"""Wishes to stop that all processes of a run must learn of at the same place, while something long is under way.

Where all of them work, they ask each other every few seconds' worth of it. Where the first one works and the others
wait, one that is asked to stop leaves a note in the store of the processes' addresses, which the first one reads.
"""

import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lapilli.base.interrupt import StopWish
from lapilli.train.parallel.world import World

AGREE_SECONDS = 2.0
"""About how long the processes work before they ask each other."""
_MOST_PIECES = 16
"""They ask at least as often as this, as what comes next may take longer than what was."""
_READ_SECONDS = 0.5
_NOTE = "lapilli/asked-to-stop"


class AskedTogether:
    """Whether any process was asked to stop: known to all after the same piece of work."""

    def __init__(self, world: World, wish: StopWish) -> None:
        self._world, self._wish = world, wish
        self._every, self._since, self._began = 1, 0, time.monotonic()

    def after_a_piece(self) -> bool:
        """True, in all processes, once one of them was asked to stop; all call it after each piece of work."""
        if self._world.size == 1:
            return self._wish.signal is not None
        self._since += 1
        if self._since < self._every:
            return False
        shares = self._world.exchange([self._wish.signal, time.monotonic() - self._began])
        seconds = max(share[1] for share in shares) / self._since
        self._every = max(1, min(_MOST_PIECES, int(AGREE_SECONDS / max(seconds, 1e-6))))
        self._since, self._began = 0, time.monotonic()
        return any(share[0] for share in shares)


def agree(world: World, wish: StopWish) -> None:
    """Give every process the same signal, which is their exit status, if any has one. All call it."""
    signals = [signal for signal in world.exchange(wish.signal) if signal]
    wish.signal = signals[0] if signals else None


class AskedWhileWaiting:
    """Lets the first process hear, at its work, that one of those which wait for it was asked to stop."""

    def __init__(self, world: World, wish: StopWish) -> None:
        self._world, self._wish = world, wish
        self._told, self._heard = False, False
        self._read_at = time.monotonic()

    def tell(self) -> None:
        """What a waiting process does meanwhile. Whoever keeps the notes may be gone: the wait ends with that."""
        if self._wish.signal is None or self._told:
            return
        self._told = True
        try:
            _get_default_store().set(_NOTE, self._wish.signal)
        except dist.DistError:
            return

    def heard(self) -> bool:
        """Whether this process, or one that waits for it, was asked to stop."""
        if self._wish.signal is not None or self._heard:
            return True
        if self._world.size > 1 and time.monotonic() - self._read_at > _READ_SECONDS:
            self._heard = _get_default_store().check([_NOTE])
            self._read_at = time.monotonic()
        return self._heard

    def forget(self) -> None:
        """Remove the note. The first process calls it, when none waits any more."""
        if self._world.size > 1 and _get_default_store().check([_NOTE]):
            _get_default_store().delete_key(_NOTE)
