"""Cerebras' `.mdl` files, read: HDF5 with one LZ4-packed dataset per tensor, named `model.<name>`, all at the root.

Reading happens in a process of its own, because the HDF5 library may end the process that opens a damaged file.
Entries of a training run (optimiser, steps, schedules) are passed over by name and counted. Nothing is unpickled: what
is stored as a pickle is refused.
"""

from __future__ import annotations

import json
import math
import select
import struct
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import torch

from lapilli.base.errors import ModelError
from lapilli.checkpoint.cerebras.hdf5_child import FAILED
from lapilli.checkpoint.stream import Lazy, Tensors

SIGNATURE = b"\x89HDF\r\n\x1a\n"
FORMAT = 0.5
"""Version of the file format since their release 2.1; older ones (0.4 and below) are read too."""
MODEL = "model."
ABOUT = ".__metadata__"
_PATIENCE_SECONDS = 120.0
_MOST_PACKED = 300
"""LZ4 makes nothing smaller than to a 255th."""
_DTYPES = {"torch.float64": "f8", "torch.float32": "f4", "torch.float16": "f2", "torch.bfloat16": "i2",
           "torch.int64": "i8", "torch.int32": "i4", "torch.int16": "i2", "torch.uint8": "u1"}  # fmt: skip


def is_state_file(path: Path) -> bool:
    """Whether a file is one of theirs by its first bytes and, if it is not called so, by its entries."""
    try:
        with open(path, "rb") as stream:
            if stream.read(len(SIGNATURE)) != SIGNATURE:
                return False
        if path.suffix == ".mdl":
            return True
        return any(name.startswith(MODEL) for name in _Reader(path, _PATIENCE_SECONDS).table()["entries"])
    except (OSError, ModelError):
        return False


def open_state_file(path: Path, *, patience_seconds: float = _PATIENCE_SECONDS) -> tuple[Tensors, list[str]]:
    """The tensors of the model in a `.mdl` file, without `model.`, and what was passed over.

    Nothing but tables is read. Raises ModelError for files that are damaged, cut short or of another kind, and for
    tensors that are stored in a way that can't be read here.
    """
    try:
        with open(path, "rb") as stream:
            if stream.read(len(SIGNATURE)) != SIGNATURE:
                raise ModelError(f"{path}: no HDF5 file; a .mdl file of Cerebras is one")
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror or error})") from error
    reader = _Reader(path, patience_seconds)
    table = reader.table()
    root = table["attributes"]
    version = root.get("__version__", 0.1)
    if not isinstance(version, int | float) or isinstance(version, bool):
        raise ModelError(f"{path}: __version__ {version!r} is no number; the file is damaged")
    if version >= FORMAT and not root.get("__SUCCESS__"):
        raise ModelError(f"{path}: was not written to its end (no __SUCCESS__ in it); take another checkpoint")
    old = version < FORMAT
    made: Tensors = {}
    others: Counter[str] = Counter()
    for stored, entry in table["entries"].items():
        name = unquote(stored) if old else stored
        if not name.startswith(MODEL):
            others[name.partition(".")[0]] += 1
            continue
        made[name.removeprefix(MODEL)] = _lazy(reader, stored, entry)
    for key, text in root.items():
        name = key.removesuffix(ABOUT)
        if name == key or name in table["entries"]:
            continue
        if not name.startswith(MODEL):
            others[name.partition(".")[0]] += 1
            continue
        made[name.removeprefix(MODEL)] = _not_stored(path, name, text, made)
    if not made:
        raise ModelError(f"{path}: holds no model: none of its {len(table['entries'])} entries begins with {MODEL}")
    notes = [f"not the model's, not read: {', '.join(f'{n} of {k}' for k, n in sorted(others.items()))}"] * bool(others)
    return made, notes


