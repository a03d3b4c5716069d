"""LLaVA's and CLIP's config.json from Cerebras' YAML configuration.

What LLaVA's models can't hold is refused by name; settings of training that have no place in config.json are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lapilli.base.errors import ModelError
from lapilli.checkpoint.cerebras.names import Model
from lapilli.checkpoint.cerebras.tables import (
    CLIP,
    GATED,
    LANGUAGE_FIXED,
    LANGUAGE_KEYS,
    MODEL_FIXED,
    OF_TRAINING,
    VISION_FIXED,
    VISION_KEYS,
    one_of,
    table,
    whole,
)

_USUAL = {**MODEL_FIXED, "image_start_idx": 1}
"""Settings of training at the values that every configuration has."""

_LANGUAGE_ELSEWHERE = {"nonlinearity", "rotary_dim", "attention_module", "extra_attention_params",
                       "pos_scaling_factor", "pos_scaling_type", "pos_scaling_extra_args"}  # fmt: skip
"""Keys of the language model that are carried in another form."""


class FromCerebras(NamedTuple):
    """What a YAML configuration says: config.json of the model and of its encoder, and what could not be carried."""

    llava_fields: dict[str, Any]
    clip_fields: dict[str, Any]
    model: Model
    notes: list[str]


def is_cerebras_config(config: Any) -> bool:
    """Whether a YAML file's content is a configuration of one of their two LLaVA models, in any of its layouts."""
    part = _model_part(config)
    return part is not None and "text_model" in part and ("image_model_list" in part or "image_model" in part)


def from_cerebras_config(config: Mapping[str, Any]) -> FromCerebras:
    """LLaVA's and CLIP's config.json from a YAML configuration, in the `model:` or the `trainer:` layout.

    Token ids are not among it (a configuration of theirs has none). Raises ModelError naming the first setting that
    LLaVA's models can't hold.
    """
    part = _model_part(config)
    if part is None or not isinstance(part.get("text_model"), Mapping):
        raise ModelError("no `model` with a `text_model` in this configuration (top level, or under trainer.init)")
    model: Model = "mmsimple-llava" if "image_model_list" in part else "llava"
    vision, projector, layer, select = _of_list(part) if model == "mmsimple-llava" else _of_legacy(part)
    text, left = part["text_model"], []
    clip = _vision_from(vision, left)
    llava = _text_from(text, left) | {
        "mm_projector_type": _projector_from(projector, clip["hidden_size"], text.get("hidden_size")),
        "tune_mm_mlp_adapter": _freezes_text(part.get("freeze")),
        "mm_vision_select_layer": _layer_from(layer, clip["num_hidden_layers"]),
        "mm_vision_select_feature": one_of("image_feature_select_mode", select, ("patch", "cls_patch")),
        "mm_hidden_size": clip["hidden_size"],
    }
    places = {"text_model", "image_model", "image_model_list", "projector", "image_feature_select_mode",
              "image_feature_select_layer_idx", "name"}  # fmt: skip
    _leave("model", {k: v for k, v in part.items() if k not in places}, left)
    notes = [f"settings of training that LLaVA's config.json has no place for: {', '.join(left)}"] if left else []
    return FromCerebras({**LLAVA_CONSTANT, **llava}, {**clip, "model_type": "clip_vision_model"}, model, notes)


LLAVA_CONSTANT = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "pad",
                   "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "freeze_mm_mlp_adapter": False,
                   "freeze_mm_vision_resampler": False, "tune_mm_vision_resampler": False,
                   "unfreeze_mm_vision_tower": False, "use_cache": True}  # fmt: skip


def _model_part(config: Any) -> Mapping[str, Any] | None:
    if not isinstance(config, Mapping):
        return None
    part = config.get("model")
    if part is None and isinstance(config.get("trainer"), Mapping):
        inner = config["trainer"].get("init")
        part = inner.get("model") if isinstance(inner, Mapping) else None
    return part if isinstance(part, Mapping) else None


