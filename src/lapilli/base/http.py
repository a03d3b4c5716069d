"""Downloads that can be trusted: where they may lead, how much may come, and that what came is what was meant.

A file takes its name only when it is whole and checked. Until then it is `NAME.part`, with a note beside it of which
version it belongs to, so that a cut connection, or tomorrow's run, goes on where this one stopped. No torch here.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from lapilli.base.atomic import write_json
from lapilli.base.errors import LapilliError

if TYPE_CHECKING:
    import httpx

CHUNK_BYTES = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)
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
class Limits:
    """When to stop. `attempts` counts tries in a row that brought no new byte, so a long download may be cut often."""

    max_bytes: int = 1 << 40
    max_redirects: int = 5
    attempts: int = 6
    connect_seconds: float = 20.0
    read_seconds: float = 60.0
    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 60.0


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
class _Said:
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


class _CutError(Exception):
    """Something that may go better next time; `wait_seconds` if the server named a time."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


@dataclass
class Fetcher:
    """Downloads files; a context manager, and safe to use from several threads.

    Plain http goes only to this machine (loopback) and to `http_hosts`. An address inside a private network is refused
    unless it is in `open_hosts`; a redirect from a public host to this machine is refused too. `tokens` maps a host to
    the bearer token that this host alone gets.
    """

    limits: Limits = field(default_factory=Limits)
    http_hosts: frozenset[str] = frozenset()
    open_hosts: frozenset[str] = frozenset()
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    sleep: Callable[[float], None] = time.sleep
    _client: httpx.Client | None = field(default=None, repr=False)

    def __enter__(self) -> Fetcher:
        import httpx

        wait = httpx.Timeout(self.limits.read_seconds, connect=self.limits.connect_seconds)
        self._client = httpx.Client(
            timeout=wait,
            follow_redirects=False,
            headers={"User-Agent": "lapilli", "Accept-Encoding": "identity"},
            mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},  # never through a proxy
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def download(
        self,
        url: str,
        path: str | Path,
        expected: Expected | None = None,
        *,
        max_bytes: int | None = None,
        on_bytes: Callable[[int, int | None], None] | None = None,
    ) -> Received:
        """Bring `url` to `path`, going on from what an earlier call left; `on_bytes` hears (bytes so far, total).

        Raises HttpError for a forbidden address, a refusal, the wrong size or digest, more than `max_bytes` (default:
        the limits'), a web page where a file was meant, or too many failures in a row.
        """
        path, expected = Path(path), expected or Expected()
        goes = _Goes(url, path, expected, max_bytes or self.limits.max_bytes, on_bytes)
        fruitless, pieces, again = 0, False, False
        while True:
            had = goes.have()
            pieces = pieces or had > 0
            try:
                self._go(goes)
            except _CutError as cut:
                fruitless = 1 if goes.have() > had else fruitless + 1
                if fruitless >= self.limits.attempts:
                    raise HttpError(
                        f"{url}: {cut}; gave up after {fruitless} tries without a new byte. "
                        f"{goes.have():,} bytes are kept: the same command goes on from there"
                    ) from cut
                self.sleep(self._wait(fruitless, cut))
                continue
            received, wrong = goes.check()
            if received is not None:
                return received
            goes.drop()
            if again or not pieces:
                raise HttpError(f"{url}: {wrong}; nothing was kept")
            again = True  # the pieces may have been of two versions: once more, from the start

    def _wait(self, fruitless: int, cut: _CutError) -> float:
        wait = self.limits.backoff_seconds * 2 ** (fruitless - 1) if cut.wait_seconds is None else cut.wait_seconds
        return min(wait, self.limits.max_backoff_seconds)

    def _go(self, goes: _Goes) -> None:
        """One connection: append what comes to the part."""
        import httpx

        try:
            with self._opened(goes.url, goes.headers(), goes.said) as response:
                goes.take(response)
        except (httpx.TransportError, httpx.StreamError) as error:
            raise _CutError(f"the connection failed ({str(error) or type(error).__name__})") from error
        except httpx.InvalidURL as error:
            raise HttpError(f"{goes.url}: not a web address ({error})") from error

    @contextmanager
    def _opened(self, url: str, headers: dict[str, str], said: _Said) -> Iterator[httpx.Response]:
        """The first answer that is no redirect. Raises HttpError for one that leads where it may not."""
        if self._client is None:
            raise RuntimeError("use a Fetcher in a `with` statement")
        first = here = url
        for _ in range(self.limits.max_redirects + 1):
            host = self._allowed(here, first)
            sent = headers | ({"Authorization": f"Bearer {self.tokens[host]}"} if host in self.tokens else {})
            response = self._client.send(self._client.build_request("GET", here, headers=sent), stream=True)
            try:
                said.hear(response.headers)
                if response.status_code not in _REDIRECTS or "location" not in response.headers:
                    yield response
                    return
                here = urljoin(here, response.headers["location"])
            finally:
                response.close()
        raise HttpError(f"{first}: more than {self.limits.max_redirects} redirects")

    def _allowed(self, url: str, first: str) -> str:
        """The host of an address that may be asked; HttpError otherwise."""
        came = "" if url == first else f" (redirected from {first})"
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname or "", parts.port
        except ValueError as error:
            raise HttpError(f"{url}{came}: not a web address ({error})") from error
        if parts.scheme not in ("http", "https") or not host:
            raise HttpError(f"{url}{came}: only https addresses are fetched")
        if parts.username is not None or parts.password is not None:
            raise HttpError(f"{parts.scheme}://...@{host}{came}: an address with a password in it is refused")
        here, begins_here = is_loopback(host), is_loopback(urlsplit(first).hostname or "")
        if parts.scheme == "http" and not here and host not in self.http_hosts:
            raise HttpError(f"{url}{came}: plain http can be changed on the way and is refused")
        inside = (here and not begins_here) or (is_private(host) and not here)
        if inside and host not in self.open_hosts:
            raise HttpError(f"{url}{came}: leads into a private network and is refused")
        return host


