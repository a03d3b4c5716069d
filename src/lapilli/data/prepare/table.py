"""What both layouts know of each row beside its tokens: name, place in the source, length, pictures and their sizes.

It is a handful of flat HDF5 arrays with an array of ends beside each ragged one: small enough to be held whole, so
that lengths are known without reading a single token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lapilli.data.prepare.rows import Rows

CHUNK = 8192
"""Elements per HDF5 chunk: small, because one row is read at a time, in random order."""

BROKEN = (
    OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError, OverflowError, MemoryError
)  # fmt: skip
"""What HDF5 and NumPy raise on damaged files; nothing but reading one runs where these are caught."""

_TEXT = ("utf-8", "surrogatepass")
"""JSON may escape half a surrogate pair, and a name need not be a valid one."""


def write_array(group: Any, name: str, values: Any) -> None:
    """Write a flat array, compressed, in chunks that are quick to read alone."""
    values = np.asarray(values)
    if not values.size:
        group.create_dataset(name, data=values)
        return
    chunks = (min(CHUNK, len(values)), *values.shape[1:])
    group.create_dataset(name, data=values, chunks=chunks, compression="gzip", compression_opts=1, shuffle=True)


def write_texts(group: Any, name: str, texts: Sequence[str]) -> None:
    """Write strings end to end as UTF-8 in `name`, and in `NAME_ends` where each one ends."""
    encoded = [text.encode(*_TEXT) for text in texts]
    write_array(group, name, np.frombuffer(b"".join(encoded), dtype=np.uint8))
    write_array(group, f"{name}_ends", ends_of([len(one) for one in encoded]))


def write_table(group: Any, rows: Rows) -> None:
    """Write what is known of each row, and of each picture in the order of the rows."""
    examples = rows.examples
    slots = [slot for example in examples for slot in example.images]
    write_array(group, "lengths", rows.lengths)
    write_array(group, "supervised_tokens", rows.supervised)
    write_array(group, "image_ends", ends_of([len(e.images) for e in examples]))
    write_array(group, "image_start", np.array([s.start for s in slots], dtype=np.int32))
    write_array(group, "image_tokens", np.array([s.tokens for s in slots], dtype=np.int32))
    sizes = np.array([(s.width, s.height) for s in slots], dtype=np.int32).reshape(-1, 2)
    write_array(group, "image_size", sizes)
    write_texts(group, "id", [e.id for e in examples])
    write_texts(group, "where", [e.where for e in examples])


class Table:
    """The table of an open HDF5 file; its numbers are read when it is made, its texts one by one.

    `lengths` and `supervised` (n,) int32; `image_ends` (n,) int64; `image_start` and `image_tokens` (m,) int32 and
    `image_size` (m, 2) int32 (width, height) for all pictures of all rows. Raises one of BROKEN if damaged.
    """

    def __init__(self, group: Any) -> None:
        self.lengths: np.ndarray = group["lengths"][()]
        self.supervised: np.ndarray = group["supervised_tokens"][()]
        self.image_ends: np.ndarray = group["image_ends"][()]
        self.image_start: np.ndarray = group["image_start"][()]
        self.image_tokens: np.ndarray = group["image_tokens"][()]
        self.image_size: np.ndarray = group["image_size"][()]
        self.id, self.where = Texts(group, "id"), Texts(group, "where")
        rows, images = {len(self.lengths), len(self.supervised), len(self.image_ends)}, int(self.image_ends[-1])
        shapes = {len(self.image_start), len(self.image_tokens), len(self.image_size)}
        if len(rows) != 1 or shapes != {images} or self.image_size.shape[1:] != (2,) or (self.pictures < 0).any():
            raise ValueError("its tables do not fit each other")

    @property
    def pictures(self) -> np.ndarray:
        """(n,) int32: pictures of each row."""
        return np.diff(self.image_ends, prepend=0).astype(np.int32)

    def images(self, row: int) -> range:
        """Numbers of a row's pictures among all."""
        return span(self.image_ends, row)


class Texts:
    """Strings that `write_texts` wrote."""

    def __init__(self, group: Any, name: str) -> None:
        self._bytes, self._ends = group[name], group[f"{name}_ends"][()]

    def __getitem__(self, i: int) -> str:
        at = span(self._ends, i)
        return self._bytes[at.start : at.stop].tobytes().decode(*_TEXT)


def ends_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """(n,) int64: where each of some ragged pieces ends."""
    return np.cumsum(np.array(lengths, dtype=np.int64), dtype=np.int64)


def span(ends: np.ndarray, i: int) -> range:
    """Where piece `i` stands."""
    return range(int(ends[i - 1]) if i else 0, int(ends[i]))