def _of_list(part: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any, Any, Any]:
    """Encoder, projector, layer and selection of `multimodal_simple`."""
    where = "model.image_model_list"
    listed = table(where, part["image_model_list"])
    models = listed.get("image_models")
    if not isinstance(models, list) or not models:
        raise ModelError(f"{where}.image_models must list an encoder")
    encoders = [found for entry in models for found in _encoders(f"{where}.image_models", entry)]
    if len(encoders) != 1:
        raise ModelError(
            f"{where}.image_models lists {len(encoders)} vision encoders; LLaVA's and Hugging Face's layouts hold one"
        )
    if any(entry.get("projection_layer") is not None for entry in models):
        raise ModelError(
            f"{where}.image_models: projection_layer: a projector of one encoder has no place in LLaVA's layout"
        )
    vision = dict(table(f"{where}.image_models", encoders[0]))
    if vision.get("image_layer_idx") is None:
        raise ModelError(
            f"{where}.image_models: image_layer_idx is not set, so that features come from after the last norm, "
            "which LLaVA's models can't select"
        )
    layer = vision.pop("image_layer_idx")
    return vision, listed.get("global_image_projection"), layer, listed.get("image_feature_select_mode") or "patch"


def _encoders(where: str, entry: Any) -> list[Any]:
    """The encoders of one entry: `image_encoder: {}` from release 2.4 on, `image_model: [{}]` before."""
    found = table(where, entry).get("image_encoder", entry.get("image_model"))
    return found if isinstance(found, list) else [found]


def _of_legacy(part: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any, Any, Any]:
    if not isinstance(part.get("image_model"), Mapping):
        raise ModelError("model.image_model must describe the vision encoder")
    projectors = table("model.projector", part.get("projector") or {})
    if projectors.get("text_model"):
        raise ModelError("model.projector.text_model: a projector of the text has no place in LLaVA's layout")
    if part.get("moe"):
        raise ModelError("model.moe: experts have no place in LLaVA's layout")
    select = part.get("image_feature_select_mode") or "patch"
    layer = part.get("image_feature_select_layer_idx", -1)
    return part["image_model"], projectors.get("image_model"), layer, select


def _vision_from(vision: Mapping[str, Any], left: list[str]) -> dict[str, Any]:
    where = "vision encoder"
    made = {ours: _number(vision[theirs]) for ours, theirs in VISION_KEYS.items() if vision.get(theirs) is not None}
    made.setdefault("projection_dim", CLIP["projection_dim"])
    for key in ("image_size", "patch_size"):
        value = vision.get(key)
        sides = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(sides) != 2 or sides[0] != sides[1]:
            raise ModelError(f"{where}: {key} {value!r}: LLaVA's encoders take square pictures and patches")
        made[key] = sides[0]
    _fixed(where, vision, VISION_FIXED)
    one_of(f"{where}: name", vision.get("name", "vit"), ("ViTModel", "vit"))
    one_of(f"{where}: nonlinearity", vision.get("nonlinearity"), ("quick_gelu", "gelu"))
    known = {*VISION_KEYS.values(), *(set(VISION_FIXED) - OF_TRAINING), "image_size", "patch_size"}
    _leave(where, {k: v for k, v in vision.items() if k not in known}, left)
    missing = [k for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                           "num_channels", "image_size", "patch_size") if made.get(k) is None]  # fmt: skip
    if missing:
        raise ModelError(f"{where}: the configuration does not say {', '.join(missing)}")
    return made


def _text_from(text: Mapping[str, Any], left: list[str]) -> dict[str, Any]:
    where = "text_model"
    made = {ours: _number(text[theirs]) for ours, theirs in LANGUAGE_KEYS.items() if text.get(theirs) is not None}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "rms_norm_eps"):  # fmt: skip
        if key not in made:
            raise ModelError(f"{where}: the configuration does not say {LANGUAGE_KEYS[key]}")
        if key != "rms_norm_eps":
            whole(f"{where}: {LANGUAGE_KEYS[key]}", made[key])
    made.setdefault("tie_word_embeddings", False)
    _fixed(where, text, LANGUAGE_FIXED)
    one_of(f"{where}: name", text.get("name", "llama"), ("LlamaModel", "llama"))
    gated = {theirs: ours for ours, theirs in GATED.items()}
    made["hidden_act"] = gated[one_of(f"{where}: nonlinearity", text.get("nonlinearity"), gated)]
    if text.get("rotary_dim") != made["hidden_size"] // made["num_attention_heads"]:
        raise ModelError(f"{where}: rotary_dim {text.get('rotary_dim')!r} is not hidden_size / num_heads")
    extra = dict(table(f"{where}.extra_attention_params", text.get("extra_attention_params") or {}))
    module = one_of(f"{where}: attention_module", text.get("attention_module", "aiayn_attention"),
                     ("aiayn_attention", "multiquery_attention"))  # fmt: skip
    if (module == "multiquery_attention") != ("num_kv_groups" in extra):
        raise ModelError(f"{where}: attention_module {module} and num_kv_groups contradict each other")
    if "num_kv_groups" in extra:
        made["num_key_value_heads"] = whole(f"{where}: num_kv_groups", extra.pop("num_kv_groups"))
    made["rope_scaling"] = _scaling_from(text)
    known = {*LANGUAGE_KEYS.values(), *(set(LANGUAGE_FIXED) - OF_TRAINING), *_LANGUAGE_ELSEWHERE}
    _leave(where, {k: v for k, v in text.items() if k not in known} | extra, left)
    return made


