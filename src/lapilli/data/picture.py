"""Opening picture files: containment, budgets, and one RGB image or a clear refusal.

A data file may come from anywhere, so a path may not leave its image root, a file is measured before it is decoded,
and only formats that Pillow decodes itself are accepted (no PostScript interpreter is ever started). The root, or what
a path runs through below it, may be an archive (`data/archive`).
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import PIL.Image

from lapilli.base.errors import DataError
from lapilli.data.archive import open_archive, split_path
from lapilli.data.sample import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

_BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError)
"""What Pillow's decoders raise on damaged files; nothing but Pillow runs where these are caught."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Refusals before decoding: pixels of a picture (width x height) and bytes of its file."""

    max_pixels: int = 50_000_000
    max_bytes: int = 100_000_000
    pixels_key: str = "data.max_image_pixels"
    """Where the user raises `max_pixels`; named in the refusal."""


def open_image(
    image: Image, root: str | Path | None, limits: ImageLimits | None = None, where: str = ""
) -> PIL.Image.Image:
    """Decode a picture completely and return it in mode RGB (an animation's first frame).

    `where` names the record in errors. Raises DataError for a missing, truncated or foreign file, a path outside
    `root`, or a picture over the limits.
    """
    with opened(image, root, limits or ImageLimits(), where) as (picture, _, name):
        decode(picture, name)
        return to_rgb(picture)


def image_size(
    image: Image, root: str | Path | None, limits: ImageLimits | None = None, where: str = ""
) -> tuple[int, int]:
    """(width, height) in pixels from the file's header. Raises DataError as `open_image` does.

    Half a file is found too: one that lacks its format's end is decoded, and Pillow decides. Damage inside a file that
    has its end is found when it is decoded.
    """
    with opened(image, root, limits or ImageLimits(), where) as (picture, stream, name):
        size = picture.size
        if not has_end(picture.format, stream):
            decode(picture, name)
        return size


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Return the picture in mode RGB: transparency is dropped, 16-bit grey keeps its high byte.

    Raises DataError for 32-bit pictures, whose range of values is not known.
    """
    mode = picture.mode
    if mode == "RGB":
        return picture
    if mode.startswith("I;16"):
        return picture.point(lambda value: value * (1 / 256), "L").convert("RGB")
    if mode in ("I", "F"):
        raise DataError(f"a picture of mode {mode} (32 bits per pixel) has no defined brightness: save it with 8 bits")
    if mode == "P" and "transparency" in picture.info:
        # The same colours as P -> RGB, without Pillow's warning about transparent palettes.
        return picture.convert("RGBA").convert("RGB")
    return picture.convert("RGB")


def resolve(path: str, root: str | Path | None, where: str = "") -> str:
    """Return the real path of a record's picture. Raises DataError if it is not inside `root`.

    Where `root` or the path holds an archive, the result runs on through it: `archive.split_path` takes it apart.
    """
    name = _name(path, where)
    if root is None:
        raise DataError(f"{name}: the data source names no image folder; give it `images: FOLDER`")
    if "\0" in path or not path:
        raise DataError(f"{name}: not a file name")
    base = os.path.realpath(root)
    real = os.path.realpath(os.path.join(base, path))
    if real != base and not real.startswith(base.rstrip(os.sep) + os.sep):
        raise DataError(
            f"{name}: the path leaves the image folder {base} (it is {real}); "
            "name a folder that holds every picture as `images`"
        )
    return real


def _name(path: str | None, where: str) -> str:
    picture = f'image "{path}"' if path is not None else "image bytes"
    return f"{where}: {picture}" if where else picture


@contextmanager
def opened(
    image: Image, root: str | Path | None, limits: ImageLimits, where: str
) -> Iterator[tuple[PIL.Image.Image, IO[bytes], str]]:
    """Open a picture lazily after all checks that need no decoding; yields it, its file and its name for errors.

    Raises DataError as `open_image` does, but for damage that only decoding finds.
    """
    name = _name(image.path if image.data is None else None, where)
    with opened_file(image, root, limits, where, name) as stream:
        picture = _read_header(stream, name)
        width, height = picture.size
        if width < 1 or height < 1:
            raise DataError(f"{name}: the picture is empty ({width} x {height})")
        if width * height > limits.max_pixels:
            raise DataError(
                f"{name}: {width} x {height} is more than {limits.max_pixels:,} pixels; "
                f"shrink the picture or raise {limits.pixels_key}"
            )
        yield picture, stream, name


@contextmanager
def opened_file(
    image: Image, root: str | Path | None, limits: ImageLimits, where: str, name: str
) -> Iterator[IO[bytes]]:
    """The bytes of a picture's file, wherever it lies, after it was measured. `name` is what errors call it."""
    if image.data is not None:
        _check_bytes(len(image.data), limits, name)
        yield io.BytesIO(image.data)
        return
    if image.path is None:
        raise DataError(f"{name}: the record's picture has neither a path nor bytes")
    real = resolve(image.path, root, where)
    try:
        # A FIFO or device would block or never end, so the kind of file is looked at first.
        facts = os.stat(real)
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(f"{name}: {real} is not a file")
        _check_bytes(facts.st_size, limits, name)
        stream: IO[bytes] = open(real, "rb")  # noqa: SIM115
    except NotADirectoryError:
        stream = io.BytesIO(_member(real, limits, name))
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no file {real}; fetch it, or correct `image` or `images`") from error
    except OSError as error:
        raise DataError(f"{name}: {real} can't be read ({error.strerror})") from error
    with stream:
        yield stream


