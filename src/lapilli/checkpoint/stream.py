"""Tensors that pass from one checkpoint to another one at a time.

A model of 13 GB is converted on a machine that could not hold it: a checkpoint is opened as a table of tensors that
are not read yet, each with its shape and dtype, changes are noted down, and the writer reads, changes and writes one
tensor after the other. Files are mapped, so a tensor that needs no change costs no memory of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lapilli.base.errors import ModelError, RunError
from lapilli.base.progress import Progress
from lapilli.checkpoint.mapping import map_bytes
from lapilli.checkpoint.tensors import map_pickle, outline_pickle, read_index, some, weight_file

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK_BYTES = 2**24
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is needed, and not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    """File and name, for messages."""
    read: Callable[[], torch.Tensor]
    source: tuple[str, str] | None = None
    """File and name again where this is what the file holds, unchanged: equal for equal tensors of two openings."""

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def then(
        self,
        change: Callable[[torch.Tensor], torch.Tensor],
        *,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Lazy:
        """The tensor after `change`, which must give the `shape` and `dtype` said here (None: as before)."""
        made = self.shape if shape is None else shape
        return Lazy(made, dtype or self.dtype, self.where, lambda: change(self.read()))

    def to(self, dtype: torch.dtype) -> Lazy:
        """The tensor in another dtype; whole numbers stay as they are."""
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return self.then(lambda tensor: tensor.to(dtype), dtype=dtype)


Tensors = dict[str, Lazy]
"""A checkpoint's tensors by name, in the order of its files."""


def held(tensor: torch.Tensor, where: str) -> Lazy:
    """A tensor in memory as one that could be on disk."""
    return Lazy(tuple(tensor.shape), tensor.dtype, where, lambda: tensor)


# ---- reading ----------------------------------------------------------------------------------------------------


def open_folder(folder: Path) -> Tensors:
    """`open_file` of the weights in a folder: model.safetensors or pytorch_model.bin, whole or with an index."""
    file = weight_file(folder)
    if file is None:
        raise ModelError(f"{folder}: no weights here (model.safetensors or pytorch_model.bin, whole or with an index)")
    return open_file(file)


def open_file(file: Path) -> Tensors:
    """The tensors of a weight file, or of all shards of an index; nothing but headers is read.

    Raises ModelError for missing, broken or cut files, for a pickle that holds more than tensors, and for an index
    that disagrees with its shards.
    """
    if file.suffix != ".json":
        return _open_one(file)
    made: Tensors = {}
    for shard, listed in read_index(file).items():
        found = _open_one(file.parent / shard)
        if listed != set(found):
            raise ModelError(f"{file.parent / shard}: holds other tensors than listed: {some(listed ^ set(found))}")
        made |= found
    return made


def _open_one(file: Path) -> Tensors:
    real = str(file.resolve())
    return {name: replace(tensor, source=(real, name)) for name, tensor in _read_one(file).items()}


def _read_one(file: Path) -> Tensors:
    if file.suffix != ".safetensors":
        outline = outline_pickle(file)
        if outline is not None:
            return {name: _pickled(file, name, tensor, place) for name, (tensor, place) in outline.items()}
        return {name: held(tensor, f"{file}: {name}") for name, tensor in map_pickle(file).items()}
    try:
        with safe_open(file, framework="numpy"):  # checks the header against the file
            pass
        with open(file, "rb") as stream:
            size = struct.unpack("<Q", stream.read(8))[0]
            table: dict[str, Any] = json.loads(stream.read(size))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{file}: can't be read as weights ({error}); copy it again") from error
    table.pop("__metadata__", None)
    places = sorted(table.items(), key=lambda item: item[1]["data_offsets"])
    return {name: _mapped(file, name, about, 8 + size) for name, about in places}


def _pickled(file: Path, name: str, about: torch.Tensor, place: int) -> Lazy:
    """A tensor of a pickled file by its outline; its storage stands at `place`."""
    size, kind = about.untyped_storage().nbytes(), about.dtype
    shape, stride, offset = tuple(about.shape), about.stride(), about.storage_offset()

    def read() -> torch.Tensor:
        try:
            return map_bytes(file, place, size).view(kind).as_strided(shape, stride, offset)
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{file}: {name} can't be read ({error})") from error

    return Lazy(shape, kind, f"{file}: {name}", read)


