"""LLaVA's own layout as the original reads it: tensor names, config.json, and the folder of its vision encoder.

The original (transformers 4.37) holds one CLIP encoder, a Llama, Mistral or MPT, and a projector. What it can't hold is
refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lapilli.data.image import ImageSpec
from lapilli.model.config import LapilliConfig

TOWER = "vision_tower"
"""Sub-folder of the vision encoder; config.json names it as seen from the checkpoint's own folder."""

_ARCHITECTURES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM", "mpt": "LlavaMptForCausalLM"}

# fmt: off
_LANGUAGE_FIELDS = (
    "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps", "sliding_window", "tie_word_embeddings",
    "use_cache", "vocab_size",
)
_TOWER_FIELDS = (
    "attention_dropout", "hidden_act", "hidden_size", "image_size", "initializer_factor", "initializer_range",
    "intermediate_size", "layer_norm_eps", "model_type", "num_attention_heads", "num_channels", "num_hidden_layers",
    "patch_size", "projection_dim",
)
_MPT_FIELDS = (
    "attn_config", "bos_token_id", "d_model", "emb_pdrop", "embedding_fraction", "eos_token_id", "expansion_ratio",
    "initializer_range", "layer_norm_epsilon", "learned_pos_emb", "logit_scale", "max_seq_len", "n_heads", "n_layers",
    "no_bias", "norm_type", "pad_token_id", "resid_pdrop", "tie_word_embeddings", "use_cache", "vocab_size",
)
_MPT_ATTENTION = (
    "alibi", "alibi_bias_max", "attn_impl", "attn_pdrop", "attn_type", "attn_uses_sequence_id", "clip_qkv", "prefix_lm",
    "qk_ln", "softmax_scale",
)
# fmt: on


def why_not_llava(config: LapilliConfig) -> str | None:
    """Return None if LLaVA's layout can hold models of this configuration, else the reason why not."""
    vision, text = config.vision_config, config.text_config
    if vision.model_type != "clip_vision_model":
        return f"it holds a CLIP vision encoder, not {vision.model_type}"
    if text.model_type not in _ARCHITECTURES:
        return f"it holds a Llama, Mistral or MPT language model, not {text.model_type}"
    if len(config.feature_layers) != 1:
        return f"it reads one layer of the vision encoder, not {len(config.feature_layers)}"
    if config.feature_select == "cls_patch" and config.image_layout.mode == "anyres":
        return "it cuts anyres tiles by patches only"
    if text.model_type == "mpt":
        return None
    width = text.hidden_size // text.num_attention_heads
    if (getattr(text, "head_dim", None) or width) != width:
        return f"its attention heads are {width} wide (hidden size by heads), not {text.head_dim}"
    if getattr(text, "mlp_bias", False):
        return "its language model has no biases in the MLP"
    return None


def llava_names(names: Iterable[str], config: LapilliConfig) -> dict[str, str]:
    """Canonical names to those of LLaVA's state dict."""
    body = "transformer." if config.text_config.model_type == "mpt" else "model."
    heads = {
        "vision": f"{body}vision_tower.vision_tower.vision_model.",
        "projector": f"{body}mm_projector.",
        "language": "",
    }
    made = {}
    for name in names:
        part, _, rest = name.partition(".")
        made[name] = heads[part] + rest if rest else body + name
    return made


def llava_fields(
    config: LapilliConfig, dtype: str, *, tower: str, im_start_end: bool, max_length: int
) -> dict[str, Any]:
    """config.json. `tower` is a name on the Hub or a folder as seen from the checkpoint."""
    layout, text = config.image_layout, config.text_config
    fields = {
        "architectures": [_ARCHITECTURES[text.model_type]],
        "model_type": f"llava_{text.model_type}",
        **_language_fields(text),
        "mm_hidden_size": config.vision_hidden_size,
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.feature_layers[0],
        "mm_vision_select_feature": config.feature_select,
        "mm_patch_merge_type": "spatial_unpad" if layout.mode == "anyres" else "flat",
        "mm_use_im_start_end": im_start_end,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": layout.mode,
        "tokenizer_model_max_length": max_length,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "mm_vision_tower": tower,
        "torch_dtype": dtype,
        "transformers_version": "4.37.2",
    }
    if layout.mode == "anyres":
        fields["image_grid_pinpoints"] = [list(canvas) for canvas in layout.pinpoints]
    return fields


def _language_fields(text: Any) -> dict[str, Any]:
    """A language model's configuration in the words of transformers 4.37."""
    written = text.to_dict()
    if text.model_type == "mpt":
        fields = {name: written[name] for name in _MPT_FIELDS if name in written}
        attention = fields["attn_config"]
        return fields | {"attn_config": {name: attention[name] for name in _MPT_ATTENTION if name in attention}}
    fields = {name: written[name] for name in _LANGUAGE_FIELDS if name in written}
    rope = dict(written.get("rope_parameters") or {})
    fields["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    if kind != "default":
        fields["rope_scaling"] = {"type": kind, **rope}
    return fields


def tower_fields(config: LapilliConfig) -> dict[str, Any]:
    """config.json of the vision encoder's folder."""
    written = config.vision_config.to_dict()
    made = {name: written[name] for name in _TOWER_FIELDS if name in written}
    return {"architectures": ["CLIPVisionModel"], **made}


def tower_processor(spec: ImageSpec) -> dict[str, Any]:
    """preprocessor_config.json beside it; padding and tiles are the checkpoint's own settings."""
    return {"image_processor_type": "CLIPImageProcessor", **spec.processor_config()}
