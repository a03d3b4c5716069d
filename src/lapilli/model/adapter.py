"""LoRA on the language model, and on the vision encoder where that is asked for, through PEFT.

Adapters are put into one part at a time, so those of the language model can't reach the vision encoder or the projector
whatever names their layers share. PEFT is imported where adapters are made: it takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from lapilli.base.errors import RecipeError, nearest
from lapilli.model.quiet import quiet
from lapilli.model.vision import find_layers, resolve_layers
from lapilli.model.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from peft import PeftModel

_WRAPPER, _VISION_WRAPPER = "peft_wrapper", "peft_wrapper_vision"


def linear_names(language_model: nn.Module, output: nn.Module | None) -> list[str]:
    """Last name components of the linear layers that adapters may go to: all but the output layer."""
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    return sorted(found)


def add_lora(
    model: VisionLanguageModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    bias: str = "none",
    target_modules: Sequence[str] | None = None,
    vision: bool = False,
) -> list[str]:
    """Put LoRA adapters into the language model and return the names of the layers that got them.

    With `vision` the linear layers of the vision encoder that are run get them too, whatever `target_modules` says.
    Raises RecipeError if a name in `target_modules` is no linear layer of the language model, or if it has adapters
    already.
    """
    if adapters_of(model) is not None:
        raise RecipeError("train.lora: the model has adapters already; merge them first")
    language: Any = model.language_model
    names = linear_names(language, language.get_output_embeddings())
    targets = list(target_modules) if target_modules is not None else names
    for target in targets:
        if target not in names:
            raise RecipeError(
                f'train.lora.target_modules: "{target}" is no linear layer of the language model'
                f"{nearest(target, names)}; it has {', '.join(names)}"
            )
    excluded = None
    if target_modules is None and language.get_output_embeddings() is not None:
        # The output layer's own name can end like a hidden layer's; leave it out by its full name.
        output = language.get_output_embeddings()
        excluded = [n for n, m in language.named_modules() if m is output]
    how: dict[str, Any] = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "bias": bias}
    _wrap(model, _WRAPPER, language, how | {"exclude_modules": excluded, "task_type": "CAUSAL_LM"}, targets)
    if vision:
        _wrap(model, _VISION_WRAPPER, model.vision_encoder, how | {"bias": "none"}, _vision_targets(model))
    return targets


def _wrap(model: VisionLanguageModel, place: str, part: Any, how: dict[str, Any], targets: Sequence[str]) -> None:
    """Put adapters into one part. PEFT changes its layers in place, so the part itself stays where it is.

    The wrapper is kept beside the module tree, for saving and merging only.
    """
    from peft import LoraConfig, get_peft_model

    with quiet():
        model.__dict__[place] = get_peft_model(part, LoraConfig(**how, target_modules=list(targets)))


def _vision_targets(model: VisionLanguageModel) -> list[str]:
    """Full names of the linear layers of the vision encoder, in the blocks that are run.

    Layers whose weight their attention reads past their own forward pass would learn nothing, and are left out.
    """
    blocks = find_layers(model.vision_encoder)
    run = blocks[: max(resolve_layers(model.config.feature_layers, len(blocks)))]
    inside = {id(module) for block in run for module in block.modules() if type(module).forward is nn.Linear.forward}
    names = [name for name, module in model.vision_encoder.named_modules() if id(module) in inside]
    beside = (nn.MultiheadAttention,)
    bypassed = {
        f"{name}.out_proj" for name, module in model.vision_encoder.named_modules() if isinstance(module, beside)
    }
    found = [name for name in names if name not in bypassed]
    if not found:
        raise RecipeError("train.lora.vision: the vision encoder has no linear layer for adapters in its blocks")
    return found


def adapters_of(model: VisionLanguageModel) -> PeftModel | None:
    """PEFT's wrapper of the language model, or None if it has no adapters."""
    return model.__dict__.get(_WRAPPER)


def merge_lora(model: VisionLanguageModel) -> None:
    """Merge the adapters into the model's own weights; without adapters nothing changes."""
    for place, part in ((_WRAPPER, "language_model"), (_VISION_WRAPPER, "vision_encoder")):
        wrapper: Any = model.__dict__.pop(place, None)
        if wrapper is not None:
            with quiet():
                setattr(model, part, wrapper.merge_and_unload())


class Beside(nn.Module):
    """A linear layer with a low-rank update that is added to what it gives, its weight left as it is.

    For layers whose weight other models use too; `a` (r, in), and `b` (out, r) with the scale in it. It has no
    `weight`, so that code that goes past the layer's forward pass, and would miss the update, fails.
    """

    def __init__(self, base: nn.Module, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(b, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        made = self.base(x)
        return made + F.linear(F.linear(x.to(self.a.dtype), self.a), self.b).to(made.dtype)
