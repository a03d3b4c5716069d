"""Unpacking archives that somebody else made: nothing leaves the folder, nothing but files comes, no more than said.

Each file is written aside and renamed, so what has its name is whole; unpacking the same archive again passes over
what is there with the right size, and so goes on after a kill.
"""

from __future__ import annotations

import lzma
import os
import re
import stat
import struct
import tarfile
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from lapilli.base.errors import DataError
from lapilli.base.progress import size_text
from lapilli.data.fetch.table import Unpack

_CHUNK_BYTES = 1 << 20
_JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db")
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    OverflowError,
    IndexError,
    KeyError,
)
"""What the standard library's readers raise on damaged archives; nothing else runs where these are caught."""


@dataclass
class Unpacked:
    """What came out: files now in the folder, how many of them were there already, their bytes, and what was left."""

    files: int = 0
    kept: int = 0
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    size: int
    refusal: str | None
    """Why this entry can't be unpacked (a link, a device, encrypted)."""


def unpack(
    archive: str | Path,
    root: str | Path,
    rules: Unpack,
    *,
    max_bytes: int,
    on_file: Callable[[int, int], None] | None = None,
) -> Unpacked:
    """Unpack a zip or tar (any compression of the standard library) into `root / rules.into`.

    `on_file` hears (files, bytes) so far. Raises DataError, naming archive and member, for a name that leaves the
    folder, an absolute name, a link or device, an encrypted member, damage, or more than `max_bytes` altogether.
    """
    archive = Path(archive)
    target = Path(root) / rules.into
    target.mkdir(parents=True, exist_ok=True)
    result, place = Unpacked(), _Place(target)
    try:
        with _opened(archive) as members:
            top = _top(archive) if rules.drop_top else None
            for member, stream in members:
                path = _path(archive, member, rules, top)
                if path is None:
                    result.skipped["files of macOS or Windows"] += 1
                    continue
                result.bytes += member.size
                if result.bytes > max_bytes:
                    raise DataError(f"{archive}: holds more than the {size_text(max_bytes)} expected of it")
                result.kept += not place.write(archive, member, path, stream)
                result.files += 1
                if on_file is not None:
                    on_file(result.files, result.bytes)
    except _BROKEN as error:
        raise DataError(f"{archive}: can't be unpacked ({str(error) or type(error).__name__})") from error
    if not result.files:
        raise DataError(f"{archive}: there is no file in it")
    return result


def unpacked_bytes(archive: str | Path) -> int | None:
    """Bytes that a zip's directory promises; None for a tar, which has no directory."""
    if not zipfile.is_zipfile(archive):
        return None
    try:
        with zipfile.ZipFile(archive) as opened:
            return sum(info.file_size for info in opened.infolist())
    except _BROKEN as error:
        raise DataError(f"{archive}: can't be read ({error})") from error


class _WholeTar(tarfile.TarInfo):
    """Headers of a tar that must be sound up to its end mark; `tarfile` alone takes the first bad one for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the end mark
            raise tarfile.ReadError(f"damaged or cut short: {error}") from error


@contextmanager
def _opened(archive: Path) -> Iterator[Iterator[tuple[_Member, Callable[[], IO[bytes]]]]]:
    """The files of an archive in order, each with what opens it. Told apart by content, not by name."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield _zip_members(opened)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive, "r|*", tarinfo=_WholeTar) as opened:
            yield _tar_members(opened)
    else:
        raise DataError(f"{archive}: is neither a zip nor a tar archive; remove it and fetch it again")


def _zip_members(opened: zipfile.ZipFile) -> Iterator[tuple[_Member, Callable[[], IO[bytes]]]]:
    for info in opened.infolist():
        if info.orig_filename.endswith("/"):
            continue
        mode = info.external_attr >> 16
        refusal = None
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            refusal = "is a link or a device"
        elif info.flag_bits & 1:
            refusal = "is encrypted"
        # zipfile cuts a name at a NUL and turns backslashes on Windows; the name as written is what is judged.
        yield _Member(info.orig_filename, info.file_size, refusal), lambda info=info: opened.open(info)


def _tar_members(opened: tarfile.TarFile) -> Iterator[tuple[_Member, Callable[[], IO[bytes]]]]:
    for info in opened:
        if info.isdir():
            continue
        refusal = None if info.isreg() else "is a link or a device"
        yield _Member(info.name, info.size, refusal), lambda info=info: _tar_stream(opened, info)


def _tar_stream(opened: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = opened.extractfile(info)
    if stream is None:
        raise DataError(f"{info.name}: is not a file")
    return stream


def _top(archive: Path) -> str | None:
    """The one folder that holds every file, or None."""
    with _opened(archive) as members:
        tops = {member.name.split("/")[0] if "/" in member.name else "" for member, _ in members if not _junk(member)}
    return tops.pop() if len(tops) == 1 and "" not in tops else None


def _junk(member: _Member) -> bool:
    return any(part in _JUNK for part in member.name.split("/"))


def _path(archive: Path, member: _Member, rules: Unpack, top: str | None) -> str | None:
    """Where a member goes below the target; None for what is passed over. Raises DataError for a name that escapes."""
    name = member.name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    outside = name.startswith("/") or ".." in parts or re.match("[A-Za-z]:", name)
    if outside or "\\" in name or "\0" in name or not parts:
        raise DataError(f"{archive}: member {name!r} would leave the folder; nothing more was unpacked")
    if member.refusal:
        raise DataError(f"{archive}: member {name!r} {member.refusal}; nothing more was unpacked")
    if _junk(member):
        return None
    if top is not None and parts[0] == top:
        parts = parts[1:]
    parts[-1] = parts[-1].removeprefix(rules.drop_prefix) or parts[-1]
    return "/".join(parts)


class _Place:
    """The folder that is filled; knows which of its folders are really inside it."""

    def __init__(self, target: Path) -> None:
        self._root = os.path.realpath(target)
        self._sound: set[str] = set()

    def write(self, archive: Path, member: _Member, path: str, open_stream: Callable[[], IO[bytes]]) -> bool:
        """Write one member; False if it was there already."""
        full = os.path.join(self._root, *path.split("/"))
        folder = os.path.dirname(full)
        self._check(archive, member, folder)
        if _is_file_of(full, member.size):
            return False
        aside = os.path.join(folder, f".{uuid.uuid4().hex[:12]}.tmp-")
        try:
            with open(aside, "xb") as out, open_stream() as stream:
                written = _copy(stream, out, member.size)
            if written != member.size:
                raise DataError(f"{archive}: member {member.name!r} has other than the {member.size:,} bytes it states")
            os.replace(aside, full)
        finally:
            if os.path.lexists(aside):
                os.unlink(aside)
        return True

    def _check(self, archive: Path, member: _Member, folder: str) -> None:
        """Make the folder, and see that no link on the way leads out."""
        if folder in self._sound:
            return
        real = os.path.realpath(folder)
        if real != self._root and not real.startswith(self._root + os.sep):
            raise DataError(f"{archive}: member {member.name!r} would be written through a link to {real}")
        os.makedirs(folder, exist_ok=True)
        self._sound.add(folder)


def _is_file_of(path: str, size: int) -> bool:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def _copy(stream: IO[bytes], out: IO[bytes], size: int) -> int:
    """Copy at most one byte more than `size`, so that a member can't be larger than it says."""
    left = size + 1
    while left and (chunk := stream.read(min(_CHUNK_BYTES, left))):
        out.write(chunk)
        left -= len(chunk)
    return size + 1 - left
