"""The weights that a run starts from: all of them in fp32, or the language model's frozen ones in 4 or 8 bits."""

import importlib.util

import torch

from lapilli.assemble.load import Loaded, load
from lapilli.assemble.opening.quantised import is_quantised
from lapilli.assemble.qlora import load_quantised
from lapilli.assemble.source import model_folder
from lapilli.base.errors import RecipeError, RunError
from lapilli.model.vlm import VisionLanguageModel
from lapilli.recipe.schema import Stage, Train
from lapilli.train.device.choose import Device


def check_weights(stage: Stage, engine: str, device: torch.device) -> None:
    """Raise RunError, with the remedy, for weights that the stage can't be trained from as it asks."""
    lora = stage.train.lora
    held = None if lora is None else lora.quantise
    folder = model_folder(str(stage.model))
    if is_quantised(folder):
        raise RunError(
            f"{folder}: holds quantised weights, whose adapters could not be merged; start from the model that it was "
            f"made from, with train.lora.quantise: {held or 'nf4'} (or int8), which quantises it while it is loaded"
        )
    if held is None:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RunError(
            f"train.lora.quantise: {held} needs bitsandbytes, which is not installed: pip install 'lapilli[quantise]'"
        )
    if engine not in ("single", "ddp"):
        raise RunError(
            f"train.lora.quantise: {held}: run.engine: {engine} can't split bitsandbytes' weights; use single or ddp, "
            "where each process holds all of them"
        )
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"train.lora.quantise: {held} is for cpu and cuda, not for {device.type}; use train.lora alone")


def load_weights(stage: Stage, device: Device) -> Loaded:
    """Load the stage's model, as `check_weights` found that it can be. Raises ModelError."""
    lora = stage.train.lora
    if lora is None or lora.quantise is None:
        return load(str(stage.model), device="cpu", dtype=torch.float32)
    computed = torch.bfloat16 if stage.run.precision == "bf16" else torch.float32
    return load_quantised(str(stage.model), lora.quantise, computed, device.device)


def refuse_whole_quantised(model: VisionLanguageModel, train: Train) -> None:
    """Raise RecipeError if more than adapters and projector trains over quantised weights.

    What is exported then is an adapter folder, which can't hold more; and a whole model can't be had of such weights.
    """
    held = None if train.lora is None else train.lora.quantise
    if held is not None and any(p.requires_grad for p in model.vision_encoder.parameters()):
        raise RecipeError(
            f"train.lora.quantise: {held}: the vision encoder trains too (train.freeze or train.lora.vision), and the "
            "adapter folder of a quantised run can't hold it; freeze the encoder, or train without quantise"
        )
