"""What a server allows, and who may use it. Every bound has a number here, and none is infinite."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lapilli.base.errors import RunError
from lapilli.base.http import is_loopback

KEY_VARIABLE = "LAPILLI_API_KEY"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what users send and ask; each has a flag of `lapilli serve` or is said in docs/serving.md."""

    slots: int = 16
    """Answers of one model that grow at a time."""
    queue: int = 64
    """Answers of one model that may wait for a slot; beyond them 429."""
    new_tokens: int = 2048
    """The longest answer that may be asked for, and what is meant where none is."""
    body_bytes: int = 32 << 20
    held_bytes: int = 512 << 20
    """Bodies of all requests that are being served, together."""
    body_seconds: float = 30.0
    """For a request's body to arrive."""
    request_seconds: float = 600.0
    """From a request's arrival to the end of its answer, waiting included."""
    images: int = 16
    """Pictures of one request."""
    image_bytes: int = 20_000_000
    image_pixels: int = 50_000_000
    requests_per_minute: int | None = None
    """Of one key, or of one address where there are no keys."""
    drain_seconds: float = 60.0
    """For answers under way to end once the server was asked to stop."""
    connections: int = 900
    """Open at a time; below the 1,024 files that a process usually may have open."""
    head_seconds: float = 10.0
    """For a request's head to arrive, and for a connection to send its first one."""
    head_bytes: int = 64 << 10
    stall_seconds: float = 60.0
    """For a client to take what it was sent."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RunError(f"--{name.replace('_', '-')} must be above 0, not {value}")


@dataclass(frozen=True, slots=True)
class Keys:
    """API keys, of which only digests are held; none at all means that everybody who can connect may ask."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, keys: Sequence[str]) -> Keys:
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def find(self, given: str) -> int | None:
        """Which key this is; None if it is none of them. Takes the same time whichever it is."""
        digest = hashlib.sha256(given.encode(errors="surrogateescape")).digest()
        found = [i for i, known in enumerate(self.digests) if hmac.compare_digest(digest, known)]
        return found[0] if found else None


def read_keys(file: Path | str | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of a file (one a line; blank lines and lines with # are none) and of `LAPILLI_API_KEY`.

    Raises RunError for a file that can't be read or holds no key, and for a key that no header can carry.
    """
    keys: list[str] = []
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{file}: can't read API keys ({getattr(error, 'strerror', None) or error})") from error
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise RunError(f"{file}: no API key in it; write one a line")
    if KEY_VARIABLE in environment:
        keys.append(environment[KEY_VARIABLE].strip())
    for number, key in enumerate(keys, 1):
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise RunError(f"API key {number}: must be printable ASCII without blanks, and not empty")
    return Keys.of(keys)


def own_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that this process itself shows to the other parts of a cluster: `LAPILLI_API_KEY`."""
    return environment.get(KEY_VARIABLE, "").strip() or None


def check_address(host: str, keys: Keys) -> None:
    """Raise RunError for an address that others can reach while everybody may ask."""
    if not keys and not is_loopback(host):
        raise RunError(
            f"--host {host}: other machines could use this server; give it a key with --api-key-file or {KEY_VARIABLE}"
        )
