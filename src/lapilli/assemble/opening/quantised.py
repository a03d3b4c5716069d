"""Folders whose language model is stored in 8 or 4 bits, by bitsandbytes: opened, for loading only.

Their tensors are not the model's, so what converts, merges or compares models refuses them, and takes the folder that
they were made from.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

from lapilli.assemble.folder import read_spec
from lapilli.assemble.opening.hf import open_hf
from lapilli.assemble.opening.model import OpenModel
from lapilli.base.errors import ModelError
from lapilli.checkpoint.tensors import read_json

_KEY = "quantization_config"


def is_quantised(folder: Path) -> bool:
    """Whether config.json says that the weights are quantised."""
    file = folder / "config.json"
    return file.is_file() and bool(read_json(file).get(_KEY))


def refuse_quantised(folder: Path) -> None:
    """Raise ModelError for a quantised folder, where full weights are needed."""
    if is_quantised(folder):
        raise ModelError(
            f"{folder}: its weights are quantised ({_KEY} in config.json), which can't be undone; take the model "
            "that it was made from"
        )


def open_quantised(folder: Path, template: str | None) -> OpenModel:
    """Open a quantised folder so that its language model is made with bitsandbytes' layers.

    Raises ModelError if another method quantised it, or if bitsandbytes is not installed.
    """
    method = read_json(folder / "config.json")[_KEY].get("quant_method")
    if method != "bitsandbytes":
        raise ModelError(f"{folder}: quantised by {method}; of quantised models, those by bitsandbytes are read")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{folder}: quantised, and bitsandbytes, which it needs, is not installed: pip install 'lapilli[quantise]'"
        )
    opened = open_hf(folder, read_spec(folder), template)
    config = copy.deepcopy(opened.config)
    config.text_config.quantization_config = read_json(folder / "config.json")[_KEY]
    opened.config = config
    return opened
