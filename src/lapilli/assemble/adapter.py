"""Adapter folders: what a LoRA run trained, without the model it was trained on.

They hold PEFT's own adapter files, the projector (which trains beside the adapters in full), the place of the base
model, and a `lapilli.json` of their own: a run may teach another template or image mode than its base has. With the
tokenizer beside it, data can be looked at as the adapter learned it without its base.
"""

import json
import logging
import os
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from lapilli.assemble.fingerprint import fingerprint
from lapilli.assemble.folder import FolderSpec, joined_fields, write_spec
from lapilli.base.atomic import atomic_folder
from lapilli.base.errors import ModelError
from lapilli.checkpoint.tensors import read_json
from lapilli.model.adapter import adapters_of
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel

log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
PROJECTOR = "projector.safetensors"
BASE = "base.json"
_NEAR = 3
"""Steps up from an adapter to a folder that moves together with it: `run/model` to `../../runs/other`."""


def save_adapter(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: FolderSpec,
    base: Path,
    folder: Path,
    trained_over: str | None = None,
) -> None:
    """Write the adapters of `model.language_model`, the projector and the tokenizer.

    `spec` describes the model with its adapters; `base` is the folder that they were trained on, with its weights held
    as `trained_over` if not as they are stored there.
    """
    wrapper = adapters_of(model)
    if wrapper is None:
        raise ModelError("the model has no adapters to save")
    with quiet(), atomic_folder(folder) as draft:
        wrapper.save_pretrained(str(draft), save_embedding_layers=False)
        (draft / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
        tensors = {f"projector.{k}": v.detach().cpu().contiguous() for k, v in model.projector.state_dict().items()}
        save_file(tensors, draft / PROJECTOR)
        tokenizer.chat_template = spec.chat_template()
        tokenizer.save_pretrained(draft)
        write_spec(draft, spec.model_copy(update={"joined": joined_fields(model.config)}))
        note = _base_note(folder, base) | ({"trained_over": trained_over} if trained_over else {})
        (draft / BASE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _base_note(folder: Path, base: Path) -> dict[str, str]:
    """Where the base lies and what it holds: by a relative path where the two lie beside each other.

    A base that has gone meanwhile must not cost a run its result: it is named without its hash, which is said.
    """
    base = base.resolve()
    relative = Path(os.path.relpath(base, folder.resolve()))
    near = relative.parts.count("..") <= _NEAR
    note = {"base": relative.as_posix() if near else str(base)}
    try:
        return note | {"sha256": fingerprint(base)}
    except ModelError as error:
        log.warning("%s: the adapter's base can't be hashed, so a wrong one won't be told (%s)", folder, error)
        return note


def base_of(folder: Path) -> Path | None:
    """The model that an adapter folder says it was trained on; None if it does not say."""
    base = _note(folder).get("base")
    return None if base is None else folder / base


def hash_of_base(folder: Path) -> str | None:
    """The `fingerprint` of the model that an adapter was trained on; None if its folder is older than that."""
    return _note(folder).get("sha256")


def _note(folder: Path) -> dict[str, str]:
    file = folder / BASE
    note = read_json(file) if file.is_file() else {}
    if not all(isinstance(note.get(key, ""), str) for key in ("base", "sha256")):
        raise ModelError(f"{file}: base and sha256 must be text; write the base's folder there, or name it as the base")
    return note
