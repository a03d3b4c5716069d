"""Vision encoders as OpenCLIP saves them: `open_clip_config.json` beside `open_clip_pytorch_model.bin` or safetensors.

Such a folder holds a whole dual encoder under names of its own, with query, key and value in one matrix. Here its
vision half is read as transformers' CLIP: the same numbers under other names. An architecture that CLIP's classes
can't hold (convolutions, layer scale, pooling by attention) is refused by the name of its setting.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, CLIPVisionConfig, PreTrainedModel

from lapilli.base.errors import ModelError
from lapilli.base.layout import ImageMode
from lapilli.checkpoint.stream import Tensors, open_file
from lapilli.checkpoint.tensors import check_tensors, read_json, weight_file

log = logging.getLogger(__name__)

FILE = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_VISUAL = "visual."
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_BLOCK_NAMES = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_LEFT_OUT = ("proj",)
"""The projection into the space that pictures share with texts, which comes after every layer."""
_NO_EFFECT = frozenset((
    "patch_dropout", "pool_type", "final_ln_after_pool", "output_tokens", "pos_embed_type", "attn_pooler_queries",
    "attn_pooler_heads", "timm_pool", "timm_proj", "timm_model_pretrained", "timm_proj_bias", "timm_drop",
    "timm_drop_path", "global_average_pool",
))  # fmt: skip
_SIZES = frozenset(("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"))
_INTERPOLATION = {"bilinear": 2, "bicubic": 3}
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def is_open_clip(folder: Path) -> bool:
    """Whether the folder holds an encoder in OpenCLIP's layout and not in transformers' too."""
    if not (folder / FILE).is_file():
        return False
    theirs = (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json")
    return not (theirs and weight_file(folder) is not None)


def read_open_clip_config(folder: Path) -> CLIPVisionConfig:
    """The vision half's configuration. Raises ModelError naming a setting that transformers' CLIP has no place for."""
    model, vision = _settings(folder)
    where = folder / FILE
    _refuse_foreign(where, vision)
    sizes = {key: vision.get(key, default) for key, default in (("head_width", 64), ("mlp_ratio", 4.0))}
    width, layers = _whole(where, vision, "width"), _whole(where, vision, "layers")
    heads = width // int(sizes["head_width"])
    if heads * int(sizes["head_width"]) != width:
        raise ModelError(f"{where}: vision_cfg.width {width} is no multiple of head_width {sizes['head_width']}")
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * sizes["mlp_ratio"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=_whole(where, vision, "image_size"),
        patch_size=_whole(where, vision, "patch_size"),
        hidden_act=_activation(model, vision),
        layer_norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        projection_dim=int(model.get("embed_dim", 512)),
    )


def open_encoder(folder: Path) -> Tensors:
    """The vision half's tensors under transformers' names (without `vision_model.`); nothing but headers is read.

    Raises ModelError if weights are missing, broken, or have names that transformers' CLIP has no place for.
    """
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"{folder}: {FILE} is here but no weights ({' or '.join(_WEIGHTS)}); copy them here")
    made: Tensors = {}
    rest = 0
    for name, tensor in open_file(file).items():
        if not name.startswith(_VISUAL) or name.removeprefix(_VISUAL) in _LEFT_OUT:
            rest += 1
            continue
        for ours, part in _renamed(file, name.removeprefix(_VISUAL)):
            if part is None:
                made[ours] = tensor
            else:
                made[ours] = tensor.then(_third(part), shape=(tensor.shape[0] // 3, *tensor.shape[1:]))
    if not made:
        raise ModelError(f"{file}: has no tensors named {_VISUAL}*; not an OpenCLIP model")
    log.info("%s: the vision half is read; %d tensors of the text half and of the projections are not", file, rest)
    return made


def read_encoder(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The vision half as transformers' CLIPVisionModel, in `dtype` (`auto`: as stored).

    Raises ModelError naming tensors that are missing, left over, or of a shape that the configuration doesn't give.
    """
    tensors, config = open_encoder(folder), read_open_clip_config(folder)
    chosen = next(iter(tensors.values())).dtype if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        empty: Any = AutoModel.from_config(config)
    # Some versions of transformers have one level more.
    level = "vision_model." if any(name.startswith("vision_model.") for name in empty.state_dict()) else ""
    state = {level + name: tensor.read() for name, tensor in tensors.items()}
    check_tensors(folder, "vision encoder", state, empty)
    return type(empty).from_pretrained(None, config=config, state_dict=state, dtype=chosen).eval()