def _scaling_from(text: Mapping[str, Any]) -> dict[str, Any] | None:
    factor, kind = text.get("pos_scaling_factor", 1.0), text.get("pos_scaling_type", "linear")
    extra = dict(table("text_model.pos_scaling_extra_args", text.get("pos_scaling_extra_args") or {}))
    if factor == 1.0 and not extra:
        return None
    one_of("text_model: pos_scaling_type", kind, ("linear", "llama3"))
    return {"rope_type" if kind == "llama3" else "type": kind, "factor": factor, **extra}


def _projector_from(projector: Any, width: int, hidden: Any) -> str:
    where = "projector"
    if not isinstance(projector, Mapping) or not projector:
        raise ModelError(f"{where}: the configuration has none, and LLaVA's models need one")
    one_of(f"{where}: name", projector.get("name", "FeedForwardNetwork"), ("FeedForwardNetwork",))
    units, activations = projector.get("layers_units"), projector.get("layers_activation")
    if not isinstance(units, list) or not units or units != [hidden] * len(units):
        raise ModelError(
            f"{where}: layers_units {units!r}: every layer must be as wide as the language model ({hidden})"
        )
    if activations != ["gelu"] * (len(units) - 1) + [None]:
        raise ModelError(f"{where}: layers_activation {activations!r}: gelu between the layers and none at the end")
    if projector.get("input_unit") != width:
        raise ModelError(f"{where}: input_unit {projector.get('input_unit')!r} is not the vision encoder's {width}")
    if not projector.get("use_bias"):
        raise ModelError(f"{where}: use_bias is false, and LLaVA's projectors have biases")
    rest = set(projector) - {"name", "input_unit", "layers_units", "layers_activation", "use_bias"}
    if any(projector[key] for key in rest):
        raise ModelError(f"{where}: settings without a place in LLaVA's layout: {', '.join(sorted(rest))}")
    return f"mlp{len(units)}x_gelu"


def _layer_from(layer: Any, layers: int) -> int:
    if not isinstance(layer, int) or isinstance(layer, bool) or not -layers <= layer < layers:
        raise ModelError(f"image_layer_idx {layer!r}: the vision encoder has {layers} layers")
    return layer if layer < 0 else layer + 1


def _freezes_text(freeze: Any) -> bool:
    """Whether the language model stays as it is; the patterns are searched in module names."""
    patterns = freeze if isinstance(freeze, list) else []
    return any(str(pattern).lstrip("^").startswith("text_model") for pattern in patterns)


def _number(value: Any) -> Any:
    """`1e-5` without a point is text to YAML, and a number to everybody who writes it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _fixed(where: str, found: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise ModelError for a setting whose only value in LLaVA's models is another one."""
    for key, value in fixed.items():
        if key not in OF_TRAINING and found.get(key, value) != value:
            raise ModelError(f"{where}: {key} {found[key]!r}: LLaVA's models have {value!r} here")


def _leave(where: str, rest: Mapping[str, Any], left: list[str]) -> None:
    """Note settings of training in `left`; raise ModelError for others that are not simply off."""
    for key, value in sorted(rest.items()):
        if key in OF_TRAINING:
            if value not in (None, False, 0, _USUAL.get(key)) and key not in ("freeze", "name"):
                left.append(f"{where}.{key}")
            continue
        if isinstance(value, Mapping):
            _leave(f"{where}.{key}", value, left)
        elif value not in (None, False, 0, [], ""):
            raise ModelError(f"{where}: {key}: {value!r} has no place in LLaVA's layout, and may change the model")
