"""lapilli's own shards: ragged rows, nothing padded, every picture with its place, its size and, if wanted, its bytes.

A shard holds the text tokens of its rows end to end. A picture's places are not stored, only where they begin and how
many they are; reading puts the image token there. Beside the tokens stands whether each is supervised, and its weight
where a shard has weights other than 0 and 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.base.errors import DataError
from lapilli.data.prepare.rows import Rows
from lapilli.data.prepare.table import BROKEN, Table, Texts, ends_of, span, write_array, write_table, write_texts
from lapilli.data.sample import IGNORE, Example, Image, ImageSlot

FORMAT = "lapilli-prepared"
VERSION = 1


def write_shard(path: Path, rows: Rows, about: Mapping[str, Any]) -> None:
    """Write one shard at `path`. `about` becomes its attributes: text and numbers as they are, the rest as JSON."""
    import h5py

    slots = [slot for example in rows.examples for slot in example.images]
    with h5py.File(path, "w") as file:
        file.attrs["format"], file.attrs["format_version"] = FORMAT, VERSION
        for name, value in about.items():
            if value is not None:
                file.attrs[name] = value if isinstance(value, str | int) else json.dumps(value, sort_keys=True)
        write_table(file, rows)
        write_array(file, "token_ends", np.cumsum(rows.text, dtype=np.int64)[rows.ends - 1])
        write_array(file, "input_ids", rows.ids[rows.text].astype(np.int32))
        write_array(file, "supervised", rows.learnt[rows.text].astype(np.uint8))
        if rows.weights is not None:
            write_array(file, "weights", rows.weights[rows.text])
        write_texts(file, "image_key", [slot.image.path or "" for slot in slots])
        _write_bytes(file, [slot.image.data or b"" for slot in slots])


class Shard:
    """One open shard of ours. Raises DataError if it is not one, or damaged."""

    def __init__(self, path: Path, image_token_id: int | None) -> None:
        import h5py

        self.path, self._image_token_id = path, image_token_id
        try:
            file: Any = h5py.File(path, "r")
            self.table = Table(file)
            self._token_ends: np.ndarray = file["token_ends"][()]
            self._byte_ends: np.ndarray = file["image_bytes_ends"][()]
            self._keys = Texts(file, "image_key")
            self._ids, self._learnt = file["input_ids"], file["supervised"]
            self._weights, self._bytes = file.get("weights"), file["image_bytes"]
        except BROKEN as error:
            raise DataError(f"{path}: not a whole shard of prepared data ({error}); prepare it again") from error

    def __len__(self) -> int:
        return len(self.table.lengths)

    def example(self, row: int) -> Example:
        """Row `row` as it was encoded. Raises DataError if the shard is damaged."""
        try:
            return self._example(row)
        except BROKEN as error:
            raise DataError(f"{self.path}: row {row} can't be read ({error}); prepare it again") from error

    def _example(self, row: int) -> Example:
        table, at = self.table, span(self._token_ends, row)
        slots = [self._slot(i) for i in table.images(row)]
        length = int(table.lengths[row])
        text = np.ones(length, dtype=bool)
        for slot in slots:
            text[slot.start : slot.start + slot.tokens] = False
        if int(text.sum()) != len(at):
            raise DataError(f"{self.path}: row {row}: {len(at)} tokens for {int(text.sum())} places; prepare it again")
        ids, learnt = self._ids[at.start : at.stop], self._learnt[at.start : at.stop]
        weights = None if self._weights is None else self._weights[at.start : at.stop]
        input_ids = np.full(length, 0 if self._image_token_id is None else self._image_token_id, dtype=np.int64)
        labels = np.full(length, IGNORE, dtype=np.int64)
        input_ids[text] = ids
        labels[text] = np.where(learnt, ids, IGNORE)
        spread = None
        if weights is not None and not np.isin(weights, (0, 1)).all():
            spread = np.zeros(length, dtype=np.float32)
            spread[text] = weights
        return Example(table.id[row], input_ids, labels, tuple(slots), table.where[row], weights=spread)

    def _slot(self, i: int) -> ImageSlot:
        at = span(self._byte_ends, i)
        data = self._bytes[at.start : at.stop].tobytes() if len(at) else None
        table = self.table
        start, tokens = int(table.image_start[i]), int(table.image_tokens[i])
        width, height = (int(side) for side in table.image_size[i])
        return ImageSlot(Image(self._keys[i] or None, data), start, tokens, width, height)


def _write_bytes(file: Any, pictures: Sequence[bytes]) -> None:
    """Encoded pictures end to end. They are compressed already, and each is read as a whole."""
    ends = ends_of([len(one) for one in pictures])
    held = file.create_dataset("image_bytes", shape=(int(ends[-1]) if len(ends) else 0,), dtype=np.uint8)
    for i, one in enumerate(pictures):
        if one:
            at = span(ends, i)
            held[at.start : at.stop] = np.frombuffer(one, dtype=np.uint8)
    write_array(file, "image_bytes_ends", ends)
