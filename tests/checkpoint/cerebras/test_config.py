"""Configurations against the original converter's, both ways; where it is wrong, against what is right."""

import copy
from typing import Any

import pytest
from tests.support.cerebras import fields, load_json

from lapilli.base.errors import ModelError
from lapilli.checkpoint.cerebras import from_cerebras_config, to_cerebras_config

PAIRS = load_json("configs")
VARIANTS = load_json("config_variants")
REFUSED_BY_US_ALONE = {
    "attention_bias_true": "attention_bias",  # the original drops the biases
    "model_type_qwen2": "qwen2",  # it writes over model_type and takes any model for Llama
    "vision_siglip": "siglip_vision_model",  # the same for the encoder
    "anyres": "anyres",  # it forgets the tiles
}


def _with_their_freeze(config: dict[str, Any]) -> dict[str, Any]:
    """The original freezes the projector too: its pattern for the encoder fits `image_model.projection`."""
    config = copy.deepcopy(config)
    if "image_model_list" in config["model"]:
        assert config["model"]["freeze"][0] == "^image_model.image_model_list"
        config["model"]["freeze"][0] = "^image_model"
    return config


def _without_ids(text: dict[str, Any]) -> dict[str, Any]:
    """The original always says 1, 2 and 0, which are Llama-2's; and the path of a folder on its machine."""
    assert (text["bos_token_id"], text["eos_token_id"], text["pad_token_id"]) == (1, 2, 0)
    left = {"bos_token_id", "eos_token_id", "pad_token_id", "mm_vision_tower"}
    return {key: value for key, value in text.items() if key not in left}


@pytest.mark.parametrize("name", PAIRS)
def test_configurations_equal_the_originals(name: str) -> None:
    pair = PAIRS[name]
    made = to_cerebras_config(pair["text"], pair["image"], pair["release"], pair["model"])
    assert _with_their_freeze(made) == pair["cs"]
    back = from_cerebras_config(pair["cs"])
    assert back.model == pair["model"]
    assert back.notes == []
    if "back_text" in pair:
        assert back.llava_fields == _without_ids(pair["back_text"])
    if "back_image" in pair:
        assert back.clip_fields == pair["back_image"]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_converted_or_refused_as_the_original_does(name: str) -> None:
    model, _, change = name.partition("/")
    row = VARIANTS[name]
    text, image = PAIRS["mmsimple-2.9"]["text"], PAIRS["mmsimple-2.9"]["image"]
    text, image = text | row["changed_in_text_model"], image | row["changed_in_image_model"]
    if row["rc"] != 0 or change in REFUSED_BY_US_ALONE:
        changed = next(iter(row["changed_in_text_model"] | row["changed_in_image_model"]))
        with pytest.raises(ModelError, match=REFUSED_BY_US_ALONE.get(change, changed)):
            to_cerebras_config(text, image, "cs-2.9", model)
        return
    assert _with_their_freeze(to_cerebras_config(text, image, "cs-2.9", model)) == row["cs_config"]
    back = from_cerebras_config(row["cs_config"])
    if "back" in row:
        wanted = _without_ids(row["back"]["text_model"])
        if change == "tune_adapter_true":  # the original looks for a pattern that it never writes
            wanted["tune_mm_mlp_adapter"] = True
        assert back.llava_fields == wanted
        assert back.clip_fields == row["back"]["image_model"]


def test_the_original_refuses_as_often_as_the_test_believes() -> None:
    assert sum(row["rc"] != 0 for row in VARIANTS.values()) == 10


def _shipped(model: str, width: int, layers: int, heads: int, inner: int, *, freeze_text: bool) -> dict[str, Any]:
    """The model part of Cerebras' training configurations, with the settings that only those have."""
    vision = {"name": "ViTModel", "position_embedding_type": "learned", "embedding_dropout_rate": 0.0,
              "hidden_size": 1024, "use_post_embed_layer_norm": True, "use_embed_proj_bias": False,
              "num_hidden_layers": 24, "layer_norm_epsilon": "1e-5", "num_heads": 16,
              "attention_type": "scaled_dot_product", "attention_softmax_fp32": True, "dropout_rate": 0.0,
              "nonlinearity": "quick_gelu", "attention_dropout_rate": 0.0, "use_projection_bias_in_attention": True,
              "use_ffn_bias_in_attention": True, "filter_size": 4096, "use_ffn_bias": True, "initializer_range": 0.02,
              "norm_first": True, "image_size": [336, 336], "num_channels": 3, "patch_size": [14, 14],
              "use_conv_patchified_embedding": True, "use_encoder_pooler_layer": False,
              "prepend_cls_token": True}  # fmt: skip
    text = {"name": "LlamaModel", "vocab_size": 32000, "hidden_size": width, "position_embedding_type": "rotary",
            "rotary_dim": width // heads, "share_embedding_weights": False, "max_position_embeddings": 2048,
            "embd_pdrop": 0.0, "num_hidden_layers": layers, "dropout_rate": 0.0, "layer_norm_epsilon": 1e-5,
            "norm_type": "rmsnorm", "num_heads": heads, "attention_type": "scaled_dot_product",
            "attention_dropout_rate": 0.0, "use_projection_bias_in_attention": False,
            "use_ffn_bias_in_attention": False, "filter_size": inner, "nonlinearity": "swiglu", "use_ffn_bias": False,
            "use_bias_in_output": False}  # fmt: skip
    projector = {"name": "FeedForwardNetwork", "input_unit": 1024, "layers_units": [width, width],
                 "layers_activation": ["gelu", None], "use_bias": True}  # fmt: skip
    made: dict[str, Any] = {"loss_scaling": "num_tokens", "loss_weight": 1.0, "fp16_type": "cbfloat16"}
    if model == "llava":
        made |= {"name": "llava", "image_model": vision, "text_model": text, "projector": {"image_model": projector},
                 "image_feature_select_layer_idx": -2, "image_start_idx": 35,
                 "image_feature_select_mode": "patch"}  # fmt: skip
    else:
        text |= {"pos_scaling_factor": 1.0, "extra_ffn_params": {"static_dual_expert": False}}
        made |= {"name": "multimodal_simple", "text_model": text, "image_model_list": {
            "image_feature_select_mode": "patch", "global_image_projection": projector,
            "image_models": [{"image_encoder": vision | {"image_layer_idx": -2}}]}}  # fmt: skip
    return made | {"freeze": ["^image_model.image_model_list", *(["^text_model"] if freeze_text else [])]}


