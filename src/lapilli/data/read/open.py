"""The one door for data: a source from a recipe in, a Reader for its format out.

A format is recognised by what the source holds, never by its name, and is refused with the list of formats where it is
none of them. A source is a file, a folder of files of one format, or several files as a brace pattern:
`shard-{000..127}.tar`, `{a,b}.parquet`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lapilli.base.errors import DataError
from lapilli.data.archive import kind_of_file
from lapilli.data.read import shapes
from lapilli.data.read.position import Spot
from lapilli.data.read.record import Placement, RawRecord, Reader
from lapilli.data.read.stream import first_record, read_records
from lapilli.data.sample import Sample
from lapilli.recipe.schema import Source

__all__ = ["RawRecord", "Reader", "expand", "open_source"]

_JSON_STARTS = b"{[\x1f\x28"
_MAX_FILES = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
FORMATS = (
    "JSON or JSON lines of conversations (LLaVA, ShareGPT, OpenAI's messages, semantic data arrays), Parquet, "
    "a Hugging Face dataset on disk, WebDataset tar shards"
)


def open_source(source: Source, cache: Path | None = None) -> Reader:
    """Return the Reader of a source. `cache` is a folder for what is dear to find out twice (may be None).

    Raises DataError if the source can't be read, its format is not known, or it holds several formats.
    """
    del cache  # no format needs it yet
    files, kind, folder = _found(source.path)
    if kind == "tar":
        from lapilli.data.read.webdataset import WebDatasetReader

        return WebDatasetReader.open(files, source.images)
    if kind in ("arrow", "parquet"):
        from lapilli.data.read.table import TableReader

        return TableReader.open(files, source.images, folder)
    if kind == "hdf5":
        raise DataError(f"{source.path}: prepared data (HDF5), which has no conversations to read")
    if kind == "zip":
        raise DataError(f"{source.path}: a zip archive; name it as `images` if it holds pictures, else unpack it")
    first = first_record(files[0])
    shape = None if first is None else shapes.shape_of(first.value)
    return JsonReader(tuple(files), source.images or folder, shape or "llava")


@dataclass(frozen=True)
class JsonReader:
    """JSON or JSON lines files of conversations, of any of the record formats that `shapes` knows."""

    paths: tuple[str, ...]
    images: str | None
    format: str

    @property
    def files(self) -> list[str]:
        return list(self.paths)

    def records(self, spot: Spot | None = None) -> Iterator[RawRecord]:
        for number, path in enumerate(self.paths):
            yield from read_records(path, spot, number)

    def parse(self, raw: RawRecord, placement: Placement = "keep") -> Sample:
        return shapes.parse(raw, placement)


def expand(pattern: str) -> list[str]:
    """The paths of a brace pattern, in order: `{000..127}` counts, with leading zeros kept, `{a,b}` lists.

    A path that exists, or has no braces, is itself. Raises DataError for more than 100,000 files.
    """
    if "\0" in pattern:
        raise DataError(f"{pattern!r}: not a file name")
    if not _BRACES.search(pattern) or os.path.exists(pattern):
        return [pattern]
    pieces = _BRACES.split(pattern)
    choices = [_choices(piece, pattern) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > _MAX_FILES:
        raise DataError(f"{pattern}: stands for {total:,} files, and {_MAX_FILES:,} is the most")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> Sequence[str]:
    counted = _RANGE.fullmatch(inside)
    if counted is None:
        return inside.split(",")
    first, last = counted.groups()
    if int(last) < int(first) or int(last) - int(first) >= _MAX_FILES:
        raise DataError(f"{pattern}: {{{inside}}} must count upwards, over at most {_MAX_FILES:,} files")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]


def _found(path: str) -> tuple[list[str], str, str]:
    """(files, their kind, the folder that holds them) of a source's path."""
    files = expand(path)
    if len(files) == 1 and os.path.isdir(files[0]):
        found, kind = _in_folder(Path(files[0]))
        return found, kind, files[0]
    kinds = {file: kind_of_file(file) or "json" for file in files}
    return files, _one_kind(path, kinds), os.path.commonpath([Path(file).parent for file in files])


def _in_folder(folder: Path) -> tuple[list[str], str]:
    """The data files of a folder, of one kind, and the kind; JSON files beside others only describe them."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = sorted(child.name for child in folder.iterdir() if child.is_dir())
        raise DataError(f"{folder}: holds the splits {', '.join(names)}; name the folder of one of them")
    listed = _listed(folder)
    if listed:
        return listed, "arrow"
    kinds = _kinds(folder.iterdir())
    if not kinds:
        kinds = _kinds(grandchild for child in folder.iterdir() if child.is_dir() for grandchild in child.iterdir())
    if set(kinds.values()) != {"json"}:
        kinds = {file: kind for file, kind in kinds.items() if kind != "json"}
    if not kinds:
        raise DataError(f"{folder}: no data file in this folder; known formats: {FORMATS}")
    return list(kinds), _one_kind(str(folder), kinds)


def _listed(folder: Path) -> list[str]:
    """The files that a saved Hugging Face dataset lists in its `state.json`; others beside them are its caches."""
    state = folder / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []  # there is none, or it is another program's
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise DataError(f"{state}: names data files outside its folder")
    return [str(folder / name) for name in names]


def _kinds(paths: Iterator[Path]) -> dict[str, str]:
    """Data files by name, each with its kind; other files, such as pictures and notes, are not among them."""
    found = {}
    for path in sorted(itertools.islice(paths, _MAX_FILES)):
        if not path.is_file():
            continue
        kind = kind_of_file(path)
        if kind is None:
            with path.open("rb") as stream:
                start = stream.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            kind = "json" if start and start in _JSON_STARTS else None
        if kind is not None and kind != "zip":
            found[str(path)] = kind
    return found


def _one_kind(path: str, kinds: dict[str, str]) -> str:
    counts = Counter(kinds.values())
    if len(counts) > 1:
        shown = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise DataError(
            f"{path}: holds files of several kinds ({shown}); name those to read, e.g. DIR/{{000..127}}.tar"
        )
    return next(iter(counts))
