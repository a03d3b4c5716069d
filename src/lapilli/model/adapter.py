"""LoRA on the language model, through PEFT.

Adapters are put into the layers of `model.language_model` alone, so they can't reach the vision encoder or the
projector whatever names their layers share. PEFT is imported where adapters are made: it takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lapilli.base.errors import RecipeError, nearest
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from peft import PeftModel

_WRAPPER = "peft_wrapper"


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
) -> list[str]:
    """Put LoRA adapters into the language model and return the names of the layers that got them.

    Raises RecipeError if a name in `target_modules` is no linear layer of it, or if it has adapters already.
    """
    from peft import LoraConfig, get_peft_model

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
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,  # type: ignore[arg-type]
        target_modules=targets,
        exclude_modules=excluded,
        task_type="CAUSAL_LM",
    )
    with quiet():
        wrapper = get_peft_model(language, config)
    # PEFT changes the layers in place, so the language model itself stays where it is. The wrapper is kept beside the
    # module tree, for saving and merging only.
    model.__dict__[_WRAPPER] = wrapper
    return targets


def adapters_of(model: VisionLanguageModel) -> PeftModel | None:
    """PEFT's wrapper of the language model, or None if it has no adapters."""
    return model.__dict__.get(_WRAPPER)


def merge_lora(model: VisionLanguageModel) -> None:
    """Merge the adapters into the language model's own weights; without adapters nothing changes."""
    wrapper: Any = model.__dict__.pop(_WRAPPER, None)
    if wrapper is not None:
        with quiet():
            model.language_model = wrapper.merge_and_unload()
