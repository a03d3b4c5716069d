"""Tensor files on disk: safetensors or pickles, whole or in shards, read safely and accounted for.

Pickles are read with `weights_only`, so no code in them ever runs. Every tensor must have a place in the model and
every place a tensor: what is left over or missing is an error that names it.
"""

import json
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from lapilli.base.errors import ModelError

_BROKEN = (
    OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError,
    struct.error, zipfile.BadZipFile, SafetensorError,
)  # fmt: skip
"""What reading a damaged file raises: the unpickler stumbles over whatever byte it meets first."""


WEIGHT_FILES = tuple(
    f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
)
"""Where weights lie, in transformers' order."""


def weight_file(folder: Path) -> Path | None:
    """Return the file that holds the weights, or the index of its shards, in transformers' order, or None."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def check_tensors(folder: Path, part: str, tensors: Mapping[str, torch.Tensor], module: torch.nn.Module) -> None:
    """Raise ModelError unless `tensors` fill `module`: none missing (tied ones may), none left, shapes equal."""
    places = module.state_dict()
    extra = sorted(set(tensors) - set(places))
    if extra:
        raise ModelError(f"{folder}: {len(extra)} tensors have no place in the {part}: {some(extra)}")
    missing = sorted({name for name, _ in module.named_parameters()} - set(tensors))
    if missing:
        raise ModelError(f"{folder}: {len(missing)} tensors of the {part} are missing: {some(missing)}")
    for name, tensor in tensors.items():
        if tensor.shape != places[name].shape:
            raise ModelError(
                f"{folder}: {part}: {name} has shape {tuple(tensor.shape)}, config.json asks for "
                f"{tuple(places[name].shape)}"
            )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelError naming the file."""
    try:
        made = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: can't be read ({error})") from error
    if not isinstance(made, dict):
        raise ModelError(f"{file}: not a JSON object")
    return made


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f'"{twice}" stands there twice')
    return made


def some(names: Iterable[str]) -> str:
    """The first few names, in order, and how many more there are."""
    first = sorted(names)
    return ", ".join(first[:5]) + (f" and {len(first) - 5} more" if len(first) > 5 else "")


def read_index(index: Path) -> dict[str, set[str]]:
    """The shards that an index names, in order, with the tensors that it lists for each.

    Raises ModelError if a shard is missing or lies elsewhere, and if a tensor is listed twice.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(f, str) and Path(f).name == f for f in names.values()):
        raise ModelError(f"{index}: `weight_map` must name a file of this folder for each tensor")
    shards: dict[str, set[str]] = {file: set() for file in sorted(set(names.values()))}
    for name, file in names.items():
        shards[file].add(name)
    for file in shards:
        if not (index.parent / file).is_file():
            raise ModelError(f"{index.parent / file}: this shard is missing; {index.name} lists it")
    return shards


def map_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled weight file, mapped from disk where its format allows.

    Raises ModelError for a broken file, and for one that holds anything but tensors: no code in it ever runs.
    """
    tensors = _load_pickle(file, "cpu", mmap=_is_stored(file))
    if not all(_is_plain(tensor) and not tensor.is_meta for tensor in tensors.values()):
        raise ModelError(f"{file}: not a table of tensors")
    return tensors


def outline_pickle(file: Path) -> dict[str, tuple[torch.Tensor, int]] | None:
    """The tensors of a pickled weight file on the meta device, each with the place of its storage in the file.

    None where that is not known, so that the file must be read as a whole. Raises as `map_pickle`.
    """
    if not _is_stored(file):
        return None
    made: dict[str, tuple[torch.Tensor, int]] = {}
    for name, tensor in _load_pickle(file, "meta", mmap=False).items():
        place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if _is_plain(tensor) else None
        if not isinstance(place, int):
            return None
        made[name] = tensor, place
    return made


def _is_stored(file: Path) -> bool:
    """Whether a pickled file is an archive of bytes as they are: neither torch's before 1.6 nor compressed."""
    try:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except _BROKEN as error:
        raise _broken(file, error) from error


def _load_pickle(file: Path, device: str, *, mmap: bool) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(file, map_location=device, weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        raise ModelError(f"{file}: can't be read safely: it holds more than tensors, or is broken") from error
    except _BROKEN as error:
        raise _broken(file, error) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ModelError(f"{file}: not a table of tensors")
    return tensors


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether this is a tensor of plain numbers: neither sparse nor quantised."""
    return tensor.layout == torch.strided and not tensor.is_quantized


def _broken(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file}: can't be read as weights ({' '.join(str(error).split()) or type(error).__name__})")