def _member(real: str, limits: ImageLimits, name: str) -> bytes:
    """The bytes of a picture in an archive, measured before they are read."""
    place = split_path(real)
    if place is None:
        raise DataError(f"{name}: there is no file {real}; fetch it, or correct `image` or `images`")
    try:
        archive = open_archive(place[0])
        _check_bytes(archive.size(place[1]), limits, name)
        return archive.read(place[1])
    except DataError as error:
        if str(error).startswith(name):
            raise
        raise DataError(f"{name}: {error}") from error


def has_end(kind: str | None, stream: IO[bytes]) -> bool:
    """Whether the file ends as its format's files do; False also where that can't be told without decoding."""
    here, size = stream.tell(), stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 32))
    tail = stream.read()
    stream.seek(0)
    head = stream.read(8)
    stream.seek(here)
    if kind == "WEBP":  # RIFF: the header says how much follows it
        return struct.unpack("<I", head[4:])[0] + 8 <= size
    ends = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
    return kind in ends and tail.rstrip(b"\0").endswith(ends[kind])


def decode(picture: PIL.Image.Image, name: str) -> None:
    """Decode a lazily opened picture. Raises DataError if it can't be."""
    try:
        picture.load()
    except (*_BROKEN, struct.error, zlib.error) as error:
        raise DataError(
            f"{name}: the picture can't be decoded ({error}); the file is probably truncated or damaged: "
            "copy it again or leave the record out"
        ) from error


def _check_bytes(size: int, limits: ImageLimits, name: str) -> None:
    if size == 0:
        raise DataError(f"{name}: the file is empty; copy it again or leave the record out")
    if size > limits.max_bytes:
        raise DataError(
            f"{name}: {size:,} bytes are more than {limits.max_bytes:,}; "
            "shrink the picture or raise data.max_image_bytes"
        )


def _read_header(stream: IO[bytes], name: str) -> PIL.Image.Image:
    try:
        with warnings.catch_warnings():
            # Our own pixel budget follows; Pillow would warn at a number of its own.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            return PIL.Image.open(stream, formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise DataError(f"{name}: more pixels than Pillow opens safely ({error}); shrink the picture") from error
    except PIL.UnidentifiedImageError as error:
        raise DataError(f"{name}: not a picture in a known format ({', '.join(FORMATS)}), or damaged") from error
    except (*_BROKEN, struct.error, zlib.error) as error:
        raise DataError(f"{name}: the picture's header can't be read ({error})") from error
