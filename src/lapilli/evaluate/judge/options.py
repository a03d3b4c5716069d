"""How a task's own judge is asked: the option `judge` of its YAML file, or `--judge NAME=VALUE` of a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lapilli.base.errors import RecipeError
from lapilli.evaluate.judge.rules import Style
from lapilli.recipe.explain import explain
from lapilli.recipe.yaml_file import parse

JUDGE = "judge"
"""Name of the scorer, and of its one option."""
JUDGED = "score"
"""The headline of a task that a judge scores."""

Money = Annotated[float, Field(ge=0)]


class JudgeOptions(BaseModel):
    """Which judge, how it is asked, and for how much."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = "https://api.openai.com/v1"
    model: str = "gpt-4"
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; `none` sends none."""
    style: Style | None = None
    """By default `bench` where a question has a context and a reference answer, else `grade`."""
    both_orders: bool = False
    pictures: bool = False
    """Send each question's first picture, to a judge that sees."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.2
    max_tokens: Annotated[int, Field(gt=0)] = 1024
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    concurrency: Annotated[int, Field(gt=0, le=64)] = 4
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    attempts: Annotated[int, Field(gt=0, le=20)] = 6
    timeout: Annotated[float, Field(gt=0)] = 120.0
    max_wait: Annotated[float, Field(ge=0)] = 600.0
    price_in: Money | None = None
    """Of a million tokens read."""
    price_out: Money | None = None
    max_cost: Money | None = None


def judge_options(options: Mapping[str, Any]) -> JudgeOptions:
    """The judge of a task's options, which `faults` has found right."""
    return JudgeOptions.model_validate(options.get(JUDGE) or {})


def faults(options: Mapping[str, Any]) -> list[str]:
    """A line for each setting of the judge that is wrong."""
    given = options.get(JUDGE)
    if given is None:
        return []
    if not isinstance(given, Mapping):
        return [f"{JUDGE}: must be a mapping of {', '.join(JudgeOptions.model_fields)}"]
    try:
        JudgeOptions.model_validate(given)
    except ValidationError as error:
        found = explain(error, JudgeOptions, given, lambda path: (JUDGE, ".".join(map(str, path))))
        return [f"{JUDGE}.{one.key}: {one.text}" for one in found]
    return []


def read_settings(given: Sequence[str]) -> dict[str, Any]:
    """`name=value` texts of a command line, values as YAML has them. Raises RecipeError for another form."""
    made: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise RecipeError(f'--judge "{text}": must be NAME=VALUE, such as model=gpt-4o')
        made[name] = parse(value, f"--judge {name}").value
    return made
