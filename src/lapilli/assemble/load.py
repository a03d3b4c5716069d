"""`load`: any model folder to a model, its tokenizer and what its folder says about pictures and text.

What a folder holds is decided by what is in it, never by its name: `lapilli.json` where there is one, else its
config.json. A run folder stands for the model it made.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lapilli.assemble.folder import FolderSpec
from lapilli.assemble.opening.quantised import is_quantised, open_quantised
from lapilli.assemble.source import materialise, model_folder, open_model
from lapilli.base.errors import ModelError
from lapilli.base.layout import ImageLayout
from lapilli.data.encode import Encoder, TooLong
from lapilli.data.image import ImageSpec
from lapilli.data.template import Template
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel


@dataclass
class Loaded:
    """A model and what belongs to it."""

    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase
    spec: FolderSpec
    path: Path

    @property
    def template(self) -> Template:
        return self.spec.template

    @property
    def image_spec(self) -> ImageSpec:
        return self.spec.image

    @property
    def layout(self) -> ImageLayout:
        return self.model.layout

    def encoder(
        self, *, max_length: int | None = None, too_long: TooLong = "error", template: Template | None = None
    ) -> Encoder:
        """An Encoder for this model; `template` replaces the model's own."""
        return Encoder(
            self.tokenizer,
            template or self.spec.template,
            self.layout,
            self.spec.image_token,
            max_length=max_length,
            too_long=too_long,
            im_start_end=self.spec.im_start_end,
        )


def load(
    path: Path | str,
    base: Path | str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    template: str | None = None,
) -> Loaded:
    """Load a model folder, or an adapter folder with its `base`.

    `dtype` is float32 on CPU and bfloat16 elsewhere unless given. `template` names the conversation template for
    folders that don't say theirs. Raises ModelError for a folder that can't be read, and says what is missing.
    """
    folder = model_folder(path)
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    quantised = base is None and is_quantised(folder)
    if quantised:
        opened = open_quantised(folder, template)
    else:
        opened = open_model(folder, base, template=template, merged_as=dtype)
    with quiet():
        model = materialise(opened, dtype)
    loaded = Loaded(model, opened.tokenizer, opened.spec, folder)
    check_room(loaded)
    loaded.model.to(device).eval()  # type: ignore[arg-type]
    return loaded


def check_room(loaded: Loaded) -> None:
    """Raise ModelError unless the language model has an embedding row for the image token."""
    rows = loaded.model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    wanted = loaded.model.config.image_token_id
    if loaded.model.config.image_row and not 0 <= wanted < rows:
        raise ModelError(
            f"{loaded.path}: the language model has no room for the image token: its id is {wanted}, the embedding "
            f"has {rows} rows; build the model again with `lapilli build`, which adds rows"
        )
