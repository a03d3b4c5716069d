"""Prepared folders, ours and Cerebras', as a list of Examples.

Everything that is asked of all rows at once (lengths, counts, picture sizes) is read when the folder is opened; tokens
are read one row at a time. Shards are opened by the process that reads from them, so a store may be handed to any
number of forked or spawned workers.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lapilli.base.errors import DataError
from lapilli.data.prepare import cerebras, ours, params
from lapilli.data.prepare.facts import Facts
from lapilli.data.prepare.table import BROKEN, ends_of
from lapilli.data.prepare.work import UNFINISHED
from lapilli.data.sample import Example

if TYPE_CHECKING:
    from lapilli.data.encode import Encoder

OPEN_SHARDS = 64
"""Shards that a process keeps open; of more, the one that was used longest ago is closed."""

LOOKED_AT = 256
"""Files of a folder, in order of name, among which its first HDF5 file stands if it is prepared data."""

_HDF5 = b"\x89HDF\r\n\x1a\n"


def is_prepared(path: str | Path) -> bool:
    """Whether this folder holds prepared data, finished or not, ours or Cerebras'; told by contents, not by names."""
    folder = Path(path)
    if not folder.is_dir():
        return False
    first = next(islice(_hdf5_files(folder, LOOKED_AT), 1), None)
    return (folder / UNFINISHED).is_dir() or (first is not None and _is_shard(first))


class PreparedStore(Sequence[Example]):
    """The rows of a prepared folder, in order.

    `lengths`, `supervised` and `pictures` are (n,) int32, `sizes` (sum of `pictures`, 2) int32 (width, height), 0 where
    a Cerebras folder does not say. `images` is what picture paths are relative to: what is given here, else what the
    folder was prepared with. `facts` is None for a folder of Cerebras' own, which does not say what it was made with.

    Raises DataError for a folder that is not whole, whose files disagree, or that differs from `encoder`, if one is
    given, in tokenizer, template, image layout or limits, with both values.
    """

    def __init__(self, path: str | Path, encoder: Encoder | None = None, images: str | None = None) -> None:
        self.path = Path(path)
        about = _about(self.path)
        self.layout: str = about["layout"]
        self.facts: Facts | None = about["facts"]
        self.images = images if images is not None else about["images"]
        self._files: list[Path] = about["files"]
        token = None if self.facts is None else self.facts.image_token_id
        self._image_token_id = token if token is not None or encoder is None else encoder.image_token_id
        self._shards: OrderedDict[int, ours.Shard | cerebras.Shard] = OrderedDict()
        self._process = os.getpid()
        counts = [self._counts(i, about["rows"], encoder) for i in range(len(self._files))]
        lengths, supervised, pictures, sizes = (
            np.concatenate([_NONE[name], *(getattr(c, name) for c in counts)]) for name in _NONE
        )
        self.lengths, self.supervised, self.pictures, self.sizes = lengths, supervised, pictures, sizes
        self._ends = ends_of([len(c.lengths) for c in counts])
        self._image_ends = ends_of(pictures)
        self._shards.clear()
        if self.facts is not None and encoder is not None:
            self.facts.check(encoder, str(self.path))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return [self.example(i) for i in range(*item.indices(len(self)))]
        return self.example(item)

    def example(self, i: int) -> Example:
        """Row `i`. Raises IndexError, or DataError if its file is damaged."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = int(np.searchsorted(self._ends, i, side="right"))
        return self._shard(number).example(i - (int(self._ends[number - 1]) if number else 0))

    def image_sizes(self, i: int) -> list[tuple[int, int]]:
        """(width, height) of each picture of row `i`, in order; (0, 0) where not known."""
        end = int(self._image_ends[i])
        return [(int(w), int(h)) for w, h in self.sizes[end - int(self.pictures[i]) : end]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict(), "_process": -1}

    def _shard(self, number: int) -> ours.Shard | cerebras.Shard:
        if self._process != os.getpid():  # forked, or sent here: HDF5 handles belong to the process that opened them
            self._shards, self._process = OrderedDict(), os.getpid()
        found = self._shards.get(number)
        if found is None:
            found = self._shards[number] = self._open(number)
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return found

    def _open(self, number: int) -> ours.Shard | cerebras.Shard:
        file = self._files[number]
        if self.layout == "ours":
            return ours.Shard(file, self._image_token_id)
        rows = file.with_suffix(cerebras.ROWS)
        return cerebras.Shard(file, rows if rows.is_file() else None, self._image_token_id)

    def _counts(self, number: int, rows: Sequence[int] | None, encoder: Encoder | None) -> cerebras.Counts:
        """What one shard says of its rows; it must fit the folder and, for Cerebras' own files, the encoder."""
        shard = self._open(number)
        if rows is not None and len(shard) != rows[number]:
            raise DataError(f"{shard.path}: {len(shard)} rows, but {params.FILE} says {rows[number]}; prepare it again")
        if isinstance(shard, cerebras.Shard):
            first = shard if number == 0 else self._open(0)
            assert isinstance(first, cerebras.Shard)
            if shard.dimensions != first.dimensions:
                raise DataError(
                    f"{shard.path}: length, pictures and patches are {shard.dimensions}, but {first.dimensions} in "
                    f"{first.path.name}; they were prepared apart"
                )
            if self.facts is None and encoder is not None:
                _check_cerebras(shard, encoder)
        table = shard.table
        if isinstance(table, cerebras.Counts):
            return table
        return cerebras.Counts(table.lengths, table.supervised, table.pictures, table.image_size)


