"""A checkpoint in LLaVA's own layout, with everything that its folder leaves open.

Such a folder holds the language model and the projector; the vision encoder mostly lies elsewhere, the image token
has no row of its own, and nothing says which template the model was trained with. Each is settled here, aloud.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lapilli.assemble import parts
from lapilli.assemble.build import generation_config, where_it_fits
from lapilli.assemble.folder import FolderSpec, joined_fields, read_spec
from lapilli.assemble.opening.model import Format, Notes, OpenModel
from lapilli.assemble.opening.parts import empty_model, open_encoder, settle_ties
from lapilli.assemble.vocabulary import IMAGE_TOKEN, add_tokens
from lapilli.base.errors import ModelError
from lapilli.base.version import VERSION
from lapilli.checkpoint import hf, llava, names
from lapilli.checkpoint.llava import LlavaSettings
from lapilli.checkpoint.stream import Tensors, open_folder
from lapilli.data.image import ImageSpec
from lapilli.data.template import IM_END, IM_START, get_template
from lapilli.data.tokenizer import load_tokenizer
from lapilli.model.config import LapilliConfig
from lapilli.model.language import probe_language
from lapilli.model.vision import VisionGeometry, probe_vision, resolve_layers, vision_part

DEFAULT_TEMPLATE = {"mpt": "mpt"}
"""What folders that don't say theirs were trained with, by kind of language model; else LLaVA-1.5's vicuna_v1."""

IM_PATCH = "<im_patch>"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Tower:
    """A vision encoder as it lies somewhere: what is known of it before its weights are read."""

    place: str
    config: PreTrainedConfig
    image: ImageSpec
    geometry: VisionGeometry


def open_llava(folder: Path, template: str | None) -> OpenModel:
    """Open a whole LLaVA checkpoint. Raises ModelError for anything that can't be read or has no place.

    `template` is the one the model was trained with; without it the original's is taken, with a warning.
    """
    settings = llava.read_settings(folder / "config.json", llava.read_fields(folder))
    notes = Notes()
    tokenizer = load_tokenizer(folder)
    tensors, computed = names.canonical(open_folder(folder), names.llava_name)
    if computed:
        notes.info(f"{folder}: {names.said(computed)}")
    return assembled(folder, "llava", settings, tensors, tokenizer, template, notes)


def assembled(
    folder: Path,
    kind: Format,
    settings: LlavaSettings,
    tensors: Tensors,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    notes: Notes,
    tower: Tower | None = None,
) -> OpenModel:
    """Make a whole of what a LLaVA folder holds: find its encoder, and say what the folder leaves open.

    `tensors` are canonical; the encoder's may be among them, and are if `tower` is given.
    """
    where = folder / "config.json"
    bound = _template(folder, settings, template, notes).bind(tokenizer)
    image_id = _image_token(where, settings, tokenizer)
    vision_place = str(folder)
    if tower is None:
        tower = find_tower(folder, settings, notes)
        tensors, vision_place = _with_encoder(folder, settings, tower, tensors, notes)
    causal = empty_model(AutoModelForCausalLM, settings.language, where)
    said = settle_ties(settings.language, causal, tensors, where)
    if said:
        notes.warn(said)
    config = _joined_config(settings, tower, image_id)
    if not config.image_newline and tensors.pop(names.NEWLINE, None) is not None:
        mode = config.image_layout.mode
        notes.warn(f"{folder}: model.image_newline is left out: image_aspect_ratio {mode} has no use for it")
    if config.image_newline and names.NEWLINE not in tensors:
        raise ModelError(f"{folder}: image_aspect_ratio anyres needs a model.image_newline, which is not there")
    table = next((t for name, t in tensors.items() if name.startswith(names.LANGUAGE)), None)
    config.dtype = None if table is None else table.dtype
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
        trained_rows=settings.language.get_text_config().vocab_size,
        settings=dict(settings.beyond),
    )
    tokenizer.chat_template = spec.chat_template()
    places = {"vision": vision_place, "projector": str(folder), "language": str(folder)}
    ends = generation_config(_own_generation(folder, settings.language), tokenizer, bound, image_id)
    return OpenModel(folder, kind, config, tensors, tokenizer, spec, ends, notes, places)


def _own_generation(folder: Path, language: PreTrainedConfig) -> GenerationConfig:
    """What the folder, or else the language model's configuration, says of where answers end."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(language)


