"""What the judge is told to do, by category: a file of the original's form, or our own rules under the same keys.

The original's `rule.json` maps a category to `{"role", "prompt"}`. Ours ask for the same form of reply in other words,
so that scores under them are compared with each other, not with published ones; `-r` takes the original's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from lapilli.base.errors import DataError, nearest
from lapilli.evaluate.records import read_json

Style = Literal["text", "visual", "bench", "quilt", "grade"]
"""How a question is put: alone; with captions and boxes; with LLaVA-Bench's caption; with Quilt's; one answer against
a reference."""
STYLES: tuple[Style, ...] = ("text", "visual", "bench", "quilt", "grade")

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
"""The system message of every judge of LLaVA and Quilt-LLaVA, part of what their numbers mean."""

OWN = "rules.json"


@dataclass(frozen=True, slots=True)
class Rule:
    """What the answers' authors are called, and what the judge shall do."""

    role: str
    prompt: str


def load_rules(path: str | Path | None) -> dict[str, Rule]:
    """The rules of a file, or our own. Raises DataError for a file of another form."""
    source = Path(str(files("lapilli.evaluate.judge") / OWN)) if path is None else Path(path).expanduser()
    value = read_json(source)
    if not isinstance(value, dict) or not value:
        raise DataError(f'{source}: rules are a JSON object of category to {{"role", "prompt"}}')
    return {name: _rule(record, f'{source}: rule "{name}"') for name, record in value.items()}


def choose_rule(rules: Mapping[str, Rule], style: Style, category: str | None, where: str) -> Rule:
    """The rule for a question, by the original's look-ups. Raises DataError where there is none.

    `text` falls back to `default`; `visual` wants the category itself, `bench` `llava_bench_` and the category,
    `quilt` and `grade` their own names.
    """
    key = rule_key(style, category)
    if key in rules:
        return rules[key]
    if style == "text" and "default" in rules:
        return rules["default"]
    if category is None and style in ("visual", "bench"):
        raise DataError(f'{where}: has no "category", which the rule is chosen by')
    raise DataError(f'{where}: no rule "{key}"{nearest(key, rules)}; the rules are: {", ".join(rules)}')


def rule_key(style: Style, category: str | None) -> str:
    """Where a category's rule is looked up."""
    if style in ("quilt", "grade"):
        return style
    return f"llava_bench_{category}" if style == "bench" else str(category)


def _rule(record: Any, where: str) -> Rule:
    if not isinstance(record, dict):
        raise DataError(f'{where}: must be an object with "role" and "prompt", not {type(record).__name__}')
    role, prompt = record.get("role", "Assistant"), record.get("prompt")
    if not isinstance(role, str) or not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f'{where}: needs "prompt", a text (and "role", a text, if it has one)')
    return Rule(role, prompt)
