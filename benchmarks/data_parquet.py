"""Pictures in Parquet read in shuffled order: milliseconds a picture, by rows per row group and by what is kept.

    python benchmarks/data_parquet.py [--pictures 2000] [--side 640] [--reads 300]

The pictures are made here (noise, JPEG quality 90). "file order" reads the same number of pictures one after another.
"""

import argparse
import io
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
from pyarrow import parquet

from lapilli.data.tables import ParquetTable


def jpeg(seed: int, side: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(blocks).resize((side, side)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def milliseconds(table: ParquetTable, order: list[int]) -> float:
    start = time.perf_counter()
    for row in order:
        table.read(f"{row}/image")
    return (time.perf_counter() - start) / len(order) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--side", type=int, default=640)
    parser.add_argument("--reads", type=int, default=300)
    given = parser.parse_args()
    some = [jpeg(i, given.side) for i in range(100)]
    rows = [{"image": {"bytes": some[i % 100] + i.to_bytes(4, "big"), "path": None}} for i in range(given.pictures)]
    order = random.Random(0).sample(range(given.pictures), min(given.reads, given.pictures))
    with tempfile.TemporaryDirectory() as folder:
        for group in (100, 1000):
            path = Path(folder) / f"{group}.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
            shuffled = milliseconds(ParquetTable(str(path)), order)
            in_order = milliseconds(ParquetTable(str(path)), list(range(len(order))))
            size = path.stat().st_size / 1e6
            print(f"{size:.0f} MB, groups of {group}: {shuffled:.2f} ms shuffled, {in_order:.2f} ms in file order")


if __name__ == "__main__":
    main()
