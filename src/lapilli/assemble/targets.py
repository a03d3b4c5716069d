"""What a model becomes in each format: its tensors under new names, and the files beside them.

A `Draft` is settled before anything is written, so that what a format can't hold is refused at once. config.json comes
last of all files: a folder that was cut short does not load.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapilli.assemble import rows
from lapilli.assemble.build import where_it_fits
from lapilli.assemble.folder import FolderSpec, joined_fields, write_spec
from lapilli.assemble.kept import TOKENIZER_FILES, Kept, dtype_of, vision_sha256
from lapilli.assemble.old_tokenizer import write_old_tokenizer
from lapilli.assemble.save import hf_processor
from lapilli.base.errors import ModelError
from lapilli.checkpoint import llava_write
from lapilli.checkpoint.hf_write import hf_fields, hf_names, own_fields, own_names, vision_prefix
from lapilli.checkpoint.stream import Tensors, copy_files

if TYPE_CHECKING:
    from lapilli.assemble.source import OpenModel

_LONGEST = 2**20
"""Tokenizers without a limit say a number that has no end."""

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


def _described(opened: OpenModel, stored_as: Any, because: str = "") -> FolderSpec:
    change = {"stored_as": stored_as, "stored_because": because, "joined": joined_fields(opened.config)}
    return opened.spec.model_copy(update=change)


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
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
        fields = _as_before(kept, made)
        names |= {name: before[0] for name, before in kept.names.items() if name in names and before}
    spec = _described(made, "transformers")

    def finish(folder: Path) -> None:
        processor = hf_processor(made.config, made.tokenizer, spec)
        _write_beside(folder, made, spec, processor)
        _write_json(folder / "config.json", fields)

    return Draft(made, _whole(names), finish)


def to_lapilli(opened: OpenModel, kept: Kept | None) -> Draft:
    """Our own type, which holds every model."""
    names = own_names(opened.tensors)
    fields = own_fields(opened.config)
    if kept is not None:
        fields = _as_before(kept, opened)
    because = where_it_fits(opened.config, opened.spec.image) or "the conversion asked for it"
    spec = _described(opened, "lapilli", because)

    def finish(folder: Path) -> None:
        _write_beside(folder, opened, spec)
        _write_json(folder / "config.json", fields)

    return Draft(opened, _whole(names), finish)


def _whole(names: Mapping[str, str]) -> dict[str, list[Place]]:
    return {name: [("", target)] for name, target in names.items()}


def _as_before(kept: Kept, opened: OpenModel) -> dict[str, Any]:
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


# ---- LLaVA's layout ---------------------------------------------------------------------------------------------


def to_llava(opened: OpenModel, kept: Kept | None, beside: Iterable[Path]) -> Draft:
    """LLaVA's layout, with the vocabulary that the language model was trained with.

    `beside` are folders where the source's own tokenizer files may lie. The vision encoder stays the one on the Hub
    that the checkpoint named, if it is still that one; otherwise it is written into a folder of its own inside.
    Raises ModelError if the layout can't hold the model.
    """
    why_not = llava_write.why_not_llava(opened.config)
    if why_not:
        raise ModelError(
            f"{opened.folder}: LLaVA's layout can't hold this model: {why_not}. Our own type can: --to lapilli"
        )
    notes: list[str] = []
    made = with_vocabulary(opened, _needed_rows(opened, notes))
    config = made.config
    named = kept is not None and kept.vision_sha256 is not None
    if kept is not None and named and kept.vision_sha256 != vision_sha256(made.tensors):
        named = False
        notes.append("the vision encoder is no longer the one that config.json named; it is written out")
    places = _llava_places(made, kept, named)
    if kept is None:
        fields = llava_write.llava_fields(
            config,
            dtype_of(made),
            tower=llava_write.TOWER,
            im_start_end=made.spec.im_start_end,
            max_length=min(made.tokenizer.model_max_length, _LONGEST),
        )
    else:
        fields = _as_before(kept, made) | {"vocab_size": vocabulary_rows(made)}
        fields |= {} if named else {"mm_vision_tower": llava_write.TOWER}
    spec = _described(made, "llava")

    def finish(folder: Path) -> None:
        write_spec(folder, spec)
        if not named:
            inner = folder / llava_write.TOWER
            _write_json(inner / "preprocessor_config.json", llava_write.tower_processor(spec.image))
            _write_json(inner / "config.json", llava_write.tower_fields(config))
        if kept is None or not copy_files(TOKENIZER_FILES, kept.folder, folder):
            notes.extend(write_old_tokenizer(made.tokenizer, beside, vocabulary_rows(made), folder))
        if kept is None or not copy_files(["generation_config.json"], kept.folder, folder):
            _write_generation(folder, made)
        _write_json(folder / "config.json", fields)

    return Draft(made, places, finish, notes)


def _needed_rows(opened: OpenModel, notes: list[str]) -> int:
    """Rows without those that a conversion added for the image token, unless other tokens have come to need them."""
    trained, there = opened.trained_rows, vocabulary_rows(opened)
    others = [
        t for t, i in opened.tokenizer.get_vocab().items() if trained <= i < there and t != opened.spec.image_token
    ]
    if trained < there and others:
        notes.append(
            f"all {there} rows are kept: the tokenizer has {', '.join(sorted(others)[:3])} beyond the first {trained}"
        )
        return there
    return min(trained, there)


def _llava_places(made: OpenModel, kept: Kept | None, named: bool) -> dict[str, list[Place]]:
    names = llava_write.llava_names(made.tensors, made.config)
    before = kept.names if kept is not None else {}
    alone = vision_prefix(made.config.vision_config)
    places: dict[str, list[Place]] = {}
    for name, target in names.items():
        found = [("", known) for known in before.get(name, [])]
        if name.startswith("vision."):
            inner = [] if named else [(llava_write.TOWER, alone + name.removeprefix("vision."))]
            places[name] = found + inner
        else:
            places[name] = found or [("", target)]
    return places


def _write_generation(folder: Path, made: OpenModel) -> None:
    """generation_config.json without the image token where that has no row: the original would stumble over it."""
    if made.generation_config is None:
        return
    fields = made.generation_config.to_diff_dict()
    if not made.config.image_row:
        fields.pop("suppress_tokens", None)
    fields.pop("transformers_version", None)
    _write_json(folder / "generation_config.json", fields)
