"""Arrow and Parquet files as archives of pictures: a cell is addressed as `ROW/COLUMN`, then index or field names.

Arrow files are mapped into memory and cost nothing until a cell is read. Parquet is read a row group at a time, so
pictures in it are slow to read in another order than theirs, unless all of them fit what is kept. Every batch is
validated before anything in it is touched, since Arrow trusts the offsets that a file states.
"""

from __future__ import annotations

import importlib.util
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lapilli.base.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_PARQUET = b"PAR1"
KEPT_BYTES = 256_000_000
"""Decoded row groups that a process keeps, whatever the number of files; one is kept however large it is."""


def open_table(path: str) -> ArrowTable | ParquetTable:
    """The table in an Arrow (file or stream) or Parquet file. Raises DataError if it is damaged."""
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"{path}: reading Arrow and Parquet files needs pyarrow: pip install 'lapilli[data]'")
    with table_faults(path), open(path, "rb") as stream:
        parquet = stream.read(4) == _PARQUET
    return ParquetTable(path) if parquet else ArrowTable(path)


@contextmanager
def table_faults(path: str) -> Iterator[None]:
    """Turn what pyarrow raises on damaged files into DataErrors."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: can't be read as an Arrow or Parquet table ({error}); copy the file again") from error


def is_binary(kind: pyarrow.DataType) -> bool:
    """Whether cells of this type are bytes."""
    import pyarrow

    types = pyarrow.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def is_list(kind: pyarrow.DataType) -> bool:
    """Whether cells of this type are lists of any sort."""
    import pyarrow

    types = pyarrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def is_struct(kind: pyarrow.DataType) -> bool:
    """Whether cells of this type have named fields."""
    import pyarrow

    return pyarrow.types.is_struct(kind)


class ArrowTable:
    """An Arrow file, of the stream or the file layout."""

    def __init__(self, path: str) -> None:
        import pyarrow

        self.path = path
        self._checked: set[int] = set()
        with table_faults(path):
            source = pyarrow.memory_map(path)
            options = pyarrow.ipc.IpcReadOptions(use_threads=False)
            if source.read(6) == b"ARROW1":
                reader = pyarrow.ipc.open_file(source, options=options)
                self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            else:
                source.seek(0)
                reader = pyarrow.ipc.open_stream(source, options=options)
                self._batches = list(reader)
            self.schema = _readable(reader.schema)
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]

    def batches(self) -> Iterator[pyarrow.RecordBatch]:
        """The rows, some at a time, in order. Raises DataError if a batch is not what it claims to be."""
        for i in range(len(self._batches)):
            yield self._batch(i)

    @property
    def rows(self) -> int:
        return self._starts[-1]

    def size(self, member: str) -> int:
        return _buffer_size(self._cell(member))

    def read(self, member: str) -> bytes:
        return self._cell(member).as_py()

    def _batch(self, i: int) -> pyarrow.RecordBatch:
        batch = self._batches[i]
        if i not in self._checked:
            with table_faults(self.path):
                batch.validate(full=True)
            self._checked.add(i)
        return batch

    def _cell(self, member: str) -> Any:
        row, column, steps = _address(self.path, member, self._starts[-1], self.schema)
        i = bisect_right(self._starts, row) - 1
        with table_faults(self.path):
            value = self._batch(i).column(column)[row - self._starts[i]]
        return _leaf(self.path, member, value, steps)


class ParquetTable:
    """A Parquet file."""

    def __init__(self, path: str) -> None:
        from pyarrow import parquet

        self.path = path
        with table_faults(path):
            self.file = parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
            self.schema = _readable(self.file.schema_arrow)
            groups = range(self.file.num_row_groups)
            rows = [self.file.metadata.row_group(i).num_rows for i in groups]
        self._starts = [0, *accumulate(rows)]

    @property
    def rows(self) -> int:
        return self._starts[-1]

    def largest_group(self, columns: Sequence[str]) -> tuple[int, int]:
        """(bytes, rows) of the row group in which these columns are largest, decoded, as the file states it."""
        metadata = self.file.metadata
        found = [(0, 0)]
        with table_faults(self.path):
            for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
                leaves = [group.column(i) for i in range(group.num_columns)]
                wanted = [leaf for leaf in leaves if leaf.path_in_schema.split(".")[0] in columns]
                found.append((sum(leaf.total_uncompressed_size for leaf in wanted), group.num_rows))
        return max(found)

    def size(self, member: str) -> int:
        return _buffer_size(self._cell(member))

    def read(self, member: str) -> bytes:
        return self._cell(member).as_py()

    def _cell(self, member: str) -> Any:
        row, column, steps = _address(self.path, member, self._starts[-1], self.schema)
        group = bisect_right(self._starts, row) - 1
        with table_faults(self.path):
            value = _row_groups().column(self, group, column)[row - self._starts[group]]
        return _leaf(self.path, member, value, steps)


class RowGroups:
    """Columns of row groups, decoded and validated; over `budget_bytes`, the one used longest ago is forgotten."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.bytes = 0
        self._kept: OrderedDict[tuple[ParquetTable, int, str], pyarrow.ChunkedArray] = OrderedDict()

    def column(self, table: ParquetTable, group: int, name: str) -> pyarrow.ChunkedArray:
        """One column of one row group. Raises what pyarrow raises where the file is damaged."""
        key = (table, group, name)
        found = self._kept.get(key)
        if found is None:
            rows = table.file.read_row_group(group, columns=[name], use_threads=False)
            rows.validate(full=True)
            found = self._kept[key] = rows.column(0)
            self.bytes += found.nbytes
            while self.bytes > self.budget_bytes and len(self._kept) > 1:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(key)
        return found


@lru_cache(1)
def _row_groups() -> RowGroups:
    """Those of this process."""
    return RowGroups(KEPT_BYTES)


def _readable(schema: pyarrow.Schema) -> pyarrow.Schema:
    """The schema, once every name in it was decoded, which pyarrow puts off. Raises ValueError if one is not text."""
    fields = list(schema)
    while fields:
        field = fields.pop()
        if not field.name.isprintable():
            raise ValueError(f"a column has the name {field.name!r}")
        fields += [field.type.field(i) for i in range(field.type.num_fields)]
    return schema


def _address(path: str, member: str, rows: int, schema: pyarrow.Schema) -> tuple[int, str, list[str]]:
    number, _, rest = member.partition("/")
    column, *steps = rest.split("/")
    if not (number.isascii() and number.isdigit() and len(number) < 20 and int(number) < rows):
        raise DataError(f'{path}: the table has {rows:,} rows, and no row "{number}"')
    if schema.names.count(column) != 1:
        raise DataError(f'{path}: the table has no column "{column}", or several; it has {", ".join(schema.names)}')
    return int(number), column, steps


def _leaf(path: str, member: str, value: Any, steps: list[str]) -> Any:
    """The bytes that an address leads to, as a scalar."""
    for step in steps:
        if not value.is_valid:
            break
        if is_struct(value.type) and value.type.get_field_index(step) >= 0:
            value = value[step]
        elif is_list(value.type) and step.isascii() and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise DataError(f'{path}: the table has no cell "{member}"')
    if value.is_valid and is_struct(value.type) and value.type.get_field_index("bytes") >= 0:
        value = value["bytes"]
    if not is_binary(value.type) or not value.is_valid:
        raise DataError(f'{path}: cell "{member}" holds no bytes')
    return value


def _buffer_size(value: Any) -> int:
    return value.as_buffer().size
