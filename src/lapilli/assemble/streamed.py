"""A model run straight from its files: in float32, without ever being in memory.

Linear layers, which are nearly all of a model, read their matrix when they are run and multiply by a piece of it at a
time; embeddings look up and then widen; only the small rest (norms, convolutions, the projector) is held. That is
slower than a model in memory, and 13B parameters need little more of it than 7B.

A model can be cut to its first and last two blocks, vision encoder and language model alike.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from lapilli.assemble.opening.parts import Names, empty_model
from lapilli.assemble.source import OpenModel, materialise
from lapilli.base.errors import ModelError
from lapilli.checkpoint import names
from lapilli.checkpoint.stream import Lazy, Tensors
from lapilli.model.vision import resolve_layers
from lapilli.model.vlm import VisionLanguageModel

ENDS = 2
"""Blocks kept at each end of a model that is cut."""

_PIECE = 2**24
"""Numbers of a matrix that are widened at a time: 64 MiB in float32."""
_HELD_BYTES = 2**30
_NUMBER = re.compile(r"(.+?)\.(\d+)\.(.+)")


def streamed(opened: OpenModel) -> VisionLanguageModel:
    """The opened model for forward passes in float32, its weights left on disk.

    Raises ModelError for files that can't be read, and for a model that is mostly made of something else than linear
    layers and embeddings (experts in one tensor).
    """
    config = opened.config
    left: dict[str, str] = {}
    for prefix, auto, part in (
        (names.LANGUAGE, AutoModelForCausalLM, config.text_config),
        (names.VISION, AutoModel, config.vision_config),
    ):
        empty = empty_model(auto, part, opened.folder)
        left |= {prefix + name: place for name, place in _matrices(empty, opened.part(prefix))}
    held = 4 * sum(prod(tensor.shape) for name, tensor in opened.tensors.items() if name not in left)
    if held > _HELD_BYTES:
        raise ModelError(
            f"{opened.folder}: keeps {held / 1e9:.1f} GB outside plain linear layers, which can't be left on disk"
        )
    hollow = {name: _hollow(tensor) if name in left else tensor for name, tensor in opened.tensors.items()}
    model = materialise(replace(opened, tensors=hollow), torch.float32)
    for prefix, part in ((names.LANGUAGE, model.language_model), (names.VISION, model.vision_encoder)):
        _stream(
            part,
            {left[name]: tensor for name, tensor in opened.tensors.items() if name in left and name.startswith(prefix)},
        )
    return model


def _matrices(empty: PreTrainedModel, tensors: Tensors) -> Iterator[tuple[str, str]]:
    """The tensors that can be left on disk, each with its place in the model.

    These are matrices that nothing but their own module touches: of linear layers, and the table of words. Those of
    positions are small, and encoders reach for them from elsewhere.
    """
    place_of = Names(empty)
    words: Any = empty.get_input_embeddings()
    for name in tensors:
        place = place_of.place(name)
        if place is None or place_of.reshaped(name) or not place.endswith(".weight"):
            continue
        module = empty.get_submodule(place.removesuffix(".weight"))
        if type(module).forward is nn.Linear.forward or (module is words and isinstance(module, nn.Embedding)):
            yield name, place


def _hollow(tensor: Lazy) -> Lazy:
    """A float32 tensor of the same shape that takes no memory; a model that is run with it answers nothing finite."""
    return replace(tensor, dtype=torch.float32, read=lambda: torch.tensor(torch.nan).expand(tensor.shape))


def _stream(part: nn.Module, matrices: Tensors) -> None:
    """Let the modules of a part read their matrices when they are run."""
    parameters = dict(part.named_parameters(remove_duplicate=False))
    tensors = {id(parameters[place]): tensor for place, tensor in matrices.items()}
    for module in part.modules():
        tensor = tensors.get(id(getattr(module, "weight", None)))
        if tensor is not None:
            module.forward = partial(_linear if isinstance(module, nn.Linear) else _embedding, tensor, module)


def _linear(matrix: Lazy, module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    wide, weight, bias = input.float(), matrix.read(), module.bias
    made = wide.new_empty(*wide.shape[:-1], len(weight))
    step = max(1, _PIECE // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        made[..., rows] = F.linear(wide, weight[rows].float(), None if bias is None else bias[rows].float())
    return made


def _embedding(table: Lazy, module: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
    """The module's own forward pass, which may scale what it looks up, with the table as it is stored."""
    hollow = module.weight
    module.weight = nn.Parameter(table.read(), requires_grad=False)
    try:
        return type(module).forward(module, input).float()
    finally:
        module.weight = hollow


# ---- cutting ----------------------------------------------------------------------------------------------------


def ends_only(opened: OpenModel) -> tuple[OpenModel, str]:
    """The model cut to its first and last two blocks, and what was kept, in words.

    Of the vision encoder the last blocks are those whose output is read; the one above them stays too, unrun, so that
    what is read is not taken for the encoder's own last state.
    """
    config = copy.deepcopy(opened.config)
    vision, text = config.vision_config, config.text_config.get_text_config()
    depth = vision.num_hidden_layers
    read = resolve_layers(config.feature_layers, depth)
    blocks = sorted({i for layer in read for i in (*range(min(ENDS, layer)), *range(max(0, layer - ENDS), layer))})
    above = [min(depth - 1, max(read))] if max(read) < depth else []
    kept = {"vision": sorted({*blocks, *above}), "language": _ends(text.num_hidden_layers)}
    config.feature_layers = [kept["vision"].index(layer - 1) + 1 if layer else 0 for layer in read]
    said = f"vision blocks {_numbers(blocks)} of {depth}, language blocks {_numbers(kept['language'])}"
    said += f" of {text.num_hidden_layers}"
    made = opened.tensors
    for part, inner in (("vision", vision), ("language", text)):
        made = _renumbered(made, part, inner.num_hidden_layers, kept[part])
        _shorten(inner, kept[part])
    return replace(opened, config=config, tensors=made), said


def _ends(depth: int) -> list[int]:
    return sorted({*range(min(ENDS, depth)), *range(max(0, depth - ENDS), depth)})


def _numbers(blocks: Iterable[int]) -> str:
    return ", ".join(str(block) for block in blocks)


def _shorten(config: Any, kept: Sequence[int]) -> None:
    depth = config.num_hidden_layers
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if (
            isinstance(kinds, list)
            and len(kinds) == depth
            and not isinstance(getattr(type(config), name, None), property)
        ):
            setattr(config, name, [kinds[i] for i in kept])
    config.num_hidden_layers = len(kept)


def _renumbered(tensors: Tensors, part: str, depth: int, kept: Sequence[int]) -> Tensors:
    """The tensors of `part` without those of blocks that are not kept, the others' blocks counted anew."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        if match := _NUMBER.fullmatch(name):
            numbers[match[1]].add(int(match[2]))
    lists = {head for head, found in numbers.items() if head.startswith(f"{part}.") and found >= set(range(depth))}
    places = {old: new for new, old in enumerate(kept)}
    made: Tensors = {}
    for name, tensor in tensors.items():
        match = _NUMBER.fullmatch(name)
        if match is None or match[1] not in lists:
            made[name] = tensor
        elif int(match[2]) in places:
            made[f"{match[1]}.{places[int(match[2])]}.{match[3]}"] = tensor
    return made
