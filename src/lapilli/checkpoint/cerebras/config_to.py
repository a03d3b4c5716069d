"""Cerebras' YAML configuration from LLaVA's and CLIP's config.json.

What their models can't hold is refused by name rather than lost. Where the original converter is wrong,
`docs/checkpoints.md` says what is done instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lapilli.base.errors import ModelError
from lapilli.checkpoint.cerebras.names import Model, model_name
from lapilli.checkpoint.cerebras.tables import (
    CLIP,
    ENCODER_IN_LIST,
    FREEZE,
    FREEZE_TEXT,
    GATED,
    LANGUAGE_FIXED,
    LANGUAGE_KEYS,
    LLAMA,
    MLP,
    MODEL_FIXED,
    NEWEST,
    REFUSED_BY_2_10,
    VERSIONS,
    VISION_FIXED,
    VISION_KEYS,
    default,
    one_of,
    whole,
)


class Version(NamedTuple):
    """A release as a pair of numbers, and what to say about it."""

    text: str
    numbers: tuple[int, int]
    note: str | None


def version_of(text: str, model: Model) -> Version:
    """The release that `cs-2.9`, `2.9` or `current` means for a model. Raises ModelError for one without a layout."""
    asked = text.removeprefix("cs-")
    if asked in (NEWEST, "current"):
        note = (
            f"cs-{asked}: the original converter stops at cs-2.9, whose layout release {NEWEST} reads; written so, "
            "without the six settings that its schema refuses"
        )
        return Version(NEWEST, (2, 10), note)
    if asked not in VERSIONS[model]:
        known = ", ".join(f"cs-{v}" for v in (*VERSIONS[model], NEWEST))
        raise ModelError(f'"{text}" is no release with a layout for {model}; known: {known}')
    major, minor = asked.split(".")
    return Version(asked, (int(major), int(minor)), None)


def to_cerebras_config(
    llava_fields: Mapping[str, Any], clip_fields: Mapping[str, Any], version: str, model: str = "mmsimple-llava"
) -> dict[str, Any]:
    """The YAML configuration, as a dict, of a LLaVA model and its CLIP encoder.

    Raises ModelError naming the first setting that their models can't hold, and for unknown releases.
    """
    kind = model_name(model)
    release = version_of(version, kind)
    _refuse_llava(llava_fields)
    clip = clip_vision_fields(clip_fields)
    vision, text = _vision_to(clip), _text_to(llava_fields)
    select = llava_fields.get("mm_vision_select_feature") or "patch"
    one_of("mm_vision_select_feature", select, ("patch", "cls_patch"))
    layer = _layer_to(default(llava_fields, "mm_vision_select_layer", -2), clip["num_hidden_layers"])
    projector = _projector_to(llava_fields, vision["hidden_size"], text["hidden_size"])
    made: dict[str, Any] = {**MODEL_FIXED, "freeze": _freeze_to(llava_fields, kind), "text_model": text}
    if kind == "llava":
        made |= {
            "name": "llava",
            "image_model": vision,
            "projector": {"image_model": projector},
            "image_feature_select_layer_idx": layer,
            "image_feature_select_mode": select,
            "image_start_idx": 1,
        }
    else:
        vision["image_layer_idx"] = layer
        encoder = {"image_encoder": vision} if release.numbers >= ENCODER_IN_LIST else {"image_model": [vision]}
        made["image_model_list"] = {
            "global_image_projection": projector,
            "image_feature_select_mode": select,
            "image_models": [encoder],
        }
        if release.numbers >= ENCODER_IN_LIST:
            made["name"] = "multimodal_simple"
    if release.numbers >= (2, 10):
        for part, keys in ((vision, "vision"), (text, "text"), (made, "model")):
            for key in REFUSED_BY_2_10[keys]:
                part.pop(key, None)
    return {"model": made}


def clip_vision_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The vision half of a CLIP config.json, whole or nested, with every key that counts.

    Raises ModelError for another kind of encoder.
    """
    kind = fields.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ModelError(f"vision encoder: model_type {kind!r}: Cerebras' models hold CLIP's vision encoder only")
    nested = fields.get("vision_config")
    found = dict(nested) if isinstance(nested, Mapping) else dict(fields)
    made = {key: default(found, key, value) for key, value in CLIP.items()}
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
                "image_size", "patch_size"):  # fmt: skip
        whole(f"vision encoder: {key}", made[key])
    if made["hidden_size"] % made["num_attention_heads"] or made["image_size"] < made["patch_size"]:
        raise ModelError("vision encoder: config.json describes no CLIP encoder (heads or patches don't fit)")
    return made


def _vision_to(clip: Mapping[str, Any]) -> dict[str, Any]:
    one_of("vision encoder: hidden_act", clip["hidden_act"], ("quick_gelu", "gelu"))
    made = dict(VISION_FIXED) | {theirs: clip[ours] for ours, theirs in VISION_KEYS.items()}
    return made | {"image_size": [clip["image_size"]] * 2, "patch_size": [clip["patch_size"]] * 2}


