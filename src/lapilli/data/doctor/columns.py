"""The usable records of an examination as columns of numbers: a hundred bytes or two of each, whatever there are.

Python objects would be ten times as large, and a check must not need more memory than the training that it is for.
Names, which only messages need, stand end to end in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from lapilli.data.doctor.record import RecordFacts

KEY_BYTES = 16
_TEXT = ("utf-8", "surrogatepass")
_RECORD = {
    "source": np.int32,
    "number": np.int64,
    "words": np.int32,
    "length": np.int32,
    "supervised": np.int32,
    "pictures": np.int32,
    "where_bytes": np.int32,
    "file": np.int32,
}
_PICTURE = {"exact": np.bool_, "kind": np.int32, "path_bytes": np.int32}


class Columns:
    """n usable records with m pictures. Each array is a view: take none before the last `append`.

    `source`, `words`, `length`, `supervised`, `pictures` (n,) int32, `number` (n,) int64; `keys` and `identities`
    (n, 2) uint64 are hashes of a record's words, and of its words and pictures. `exact` (m,) bool, `kind` (m,) int32
    and `picture_keys` (m, 2) uint64 are of pictures, in the order of their records; `kinds` names each kind's
    (mode, format). `leaked` (n,) bool is set by whoever finds leaks.
    """

    def __init__(self) -> None:
        self._data = {name: bytearray() for name in (*_RECORD, *_PICTURE)}
        self._keys, self._identities, self._picture_keys = bytearray(), bytearray(), bytearray()
        self._where, self._path = bytearray(), bytearray()
        self._files: dict[str, int] = {}
        self._kinds: dict[tuple[str, str], int] = {}
        self._ends: dict[str, np.ndarray] = {}
        self._count = 0
        self.leaked = np.zeros(0, dtype=bool)

    def __len__(self) -> int:
        return self._count

    def append(self, facts: Sequence[RecordFacts]) -> None:
        """Add some records, in order."""
        self._count += len(facts)
        pictures = [picture for record in facts for picture in record.pictures]
        where = [record.where.removeprefix(f"{record.file}: ").encode(*_TEXT) for record in facts]
        paths = [None if picture.path is None else picture.path.encode(*_TEXT) for picture in pictures]
        for name in ("source", "number", "words", "length", "supervised"):
            self._add(name, (getattr(record, name) for record in facts))
        self._add("pictures", (len(record.pictures) for record in facts))
        self._add("file", (_code(self._files, record.file) for record in facts))
        self._add("where_bytes", map(len, where))
        self._add("exact", (picture.exact for picture in pictures))
        self._add("kind", (_code(self._kinds, (picture.mode, picture.format)) for picture in pictures))
        self._add("path_bytes", (-1 if path is None else len(path) for path in paths))
        self._where += b"".join(where)
        self._path += b"".join(path or b"" for path in paths)
        self._keys += b"".join(record.key for record in facts)
        self._picture_keys += b"".join(picture.key for picture in pictures)
        self._identities += b"".join(_identity(r.key, *(picture.key for picture in r.pictures)) for r in facts)

    def _add(self, name: str, values: Iterable[Any]) -> None:
        self._data[name] += np.array(list(values), dtype=(_RECORD | _PICTURE)[name]).tobytes()

    def _view(self, name: str) -> np.ndarray:
        return np.frombuffer(self._data[name], dtype=(_RECORD | _PICTURE)[name])

    @property
    def source(self) -> np.ndarray:
        return self._view("source")

    @property
    def number(self) -> np.ndarray:
        return self._view("number")

    @property
    def words(self) -> np.ndarray:
        return self._view("words")

    @property
    def length(self) -> np.ndarray:
        return self._view("length")

    @property
    def supervised(self) -> np.ndarray:
        return self._view("supervised")

    @property
    def pictures(self) -> np.ndarray:
        return self._view("pictures")

    @property
    def exact(self) -> np.ndarray:
        return self._view("exact")

    @property
    def kind(self) -> np.ndarray:
        return self._view("kind")

    @property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._kinds)

    @property
    def keys(self) -> np.ndarray:
        return np.frombuffer(self._keys, dtype=np.uint64).reshape(-1, 2)

    @property
    def identities(self) -> np.ndarray:
        return np.frombuffer(self._identities, dtype=np.uint64).reshape(-1, 2)

    @property
    def picture_keys(self) -> np.ndarray:
        return np.frombuffer(self._picture_keys, dtype=np.uint64).reshape(-1, 2)

    @property
    def record_of_picture(self) -> np.ndarray:
        """(m,) int64: the record that each picture belongs to."""
        return np.repeat(np.arange(len(self)), self.pictures)

    @property
    def has_path(self) -> np.ndarray:
        """(m,) bool: whether a picture is a file, and not in its record."""
        return self._view("path_bytes") >= 0

    def where(self, i: int) -> str:
        """File and record of record `i`."""
        file = list(self._files)[self._view("file")[i]] if len(self._files) > 1 else next(iter(self._files))
        return f"{file}: {self._text('where_bytes', self._where, i)}"

    def path(self, j: int) -> str | None:
        """The path of picture `j`, as its record has it."""
        return self._text("path_bytes", self._path, j) if self._view("path_bytes")[j] >= 0 else None

    def settle(self, pictures: np.ndarray, keys: Iterator[bytes]) -> None:
        """Give `pictures` (k,) keys that are exact, one after the other."""
        for picture, key in zip(pictures.tolist(), keys, strict=True):
            self._picture_keys[picture * KEY_BYTES : (picture + 1) * KEY_BYTES] = key
        self.exact[pictures] = True
        starts = np.concatenate([[0], np.cumsum(self.pictures, dtype=np.int64)]).tolist()
        for i in np.unique(self.record_of_picture[pictures]).tolist():
            own = _piece(self._keys, i)
            identity = _identity(own, *(_piece(self._picture_keys, j) for j in range(starts[i], starts[i + 1])))
            self._identities[i * KEY_BYTES : (i + 1) * KEY_BYTES] = identity

    def _text(self, lengths: str, texts: bytearray, i: int) -> str:
        ends = self._ends.get(lengths)
        if ends is None or len(ends) != len(self._view(lengths)):
            ends = self._ends[lengths] = np.cumsum(np.maximum(self._view(lengths), 0), dtype=np.int64)
        return texts[int(ends[i - 1]) if i else 0 : int(ends[i])].decode(*_TEXT)


def _identity(*keys: bytes) -> bytes:
    return blake2b(b"".join(keys), digest_size=KEY_BYTES).digest()


def _piece(keys: bytearray, i: int) -> bytes:
    return bytes(keys[i * KEY_BYTES : (i + 1) * KEY_BYTES])


def _code(codes: dict[Any, int], value: Any) -> int:
    return codes.setdefault(value, len(codes))