def _template(folder: Path, settings: LlavaSettings, template: str | None, notes: Notes) -> Any:
    said = read_spec(folder, foreign=True)
    if template is None and said is not None:
        return said.template
    if template is None:
        template = DEFAULT_TEMPLATE.get(settings.language.model_type, "vicuna_v1")
        notes.warn(
            f"{folder}: a LLaVA checkpoint does not say which template it was trained with; {template} is taken. If "
            'that is wrong, name the right one: lapilli.load(..., template="..."), or --template'
        )
    return get_template(template)


def _image_token(where: Path, settings: LlavaSettings, tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the image token, in memory, after those that the checkpoint itself was trained with; return its id."""
    vocabulary = tokenizer.get_vocab()
    rows = settings.language.get_text_config().vocab_size
    wanted = {
        "mm_use_im_start_end": (IM_START, IM_END) if settings.im_start_end else (),
        "mm_use_im_patch_token": (IM_PATCH,) if settings.im_patch else (),
    }
    for setting, tokens in wanted.items():
        for token in tokens:
            if vocabulary.get(token, rows) >= rows:
                raise ModelError(
                    f"{where}: says {setting}, but the tokenizer has no {token} among the model's {rows} "
                    "rows; copy the tokenizer files of the checkpoint itself (added_tokens.json too) here"
                )
    return add_tokens(tokenizer, im_start_end=settings.im_start_end).image_token_id


# ---- the vision encoder -----------------------------------------------------------------------------------------


def find_tower(folder: Path, settings: LlavaSettings, notes: Notes) -> Tower:
    """Find the encoder that config.json names: a folder (seen from the checkpoint) or a name on the Hub."""
    name = settings.vision_tower
    place = str(folder / name) if (folder / name).is_dir() else name
    try:
        if not Path(place).is_dir() and not _HUB_NAME.fullmatch(name):
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
        notes.warn(f"{place} brings no image processor: pictures get CLIP's mean and deviation")
    return Tower(place, config, images.spec, geometry_of(place, config, images.spec))


def geometry_of(place: str, config: PreTrainedConfig, image: ImageSpec) -> VisionGeometry:
    """An encoder's geometry. Raises ModelError for one without the one class token that LLaVA's layout means."""
    geometry = probe_vision(config, image.tile_size)
    if geometry.prefix_tokens != 1:
        raise ModelError(
            f"{place}: makes {geometry.prefix_tokens} tokens before the patches; LLaVA's layout means an encoder with "
            "one class token, which it drops (patch) or keeps (cls_patch)"
        )
    return geometry


def _joined_config(settings: LlavaSettings, tower: Tower, image_id: int) -> LapilliConfig:
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


def _with_encoder(
    folder: Path, settings: LlavaSettings, tower: Tower, tensors: Tensors, notes: Notes
) -> tuple[Tensors, str]:
    """The tensors with the encoder's: the checkpoint's own where it was trained, else as they lie at its place.

    Untrained encoders are in many checkpoints too, as DeepSpeed saves them; the original doesn't read those.
    """
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(names.VISION)}
    others = {name: tensor for name, tensor in tensors.items() if name not in inside}
    if settings.vision_tuned and inside:
        notes.info(f"{folder}: vision encoder: the {len(inside)} tensors of the checkpoint, where it was trained")
        return tensors, str(folder)
    if settings.vision_tuned:
        notes.warn(f"{folder}: says that its vision encoder was trained, but does not hold it: {tower.place} is taken")
    try:
        encoder, more = open_encoder(tower.place, tower.config)
    except ModelError as error:
        if not inside:
            raise
        notes.warn(f"{error}; the {len(inside)} tensors in {folder} are used for it")
        return tensors, str(folder)
    if more:
        notes.info(f"{tower.place}: {more}")
    note = f"; {len(inside)} tensors of it in the checkpoint are not read" if inside else ""
    notes.info(f"{folder}: vision encoder: {tower.place}{note}")
    return others | encoder, tower.place
