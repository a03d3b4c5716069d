"""LLaVA's own layout, v1 to v1.6: one config.json for everything, and weights under `model.*`.

It is recognised by what config.json holds, because `model_type` alone can't tell (`llava` is transformers' name too)
and folders get renamed. Nothing is guessed: a setting that would change the model and is not understood is refused by
name, and so is every tensor that has no place, or place that has no tensor.
"""

import ast
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, MistralConfig, MptConfig, PreTrainedConfig

from lapilli.base.errors import ModelError, unknown
from lapilli.base.layout import ImageMode
from lapilli.checkpoint.tensors import read_json
from lapilli.model.projector import check_projector
from lapilli.model.shrink import SHRINK_ERRORS

log = logging.getLogger(__name__)

_LANGUAGE: dict[str, type[PreTrainedConfig]] = {
    "llava_llama": LlamaConfig,
    "llava_mistral": MistralConfig,
    "llava_mpt": MptConfig,
}
_ARCHITECTURES = {
    "LlavaLlamaForCausalLM": "llava_llama",
    "LlavaMistralForCausalLM": "llava_mistral",
    "LlavaMptForCausalLM": "llava_mpt",
    "LlavaMPTForCausalLM": "llava_mpt",
}
_BY_ARCHITECTURE = {"llava": "LlavaLlamaForCausalLM", "llava_custom": "LlavaMistralForCausalLM"}
"""Types that leave the language model to `architectures`, and what they mean without it: `llava` is the first
releases' and KoLLaVA's and Quilt-LLaVA's, `llava_custom` that of Intel's Gaudi code."""
_FIRST = {"llama": "llava_llama", "mistral": "llava_mistral"}
"""LLaVA's very first checkpoints had the language model's own type."""

# fmt: off
_IDENTITY = frozenset(("architectures", "model_type", "transformers_version", "torch_dtype"))
_NO_EFFECT = frozenset((
    "mm_hidden_size", "mm_projector_lr", "mm_vision_tower_lr", "use_mm_proj", "tune_mm_mlp_adapter",
    "freeze_mm_mlp_adapter", "tune_mm_vision_resampler", "freeze_mm_vision_resampler", "tokenizer_padding_side",
    "tokenizer_model_max_length", "image_crop_resolution", "image_split_resolution", "sep_image_conv_front",
    "max_sequence_length", "vision_tower", "mm_im_patches",
))
# fmt: on
"""Settings of training, or of code that no release uses."""


@dataclass(frozen=True)
class LlavaSettings:
    """What a LLaVA config.json says about the model."""

    language: PreTrainedConfig
    vision_tower: str
    """A folder, relative to the checkpoint's own, or a name on the Hub."""
    vision_tuned: bool
    """The vision encoder was trained too, so its weights are the checkpoint's."""
    projector: str
    feature_layer: int
    feature_select: Literal["patch", "cls_patch"]
    mode: ImageMode
    pinpoints: tuple[tuple[int, int], ...]
    """anyres only: canvas sizes (width, height)."""
    im_start_end: bool
    im_patch: bool
    """The vocabulary has a row for `<im_patch>`, which no text uses since v1."""
    beyond: Mapping[str, Any]
    """The fields that are not the language model's, as they stand."""


# ---- config.json ------------------------------------------------------------------------------------------------


def read_fields(folder: Path) -> dict[str, Any]:
    """Read config.json as it stands. Raises ModelError for a file that is not a JSON object."""
    return read_json(folder / "config.json")


def is_llava(fields: Mapping[str, Any]) -> bool:
    """Whether config.json is in LLaVA's own layout; transformers' `llava` nests its parts' configurations."""
    if "text_config" in fields or "vision_config" in fields:
        return False
    ours = fields.get("model_type") in (*_LANGUAGE, *_BY_ARCHITECTURE)
    return ours or any(key.startswith("mm_") for key in fields)


def read_settings(where: Path, fields: Mapping[str, Any]) -> LlavaSettings:
    """What the fields of a config.json (`where`, for messages) say; keys not there have the original's defaults.

    Raises ModelError naming a key that is missing, has a value that can't be used, or is unknown and could matter.
    """
    cls = _language_class(where, fields)
    get = _Reader(where, fields)
    mode = get.one_of("image_aspect_ratio", ("square", "pad", "anyres"), "square")
    merge = get.one_of("mm_patch_merge_type", ("flat", "spatial_unpad"), "flat")
    if mode == "anyres" and merge == "flat":
        raise ModelError(f"{where}: image_aspect_ratio anyres is supported with mm_patch_merge_type spatial_unpad only")
    settings = LlavaSettings(
        vision_tower=get("mm_vision_tower", str, fields.get("vision_tower")),
        vision_tuned=get("unfreeze_mm_vision_tower", bool, False),
        projector=get("mm_projector_type", str, "linear"),
        feature_layer=get("mm_vision_select_layer", int),
        feature_select=get.one_of("mm_vision_select_feature", ("patch", "cls_patch"), "patch"),
        mode=mode,
        pinpoints=_pinpoints(where, fields.get("image_grid_pinpoints")) if mode == "anyres" else (),
        im_start_end=get("mm_use_im_start_end", bool, False),
        im_patch=get("mm_use_im_patch_token", bool, False),
        language=_language_config(where, cls, fields, {*get.known, "image_grid_pinpoints"}),
        beyond={key: value for key, value in fields.items() if key not in _own_keys(cls) or key in _IDENTITY},
    )
    check_projector(settings.projector)
    return settings


