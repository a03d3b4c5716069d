"""What is known about a run's data, and the stamp under which it is kept.

An index is found by a hash of everything that decides which tokens a record becomes: the data files' content, the
tokenizer, the template, the image layout and the limits. Picture files are not hashed: their folders are watched, and
a picture that changed all the same is noticed by its size when it is decoded. The stamp, which a run records, is a hash
of that and of what was found, so that a run never goes on with other data than it began with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.base.atomic import write_json
from lapilli.base.errors import DataError
from lapilli.data.cache import refusing
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, ImageSpec
from lapilli.data.read.record import Reader
from lapilli.recipe.schema import Source

VERSION = 4
"""Raised when the same data would be indexed differently, so that old indexes are made again."""

_ABOUT = "about.json"
_ARRAYS = ("kept", "lengths", "supervised", "pictures", "words", "sizes")
_STAMPED = ("kept", "lengths", "supervised", "pictures", "sizes")


@dataclass(frozen=True)
class Note:
    """Something left out of a record that is otherwise used, or a record that a policy dropped."""

    where: str
    reason: str


@dataclass(frozen=True)
class DataIndex:
    """What is known about the n usable Samples without reading them again.

    `kept` (n,) int64 holds the number of each one's record, counted over all files; `lengths`, `supervised` (both in
    tokens), `pictures` and `words` (LLaVA's signed count, see `llava_length`) are (n,) int32; `sizes` (sum of
    `pictures`, 2) int32 holds every picture's (width, height). `records` is how many records the files hold.
    """

    stamp: str
    inputs: str
    """Hash of what decided it; see `hash_inputs`. Empty for prepared folders."""
    records: int
    kept: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    pictures: np.ndarray
    words: np.ndarray
    sizes: np.ndarray
    notes: tuple[Note, ...] = ()
    _ends: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum(self.pictures, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def dropped(self) -> int:
        """Records that a policy left out; each has a Note."""
        return self.records - len(self)

    def image_sizes(self, i: int) -> list[tuple[int, int]]:
        """(width, height) of each picture of Sample `i`, in order."""
        end = int(self._ends[i])
        return [(int(w), int(h)) for w, h in self.sizes[end - int(self.pictures[i]) : end]]

    def note_counts(self) -> dict[str, int]:
        """How many records each kind of note concerns, the most frequent first."""
        return dict(Counter(kind_of(note.reason) for note in self.notes).most_common())

    def noted(self, kind: str) -> list[str]:
        """The records that a kind of note concerns, each as file, record and id."""
        return [note.where for note in self.notes if kind_of(note.reason) == kind]

    def summary(self) -> dict[str, int]:
        """Totals for a status line, a report or a log."""
        return {
            "records": self.records,
            "samples": len(self),
            "dropped": self.dropped,
            "with_pictures": int((self.pictures > 0).sum()),
            "pictures": int(self.pictures.sum(dtype=np.int64)),
            "tokens": int(self.lengths.sum(dtype=np.int64)),
            "supervised_tokens": int(self.supervised.sum(dtype=np.int64)),
            "longest_tokens": int(self.lengths.max(initial=0)),
        }

    def save(self, folder: str | Path) -> None:
        """Write the index into `folder` (NumPy arrays and JSON, no pickles)."""
        for name in _ARRAYS:
            np.save(Path(folder) / f"{name}.npy", getattr(self, name))
        about = {
            "stamp": self.stamp,
            "inputs": self.inputs,
            "records": self.records,
            "notes": [asdict(note) for note in self.notes],
        }
        (Path(folder) / _ABOUT).write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def open(cls, folder: str | Path) -> DataIndex:
        """Map the index that `save` left in `folder`. Raises OSError, ValueError, KeyError or TypeError if damaged."""
        about = json.loads((Path(folder) / _ABOUT).read_text(encoding="utf-8"))
        arrays = {n: np.load(Path(folder) / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in _ARRAYS}
        found = cls(
            about["stamp"],
            about["inputs"],
            about["records"],
            notes=tuple(Note(**note) for note in about["notes"]),
            **arrays,
        )
        if len({len(arrays[name]) for name in _ARRAYS[:-1]}) != 1 or len(found.sizes) != found.pictures.sum():
            raise ValueError("its arrays are of different lengths")
        return found


def index_folder(cache: str | Path, inputs: str, readers: Sequence[Reader]) -> Path:
    """Where in the folder `cache` the index of these inputs is kept: messages name its files, so each place has one."""
    places = [[os.path.realpath(file) for file in reader.files] for reader in readers]
    name = hashlib.sha256(json.dumps([inputs, places]).encode("utf-8", "surrogatepass")).hexdigest()
    return Path(cache) / f"index-{name[:24]}"


def stamp_of(inputs: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Hash what decides an index, and what was found: which records are used, and what is counted of them."""
    hashed = hashlib.sha256(inputs.encode())
    for name in _STAMPED:
        hashed.update(np.ascontiguousarray(arrays[name]).tobytes())
    return hashed.hexdigest()


