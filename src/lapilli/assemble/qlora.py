"""A model to train adapters on, or to ask, whose language model's linear layers are held in 4 or 8 bits from the start.

Each weight is read, quantised and let go before the next one: the whole model is never in memory. All else (encoder,
projector, the table of words, norms, output layer) comes as it is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lapilli.assemble.load import Loaded, check_room
from lapilli.assemble.opening.model import OpenModel
from lapilli.assemble.opening.parts import Names, empty_model
from lapilli.assemble.quantise import linear_weights
from lapilli.assemble.source import materialise, model_folder, open_model
from lapilli.base.errors import ModelError
from lapilli.checkpoint import names
from lapilli.checkpoint.stream import Lazy
from lapilli.model.quantised import Held, mark_quantised, quantised_linear
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel


def load_quantised(
    path: Path | str,
    held: Held,
    computed: torch.dtype,
    device: torch.device,
    *,
    base: Path | str | None = None,
    template: str | None = None,
    rest: torch.dtype = torch.float32,
) -> Loaded:
    """Load a model folder in full precision with its language model's linear layers held as `held`.

    These compute in `computed` and are made on `device`, as quantising is slow on CPUs; the rest of the language model
    is in `computed`, encoder and projector in `rest`, all of that on the CPU. `base` and `template` are those of
    `load`, adapters are merged before. Raises ModelError as `load` does, and for a model without plain linear layers.
    """
    folder = model_folder(path)
    opened = open_model(folder, base, template=template, merged_as=torch.float32)
    with quiet():
        model = materialise_held(opened, held, computed, rest, device)
    loaded = Loaded(model, opened.tokenizer, opened.spec, folder)
    check_room(loaded)
    return loaded


def materialise_held(
    opened: OpenModel, held: Held, computed: torch.dtype, rest: torch.dtype, device: torch.device
) -> VisionLanguageModel:
    """`materialise`, with the language model's linear layers held as `held` on `device`, as `load_quantised` says."""
    chosen = {name: opened.tensors[name] for name in sorted(linear_weights(opened))}
    if not chosen:
        raise ModelError(f"{opened.folder}: its language model has no linear layer to quantise")
    hollow = {name: _hollow(tensor, computed) for name, tensor in chosen.items()}
    model = materialise(replace(opened, tensors=opened.tensors | hollow), rest, computed)
    language: Any = model.language_model
    place_of = Names(empty_model(AutoModelForCausalLM, opened.config.text_config, opened.folder))
    for name, tensor in chosen.items():
        place = place_of.place(name.removeprefix(names.LANGUAGE))
        assert place is not None  # a linear layer is one place
        _replace(language, place.removesuffix(".weight"), tensor, held, computed, device)
    mark_quantised(language, held)
    return model


def _hollow(tensor: Lazy, dtype: torch.dtype) -> Lazy:
    """A tensor of the same shape that takes no memory, to be replaced."""
    return replace(tensor, dtype=dtype, read=lambda: torch.tensor(torch.nan, dtype=dtype).expand(tensor.shape))


def _replace(
    language: nn.Module, place: str, tensor: Lazy, held: Held, computed: torch.dtype, device: torch.device
) -> None:
    above, _, own = place.rpartition(".")
    old: Any = language.get_submodule(place)
    bias = None if old.bias is None else old.bias.detach()
    made = quantised_linear(tensor.read(), bias, held, computed, device)
    made.train(old.training)
    setattr(language.get_submodule(above), own, made)
