"""The parts a model is built from, read from their own Hugging Face folders or names.

Every weight must be there: a part that would start with invented weights is refused. Remote code is never run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from lapilli.base.errors import ModelError
from lapilli.base.layout import ImageMode
from lapilli.checkpoint import open_clip
from lapilli.data.image import ImageSpec
from lapilli.data.tokenizer import refuse_missing_path
from lapilli.model.vision import native_size, vision_part

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageSettings:
    """What happens to pictures, and whether it was found beside the encoder or had to be assumed."""

    spec: ImageSpec
    assumed: bool


def read_config(name_or_path: str, part: str) -> PreTrainedConfig:
    """Read the configuration of a part. Raises ModelError that says what was looked for and where."""
    refuse_missing_path(name_or_path, f"{part} ")
    if open_clip.is_open_clip(Path(name_or_path)):
        return open_clip.read_open_clip_config(Path(name_or_path))
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        what = "no Hugging Face model there" if Path(name_or_path).exists() else "neither a folder nor on the Hub"
        raise ModelError(f"{part} {name_or_path}: {what} ({reason})") from error


def read_image_settings(name_or_path: str, config: PreTrainedConfig, mode: ImageMode, backend: Any) -> ImageSettings:
    """Read what the encoder's own image processor does; an encoder that brings none gets CLIP's normalisation."""
    if open_clip.is_open_clip(Path(name_or_path)):
        fields = open_clip.image_fields(Path(name_or_path), mode)
        return ImageSettings(ImageSpec.from_processor_config(fields, mode, backend), assumed=False)
    try:
        found = AutoImageProcessor.from_pretrained(name_or_path, backend="pil").to_dict()
    except (OSError, ValueError, KeyError):
        height, width = native_size(config)
        spec = ImageSpec(mode=mode, backend=backend, size=(height, width), mean=CLIP_MEAN, std=CLIP_STD)
        return ImageSettings(spec, assumed=True)
    return ImageSettings(ImageSpec.from_processor_config(found, mode, backend), assumed=False)


def read_vision_encoder(name_or_path: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a vision encoder; of a dual encoder (CLIP, SigLIP, OpenCLIP's folders) its vision half."""
    if open_clip.is_open_clip(Path(name_or_path)):
        return open_clip.read_encoder(Path(name_or_path), dtype)
    config = vision_part(read_config(name_or_path, "vision encoder"))
    return _load(AutoModel, name_or_path, "vision encoder", config=config, dtype=dtype)


def read_language_model(name_or_path: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a causal language model."""
    return _load(AutoModelForCausalLM, name_or_path, "language model", dtype=dtype)


def _load(auto: Any, name_or_path: str, part: str, **kwargs: Any) -> PreTrainedModel:
    try:
        model, info = auto.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{part} {name_or_path}: can't be loaded ({str(error).splitlines()[0]})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{part} {name_or_path}: {len(missing)} weights are missing, among them {missing[0]}; "
            "they would be random (is this the right folder, and is every shard there?)"
        )
    return model


def count_parameters(config: PreTrainedConfig, auto: Any) -> int:
    """Parameters of a part, counted without weights (tied ones once)."""
    with torch.device("meta"):
        return sum(p.numel() for p in auto.from_config(config).parameters())
