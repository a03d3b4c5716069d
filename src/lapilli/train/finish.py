"""The end of a run: its model as a folder that other software loads.

Adapters are written as adapters, with the place of the model they belong to, if they and the projector are all that a
run changed; everything else as a whole model.
"""

import torch

from lapilli.assemble.adapter import save_adapter
from lapilli.assemble.build import generation_config
from lapilli.assemble.load import model_folder
from lapilli.assemble.save import save
from lapilli.model.adapter import merge_lora
from lapilli.train.setup import Prepared, Say


def export(ready: Prepared, say: Say) -> None:
    """Write `model/`, last of a run's files. A run in bf16 gives a model in bf16."""
    loaded, spec = ready.loaded, ready.how.exported
    model, tokenizer = loaded.model, loaded.tokenizer
    model.eval()
    if ready.stage.train.lora is not None:
        more = _more_than_adapters(ready)
        if more is None:
            base, held = model_folder(str(ready.stage.model)), ready.stage.train.lora.quantise
            save_adapter(model, tokenizer, spec, base, ready.folder.model, trained_over=held)
            return
        say(f"adapters merged, model/ holds the whole model: {more}, which an adapter folder can't say")
        merge_lora(model)
    if spec.template != loaded.spec.template:
        tokenizer.chat_template = spec.chat_template()
        model.language_model.generation_config = generation_config(
            model.language_model.generation_config, tokenizer, spec.template, model.config.image_token_id
        )
    if ready.stage.run.precision == "bf16":
        model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.config.dtype = next(model.parameters()).dtype
    save(model, tokenizer, spec, ready.folder.model)


def _more_than_adapters(ready: Prepared) -> str | None:
    """What a LoRA run changed beside adapters and projector, or None."""
    if any(p.requires_grad for p in ready.loaded.model.vision_encoder.parameters()):
        return "the vision encoder was trained"
    return None
