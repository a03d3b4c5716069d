"""transformers' own layout: folders that load there, in vLLM and in SGLang with nothing of ours installed.

A joined model is moved into transformers' `Llava` classes by handing over the parts themselves; no tensor is copied,
and keys, shards and config.json are written by transformers. Whether its class can hold a model is
not looked up but tried, on small random copies of the parts.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from lapilli.base.errors import ModelError
from lapilli.base.layout import ImageLayout
from lapilli.checkpoint.names import vision_prefix
from lapilli.model.config import LapilliConfig
from lapilli.model.language import probe_language
from lapilli.model.shrink import SHRINK_ERRORS, shrunken
from lapilli.model.vision import VisionGeometry, native_size, probe_vision
from lapilli.model.vlm import VisionLanguageModel

MODEL_TYPES = ("llava", "llava_next")

_TOLERANCE = 1e-4


def _strategy(config: LapilliConfig) -> str | None:
    """transformers' name for the kept tokens; None if it has none (more than one token before the patches)."""
    if config.feature_select == "cls_patch" or config.prefix_tokens == 0:
        return "full"
    return "default" if config.prefix_tokens == 1 else None


def to_hf_config(config: LapilliConfig) -> LlavaConfig | LlavaNextConfig:
    """Write a joined model's configuration as transformers' `llava` or `llava_next`."""
    layers = config.feature_layers
    common: dict[str, Any] = {
        # Copies: transformers writes settings of its own model into the configurations that it is given.
        "vision_config": copy.deepcopy(config.vision_config),
        "text_config": copy.deepcopy(config.text_config),
        "image_token_index": config.image_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": _strategy(config),
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "tie_word_embeddings": bool(getattr(config.text_config, "tie_word_embeddings", False)),
    }
    layout = config.image_layout
    if layout.mode == "anyres":
        # transformers writes canvas sizes as (height, width).
        pinpoints = [[height, width] for width, height in layout.pinpoints]
        made: Any = LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
    else:
        made = LlavaConfig(**common, image_seq_length=layout.tokens_per_tile)
    made.dtype = config.dtype
    return made


def to_hf(model: VisionLanguageModel) -> PreTrainedModel:
    """Return a transformers model that shares this model's parts.

    Raises ModelError if a part is not of the class that transformers would build for it.
    """
    made: Any = to_hf_config(model.config)
    cls: Any = LlavaNextForConditionalGeneration if made.model_type == "llava_next" else LlavaForConditionalGeneration
    with torch.device("meta"):
        hf: Any = cls(made)
    language: Any = model.language_model
    for theirs, ours in ((hf.model.vision_tower, model.vision_encoder), (hf.model.language_model, language.base_model)):
        if type(theirs) is not type(ours):
            raise ModelError(
                f"transformers would build {type(theirs).__name__} where the model has {type(ours).__name__}"
            )
    output = language.get_output_embeddings()
    if getattr(output, "bias", None) is not None:
        raise ModelError("transformers' class has an output layer without bias, the language model's has one")
    projector: Any = model.projector
    hf.model.vision_tower, hf.model.language_model, hf.lm_head = model.vision_encoder, language.base_model, output
    hf.model.multi_modal_projector.linear_1, hf.model.multi_modal_projector.linear_2 = projector[0], projector[2]
    if model.config.image_newline:
        hf.model.image_newline = model.image_newline
    if language.generation_config is not None:
        hf.generation_config = language.generation_config
    return hf.train(model.training)


def why_not_hf(config: LapilliConfig) -> str | None:
    """Return None if transformers' class can hold models of this configuration, else the reason why not.

    A small random model with the same parts is run in both classes and its logits are compared.
    """
    if config.projector != "mlp2x_gelu":
        return f"its class has a two-layer projector, not {config.projector}"
    if _strategy(config) is None:
        return f"it drops one token before the patches, the encoder makes {config.prefix_tokens}"
    if config.flat_patches:
        return "it gives the vision encoder pictures, this one takes patches with their shapes"
    if config.head != "direct":
        return "the language model scales or caps its logits, which its class leaves out"
    if config.feature_select == "cls_patch" and config.image_layout.mode == "anyres":
        return "it cuts anyres tiles by patches only"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            small = _small_model(config)
            hf = to_hf(small).eval()
            inputs = _small_inputs(small)
            ours = small(**inputs).logits
            theirs = hf(**_hf_inputs(inputs, small.layout)).logits
        except (*SHRINK_ERRORS, ModelError) as error:
            return str(error).splitlines()[0]
    difference = float((ours - theirs).abs().max() / ours.std())
    return None if difference < _TOLERANCE else f"its class gives other logits (by {difference:.1e})"


