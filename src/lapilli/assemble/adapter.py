"""Adapter folders: what a LoRA run trained, without the model it was trained on.

They hold PEFT's own adapter files, the projector (which trains beside the adapters in full), and the place and hash of
the base model.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from safetensors.torch import load_file, save_file

from lapilli.base.atomic import atomic_folder
from lapilli.base.errors import ModelError
from lapilli.model.adapter import adapters_of
from lapilli.model.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from lapilli.assemble.load import Loaded

ADAPTER_FILE = "adapter_config.json"
_PROJECTOR = "projector.safetensors"
_BASE = "base.json"


def save_adapter(model: VisionLanguageModel, base: Path, folder: Path) -> None:
    """Write the adapters of `model.language_model` and the projector; `base` is the folder they were trained on."""
    wrapper = adapters_of(model)
    if wrapper is None:
        raise ModelError("the model has no adapters to save")
    with atomic_folder(folder) as draft:
        wrapper.save_pretrained(str(draft), save_embedding_layers=False)
        tensors = {f"projector.{k}": v.detach().cpu().contiguous() for k, v in model.projector.state_dict().items()}
        save_file(tensors, draft / _PROJECTOR)
        (draft / _BASE).write_text(json.dumps({"base": str(base.resolve())}, indent=2) + "\n", encoding="utf-8")


def attach_adapter(folder: Path, load_base: "Callable[[Path], Loaded]", base: Path | str | None) -> "Loaded":
    """Load the base (the one given, else the one the adapter was trained on), add the adapters and merge them.

    Raises ModelError if no base is found or the adapter doesn't fit it.
    """
    if base is None:
        note = folder / _BASE
        base = json.loads(note.read_text(encoding="utf-8"))["base"] if note.is_file() else None
    if base is None or not Path(base).exists():
        raise ModelError(
            f"{folder}: an adapter; give the model it was trained on as its base ({base or 'not recorded'})"
        )
    loaded = load_base(Path(base))
    model = loaded.model
    try:
        adapted = PeftModel.from_pretrained(model.language_model, str(folder))
        merged: Any = adapted.merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: the adapter does not fit {base} ({str(error).splitlines()[0]})") from error
    model.language_model = merged
    tensors = {k.split("projector.", 1)[1]: v for k, v in load_file(folder / _PROJECTOR).items()}
    model.projector.load_state_dict(tensors)
    return loaded
