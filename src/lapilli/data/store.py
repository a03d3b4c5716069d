"""All Samples of a run in one block of memory.

Python objects by the million are slow to fork: every worker that reads one copies the pages it stands on. So Samples
are kept as bytes in one array, which any number of worker processes share, and are rebuilt one at a time.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from lapilli.data.sample import Sample


@dataclass(frozen=True, slots=True)
class Placed:
    """A Sample and the folder that its pictures lie in (None: its source names none)."""

    sample: Sample
    root: str | None


class SampleStore(Sequence[Placed]):
    """An immutable list of Samples with their image roots. The bytes never leave the process and its workers."""

    def __init__(self, blobs: Iterable[bytes], sources: Iterable[int], roots: Sequence[str | None]) -> None:
        parts = list(blobs)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._data = np.frombuffer(b"".join(parts), dtype=np.uint8)
        self._sources = np.fromiter(sources, dtype=np.int32)
        self._roots = tuple(roots)

    @staticmethod
    def blob(sample: Sample) -> bytes:
        """The form in which a Sample is handed to the constructor."""
        return pickle.dumps(sample, protocol=pickle.HIGHEST_PROTOCOL)

    @classmethod
    def of(cls, samples: Iterable[Sample], root: str | None = None) -> SampleStore:
        """A store of Samples that share one image root."""
        blobs = [cls.blob(sample) for sample in samples]
        return cls(blobs, [0] * len(blobs), [root])

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
        sample = pickle.loads(self._data[start : int(self._ends[item])].tobytes())
        return Placed(sample, self._roots[self._sources[item]])
