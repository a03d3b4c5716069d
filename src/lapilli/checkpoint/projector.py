"""The projector alone, wherever it lies: a file of its own, an adapter's folder or a whole model, in any layout.

Only names decide what is the projector; its numbers are LLaVA's (`0.weight`, `2.weight`, ...) whatever the layout
calls them. What trains beside it is found too: the newline of tiled pictures, and the embedding table that holds the
rows of `<im_start>` and `<im_end>`.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors

from lapilli.base.atomic import atomic_write, refuse_taken
from lapilli.base.errors import ModelError
from lapilli.checkpoint.stream import Lazy, open_file
from lapilli.checkpoint.tensors import some, weight_file

_ALONE = ("projector.safetensors", "non_lora_trainables.bin", "non_lora_trainables.safetensors")
"""Beside adapters: ours, then LLaVA's."""
_PRETRAINED = ("mm_projector.safetensors", "mm_projector.bin")
_ADAPTER = "adapter_config.json"

_NAME = re.compile(
    r"(?:base_model\.model\.)?(?:(?:model|transformer)\.)?(?:mm_projector|multi_modal_projector|projector)\.(.+)"
)
_TABLES = ("embed_tokens.weight", "embed_in.weight", "wte.weight")
_NEWLINE = "image_newline"
_LINEARS = {"linear_1": "0", "linear_2": "2"}
_OUT = "model.mm_projector."


@dataclass(frozen=True)
class ProjectorWeights:
    """A projector's tensors, not read yet, and what trains beside it."""

    file: Path
    tensors: dict[str, Lazy]
    """By LLaVA's numbers: `0.weight`, or `weight` of a linear one."""
    newline: Lazy | None
    """(D,)"""
    table: Lazy | None
    """The embedding table (V, D), or its rows of <im_start> and <im_end> alone (2, D)."""
    alone: bool
    """The file holds nothing else, as `mm_projector.bin`; not so a model's weights."""

    @property
    def kind(self) -> str:
        """`linear` or `mlpNx_gelu`. Raises ModelError if the tensors are those of neither."""
        if set(self.tensors) <= {"weight", "bias"}:
            return "linear"
        layers = sorted({int(head) for head in (name.split(".")[0] for name in self.tensors) if head.isdecimal()})
        if layers != list(range(0, 2 * len(layers), 2)) or not layers:
            raise ModelError(f"{self.file}: its projector is neither linear nor mlpNx_gelu: {some(self.tensors)}")
        return f"mlp{len(layers)}x_gelu"


def projector_file(path: Path) -> Path:
    """The file that holds the projector: `path` itself, or in a folder the one that belongs there.

    In the folder of an adapter that is what was trained in full beside it, else the model's weights, else
    `mm_projector.bin`. Raises ModelError if there is none.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if path.is_file():
        return path
    beside = [path / name for name in _ALONE]
    alone = [path / name for name in _PRETRAINED]
    whole = None if (path / _ADAPTER).is_file() else weight_file(path)
    candidates = [*beside, *alone] if whole is None else [whole]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise ModelError(
            f"{path}: no projector here (neither a model's weights nor {', '.join((*_ALONE, *_PRETRAINED))})"
        )
    return found


def open_projector(path: Path) -> ProjectorWeights:
    """Find the projector in a file or folder; nothing but headers is read.

    Raises ModelError for files that can't be read safely, and for those without a projector.
    """
    file = projector_file(path)
    tensors, newline, table, others = {}, None, None, 0
    for name, tensor in open_file(file).items():
        if match := _NAME.fullmatch(name):
            head, _, kind = match[1].rpartition(".")
            tensors[f"{_LINEARS.get(head, head)}.{kind}" if head else kind] = tensor
        elif name.split(".")[-1] == _NEWLINE:
            newline = tensor
        elif name.endswith(_TABLES) and "vision" not in name:
            table = tensor
        else:
            others += 1
    if not tensors:
        raise ModelError(f"{file}: holds no projector (names with mm_projector, multi_modal_projector or projector)")
    return ProjectorWeights(file, tensors, newline, table, others == 0)


def write_projector(
    out: Path, tensors: dict[str, torch.Tensor], newline: torch.Tensor | None, marks: torch.Tensor | None
) -> None:
    """Write a projector under the names of LLaVA's `mm_projector.bin`; `marks` (2, D) are the rows that belong to it.

    `.bin` becomes a pickle of tensors, which LLaVA and LLaVA-like code reads, anything else must be `.safetensors`.
    Raises RunError for a file that exists.
    """
    check_out(out)
    named = {_OUT + name: tensor for name, tensor in tensors.items()}
    if newline is not None:
        named[f"model.{_NEWLINE}"] = newline
    if marks is not None:
        named["model.embed_tokens.weight"] = marks
    # A copy of its own for each: a view would take the whole file it is mapped from along.
    named = {name: tensor.detach().clone().contiguous() for name, tensor in named.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        atomic_write(out, to_safetensors(named, {"format": "pt"}))
        return
    made = io.BytesIO()
    torch.save(named, made)
    atomic_write(out, made.getvalue())


def check_out(out: Path) -> None:
    """Raise RunError if `out` exists, ModelError if its name is no weight file's."""
    refuse_taken(out)
    if out.suffix not in (".bin", ".safetensors"):
        raise ModelError(f"{out}: name a file that ends in .safetensors, or in .bin as LLaVA's own code reads it")
