"""Nested plain values that remember where each was written.

A recipe is laid together from a file's common keys, a stage's own keys and the command line; the `Tree` merges them
and keeps the origin of every value, for error messages and for the run folder's copy of the recipe.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from lapilli.base.errors import RecipeError
from lapilli.recipe.yaml_file import Path


def keys(value: Any) -> Collection[str | int]:
    """Keys of a mapping, places of a list, nothing for a plain value."""
    return value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()


def child(value: Any, key: str | int) -> Any:
    return value[key]


def _assign(value: Any, key: str | int, new: Any) -> None:
    value[key] = new


@dataclass(frozen=True)
class Origin:
    """Where a value was written: `source` names the file, `key` is the dotted key as it stands there."""

    source: str
    key: str
    line: int | None
    folder: FilePath
    """What a relative path given here is relative to."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass
class Tree:
    """Nested plain values, and the origin of each by its path."""

    value: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, Origin] = field(default_factory=dict)

    def get(self, path: Path) -> Any:
        """Return the value at `path`, or None where there is none."""
        value: Any = self.value
        for key in path:
            if key not in keys(value):
                return None
            value = child(value, key)
        return value

    def part(self, *path: str | int) -> Tree:
        """Return the mapping at `path` as a Tree of its own."""
        n = len(path)
        return Tree(self.get(path), {p[n:]: o for p, o in self.origins.items() if p[:n] == path and len(p) > n})

    def without(self, *keys: str) -> Tree:
        """Return a copy that lacks these keys of the first level."""
        value = {k: _copy(v) for k, v in self.value.items() if k not in keys}
        return Tree(value, {p: o for p, o in self.origins.items() if p[0] not in keys})

    def drop(self, key: str) -> None:
        """Remove one key of the first level, if it is there."""
        self.value.pop(key, None)
        self.origins = {p: o for p, o in self.origins.items() if p[0] != key}

    def put(self, path: Path, value: Any, origin: Origin) -> None:
        """Set one value; mappings on the way are made where nothing stands.

        Raises RecipeError if a plain value stands in the way.
        """
        target: Any = self.value
        for i, key in enumerate(path[:-1]):
            if isinstance(target, dict) and target.get(key) is None:
                target[key] = {}
                self.origins[path[: i + 1]] = origin
            target = child(target, key)
            if not isinstance(target, dict | list):
                where = ".".join(map(str, path[: i + 1]))
                raise RecipeError(f"{origin.source}: {origin.key}: {where} is not a mapping; set it as a whole")
        if isinstance(target, list) and path[-1] not in keys(target):
            where = ".".join(map(str, path[:-1]))
            raise RecipeError(f"{origin.source}: {origin.key}: {where} is a list; set it as a whole")
        self.origins = {p: o for p, o in self.origins.items() if p[: len(path)] != path}
        _assign(target, path[-1], value)
        for below in _paths(value):
            self.origins[(*path, *below)] = replace(origin, key=".".join(map(str, (origin.key, *below))))

    def overlay(self, other: Tree) -> Tree:
        """Return this tree with `other` laid over it: mappings are merged, anything else is replaced."""
        merged = self.without()
        _merge(merged, other, ())
        return merged


def _merge(merged: Tree, other: Tree, path: Path) -> None:
    below = other.get(path)
    for key, value in below.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(merged.get(here), dict):
            _merge(merged, other, here)
            continue
        merged.put(here, _copy(value), other.origins[here])
        merged.origins.update({p: o for p, o in other.origins.items() if p[: len(here)] == here})


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _paths(value: Any) -> list[Path]:
    """Return the paths of a value and of everything below it."""
    return [(), *((key, *path) for key in keys(value) for path in _paths(child(value, key)))]
