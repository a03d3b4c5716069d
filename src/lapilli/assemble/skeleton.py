"""A model without its weights: the names and shapes of its parameters, for checks that come before weights are read.

What a later stage of a recipe freezes and adapts must be known to work before the first one trains for a day.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lapilli.assemble.adapter import base_of
from lapilli.assemble.folder import FolderSpec
from lapilli.assemble.load import model_folder
from lapilli.model.config import LapilliConfig
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel, register


def skeleton(path: Path | str, spec: FolderSpec) -> VisionLanguageModel | None:
    """Build the model of a folder, or of an adapter's base, on the meta device; `spec` is the folder's description.

    None where the folder's configuration is of another project, which is read with its weights only.
    """
    register()
    folder = model_folder(path)
    base = base_of(folder)
    if base is not None:
        return skeleton(base, spec)
    with quiet():
        try:
            config: Any = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError):
            return None
        if not hasattr(config, "vision_config"):
            return None
        joined = LapilliConfig(vision_config=config.vision_config, text_config=config.text_config, **spec.joined)
        joined.dtype = torch.float32
        with torch.device("meta"):
            return VisionLanguageModel(joined)
