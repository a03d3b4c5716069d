"""What server and models' process say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lapilli.generate.decoding import Decoding
from lapilli.serve.passing import Numbered, Packed
from lapilli.serve.settings import Limits


@dataclass(frozen=True, slots=True)
class Opening:
    """The first message: what to open, `how` as `open_models` takes it."""

    named: Mapping[str, str]
    limits: Limits
    how: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """Answers to one prompt: each with its number, and whether only its end is told."""

    name: str
    packed: Packed
    answers: tuple[tuple[int, Decoding, bool], ...]


@dataclass(frozen=True, slots=True)
class Left:
    """Answers that nobody waits for any more."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """What a step of a model made, and how many of its answers grow now; None: its engine has ended."""

    name: str
    active: int | None
    events: tuple[Numbered, ...]
