"""Every reader says how much of its files lies behind it, and work that lags or takes a part still ends at the end."""

import gzip
import json

import pyarrow
import pytest

from lapilli.base.errors import DataError
from lapilli.data.read.open import open_source
from lapilli.data.read.position import Reading
from lapilli.recipe.schema import Source

LINES = [json.dumps({"id": i, "conversations": [], "note": "é" * (i % 60)}, ensure_ascii=False) for i in range(40_000)]


def write_lines(path):
    path.write_text("\n".join(LINES) + "\n")


def write_list(path):
    path.write_text("[" + ",\n".join(LINES) + "]")


def write_packed(path):
    path.write_bytes(gzip.compress("\n".join(LINES).encode()))


def write_zstd(path):
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(("[" + ",".join(LINES) + "]").encode())


@pytest.mark.parametrize("write", [write_lines, write_list, write_packed, write_zstd])
def test_bytes_rise_with_the_records(write, tmp_path):
    write(tmp_path / "d")
    reader = open_source(Source(path=str(tmp_path / "d")))
    reading = Reading([reader])
    assert reading.total == (tmp_path / "d").stat().st_size
    plain = write in (write_lines, write_list)
    last = 0
    for count, _ in enumerate(reading.records(0), 1):
        now = reading.done(count)
        assert last <= now
        share, last = now / reading.total, now
        if count % 1000 == 0:  # of packed files, what has been unpacked ahead of the records is known roughly
            assert abs(share - count / len(LINES)) < (0.02 if plain else 0.5)
    assert (count, reading.done(count)) == (len(LINES), reading.total)


def test_records_that_wait_are_not_done(tmp_path):
    write_lines(tmp_path / "d")
    reading = Reading([open_source(Source(path=str(tmp_path / "d")))])
    records = reading.records(0)
    for _ in range(10_000):
        next(records)
    assert reading.done(0) == 0
    assert reading.done(5_000) == pytest.approx(reading.total / 8, rel=0.02)


def test_a_part_of_a_source_is_all_there_is_to_do(tmp_path):
    write_lines(tmp_path / "d")
    size = (tmp_path / "d").stat().st_size
    readers = [open_source(Source(path=str(tmp_path / "d")))] * 2
    reading = Reading(readers)
    assert len(list(reading.records(0, 30_000, 35_000))) == 5_000
    assert reading.total == pytest.approx(size * 9 / 8, rel=0.01)
    assert reading.done(5_000) == pytest.approx(size / 8, rel=0.01)
    assert len(list(reading.records(1, 39_999))) == 1
    assert reading.done(5_001) == reading.total == pytest.approx(size / 8, rel=0.01)


def test_a_source_that_breaks_off_leaves_nothing_to_be_done(tmp_path):
    write_list(tmp_path / "bad")
    with (tmp_path / "bad").open("r+") as stream:
        stream.truncate((tmp_path / "bad").stat().st_size // 2)
    write_list(tmp_path / "good")
    readers = [open_source(Source(path=str(tmp_path / name))) for name in ("bad", "good")]
    reading = Reading(readers)
    with pytest.raises(DataError, match="not JSON"):
        list(reading.records(0))
    assert reading.total == (tmp_path / "good").stat().st_size + reading.done(10**9)
    assert len(list(reading.records(1))) == len(LINES)
    assert reading.done(10**9) == reading.total