@pytest.mark.parametrize("name", load_json("shipped"))
def test_training_configurations_are_read_in_the_layout_that_the_original_fails_on(name: str) -> None:
    row = load_json("shipped")[name]
    size = (5120, 40, 40, 13824) if "13b" in name else (4096, 32, 32, 11008)
    freeze_text = "phase1" in name or row["model"] != "llava"  # theirs does so in both phases
    part = _shipped(row["model"], *size, freeze_text=freeze_text)
    back = from_cerebras_config({"trainer": {"init": {"backend": {"backend_type": "CSX"}, "model": part}, "fit": {}}})
    wanted = _without_ids(row["text"]) | {"tune_mm_mlp_adapter": freeze_text}
    assert back.llava_fields == wanted
    assert back.clip_fields == row["image"]
    assert "fp16_type" in back.notes[0]


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("image_model_list", "image_models"), "twice", "2 vision encoders"),
        (("image_model_list", "image_models", 0, "projection_layer"), {"input_unit": 32}, "projection_layer"),
        (("image_model_list", "image_models", 0, "image_encoder", "image_layer_idx"), None, "image_layer_idx"),
        (("image_model_list", "image_models", 0, "image_encoder", "use_post_embed_layer_norm"), False, "post_embed"),
        (("image_model_list", "global_image_projection", "layers_activation"), ["relu", None], "layers_activation"),
        (("image_model_list", "global_image_projection", "layers_units"), [32, 64], "layers_units"),
        (("text_model", "extra_ffn_params"), {"static_dual_expert": True}, "static_dual_expert"),
        (("text_model", "constant_pos_embedding"), 7, "constant_pos_embedding"),
        (("text_model", "position_embedding_type"), "learned", "position_embedding_type"),
        (("text_model", "norm_type"), "layernorm", "norm_type"),
        (("text_model", "num_heads"), "four", "num_heads"),
        (("text_model", "hidden_size"), 0, "hidden_size"),
        (("text_model", "rotary_dim"), 8, "rotary_dim"),
        (("text_model",), None, "text_model"),
        (("lora_params",), {"r": 8}, "r"),
    ],
)
def test_what_llava_cannot_hold_is_refused_by_name(where: tuple[Any, ...], value: Any, words: str) -> None:
    config = copy.deepcopy(PAIRS["mmsimple-2.9"]["cs"])
    place = config["model"]
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = place[where[-1]] * 2 if value == "twice" else value
    with pytest.raises(ModelError, match=words):
        from_cerebras_config(config)


def test_releases() -> None:
    llava, clip = fields()
    old, new = (to_cerebras_config(llava, clip, release)["model"] for release in ("2.3", "cs-2.4"))
    assert "image_model" in old["image_model_list"]["image_models"][0]
    assert "image_encoder" in new["image_model_list"]["image_models"][0]
    newest = to_cerebras_config(llava, clip, "cs-2.10", "mm_simple")["model"]
    assert "label_smoothing" not in newest
    assert "norm_first" not in newest["text_model"]
    for release, model in (("2.2", "mmsimple-llava"), ("2.11", "llava"), ("hf", "llava"), ("2.2.1", "llava")):
        with pytest.raises(ModelError, match="known: cs-2"):
            to_cerebras_config(llava, clip, release, model)
    with pytest.raises(ModelError, match="mm_simple"):
        to_cerebras_config(llava, clip, "2.9", "mmsimple")


def test_a_whole_clip_config_is_the_encoder_in_it() -> None:
    llava, clip = fields()
    whole = {"model_type": "clip", "projection_dim": 99, "text_config": {"hidden_size": 1}, "vision_config": clip}
    assert to_cerebras_config(llava, whole, "2.9") == to_cerebras_config(llava, clip, "2.9")
