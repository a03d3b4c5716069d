"""Walking through a tar file, header by header, without unpacking it.

Python's own reader ends quietly at a header that is damaged or cut off. Here a file that does not end as tar files do
is an error, since a shard that lost its second half must not pass for a small one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from lapilli.base.errors import DataError

BLOCK = 512
_MAX_LONG_NAME = 1 << 20
_REGULAR, _GNU_NAME, _PAX, _PAX_GLOBAL, _GNU_LINK = (b"0", b"\0", b"7"), b"L", b"x", b"g", b"K"


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member's name and where its bytes lie; `regular` is false for links, folders, devices and sparse files."""

    name: str
    offset: int
    size: int
    regular: bool


def is_tar(head: bytes) -> bool:
    """Whether the first 512 bytes of a file are a tar header."""
    return len(head) == BLOCK and head[:1] != b"\0" and _checksum(head)


def tar_members(path: str) -> Iterator[TarMember]:
    """Every member of a plain tar file, in order. Raises DataError for a damaged or truncated file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path}: can't read it ({error.strerror})") from error
    try:
        yield from _members(path, descriptor, os.fstat(descriptor).st_size)
    except OSError as error:
        raise DataError(f"{path}: can't read it ({error.strerror})") from error
    finally:
        os.close(descriptor)


def _members(path: str, descriptor: int, total: int) -> Iterator[TarMember]:
    at = 0
    extra: dict[str, str] = {}
    while True:
        header = os.pread(descriptor, BLOCK, at)
        if header == bytes(BLOCK):
            _check_end(path, descriptor, at, total)
            return
        if len(header) < BLOCK:
            raise DataError(f"{path}: the tar file is truncated at byte {at}: its end mark is missing; copy it again")
        if not _checksum(header):
            raise DataError(f"{path}: the tar header at byte {at} is damaged; copy the file again")
        size, kind = _number(path, header[124:136], at), header[156:157]
        if "size" in extra and kind not in (_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK):
            size = _pax_size(path, extra["size"], at)
        offset = at + BLOCK
        at = offset + -(-size // BLOCK) * BLOCK
        if offset + size > total:
            raise DataError(f"{path}: the tar file is truncated: a member at byte {offset} ends behind the file's end")
        if kind in (_GNU_NAME, _PAX):
            if size > _MAX_LONG_NAME:
                raise DataError(f"{path}: the tar header at byte {offset - BLOCK} has a name of {size:,} bytes")
            data = os.pread(descriptor, size, offset)
            extra |= _pax(path, data, offset) if kind == _PAX else {"path": _text(data)}
        elif kind not in (_PAX_GLOBAL, _GNU_LINK):
            sparse = any(key.startswith("GNU.sparse.") for key in extra)
            yield TarMember(extra.get("path") or _name(header), offset, size, kind in _REGULAR and not sparse)
            extra = {}


def _check_end(path: str, descriptor: int, at: int, total: int) -> None:
    while data := os.pread(descriptor, 1 << 20, at):
        if data.strip(b"\0"):
            raise DataError(
                f"{path}: more data follows the tar file's end mark at byte {at} of {total}; "
                "files that were joined end to end must be unpacked and packed again"
            )
        at += len(data)


def _checksum(header: bytes) -> bool:
    digits = header[148:156].strip(b" \0")
    return digits.isdigit() and sum(header[:148]) + 8 * 32 + sum(header[156:]) == _octal(digits)


def _octal(digits: bytes) -> int:
    return int(digits, 8) if not digits.strip(b"01234567") else -1


def _number(path: str, field: bytes, at: int) -> int:
    if field[0] & 0x80:  # GNU's way to write large numbers
        value = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    else:
        value = _octal(field.strip(b" \0") or b"0")
    if value < 0:
        raise DataError(f"{path}: the tar header at byte {at} has no valid size; copy the file again")
    return value


def _pax_size(path: str, digits: str, at: int) -> int:
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
        raise DataError(f"{path}: the tar header at byte {at} has no valid size; copy the file again")
    return int(digits)


def _pax(path: str, data: bytes, at: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE` and a line feed, LENGTH counting the whole record."""
    found = {}
    while data.strip(b"\0"):
        digits, _, _ = data[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if length > len(data) or not equals:
            raise DataError(f"{path}: the extended tar header at byte {at} is damaged; copy the file again")
        found[_text(key)] = _text(value)
        data = data[length:]
    return found


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
