"""Files inside files: pictures in tar and zip archives and in the cells of Arrow and Parquet tables, read in place.

A path may run through such a file as if it were a folder: `shard-000.tar/abc.jpg`, `train2017.zip/000001.jpg`, or
`data.parquet/17/image` for a cell of row 17 (rows count from 0). What is kept per process is where each member lies, 24
to 56 bytes for each; the file itself is opened for every read, so nothing is shared or lost when processes fork.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

import numpy as np

from lapilli.base.errors import DataError
from lapilli.data.tar import BLOCK, is_tar, tar_members

_KEPT = 1024
"""Archives whose contents a process remembers."""
_KEPT_OPEN = 128
"""Tables that a process keeps open, each with a file descriptor."""
_ZIP_LOCAL = struct.Struct("<4s5H3I2H")
_BROKEN_ZIP = (zipfile.BadZipFile, OSError, ValueError, EOFError, struct.error, NotImplementedError, OverflowError)
_STORED, _DEFLATED = 0, 8


class Archive(Protocol):
    """A file with members. Both methods raise DataError, naming the archive and what to do."""

    def size(self, member: str) -> int:
        """Bytes of a member, without reading it where that is possible."""
        ...

    def read(self, member: str) -> bytes: ...


def kind_of_file(path: str | os.PathLike[str]) -> str | None:
    """`tar`, `zip`, `arrow`, `parquet`, `hdf5`, or None for anything else. Raises DataError if it can't be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as stream:
            head = stream.read(BLOCK)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't read it ({getattr(error, 'strerror', None) or error})") from error
    starts = {
        b"PK\x03\x04": "zip",
        b"PK\x05\x06": "zip",
        b"PAR1": "parquet",
        b"ARROW1\0\0": "arrow",
        b"\xff\xff\xff\xff": "arrow",
        b"\x89HDF\r\n\x1a\n": "hdf5",
    }
    found = next((kind for start, kind in starts.items() if head.startswith(start)), None)
    return found or ("tar" if is_tar(head) else None)


def split_path(real: str) -> tuple[str, str] | None:
    """(archive, member) of a real path that runs through a regular file; None if it does not."""
    file, member = real, ""
    while True:
        file, _, last = file.rpartition(os.sep)
        member = f"{last}/{member}" if member else last
        if not file:
            return None
        try:
            mode = os.stat(file).st_mode
        except OSError:
            continue
        return (file, member) if stat.S_ISREG(mode) else None


def open_archive(path: str) -> Archive:
    """The archive at a real path; what it holds is looked up once per process, and again when the file changes.

    Raises DataError if the file is no archive, is compressed as a whole, or is damaged.
    """
    try:
        facts = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: can't read it ({error.strerror})") from error
    key = (path, facts.st_size, facts.st_mtime_ns)
    return _table(*key) if _kind(*key) in ("arrow", "parquet") else _directory(*key)


# Size and time of change are part of the keys only, so that a changed file is looked up again.
@lru_cache(4 * _KEPT)
def _kind(path: str, size: int, mtime_ns: int) -> str | None:
    del size, mtime_ns
    return kind_of_file(path)


@lru_cache(_KEPT_OPEN)
def _table(path: str, size: int, mtime_ns: int) -> Archive:
    from lapilli.data.tables import open_table

    del size, mtime_ns
    return open_table(path)


@lru_cache(_KEPT)
def _directory(path: str, size: int, mtime_ns: int) -> Archive:
    kind = _kind(path, size, mtime_ns)
    if kind == "tar":
        return TarArchive(path)
    if kind == "zip":
        return ZipArchive(path)
    raise DataError(
        f"{path}: is a file, and not one that pictures are read from (tar, zip, Arrow or Parquet); "
        "a compressed tar file must be decompressed first"
    )


class _Directory:
    """Where members lie, by a hash of their names: a few bytes each, in arrays that forked processes share."""

    def __init__(self, path: str, entries: Iterable[tuple[str, tuple[int, ...]]], columns: int) -> None:
        self.path = path
        keys, rows = [], []
        for name, row in entries:
            keys.append(_key(name))
            rows.append(row)
        order = np.argsort(np.array(keys, dtype=np.uint64), kind="stable")
        self._keys = np.array(keys, dtype=np.uint64)[order]
        self._rows = np.array(rows, dtype=np.int64).reshape(-1, columns)[order]

    def find(self, member: str) -> list[int]:
        """The last entry of this name, as unpacking would leave it. Raises DataError if there is none."""
        at = int(np.searchsorted(self._keys, np.uint64(_key(member)), side="right")) - 1
        if at < 0 or int(self._keys[at]) != _key(member):
            raise DataError(
                f'{self.path}: the archive has no member "{member}"; correct the path, or fetch the archive'
            )
        row = [int(value) for value in self._rows[at]]
        if row[1] < 0:
            raise DataError(f'{self.path}: member "{member}" is a link or another thing that is not a file')
        return row


class TarArchive:
    """A plain tar file."""

    def __init__(self, path: str) -> None:
        members = ((m.name, (m.offset, m.size if m.regular else -1)) for m in tar_members(path))
        self._directory = _Directory(path, members, 2)

    def size(self, member: str) -> int:
        return self._directory.find(member)[1]

    def read(self, member: str) -> bytes:
        offset, size = self._directory.find(member)
        return read_range(self._directory.path, offset, size)


class ZipArchive:
    """A zip file whose members are stored or deflated, as nearly all are."""

    def __init__(self, path: str) -> None:
        try:
            with zipfile.ZipFile(path) as file:
                infos = file.infolist()
        except _BROKEN_ZIP as error:
            raise DataError(f"{path}: the zip file is damaged or truncated ({error}); copy it again") from error
        entries = (
            (
                i.filename,
                (
                    i.header_offset,
                    -1 if i.is_dir() else i.file_size,
                    i.compress_size,
                    i.compress_type,
                    i.flag_bits,
                    i.CRC,
                ),
            )
            for i in infos
        )
        self._directory = _Directory(path, entries, 6)

    def size(self, member: str) -> int:
        return self._directory.find(member)[1]

    def read(self, member: str) -> bytes:
        path = self._directory.path
        at, size, packed, method, flags, crc = self._directory.find(member)
        if flags & 1 or method not in (_STORED, _DEFLATED):
            raise DataError(
                f'{path}: member "{member}" is encrypted or packed in a way that is not read; pack it again'
            )
        damaged = DataError(f'{path}: member "{member}" of the zip file is damaged; copy the file again')
        if packed > 2 * size + 1024 or at < 0:
            raise damaged
        local = _ZIP_LOCAL.unpack(read_range(path, at, _ZIP_LOCAL.size))
        data = read_range(path, at + _ZIP_LOCAL.size + local[-2] + local[-1], packed)
        if method == _DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise damaged from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise damaged
        return data


def read_range(path: str, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of a file. Raises DataError if it ends before that."""
    try:
        with open(path, "rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), size, offset)
    except (OSError, OverflowError) as error:
        raise DataError(f"{path}: can't read it ({error})") from error
    if len(data) != size:
        raise DataError(f"{path}: the file ends before byte {offset + size}; copy it again")
    return data


def _key(name: str) -> int:
    name = os.path.normpath(name).lstrip("/")
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
