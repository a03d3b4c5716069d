"""All Samples of a run in one memory-mapped file.

Python objects by the million are slow to fork and to load, and every worker that reads one copies the pages it stands
on. So Samples are written once, one after the other, as JSON (a folder of data may come from anywhere, so nothing in it
is ever executed); any number of processes map the file and rebuild one Sample at a time.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from lapilli.data.sample import Image, Message, Part, Sample, Text

_TEXT = ("utf-8", "surrogatepass")
"""JSON may escape half a surrogate pair; such a text is refused, or not, where it is tokenised."""
SAMPLES, ENDS, SOURCES = "samples.bin", "ends.npy", "sources.npy"


@dataclass(frozen=True, slots=True)
class Placed:
    """A Sample and the folder that its pictures lie in (None: its source names none)."""

    sample: Sample
    root: str | None
    source: int = 0
    """Number of its source."""


class SampleStore(Sequence[Placed]):
    """An immutable list of Samples with their image roots.

    `data` (bytes,) uint8 holds them end to end, `ends` (n,) int64 says where each one ends, `sources` (n,) int32 which
    of `roots` is its own.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray, sources: np.ndarray, roots: Sequence[str | None]) -> None:
        self._data, self._ends, self._sources = data, ends, sources
        self._roots = tuple(roots)

    @classmethod
    def open(cls, folder: str | Path, roots: Sequence[str | None]) -> SampleStore:
        """Map what a StoreWriter left in `folder`. Raises OSError or ValueError if it is not whole."""
        folder = Path(folder)
        ends = np.load(folder / ENDS, mmap_mode="r", allow_pickle=False)
        sources = np.load(folder / SOURCES, mmap_mode="r", allow_pickle=False)
        size = (folder / SAMPLES).stat().st_size
        if len(ends) != len(sources) or size != (int(ends[-1]) if len(ends) else 0):
            raise ValueError(f"{SAMPLES} has {size:,} bytes, {ENDS} says otherwise")
        data = np.memmap(folder / SAMPLES, dtype=np.uint8, mode="r") if size else np.zeros(0, dtype=np.uint8)
        return cls(data, ends, sources, roots)

    @classmethod
    def of(cls, samples: Iterable[Sample], root: str | None = None) -> SampleStore:
        """A store in memory of Samples that share one image root."""
        blobs = [encode(sample) for sample in samples]
        ends = np.cumsum([len(blob) for blob in blobs], dtype=np.int64)
        data = np.frombuffer(b"".join(blobs), dtype=np.uint8)
        return cls(data, ends, np.zeros(len(blobs), dtype=np.int32), [root])

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, item: int) -> Placed: ...
    @overload
    def __getitem__(self, item: slice) -> list[Placed]: ...
    def __getitem__(self, item: int | slice) -> Placed | list[Placed]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        if not 0 <= item < len(self):
            raise IndexError(item)
        start = int(self._ends[item - 1]) if item else 0
        source = int(self._sources[item])
        return Placed(decode(self._data[start : int(self._ends[item])].tobytes()), self._roots[source], source)

    @property
    def sources(self) -> np.ndarray:
        """Number of each Sample's source (n,) int32."""
        return self._sources


class StoreWriter:
    """Writes Samples to a folder as they come; memory holds 12 bytes of each."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._ends: list[int] = []
        self._sources: list[int] = []
        self._bytes = 0

    def __enter__(self) -> StoreWriter:
        self._file = open(self._folder / SAMPLES, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            np.save(self._folder / ENDS, np.array(self._ends, dtype=np.int64))
            np.save(self._folder / SOURCES, np.array(self._sources, dtype=np.int32))

    def append(self, blob: bytes, source: int) -> None:
        """Add one encoded Sample of the source with this number."""
        self._file.write(blob)
        self._bytes += len(blob)
        self._ends.append(self._bytes)
        self._sources.append(source)


def encode(sample: Sample) -> bytes:
    """A Sample as JSON."""
    messages = [[m.role, m.weight, [_part(part) for part in m.parts]] for m in sample.messages]
    return json.dumps([sample.id, sample.where, messages], ensure_ascii=False, separators=(",", ":")).encode(*_TEXT)


def decode(blob: bytes) -> Sample:
    """What `encode` was given."""
    name, where, messages = json.loads(blob.decode(*_TEXT))
    return Sample(name, tuple(Message(r, tuple(_unpart(p) for p in parts), w) for r, w, parts in messages), where)


def _part(part: Part) -> Any:
    if isinstance(part, Text):
        return part.text if part.weight is None else {"text": part.text, "weight": part.weight}
    return [part.path] if part.data is None else [part.path, base64.b85encode(part.data).decode()]


def _unpart(value: Any) -> Part:
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, dict):
        return Text(**value)
    return Image(value[0], base64.b85decode(value[1]) if len(value) > 1 else None)
