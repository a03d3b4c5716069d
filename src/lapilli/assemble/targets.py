"""What a model becomes in each format: its tensors under new names, and the files beside them.

A `Draft` is settled before anything is written, so that what a format can't hold is refused at once. config.json comes
last of all files: a folder that was cut short does not load.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapilli.assemble import rows
from lapilli.assemble.build import where_it_fits
from lapilli.assemble.folder import FolderSpec, joined_fields, write_spec
from lapilli.assemble.kept import Kept, dtype_of
from lapilli.assemble.save import hf_processor
from lapilli.base.errors import ModelError
from lapilli.base.progress import Progress
from lapilli.checkpoint.hf_write import hf_fields, hf_names, own_fields, own_names
from lapilli.checkpoint.stream import Tensors, Written, total_bytes, write_folder

if TYPE_CHECKING:
    from lapilli.assemble.source import OpenModel

Place = tuple[str, str]
"""Sub-folder (empty: the folder itself) and name there."""


@dataclass
class Draft:
    """What will be written."""

    opened: OpenModel
    """The source with the target's vocabulary and dtype."""
    places: dict[str, list[Place]]
    """Canonical name: where the tensor goes; nowhere if the target finds it elsewhere."""
    finish: Callable[[Path], None]
    """Writes every file but the weights."""
    notes: list[str] = field(default_factory=list)
    write: Callable[[Draft, Path, int, bool, Progress], dict[Place, Written]] | None = None
    """Writes the weights of a format that is not safetensors under the names of `places`."""

    @property
    def size_bytes(self) -> int:
        """What the weights take on disk."""
        return sum(total_bytes(part.values()) for part in self.parts().values())

    def write_weights(self, folder: Path, shard_bytes: int, *, hashes: bool) -> dict[Place, Written]:
        """Write the weights, a tensor at a time; return the file and the hash of each."""
        written: dict[Place, Written] = {}
        with Progress("writing (bytes)", self.size_bytes) as progress:
            if self.write is not None:
                return self.write(self, folder, shard_bytes, hashes, progress)
            for inner, part in self.parts().items():
                (folder / inner).mkdir(exist_ok=True)
                made = write_folder(folder / inner, part, shard_bytes=shard_bytes, hashes=hashes, progress=progress)
                written |= {(inner, name): place for name, place in made.items()}
        return written

    def parts(self) -> dict[str, Tensors]:
        """Tensors by their new names, for each sub-folder."""
        made: dict[str, Tensors] = {"": {}}
        for name, places in self.places.items():
            for folder, target in places:
                made.setdefault(folder, {})[target] = self.opened.tensors[name]
        return made


def vocabulary_rows(opened: OpenModel) -> int:
    """Rows of the language model's embedding."""
    return opened.config.text_config.get_text_config().vocab_size


def with_vocabulary(opened: OpenModel, wanted: int) -> OpenModel:
    """The model with so many rows: cut, or grown by mean rows."""
    there = vocabulary_rows(opened)
    config = copy.deepcopy(opened.config)
    change = rows.cut if wanted < there else rows.grow
    tensors = opened.tensors if wanted == there else change(opened.tensors, config.text_config, wanted)
    config.text_config = rows.with_rows(config.text_config, wanted)
    config.image_row = config.image_token_id < wanted
    return dataclasses.replace(opened, config=config, tensors=tensors)


def described(opened: OpenModel, stored_as: Any, because: str = "") -> FolderSpec:
    """What lapilli.json says of the target."""
    change = {"stored_as": stored_as, "stored_because": because, "joined": joined_fields(opened.config)}
    return opened.spec.model_copy(update=change)


def write_fields(file: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON file of a folder that is not there yet."""
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- transformers' layout, and ours -----------------------------------------------------------------------------


def to_hf(opened: OpenModel, kept: Kept | None) -> Draft:
    """transformers' `llava` or `llava_next`, with a row for the image token. Raises ModelError if it can't hold it."""
    needed = max(vocabulary_rows(opened), opened.config.image_token_id + 1)
    made = with_vocabulary(opened, needed)
    why_not = where_it_fits(made.config, made.spec.image)
    if why_not:
        raise ModelError(
            f"{opened.folder}: transformers' layout can't hold this model: {why_not}. Our own type can: --to lapilli"
        )
    names = hf_names(made.tensors, made.config)
    fields = hf_fields(made.config)
    if kept is not None:
        fields = as_before(kept, made)
        names |= {name: before[0] for name, before in kept.names.items() if name in names and before}
    spec = described(made, "transformers")

    def finish(folder: Path) -> None:
        processor = hf_processor(made.config, made.tokenizer, spec)
        _write_beside(folder, made, spec, processor)
        write_fields(folder / "config.json", fields)

    return Draft(made, _whole(names), finish)


def to_lapilli(opened: OpenModel, kept: Kept | None) -> Draft:
    """Our own type, which holds every model."""
    names = own_names(opened.tensors)
    fields = own_fields(opened.config)
    if kept is not None:
        fields = as_before(kept, opened)
    because = where_it_fits(opened.config, opened.spec.image) or "the conversion asked for it"
    spec = described(opened, "lapilli", because)

    def finish(folder: Path) -> None:
        _write_beside(folder, opened, spec)
        write_fields(folder / "config.json", fields)

    return Draft(opened, _whole(names), finish)


def _whole(names: Mapping[str, str]) -> dict[str, list[Place]]:
    return {name: [("", target)] for name, target in names.items()}


def as_before(kept: Kept, opened: OpenModel) -> dict[str, Any]:
    """The config.json of before, with the dtype of now if that is another."""
    dtype = dtype_of(opened)
    if dtype == kept.dtype:
        return dict(kept.config)
    return dict(kept.config) | {"torch_dtype" if "torch_dtype" in kept.config else "dtype": dtype}


def _write_beside(folder: Path, opened: OpenModel, spec: FolderSpec, processor: Any = None) -> None:
    write_spec(folder, spec)
    tokenizer = opened.tokenizer
    tokenizer.chat_template = spec.chat_template()
    if processor is not None:
        processor.chat_template = tokenizer.chat_template
        processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if opened.generation_config is not None:
        opened.generation_config.save_pretrained(folder)
