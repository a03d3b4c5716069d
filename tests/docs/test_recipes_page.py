"""docs/recipes.md lists every key of a recipe, with its default, and no other."""

import re
from pathlib import Path

import yaml
from pydantic import BaseModel

from lapilli.recipe.schema import Evaluation, Lora, Source, Stage

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def keys(model, prefix=""):
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from keys(type(field.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "required" if field.is_required() else field.default


def test_keys_and_defaults():
    rows = re.findall(r"^\| `([a-z0-9_.\[\]]+)` \| .*? \| (.*?) \| ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    written = {key: yaml.safe_load(value) for key, value in rows}
    expected = dict(keys(Stage)) | dict(keys(Lora, "train.lora.")) | dict(keys(Source, "data.train[]."))
    expected |= dict(keys(Evaluation, "train.evaluate[]."))
    assert set(written) == set(expected)
    for key, default in expected.items():
        value = written[key]
        value = float(value) if isinstance(default, float) else tuple(value) if isinstance(value, list) else value
        assert value == default, key
