"""Parquet files and Hugging Face datasets on disk (Arrow files) as records; a row is a record of any known format.

Pictures are found by what their column holds: bytes, or Hugging Face's `{bytes, path}`. They stay in the file, and the
record names their cells; a picture whose bytes are missing is the path beside them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from lapilli.base.errors import DataError
from lapilli.base.progress import size_text
from lapilli.data.read import shapes
from lapilli.data.read.position import Spot
from lapilli.data.read.record import Placement, RawRecord
from lapilli.data.read.webdataset import picture_root
from lapilli.data.sample import Sample
from lapilli.data.tables import ArrowTable, ParquetTable, is_binary, is_list, is_struct, open_table, table_faults

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

BATCH_ROWS = 500
PICTURE_ROWS = 20
"""Rows read at a time where their pictures are read with them."""
LARGE_GROUP_BYTES = 64_000_000
"""Pictures in one row group from which on reading them in another order is worth a word."""
_TURNS = ("conversations", "messages", "texts")
"""Fields that hold turns; they may be JSON text, or, as older `datasets` store them, an object of lists."""


@dataclass(frozen=True)
class TableReader:
    """One or more tables of one kind, read in order. Picture paths run from `images` through the table to the cell."""

    paths: tuple[str, ...]
    images: str | None
    format: str

    @classmethod
    def open(cls, files: Sequence[str], images: str | None, folder: str) -> TableReader:
        """Raises DataError if the first file is damaged or no column can be part of a conversation."""
        table = open_table(files[0])
        if not table.schema.names:
            raise DataError(f"{files[0]}: the table has no columns")
        bad = [name for name in table.schema.names if "/" in name or name in (".", "..")]
        if bad:
            raise DataError(f'{files[0]}: column "{bad[0]}" has a name that no path can hold; rename it')
        name = "parquet" if isinstance(table, ParquetTable) else "arrow"
        inside = any(_holds_bytes(field.type) for field in table.schema) and not _only_paths(table)
        if inside:
            _say_what_shuffling_costs(files)
        root = picture_root(files, images) if inside else images or folder
        return cls(tuple(files), root, name)

    @property
    def files(self) -> list[str]:
        return list(self.paths)

    def records(self, spot: Spot | None = None) -> Iterator[RawRecord]:
        root = os.path.realpath(self.images or os.curdir)
        for place, path in enumerate(self.paths):
            inside = os.path.relpath(os.path.realpath(path), root)
            prefix = f"{os.path.basename(path)}:" if len(self.paths) > 1 else ""
            table = open_table(path)
            for number, value in enumerate(_rows(table, inside), 1):
                value.setdefault("id", f"{prefix}{number}")
                if spot is not None:
                    spot.at(place, number / table.rows)
                yield RawRecord(path, number, value)

    def parse(self, raw: RawRecord, placement: Placement = "keep") -> Sample:
        return shapes.parse(raw, placement)


def _say_what_shuffling_costs(files: Sequence[str]) -> None:
    """Say it where the row groups of the largest file are large; training reads its pictures in another order."""
    file = max(files, key=os.path.getsize)
    with suppress(DataError):  # reading it will say what is wrong
        table = open_table(file)
        if isinstance(table, ParquetTable):
            columns = [field.name for field in table.schema if _holds_bytes(field.type)]
            size, rows = table.largest_group(columns)
            if size > LARGE_GROUP_BYTES:
                log.warning(
                    "%s: its row groups hold up to %s of pictures (%s rows), and in shuffled order each picture costs "
                    "the decoding of a whole group; write the file anew in groups of 100 rows (pyarrow: "
                    "write_table(..., row_group_size=100)), or run `lapilli data prepare --embed-images` on it",
                    file,
                    size_text(size),
                    f"{rows:,}",
                )


def _rows(table: ArrowTable | ParquetTable, inside: str) -> Iterator[dict[str, Any]]:
    """Every row as a record, with the addresses of its pictures; `inside` is the table's path below the root."""
    unread = _unread_bytes(table) if isinstance(table, ParquetTable) else frozenset()
    start = 0
    for batch in _batches(table, unread):
        with table_faults(table.path):
            columns = [_column(batch, name, f"{inside}/{{}}/{name}", start, unread) for name in batch.schema.names]
        pictures = [_is_picture(field.type) or field.name in unread for field in batch.schema]
        for row in zip(*columns, strict=True):
            yield _record(dict(zip(batch.schema.names, row, strict=True)), batch.schema.names, pictures)
        start += batch.num_rows