def hash_inputs(
    sources: Sequence[Source],
    readers: Sequence[Reader],
    encoders: Sequence[Encoder],
    spec: ImageSpec,
    placement: str,
    limits: ImageLimits,
    max_bad_ratio: float = 0.0,
    cache: str | Path | None = None,
    keep: bool = True,
) -> str:
    """Hash what decides the index. Raises DataError if a data file can't be read.

    `cache` is a folder that remembers the files' hashes, so that a gigabyte is not read again at every start; with
    `keep` new ones are written to it.
    """
    hashes = FileHashes(cache)
    encoder = encoders[0]
    layout = encoder.layout
    tokenizer: Any = encoder.tokenizer.backend_tokenizer
    facts = {
        "version": VERSION,
        "sources": [
            [[hashes.of(file) for file in reader.files], reader.format, reader.images, source.subset]
            for source, reader in zip(sources, readers, strict=True)
        ],
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "templates": [encoder.template.model_dump(mode="json") for encoder in encoders],
        "layout": None if layout is None else layout.model_dump(mode="json"),
        "image_token_id": encoder.image_token_id,
        "prefix": encoder.prefix,
        "max_length": encoder.max_length,
        "too_long": encoder.too_long,
        "spec": spec.model_dump(mode="json", include={"mode", "shortest_edge", "size", "crop"}),
        "placement": placement,
        "max_bad_ratio": max_bad_ratio,
        "limits": [limits.max_pixels, limits.max_bytes],
    }
    if keep:
        hashes.save()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def kind_of(message: str) -> str:
    """The kind of a message: without its names, numbers and advice, so that equal problems count as one."""
    message = message.split("; ", maxsplit=1)[0]
    return re.sub(r'"[^"]*"|\'[^\']*\'|/\S+|\d[\d,]*', "…", message)


class FileHashes:
    """Content hashes of files, remembered in a folder by size, inode and time of the last change.

    A file that was changed less than `SETTLED_SECONDS` before it was hashed is not remembered: a second change within
    the file system's clock tick would not be seen.
    """

    SETTLED_SECONDS = 2.0

    def __init__(self, cache: str | Path | None) -> None:
        self._file = None if cache is None else Path(cache) / "hashes.json"
        self._known = self._read()
        self._new: dict[str, list[Any]] = {}

    def of(self, path: str) -> str:
        """SHA-256 of a file's content in hexadecimal. Raises DataError if it can't be read."""
        try:
            facts = os.stat(path)
            state = [facts.st_size, facts.st_ino, facts.st_mtime_ns]
            name = os.path.realpath(path)
            known = self._known.get(name)
            if known is not None and known[:-1] == state:
                return str(known[-1])
            with open(path, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: can't read it ({error.strerror})") from error
        if time.time() - facts.st_mtime > self.SETTLED_SECONDS:
            self._known[name] = self._new[name] = [*state, found]
        return found

    def save(self) -> None:
        """Add what is new to what the folder has by now. Raises DataError if it can't be written.

        Another process may do so at the same time; what is lost is found out again.
        """
        if self._file is not None and self._new:
            with refusing(self._file.parent):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._file, self._read() | self._new)

    def _read(self) -> dict[str, list[Any]]:
        if self._file is None or not self._file.is_file():
            return {}
        try:
            return dict(json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{self._file}: damaged ({error}); delete it and it is made again") from error
