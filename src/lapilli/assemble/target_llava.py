"""LLaVA's layout as a target: the vocabulary it was trained with, the encoder by name or inside, the old tokenizer.

What the original reads is the measure: files in the words of transformers 4.37, and no row or token that it would
have to invent.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapilli.assemble.folder import write_spec
from lapilli.assemble.kept import TOKENIZER_FILES, Kept, dtype_of, vision_sha256
from lapilli.assemble.old_tokenizer import write_old_tokenizer
from lapilli.assemble.targets import (
    Draft,
    Place,
    as_before,
    described,
    vocabulary_rows,
    with_vocabulary,
    write_fields,
)
from lapilli.base.errors import ModelError
from lapilli.checkpoint import llava_write
from lapilli.checkpoint.names import vision_prefix
from lapilli.checkpoint.stream import copy_files

if TYPE_CHECKING:
    from lapilli.assemble.source import OpenModel

_LONGEST = 2**20
"""Tokenizers without a limit say a number that has no end."""


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
    made = with_vocabulary(opened, needed_rows(opened, notes))
    config = made.config
    fields = llava_settings(made, kept)
    named = _named(made, kept)
    if kept is not None and kept.hub and not named:
        notes.append("the vision encoder is no longer the one that config.json named; it is written out")
    if not named:
        fields["mm_vision_tower"] = llava_write.TOWER
    places = _places(made, kept, named, tuned=bool(fields.get("unfreeze_mm_vision_tower")))
    spec = described(made, "llava")

    def finish(folder: Path) -> None:
        write_spec(folder, spec)
        if not named:
            inner = folder / llava_write.TOWER
            write_fields(inner / "preprocessor_config.json", llava_write.tower_processor(spec.image))
            write_fields(inner / "config.json", llava_write.tower_fields(config))
        notes.extend(write_tokenizer(made, kept, beside, folder))
        write_generation(folder, made, kept)
        write_fields(folder / "config.json", fields)

    return Draft(made, places, finish, notes)


def needed_rows(opened: OpenModel, notes: list[str]) -> int:
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


def llava_settings(made: OpenModel, kept: Kept | None) -> dict[str, Any]:
    """config.json: as it stood before, where the model came from this layout, else from what the model says."""
    if kept is not None:
        return as_before(kept, made) | {"vocab_size": vocabulary_rows(made)}
    fields = llava_write.llava_fields(
        made.config,
        dtype_of(made),
        tower=llava_write.TOWER,
        im_start_end=made.spec.im_start_end,
        max_length=min(made.tokenizer.model_max_length, _LONGEST),
    )
    return made.settings | fields


def write_tokenizer(made: OpenModel, kept: Kept | None, beside: Iterable[Path], folder: Path) -> list[str]:
    """Write the tokenizer's files; return what the user should know."""
    if kept is not None and copy_files(TOKENIZER_FILES, kept.folder, folder):
        return []
    return write_old_tokenizer(made.tokenizer, beside, vocabulary_rows(made), folder)


def _named(made: OpenModel, kept: Kept | None) -> bool:
    """Whether the encoder is still the one on the Hub that config.json names, or lies in the checkpoint, trained."""
    if kept is None or not kept.hub:
        return False
    inside = all(kept.names.get(name) for name in made.tensors if name.startswith("vision."))
    if kept.config.get("unfreeze_mm_vision_tower") and inside:
        return True
    return kept.vision_sha256 == vision_sha256(made.tensors)


def _places(made: OpenModel, kept: Kept | None, named: bool, *, tuned: bool) -> dict[str, list[Place]]:
    """Where the tensors go. A trained encoder stands in the checkpoint too, which is where the original looks."""
    names = llava_write.llava_names(made.tensors, made.config)
    before = kept.names if kept is not None else {}
    alone = vision_prefix(made.config.vision_config)
    places: dict[str, list[Place]] = {}
    for name, target in names.items():
        places[name] = [("", known) for known in before.get(name, [])]
        vision = name.startswith("vision.")
        if not places[name] and (tuned or not vision):
            places[name].append(("", target))
        if vision and not named:
            places[name].append((llava_write.TOWER, alone + name.removeprefix("vision.")))
    return places


def write_generation(folder: Path, made: OpenModel, kept: Kept | None) -> None:
    """generation_config.json: as it stood, or without the image token where that has no row to be suppressed."""
    if kept is not None and copy_files(["generation_config.json"], kept.folder, folder):
        return
    if made.generation_config is None:
        return
    fields = made.generation_config.to_diff_dict()
    if not made.config.image_row:
        fields.pop("suppress_tokens", None)
    fields.pop("transformers_version", None)
    write_fields(folder / "generation_config.json", fields)
