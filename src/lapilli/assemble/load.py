"""`load`: any model folder to a model, its tokenizer and what its folder says about pictures and text.

What a folder holds is decided by what is in it, never by its name: `lapilli.json` where there is one, else its
config.json. A run folder stands for the model it made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase

from lapilli.assemble.adapter import ADAPTER_FILE, attach_adapter
from lapilli.assemble.folder import FolderSpec, joined_fields, read_spec
from lapilli.assemble.llava import read_llava
from lapilli.base.errors import ModelError
from lapilli.base.layout import ImageLayout
from lapilli.base.version import VERSION
from lapilli.checkpoint import hf, llava
from lapilli.data.encode import Encoder, TooLong
from lapilli.data.image import ImageSpec
from lapilli.data.template import Template, get_template
from lapilli.data.tokenizer import load_tokenizer
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel, register


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


def model_folder(path: Path | str) -> Path:
    """Return the folder that holds the model: the path itself, or the `model/` of a run folder."""
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such folder; a model folder is made by `lapilli build` or by a finished run")
    inner = path / "model"
    holds = any((path / name).is_file() for name in ("config.json", ADAPTER_FILE))
    if not holds and inner.is_dir():
        return inner
    if not holds:
        raise ModelError(
            f"{path}: neither a model folder (no config.json) nor a run folder with a finished model/ in it"
        )
    return path


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
    register()
    folder = model_folder(path)
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    with quiet():
        llava.refuse_pieces(folder)
        if (folder / ADAPTER_FILE).is_file():
            loaded = attach_adapter(folder, lambda p: load(p, dtype=dtype, template=template), base)
        elif base is not None:
            raise ModelError(f"{folder}: a whole model, which takes no base; leave the base out")
        else:
            loaded = _load_whole(folder, dtype, template)
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


def _load_whole(folder: Path, dtype: torch.dtype, template: str | None) -> Loaded:
    spec = read_spec(folder)
    if spec is None and llava.is_llava(llava.read_fields(folder)):
        return Loaded(*read_llava(folder, dtype, template), folder)
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: config.json can't be read ({str(error).splitlines()[0]})") from error
    if config.model_type == "lapilli":
        if spec is None:
            raise ModelError(f"{folder}: lapilli.json is missing; copy it from where the folder was made")
        model = _checked(VisionLanguageModel.from_pretrained(folder, dtype=dtype, output_loading_info=True), folder)
        tokenizer = load_tokenizer(folder)
    elif config.model_type in hf.MODEL_TYPES:
        tokenizer, spec = (load_tokenizer(folder), spec) if spec else _describe(folder, config, template)
        model = hf.load_hf(folder, spec.joined, dtype)
    else:
        raise ModelError(
            f"{folder}: holds a {config.model_type} model, not a joined one; "
            "join a vision encoder and a language model with `lapilli build`"
        )
    if template is not None:
        spec = spec.model_copy(update={"template": get_template(template).bind(tokenizer)})
    return Loaded(model, tokenizer, spec, folder)


def _checked(loaded: Any, folder: Path) -> Any:
    model, info = loaded
    if info["missing_keys"]:
        raise ModelError(f"{folder}: weights are missing, among them {sorted(info['missing_keys'])[0]}")
    return model


def _describe(folder: Path, config: Any, template: str | None) -> tuple[PreTrainedTokenizerBase, FolderSpec]:
    """Work out what a transformers folder without `lapilli.json` would say there, from its processor and tokenizer."""
    try:
        processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its processor can't be read ({str(error).splitlines()[0]})") from error
    tokenizer = processor.tokenizer
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    if template is None and tokenizer.chat_template is None:
        raise ModelError(
            f"{folder}: neither lapilli.json nor a chat template says which conversation template this model was "
            "trained with; name it (vicuna_v1 for LLaVA-1.5)"
        )
    fields = processor.image_processor.to_dict()
    padded = fields.get("do_pad") and config.model_type == "llava"
    mode = "anyres" if config.model_type == "llava_next" else "pad" if padded else "square"
    image = ImageSpec.from_processor_config(fields, mode)
    joined = hf.from_hf_config(config, image.tile_size, mode)
    spec = FolderSpec(
        written_by=f"lapilli {VERSION}",
        stored_as="transformers",
        template=get_template(template or "tokenizer").bind(tokenizer),
        image=image,
        image_token=processor.image_token,
        joined=joined_fields(joined),
    )
    return tokenizer, spec
