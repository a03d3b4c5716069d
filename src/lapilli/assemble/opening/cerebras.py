"""Cerebras' models, opened as the LLaVA models that they are.

Their configuration says nothing of tokenizer, template and pictures: these come from what lies with the weights, or
from the `base` that is named.
"""

from pathlib import Path

from transformers import CLIPVisionConfig

from lapilli.assemble import parts
from lapilli.assemble.opening.llava import Tower, assembled, geometry_of
from lapilli.assemble.opening.model import Notes, OpenModel
from lapilli.base.errors import ModelError
from lapilli.checkpoint import llava
from lapilli.checkpoint.cerebras import encoder_folder, open_cerebras, tokenizer_folder
from lapilli.data.tokenizer import load_tokenizer


def open_cerebras_model(path: Path, base: Path | str | None, template: str | None) -> OpenModel:
    """Open a `.mdl` file, its folder or a tree; `base` is where the tokenizer is, if it does not lie with the weights.

    Raises ModelError for what can't be read, and for a model without a tokenizer.
    """
    found = open_cerebras(path)
    notes = Notes()
    for note in found.notes:
        notes.info(note)
    settings = llava.read_settings(path, found.llava_fields)
    place = base or tokenizer_folder(path)
    if place is None:
        raise ModelError(
            f"{path}: no tokenizer lies with these weights, as Cerebras' tools leave them; name the language model's "
            "folder as the base (--base), or put its tokenizer files into the folder"
        )
    tokenizer = load_tokenizer(place)
    encoder = encoder_folder(path)
    folder = path if path.is_dir() else path.parent
    config = CLIPVisionConfig(**{key: value for key, value in found.clip_fields.items() if key != "model_type"})
    images = parts.read_image_settings(str(encoder or folder), config, settings.mode, "exact")
    if images.assumed:
        notes.warn(f"{encoder or folder} brings no image processor: pictures get CLIP's mean and deviation")
    tower = Tower(str(encoder or folder), config, images.spec, geometry_of(str(path), config, images.spec))
    return assembled(folder, "cerebras", settings, found.tensors, tokenizer, template, notes, tower)