T = TypeVar("T")


class _Reader:
    """Reads typed values out of config.json and remembers which keys it was asked for."""

    def __init__(self, where: Path, fields: Mapping[str, Any]) -> None:
        self.where, self.fields, self.known = where, fields, set[str]()

    def __call__(self, key: str, kind: type[T], default: Any = None) -> T:
        self.known.add(key)
        value = self.fields.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.where}: {key} is missing, and the original has no default for it")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelError(f"{self.where}: {key} must be of type {kind.__name__}, not {value!r}")
        return value

    def one_of(self, key: str, valid: Iterable[str], default: str) -> Any:
        value = self(key, str, default)
        if value not in valid:
            raise ModelError(f"{self.where}: {unknown(key, value, valid)}")
        return value


def _language_class(where: Path, fields: Mapping[str, Any]) -> type[PreTrainedConfig]:
    kind = str(fields.get("model_type"))
    kind = _FIRST.get(kind, kind)
    if kind in _BY_ARCHITECTURE:
        named = fields.get("architectures") or [_BY_ARCHITECTURE[kind]]
        kind = _ARCHITECTURES.get(str(named[0]), str(named[0]))
    if kind not in _LANGUAGE:
        raise ModelError(f"{where}: {unknown('LLaVA model', kind, [*_LANGUAGE, *_ARCHITECTURES])}")
    return _LANGUAGE[kind]


def _pinpoints(where: Path, value: Any) -> tuple[tuple[int, int], ...]:
    """Canvas sizes (width, height) from a list, or from the text of one."""
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
        made = tuple((width, height) for width, height in value)
    except (ValueError, TypeError, SyntaxError):
        made = ()
    if not made or not all(isinstance(side, int) and side > 0 for pair in made for side in pair):
        raise ModelError(f"{where}: image_grid_pinpoints must be a list of [width, height], not {value!r}")
    return made


def _language_config(
    where: Path, cls: type[PreTrainedConfig], fields: Mapping[str, Any], understood: set[str]
) -> PreTrainedConfig:
    """The language model's part of config.json. What belongs to neither part is refused if it could matter."""
    own = _own_keys(cls)
    general = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path"}
    rest = sorted(k for k, v in fields.items() if v and k not in own | general | understood | _NO_EFFECT)
    matters = [k for k in rest if k.startswith(("mm_", "s2", "quantization_config"))]
    if matters:
        raise ModelError(f"{where}: {matters[0]}: {fields[matters[0]]!r} is not supported and would change the model")
    if rest:
        log.info("%s: settings without a use here: %s", where, ", ".join(rest))
    values = {k: v for k, v in fields.items() if k in own - general}
    if cls is MptConfig:
        values |= _mpt_values(where, fields)
    try:
        return cls(**values)
    except (*SHRINK_ERRORS, StrictDataclassError) as error:
        raise ModelError(f"{where}: not a {cls.model_type} configuration ({' '.join(str(error).split())})") from error


def _own_keys(cls: type[PreTrainedConfig]) -> set[str]:
    """Keys of config.json that are the language model's."""
    return set(cls().to_dict()) | {"rope_theta", "rope_scaling", "head_dim"}


def _mpt_values(where: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """MPT's attention settings. Raises ModelError for variants that transformers' class has no arithmetic for."""
    attention = dict(fields.get("attn_config") or {})
    variants = {
        "attn_config.alibi": attention.get("alibi", True) is True,
        "attn_config.qk_ln": not attention.get("qk_ln"),
        "attn_config.prefix_lm": not attention.get("prefix_lm"),
        "attn_config.attn_type": attention.get("attn_type", "multihead_attention") == "multihead_attention",
        "logit_scale": fields.get("logit_scale") is None,
        "norm_type": fields.get("norm_type", "layernorm") in ("layernorm", "low_precision_layernorm"),
    }
    odd = next((key for key, plain in variants.items() if not plain), None)
    if odd is not None:
        value = attention.get(odd.removeprefix("attn_config."), fields.get(odd))
        raise ModelError(f"{where}: {odd}: {value!r} is a variant of MPT that transformers' class can't compute")
    if isinstance(attention.get("attn_pdrop"), float) and attention["attn_pdrop"].is_integer():
        attention["attn_pdrop"] = int(attention["attn_pdrop"])
    return {"attn_config": attention}
