"""`convert`: a model folder of one format becomes one of another, a tensor at a time, and the proof is written beside.

The source is opened, not loaded: every tensor has its place in the target before the first byte is written. What a
format can't hold is refused by name; what a conversion adds or leaves out is counted.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from lapilli.assemble import targets
from lapilli.assemble.kept import (
    CONVERSION,
    Conversion,
    Entry,
    Kept,
    family_of,
    own_files,
    read_kept,
    settings_sha256,
    write_kept,
)
from lapilli.assemble.source import OpenModel, open_model
from lapilli.assemble.target_cerebras import to_cerebras
from lapilli.assemble.target_llava import to_llava
from lapilli.assemble.targets import Draft, Place, vocabulary_rows
from lapilli.base.atomic import atomic_folder, refuse_taken, write_json
from lapilli.base.errors import ModelError, RecipeError, unknown
from lapilli.base.version import VERSION
from lapilli.checkpoint.stream import Written, check_space, size_of
from lapilli.model.quiet import quiet

if TYPE_CHECKING:
    from lapilli.assemble.verify import Verification

How = Literal["sample", "full", "none"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = ("llava", "hf", "lapilli", "cerebras")
_SMALL_FILES_BYTES = 50 * 10**6
"""What tokenizer, configurations and reports take at most."""


@dataclass(frozen=True)
class ConversionReport:
    """What was converted, and the proof."""

    folder: Path
    conversion: Conversion
    """What stands in conversion.json."""
    size_bytes: int
    verification: Verification


@dataclass(frozen=True)
class _Options:
    to: str
    family: str
    version: str
    model: str
    form: str
    dtype: str | None
    shard_bytes: int
    verify: How


def convert(
    src: Path | str,
    dst: Path | str,
    to: str,
    *,
    base: Path | str | None = None,
    dtype: str | None = None,
    shard_size: str = "5GB",
    verify: str = "sample",
    template: str | None = None,
    cerebras_model: str = "mmsimple-llava",
    cerebras_form: str = "mdl",
    say: Callable[[str], None] = lambda _line: None,
) -> ConversionReport:
    """Write the model of `src` to the new folder `dst` in the format `to`: llava, hf, lapilli or cerebras[-release].

    `base` belongs to sources that are pieces of a model; `dtype` (a key of `DTYPES`) changes the stored one; `template`
    names the conversation template for sources that don't say theirs; `cerebras_model` (mmsimple-llava, llava) and
    `cerebras_form` (mdl: their state file; tensors; tree: image_model and text_model) say which of theirs.

    `dst` gets its name when everything in it is written and verified; after an interruption nothing is there. Raises
    RecipeError for a wrong option, RunError if `dst` is taken or the disk too small, ModelError for what can't be read
    or held, and if the proof fails.
    """
    dst, options = Path(dst), _options(to, dtype, shard_size, verify, cerebras_model, cerebras_form)
    refuse_taken(dst)
    with quiet():
        say(f"opening {src}")
        opened = open_model(src, base, template=template)
        own = own_files(opened)
        beside = [opened.folder] if base is None else [opened.folder, Path(base)]
        draft = _draft(opened, own, options, beside)
        size = draft.size_bytes
        check_space(dst, size + _SMALL_FILES_BYTES)
        with atomic_folder(dst) as folder:
            say(f"writing {dst}")
            written = draft.write_weights(folder, options.shard_bytes, hashes=options.verify != "none")
            write_kept(own, opened, options.family, folder)
            draft.finish(folder)
            proof = _prove(opened, folder, draft, options.verify, say)
            conversion = _conversion(opened, draft, options, written, folder)
            conversion.verification = proof.as_dict()
            write_json(folder / CONVERSION, conversion.model_dump())
    return ConversionReport(dst, conversion, size, proof)


def _options(to: str, dtype: str | None, shard_size: str, verify: str, model: str, form: str) -> _Options:
    family, _, version = to.partition("-")
    for name, value, valid in (
        ("--to", family if version and family == "cerebras" else to, FAMILIES),
        ("--dtype", dtype or "float32", tuple(DTYPES)),
        ("--verify", verify, ("sample", "full", "none")),
        ("--cerebras-form", form, ("mdl", "tensors", "tree")),
    ):
        if value not in valid:
            raise RecipeError(unknown(name, value, valid))
    return _Options(to, family, version or "current", model, form, dtype, size_of(shard_size), cast("How", verify))


def _draft(opened: OpenModel, own: Kept | None, options: _Options, beside: list[Path]) -> Draft:
    """Settle what will be written. Raises ModelError if the format can't hold the model."""
    to = options.family
    files = "llava" if to == "cerebras" else to
    kept = own if family_of(opened.format) == files else read_kept(opened.folder, files)
    if options.dtype is not None:
        dtype = DTYPES[options.dtype]
        config = copy.deepcopy(opened.config)
        config.dtype = dtype
        tensors = {name: tensor.to(dtype) for name, tensor in opened.tensors.items()}
        opened = dataclasses.replace(opened, config=config, tensors=tensors)
    if to == "hf":
        return targets.to_hf(opened, kept)
    if to == "llava":
        return to_llava(opened, kept, beside)
    if to == "cerebras":
        chosen = {"version": options.version, "model": options.model, "form": options.form}
        return to_cerebras(opened, kept, beside, **chosen)
    return targets.to_lapilli(opened, kept)


def _prove(opened: OpenModel, folder: Path, draft: Draft, how: How, say: Callable[[str], None]) -> Verification:
    from lapilli.assemble.verify import verify

    made = verify(opened, folder, draft.places, how, say=say)
    if made.problems:
        raise ModelError(
            f"{opened.folder}: what was written is not the same model, and was removed: {'; '.join(made.problems)}"
        )
    return made


def _conversion(
    opened: OpenModel,
    draft: Draft,
    options: _Options,
    written: Mapping[Place, Written],
    folder: Path,
) -> Conversion:
    before, after = vocabulary_rows(opened), vocabulary_rows(draft.opened)
    return Conversion(
        written_by=f"lapilli {VERSION}",
        source=opened.format,
        target=options.to,
        dtype=options.dtype or "stored",
        config_sha256=settings_sha256(folder),
        added_rows=max(0, after - before),
        dropped_rows=max(0, before - after),
        tensors=_entries(opened, draft, written),
        notes=[_by_name(note, opened) for note in (*opened.notes, *draft.notes)],
    )


def _by_name(note: str, opened: OpenModel) -> str:
    """A note that names folders without saying where on this machine they lie."""
    for place in sorted({str(opened.folder), *opened.places.values()}, key=len, reverse=True):
        note = note.replace(place, Path(place).name)
    return note


def _entries(opened: OpenModel, draft: Draft, written: Mapping[Place, Written]) -> list[Entry]:
    made = []
    for name, places in draft.places.items():
        file, _, source = opened.tensors[name].where.rpartition(": ")
        for inner, target in places:
            place = written[inner, target]
            target_file = f"{inner}/{place.file}" if inner else place.file
            made.append(
                Entry(
                    source=source,
                    source_file=Path(file).name,
                    target=target,
                    target_file=target_file,
                    sha256=place.sha256,
                )
            )
    return made
