"""Projectors taken out of models and put into them.

Aligning a projector takes hours and its weights are megabytes, so they travel alone. What belongs to it travels along:
the newline of tiled pictures, the embedding rows of `<im_start>` and `<im_end>` where the model has them, and, said to
the user, the layer and the image mode that it was trained for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lapilli.assemble.folder import read_spec
from lapilli.base.errors import ModelError
from lapilli.checkpoint import llava
from lapilli.checkpoint.projector import ProjectorWeights, check_out, open_projector, write_projector
from lapilli.checkpoint.stream import Lazy
from lapilli.checkpoint.tensors import read_json
from lapilli.data.template import IM_END, IM_START
from lapilli.data.tokenizer import load_tokenizer
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Origin:
    """What the folder of a projector says of the model that it belongs to; None where it does not say."""

    vision_encoder: str | None = None
    image_mode: str | None = None
    feature_layers: tuple[int, ...] | None = None
    feature_select: str | None = None
    im_start_end: bool = False


@dataclass(frozen=True)
class Found:
    """A projector with everything that trained beside it."""

    weights: ProjectorWeights
    origin: Origin
    marks: Lazy | None
    """(2, D): the rows of <im_start> and <im_end>."""


def find(path: Path, base: Path | None = None) -> Found:
    """Find a projector in a file or folder of any layout.

    `base` is the model of an adapter whose embedding holds the rows of <im_start> and <im_end>; by default the one
    that the adapter names. Raises ModelError for what can't be read, and for rows that the model should have and
    has not.
    """
    path = _inner(path)
    weights = open_projector(path)
    folder = weights.file.parent
    origin = _origin(folder) if path.is_dir() or not weights.alone else Origin()
    marks = None
    if weights.alone and weights.table is not None:
        marks = _last_two(weights.table)  # as LLaVA takes them: the tokens were added last
    elif origin.im_start_end:
        marks = _rows(folder, weights, base)
    return Found(weights, origin, marks)


def _inner(path: Path) -> Path:
    """A run folder stands for its model."""
    holds = (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    return path / "model" if not holds and (path / "model").is_dir() else path


def _origin(folder: Path) -> Origin:
    spec = read_spec(folder)
    if spec is not None:
        joined = spec.joined
        return Origin(
            image_mode=joined["layout"]["mode"],
            feature_layers=tuple(joined["feature_layers"]),
            feature_select=joined["feature_select"],
            im_start_end=spec.im_start_end,
        )
    if not (folder / "config.json").is_file():
        return Origin()
    fields = read_json(folder / "config.json")
    if llava.is_llava(fields):
        return _from_llava(folder, fields)
    return _from_hf(fields) if fields.get("model_type") in ("llava", "llava_next") else Origin()


def _from_llava(folder: Path, fields: Mapping[str, Any]) -> Origin:
    tower, layer = fields.get("mm_vision_tower"), fields.get("mm_vision_select_layer")
    if isinstance(tower, str) and (folder / tower).is_dir():
        tower = str(folder / tower)
    return Origin(
        vision_encoder=tower if isinstance(tower, str) else None,
        image_mode=fields.get("image_aspect_ratio") or "square",
        feature_layers=(layer,) if isinstance(layer, int) else None,
        feature_select=fields.get("mm_vision_select_feature") or "patch",
        im_start_end=bool(fields.get("mm_use_im_start_end")),
    )


def _from_hf(fields: Mapping[str, Any]) -> Origin:
    layer = fields.get("vision_feature_layer", -2)
    strategy = fields.get("vision_feature_select_strategy", "default")
    return Origin(
        image_mode="anyres" if fields.get("model_type") == "llava_next" else None,
        feature_layers=(layer,) if isinstance(layer, int) else tuple(layer),
        feature_select="patch" if strategy == "default" else "cls_patch",
    )


def _last_two(table: Lazy) -> Lazy:
    if len(table.shape) != 2 or table.shape[0] < 2:
        raise ModelError(f"{table.where}: has shape {table.shape}; the rows of {IM_START} and {IM_END} are (2, D)")
    return table.then(lambda value: value[-2:], shape=(2, *table.shape[1:]))


def _rows(folder: Path, weights: ProjectorWeights, base: Path | None) -> Lazy:
    """The two rows in the model's own table, or in that of an adapter's base."""
    from lapilli.assemble.adapter import base_of  # above this module, as building is

    table, place = weights.table, folder
    if table is None:
        place = base or base_of(folder)
        if place is None:
            raise ModelError(
                f"{folder}: the rows of {IM_START} and {IM_END} lie in the model that it was trained on; name that "
                "model as its base"
            )
        place = _inner(place)
        table = open_projector(place).table
    if table is None:
        raise ModelError(f"{place}: has no embedding table with the rows of {IM_START} and {IM_END}")
    with quiet():
        tokenizer = load_tokenizer(folder if any(folder.glob("tokenizer*")) else place)
    ids = _ids(tokenizer)
    if ids is None or max(ids) >= table.shape[0]:
        raise ModelError(
            f"{place}: says that pictures stand between {IM_START} and {IM_END}, but its tokenizer has no such tokens "
            f"among the {table.shape[0]} rows of {table.where}; copy the tokenizer of the checkpoint itself there"
        )
    return table.then(lambda value: value[ids], shape=(2, *table.shape[1:]))


def _ids(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[t] for t in (IM_START, IM_END)] if {IM_START, IM_END} <= set(vocabulary) else None


# ---- out of a model ---------------------------------------------------------------------------------------------


def extract(src: Path, out: Path, base: Path | None = None) -> Found:
    """Write the projector of `src` to the new file `out`, .safetensors or .bin; return what was found.

    Raises ModelError for a source without one, RunError for an `out` that exists.
    """
    check_out(out)
    found = find(src, base)
    found.weights.kind  # noqa: B018 (refuses what no projector can hold)
    newline, marks = found.weights.newline, found.marks
    write_projector(
        out,
        {name: tensor.read() for name, tensor in found.weights.tensors.items()},
        None if newline is None else newline.read(),
        None if marks is None else marks.read(),
    )
    return found


# ---- into a model -----------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(
    model: VisionLanguageModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, im_start_end: bool
) -> list[str]:
    """Fill a joined model's projector from a file or folder, with newline and rows; return what is to be said.

    Raises ModelError for names or shapes that don't fit.
    """
    found = find(path)
    fill_projector(model.projector, found.weights)
    notes: list[str] = []
    newline, marks = found.weights.newline, found.marks
    if model.config.image_newline:
        if newline is None:
            notes.append(f"{found.weights.file} has no image_newline: the one of the new model is random")
        else:
            _copy(model.image_newline, newline)
    elif newline is not None:
        notes.append(f"{newline.where} is not used: no tiles in image mode {model.config.image_layout.mode}")
    if im_start_end and marks is None:
        notes.append(
            f"{found.weights.file} has no rows for {IM_START} and {IM_END}: they start as the mean of the others"
        )
    elif marks is not None and im_start_end:
        table: Any = model.get_input_embeddings()
        _copy(table.weight, marks, _ids(tokenizer))
    elif marks is not None:
        notes.append(f"{marks.where} is not used: the model has no {IM_START} and {IM_END}")
    return notes


def fill_projector(projector: torch.nn.Module, weights: ProjectorWeights) -> None:
    """Fill a projector. Raises ModelError for names or shapes that don't fit."""
    wanted = projector.state_dict()
    if set(weights.tensors) != set(wanted):
        raise ModelError(
            f"{weights.file}: has projector weights {sorted(weights.tensors)}, the projector needs {sorted(wanted)}"
        )
    for name, tensor in weights.tensors.items():
        if tensor.shape != tuple(wanted[name].shape):
            raise ModelError(
                f"{weights.file}: {name} has shape {tensor.shape}, the projector {tuple(wanted[name].shape)}"
            )
    projector.load_state_dict({name: tensor.read() for name, tensor in weights.tensors.items()})


def _copy(place: torch.Tensor, value: Lazy, rows: list[int] | None = None) -> None:
    wanted = tuple(place.shape) if rows is None else (len(rows), place.shape[1])
    if value.shape != wanted:
        raise ModelError(f"{value.where}: has shape {value.shape}, the model needs {wanted}")
    read = value.read().to(place.dtype)
    if rows is None:
        place.copy_(read)
    else:
        place[rows] = read
