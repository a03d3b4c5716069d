"""JSON files of any size, one record at a time: a list, or one value per line, plain or compressed.

A list of a million records never becomes one Python object: the text passes through a window in which one value after
another is decoded. Which layout a file has is seen from what it holds, not from its name.
"""

from __future__ import annotations

import codecs
import gzip
import importlib.util
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lapilli.base.errors import DataError
from lapilli.data.read.position import Spot
from lapilli.data.read.record import RawRecord

CHUNK_BYTES = 1 << 20
_NEAR_END = 16
"""Characters: a decoding error this close to the window's end may only mean that the value goes on."""
_BLANK = " \t\r\n"
_DECODER = json.JSONDecoder()
_MAGIC_GZIP, _MAGIC_ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BOM = b"\xef\xbb\xbf"


def read_records(path: str | Path, spot: Spot | None = None, number: int = 0) -> Iterator[RawRecord]:
    """Every record of a file, in order, unchecked; `spot` goes along in its file `number`.

    Raises DataError if the file as a whole can't be read.
    """
    with _opened(path) as source:
        start = source.first()
        if start == b"[" and not _is_lines_of_lists(path):
            records = _json_list(str(path), _Window(source))
        elif start in (b"{", b"["):
            records = _json_lines(str(path), source)
        elif not start:
            raise DataError(f"{path}: the file is empty")
        else:
            shown = start.decode("utf-8", "backslashreplace")
            raise DataError(
                f"{path}: begins with {shown!r}: neither a JSON list ([...]) nor JSON lines ({{...}} per line)"
            )
        for record, behind in records:
            if spot is not None:
                spot.at(number, source.share(behind))
            yield record


def first_record(path: str | Path) -> RawRecord | None:
    """The first record, for telling formats apart; None if there is none. Raises DataError as `read_records` does."""
    return next(read_records(path), None)


class _Source:
    """A file's bytes, decompressed, without a byte order mark; its faults are DataErrors."""

    def __init__(self, path: str | Path, stream: IO[bytes], file: IO[bytes]) -> None:
        self.path, self._stream, self._ahead = path, stream, b""
        self._file, self._size, self._reached = file, os.fstat(file.fileno()).st_size, 0
        self.begin = 0
        """Bytes at the head that `read` does not give: the byte order mark."""
        head = self.read(len(_BOM))
        if head == _BOM:
            self.begin = len(_BOM)
        else:
            self._ahead = head

    def read(self, size: int) -> bytes:
        if self._ahead:
            ahead, self._ahead = self._ahead, b""
            return ahead
        try:
            data = self._stream.read(size)
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise DataError(f"{self.path}: can't be read to its end ({error}); copy it again") from error
        self._reached = self._file.tell()
        return data

    def share(self, behind: float) -> float:
        """The part of the file, as it lies on the disk, that the part `behind` of all that `read` gave stands for."""
        return self._reached / self._size * behind if self._size else 1.0

    def first(self) -> bytes:
        """The first byte that is not blank, empty if there is none; it stays to be read."""
        ahead = b""
        while piece := self.read(CHUNK_BYTES):
            ahead += piece
            if word := piece.lstrip():
                self._ahead = ahead
                return word[:1]
        return b""