def _small_model(config: LapilliConfig) -> VisionLanguageModel:
    vision: Any = shrunken(config.vision_config, AutoModel.from_config, seed=1)
    text: Any = shrunken(config.text_config, AutoModelForCausalLM.from_config, seed=2)
    small = LapilliConfig(
        vision_config=vision.config,
        text_config=text.config,
        projector=config.projector,
        feature_layers=[-2 - i for i in range(len(config.feature_layers))],
        feature_select=config.feature_select,
        prefix_tokens=config.prefix_tokens,
        flat_patches=config.flat_patches,
        layout=config.layout,
        image_token_id=1,
        image_newline=config.image_newline,
        packing=config.packing,
        head=config.head,
    )
    return VisionLanguageModel(small, vision, text).eval()


def _small_inputs(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    layout, width, height = model.layout, 50, 40
    ids = [2, 3, *([model.config.image_token_id] * layout.tokens(width, height)), 4, 5, 6]
    channels = getattr(model.config.vision_config, "num_channels", 3)
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.rand(layout.tiles(width, height), channels, layout.tile_height, layout.tile_width),
        "tiles_per_image": torch.tensor([layout.tiles(width, height)]),
        "image_sizes": torch.tensor([[width, height]]),
    }


def _hf_inputs(inputs: dict[str, torch.Tensor], layout: ImageLayout) -> dict[str, torch.Tensor]:
    """The same inputs as transformers' classes take them: one picture's tiles stacked, sizes as (height, width)."""
    if layout.mode == "anyres":
        sizes = inputs["image_sizes"].flip(-1)
        return {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"][None], "image_sizes": sizes}
    return {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}


def save_hf(model: VisionLanguageModel, folder: Path, *, shard_size: str = "5GB") -> None:
    """Write config.json, generation_config.json and safetensors as transformers itself writes them.

    But tensors of CLIP and SigLIP keep the names that released folders give them, which begin with `vision_model.`:
    newer versions of transformers leave that out when they write, and what follows its names (vLLM, SGLang) then finds
    no encoder.
    """
    hf: Any = to_hf(model)
    named = vision_prefix(model.config.vision_config).rstrip(".")
    if named:
        tower = torch.nn.Module()
        tower.add_module(named, hf.model.vision_tower)
        hf.model.vision_tower = tower
    hf.save_pretrained(folder, max_shard_size=shard_size)


def from_hf_config(config: Any, tile: tuple[int, int] | None = None, mode: str | None = None) -> LapilliConfig:
    """Read transformers' `llava` or `llava_next` configuration as a joined model's.

    `tile` (height, width) is the size of the pictures the processor makes; by default the encoder's own.
    """
    geometry = probe_vision(config.vision_config, tile or native_size(config.vision_config))
    traits = probe_language(config.text_config)
    layers = config.vision_feature_layer
    select = (
        "patch" if config.vision_feature_select_strategy == "default" or geometry.prefix_tokens == 0 else "cls_patch"
    )
    anyres = config.model_type == "llava_next"
    pinpoints = tuple((int(w), int(h)) for h, w in config.image_grid_pinpoints) if anyres else ()
    layout = layout_of(geometry, "anyres" if anyres else (mode or "square"), select, pinpoints)
    made = LapilliConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        feature_layers=[layers] if isinstance(layers, int) else list(layers),
        feature_select=select,
        prefix_tokens=geometry.prefix_tokens,
        flat_patches=geometry.flat_patches,
        layout=layout.model_dump(mode="json"),
        image_token_id=config.image_token_id,
        image_newline=anyres,
        packing=traits.packing,
        head=traits.head,
    )
    made.dtype = config.dtype
    return made


def layout_of(
    geometry: VisionGeometry, mode: Any, select: str, pinpoints: tuple[tuple[int, int], ...] = ()
) -> ImageLayout:
    """The image layout that an encoder's geometry gives in an image mode."""
    return ImageLayout(
        mode=mode,
        tile_height=geometry.tile_height,
        tile_width=geometry.tile_width,
        grid_height=geometry.grid_height,
        grid_width=geometry.grid_width,
        extra_tokens=geometry.prefix_tokens if select == "cls_patch" else 0,
        pinpoints=pinpoints,
    )
