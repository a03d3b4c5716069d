"""WebDataset shards: tar files in which neighbouring members with the same key are one record.

A member's name up to its first dot is the key, what follows is the field, as that format has it: `json` is the record,
`txt` or `caption` a caption; a member that is a picture is the record's picture. The rest (`cls`, `npy`, pickles) is
never opened. Pictures stay in the shard and are read from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lapilli.base.errors import DataError
from lapilli.data.archive import read_range
from lapilli.data.read import shapes
from lapilli.data.read.position import Spot
from lapilli.data.read.record import Placement, RawRecord
from lapilli.data.sample import Sample
from lapilli.data.tar import TarMember, tar_members

PROBED = 100
"""Records that are looked at to see whether the pictures are in the shards."""
MAX_TEXT_BYTES = 64 << 20
"""A `json` or `txt` member larger than this is refused."""
_CAPTIONS = ("txt", "caption", "text")
_PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"P5", b"P6")


@dataclass(frozen=True)
class WebDatasetReader:
    """One or more tar shards, read in order. Picture paths run from `images` through the shard to the member."""

    paths: tuple[str, ...]
    images: str | None
    format: str = "webdataset"

    @classmethod
    def open(cls, files: Sequence[str], images: str | None) -> WebDatasetReader:
        """Where pictures are in the shards, their folder is the picture root, unless `images` holds the shards too.

        Raises DataError if the first shard is damaged at its head.
        """
        first = islice(_groups(files[0]), PROBED)
        inside = any(_is_picture(files[0], m) for members in first for m in members[1].values())
        own = picture_root(files, images)
        return cls(tuple(files), own if inside or images is None else images)

    @property
    def files(self) -> list[str]:
        return list(self.paths)

    def records(self, spot: Spot | None = None) -> Iterator[RawRecord]:
        root = os.path.realpath(self.images or os.curdir)
        for place, path in enumerate(self.paths):
            inside = os.path.relpath(os.path.realpath(path), root)
            number = 0
            for key, members in _groups(path):
                number += 1
                if spot is not None:
                    spot.reach(place, max(member.offset + member.size for member in members.values()))
                yield _record(path, inside, number, key, members)
            if not number:
                raise DataError(f"{path}: the shard holds no record: no member's name has a key and a field (000.json)")

    def parse(self, raw: RawRecord, placement: Placement = "keep") -> Sample:
        return shapes.parse(raw, placement)


def picture_root(files: Sequence[str], images: str | None) -> str:
    """`images` if all files lie in it, else the deepest folder that holds them all."""
    real = [os.path.realpath(file) for file in files]
    if images is not None:
        root = os.path.realpath(images)
        if all(os.path.commonpath([root, file]) == root for file in real):
            return images
    return os.path.commonpath([os.path.dirname(file) for file in real])


def _groups(path: str) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """(key, members by field) of each run of members with one key."""
    key, members = "", {}
    for member in tar_members(path):
        folder, _, name = member.name.rpartition("/")
        stem, dot, field = name.partition(".")
        if not member.regular or not stem or not dot:
            continue  # folders, links, hidden files
        current = f"{folder}/{stem}" if folder else stem
        if members and (current != key or field in members):
            yield key, members
            members = {}
        key = current
        members[field] = member
    if members:
        yield key, members


def _record(path: str, inside: str, number: int, key: str, members: dict[str, TarMember]) -> RawRecord:
    """One record; `inside` is the path of its shard below the picture root."""
    try:
        value = _value(path, members)
    except DataError as error:
        return RawRecord(path, number, {"id": key}, str(error))
    pictures = [f"{inside}/{m.name}" for m in members.values() if _is_picture(path, m)]
    if pictures:
        value.pop("image", None)  # the name that the picture had before it went into the shard
        value["images"] = pictures
    value.setdefault("id", key)
    return RawRecord(path, number, value)


def _value(path: str, members: dict[str, TarMember]) -> dict[str, Any]:
    """The record without its pictures. Raises DataError saying what is wrong with its text members."""
    value: Any = {}
    if "json" in members:
        try:
            value = json.loads(_text(path, members["json"]))
        except (ValueError, RecursionError) as error:
            raise DataError(f"member {members['json'].name} is not JSON: {error}") from error
        if isinstance(value, list):
            value = {"semantic_data_array" if shapes.shape_of(value) == "sda" else "conversations": value}
        if not isinstance(value, dict):
            raise DataError(f"member {members['json'].name} holds no record")
    caption = next((members[name] for name in _CAPTIONS if name in members), None)
    if caption is not None and shapes.shape_of(value) is None:
        value = {"id": value["id"]} if "id" in value else {}
        value["caption"] = _text(path, caption)
    if not value:
        raise DataError(f"has neither a json nor a txt member, only {', '.join(members)}")
    return value


def _text(path: str, member: TarMember) -> str:
    if member.size > MAX_TEXT_BYTES:
        raise DataError(f"member {member.name} has {member.size:,} bytes, more than {MAX_TEXT_BYTES:,}")
    try:
        return read_range(path, member.offset, member.size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"member {member.name} is not UTF-8 at byte {error.start}") from error


def _is_picture(path: str, member: TarMember) -> bool:
    head = read_range(path, member.offset, min(member.size, 16))
    return head.startswith(_PICTURE_STARTS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
