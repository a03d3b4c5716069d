"""Write a model folder: weights, configuration, tokenizer, processor, generation settings.

The folder is written aside and renamed, so that a half-written one never loads.
"""

from pathlib import Path
from typing import Any

from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerBase

from lapilli.assemble.folder import FolderSpec, joined_fields, write_spec
from lapilli.base.atomic import atomic_folder
from lapilli.checkpoint import hf
from lapilli.data.image import ImageSpec
from lapilli.model.config import LapilliConfig
from lapilli.model.quiet import quiet
from lapilli.model.vision import patch_of
from lapilli.model.vlm import VisionLanguageModel


def save(model: VisionLanguageModel, tokenizer: PreTrainedTokenizerBase, spec: FolderSpec, folder: Path | str) -> None:
    """Write a complete model folder. It must not exist yet (RunError otherwise)."""
    spec = spec.model_copy(update={"joined": joined_fields(model.config)})
    for part in (model.config, model.config.vision_config, model.config.text_config):
        part._name_or_path = ""  # where a part once lay says nothing on another machine
    with quiet(), atomic_folder(folder) as draft:
        write_spec(draft, spec)
        if spec.stored_as == "transformers":
            hf.save_hf(model, draft)
            hf_processor(model.config, tokenizer, spec).save_pretrained(draft)
        else:
            model.save_pretrained(draft)
            if model.language_model.generation_config is not None:
                model.language_model.generation_config.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def hf_image_processor(spec: ImageSpec, config: LapilliConfig) -> Any:
    """Return transformers' image processor that makes the pixels `spec` describes."""
    fields = spec.processor_config()
    layout = config.image_layout
    if layout.mode == "anyres":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        pinpoints = [[h, w] for w, h in layout.pinpoints]
        return LlavaNextImageProcessorPil(**fields, image_grid_pinpoints=pinpoints, do_pad=True)
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return LlavaImageProcessorPil(**fields, do_pad=spec.mode == "pad")


def hf_processor(config: LapilliConfig, tokenizer: PreTrainedTokenizerBase, spec: FolderSpec) -> Any:
    """Return transformers' processor for the folder, which expands the image token by the same number."""
    made = hf.to_hf_config(config)
    cls = LlavaNextProcessor if made.model_type == "llava_next" else LlavaProcessor
    return cls(
        image_processor=hf_image_processor(spec.image, config),
        tokenizer=tokenizer,
        patch_size=patch_of(config.vision_config),
        vision_feature_select_strategy=made.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        image_token=spec.image_token,
        num_additional_image_tokens=config.prefix_tokens,
    )
