"""What Cerebras' and LLaVA's configurations call the same things, and which values have only one possible form.

Rules: the source document and what the original converter writes (release 2.10).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lapilli.base.errors import ModelError, unknown
from lapilli.checkpoint.cerebras.names import Model

VERSIONS: dict[Model, tuple[str, ...]] = {
    "mmsimple-llava": ("2.3", "2.4", "2.5", "2.6", "2.7", "2.8", "2.9"),
    "llava": ("2.2", "2.3", "2.4", "2.5", "2.6", "2.7", "2.8", "2.9"),
}
"""Releases that the original converter writes for."""
NEWEST = "2.10"
ENCODER_IN_LIST = (2, 4)
"""From this release on, `image_encoder: {...}` stands where `image_model: [{...}]` stood."""

LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
          "num_attention_heads": 32, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6,
          "tie_word_embeddings": False, "max_position_embeddings": 2048, "rope_theta": 10000.0}  # fmt: skip
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
         "attention_dropout": 0.0, "initializer_range": 0.02, "projection_dim": 512}  # fmt: skip
"""Values of keys that config.json leaves out, transformers' own."""

LANGUAGE_KEYS = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "filter_size",
                  "num_hidden_layers": "num_hidden_layers", "num_attention_heads": "num_heads",
                  "max_position_embeddings": "max_position_embeddings", "rms_norm_eps": "layer_norm_epsilon",
                  "initializer_range": "initializer_range", "tie_word_embeddings": "share_embedding_weights",
                  "rope_theta": "rope_theta"}  # fmt: skip
VISION_KEYS = {"hidden_size": "hidden_size", "intermediate_size": "filter_size", "num_attention_heads": "num_heads",
                "num_hidden_layers": "num_hidden_layers", "num_channels": "num_channels",
                "layer_norm_eps": "layer_norm_epsilon", "hidden_act": "nonlinearity",
                "attention_dropout": "attention_dropout_rate", "initializer_range": "initializer_range",
                "projection_dim": "num_classes"}  # fmt: skip

LANGUAGE_FIXED = {"attention_dropout_rate": 0.0, "attention_type": "scaled_dot_product", "dropout_rate": 0.0,
                   "embedding_dropout_rate": 0.0, "embedding_layer_norm": False, "name": "LlamaModel",
                   "norm_first": True, "norm_type": "rmsnorm", "position_embedding_type": "rotary",
                   "use_bias_in_output": False, "use_ff_layer1_dropout": False, "use_ffn_bias": False,
                   "use_ffn_bias_in_attention": False, "use_projection_bias_in_attention": False}  # fmt: skip
VISION_FIXED = {"attention_type": "scaled_dot_product", "dropout_rate": 0.0, "name": "ViTModel", "norm_first": True,
                 "position_embedding_type": "learned", "prepend_cls_token": True, "use_bias_in_output": False,
                 "use_conv_patchified_embedding": True, "use_embed_proj_bias": False,
                 "use_encoder_pooler_layer": False, "use_ffn_bias": True, "use_ffn_bias_in_attention": True,
                 "use_post_embed_layer_norm": True, "use_projection_bias_in_attention": True}  # fmt: skip
MODEL_FIXED = {"label_smoothing": 0.0, "loss_scaling": "num_tokens", "loss_weight": 1.0, "z_loss_eps": 0.0}
REFUSED_BY_2_10 = {"vision": {"num_classes", "use_bias_in_output"}, "model": {"label_smoothing", "z_loss_eps"},
                    "text": {"norm_first", "use_ff_layer1_dropout"}}  # fmt: skip
"""Keys that the original converter writes and the schema of release 2.10 does not know."""

OF_TRAINING = frozenset(("attention_dropout_rate", "dropout_rate", "embedding_dropout_rate", "embd_pdrop",
                          "initializer_range", "attention_softmax_fp32", "fp16_type", "mixed_precision",
                          "label_smoothing", "loss_scaling", "loss_weight", "z_loss_eps", "use_ff_layer1_dropout",
                          "to_float16", "image_start_idx", "output_list", "freeze", "boundary_casting", "name",
                          "tf_summary", "use_bfloat16"))  # fmt: skip
"""Keys without a part in what the model computes."""

GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
MLP = re.compile(r"mlp([1-9]\d?)x_gelu")
FREEZE = {"mmsimple-llava": "^image_model.image_model_list", "llava": "^image_model"}
FREEZE_TEXT = "^text_model"


def default(fields: Mapping[str, Any], key: str, value: Any) -> Any:
    found = fields.get(key)
    return value if found is None else found


def whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{name} must be a whole number above zero, not {value!r}")
    return value


def one_of(name: str, value: Any, valid: Iterable[str]) -> Any:
    if value not in tuple(valid):
        raise ModelError(unknown(name, str(value), valid))
    return value


def table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ModelError(f"{name} must be a table of settings, not {value!r}")
    return value
