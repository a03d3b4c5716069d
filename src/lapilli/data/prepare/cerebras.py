"""The H5 layout of Cerebras' multimodal preprocessing, written and read.

Each row is padded to the same length and holds five channels: input ids (pictures and padding as the pad id), loss
mask, labels shifted by one, padding mask (1 = not attended), modality (1 = picture). Beside them stand picture paths
(the text "None" for none) and the positions of every patch. What this can't hold without loss (ids, picture sizes)
stands in a file beside each one that Cerebras' loader does not look at; without it those are made up or looked up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.base.errors import DataError
from lapilli.data.prepare.rows import Rows
from lapilli.data.prepare.table import BROKEN, Table, write_table
from lapilli.data.sample import IGNORE, Example, Image, ImageSlot

DATASETS = ("data", "has_img", "img_data_loc", "img_path")
NO_IMAGE = "None"
ROWS = ".rows"
"""Ending of the file beside each one, which their loader, looking for `*.h5`, passes over."""
_SCANNED_ROWS = 256
_NOT_VARIABLE_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Shape:
    """What is equal in all files of a folder. `length` is theirs, one less than a whole row has tokens."""

    length: int
    images: int
    patches: int
    pad_id: int


def refuse(example: Example, shape: Shape) -> None:
    """Raise DataError if the layout can't hold this Example."""
    where = example.where or example.id
    if len(example.images) > shape.images:
        raise DataError(
            f"{where}: {len(example.images)} pictures, but every row of the cerebras layout has {shape.images}; "
            "raise --max-images"
        )
    if example.length - 1 > shape.length:
        raise DataError(f"{where}: {example.length} tokens are more than the cerebras layout's {shape.length}")
    if example.length < 2:
        raise DataError(f"{where}: {example.length} tokens have no label in the cerebras layout")
    for slot in example.images:
        if slot.start + slot.tokens >= example.length:
            raise DataError(
                f"{where}: a picture at the very end has no place in the cerebras layout; put text after it"
            )
        path = slot.image.path
        if path is None:
            raise DataError(f"{where}: the cerebras layout holds picture paths only, and this picture has none")
        if path == NO_IMAGE or _NOT_VARIABLE_TEXT.search(path):
            raise DataError(f"{where}: the cerebras layout can't hold the picture path {path!r}; rename the file")
    if example.weights is not None and (example.weights % 1).any():
        raise DataError(
            f"{where}: the cerebras layout holds whole loss weights only, and this record has others; "
            "use lapilli's own layout"
        )


def write_shard(path: Path, rows_path: Path, rows: Rows, shape: Shape) -> None:
    """Write one file at `path` and what it can't hold at `rows_path`. The Examples have passed `refuse`."""
    import h5py

    examples = rows.examples
    data = np.zeros((len(examples), 5, shape.length), dtype=np.int32)
    places = np.full((len(examples), shape.images, shape.patches), shape.length, dtype=np.int32)
    paths = np.full((len(examples), shape.images), NO_IMAGE, dtype=object)
    for row, example in enumerate(examples):
        _fill(data[row], example, shape)
        for i, slot in enumerate(example.images):
            places[row, i] = np.arange(slot.start, slot.start + slot.tokens)
            paths[row, i] = slot.image.path
    with_images = np.array([[bool(e.images)] for e in examples])
    with h5py.File(path, "w") as file:
        file.attrs["n_examples"] = len(examples)
        packed: dict[str, Any] = {"compression": "gzip"}
        file.create_dataset("data", data=data, chunks=(1, *data.shape[1:]), **packed)
        paths_type = h5py.string_dtype("utf-8")
        file.create_dataset("img_path", data=paths, dtype=paths_type, chunks=(1, shape.images), **packed)
        file.create_dataset("has_img", data=with_images, chunks=(1, 1), **packed)
        file.create_dataset("img_data_loc", data=places, chunks=(1, *places.shape[1:]), **packed)
    with h5py.File(rows_path, "w") as file:
        write_table(file, rows)


def _fill(data: np.ndarray, example: Example, shape: Shape) -> None:
    """One Example as five channels (5, length)."""
    n = example.length - 1
    ids = example.input_ids.astype(np.int32)
    for slot in example.images:
        ids[slot.start : slot.start + slot.tokens] = shape.pad_id
        data[4, slot.start : slot.start + slot.tokens] = 1
    learnt = example.labels != IGNORE
    data[0], data[2] = shape.pad_id, shape.pad_id
    data[0, :n], data[2, :n] = ids[:-1], ids[1:]
    data[1, :n] = learnt[1:] if example.weights is None else np.where(learnt, example.weights, 0)[1:]
    data[3, n:] = 1