_NONE = {
    "lengths": np.zeros(0, dtype=np.int32),
    "supervised": np.zeros(0, dtype=np.int32),
    "pictures": np.zeros(0, dtype=np.int32),
    "sizes": np.zeros((0, 2), dtype=np.int32),
}


def _about(folder: Path) -> dict[str, Any]:
    """Layout, facts, image root, files and their rows of a folder. Raises DataError if it is not whole."""
    if (folder / UNFINISHED).is_dir():
        raise DataError(f"{folder}: its preparation was cut short; run the same `lapilli data prepare` again to finish")
    said = _read_params(folder / params.FILE)
    if "lapilli" not in said:
        return _foreign(folder)
    try:
        own = said["lapilli"]
        if own["layout"] not in ("ours", "cerebras"):
            raise KeyError(own["layout"])
        facts = Facts.from_json(own["facts"], str(folder / params.FILE))
        files, rows = [folder / s["file"] for s in own["shards"]], [s["rows"] for s in own["shards"]]
        for file, shard in zip(files, own["shards"], strict=True):
            if file.parent != folder or file.stat().st_size != shard["bytes"]:
                raise DataError(f"{file}: not as long as {params.FILE} says; copy the folder again")
        return {"layout": own["layout"], "facts": facts, "images": own["images"], "files": files, "rows": rows}
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / params.FILE}: damaged ({error!r}); prepare the data again") from error
    except OSError as error:
        raise DataError(f"{folder}: a shard is missing ({error.strerror}: {error.filename})") from error


def _foreign(folder: Path) -> dict[str, Any]:
    files = list(_hdf5_files(folder))
    foreign = [file for file in files if not _is_shard(file)]
    if not files or foreign:
        what = f"{foreign[0].name} is neither lapilli's nor Cerebras' layout" if files else "no HDF5 files"
        raise DataError(f"{folder}: not prepared data: {what}")
    if any(_is_ours(file) for file in files):
        raise DataError(f"{folder}: {params.FILE} is missing or not lapilli's; copy the folder again")
    return {"layout": "cerebras", "facts": None, "images": None, "files": files, "rows": None}


def _read_params(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: can't read it ({error})") from error
    return value if isinstance(value, dict) else {}


def _hdf5_files(folder: Path, looked_at: int | None = None) -> Iterator[Path]:
    """Data files of a folder in order of name: Cerebras' order, which numbers without leading zeros."""
    for file in sorted(folder.iterdir())[:looked_at]:
        if file.suffix != cerebras.ROWS and file.is_file():
            with open(file, "rb") as stream:
                if stream.read(len(_HDF5)) == _HDF5:
                    yield file


def _is_shard(file: Path) -> bool:
    import h5py

    try:
        with h5py.File(file, "r") as opened:
            return opened.attrs.get("format") == ours.FORMAT or all(name in opened for name in cerebras.DATASETS)
    except BROKEN as error:
        raise DataError(f"{file}: not a whole HDF5 file ({error}); copy it again") from error


def _is_ours(file: Path) -> bool:
    import h5py

    with h5py.File(file, "r") as opened:
        return opened.attrs.get("format") == ours.FORMAT


def _check_cerebras(shard: cerebras.Shard, encoder: Encoder) -> None:
    """Their files say little of how they were made; what they say must fit."""
    length, _, patches = shard.dimensions
    layout = encoder.layout
    problems = []
    if layout is not None and (layout.mode == "anyres" or layout.tokens_per_tile != patches):
        wanted = "a number that depends on its size" if layout.mode == "anyres" else layout.tokens_per_tile
        problems.append(f"a picture has {patches} places in the prepared data, {wanted} here")
    if (
        encoder.max_length is not None
        and length + 1 > encoder.max_length
        and int(shard.table.lengths.max(initial=0)) > encoder.max_length
    ):
        problems.append(
            f"rows are up to {int(shard.table.lengths.max())} tokens long, max_length is {encoder.max_length}"
        )
    if problems:
        raise DataError(f"{shard.path}: prepared for something else: {'; '.join(problems)}")
