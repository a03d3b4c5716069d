"""The table of sources: which files make a mixture, where they come from, and what may be done with them.

It is package data (`mixtures.yaml`), read and checked like a recipe; `--table FILE` reads one of the user's own in
the same form. Nothing in it is guessed: a size or a checksum that nobody publishes is left out.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lapilli.base.errors import DataError, RecipeError, unknown
from lapilli.base.progress import SIZES
from lapilli.recipe.yaml_file import parse

HUB = "huggingface.co"


def size_bytes(value: Any) -> int:
    """`27.4 GB` as bytes. Units are powers of 1000: B, kB, MB, GB, TB. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) (B|kB|MB|GB|TB)", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"must be a size such as `27.4 GB`, not {value!r}")
    return round(float(found[1]) * SIZES[found[2]])


def _inside(path: str) -> str:
    """A path that stays in the folder it is relative to."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or "\\" in path or "\0" in path or ".." in parts:
        raise ValueError(f"must be a relative path that stays in the folder, not {path!r}")
    return path


Size = Annotated[int, BeforeValidator(size_bytes)]
Inside = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Md5 = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Unpack(_Strict):
    """How an archive is unpacked: into which folder, and what is taken off the names inside it."""

    into: Inside
    drop_prefix: str = ""
    """Taken off the beginning of each file's name (not of its folders)."""
    drop_top: bool = False
    """Leave out the one folder that holds everything in the archive, if there is one."""
    max_unpacked: Size | None = None


class Links(_Strict):
    """A list of pictures to fetch one by one: JSON, `{id: {"imageURL": ...}}`; each is saved as `id.jpg`."""

    list: Inside
    hosts: tuple[str, ...]
    """The only hosts that the list's addresses may name."""
    http: bool = False
    only_named_in: Inside | None = None
    """An annotation file; pictures it doesn't name are left out."""
    named_below: Inside = ""
    max_each: Size = 20_000_000


class Item(_Strict):
    """One file or archive, or one list of links."""

    save: Inside
    url: str | None = None
    page: str | None = None
    request: str | None = None
    """What a person has to do or ask for first."""
    bytes: int | None = Field(default=None, gt=0)
    about: Size | None = None
    sha256: Sha256 | None = None
    md5: Md5 | None = None
    hash_from: str | None = None
    unpack: Unpack | None = None
    links: Links | None = None
    licence: str
    licence_page: str
    http: bool = False
    """Whether plain http is allowed for this address."""

    @model_validator(mode="after")
    def _whole(self) -> Item:
        if self.url is None and self.links is None and not (self.page and self.request):
            raise ValueError(
                "needs a `url`, or `links`, or a `page` with the `request` that a person has to make there"
            )
        if self.links is not None and (self.url or self.unpack):
            raise ValueError("`links` stands alone: no `url`, no `unpack`")
        if (self.sha256 or self.md5) and not self.hash_from:
            raise ValueError("a checksum needs `hash_from`: who published it")
        return self

    @property
    def by_hand(self) -> bool:
        return self.url is None and self.links is None

    @property
    def size(self) -> int | None:
        """Bytes to bring, exact or about; None where nobody says."""
        return self.bytes if self.bytes is not None else self.about

    @property
    def checked_with(self) -> str:
        """What the file is compared with, in words."""
        if self.sha256 or self.md5:
            return f"{'SHA-256' if self.sha256 else 'MD5'} in the table (from: {self.hash_from})"
        if self.url is not None and urlsplit(self.url).hostname == HUB:
            return "SHA-256 that the hub states when the file is asked for"
        kind = "nothing, it is taken as it is" if self.by_hand else "nothing but its size, where the server states it"
        if self.unpack is not None:
            kind = "each member's CRC-32 and size, as the archive states them"
        elif self.links is not None:
            kind = "each file begins as a picture does"
        return f"no checksum is published; what is checked: {kind}"


class Source(_Strict):
    """A data file and its picture root, as a recipe would name them."""

    path: Inside
    images: Inside


class Mixture(_Strict):
    """A published set: its items, the folder its document draws, and the sources a recipe then names."""

    title: str
    folder: Inside
    items: tuple[str, ...]
    sources: tuple[Source, ...] = ()


class Table(_Strict):
    """All items and mixtures."""

    items: dict[str, Item]
    mixtures: dict[str, Mixture]

    @model_validator(mode="after")
    def _known(self) -> Table:
        for name, mixture in self.mixtures.items():
            if lost := [item for item in mixture.items if item not in self.items]:
                raise ValueError(f"mixture {name} names items that are not there: {', '.join(lost)}")
        return self

    def mixture(self, name: str) -> Mixture:
        """Raises DataError with the nearest name for one that is not there."""
        if name not in self.mixtures:
            raise DataError(
                f"{unknown('mixture', name, self.mixtures)}; `lapilli data fetch --list` says what they are"
            )
        return self.mixtures[name]


def load_table(path: str | Path | None = None) -> Table:
    """The package's table, or the user's own. Raises DataError naming file and entry if it is not sound."""
    name = "mixtures.yaml" if path is None else str(path)
    try:
        text = (files("lapilli.data.fetch") / "mixtures.yaml" if path is None else Path(path)).read_text("utf-8")
        return Table.model_validate(parse(text, name).value)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: can't read the table ({error})") from error
    except RecipeError as error:
        raise DataError(str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{name}: {'.'.join(str(p) for p in first['loc']) or 'table'}: {first['msg']}") from error