def image_fields(folder: Path, mode: ImageMode) -> dict[str, Any]:
    """What OpenCLIP does to a picture, in the words of transformers' CLIP image processor.

    Raises ModelError for a resize that it has no word for.
    """
    where = folder / FILE
    _, vision = _settings(folder)
    settings = read_json(where).get("preprocess_cfg") or {}
    edge = _whole(where, vision, "image_size")
    interpolation = settings.get("interpolation", "bicubic")
    resize = settings.get("resize_mode", "shortest")
    if interpolation not in _INTERPOLATION:
        raise ModelError(
            f"{where}: preprocess_cfg.interpolation {interpolation!r} is not known; bicubic and bilinear are"
        )
    if resize not in ("shortest", "squash") and not (resize == "longest" and mode != "square"):
        raise ModelError(
            f"{where}: preprocess_cfg.resize_mode {resize!r} can't be followed with image mode {mode}; "
            "use --image-mode pad"
        )
    square = {"height": edge, "width": edge}
    return {
        "do_resize": True,
        "size": square if resize == "squash" else {"shortest_edge": edge},
        "resample": _INTERPOLATION[interpolation],
        "do_center_crop": resize != "squash",
        "crop_size": square,
        "image_mean": list(settings.get("mean", _MEAN)),
        "image_std": list(settings.get("std", _STD)),
    }


# ---- settings ---------------------------------------------------------------------------------------------------


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and its `vision_cfg`."""
    where = folder / FILE
    model = read_json(where).get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vision, dict):
        raise ModelError(f"{where}: not an OpenCLIP configuration: model_cfg.vision_cfg is missing")
    return model, vision


def _whole(where: Path, vision: Mapping[str, Any], key: str) -> int:
    """A size; OpenCLIP's own defaults are those of ViT-B/16 at 224."""
    value = vision.get(key, {"layers": 12, "width": 768, "patch_size": 16, "image_size": 224}[key])
    if isinstance(value, list) and len(set(value)) == 1 and key.endswith("_size"):
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{where}: vision_cfg.{key} is {value!r}; only plain square ViTs are read, not ResNets")
    return value


def _refuse_foreign(where: Path, vision: Mapping[str, Any]) -> None:
    known = _SIZES | _NO_EFFECT | {"act_kwargs", "norm_kwargs"}
    foreign = sorted(key for key, value in vision.items() if key not in known and value)
    odd = sorted(
        f"{key}.{inner}"
        for key, good in (("act_kwargs", "approximate"), ("norm_kwargs", "eps"))
        for inner in (vision.get(key) or {})
        if inner != good
    )
    if foreign or odd:
        raise ModelError(
            f"{where}: vision_cfg.{(foreign + odd)[0]}: transformers' CLIP has no place for such an encoder"
        )


def _activation(model: Mapping[str, Any], vision: Mapping[str, Any]) -> str:
    if model.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_pytorch_tanh" if (vision.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"


# ---- names ------------------------------------------------------------------------------------------------------


def _renamed(file: Path, name: str) -> list[tuple[str, int | None]]:
    """transformers' names for one of OpenCLIP's, each with the third of the tensor that is meant (None: all of it)."""
    if name in _NAMES:
        return [(_NAMES[name], None)]
    block = _BLOCK.fullmatch(name)
    if block is not None:
        layer, rest = f"encoder.layers.{block[1]}", block[2]
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.rsplit("_", 1)[1]
            return [(f"{layer}.self_attn.{part}_proj.{kind}", third) for third, part in enumerate("qkv")]
        stem, _, kind = rest.rpartition(".")
        if stem in _BLOCK_NAMES:
            return [(f"{layer}.{_BLOCK_NAMES[stem]}.{kind}", None)]
    raise ModelError(f"{file}: {_VISUAL}{name}: transformers' CLIP has no place for this tensor")


def _third(part: int) -> Any:
    return lambda tensor: tensor.chunk(3)[part]