class _Goes:
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
        self.part = path.with_name(path.name + ".part")
        self.note = path.with_name(path.name + ".part.json")
        self.said = _Said()
        self.final_host = ""
        self.total: int | None = None
        """What the last server said of the whole file's size."""
        self._on_bytes = on_bytes

    def have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() and not self.part.is_symlink() else 0

    def drop(self) -> None:
        self.part.unlink(missing_ok=True)
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
        """Append an answer's body to the part. Raises _CutError where another try may help, else HttpError."""
        status = response.status_code
        self.final_host = response.url.host
        if status >= 500 or status in _TRY_AGAIN:
            raise _CutError(f"the server answered {status} {response.reason_phrase}", _retry_after(response))
        if status == 416:
            if response.headers.get("content-range") == f"bytes */{self.have()}":
                return  # an earlier run was stopped after the last byte
            self.drop()
            raise _CutError("the server has no more bytes than are here, though they are not the whole file")
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
            raise _CutError("the server sent another range than was asked for")
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
            with open(self.part, "ab") as stream:
                for chunk in response.iter_raw():  # as it comes: a larger chunk would be lost in a cut
                    done += len(chunk)
                    if done > self.max_bytes:
                        self.drop()
                        raise HttpError(f"{self.url}: more came than the {self.max_bytes:,} bytes allowed")
                    stream.write(chunk)
                    if self._on_bytes is not None:
                        self._on_bytes(done, total or self.expected.size)
        except OSError as error:
            raise HttpError(f"{self.part}: can't write it ({error.strerror})") from error
        if total is not None and done < total:
            raise _CutError(f"the connection ended after {done:,} of {total:,} bytes")

    def check(self) -> tuple[Received | None, str]:
        """Compare the whole part with all that is known and give it its name; or None and what is wrong."""
        want = {"sha256": self.expected.sha256, "md5": self.expected.md5, "sha256 (server)": self.said.sha256}
        sums = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
        size = 0
        with open(self.part, "rb") as stream:
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
        os.replace(self.part, self.path)
        self.note.unlink(missing_ok=True)
        checked = next((name for name, digest in want.items() if digest), "size" if known is not None else "")
        digest = sums["sha256"].hexdigest()
        return Received(self.url, self.final_host, size, digest, checked, self.said.revision), ""


def is_loopback(host: str) -> bool:
    """Whether a host name means this machine."""
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback)


def is_private(host: str) -> bool:
    """Whether a host is given as an address that the public network does not route (loopback among them)."""
    address = _address(host)
    return is_loopback(host) or (address is not None and not address.is_global)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _validator(response: httpx.Response) -> str:
    """What names this version of the file for `If-Range`; empty if the server says nothing strong enough."""
    etag = response.headers.get("etag", "")
    return etag if etag.startswith('"') else response.headers.get("last-modified", "")


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else None
