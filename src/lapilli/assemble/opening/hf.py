"""Folders of transformers' `llava` and `llava_next`, and of our own type; with `lapilli.json` or without.

Without it, what it would say is worked out from the processor and the tokenizer.
"""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from lapilli.assemble.folder import FolderSpec, joined_fields
from lapilli.assemble.opening.model import Format, Notes, OpenModel
from lapilli.assemble.opening.parts import empty_model, settle_ties
from lapilli.base.errors import ModelError
from lapilli.base.version import VERSION
from lapilli.checkpoint import hf, names
from lapilli.checkpoint.stream import open_folder
from lapilli.data.image import ImageSpec
from lapilli.data.template import get_template
from lapilli.data.tokenizer import load_tokenizer
from lapilli.model.config import LapilliConfig


def open_hf(folder: Path, spec: FolderSpec | None, template: str | None) -> OpenModel:
    """Open a folder whose configuration is transformers' or our own; `spec` is its `lapilli.json`, if it has one.

    Raises ModelError for other models, and for what is missing.
    """
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: config.json can't be read ({str(error).splitlines()[0]})") from error
    own = config.model_type == "lapilli"
    if not own and config.model_type not in hf.MODEL_TYPES:
        raise ModelError(
            f"{folder}: holds a {config.model_type} model, not a joined one; "
            "join a vision encoder and a language model with `lapilli build`"
        )
    if own and spec is None:
        raise ModelError(f"{folder}: lapilli.json is missing; copy it from where the folder was made")
    tokenizer, spec = (load_tokenizer(folder), spec) if spec else _describe(folder, config, template)
    notes = Notes()
    tied = bool(config.tie_word_embeddings)
    if not own:
        config = _joined(config, spec)
    causal = empty_model(AutoModelForCausalLM, config.text_config, folder)
    tensors, computed = names.canonical(open_folder(folder), names.own_name if own else names.hf_name(causal))
    if computed:
        notes.info(f"{folder}: {names.said(computed)}")
    said = settle_ties(config.text_config, causal, tensors, folder / "config.json", tied=tied)
    if said:
        notes.warn(said)
    if template is not None:
        spec = spec.model_copy(update={"template": get_template(template).bind(tokenizer)})
    kind: Format = "lapilli" if own else "hf"
    places = {part: str(folder) for part in ("vision", "projector", "language")}
    return OpenModel(folder, kind, config, tensors, tokenizer, spec, _generation(folder, config), notes, places)


def _joined(config: Any, spec: FolderSpec) -> LapilliConfig:
    made = LapilliConfig(vision_config=config.vision_config, text_config=config.text_config, **spec.joined)
    made.dtype = config.dtype
    return made


def _generation(folder: Path, config: LapilliConfig) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config.text_config)


def _describe(folder: Path, config: Any, template: str | None) -> tuple[PreTrainedTokenizerBase, FolderSpec]:
    """Work out what a transformers folder without `lapilli.json` would say there, from its processor and tokenizer."""
    try:
        processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its processor can't be read ({str(error).splitlines()[0]})") from error
    tokenizer = processor.tokenizer
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    if template is None and tokenizer.chat_template is None:
        raise ModelError(
            f"{folder}: neither lapilli.json nor a chat template says which conversation template this model was "
            "trained with; name it (vicuna_v1 for LLaVA-1.5)"
        )
    fields = processor.image_processor.to_dict()
    padded = fields.get("do_pad") and config.model_type == "llava"
    mode = "anyres" if config.model_type == "llava_next" else "pad" if padded else "square"
    image = ImageSpec.from_processor_config(fields, mode)
    joined = hf.from_hf_config(config, image.tile_size, mode)
    spec = FolderSpec(
        written_by=f"lapilli {VERSION}",
        stored_as="transformers",
        template=get_template(template or "tokenizer").bind(tokenizer),
        image=image,
        image_token=processor.image_token,
        joined=joined_fields(joined),
    )
    return tokenizer, spec