def _batches(table: ArrowTable | ParquetTable, unread: frozenset[str]) -> Iterator[pyarrow.RecordBatch]:
    if isinstance(table, ArrowTable):
        yield from table.batches()
        return
    with table_faults(table.path):
        leaves = [table.file.schema.column(i).path for i in range(len(table.file.schema))]
        wanted = [leaf for leaf in leaves if not (leaf.split(".")[0] in unread and leaf.endswith(".bytes"))]
        heavy = any(_holds_bytes(field.type) and field.name not in unread for field in table.schema)
        for batch in table.file.iter_batches(PICTURE_ROWS if heavy else BATCH_ROWS, columns=wanted, use_threads=False):
            batch.validate(full=True)
            yield batch


def _unread_bytes(table: ParquetTable) -> frozenset[str]:
    """Columns of `{bytes, path}` whose bytes are there in the first rows, so that they need not be read to list rows.

    A later picture without bytes is then an error when it is opened. (The counts of nulls in a file's statistics would
    tell for all rows, but pyarrow ends the process where a damaged file has wrong ones.)
    """
    leaves = [table.file.schema.column(i).path for i in range(len(table.file.schema))]
    found = set()
    for field in table.schema:
        of_column = [leaf for leaf in leaves if leaf.partition(".")[0] == field.name]
        both = {leaf.rpartition(".")[2] for leaf in of_column} == {"bytes", "path"} and len(of_column) == 2
        if both and _is_picture(field.type):
            with table_faults(table.path):
                batch = next(table.file.iter_batches(PICTURE_ROWS, columns=of_column, use_threads=False), None)
                if batch is not None:
                    batch.validate(full=True)
                    if all(_has_bytes(value) for value in batch.column(0)):
                        found.add(field.name)
    return frozenset(found)


def _has_bytes(value: Any) -> bool:
    """Whether every picture in a cell of `{bytes, path}`, or of a list of these, has its bytes."""
    if not value.is_valid:
        return True
    return all(map(_has_bytes, value)) if is_list(value.type) else value["bytes"].is_valid


def _column(batch: pyarrow.RecordBatch, name: str, place: str, start: int, unread: frozenset[str]) -> list[Any]:
    """A column as Python values, bytes as the addresses of their cells."""
    column = batch.column(name)
    if name not in unread and not _holds_bytes(column.type):
        return column.to_pylist()
    return [_plain(value, place.format(start + row), name in unread) for row, value in enumerate(column)]


def _plain(value: Any, place: str, unread: bool) -> Any:
    """One value; with `unread`, an object is a picture whose bytes are there and were not read."""
    kind = value.type
    if not value.is_valid:
        return None
    if is_binary(kind) or (unread and is_struct(kind)):
        return place
    if is_struct(kind):
        if kind.get_field_index("bytes") >= 0:
            path = value["path"].as_py() if kind.get_field_index("path") >= 0 else None
            return place if value["bytes"].is_valid else path
        return {field.name: _plain(value[field.name], f"{place}/{field.name}", unread) for field in kind}
    if is_list(kind):
        return [_plain(one, f"{place}/{i}", unread) for i, one in enumerate(value)]
    return value.as_py()


def _record(value: dict[str, Any], names: Sequence[str], are_pictures: Sequence[bool]) -> dict[str, Any]:
    pictures: list[str] = []
    for name, is_picture in zip(names, are_pictures, strict=True):
        if is_picture:
            given = value.pop(name)
            pictures += [one for one in (given if isinstance(given, list) else [given]) if one is not None]
    value = {name: given for name, given in value.items() if given is not None}
    for name in _TURNS:
        if name in value:
            value[name] = _turns(value[name])
    if pictures:
        value.pop("image", None)  # the name that the picture had before it went into the table
        value["images"] = pictures
    return value


def _turns(value: Any) -> Any:
    """Turns as a list of objects without the empty columns that a table fills in."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        rows = zip(*value.values(), strict=False)
        value = [dict(zip(value, row, strict=True)) for row in rows]
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(given) for key, given in value.items() if given is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    """Whether there are bytes anywhere in cells of this type."""
    if is_list(kind):
        return _holds_bytes(kind.value_type)
    if is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return is_binary(kind)


def _is_picture(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds one picture, or a list of pictures, per row."""
    if is_list(kind):
        kind = kind.value_type
    return is_binary(kind) or (is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _only_paths(table: ArrowTable | ParquetTable) -> bool:
    """Whether the first of the first records with a picture names it by a path only."""
    for value in islice(_rows(table, "\0"), BATCH_ROWS):
        pictures = value.get("images")
        if isinstance(pictures, list) and pictures:
            return not str(pictures[0]).startswith("\0")
        if "messages" in value and "\0" in str(value["messages"]):
            return False
    return False
