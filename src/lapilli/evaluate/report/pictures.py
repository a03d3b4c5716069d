"""Pictures of a report: small JPEG copies inside the page, as many bytes of them as the page may have."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from lapilli.base.errors import DataError
from lapilli.data.picture import open_image
from lapilli.data.sample import Image

SIDE = 280
"""Longest side of a copy, in pixels."""
_QUALITY = 80


@dataclass
class Thumbnails:
    """Makes small copies, once per picture, until `max_bytes` are in the page; counts what it could not show."""

    max_bytes: int
    bytes: int = 0
    shown: int = 0
    over: int = 0
    """Pictures left out because the page was full."""
    faults: dict[str, str] = field(default_factory=dict)
    """Pictures that can't be opened, with the reason."""
    _made: dict[str, bytes] = field(default_factory=dict)

    def add(self, image: Image, root: Path | None) -> bytes | None:
        """A JPEG file of the picture, or None where there is none to show: counted, with its reason."""
        try:
            file = self._file(image, root)
        except DataError as error:
            self.faults[str(image.path)] = str(error)
            return None
        if self.bytes + len(file) > self.max_bytes:
            self.over += 1
            return None
        self.bytes += len(file)
        self.shown += 1
        return file

    def _file(self, image: Image, root: Path | None) -> bytes:
        key = None if image.path is None else f"{root}:{image.path}"
        if key in self._made:
            return self._made[key]
        picture = open_image(image, root)
        picture.thumbnail((SIDE, SIDE), PIL.Image.Resampling.LANCZOS, reducing_gap=3.0)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=_QUALITY)
        file = stream.getvalue()
        if key is not None and self.bytes + len(file) <= self.max_bytes:
            self._made[key] = file
        return file
