"""What is known about a run's data, and the stamp under which it is kept.

The stamp is a hash of everything that decides which tokens a record becomes: the data files' content, the tokenizer,
the template, the image layout and the limits. Picture files are not hashed; a picture that changed is noticed by its
size when it is decoded.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.base.atomic import atomic_write
from lapilli.base.errors import DataError
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, ImageSpec
from lapilli.recipe.schema import Source

VERSION = 2
"""Raised when the same data would be indexed differently, so that old indexes are made again."""

_ARRAYS = ("kept", "lengths", "supervised", "pictures", "words", "sizes")


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
        """Write the index under its stamp (NumPy arrays and JSON, no pickles)."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        about = {"stamp": self.stamp, "records": self.records, "notes": [asdict(note) for note in self.notes]}
        stream = io.BytesIO()
        about_bytes = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        np.savez(stream, about=about_bytes, **{name: getattr(self, name) for name in _ARRAYS})
        atomic_write(_path(folder, self.stamp), stream.getvalue())

    @classmethod
    def load(cls, folder: str | Path, stamp: str) -> DataIndex | None:
        """Return the index kept under this stamp, None if there is none. Raises DataError if it is damaged."""
        path = _path(folder, stamp)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                arrays = {name: file[name] for name in _ARRAYS}
            notes = tuple(Note(**note) for note in about["notes"])
            found = cls(about["stamp"], about["records"], notes=notes, **arrays)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: the data index is damaged ({error}); delete it and it is made again") from error
        return found if found.stamp == stamp else None


def make_stamp(
    sources: Sequence[Source], encoder: Encoder, spec: ImageSpec, placement: str, limits: ImageLimits
) -> str:
    """Hash what decides the index. Raises DataError if a data file can't be read."""
    layout = encoder.layout
    tokenizer: Any = encoder.tokenizer.backend_tokenizer
    facts = {
        "version": VERSION,
        "sources": [[_hash_file(source.path), source.images] for source in sources],
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "template": encoder.template.model_dump(mode="json"),
        "layout": None if layout is None else layout.model_dump(mode="json"),
        "image_token_id": encoder.image_token_id,
        "prefix": encoder.prefix,
        "max_length": encoder.max_length,
        "too_long": encoder.too_long,
        "spec": spec.model_dump(mode="json", include={"mode", "shortest_edge", "size", "crop"}),
        "placement": placement,
        "limits": [limits.max_pixels, limits.max_bytes],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def kind_of(message: str) -> str:
    """The kind of a message: without its names, numbers and advice, so that equal problems count as one."""
    message = message.split("; ", maxsplit=1)[0]
    return re.sub(r'"[^"]*"|\'[^\']*\'|/\S+|\d[\d,]*', "…", message)


def _hash_file(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: can't read it ({error.strerror})") from error


def _path(folder: str | Path, stamp: str) -> Path:
    return Path(folder) / f"index-{stamp[:24]}.npz"
