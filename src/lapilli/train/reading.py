"""How a stage reads its data: template, image settings and index, all found out before any weight is loaded.

A run of two stages checks the data of both before the first one starts, so what is needed here is a folder's
description and tokenizer, not its model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from lapilli.assemble.folder import FolderSpec, read_spec
from lapilli.assemble.load import load, model_folder
from lapilli.base.errors import RecipeError, RunError
from lapilli.base.layout import ImageLayout, ImageMode
from lapilli.data.cache import index_root
from lapilli.data.check import index
from lapilli.data.corpus import Corpus
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, ImageSpec
from lapilli.data.template import Template, get_template
from lapilli.data.tokenizer import load_tokenizer
from lapilli.recipe.schema import Source, Stage


@dataclass(frozen=True)
class Reading:
    """A model folder's description as this stage trains with it, and as its export will have it."""

    spec: FolderSpec
    """With the stage's template and image mode."""
    exported: FolderSpec
    """The same, except that a template without turns does not replace one to chat in."""
    tokenizer: PreTrainedTokenizerBase

    @property
    def layout(self) -> ImageLayout:
        return ImageLayout.model_validate(self.spec.joined["layout"])

    def encoders(self, stage: Stage, sources: Sequence[Source]) -> list[Encoder]:
        """One Encoder for each source, with its own template where it names one. Raises RecipeError."""
        return [self.encoder(stage, source.template) for source in sources]

    def encoder(self, stage: Stage, template: str | None = None) -> Encoder:
        """An Encoder as the stage reads its data; `template` names another template than the stage's."""
        return Encoder(
            self.tokenizer,
            self.spec.template if template is None else _named(template, self.tokenizer, "template of a data source"),
            self.layout,
            self.spec.image_token,
            max_length=stage.data.max_length,
            too_long=stage.data.too_long,
            im_start_end=self.spec.im_start_end,
        )


def read_description(path: str) -> tuple[FolderSpec, PreTrainedTokenizerBase]:
    """Return what a model folder, or a run folder with a model, says of itself; its weights are read only if they must.

    Raises ModelError for a folder that is no model.
    """
    folder = model_folder(Path(path))
    spec = read_spec(folder)
    if spec is None:
        loaded = load(folder)
        return loaded.spec, loaded.tokenizer
    return spec, load_tokenizer(folder)


def reading(stage: Stage, spec: FolderSpec, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """Lay the stage's template and image mode over what the model folder says.

    Raises RecipeError for an unknown template and RunError for a model that sees pictures in tiles.
    """
    layout = ImageLayout.model_validate(spec.joined["layout"])
    if layout.mode == "anyres":
        raise RunError(
            f"{stage.model}: its pictures are seen in tiles (image mode anyres); training with tiles comes later. "
            "Build the model with --image-mode pad or square to train it"
        )
    mode = stage.data.image_mode or layout.mode
    spec = spec.model_copy(
        update={
            "image": _image_spec(spec.image, mode, stage.data.image_backend),
            "joined": {**spec.joined, "layout": layout.model_copy(update={"mode": mode}).model_dump(mode="json")},
        }
    )
    exported = spec
    if stage.data.template is not None:
        template = _named(stage.data.template, tokenizer, "data.template")
        spec = spec.model_copy(update={"template": template})
        exported = exported if template.user_text == "drop" else spec
    return Reading(spec, exported, tokenizer)


def _image_spec(image: ImageSpec, mode: ImageMode, backend: str | None) -> ImageSpec:
    """The folder's image settings with the stage's mode and backend. Raises ModelError if they exclude each other."""
    return ImageSpec.model_validate({**image.model_dump(), "mode": mode, "backend": backend or image.backend})


def _named(name: str, tokenizer: PreTrainedTokenizerBase, where: str) -> Template:
    try:
        return get_template(name).bind(tokenizer)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def read_corpus(
    sources: Sequence[Source], stage: Stage, how: Reading, write_index: bool, stream: TextIO | None = None
) -> Corpus:
    """Index and check the sources as the stage reads them. Raises BadData with every problem of every record.

    An index that is kept already is opened; one that is made is kept only with `write_index`.
    """
    return index(
        sources,
        how.encoders(stage, sources),
        how.spec.image,
        placement=stage.data.placement,
        limits=limits(stage),
        cache=index_root(stage.data.index),
        keep=write_index,
        workers=stage.data.workers,
        max_bad_ratio=stage.data.max_bad_ratio if stage.data.bad_records == "quarantine" else 0.0,
        stream=stream,
    )


def limits(stage: Stage) -> ImageLimits:
    return ImageLimits(stage.data.max_image_pixels, stage.data.max_image_bytes)
