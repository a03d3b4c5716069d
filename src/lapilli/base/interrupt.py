"""SIGINT, SIGTERM and SIGUSR1 as a wish to stop: what is under way is finished and saved, so that it can go on.

SIGUSR1 is what batch systems are asked to send some minutes before they end a job. A second SIGINT stops at once, for a
user who does not want to wait.
"""

import signal
import threading
from types import FrameType, TracebackType

WISHES = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask for an orderly stop. A command that obeyed one ends with status 128 + its number: 130, 143, 138."""


class StopWish:
    """While entered, remembers that the process was asked to stop; elsewhere than in the main thread, does nothing.

    With `for_good`, a process that was asked to stop hears no more SIGTERM and SIGUSR1 afterwards: it is about to end
    with a status that says so, and where others were asked too, their stop may come before its own signal does.
    """

    def __init__(self, *, for_good: bool = False) -> None:
        self.signal: str | None = None
        self._for_good = for_good
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopWish":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in WISHES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            deaf = self._for_good and self.signal is not None and number != signal.SIGINT
            signal.signal(number, _ignore if deaf else handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number).name


def _ignore(number: int, frame: FrameType | None) -> None:
    """Unlike SIG_IGN, it is not handed on to programs that this process starts."""
