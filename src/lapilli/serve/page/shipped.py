"""The page's own files, read once when the server starts: no path of a request ever reaches the file system."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

INDEX = "index.html"
_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
}


@dataclass(frozen=True, slots=True)
class Shipped:
    """One file as it is sent."""

    data: bytes
    media: str
    tag: str
    """Its `ETag`: changes with the bytes."""


def read_shipped() -> Mapping[str, Shipped]:
    """Every file of the page by its name below `static`, with `/` between folders. Files of other kinds are no part."""
    return dict(_walk(files("lapilli.serve.page") / "static", ""))


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Shipped]]:
    for one in folder.iterdir():
        name = prefix + one.name
        if one.is_dir():
            yield from _walk(one, name + "/")
            continue
        media = _MEDIA.get("." + one.name.rpartition(".")[2])
        if media is not None:
            data = one.read_bytes()
            yield name, Shipped(data, media, f'"{hashlib.sha256(data).hexdigest()[:24]}"')
