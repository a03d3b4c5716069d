"""The questions that the page offers to begin with, from the operator's file, checked and read at the start."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import yaml

from lapilli.base.errors import DataError, RunError, nearest
from lapilli.data.picture import ImageLimits, open_image
from lapilli.data.sample import Image

_MOST, _MOST_IMAGES, _LONGEST = 50, 8, 4000
_MEDIA = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}
"""Formats that a browser shows."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture's file as it is sent."""

    data: bytes
    media: str


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its pictures, in order."""

    text: str
    images: tuple[Picture, ...] = ()


def read_examples(file: Path | str, limits: ImageLimits | None = None) -> tuple[Example, ...]:
    """The examples of a JSON or YAML list of `{text, images: [paths relative to the file]}`.

    Raises RunError naming file, record and field for whatever can't be shown: unknown fields, pictures that are
    missing, broken, over the limits or of a format that browsers don't know.
    """
    file = Path(file)
    records = _parsed(file)
    if not isinstance(records, list) or not records:
        raise RunError(f"{file}: must be a list of examples, each with text and images")
    if len(records) > _MOST:
        raise RunError(f"{file}: {len(records)} examples; the page shows {_MOST} at most")
    return tuple(_example(record, f"{file}: example {i}", file.parent, limits) for i, record in enumerate(records, 1))


def _parsed(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise RunError(f"{file}: can't read the examples ({error.strerror})") from error
    except (UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        kind = "JSON" if file.suffix == ".json" else "YAML"
        raise RunError(f"{file}: not {kind} ({str(error).splitlines()[0]})") from error


def _example(record: Any, where: str, folder: Path, limits: ImageLimits | None) -> Example:
    if not isinstance(record, dict):
        raise RunError(f"{where}: must have the fields text and images")
    for key in record:
        if key not in ("text", "images"):
            raise RunError(f"{where}: {key}: unknown field{nearest(str(key), ['text', 'images'])}")
    text, images = record.get("text", ""), record.get("images", [])
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise RunError(f"{where}: text: must be a text of at most {_LONGEST:,} characters")
    if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
        raise RunError(f"{where}: images: must be a list of files, relative to the examples' own")
    if len(images) > _MOST_IMAGES:
        raise RunError(f"{where}: images: {len(images)}; an example has {_MOST_IMAGES} at most")
    if not text.strip() and not images:
        raise RunError(f"{where}: has neither text nor images")
    return Example(text, tuple(_picture(folder / one, f"{where}: images", limits) for one in images))


def _picture(path: Path, where: str, limits: ImageLimits | None) -> Picture:
    try:
        data = path.read_bytes()
        open_image(Image(data=data), None, limits, str(path))
    except OSError as error:
        raise RunError(f"{where}: {path}: can't read it ({error.strerror})") from error
    except DataError as error:
        raise RunError(f"{where}: {error}") from error
    with PIL.Image.open(io.BytesIO(data)) as opened:
        media = _MEDIA.get(opened.format or "")
    if media is None:
        raise RunError(f"{where}: {path}: browsers don't show {opened.format}; save it as JPEG or PNG")
    return Picture(data, media)
