"""Pictures in Parquet: row groups are decoded once while they fit the budget, and large ones are said aloud."""

import logging
import random

import pyarrow
import pytest
from pyarrow import parquet

from lapilli.data import tables
from lapilli.data.read import table as reader_room
from lapilli.data.read.open import open_source
from lapilli.data.tables import ParquetTable, RowGroups
from lapilli.recipe.schema import Source

ROWS, BYTES = 400, 5_000


def picture(i):
    return i.to_bytes(4, "big") * (BYTES // 4)


@pytest.fixture
def path(tmp_path):
    rows = [
        {"image": {"bytes": picture(i), "path": f"{i}.png"}, "question": "<image>Q", "answer": "A"} for i in range(ROWS)
    ]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=50)
    return str(tmp_path / "d.parquet")


class Counted(RowGroups):
    """Counts what is decoded."""

    decoded = 0

    def column(self, table, group, name):
        held = (table, group, name) in self._kept
        self.decoded += not held
        return super().column(table, group, name)


@pytest.mark.parametrize(("budget", "most"), [(8 * 50 * (BYTES + 50), 8), (3 * 50 * (BYTES + 50), ROWS), (1, ROWS)])
def test_row_groups_are_kept_within_the_budget(path, monkeypatch, budget, most):
    groups = Counted(budget)
    monkeypatch.setattr(tables, "_row_groups", lambda: groups)
    table = ParquetTable(path)
    order = list(range(ROWS))
    random.Random(0).shuffle(order)
    for i in order:
        assert table.read(f"{i}/image") == picture(i)
        assert groups.bytes <= max(budget, 50 * (BYTES + 50))
        assert groups.bytes == sum(column.nbytes for column in groups._kept.values())
    assert groups.decoded <= most
    assert len(groups._kept) == max(1, min(8, budget // (50 * BYTES)))


def test_rows_in_order_are_decoded_once_whatever_the_budget(path, monkeypatch):
    groups = Counted(1)
    monkeypatch.setattr(tables, "_row_groups", lambda: groups)
    table = ParquetTable(path)
    assert [table.read(f"{i}/image") for i in range(ROWS)] == [picture(i) for i in range(ROWS)]
    assert groups.decoded == 8


def test_large_row_groups_are_said_aloud_with_the_remedy(path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, "lapilli"):
        open_source(Source(path=path))
        assert not caplog.messages
        monkeypatch.setattr(reader_room, "LARGE_GROUP_BYTES", 100)
        reader = open_source(Source(path=path))
    (said,) = caplog.messages
    assert said.startswith(f"{path}: its row groups hold up to ")
    assert "(50 rows)" in said
    assert "row_group_size=100" in said
    assert "--embed-images" in said
    assert len(list(reader.records())) == ROWS
