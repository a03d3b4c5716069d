"""What a converted folder keeps of the folder that it came from, so that going back gives that folder again.

Formats say different things: config.json of a LLaVA checkpoint has settings that transformers' can't hold, and its
tokenizer has no image token. Every conversion therefore lays the small files of its source into `kept/<family>/`, with
the names that the tensors had there, and hands on what its source had kept. All of it counts only as long as
config.json is as the conversion wrote it: whoever edits a folder means the edit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lapilli.base.errors import ModelError
from lapilli.checkpoint.stream import Lazy, Tensors, copy_files, digest_of, open_folder
from lapilli.checkpoint.tensors import read_json

if TYPE_CHECKING:
    from lapilli.assemble.source import OpenModel

log = logging.getLogger(__name__)

CONVERSION = "conversion.json"
FOLDER = "kept"
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_NAMES = "tensors.json"
_UNTUNED = re.compile(r"(?:model|transformer)\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)")


class Entry(BaseModel):
    """Where one tensor came from and went to."""

    model_config = ConfigDict(extra="forbid")

    source: str
    """Name in the source, or in the file of its vision encoder."""
    source_file: str
    target: str
    target_file: str
    sha256: str | None = None
    """Of the tensor's bytes as written; None with `--verify none`."""


class Conversion(BaseModel):
    """Contents of `conversion.json`."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    written_by: str
    source: str
    """Format of the source, as `target` that of this folder."""
    target: str
    dtype: str
    """`stored`: each tensor's own; or what `--dtype` asked for."""
    config_sha256: str
    """Of config.json as written here; for Cerebras' folders, of all their configuration."""
    added_rows: int = 0
    """Rows of the vocabulary's tables."""
    dropped_rows: int = 0
    tensors: list[Entry] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    verification: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A folder's small files as they were before a conversion, or as they are where no conversion lies between."""

    folder: Path
    config: dict[str, Any]
    names: dict[str, list[str]]
    """Canonical name: names in the checkpoint's own files; none for what lay elsewhere."""
    hub: bool
    """config.json of a LLaVA checkpoint names an encoder that is no folder beside it."""
    vision_sha256: str | None
    """Of that encoder."""
    dtype: str
    """Of the language model."""


_PIECES = {"llava-lora": "llava", "llava-projector": "llava", "lapilli-adapter": "lapilli", "hf-lora": "hf"}
"""Formats of folders that need a base, and what they are once joined with it."""


def family_of(source_format: str) -> str:
    """The format whose files a folder of `source_format` has."""
    return _PIECES.get(source_format, source_format)


def own_files(opened: OpenModel) -> Kept | None:
    """A source's small files and the names of its tensors, as they are now; None if they don't describe the whole."""
    if opened.format in ("lapilli-adapter", "hf-lora", "cerebras"):
        return None
    names: dict[str, list[str]] = {}
    config = read_json(opened.folder / "config.json") if (opened.folder / "config.json").is_file() else {}
    if opened.format not in _PIECES:
        for name, tensor in opened.tensors.items():
            file, _, source = tensor.where.rpartition(": ")
            names[name] = [source] if Path(file).parent == opened.folder else []
    if opened.format == "llava":
        _add_untuned(opened, names)
    hub, digest = False, None
    if family_of(opened.format) == "llava":
        config |= opened.settings
        tower = str(config.get("mm_vision_tower") or config.get("vision_tower"))
        hub = not (opened.folder / tower).is_dir()
        digest = vision_sha256(opened.tensors) if hub and opened.places["vision"] != str(opened.folder) else None
    return Kept(opened.folder, config, names, hub, digest, dtype_of(opened))


def dtype_of(opened: OpenModel) -> str:
    """The language model's dtype, as config.json writes it: that of its first matrix."""
    matrices = (t for name, t in opened.tensors.items() if name.startswith("language.") and len(t.shape) > 1)
    return str(next(matrices).dtype).removeprefix("torch.")


def _add_untuned(opened: OpenModel, names: dict[str, list[str]]) -> None:
    """Find the vision encoder that some LLaVA checkpoints hold although the one that they name is read instead.

    If it is the same, it is written again on the way back; if not, the original never reads it, and it is left out.
    """
    taken = {source for known in names.values() for source in known}
    different = 0
    for source, tensor in open_folder(opened.folder).items():
        match = _UNTUNED.fullmatch(source)
        if match is None or source in taken:
            continue
        read = opened.tensors.get(f"vision.{match[1]}")
        if read is not None and _same(read, tensor):
            names[f"vision.{match[1]}"].append(source)
        elif not source.endswith(".position_ids"):
            different += 1
    if different:
        opened.notes.warn(
            f"{opened.folder}: {different} tensors of a vision encoder that differ from the one it names are left out: "
            "the original does not read them either"
        )


def _same(first: Lazy, second: Lazy) -> bool:
    same = (first.shape, first.dtype) == (second.shape, second.dtype)
    return same and torch.equal(first.read(), second.read())


def read_conversion(folder: Path) -> Conversion | None:
    """Read `conversion.json`; None if there is none, or if config.json is not as it was written then (said aloud)."""
    file = folder / CONVERSION
    if not file.is_file():
        return None
    try:
        made = Conversion.model_validate(read_json(file))
    except ValidationError as error:
        raise ModelError(f"{file}: not what a conversion writes ({error.errors()[0]['msg']}); remove it") from error
    if made.config_sha256 != settings_sha256(folder):
        log.warning(
            "%s: its configuration was changed after the conversion; what was kept of the first folder does not count",
            folder,
        )
        return None
    return made


def read_kept(folder: Path, family: str) -> Kept | None:
    """What a converted folder keeps of a format it came from; None if nothing, or nothing that still counts."""
    place = folder / FOLDER / family
    if not (place / _NAMES).is_file() or read_conversion(folder) is None:
        return None
    written = read_json(place / _NAMES)
    return Kept(place, read_json(place / "config.json"), **written)


def write_kept(own: Kept | None, opened: OpenModel, to: str, draft: Path) -> None:
    """Lay the source's small files into `draft`, and what it had itself kept of formats other than `to`."""
    family = family_of(opened.format)
    earlier = opened.folder / FOLDER
    if earlier.is_dir() and read_conversion(opened.folder) is not None:
        for place in sorted(p for p in earlier.iterdir() if p.is_dir() and p.name not in (family, to)):
            shutil.copytree(place, draft / FOLDER / place.name)
    if own is None or family == to:
        return
    place = draft / FOLDER / family
    place.mkdir(parents=True)
    copy_files(_FILES, own.folder, place)
    (place / "config.json").write_text(json.dumps(own.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    written = {key: getattr(own, key) for key in ("names", "hub", "vision_sha256", "dtype")}
    (place / _NAMES).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def settings_sha256(folder: Path) -> str:
    """SHA-256 of the files that say what the model is."""
    files = [folder / "config.json", folder / "text_model" / "config.json", *sorted(folder.glob("*.yaml"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def vision_sha256(tensors: Tensors) -> str:
    """One SHA-256 for the vision encoder: names, shapes, dtypes and bytes."""
    return _digest((name, tensor) for name, tensor in sorted(tensors.items()) if name.startswith("vision."))


def _digest(tensors: Iterable[tuple[str, Lazy]]) -> str:
    made = hashlib.sha256()
    for name, tensor in tensors:
        made.update(f"{name} {tensor.shape} {tensor.dtype} {digest_of(tensor)}\n".encode())
    return made.hexdigest()
