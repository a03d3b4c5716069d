"""LLaVA's folders that hold a piece of a model: a projector alone, or what a LoRA run trained. Joined with their base.

Both are meaningless without the language model that they were trained on, which is not theirs to hold; config.json
describes the whole. What a piece lacks and its base can't give is said with where to get it.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lapilli.assemble.opening.llava import IM_PATCH, assembled
from lapilli.assemble.opening.model import Notes, OpenModel
from lapilli.assemble.rows import grow, tables_of
from lapilli.base.errors import ModelError
from lapilli.checkpoint import llava, lora, names
from lapilli.checkpoint.llava import LlavaSettings
from lapilli.checkpoint.stream import Lazy, Tensors, open_file, open_folder
from lapilli.checkpoint.tensors import read_json
from lapilli.data.template import IM_END, IM_START
from lapilli.data.tokenizer import load_tokenizer

BESIDE_LORA = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
PROJECTOR = ("mm_projector.safetensors", "mm_projector.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def base_folder(folder: Path, base: Path | str | None, recorded: Any) -> Path:
    """The base that was given, else the one that the folder names, if it lies there.

    `recorded` is seen from `folder` where it is relative. Raises ModelError if there is none.
    """
    if base is not None:
        if not Path(base).is_dir():
            raise ModelError(f"{folder}: its base {base} is no folder")
        return Path(base)
    if isinstance(recorded, str) and recorded and (folder / recorded).is_dir():
        return folder / recorded
    said = f"it was {recorded}, which is no folder here" if recorded else "it does not say which"
    raise ModelError(f"{folder}: a piece of a model; give the model it was trained on as its base ({said})")


def open_projector_only(folder: Path, base: Path | str | None, template: str | None) -> OpenModel:
    """Open a folder with config.json and mm_projector.bin over its base, a language model or a whole LLaVA model."""
    fields = llava.read_fields(folder)
    settings = llava.read_settings(folder / "config.json", fields)
    notes = Notes()
    basis = base_folder(folder, base, fields.get("_name_or_path"))
    notes.info(f"{folder}: a projector alone; the language model is that of {basis}")
    file = next(folder / name for name in PROJECTOR if (folder / name).is_file())
    return _joined(folder, "llava-projector", settings, basis, open_file(file), template, notes)


def open_lora(
    folder: Path, base: Path | str | None, template: str | None, dtype: torch.dtype | None = None
) -> OpenModel:
    """Open a LoRA folder of LLaVA's: adapters, what was trained in full beside them, and the base that they belong to.

    What adapters change comes in `dtype` (None: as the base is stored).
    Raises ModelError if what was trained beside the adapters is missing, or if they don't fit the base.
    """
    fields = llava.read_fields(folder)
    settings = llava.read_settings(folder / "config.json", fields)
    beside = next((folder / name for name in BESIDE_LORA if (folder / name).is_file()), None)
    if beside is None:
        raise incomplete(folder, BESIDE_LORA[0])
    adapters = lora.open_adapters(folder)
    notes = Notes()
    recorded = read_json(folder / lora.CONFIG).get("base_model_name_or_path") or fields.get("_name_or_path")
    basis = base_folder(folder, base, recorded)
    notes.info(f"{folder}: {len(adapters.updates)} adapters over {basis}, merged as they are read")
    whole = {_without_wrapper(name): tensor for name, tensor in open_file(beside).items()}
    made = _joined(folder, "llava-lora", settings, basis, whole, template, notes)
    idle, changes = _of_encoder(adapters)
    if idle:
        notes.info(f"{folder}: {len(idle)} adapters of the vision encoder are zero and left out")
    if changes:
        notes.warn(f"{folder}: {len(changes)} adapters of the vision encoder change it, so it is the model's own")
        made.spec = made.spec.model_copy(update={"settings": {**made.settings, "unfreeze_mm_vision_tower": True}})
        made.places["vision"] = str(folder)
    made.tensors = lora.merged(
        made.tensors, adapters, lambda name: None if name in idle else names.llava_name(name), dtype
    )
    return made


def _of_encoder(adapters: lora.Adapters) -> tuple[set[str], set[str]]:
    """Adapters of the vision encoder that change nothing, and those that do.

    The original puts them there without meaning to where a run began with a whole model, and never trains them.
    """
    found = {name for name in adapters.updates if names.llava_name(name).startswith(names.VISION)}
    idle = {name for name in found if adapters.updates[name].is_zero}
    return idle, found - idle


def incomplete(folder: Path, file: str) -> ModelError:
    """What to say of an intermediate LoRA checkpoint, which the original writes without its projector."""
    return ModelError(
        f"{folder}: {file} is missing beside the adapters. Intermediate checkpoints of a LoRA run lack it (the "
        "projector that trained along is in it): use the folder that the run wrote at its end, or copy config.json and "
        "non_lora_trainables.bin from there, which gives this step's adapters with the final projector"
    )


def _without_wrapper(name: str) -> str:
    """Names of PEFT's wrapper, as the original strips them."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def _joined(
    folder: Path,
    kind: Any,
    settings: LlavaSettings,
    basis: Path,
    trained: Tensors,
    template: str | None,
    notes: Notes,
) -> OpenModel:
    """The base's tensors with those that were trained in their place."""
    tensors = _base_tensors(basis, notes)
    ours, _ = names.canonical(trained, names.llava_name)
    if any(name.startswith(names.PROJECTOR) for name in ours):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(names.PROJECTOR)}
    place = folder if any((folder / name).is_file() for name in _TOKENIZER) else basis
    tokenizer = load_tokenizer(place)
    added = _add_marks(tokenizer, settings)
    tensors = _with_rows(folder, tensors, ours, settings, added, notes)
    made = assembled(folder, kind, settings, tensors, tokenizer, template, notes)
    made.places["language"] = str(basis)
    return made


