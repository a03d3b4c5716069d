"""Where the parts of a Cerebras model lie, recognised by what is in the files and never by a folder's name.

Three forms exist: a state file with its configuration, plain tensors with one, and the tree of two folders that their
converter takes and gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lapilli.base.errors import ModelError
from lapilli.checkpoint.cerebras.config_from import is_cerebras_config
from lapilli.checkpoint.cerebras.state_file import is_state_file
from lapilli.checkpoint.llava import is_llava
from lapilli.checkpoint.tensors import read_json, some, weight_file

TEXT, IMAGE = "text_model", "image_model"
"""Sub-folders that their converter looks for."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class Tree(NamedTuple):
    """Folders of the language model with projector, and of the vision encoder."""

    text: Path
    image: Path


class Stored(NamedTuple):
    """A file of weights (or an index of such files) under Cerebras' names, and its configuration."""

    weights: Path
    config: Path


def find(path: Path) -> Tree | Stored | None:
    """What a path holds. Raises ModelError for several state files, and for one without its configuration."""
    if path.is_file():
        if is_state_file(path):
            return Stored(path, _config_beside(path))
        return None
    if not path.is_dir():
        return None
    states = [file for file in sorted(path.iterdir()) if file.is_file() and is_state_file(file)]
    if len(states) > 1:
        raise ModelError(f"{path}: holds {len(states)} checkpoints; name one: {some(file.name for file in states)}")
    if states:
        return Stored(states[0], _config_beside(states[0]))
    if any(_is_config(file) for file in _yamls(path)):
        weights = weight_file(path) or next(iter(sorted(path.glob("*.safetensors"))), None)
        if weights is not None:
            return Stored(weights, _config_beside(weights))
    return _find_tree(path)


def _find_tree(folder: Path) -> Tree | None:
    """Two sub-folders with weights, one of a CLIP encoder and one in LLaVA's layout, whatever they are called."""
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    text, image = [], []
    for inner in sorted(folder.iterdir()):
        if not (inner / "config.json").is_file() or weight_file(inner) is None:
            continue
        fields = read_json(inner / "config.json")
        if fields.get("model_type") in ("clip", "clip_vision_model"):
            image.append(inner)
        elif is_llava(fields) or inner.name == TEXT:
            text.append(inner)
    if len(image) != 1 or len(text) != 1:
        return None
    return Tree(text[0], image[0])


def _yamls(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml") and file.is_file())


def read_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ModelError(f"{file}: can't be read as YAML ({' '.join(str(error).split())})") from error


def _is_config(file: Path) -> bool:
    try:
        return is_cerebras_config(read_yaml(file))
    except ModelError:
        return False


def _config_beside(weights: Path) -> Path:
    """The configuration of a state file: the only one in its folder, or the one with the same release in its name."""
    found = [file for file in _yamls(weights.parent) if _is_config(file)]
    release = weights.stem.partition("_to_")[2]
    named = [file for file in found if release and file.stem == f"config_to_{release}"]
    if len(found) == 1 or named:
        return (named or found)[0]
    if not found:
        raise ModelError(f"{weights}: its configuration (.yaml, with a `model` in it) is missing; put it beside it")
    raise ModelError(f"{weights.parent}: holds {len(found)} configurations; keep one: {some(f.name for f in found)}")


def tokenizer_folder(path: Path | str) -> Path | None:
    """Where the tokenizer of a model lies; None if its folder holds none (their own tools never write it)."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    tree = _find_tree(folder)
    places = [tree.text] if tree is not None else [folder / TEXT, folder]
    return next((place for place in places if any((place / name).is_file() for name in _TOKENIZERS)), None)


def encoder_folder(path: Path | str) -> Path | None:
    """Where the encoder's config.json and preprocessor_config.json lie, if anywhere."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    tree = _find_tree(folder)
    place = tree.image if tree is not None else folder / IMAGE
    return place if (place / "config.json").is_file() else None