class Shard:
    """One open file, theirs or ours. Raises DataError if it is not in this layout, or damaged.

    `rows` is the file beside it, None if there is none. Pictures get `image_token_id`.
    """

    def __init__(self, path: Path, rows: Path | None, image_token_id: int | None) -> None:
        import h5py

        self.path, self._image_token_id = path, image_token_id
        try:
            file: Any = h5py.File(path, "r")
            self._data, _, self._places, self._paths = (file[name] for name in DATASETS)
            self._rows = None if rows is None else Table(h5py.File(rows, "r"))
            shape, places, paths = self._data.shape, self._places.shape, self._paths.shape
        except BROKEN as error:
            raise DataError(f"{path}: not a whole file of the cerebras layout ({error})") from error
        if len(shape) != 3 or shape[1] != 5 or len(places) != 3 or places[:2] != paths or paths[:1] != shape[:1]:
            raise DataError(
                f"{path}: `data` has shape {shape} and `img_data_loc` {places}, not (rows, 5, length) and (rows, "
                "pictures, patches); this is Cerebras' layout for text alone or for sequence packing, or damaged"
            )

    def __len__(self) -> int:
        return self._data.shape[0]

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """(length, pictures per row, patches per picture)"""
        return self._data.shape[2], self._places.shape[1], self._places.shape[2]

    @property
    def table(self) -> Counts:
        """Lengths and counts of the rows, (n,) each; without the file beside it every row is read for them."""
        if self._rows is not None:
            return Counts(self._rows.lengths, self._rows.supervised, self._rows.pictures, self._rows.image_size)
        try:
            return self._scanned()
        except BROKEN as error:
            raise DataError(f"{self.path}: can't be read ({error}); the file is damaged") from error

    def _scanned(self) -> Counts:
        found = []
        for start in range(0, len(self), _SCANNED_ROWS):
            rows, places = self._data[start : start + _SCANNED_ROWS], self._places[start : start + _SCANNED_ROWS]
            supervised = ((rows[:, 1] > 0) & (self._targets(rows) == 0)).sum(axis=1)
            pictures = (places[:, :, 0] < rows.shape[2]).sum(axis=1)
            found.append(np.stack([(rows[:, 3] == 0).sum(axis=1) + 1, supervised, pictures]))
        counts = np.concatenate([np.zeros((3, 0)), *found], axis=1).astype(np.int32)
        return Counts(*counts, sizes=np.zeros((int(counts[2].sum()), 2), dtype=np.int32))

    def example(self, row: int) -> Example:
        """Row `row` as the Example that it was made of; sizes (0, 0) where nothing says what they are.

        Raises DataError if lapilli has no such Example: attention masked within the text, patches apart.
        """
        where = f"{self.path}: row {row}"
        try:
            return self._example(row, where)
        except BROKEN as error:
            raise DataError(f"{where}: can't be read ({error}); the file is damaged") from error

    def _example(self, row: int, where: str) -> Example:
        data, places = self._data[row], self._places[row]
        n = int((data[3] == 0).sum())
        if n == 0 or data[3, :n].any():
            raise DataError(
                f"{where}: key_padding_mask hides part of the text, which lapilli can't train with; "
                "write the file again without `semantic_attention_mask`, or with `semantic_drop_mask` in its place"
            )
        if (data[2, : n - 1] != data[0, 1:n]).any():
            raise DataError(f"{where}: the labels are not the next input ids; the file is damaged")
        ids = np.append(data[0, :n], data[2, n - 1]).astype(np.int64)
        learnt = np.append(0, np.where(self._targets(data[None])[0, :n] == 0, data[1, :n], 0))
        slots = [self._slot(row, i, places[i], where) for i in range(len(places)) if places[i, 0] < data.shape[1]]
        slots.sort(key=lambda slot: slot.start)
        for slot in slots:
            if self._image_token_id is None:
                raise DataError(f"{where}: has pictures; say which model's image token they take")
            ids[slot.start : slot.start + slot.tokens] = self._image_token_id
        labels = np.where(learnt > 0, ids, IGNORE)
        weights = learnt.astype(np.float32) if (learnt > 1).any() else None
        name = f"{self.path.stem}:{row}" if self._rows is None else self._rows.id[row]
        return Example(name, ids, labels, self._sized(row, slots), self._said(row, where), weights=weights)

    @staticmethod
    def _targets(data: np.ndarray) -> np.ndarray:
        """(n, length): the modality of what each position predicts. Predicting a patch is the original's mistake."""
        return np.concatenate([data[:, 4, 1:], np.zeros((len(data), 1), dtype=data.dtype)], axis=1)

    def _slot(self, row: int, i: int, places: np.ndarray, where: str) -> ImageSlot:
        start = int(places[0])
        if (places != np.arange(start, start + len(places))).any() or start < 0:
            raise DataError(f"{where}: the patches of picture {i + 1} do not stand side by side")
        path = self._paths[row, i]
        path = path.decode("utf-8") if isinstance(path, bytes) else str(path)
        return ImageSlot(Image(path), start, len(places), 0, 0)

    def _sized(self, row: int, slots: Sequence[ImageSlot]) -> tuple[ImageSlot, ...]:
        if self._rows is None:
            return tuple(slots)
        sizes = [self._rows.image_size[i] for i in self._rows.images(row)]
        return tuple(
            ImageSlot(s.image, s.start, s.tokens, int(width), int(height))
            for s, (width, height) in zip(slots, sizes, strict=True)
        )

    def _said(self, row: int, where: str) -> str:
        return where if self._rows is None else self._rows.where[row]


@dataclass(frozen=True)
class Counts:
    """Lengths, supervised positions and pictures of rows, (n,) int32 each; `sizes` (m, 2), 0 where not known."""

    lengths: np.ndarray
    supervised: np.ndarray
    pictures: np.ndarray
    sizes: np.ndarray