def _base_tensors(basis: Path, notes: Notes) -> Tensors:
    """A base's tensors: those of a language model alone, or of a whole model in LLaVA's layout."""
    fields = read_json(basis / "config.json") if (basis / "config.json").is_file() else {}
    if "text_config" in fields and "vision_config" in fields:
        raise ModelError(
            f"{basis}: a joined model of another layout; give the language model that this was trained on, or a model "
            "in LLaVA's layout, as its base"
        )
    name_of = names.llava_name if llava.is_llava(fields) else names.language_name
    made, computed = names.canonical(open_folder(basis), name_of)
    if computed:
        notes.info(f"{basis}: {names.said(computed)}")
    return made


def _add_marks(tokenizer: PreTrainedTokenizerBase, settings: LlavaSettings) -> list[str]:
    """Add the tokens that training added to the base's tokenizer, in the original's order, as long as rows are left."""
    wanted = [*([IM_PATCH] if settings.im_patch else []), *([IM_START, IM_END] if settings.im_start_end else [])]
    missing = [token for token in wanted if token not in tokenizer.get_vocab()]
    rows = settings.language.get_text_config().vocab_size
    if missing and max(tokenizer.get_vocab().values()) + len(missing) < rows:
        tokenizer.add_tokens(missing, special_tokens=True)
        return missing
    return []


def _with_rows(
    folder: Path, tensors: Tensors, ours: Tensors, settings: LlavaSettings, added: list[str], notes: Notes
) -> Tensors:
    """The base's tensors with the trained ones in their place, and with rows for the tokens that training added.

    Training began with the mean of the other rows for them. A table may have been trained in full, or its new rows.
    Raises ModelError if the base has another number of rows than these tokens explain.
    """
    rows, made = settings.language.get_text_config().vocab_size, dict(tensors)
    for name in tables_of(settings.language):
        table, new = made.get(name), ours.get(name)
        if table is None or (new is not None and new.shape[0] == rows):
            continue
        if table.shape[0] + len(added) != rows:
            raise ModelError(
                f"{table.where}: has {table.shape[0]} rows, {folder / 'config.json'} asks for {rows}; give the model "
                "that this was trained on as its base"
            )
        made |= grow({name: table}, settings.language, rows) if added else {}
        if new is None and added:
            notes.info(f"{folder}: {name}: the rows of {', '.join(added)} are the mean of the others, as at the start")
        if new is not None:
            if new.shape[0] > rows or new.shape[1:] != table.shape[1:]:
                raise ModelError(f"{new.where}: has shape {new.shape}, the base's table {table.shape}")
            ours = ours | {name: _with_tail(made[name], new)}
    return made | ours


def _with_tail(table: Lazy, last: Lazy) -> Lazy:
    """A table whose last rows are others."""

    def change(value: Any) -> Any:
        made = value.clone()
        made[-last.shape[0] :] = last.read().to(value.dtype)
        return made

    return table.then(change)
