"""What comes back from elsewhere, piece by piece, once it was checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one answer; `finish` (stop, length) comes with its last one."""

    index: int
    text: str = ""
    thought: str = ""
    logprobs: tuple[dict[str, Any], ...] = ()
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt and of all answers, as the other server counts them."""

    prompt: int
    written: int
