"""What a picture file says about itself, and whether it holds what it says.

At level `header` no pixel is decoded, unless the file lacks its end. Equal files are told by a hash; a header check
hashes a file's size, start and end only, which rules out nearly all, and `content_key` decides about the rest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import blake2b
from typing import IO

from lapilli.base.errors import DataError
from lapilli.data.picture import ImageLimits, decode, has_end, opened, opened_file
from lapilli.data.sample import Image

ENDS_BYTES = 4096
"""What is hashed of a file's start and of its end."""
BLOCK_BYTES = 1 << 20

_NO_BRIGHTNESS = ("I", "F")
_ONE_FRAME = ("JPEG", "BMP", "PPM", "JPEG2000")


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """Size in pixels, Pillow's mode and format, and a key that equal files share (`exact`: and no others)."""

    path: str | None
    width: int
    height: int
    mode: str
    format: str
    animated: bool
    key: bytes
    exact: bool

    @property
    def name(self) -> str:
        return name_of(self.path)


def name_of(path: str | None) -> str:
    """A picture for messages; one without a path stands in its record."""
    return "image bytes" if path is None else f'image "{path}"'


def look(image: Image, root: str | None, limits: ImageLimits, *, whole: bool) -> PictureFacts:
    """Open a picture, and with `whole` decode it. Raises DataError, with the picture's name in front."""
    with opened(image, root, limits, "") as (picture, stream, name):
        kind, mode = picture.format or "?", picture.mode
        if mode in _NO_BRIGHTNESS:
            raise DataError(
                f"{name}: a picture of mode {mode} (32 bits per pixel) has no defined brightness: save it with 8 bits"
            )
        (width, height), here = picture.size, stream.tell()
        key, exact = _key(stream, whole or image.data is not None)
        stream.seek(here)
        animated = kind not in _ONE_FRAME and bool(getattr(picture, "is_animated", False))
        if whole or not has_end(picture.format, stream):
            decode(picture, name)
        return PictureFacts(image.path, width, height, mode, kind, animated, key, exact)


def content_key(image: Image, root: str | None, limits: ImageLimits) -> bytes:
    """A hash of the whole file. Raises DataError if it can't be read."""
    with opened_file(image, root, limits, "", name_of(image.path)) as stream:
        return _key(stream, whole=True)[0]


def _key(stream: IO[bytes], whole: bool) -> tuple[bytes, bool]:
    """(hash, whether it is of every byte)."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    hashed = blake2b(size.to_bytes(8, "little"), digest_size=16)
    exact = whole or size <= 2 * ENDS_BYTES
    if exact:
        while block := stream.read(BLOCK_BYTES):
            hashed.update(block)
    else:
        hashed.update(stream.read(ENDS_BYTES))
        stream.seek(size - ENDS_BYTES)
        hashed.update(stream.read(ENDS_BYTES))
    return hashed.digest(), exact
