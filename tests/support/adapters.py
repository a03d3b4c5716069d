"""Adapters on tiny models, with random weights large enough to change answers."""

from pathlib import Path

import torch

from lapilli.assemble.adapter import save_adapter
from lapilli.assemble.load import load
from lapilli.model.adapter import add_lora


def make_adapter(base: Path, folder: Path, seed: int = 1, **lora) -> Path:
    """An adapter folder of ours on `base`, as a run writes it: adapters and a projector of its own."""
    loaded = load(base)
    add_lora(loaded.model, **({"r": 4, "alpha": 8, "dropout": 0.0} | lora))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            trains = "lora_" in name or name.startswith("projector")
            if trains or (lora.get("bias") == "all" and name.endswith("bias") and name.startswith("language_model")):
                parameter.normal_(std=0.1)
    save_adapter(loaded.model, loaded.tokenizer, loaded.spec, base, folder)
    return folder
