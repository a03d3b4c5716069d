"""Adapter folders: what a LoRA run trained, without the model it was trained on.

They hold PEFT's own adapter files, the projector (which trains beside the adapters in full), the place of the base
model, and a `lapilli.json` of their own: a run may teach another template or image mode than its base has. With the
tokenizer beside it, data can be looked at as the adapter learned it without its base.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from lapilli.assemble.build import generation_config
from lapilli.assemble.folder import FolderSpec, joined_fields, read_spec, write_spec
from lapilli.assemble.parts import load_projector
from lapilli.base.atomic import atomic_folder
from lapilli.base.errors import ModelError
from lapilli.base.layout import ImageLayout
from lapilli.model.adapter import adapters_of
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from lapilli.assemble.load import Loaded

ADAPTER_FILE = "adapter_config.json"
_PROJECTOR = "projector.safetensors"
_BASE = "base.json"


def save_adapter(
    model: VisionLanguageModel, tokenizer: PreTrainedTokenizerBase, spec: FolderSpec, base: Path, folder: Path
) -> None:
    """Write the adapters of `model.language_model`, the projector and the tokenizer.

    `spec` describes the model with its adapters; `base` is the folder that they were trained on.
    """
    wrapper = adapters_of(model)
    if wrapper is None:
        raise ModelError("the model has no adapters to save")
    with quiet(), atomic_folder(folder) as draft:
        wrapper.save_pretrained(str(draft), save_embedding_layers=False)
        (draft / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
        tensors = {f"projector.{k}": v.detach().cpu().contiguous() for k, v in model.projector.state_dict().items()}
        save_file(tensors, draft / _PROJECTOR)
        tokenizer.chat_template = spec.chat_template()
        tokenizer.save_pretrained(draft)
        write_spec(draft, spec.model_copy(update={"joined": joined_fields(model.config)}))
        (draft / _BASE).write_text(json.dumps({"base": str(base.resolve())}, indent=2) + "\n", encoding="utf-8")


def base_of(folder: Path) -> Path | None:
    """The model that an adapter folder says it was trained on; None if it does not say."""
    note = folder / _BASE
    return Path(json.loads(note.read_text(encoding="utf-8"))["base"]) if note.is_file() else None


def attach_adapter(folder: Path, load_base: Callable[[Path], Loaded], base: Path | str | None) -> Loaded:
    """Load the base (the one given, else the one the adapter was trained on), add the adapters and merge them.

    Template and image mode are the adapter's own. Raises ModelError if no base is found or the adapter doesn't fit it.
    """
    from peft import PeftModel

    base = base or base_of(folder)
    if base is None or not Path(base).exists():
        raise ModelError(
            f"{folder}: an adapter; give the model it was trained on as its base ({base or 'not recorded'})"
        )
    if not (folder / _PROJECTOR).is_file():
        raise ModelError(
            f"{folder}: {_PROJECTOR} is missing, so the projector that trained beside these adapters is unknown; "
            "copy it from where the folder was made"
        )
    loaded = load_base(Path(base))
    model = loaded.model
    try:
        with quiet():
            adapted = PeftModel.from_pretrained(model.language_model, str(folder))
            merged: Any = adapted.merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: the adapter does not fit {base} ({str(error).splitlines()[0]})") from error
    model.language_model = merged
    load_projector(model.projector, folder / _PROJECTOR)
    spec = read_spec(folder)
    if spec is not None:
        _describe_as(loaded, spec, read_spec(Path(base)) or read_spec(Path(base) / "model"))
    return loaded


def _describe_as(loaded: Loaded, spec: FolderSpec, base: FolderSpec | None) -> None:
    """Give the model what its adapter folder says of template and pictures, instead of what its `base` says."""
    if base is not None and base.template != loaded.spec.template:  # the caller asked for a template: that one stays
        spec = spec.model_copy(update={"template": loaded.spec.template})
    stored = {"stored_as": loaded.spec.stored_as, "stored_because": loaded.spec.stored_because}
    loaded.spec = spec.model_copy(update=stored)
    model = loaded.model
    model.config.layout = spec.joined["layout"]
    model.layout = ImageLayout.model_validate(spec.joined["layout"])
    loaded.tokenizer.chat_template = spec.chat_template()
    model.language_model.generation_config = generation_config(
        model.language_model, loaded.tokenizer, spec.template, model.config.image_token_id
    )
