"""What a model folder says beside its weights: `lapilli.json`.

transformers' own files can't hold all that training and serving must agree on: the whole template, what happens to a
picture's pixels, where its tokens stand, how sequences may be packed. It stands in one file beside config.json, which
other software ignores. Folders without it are read too; what it would say is then worked out from their own files.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lapilli.base.errors import ModelError
from lapilli.data.image import ImageSpec
from lapilli.data.template import Template
from lapilli.model.config import LapilliConfig

FILE = "lapilli.json"

JOINED = (
    "projector", "feature_layers", "feature_select", "prefix_tokens", "flat_patches", "layout", "image_token_id",
    "image_newline", "image_row", "packing", "head",
)  # fmt: skip
"""Fields of `LapilliConfig` that joining decided and transformers' configuration can't hold."""


class FolderSpec(BaseModel):
    """Contents of `lapilli.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    written_by: str
    stored_as: Literal["transformers", "lapilli", "llava", "cerebras"]
    """Whose class and key names the weights have."""
    stored_because: str = ""
    """Why transformers' class can't hold the model; empty if it can."""
    template: Template
    image: ImageSpec
    image_token: str
    im_start_end: bool = False
    """Pictures stand between the tokens `<im_start>` and `<im_end>`."""
    joined: dict[str, Any]
    trained_rows: int | None = None
    """Rows of the embedding that the language model was trained with; a conversion added those beyond. None: all."""
    settings: dict[str, Any] = {}
    """What the config.json of a converted model said beyond the model itself, for the way back."""

    def chat_template(self) -> str:
        """The template as Jinja, for tokenizers and processors: the same text as in training."""
        template = self.template.with_image_marks() if self.im_start_end else self.template
        return template.jinja(self.image_token)


def joined_fields(config: LapilliConfig) -> dict[str, Any]:
    """The part of a joined model's configuration that goes into `lapilli.json`."""
    return {name: getattr(config, name) for name in JOINED}


def write_spec(folder: Path, spec: FolderSpec) -> None:
    (folder / FILE).write_text(spec.model_dump_json(indent=2, exclude_defaults=False) + "\n", encoding="utf-8")


def read_spec(folder: Path, *, foreign: bool = False) -> FolderSpec | None:
    """Read `lapilli.json`, or return None if the folder has none. Raises ModelError for one that can't be read.

    In LLaVA's and Cerebras' layouts it only adds what those can't say (the template): the folder's own files, which
    others edit too, describe the rest. It is returned with `foreign`.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        spec = FolderSpec.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, ValidationError) as error:
        raise ModelError(
            f"{path}: not a lapilli model description ({error}); build or export the model again"
        ) from error
    return spec if foreign or spec.stored_as in ("transformers", "lapilli") else None
