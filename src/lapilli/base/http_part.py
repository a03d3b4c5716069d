"""A file on its way: the part that is here, the note of which version it is, and what is known to check it with.

`base/http` opens the connections; this module decides what is asked for, what of an answer is taken, and whether the
whole may have its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lapilli.base.atomic import write_json
from lapilli.base.errors import LapilliError

if TYPE_CHECKING:
    import httpx

CHUNK_BYTES = 1 << 20
_TRY_AGAIN = (408, 425, 429)


class HttpError(LapilliError):
    """A download failed. `status` is the server's answer, if it was one that asking again won't change."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Expected:
    """What is known of a file before it comes: exact bytes, and digests as lower-case hexadecimal digits."""

    size: int | None = None
    sha256: str | None = None
    md5: str | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """A file that came. `checked` says what it was compared with: `sha256`, `sha256 (server)`, `md5`, `size` or ``."""

    url: str
    final_host: str
    size: int
    sha256: str
    checked: str
    revision: str | None


@dataclass(slots=True)
class Said:
    """What the servers on the way said about the file, as hubs of large files do on their first answer."""

    sha256: str | None = None
    size: int | None = None
    revision: str | None = None

    def hear(self, headers: httpx.Headers) -> None:
        digest = headers.get("x-linked-etag", "").removeprefix("W/").strip('"').lower()
        if self.sha256 is None and re.fullmatch("[0-9a-f]{64}", digest):
            self.sha256 = digest
        size = headers.get("x-linked-size", "")
        if self.size is None and size.isdecimal():
            self.size = int(size)
        self.revision = self.revision or headers.get("x-repo-commit")


class CutError(Exception):
    """Something that may go better next time; `wait_seconds` if the server named a time."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class Part:
    """One file's state over several connections: the part, its note, and what was said about it."""

    def __init__(
        self,
        url: str,
        path: Path,
        expected: Expected,
        max_bytes: int,
        on_bytes: Callable[[int, int | None], None] | None,
    ) -> None:
        self.url, self.path, self.expected, self.max_bytes = url, path, expected, max_bytes
        self.file = path.with_name(path.name + ".part")
        self.note = path.with_name(path.name + ".part.json")
        self.said = Said()
        self.final_host = ""
        self.total: int | None = None
        """What the last server said of the whole file's size."""
        self._on_bytes = on_bytes

    def have(self) -> int:
        return self.file.stat().st_size if self.file.is_file() and not self.file.is_symlink() else 0

    def drop(self) -> None:
        self.file.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def headers(self) -> dict[str, str]:
        """A request for the rest, or, if the part can't be trusted to be of one version, for all of it."""
        have, note = self.have(), self._noted()
        if not have or note is None:
            self.drop()
            return {}
        if note["validator"]:
            return {"Range": f"bytes={have}-", "If-Range": note["validator"]}
        if self.expected.sha256 or self.expected.md5:  # a mixture of versions would be found at the end
            return {"Range": f"bytes={have}-"}
        self.drop()
        return {}

    def _noted(self) -> dict[str, str] | None:
        try:
            note = json.loads(self.note.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(note, dict) or note.get("url") != self.url or not isinstance(note.get("validator"), str):
            return None
        return note

    def take(self, response: httpx.Response) -> None:
        """Append an answer's body to the part. Raises CutError where another try may help, else HttpError."""
        status = response.status_code
        self.final_host = response.url.host
        if status >= 500 or status in _TRY_AGAIN:
            raise CutError(f"the server answered {status} {response.reason_phrase}", _retry_after(response))
        if status == 416:
            if response.headers.get("content-range") == f"bytes */{self.have()}":
                return  # an earlier run was stopped after the last byte
            self.drop()
            raise CutError("the server has no more bytes than are here, though they are not the whole file")
        if status not in (200, 206):
            raise HttpError(f"{self.url}: the server answered {status} {response.reason_phrase}", status)
        start, total = self._place(response)
        self.total = total
        kind = response.headers.get("content-type", "")
        if kind.startswith("text/html") and self.path.suffix not in (".html", ".htm"):
            raise HttpError(f"{self.url}: a web page came where a file was meant; the source may want a login")
        if response.headers.get("content-encoding", "identity") not in ("", "identity"):
            raise HttpError(f"{self.url}: came in an encoding that was not asked for")
        self._fits(total)
        self._append(response, start, total)

    def _place(self, response: httpx.Response) -> tuple[int, int | None]:
        """Where the body begins and how long the whole file is."""
        length = response.headers.get("content-length", "")
        if response.status_code == 200:
            return 0, int(length) if length.isdecimal() else None
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("content-range", ""))
        if span is None or int(span[1]) != self.have():
            self.drop()
            raise CutError("the server sent another range than was asked for")
        return int(span[1]), None if span[3] == "*" else int(span[3])

    def _fits(self, total: int | None) -> None:
        """Refuse by size before a byte is written."""
        for known, who in ((self.expected.size, "it should have"), (self.said.size, "the hub says")):
            if known is not None and total is not None and total != known:
                self.drop()
                raise HttpError(f"{self.url}: the server offers {total:,} bytes, {who} {known:,}")
        if total is not None and total > self.max_bytes:
            raise HttpError(f"{self.url}: {total:,} bytes are more than the {self.max_bytes:,} allowed")

    def _append(self, response: httpx.Response, start: int, total: int | None) -> None:
        done = start
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if start == 0:
                self.drop()
                write_json(self.note, {"url": self.url, "validator": _validator(response)})
            with open(self.file, "ab") as stream:
                for chunk in response.iter_raw():  # as it comes: a larger chunk would be lost in a cut
                    done += len(chunk)
                    if done > self.max_bytes:
                        self.drop()
                        raise HttpError(f"{self.url}: more came than the {self.max_bytes:,} bytes allowed")
                    stream.write(chunk)
                    if self._on_bytes is not None:
                        self._on_bytes(done, total or self.expected.size)
        except OSError as error:
            raise HttpError(f"{self.file}: can't write it ({error.strerror})") from error
        if total is not None and done < total:
            raise CutError(f"the connection ended after {done:,} of {total:,} bytes")

    def check(self) -> tuple[Received | None, str]:
        """Compare the whole part with all that is known and give it its name; or None and what is wrong."""
        want = {"sha256": self.expected.sha256, "md5": self.expected.md5, "sha256 (server)": self.said.sha256}
        sums = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
        size = 0
        with open(self.file, "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                size += len(chunk)
                sums["sha256"].update(chunk)
                if self.expected.md5:
                    sums["md5"].update(chunk)
            os.fsync(stream.fileno())
        known = next((n for n in (self.expected.size, self.said.size, self.total) if n is not None), None)
        if known is not None and size != known:
            return None, f"{size:,} bytes came, it should have {known:,}"
        for name, digest in want.items():
            got = sums[name.split()[0]].hexdigest()
            if digest is not None and got != digest.lower():
                return None, f"the {name} of what came is {got}, it should be {digest}"
        os.replace(self.file, self.path)
        self.note.unlink(missing_ok=True)
        checked = next((name for name, digest in want.items() if digest), "size" if known is not None else "")
        digest = sums["sha256"].hexdigest()
        return Received(self.url, self.final_host, size, digest, checked, self.said.revision), ""


def _validator(response: httpx.Response) -> str:
    """What names this version of the file for `If-Range`; empty if the server says nothing strong enough."""
    etag = response.headers.get("etag", "")
    return etag if etag.startswith('"') else response.headers.get("last-modified", "")


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else None
