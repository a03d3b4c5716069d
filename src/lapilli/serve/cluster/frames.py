"""What travels in LLaVA's cluster protocol: JSON objects, each ended by a zero byte, and what their codes mean."""

from __future__ import annotations

import json

END = b"\0"
OK, WORKER_FAILED, NO_WORKER, WORKER_GONE = range(4)
"""`error_code`: the text is an answer; the worker could not make it; nobody serves the model; the worker is gone."""

HEARTBEAT_SECONDS = 15.0
"""How often a worker says that it is there."""
EXPIRY_SECONDS = 30.0
"""A worker that said nothing for so long is forgotten."""


def frame(text: str, code: int = OK) -> bytes:
    """One object of a stream. The text is all of it so far, the prompt included, not what is new."""
    return json.dumps({"text": text, "error_code": code}).encode() + END
