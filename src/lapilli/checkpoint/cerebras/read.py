"""Cerebras' LLaVA models from disk: a state file or plain tensors with a configuration, or a tree of two folders.

What lies there is recognised by content. Configuration, names and shapes are checked at opening; tensors are read when
they are needed, in the row order of everybody else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lapilli.base.errors import ModelError
from lapilli.checkpoint.cerebras import names as cs
from lapilli.checkpoint.cerebras.config_from import LLAVA_CONSTANT, from_cerebras_config
from lapilli.checkpoint.cerebras.config_to import clip_vision_fields
from lapilli.checkpoint.cerebras.places import IMAGE, TEXT, Stored, Tree, find, read_yaml, tokenizer_folder
from lapilli.checkpoint.cerebras.shapes import check, head_width, projector_shapes, shapes_of, without_tied
from lapilli.checkpoint.cerebras.state_file import is_state_file, open_state_file
from lapilli.checkpoint.llava import is_llava
from lapilli.checkpoint.names import canonical, llava_name, said, vision_name
from lapilli.checkpoint.stream import Lazy, Tensors, held, open_file, open_folder
from lapilli.checkpoint.tensors import read_json, some
from lapilli.data.tokenizer import load_tokenizer

_NOT_VISION = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
"""Tensors of a whole CLIP that its vision encoder has no part in."""
_TABLES = ("position_ids", "inv_freq")
_SEED = 0


class Opened(NamedTuple):
    """A model that is opened and not read: config.json of LLaVA and of the encoder, tensors under canonical names."""

    llava_fields: dict[str, Any]
    clip_fields: dict[str, Any]
    tensors: Tensors
    notes: list[str]


def is_cerebras(path: Path | str) -> bool:
    """Whether a file or folder holds one of their LLaVA models; a damaged one counts, so that opening it says why."""
    try:
        return find(Path(path)) is not None
    except ModelError:
        return True


def open_cerebras(path: Path | str) -> Opened:
    """Open a `.mdl` file or its folder, a folder of plain tensors with a configuration, or a tree of two folders.

    Raises ModelError naming file, tensor or setting for whatever can't be read or has no place in LLaVA's models.
    """
    path = Path(path)
    found = find(path)
    if found is None:
        raise ModelError(
            f"{path}: no model of Cerebras: neither a .mdl file or plain tensors with its configuration (.yaml), nor "
            f"a folder with {IMAGE}/ and {TEXT}/"
        )
    return _open_tree(found) if isinstance(found, Tree) else _open_stored(found)


# ---- a state file, or plain tensors -----------------------------------------------------------------------------


def _open_stored(found: Stored) -> Opened:
    config = read_yaml(found.config)
    try:
        settings = from_cerebras_config(config)
    except ModelError as error:
        raise ModelError(f"{found.config}: {error}") from error
    stored, notes = _stored_tensors(found.weights)
    notes = [*(f"{found.config}: {note}" for note in settings.notes), *(f"{found.weights}: {note}" for note in notes)]
    there = cs.model_of(set(stored))
    if there not in (None, settings.model):
        raise ModelError(f"{found.config}: describes the model {settings.model}, {found.weights.name} holds {there}")
    beside = found.weights.parent
    kept = _fields(beside / TEXT)
    counts = {key: value for key, value in settings.llava_fields.items() if key not in LLAVA_CONSTANT}
    if "num_key_value_heads" in kept:
        counts.setdefault("num_key_value_heads", counts["num_attention_heads"])
    llava = (kept or LLAVA_CONSTANT) | counts | {"mm_vision_tower": f"../{IMAGE}"}
    clip = _fields(beside / IMAGE)
    unused = {key: clip[key] for key in ("projection_dim",) if key in clip}
    clip |= settings.clip_fields | unused
    llava |= _token_ids(found.weights, beside / TEXT, notes)
    tensors, more = without_tied(_in_our_order(found, stored, settings.model, head_width(llava)), llava)
    check(tensors, shapes_of(llava, clip), str(found.weights))
    return Opened(llava, clip, tensors, notes + more)


def _fields(folder: Path) -> dict[str, Any]:
    """What our own writer keeps beside a state file, because their configuration has no place for it."""
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _stored_tensors(weights: Path) -> tuple[Tensors, list[str]]:
    if is_state_file(weights):
        return open_state_file(weights)
    return {name.removeprefix("model."): tensor for name, tensor in open_file(weights).items()}, []


def _in_our_order(found: Stored, stored: Tensors, model: cs.Model, width: int) -> Tensors:
    others = cs.other_encoders(set(stored))
    if others:
        raise ModelError(
            f"{found.weights}: {len(others)} tensors of further vision encoders, or of projectors of one encoder: "
            f"{some(others)}; LLaVA's and Hugging Face's layouts hold one encoder and one projector"
        )
    made: Tensors = {}
    unknown = []
    for name, tensor in stored.items():
        new = cs.to_ours(name, model)
        if new is not None:
            made[new] = _turned(new, tensor, width)
        elif not cs.is_copy(name):
            unknown.append(name)
    if unknown:
        raise ModelError(f"{found.weights}: {len(unknown)} tensors have no place in LLaVA's models: {some(unknown)}")
    for name, copy in stored.items():
        norm = made.get("language.model.norm.weight")
        if cs.is_copy(name) and norm is not None and not torch.equal(copy.read(), norm.read()):
            raise ModelError(f"{copy.where}: differs from {norm.where}, and LLaVA's models have one last norm")
    return made


def _turned(name: str, tensor: Lazy, width: int) -> Lazy:
    if not cs.is_reordered(name):
        return tensor
    if "_proj" in name and (width < 2 or not tensor.shape or tensor.shape[0] % width):
        raise ModelError(f"{tensor.where}: {tensor.shape} rows don't divide into heads of {width}")
    return tensor.then(lambda value: cs.reordered(name, value, width, theirs=False))


def _token_ids(path: Path, hint: Path, notes: list[str]) -> dict[str, int]:
    """bos, eos and pad from the tokenizer of a model, whose own configuration has none, or had wrong ones."""
    folder = tokenizer_folder(path)
    if folder is None:
        notes.append(
            f"{path}: no tokenizer with it, as their tools leave it, so that bos, eos and pad are not sure; put the "
            f"tokenizer's files into {hint}"
        )
        return {}
    tokenizer = load_tokenizer(folder)
    found = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {key: value for key, value in found.items() if value is not None}


# ---- a tree of two folders --------------------------------------------------------------------------------------


def _open_tree(tree: Tree) -> Opened:
    llava = read_json(tree.text / "config.json")
    if not is_llava(llava):
        raise ModelError(
            f"{tree.text / 'config.json'}: is the language model's own; a tree needs LLaVA's settings in it "
            "(mm_projector_type, mm_vision_select_layer, mm_hidden_size)"
        )
    inner = read_json(tree.image / "config.json")
    nested = inner.get("vision_config")
    clip = dict(nested if isinstance(nested, Mapping) else inner)
    clip |= clip_vision_fields(inner) | {"model_type": "clip_vision_model"}
    notes: list[str] = []
    before = {key: llava.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    llava |= _token_ids(tree.text.parent, tree.text, notes) | {"mm_vision_tower": f"../{tree.image.name}"}
    for key, value in before.items():
        if value is not None and value != llava[key]:
            notes.append(f"{tree.text / 'config.json'}: {key} {value} is {llava[key]} in the tokenizer, which counts")
    tensors, computed = canonical(open_folder(tree.text), llava_name)
    if computed:
        notes.append(f"{tree.text}: {said(computed)}")
    tensors = _with_encoder(tree, llava, tensors, notes)
    if not any(name.startswith("projector.") for name in tensors):
        tensors |= _new_projector(tree, llava, clip, tensors, notes)
    tensors, more = without_tied(tensors, llava)
    return Opened(llava, clip, tensors, notes + more)


def _with_encoder(tree: Tree, llava: Mapping[str, Any], tensors: Tensors, notes: list[str]) -> Tensors:
    """The encoder's tensors: those of its own folder, or the language model's folder's where they were trained."""
    inside = [name for name in tensors if name.startswith("vision.")]
    if inside and llava.get("unfreeze_mm_vision_tower"):
        notes.append(f"{tree.text}: its {len(inside)} tensors of the vision encoder, which was trained, are used")
        return tensors
    if inside:
        notes.append(f"{tree.text}: {len(inside)} tensors of a vision encoder are not read; {tree.image} has them")
    made = {name: tensor for name, tensor in tensors.items() if name not in set(inside)}
    left: Counter[str] = Counter()
    for name, tensor in open_folder(tree.image).items():
        if name.startswith(_NOT_VISION) or name.endswith(_TABLES):
            left[name.partition(".")[0] if not name.endswith(_TABLES) else "position tables"] += 1
        else:
            made[vision_name(name)] = tensor
    if left:
        notes.append(f"{tree.image}: not the vision encoder's, not read: "
                     f"{', '.join(f'{n} of {k}' for k, n in sorted(left.items()))}")  # fmt: skip
    return made


def _new_projector(
    tree: Tree, llava: Mapping[str, Any], clip: Mapping[str, Any], tensors: Tensors, notes: list[str]
) -> Tensors:
    """A projector for a language model that never had one: uniform in 1 / sqrt(inputs), as the original's."""
    dtype = next((t.dtype for n, t in tensors.items() if n.startswith("language.")), torch.float32)
    generator = torch.Generator().manual_seed(_SEED)
    made: Tensors = {}
    inputs = 1
    for name, shape in projector_shapes(llava, clip).items():
        inputs = shape[1] if len(shape) == 2 else inputs
        value = torch.empty(shape).uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
        made[name] = held(value.to(dtype), f"{tree.text}: {name} (new)")
    notes.append(
        f"{tree.text}: holds no projector: the {len(made)} tensors of one are new and random (uniform, seed {_SEED}), "
        "to be trained"
    )
    return made
