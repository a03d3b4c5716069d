"""What the registries of readers, scorers and submissions have in common: a part of a task's code and its options.

A task's YAML names parts and gives options; each part says which options it knows, so that a mistyped one is an error
instead of a different number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lapilli.base.errors import nearest
from lapilli.evaluate.task import Question

F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Entry(Generic[F]):
    """One part: its function, and the names of the options that it looks at."""

    call: F
    options: frozenset[str] = frozenset()
    faults: Callable[[Mapping[str, Any]], list[str]] | None = None
    """A line for each option whose value is wrong; asked when a task is read."""
    before: Callable[[Sequence[Question], Mapping[str, Any]], None] | None = None
    """Of scorers: raises LapilliError for what would fail only after the questions are answered; asked before."""
    needs_truth: bool = True
    """Of scorers: questions without a known right answer can't be scored."""


def unknown_options(given: Iterable[str], entries: Iterable[Entry]) -> list[str]:
    """A line for each option that none of a task's parts knows, with the nearest known one."""
    known = frozenset[str]().union(*(entry.options for entry in entries))
    listed = ", ".join(sorted(known)) or "none"
    return [f'unknown option "{name}"{nearest(name, known)}; known: {listed}' for name in given if name not in known]


def known_names(registry: Mapping[str, Entry]) -> str:
    """The names of a registry, for messages and help."""
    return ", ".join(sorted(registry))
