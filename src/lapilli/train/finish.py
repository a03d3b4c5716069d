"""The end of a run: its model as a folder that other software loads.

Adapters are written as adapters, with the place of the model they belong to; everything else as a whole model.
"""

import torch

from lapilli.assemble.adapter import save_adapter
from lapilli.assemble.build import generation_config
from lapilli.assemble.load import model_folder
from lapilli.assemble.save import save
from lapilli.train.setup import Prepared


def export(ready: Prepared) -> None:
    """Write `model/`, last of a run's files. A run in bf16 gives a model in bf16."""
    loaded, spec = ready.loaded, ready.how.exported
    model, tokenizer = loaded.model, loaded.tokenizer
    model.eval()
    if ready.stage.train.lora is not None:
        save_adapter(model, model_folder(str(ready.stage.model)), ready.folder.model)
        return
    if spec.template != loaded.spec.template:
        tokenizer.chat_template = spec.template.jinja(spec.image_token)
        model.language_model.generation_config = generation_config(
            model.language_model, tokenizer, spec.template, model.config.image_token_id
        )
    if ready.stage.run.precision == "bf16":
        model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.config.dtype = next(model.parameters()).dtype
    save(model, tokenizer, spec, ready.folder.model)
