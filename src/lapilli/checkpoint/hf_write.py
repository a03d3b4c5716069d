"""Tensor names and config.json of transformers' own layout, and of ours, for writers that never build the model.

Canonical names (`vision.*`, `projector.*`, `language.*`, `image_newline`) become the names that stand in released
folders; they load in every version of transformers, and in what follows its names. Our own layout is the same with the
names of our own class.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lapilli.base.errors import ModelError
from lapilli.checkpoint import hf
from lapilli.checkpoint.names import output_name, vision_prefix
from lapilli.model.config import LapilliConfig

_PROJECTOR = {"0": "linear_1", "2": "linear_2"}


def hf_names(names: Iterable[str], config: LapilliConfig) -> dict[str, str]:
    """Canonical names to transformers' `llava` and `llava_next`. Raises ModelError for a name without a place."""
    tower = "vision_tower." + vision_prefix(config.vision_config)
    body, output = _language(config.text_config)
    made = {}
    for name in names:
        part, _, rest = name.partition(".")
        if part == "vision":
            made[name] = tower + rest
        elif part == "projector" and rest.split(".")[0] in _PROJECTOR:
            number, _, kind = rest.partition(".")
            made[name] = f"multi_modal_projector.{_PROJECTOR[number]}.{kind}"
        elif part == "language" and rest.startswith(output):
            made[name] = "language_model.lm_head." + rest.removeprefix(output)
        elif part == "language" and rest.startswith(body):
            made[name] = "language_model.model." + rest.removeprefix(body)
        elif name == "image_newline":
            made[name] = name
        else:
            raise ModelError(f"{name} has no place in transformers' layout")
    return made


def own_names(names: Iterable[str]) -> dict[str, str]:
    """Canonical names to those of `VisionLanguageModel`."""
    parts = {"vision": "vision_encoder", "language": "language_model"}
    made = {}
    for name in names:
        part, dot, rest = name.partition(".")
        made[name] = parts.get(part, part) + dot + rest
    return made


def _language(config: Any) -> tuple[str, str]:
    """What a language model's own names begin with, in its layers and in its output layer."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return f"{model.base_model_prefix}.", f"{output_name(model)}."


def hf_fields(config: LapilliConfig) -> dict[str, Any]:
    """config.json of transformers' `llava` or `llava_next`."""
    made = hf.to_hf_config(config)
    made.architectures = [
        "LlavaNextForConditionalGeneration" if made.model_type == "llava_next" else "LlavaForConditionalGeneration"
    ]
    return _placeless(made)


def own_fields(config: LapilliConfig) -> dict[str, Any]:
    """config.json of our own layout."""
    made = copy.deepcopy(config)
    made.architectures = ["VisionLanguageModel"]
    return _placeless(made)


def _placeless(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields, in order, without the places where the parts once lay on this machine."""
    fields = config.to_diff_dict()
    for part in (fields["vision_config"], fields["text_config"]):
        part.pop("_name_or_path", None)
    return dict(sorted(fields.items()))