class _Window:
    """The part of a file's text that is being decoded."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = source.begin
        self._characters = 0
        self._line, self._column = 1, 0
        self.text, self.at = "", 0

    def more(self) -> bool:
        """Forget what lies before `at` and read on, the more the longer the value; False at the file's end."""
        gone = self.text[: self.at]
        lines = gone.count("\n")
        self._line += lines
        self._column = len(gone) - gone.rfind("\n") - 1 if lines else self._column + len(gone)
        self.text, self.at = self.text[self.at :], 0
        data = self._source.read(max(CHUNK_BYTES, len(self.text)))
        pending = len(self._decoder.getstate()[0])
        try:
            new = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = self._bytes - pending + error.start
            raise DataError(f"{self._source.path}: not UTF-8 at byte {at}; save the file as UTF-8") from error
        self.text += new
        self._characters += len(new)
        self._bytes += len(data)
        return bool(data)

    def behind(self) -> float:
        """The part of all that was read that lies before `at`."""
        return 1.0 - (len(self.text) - self.at) / self._characters if self._characters else 1.0

    def peek(self) -> str:
        """The next character that is not blank, at `at` from now on; empty at the file's end."""
        while True:
            end = len(self.text)
            while self.at < end and self.text[self.at] in _BLANK:
                self.at += 1
            if self.at < end:
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        """Decode the next value and go past it. Raises DataError with line and column."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                fault = self.fault(error.msg, error.pos)
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _NEAR_END
                if cut and self.more():
                    continue
                raise fault from error
            except (ValueError, RecursionError) as error:
                # A number of thousands of digits, or brackets nested by the thousand.
                raise DataError(f"{self._source.path}: {_not_json(error, self._place(self.at)[0])}") from error
            if end == len(self.text) and self.more():
                continue  # a number may go on
            self.at = end
            return value

    def fault(self, message: str, at: int) -> DataError:
        line, column = self._place(at)
        return DataError(f"{self._source.path}: not JSON: {message} (line {line}, column {column})")

    def _place(self, at: int) -> tuple[int, int]:
        before = self.text[:at]
        lines = before.count("\n")
        column = len(before) - before.rfind("\n") - 1 if lines else self._column + len(before)
        return self._line + lines, column + 1


@contextmanager
def _opened(path: str | Path) -> Iterator[_Source]:
    try:
        # A FIFO or device would block or never end, so the kind of file is looked at first.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: not a file")
        stream: IO[bytes] = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{path}: can't read it ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path!r}: not a file name ({error})") from error
    with stream:
        head = stream.read(4)
        stream.seek(0)
        if head.startswith(_MAGIC_GZIP):
            with gzip.GzipFile(fileobj=stream) as plain:
                yield _Source(path, plain, stream)  # type: ignore[arg-type]
        elif head == _MAGIC_ZSTD:
            if importlib.util.find_spec("pyarrow") is None:
                raise DataError(f"{path}: reading zstd files needs pyarrow: pip install 'lapilli[data]'; or unpack it")
            import pyarrow

            with pyarrow.CompressedInputStream(stream, "zstd") as plain:
                yield _Source(path, plain, stream)
        else:
            yield _Source(path, stream, stream)


def _is_lines_of_lists(path: str | Path) -> bool:
    """Whether a file that begins with a bracket has a list on each line: then its first element is a turn."""
    with _opened(path) as source:
        window = _Window(source)
        window.peek()
        window.at += 1
        if window.peek() != "{":
            return False
        first = window.value()
    return "content" in first and not {"conversations", "messages", "id"} & first.keys()


def _json_list(path: str, window: _Window) -> Iterator[tuple[RawRecord, float]]:
    """Every record, and the part of what was read that lies behind it."""
    window.peek()
    window.at += 1
    number = 0
    end = window.peek() == "]"
    while not end:
        number += 1
        yield RawRecord(path, number, window.value()), window.behind()
        mark = window.peek()
        if mark not in (",", "]"):
            raise window.fault("Expecting ',' delimiter", window.at)
        end = mark == "]"
        window.at += not end
    window.at += 1
    if window.peek():
        raise window.fault("Extra data", window.at)


def _json_lines(path: str, source: _Source) -> Iterator[tuple[RawRecord, float]]:
    """Every record, and the part of what was read that lies behind it."""
    number = 0
    for line_number, (line, behind) in enumerate(_lines(source), 1):
        if line.strip():
            number += 1
            yield _json_line(path, number, line, line_number), behind


def _json_line(path: str, number: int, line: bytes, line_number: int) -> RawRecord:
    try:
        return RawRecord(path, number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start} of line {line_number}; save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        problem = _not_json(error, line_number)
        if number == 1 and line.strip() == b"{":
            problem += "; an object over several lines must stand in a list: put it in [ ]"
    return RawRecord(path, number, None, problem)


def _lines(source: _Source) -> Iterator[tuple[bytes, float]]:
    """Every line, and the part of what was read that it ends at."""
    # Only at line feeds: U+2028 and its like may stand inside a JSON string.
    parts: list[bytes] = []
    read = behind = 0
    while data := source.read(CHUNK_BYTES):
        read += len(data)
        *whole, last = data.split(b"\n")
        for end in whole:
            line, parts = b"".join((*parts, end)), []
            behind += len(line) + 1
            yield line, behind / read
        parts.append(last)
    yield b"".join(parts), 1.0


def _not_json(error: ValueError | RecursionError, line: int = 1) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (line {error.lineno + line - 1}, column {error.colno})"
    return f"can't be read as JSON: {error} (line {line})"