def _lazy(reader: _Reader, stored: str, entry: Mapping[str, Any]) -> Lazy:
    where = f"{reader.path}: {stored}"
    if "is" in entry:
        raise ModelError(f"{where}: {entry['is']}; save the checkpoint whole, without links")
    about, shape = entry["attributes"], entry["shape"]
    if shape is None:
        raise ModelError(f"{where}: is no table of numbers ({about.get('__TYPE__', about.get('__H5_TYPE__'))})")
    said = about.get("dtypes")
    said = str(said[0]) if isinstance(said, list) and said else ("torch.bfloat16" if about.get("is_bfloat16") else None)
    kind = entry["dtype"].lstrip("<|=")
    dtype = said or next((name for name, short in _DTYPES.items() if short == kind and name != "torch.bfloat16"), "")
    if _DTYPES.get(dtype) != kind:
        raise ModelError(f"{where}: stored as {entry['dtype']} and said to be {said}; the file is damaged")
    size = math.prod(shape) * int(kind[1:])
    stored_bytes = min(entry["stored_bytes"], reader.path.stat().st_size)
    if size > 0 and (not stored_bytes or size > _MOST_PACKED * stored_bytes + 2**20):
        raise ModelError(f"{where}: {tuple(shape)} can't be in {stored_bytes} bytes; the file is damaged")
    torch_dtype = _torch_dtype(dtype)
    return Lazy(tuple(shape), torch_dtype, where, lambda: reader.read(stored, tuple(shape), torch_dtype))


def _torch_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{name} is no type of numbers")
    return getattr(torch, name.removeprefix("torch."))


def _not_stored(path: Path, name: str, text: Any, known: Tensors) -> Lazy:
    """A tensor without a dataset: the same as another one (tied), or one number in all places."""
    where = f"{path}: {name}"
    try:
        about = json.loads(text)[name + ABOUT]
        kind = about["__TYPE__"]
        if kind == "LinkedObject":
            return known[about["key"].removeprefix(MODEL)]
        if kind == "DeferredFullTensor":
            shape, value = tuple(int(side) for side in about["shape"]), float(about["fill_value"])
            dtype = _torch_dtype(about["dtype"])
            return Lazy(shape, dtype, where, lambda: torch.full(shape, value).to(dtype))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: its description can't be read ({error}); the file is damaged") from error
    raise ModelError(f"{where}: is stored as {kind}, which only their own library reads; save the checkpoint whole")


class _Reader:
    """Asks a process of its own for what is in a file; that process ends with this object, or with the file's harm."""

    def __init__(self, path: Path, patience_seconds: float) -> None:
        self.path, self._patience_seconds = path, patience_seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def table(self) -> dict[str, Any]:
        with self._lock:
            return json.loads(b"".join(self._answer(None)))

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype)
        room = made.reshape(-1).view(torch.uint8).numpy().data
        with self._lock:
            done = sum(len(part) for part in self._answer(name, room))
            if done != len(room):
                raise ModelError(f"{self.path}: {name}: {done} bytes where {len(room)} were said; copy the file again")
        return made

    def _answer(self, name: str | None, room: memoryview | None = None) -> Iterator[memoryview]:
        """The parts of an answer, each written into `room` where one is given."""
        asked: Any = self._running().stdin
        try:
            asked.write(json.dumps(name).encode() + b"\n")
        except OSError:
            self._broken(name)
        done = 0
        while length := struct.unpack("<Q", self._take(8, name))[0]:
            if length == FAILED:
                size = struct.unpack("<Q", self._take(8, name))[0]
                message = bytes(self._take(size, name)).decode("utf-8", "replace")
                self._stop()
                raise ModelError(f"{self.path}: {name or 'its tables'} can't be read ({message}); copy the file again")
            if room is not None and done + length > len(room):
                self._broken(name)
            yield self._take(length, name, None if room is None else room[done : done + length])
            done += length

    def _take(self, length: int, name: str | None, room: memoryview | None = None) -> memoryview:
        pipe: Any = self._running().stdout
        room = memoryview(bytearray(length)) if room is None else room
        done = 0
        while done < length:
            if not select.select([pipe], [], [], self._patience_seconds)[0]:
                self._broken(name, f"no answer for {self._patience_seconds:.0f} s")
            got = pipe.readinto(room[done:])
            if not got:
                self._broken(name)
            done += got
        return room

    def _broken(self, name: str | None, why: str = "the HDF5 library gave up on it") -> NoReturn:
        self._stop()
        what = name or "its tables"
        raise ModelError(f"{self.path}: {what} can't be read ({why}); the file is damaged: copy it again")

    def _running(self) -> subprocess.Popen[bytes]:
        child = self._child
        if child is None:
            script = Path(__file__).with_name("hdf5_child.py")
            child = subprocess.Popen(
                [sys.executable, "-P", str(script), str(self.path)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            weakref.finalize(self, _end, child)
            self._child = child
        return child

    def _stop(self) -> None:
        if self._child is not None:
            _end(self._child)
            self._child = None


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
