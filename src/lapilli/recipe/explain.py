"""Validation errors in the words of a recipe's author: file, dotted key, what is wrong, what was probably meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lapilli.base.errors import nearest
from lapilli.recipe.tree import child, keys
from lapilli.recipe.yaml_file import Path


@dataclass(frozen=True)
class Problem:
    """One thing to mend in a recipe."""

    source: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.source}: {self.key}: {self.text}"


def explain(
    error: ValidationError, model: type[BaseModel], value: Any, place: Callable[[Path], tuple[str, str]]
) -> list[Problem]:
    """Return one Problem per wrong key. `place` gives source and dotted key, as written, of a path into `value`."""
    found: dict[Path, list[str]] = {}
    for one in error.errors():
        path, context = _written(one["loc"], value), one.get("ctx", {})
        if one["type"] == "extra_forbidden":
            text = _unknown_key(str(path[-1]), path[:-1], model)
        elif one["type"] == "missing":
            path, text = (*path, one["loc"][-1]), "is missing"
        elif one["type"] == "value_error":
            text = str(context["error"])
        elif one["type"] == "literal_error":
            given, known = str(one["input"]), context["expected"]
            text = f'"{given}" is not one of {known}{nearest(given, known.replace(" or ", ", ").split(", "))}'
            text = text.replace("\"'", '"').replace("'\"", '"')
        else:
            text = f"{one['msg'][0].lower()}{one['msg'][1:]} (given: {one['input']!r})"
        if text not in found.setdefault(path, []):
            found[path].append(text)
    return [Problem(*place(path), "; or ".join(texts)) for path, texts in found.items()]


def _written(loc: tuple[str | int, ...], value: Any) -> Path:
    """Cut pydantic's location back to what the author wrote (it adds the names of union members)."""
    path: list[str | int] = []
    for key in loc:
        if key in keys(value):
            value = child(value, key)
        elif isinstance(key, int) and isinstance(value, dict | str):
            continue  # a single source, given without its list
        else:
            break
        path.append(key)
    return tuple(path)


def _unknown_key(key: str, path: Path, model: type[BaseModel]) -> str:
    section = _section(model, path)
    close = nearest(key, section.model_fields)
    if close:
        return f"unknown key{close}"
    homes = [
        name
        for name, field in model.model_fields.items()
        for m in _models(field.annotation)
        if key in m.model_fields and m is not section
    ]
    if homes:
        return f'unknown key here; it belongs under "{homes[0]}"'
    if key in model.model_fields:
        return "unknown key here; it belongs at the top of the recipe or of a stage"
    return f"unknown key; known here: {', '.join(section.model_fields)}"


def _section(model: type[BaseModel], path: Path) -> type[BaseModel]:
    for key in path:
        if isinstance(key, str) and key in model.model_fields:
            model = next(iter(_models(model.model_fields[key].annotation)), model)
    return model


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in get_args(annotation) for m in _models(inner)]
