"""Pictures by their address, where the operator allows it: fetched as if every address were hostile.

A host name is resolved once, by the connection itself, and the connection goes to the address that was checked, so
that a name which means another machine a moment later (DNS rebinding) gains nothing. Only addresses that the public
network routes are connected to; each redirect is a new address. Bytes, seconds and fetches at a time are bounded.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from lapilli.serve.refusal import ApiError

_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = (80, 443)
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure's host, which answers its guests
            "192.0.0.0/24",  # Oracle's metadata among them; older Pythons call part of it global
            "64:ff9b::/96",  # IPv4 addresses in the dress of IPv6: NAT64, 6to4, Teredo
            "64:ff9b:1::/48",
            "2002::/16",
            "2001::/32",
        ),
    )
)
_HEADERS = [(b"User-Agent", b"lapilli"), (b"Accept", b"image/*"), (b"Accept-Encoding", b"identity")]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether the public network routes an address: no private, shared, link-local, loopback or metadata one."""
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        return is_public(mapped)
    inside = any(address in network for network in _NOT_PUBLIC if network.version == address.version)
    return address.is_global and not address.is_multicast and not address.is_reserved and not inside


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host name. Raises OSError if it has none."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class _RefusedError(Exception):
    """An address that no connection goes to."""


class _Timed(httpcore.NetworkStream):
    """A connection that is over at a certain time, however slowly its bytes drip."""

    def __init__(self, stream: httpcore.NetworkStream, until: float) -> None:
        self._stream, self._until = stream, until

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._until))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._until))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Timed(self._stream.start_tls(ssl_context, server_hostname, _left(self._until)), self._until)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Pinned(httpcore.SyncBackend):
    """Connects to the address that was checked, and never asks for a name's address again."""

    def __init__(self, remote: RemotePictures, until: float) -> None:
        self._remote, self._until = remote, until

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = self._remote.resolver(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"no address ({error})") from error
        addresses = [ipaddress.ip_address(one.partition("%")[0]) for one in found]
        if not addresses or not all(map(self._remote.allowed, addresses)):
            raise _RefusedError
        stream = super().connect_tcp(str(addresses[0]), port, _left(self._until), local_address, socket_options)
        return _Timed(stream, self._until)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left


@dataclass
class RemotePictures:
    """Fetches pictures. Safe to use from several threads; `at_once` fetches run at a time, others wait their turn.

    `allowed`, `resolver` and `ports` are what tests replace.
    """

    max_bytes: int
    seconds: float = 10.0
    """For all pictures of a request together, waiting for their turn included; looking up a name is the system's."""
    redirects: int = 3
    at_once: int = 8
    ports: Sequence[int] = _PORTS
    allowed: Callable[[Address], bool] = is_public
    resolver: Callable[[str, int], Sequence[str]] = resolve
    _turns: threading.BoundedSemaphore = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._turns = threading.BoundedSemaphore(self.at_once)

    def until(self) -> float:
        """When the pictures of a request that begins now must be here."""
        return time.monotonic() + self.seconds

    def fetch(self, url: str, where: str, until: float) -> bytes:
        """The bytes behind an address; `where` names its place in the request.

        Raises ApiError for an address that may not be asked, and for what did not come, came too late or too large.
        It says no more of what was found there than that.
        """
        if not self._turns.acquire(timeout=max(0.0, until - time.monotonic())):
            raise ApiError(429, f"{where}: too many pictures are being fetched", code="busy", param=where)
        try:
            with httpcore.ConnectionPool(network_backend=_Pinned(self, until)) as pool:
                return self._follow(pool, url, where)
        except _RefusedError as error:
            raise _refused(where, "it leads to an address that this server does not fetch from") from error
        except httpcore.TimeoutException as error:
            raise _failed(where, f"the picture did not come within {self.seconds:g} s") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError) as error:
            raise _failed(where, "the picture could not be fetched") from error
        finally:
            self._turns.release()

    def _follow(self, pool: httpcore.ConnectionPool, url: str, where: str) -> bytes:
        for _ in range(self.redirects + 1):
            self._check(url, where)
            with pool.stream("GET", url, headers=_HEADERS) as response:
                headers = {name.lower(): value for name, value in response.headers}
                if response.status not in _REDIRECTS:
                    return self._body(response, headers, where)
                url = urljoin(url, headers.get(b"location", b"").decode("ascii", "replace"))
        raise _failed(where, f"more than {self.redirects} redirects")

    def _check(self, url: str, where: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError as error:
            raise _refused(where, "not a web address") from error
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise _refused(where, "an address is http:// or https://, in plain ASCII")
        if parts.username is not None or parts.password is not None:
            raise _refused(where, "an address with a name or password in it")
        if port not in self.ports:
            raise _refused(where, f"an address with a port other than {', '.join(map(str, self.ports))}")

    def _body(self, response: httpcore.Response, headers: dict[bytes, bytes], where: str) -> bytes:
        if response.status != 200:
            raise _failed(where, f"its server answered {response.status}")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise _failed(where, "its server sent it compressed")
        said = headers.get(b"content-length", b"0")
        if said.isdigit() and int(said) > self.max_bytes:
            raise self._large(where)
        body = bytearray()
        for piece in response.iter_stream():
            body += piece
            if len(body) > self.max_bytes:
                raise self._large(where)
        return bytes(body)

    def _large(self, where: str) -> ApiError:
        message = f"{where}: the picture is larger than {self.max_bytes:,} bytes"
        return ApiError(413, message, code="image_too_large", param=where)


def _refused(where: str, why: str) -> ApiError:
    return ApiError(400, f"{where}: {why}", code="image_url_refused", param=where)


def _failed(where: str, why: str) -> ApiError:
    return ApiError(400, f"{where}: {why}", code="image_url_failed", param=where)