def _mapped(file: Path, name: str, about: Mapping[str, Any], data: int) -> Lazy:
    """A tensor by its entry in the header; the file's data begin at `data`."""
    kind, shape = _DTYPES.get(about["dtype"]), tuple(about["shape"])
    if kind is None:
        raise ModelError(f"{file}: {name} is of type {about['dtype']}, which is not supported")
    start, end = about["data_offsets"]

    def read() -> torch.Tensor:
        try:
            return map_bytes(file, data + start, end - start).view(kind).view(shape)
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{file}: {name} can't be read ({error})") from error

    return Lazy(shape, kind, f"{file}: {name}", read)


# ---- writing ----------------------------------------------------------------------------------------------------


def size_of(text: str) -> int:
    """Bytes that `5GB`, `500MB` or a plain number mean. Raises ModelError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ModelError(f'"{text}" is no size; write 5GB, 500MB or a number of bytes')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise RunError unless the disk that will hold `folder` has room for so many bytes."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise RunError(
            f"{folder}: needs {needed_bytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; "
            "make room or choose another place"
        )


@dataclass(frozen=True)
class Written:
    """What became of a tensor: its file, and the SHA-256 of its bytes if it was asked for."""

    file: str
    sha256: str | None


def write_folder(
    folder: Path,
    tensors: Mapping[str, Lazy],
    *,
    shard_bytes: int = 5 * 10**9,
    hashes: bool = False,
    progress: Progress | None = None,
    stem: str = "model",
) -> dict[str, Written]:
    """Write `tensors` as safetensors, in shards with an index where one file would be larger than `shard_bytes`.

    One tensor at a time is in memory. `progress` advances by bytes. Raises ModelError if a tensor comes out in
    another shape or dtype than was said, and RunError if the disk is full.
    """
    shards = _shards(tensors, shard_bytes)
    written: dict[str, Written] = {}
    for number, names in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        part = {key: tensors[key] for key in names}
        for key, digest in write_file(folder / name, part, hashes=hashes, progress=progress):
            written[key] = Written(name, digest)
    if len(shards) > 1:
        total = sum(tensor.size_bytes for tensor in tensors.values())
        places = {key: found.file for key, found in written.items()}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written


def _shards(tensors: Mapping[str, Lazy], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.size_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.size_bytes
    return shards


def write_file(
    file: Path, tensors: Mapping[str, Lazy], *, hashes: bool = False, progress: Progress | None = None
) -> Iterator[tuple[str, str | None]]:
    """Write one safetensors file, a tensor at a time; yield each name with its SHA-256 when it is written."""
    try:
        with open(file, "wb") as stream:
            stream.write(_header(tensors))
            for name, tensor in tensors.items():
                digest = hashlib.sha256() if hashes else None
                for chunk in _bytes(name, tensor):
                    stream.write(chunk)
                    if digest is not None:
                        digest.update(chunk)
                    if progress is not None:
                        progress.advance(len(chunk))
                yield name, None if digest is None else digest.hexdigest()
    except OSError as error:
        raise RunError(f"{file}: can't be written ({error.strerror or error})") from error


def _header(tensors: Mapping[str, Lazy]) -> bytes:
    """The file format's beginning: length, JSON, and blanks up to a multiple of eight bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size_bytes
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(name: str, tensor: Lazy) -> Iterator[memoryview]:
    value = tensor.read()
    if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
        raise ModelError(
            f"{tensor.where}: {name} came out as {tuple(value.shape)} {value.dtype}, not {tensor.shape} {tensor.dtype}"
        )
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES].data


def digest_of(tensor: Lazy) -> str:
    """SHA-256 of a tensor's bytes in hexadecimal."""
    made = hashlib.sha256()
    for chunk in _bytes(tensor.where, tensor):
        made.update(chunk)
    return made.hexdigest()


def total_bytes(tensors: Iterable[Lazy]) -> int:
    """What so many tensors take on disk."""
    return sum(tensor.size_bytes for tensor in tensors)


def copy_files(names: Iterable[str], source: Path, target: Path) -> list[str]:
    """Copy those of the named files that `source` has; return which."""
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        shutil.copyfile(os.path.realpath(source / name), target / name)
    return found
