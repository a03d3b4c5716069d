"""A checkpoint in LLaVA's own layout becomes a model with its tokenizer and everything a folder says.

Such a folder holds the language model and the projector; the vision encoder mostly lies elsewhere, the image token
has no row of its own, and nothing says which template the model was trained with. Each is settled here, aloud.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lapilli.assemble import parts
from lapilli.assemble.build import generation_config, where_it_fits
from lapilli.assemble.folder import FolderSpec, joined_fields
from lapilli.assemble.vocabulary import IMAGE_TOKEN, add_tokens
from lapilli.base.errors import ModelError
from lapilli.base.version import VERSION
from lapilli.checkpoint import hf, llava
from lapilli.checkpoint.llava import LlavaSettings, LlavaWeights
from lapilli.checkpoint.tensors import check_tensors
from lapilli.data.image import ImageSpec
from lapilli.data.template import IM_END, IM_START, get_template
from lapilli.data.tokenizer import load_tokenizer
from lapilli.model.config import LapilliConfig
from lapilli.model.language import probe_language
from lapilli.model.vision import VisionGeometry, probe_vision, resolve_layers, vision_part
from lapilli.model.vlm import VisionLanguageModel

log = logging.getLogger(__name__)

DEFAULT_TEMPLATE = "vicuna_v1"
"""LLaVA-1.5's, for folders that don't say theirs."""

_IM_PATCH = "<im_patch>"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def read_llava(
    folder: Path, dtype: torch.dtype, template: str | None
) -> tuple[VisionLanguageModel, PreTrainedTokenizerBase, FolderSpec]:
    """Read a LLaVA checkpoint, in `dtype`. Raises ModelError for anything that can't be read or has no place.

    `template` is the one the model was trained with; without it vicuna_v1 is taken, with a warning.
    """
    settings = llava.read_settings(folder)
    bound = get_template(template or DEFAULT_TEMPLATE)
    if template is None:
        log.warning(
            "%s: a LLaVA checkpoint does not say which template it was trained with; %s is taken. If that is wrong, "
            'name the right one: lapilli.load(..., template="..."), or --template',
            folder,
            DEFAULT_TEMPLATE,
        )
    tokenizer = load_tokenizer(folder)
    bound = bound.bind(tokenizer)
    image_id = _image_token(folder, settings, tokenizer)
    tower = _find_tower(folder, settings)
    config = _joined_config(settings, tower, image_id)
    weights = llava.read_weights(folder)
    language: Any = llava.make_part(folder, AutoModelForCausalLM, settings.language, weights.language, dtype)
    if (folder / "generation_config.json").is_file():
        language.generation_config = GenerationConfig.from_pretrained(folder)
    language.generation_config = generation_config(language, tokenizer, bound, image_id)
    encoder = _vision_encoder(folder, settings, weights, tower, dtype)
    model = _join(folder, config, encoder, language, weights, dtype)
    why_not = where_it_fits(config, tower.image)
    spec = FolderSpec(
        written_by=f"lapilli {VERSION}",
        stored_as="lapilli" if why_not else "transformers",
        stored_because=why_not,
        template=bound,
        image=tower.image,
        image_token=IMAGE_TOKEN,
        im_start_end=settings.im_start_end,
        joined=joined_fields(config),
    )
    tokenizer.chat_template = spec.chat_template()
    return model, tokenizer, spec


def _image_token(folder: Path, settings: LlavaSettings, tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the image token, in memory, after those that the checkpoint itself was trained with; return its id."""
    vocabulary = tokenizer.get_vocab()
    rows = settings.language.get_text_config().vocab_size
    wanted = {
        "mm_use_im_start_end": (IM_START, IM_END) if settings.im_start_end else (),
        "mm_use_im_patch_token": (_IM_PATCH,) if settings.im_patch else (),
    }
    for setting, tokens in wanted.items():
        for token in tokens:
            if vocabulary.get(token, rows) >= rows:
                raise ModelError(
                    f"{folder}: config.json says {setting}, but the tokenizer has no {token} among the model's {rows} "
                    "rows; copy the tokenizer files of the checkpoint itself (added_tokens.json too) here"
                )
    return add_tokens(tokenizer, im_start_end=settings.im_start_end).image_token_id


@dataclass(frozen=True)
class _Tower:
    """A vision encoder as it lies somewhere: what is known of it before its weights are read."""

    place: str
    config: PreTrainedConfig
    image: ImageSpec
    geometry: VisionGeometry