def _refuse_llava(fields: Mapping[str, Any]) -> None:
    kind = fields.get("model_type")
    architecture = str((fields.get("architectures") or ["LlavaLlamaForCausalLM"])[0])
    if kind not in ("llava", "llava_llama", "llama", None) or architecture not in (
        "LlavaLlamaForCausalLM",
        "LlamaForCausalLM",
        "LlavaLlamaForCausalLMV2",
    ):
        raise ModelError(f"{kind} ({architecture}): Cerebras' LLaVA models hold Llama language models only")
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if fields.get(key):
            raise ModelError(f"{key} is true: Cerebras' models have no rows for image tokens in their vocabulary")
    for key in ("attention_bias", "mlp_bias"):
        if fields.get(key):
            raise ModelError(f"{key} is true: the language model of Cerebras' LLaVA models has no biases")
    if fields.get("image_aspect_ratio") == "anyres" or (fields.get("mm_patch_merge_type") or "flat") != "flat":
        raise ModelError("image_aspect_ratio anyres: Cerebras' models take each picture as one tile, not several")
    if fields.get("quantization_config"):
        raise ModelError("quantization_config: quantised weights have no place in Cerebras' models")


def _text_to(fields: Mapping[str, Any]) -> dict[str, Any]:
    ours = {key: default(fields, key, value) for key, value in LLAMA.items()}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings"):  # fmt: skip
        whole(key, ours[key])
    heads, groups = ours["num_attention_heads"], default(fields, "num_key_value_heads", ours["num_attention_heads"])
    whole("num_key_value_heads", groups)
    if ours["hidden_size"] % heads or ours["hidden_size"] // heads % 2 or heads % groups:
        raise ModelError(
            f"hidden_size {ours['hidden_size']}, num_attention_heads {heads}, num_key_value_heads {groups}: "
            "these don't divide into heads with rotary positions"
        )
    if fields.get("head_dim") not in (None, ours["hidden_size"] // heads):
        raise ModelError(f"head_dim {fields['head_dim']}: Cerebras' models need hidden_size / num_attention_heads")
    one_of("hidden_act", ours["hidden_act"], GATED)
    made = dict(LANGUAGE_FIXED) | {theirs: ours[key] for key, theirs in LANGUAGE_KEYS.items()}
    made |= {"nonlinearity": GATED[ours["hidden_act"]], "rotary_dim": ours["hidden_size"] // heads}
    made["attention_module"] = "aiayn_attention" if groups == heads else "multiquery_attention"
    if groups != heads:
        made["extra_attention_params"] = {"num_kv_groups": groups}
    parameters = fields.get("rope_parameters")
    scaling = fields.get("rope_scaling")
    if isinstance(parameters, Mapping):
        made["rope_theta"] = parameters.get("rope_theta", made["rope_theta"])
        scaling = scaling or {k: v for k, v in parameters.items() if k != "rope_theta"}
    return made | _scaling_to(scaling)


def _scaling_to(scaling: Any) -> dict[str, Any]:
    """`rope_scaling` as theirs: linear and llama3, the two whose arithmetic is the same on both sides."""
    if not scaling or (isinstance(scaling, Mapping) and _scaling_kind(scaling) == "default"):
        return {"pos_scaling_factor": 1.0}
    kind = _scaling_kind(scaling) if isinstance(scaling, Mapping) else None
    one_of("rope_scaling", kind, ("linear", "llama3"))
    rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type", "factor")}
    made: dict[str, Any] = {"pos_scaling_factor": scaling.get("factor", 1.0), "pos_scaling_type": kind}
    return made | ({"pos_scaling_extra_args": rest} if rest else {})


def _scaling_kind(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("type") or scaling.get("rope_type")


def _layer_to(layer: Any, layers: int) -> int:
    """LLaVA counts the embeddings as the 0th of its layers, Cerebras the first block."""
    if not isinstance(layer, int) or isinstance(layer, bool) or not -layers <= layer <= layers:
        raise ModelError(f"mm_vision_select_layer {layer!r}: the vision encoder has {layers} layers")
    if layer == 0:
        raise ModelError("mm_vision_select_layer 0 means the embeddings, which Cerebras' models can't select")
    return layer if layer < 0 else layer - 1


def _projector_to(fields: Mapping[str, Any], width: int, hidden: int) -> dict[str, Any]:
    kind = default(fields, "mm_projector_type", "mlp2x_gelu")
    match = MLP.fullmatch(str(kind))
    if match is None:
        raise ModelError(f"mm_projector_type {kind!r}: Cerebras' LLaVA models hold mlp1x_gelu, mlp2x_gelu and so on")
    if fields.get("mm_hidden_size") not in (None, width):
        raise ModelError(f"mm_hidden_size {fields['mm_hidden_size']} is not the vision encoder's {width}")
    depth = int(match[1])
    return {
        "name": "FeedForwardNetwork",
        "input_unit": width,
        "layers_units": [hidden] * depth,
        "layers_activation": ["gelu"] * (depth - 1) + [None],
        "use_bias": True,
    }


def _freeze_to(fields: Mapping[str, Any], model: Model) -> list[str]:
    return [FREEZE[model], FREEZE_TEXT] if fields.get("tune_mm_mlp_adapter") else [FREEZE[model]]
