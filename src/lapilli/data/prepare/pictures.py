"""How a prepared folder names its pictures: relative to one root, or with their encoded bytes inside.

Several sources may have several roots. Their common parent becomes the one root, and each source's pictures get what
leads from it to theirs in front; with one source nothing changes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lapilli.base.errors import DataError
from lapilli.data.archive import open_archive, split_path
from lapilli.data.picture import ImageLimits, resolve
from lapilli.data.sample import Image


@dataclass(frozen=True)
class PictureRoot:
    """`root` is the one root (None: no source names any), `prefixes` what stands before each source's paths."""

    root: str | None
    roots: tuple[str | None, ...]
    prefixes: tuple[str, ...]
    embed: bool
    plain_files: bool
    """Whether pictures in archives are refused, for readers that know none."""

    @classmethod
    def of(cls, roots: Sequence[str | None], embed: bool, plain_files: bool = False) -> PictureRoot:
        """The one root of these."""
        real = [os.path.realpath(root) for root in roots if root is not None]
        if len(set(real)) < 2:
            root = next((root for root in roots if root is not None), None)
            return cls(root, tuple(roots), ("",) * len(roots), embed, plain_files)
        common = os.path.commonpath(real)
        prefixes = ("" if r is None else os.path.relpath(os.path.realpath(r), common) for r in roots)
        return cls(common, tuple(roots), tuple("" if p == "." else p for p in prefixes), embed, plain_files)

    def held(self, image: Image, source: int, where: str, limits: ImageLimits) -> Image:
        """The picture as the folder holds it. Raises DataError if its bytes are wanted and can't be read."""
        path = image.path
        if self.plain_files and path is not None and not os.path.isfile(resolve(path, self.roots[source], where)):
            raise DataError(
                f'{where}: image "{path}": Cerebras\' loader reads files, not members of archives; unpack it'
            )
        if path is not None and image.data is None and self.prefixes[source]:
            path = os.path.join(self.prefixes[source], path)
        data = image.data
        if data is None and self.embed and image.path is not None:
            data = _read(image.path, self.roots[source], where, limits)
        return replace(image, path=path, data=data)


def _read(path: str, root: str | None, where: str, limits: ImageLimits) -> bytes:
    """A picture's file, or its member of an archive. That it is there, and how large, was seen with its header."""
    name = f'{where}: image "{path}"'
    real = resolve(path, root, where)
    try:
        place = split_path(real)
        data = open_archive(place[0]).read(place[1]) if place else Path(real).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: {real} can't be read ({error.strerror})") from error
    if len(data) > limits.max_bytes:
        raise DataError(f"{name}: {len(data):,} bytes are more than {limits.max_bytes:,}")
    return data
