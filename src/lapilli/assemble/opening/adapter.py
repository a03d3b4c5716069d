"""Adapter folders, ours and PEFT's for transformers' own models, merged with their base as they are read.

An adapter of ours names its base and holds a hash of it, because the same adapters on other weights of the same shape
give a model that runs and is wrong.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lapilli.assemble.adapter import ADAPTER_FILE, PROJECTOR, base_of, hash_of_base
from lapilli.assemble.build import generation_config
from lapilli.assemble.fingerprint import fingerprint
from lapilli.assemble.folder import read_spec
from lapilli.assemble.opening.model import Notes, OpenModel
from lapilli.assemble.opening.parts import Names, empty_model
from lapilli.assemble.opening.pieces import base_folder, incomplete
from lapilli.base.errors import ModelError
from lapilli.checkpoint import lora, names
from lapilli.checkpoint.stream import open_file
from lapilli.checkpoint.tensors import read_json

OpenBase = Callable[[Path], OpenModel]


def open_adapter(
    folder: Path,
    base: Path | str | None,
    template: str | None,
    open_base: OpenBase,
    dtype: torch.dtype | None = None,
) -> OpenModel:
    """Open an adapter of ours over its base (the one given, else the one that it was trained on).

    What adapters change comes in `dtype` (None: as the base is stored). Template and image mode are the adapter's
    own, unless `template` is given. Raises ModelError if no base is found, if it is not the one that the adapter was
    trained on, or if the adapter doesn't fit it.
    """
    place = base or base_of(folder)
    if place is None or not Path(place).exists():
        raise ModelError(
            f"{folder}: an adapter; give the model it was trained on as its base ({place or 'not recorded'})"
        )
    if not (folder / PROJECTOR).is_file():
        raise ModelError(
            f"{folder}: {PROJECTOR} is missing, so the projector that trained beside these adapters is unknown; "
            "copy it from where the folder was made"
        )
    made = open_base(Path(place))
    notes = Notes(made.notes)
    _check_base(folder, made, asked=base is not None, notes=notes)
    adapters = lora.open_adapters(folder)
    # Adapters go by the names in memory, which for some models differ from those on disk.
    places = Names(empty_model(AutoModelForCausalLM, made.config.text_config, made.folder))
    known = {places.place(name): names.language_name(name) for name in made.part(names.LANGUAGE)}
    tensors = lora.merged(made.tensors, adapters, lambda name: known.get(name, names.language_name(name)), dtype)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(names.PROJECTOR)}
    tensors |= open_file(folder / PROJECTOR)
    notes.info(f"{folder}: {len(adapters.updates)} adapters over {place}, merged as they are read")
    opened = OpenModel(
        folder,
        "lapilli-adapter",
        made.config,
        tensors,
        made.tokenizer,
        made.spec,
        made.generation_config,
        notes,
        {**made.places, "projector": str(folder)},
    )
    _describe_as_adapter(opened, template)
    return opened


def _check_base(folder: Path, base: OpenModel, *, asked: bool, notes: Notes) -> None:
    recorded = hash_of_base(folder)
    if recorded is None or recorded == fingerprint(base.folder):
        return
    text = f"{folder}: the adapter was trained on another model than {base.folder} (its weights or settings differ)"
    if not asked:
        raise ModelError(f"{text}; name the right one as its base, or this one to join the two all the same")
    notes.warn(f"{text}; the two are joined because this base was asked for")


def _describe_as_adapter(opened: OpenModel, template: str | None) -> None:
    """Give the model what its adapter folder says of template and pictures, instead of what its base says."""
    spec = read_spec(opened.folder)
    if spec is None:
        return
    base = opened.spec
    keep = {"stored_as": base.stored_as, "stored_because": base.stored_because, "trained_rows": base.trained_rows}
    if template is not None:
        keep["template"] = base.template
    opened.spec = spec.model_copy(update=keep)
    opened.config.layout = opened.spec.joined["layout"]
    opened.tokenizer.chat_template = opened.spec.chat_template()
    opened.generation_config = generation_config(
        opened.generation_config, opened.tokenizer, opened.spec.template, opened.config.image_token_id
    )


def open_peft(
    folder: Path, base: Path | str | None, open_base: OpenBase, dtype: torch.dtype | None = None
) -> OpenModel:
    """Open adapters that PEFT trained on a model in transformers' own layout.

    Raises ModelError for adapters whose names are LLaVA's: those are an unfinished run's, without their projector.
    """
    adapters = lora.open_adapters(folder)
    if not any("language_model." in name for name in adapters.updates):
        raise incomplete(folder, "config.json")
    place = base_folder(folder, base, read_json(folder / ADAPTER_FILE).get("base_model_name_or_path"))
    made = open_base(place)
    if made.format != "hf":
        raise ModelError(f"{folder}: adapters for a model in transformers' layout; {place} is of format {made.format}")
    name_of = names.hf_name(empty_model(AutoModelForCausalLM, made.config.text_config, place))
    foreign = [name for name in (*adapters.updates, *adapters.whole) if name_of(name) is None]
    if foreign:
        raise ModelError(f"{adapters.file}: {foreign[0]}: has no place in a joined model")
    notes = Notes(made.notes)
    notes.info(f"{folder}: {len(adapters.updates)} adapters over {place}, merged as they are read")
    tensors = lora.merged(made.tensors, adapters, name_of, dtype)
    return OpenModel(
        folder, "hf-lora", made.config, tensors, made.tokenizer, made.spec, made.generation_config, notes, made.places
    )