def _find_tower(folder: Path, settings: LlavaSettings) -> _Tower:
    """Find the encoder that config.json names: a folder (seen from the checkpoint) or a name on the Hub."""
    name = settings.vision_tower
    place = str(folder / name) if (folder / name).is_dir() else name
    try:
        if place == name and not _HUB_NAME.fullmatch(name):
            raise ModelError("no such folder")
        config = vision_part(parts.read_config(place, "vision encoder"))
    except ModelError as error:
        raise ModelError(
            f"{folder}: its vision encoder {name} can't be found ({error}); write the encoder's folder as "
            "mm_vision_tower into config.json (where the checkpoint holds the encoder's weights, the encoder's "
            "config.json and preprocessor_config.json are enough there)"
        ) from error
    images = parts.read_image_settings(place, config, settings.mode, "exact")
    if images.assumed:
        log.warning("%s brings no image processor: pictures get CLIP's mean and deviation", place)
    geometry = probe_vision(config, images.spec.tile_size)
    if geometry.prefix_tokens != 1:
        raise ModelError(
            f"{place}: makes {geometry.prefix_tokens} tokens before the patches; LLaVA's layout means an encoder with "
            "one class token, which it drops (patch) or keeps (cls_patch)"
        )
    return _Tower(place, config, images.spec, geometry)


def _joined_config(settings: LlavaSettings, tower: _Tower, image_id: int) -> LapilliConfig:
    geometry = tower.geometry
    resolve_layers([settings.feature_layer], tower.config.num_hidden_layers)
    layout = hf.layout_of(geometry, settings.mode, settings.feature_select, settings.pinpoints)
    traits = probe_language(settings.language)
    return LapilliConfig(
        vision_config=tower.config,
        text_config=settings.language,
        projector=settings.projector,
        feature_layers=[settings.feature_layer],
        feature_select=settings.feature_select,
        prefix_tokens=geometry.prefix_tokens,
        flat_patches=geometry.flat_patches,
        layout=layout.model_dump(mode="json"),
        image_token_id=image_id,
        image_newline=settings.mode == "anyres",
        image_row=image_id < settings.language.get_text_config().vocab_size,
        packing=traits.packing,
        head=traits.head,
    )


def _vision_encoder(
    folder: Path, settings: LlavaSettings, weights: LlavaWeights, tower: _Tower, dtype: torch.dtype
) -> PreTrainedModel:
    """The encoder with the checkpoint's own weights where it was trained, else as it lies at its place.

    Untrained encoders are in many checkpoints too, as DeepSpeed saves them; the original doesn't read those.
    """
    inside = len(weights.vision)
    if settings.vision_tuned and inside:
        log.info("%s: vision encoder: the %d tensors of the checkpoint, where it was trained", folder, inside)
        return llava.make_part(folder, AutoModel, tower.config, weights.vision, dtype)
    if settings.vision_tuned:
        log.warning(
            "%s: says that its vision encoder was trained, but does not hold it: %s is taken", folder, tower.place
        )
    try:
        encoder = parts.read_vision_encoder(tower.place, dtype)
    except ModelError as error:
        if not inside:
            raise
        log.warning("%s; the %d tensors in %s are used for it", error, inside, folder)
        return llava.make_part(folder, AutoModel, tower.config, weights.vision, dtype)
    note = f"; {inside} tensors of it in the checkpoint are not read" if inside else ""
    log.info("%s: vision encoder: %s%s", folder, tower.place, note)
    return encoder


def _join(
    folder: Path,
    config: LapilliConfig,
    encoder: PreTrainedModel,
    language: PreTrainedModel,
    weights: LlavaWeights,
    dtype: torch.dtype,
) -> VisionLanguageModel:
    config.vision_config, config.text_config, config.dtype = encoder.config, language.config, dtype
    with torch.device("meta"):
        model = VisionLanguageModel(config, encoder, language)
    check_tensors(folder, "projector", weights.projector, model.projector)
    model.projector.load_state_dict({k: v.to(dtype) for k, v in weights.projector.items()}, assign=True)
    newline = weights.newline
    if config.image_newline:
        if newline is None or newline.shape != (model.hidden_size,):
            raise ModelError(f"{folder}: image_aspect_ratio anyres needs a model.image_newline of {model.hidden_size}")
        model.image_newline = torch.nn.Parameter(newline.to(dtype))
    elif newline is not None:
        mode = config.image_layout.mode
        log.warning("%s: model.image_newline is left out: image_aspect_ratio %s has no use for it", folder, mode)
    return model.eval()
