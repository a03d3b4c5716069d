"""A model's layers on several GPUs, one after another, so that a model larger than one of them can answer.

The language model's blocks are dealt out in order; everything else (vision encoder, projector, tables, norms, output
layer) stays on the first device, so that whoever feeds the model sees one device. What a block is given moves to it
when it is called, and what the last block gives moves back.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lapilli.base.errors import ModelError
from lapilli.model.held import held_bytes
from lapilli.model.vision import find_layers
from lapilli.model.vlm import VisionLanguageModel

_FOR_WEIGHTS = 0.8
"""Part of a device's free memory that weights may take; keys, values and activations need the rest."""


def plan_split(blocks: Sequence[int], beside: int, free: Sequence[int]) -> list[int]:
    """Which device holds each block: blocks of these bytes, `beside` bytes on the first, devices with `free` bytes.

    Neighbours stay together, and devices are filled to the same part of what they have. Raises ModelError if the model
    does not fit.
    """
    room = [int(_FOR_WEIGHTS * size) for size in free]
    total = beside + sum(blocks)
    part = total / max(1, sum(room))
    placed = _dealt(blocks, beside, room, part)
    while placed is None and part < 1:  # blocks are whole, so that the even part may be too small
        part = min(1.0, part * 1.02)
        placed = _dealt(blocks, beside, room, part)
    if placed is None:
        raise ModelError(
            f"the model's weights take {total / 1e9:.1f} GB, {beside / 1e9:.1f} of them on the first device; free for "
            f"weights are {', '.join(f'{size / 1e9:.1f}' for size in room)} GB"
        )
    return placed


def _dealt(blocks: Sequence[int], beside: int, room: Sequence[int], part: float) -> list[int] | None:
    """Each device filled in turn to a part of its room; None if blocks are left over."""
    made: list[int] = []
    device, left = 0, part * room[0] - beside
    for size in blocks:
        while left < size:
            device += 1
            if device == len(room):
                return None
            left = part * room[device]
        left -= size
        made.append(device)
    return made if beside <= room[0] else None


def free_bytes(device: torch.device) -> int:
    """What is free on a device: a GPU's own memory, else the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def said(where: Sequence[int], devices: Sequence[torch.device]) -> str:
    """`cuda:0 (0 to 15), cuda:1 (16 to 31)`."""
    used = [(device, [i for i, n in enumerate(where) if n == number]) for number, device in enumerate(devices)]
    return ", ".join(f"{device} ({mine[0]} to {mine[-1]})" if mine else f"{device} (none)" for device, mine in used)


def blocks_of(language_model: Any) -> nn.ModuleList:
    """The language model's blocks. Raises ModelError if it has no plain list of them."""
    try:
        return find_layers(language_model)
    except ModelError as error:
        raise ModelError(f"{type(language_model).__name__} has no plain list of layers that could be split") from error


def place(model: VisionLanguageModel, devices: Sequence[torch.device], free: Sequence[int]) -> list[int]:
    """Move a model's blocks to devices with `free` bytes, all else to the first; returns the device of each block."""
    blocks = blocks_of(model.language_model)
    sizes = [sum(held_bytes(p) for p in block.parameters()) for block in blocks]
    beside = sum(held_bytes(p) for p in model.parameters()) - sum(sizes)
    where = plan_split(sizes, beside, free)
    device_of = {id(m): devices[n] for block, n in zip(blocks, where, strict=True) for m in block.modules()}
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        _move_own(module, device_of.get(id(module), devices[0]), moved)
    return where


def _move_own(module: nn.Module, device: torch.device, moved: dict[int, nn.Parameter]) -> None:
    """Move a module's own parameters and buffers, and not those of what is in it; tied ones stay one."""
    for name, own in module._parameters.items():
        if own is not None:
            if id(own) not in moved:
                moved[id(own)] = nn.Parameter(own.data.to(device), requires_grad=False)
            module._parameters[name] = moved[id(own)]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)


def shares(model: VisionLanguageModel) -> dict[torch.device, float]:
    """Which part of the language model's blocks each device holds; where all is on one, it holds them all."""
    if len({parameter.device for parameter in model.parameters()}) == 1:
        return {next(model.parameters()).device: 1.0}
    blocks = blocks_of(model.language_model)
    held = Counter(next(block.parameters()).device for block in blocks)
    return {device: count / len(blocks) for device, count in held.items()}


def connect(model: VisionLanguageModel) -> None:
    """Let what blocks are given follow them to their devices, and what the last one gives come back."""
    blocks = blocks_of(model.language_model)
    for block in blocks:
        device = next(block.parameters()).device
        block.register_forward_pre_hook(_Follow(device), with_kwargs=True)
    home = model.get_input_embeddings().weight.device  # type: ignore[union-attr]
    blocks[-1].register_forward_hook(_Return(home))  # type: ignore[arg-type]


class _Follow:
    """A hook that moves what a block is given to the block's device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _moved(args, self.device), _moved(kwargs, self.device)


class _Return(_Follow):
    """A hook that moves what a block gives."""

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:  # type: ignore[override]
        return _moved(output, self.device)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and dictionaries moved; anything else (caches, steps) is handed on as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(one, device) for one in value)
    if type(value) is dict:
        return {key: _moved(one, device) for key, one in value.items()}
    return value
