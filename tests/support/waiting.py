"""Waiting for what another thread or process is about to do."""

import time
from collections.abc import Callable


def until(true: Callable[[], object], seconds: float = 20.0) -> float:
    """Seconds until something holds; fails if it does not within `seconds`."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, f"did not happen within {seconds:g} s"
        time.sleep(0.02)
    return time.monotonic() - begun
