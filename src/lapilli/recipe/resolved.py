"""The run folder's copy of a recipe: every key with its value and, as a comment, where the value came from.

The copy is a recipe itself: paths are absolute and defaults are written out, so it runs the same under a later
version whose defaults differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lapilli.recipe.schema import Stage


def resolved_yaml(stage: Stage, origins: Mapping[str, str]) -> str:
    """Return the stage as YAML with origins as comments; `origins` as `LoadedRecipe.stage_origins` gives them."""
    head = "# What this run was made from. Right of each value: the file and line, or the command line, that set it.\n"
    return head + "".join(f"{line}\n" for line in _lines(stage.model_dump(mode="json"), origins, "", ""))


def _lines(value: dict[str, Any], origins: Mapping[str, str], prefix: str, indent: str) -> Iterator[str]:
    for key, child in value.items():
        dotted = prefix + key
        if isinstance(child, dict):
            yield f"{indent}{key}:"
            yield from _lines(child, origins, f"{dotted}.", indent + "  ")
        elif isinstance(child, list) and child and isinstance(child[0], dict):
            yield f"{indent}{key}:{_comment(dotted, origins)}"
            for entry in child:
                yield f"{indent}  - {scalar(entry)}"
        else:
            yield f"{indent}{key}: {scalar(child)}{_comment(dotted, origins)}"


def _comment(dotted: str, origins: Mapping[str, str]) -> str:
    return f"  # {origins.get(dotted, 'default')}"


def scalar(value: Any) -> str:
    """One value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")
