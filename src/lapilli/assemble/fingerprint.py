"""A short hash that tells one model folder from another without reading it all.

It covers the configuration, every tensor's name, shape and type, and the first values of each, so that the same model
trained further, or one of the same size, is told apart in a second.
"""

import hashlib
import json
from pathlib import Path

import torch

from lapilli.checkpoint.stream import Tensors, open_file
from lapilli.checkpoint.tensors import read_json, weight_file

_VALUES = 64
_VOLATILE = ("transformers_version", "_name_or_path")
_CONFIGS = ("config.json", "adapter_config.json", "base.json")
_BESIDE = ("adapter_model.safetensors", "adapter_model.bin", "projector.safetensors", "mm_projector.bin",
           "non_lora_trainables.bin")  # fmt: skip


def fingerprint(folder: Path) -> str:
    """SHA-256 in hexadecimal of what a model folder holds itself. Raises ModelError for files that can't be read."""
    made = hashlib.sha256()
    for name in _CONFIGS:
        if (folder / name).is_file():
            fields = {key: value for key, value in read_json(folder / name).items() if key not in _VOLATILE}
            made.update(json.dumps([name, fields], sort_keys=True).encode())
    whole = weight_file(folder)
    files = [*([whole] if whole else []), *(folder / name for name in _BESIDE if (folder / name).is_file())]
    for file in files:
        _add(made, open_file(file))
    return made.hexdigest()


def _add(made: "hashlib._Hash", tensors: Tensors) -> None:
    for name in sorted(tensors):
        tensor = tensors[name]
        made.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        first = tensor.read().flatten()[:_VALUES].contiguous()
        made.update(first.view(torch.uint8).numpy().tobytes())
