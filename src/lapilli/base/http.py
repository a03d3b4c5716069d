"""Downloads that can be trusted: where they may lead, how much may come, and that what came is what was meant.

A file takes its name only when it is whole and checked. Until then it is `NAME.part`, with a note beside it of which
version it belongs to, so that a cut connection, or tomorrow's run, goes on where this one stopped. No torch here.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from lapilli.base.http_part import CutError, Expected, HttpError, Part, Received, Said

if TYPE_CHECKING:
    import httpx

__all__ = ["Expected", "Fetcher", "HttpError", "Limits", "Received", "is_loopback", "is_private"]

_REDIRECTS = (301, 302, 303, 307, 308)


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
        part = Part(url, path, expected, max_bytes or self.limits.max_bytes, on_bytes)
        fruitless, pieces, again = 0, False, False
        while True:
            had = part.have()
            pieces = pieces or had > 0
            try:
                self._go(part)
            except CutError as cut:
                fruitless = 1 if part.have() > had else fruitless + 1
                if fruitless >= self.limits.attempts:
                    raise HttpError(
                        f"{url}: {cut}; gave up after {fruitless} tries without a new byte. "
                        f"{part.have():,} bytes are kept: the same command goes on from there"
                    ) from cut
                self.sleep(self._wait(fruitless, cut))
                continue
            received, wrong = part.check()
            if received is not None:
                return received
            part.drop()
            if again or not pieces:
                raise HttpError(f"{url}: {wrong}; nothing was kept")
            again = True  # the pieces may have been of two versions: once more, from the start

    def _wait(self, fruitless: int, cut: CutError) -> float:
        wait = self.limits.backoff_seconds * 2 ** (fruitless - 1) if cut.wait_seconds is None else cut.wait_seconds
        return min(wait, self.limits.max_backoff_seconds)

    def _go(self, part: Part) -> None:
        """One connection: append what comes to the part."""
        import httpx

        try:
            with self._opened(part.url, part.headers(), part.said) as response:
                part.take(response)
        except (httpx.TransportError, httpx.StreamError) as error:
            raise CutError(f"the connection failed ({str(error) or type(error).__name__})") from error
        except httpx.InvalidURL as error:
            raise HttpError(f"{part.url}: not a web address ({error})") from error

    @contextmanager
    def _opened(self, url: str, headers: dict[str, str], said: Said) -> Iterator[httpx.Response]:
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
