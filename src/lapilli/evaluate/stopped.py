"""The user's wish to end an evaluation, as an error that tells the command how to end."""

from __future__ import annotations

from lapilli.base.errors import RunError


class Stopped(RunError):
    """The user asked the evaluation to stop; `signal` names how."""

    def __init__(self, message: str, signal: str) -> None:
        super().__init__(message)
        self.signal = signal
