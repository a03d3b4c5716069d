"""One door to every model format: a folder is opened, then converted, verified or made into a model.

What a folder holds is decided by what is in it, never by its name. Opening reads headers and descriptions only and
checks all of them, so that whatever is wrong is said before hours of work.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lapilli.assemble.adapter import ADAPTER_FILE, BASE, PROJECTOR
from lapilli.assemble.folder import FILE as SPEC_FILE
from lapilli.assemble.folder import read_spec
from lapilli.assemble.opening import pieces
from lapilli.assemble.opening.adapter import open_adapter, open_peft
from lapilli.assemble.opening.cerebras import open_cerebras_model
from lapilli.assemble.opening.hf import open_hf
from lapilli.assemble.opening.llava import open_llava
from lapilli.assemble.opening.model import Format, OpenModel
from lapilli.assemble.opening.parts import Names, empty_model
from lapilli.assemble.opening.quantised import refuse_quantised
from lapilli.base.errors import ModelError
from lapilli.checkpoint import llava, names
from lapilli.checkpoint.cerebras import is_cerebras
from lapilli.checkpoint.stream import Lazy, Tensors
from lapilli.checkpoint.tensors import read_json, some, weight_file
from lapilli.model.projector import build_projector
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel, register


def model_folder(path: Path | str) -> Path:
    """Return the folder that holds the model: the path itself, or the `model/` of a run folder.

    Of Cerebras' models the path may be the state file.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such folder; a model folder is made by `lapilli build` or by a finished run")
    inner = path / "model"
    holds = any((path / name).is_file() for name in ("config.json", ADAPTER_FILE))
    if not holds and inner.is_dir():
        return inner
    if not holds and not is_cerebras(path):
        raise ModelError(
            f"{path}: neither a model folder (no config.json) nor a run folder with a finished model/ in it"
        )
    return path


def recognise(folder: Path) -> Format:
    """What kind of model folder this is. Raises ModelError for descriptions that can't be read.

    Folders of another kind of model are `hf` here; opening them says what they are.
    """
    described = any((folder / name).is_file() for name in ("config.json", ADAPTER_FILE))
    if not described and is_cerebras(folder):
        return "cerebras"
    fields = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    theirs = llava.is_llava(fields)  # with lapilli.json beside it, where a conversion wrote it
    if (folder / ADAPTER_FILE).is_file():
        if theirs:
            return "llava-lora"
        ours = (SPEC_FILE, PROJECTOR, BASE)
        return "lapilli-adapter" if any((folder / name).is_file() for name in ours) else "hf-lora"
    if theirs:
        alone = weight_file(folder) is None and any((folder / name).is_file() for name in pieces.PROJECTOR)
        return "llava-projector" if alone else "llava"
    return "lapilli" if fields.get("model_type") == "lapilli" else "hf"


def open_model(
    path: Path | str,
    base: Path | str | None = None,
    *,
    template: str | None = None,
    merged_as: torch.dtype | None = None,
) -> OpenModel:
    """Open a model folder of any format; folders that are pieces of a model need the `base` they belong to.

    `template` names the conversation template, for folders that don't say theirs, or in place of it. Weights that
    adapters change come as their base is stored, or as `merged_as`. Nothing but headers is read. Raises ModelError
    for a folder that is no model, for what is missing in it, and for tensors that don't fit its configuration.
    """
    register()
    folder = model_folder(path)
    kind = recognise(folder)
    refuse_quantised(folder)
    if base is not None and "-" not in kind and kind != "cerebras":
        raise ModelError(f"{folder}: a whole model, which takes no base; leave the base out")
    with quiet():
        opened = _open(folder, kind, base, template, merged_as)
        check(opened)
    return opened


def _open(
    folder: Path, kind: Format, base: Path | str | None, template: str | None, dtype: torch.dtype | None
) -> OpenModel:
    def open_base(path: Path) -> OpenModel:
        return open_model(path, template=template, merged_as=dtype)

    match kind:
        case "llava":
            return open_llava(folder, template)
        case "llava-lora":
            return pieces.open_lora(folder, base, template, dtype)
        case "llava-projector":
            return pieces.open_projector_only(folder, base, template)
        case "lapilli-adapter":
            return open_adapter(folder, base, template, open_base, dtype)
        case "hf-lora":
            return open_peft(folder, base, open_base, dtype)
        case "cerebras":
            return open_cerebras_model(folder, base, template)
        case _:
            return open_hf(folder, read_spec(folder), template)


def check(opened: OpenModel) -> None:
    """Raise ModelError, naming file and tensor, unless the tensors fill the configuration's model exactly."""
    config = opened.config
    table: Any = None
    for prefix, auto, part_config in (
        (names.LANGUAGE, AutoModelForCausalLM, config.text_config),
        (names.VISION, AutoModel, config.vision_config),
    ):
        empty = empty_model(auto, part_config, opened.folder)
        places = Names(empty)
        _fill(opened, prefix, part_config.model_type, places.place, places, places.needed)
        table = table if prefix == names.VISION else empty.get_input_embeddings()
    width = table.weight.shape[1]
    with torch.device("meta"):
        projector = build_projector(config.projector, config.vision_hidden_size, width)
    shapes = projector.state_dict()
    _fill(
        opened, names.PROJECTOR, "projector", lambda name: name if name in shapes else None, None, set(shapes), shapes
    )
    if config.image_newline:
        newline = opened.tensors.get(names.NEWLINE)
        if newline is None or newline.shape != (width,):
            raise ModelError(f"{opened.folder}: image mode anyres needs an image_newline of {width} values")


def _fill(
    opened: OpenModel,
    prefix: str,
    what: str,
    place_of: Callable[[str], str | None],
    places: Names | None,
    needed: set[str],
    shapes: Any = None,
) -> None:
    tensors = opened.part(prefix)
    found = {name: place_of(name) for name in tensors}
    extra = sorted(name for name, place in found.items() if place is None)
    if extra:
        where = tensors[extra[0]].where.rpartition(": ")[0]
        raise ModelError(f"{where}: {len(extra)} tensors have no place in the {what}: {some(extra)}")
    missing = sorted(needed - set(found.values()))
    if missing:
        place = opened.places.get(prefix.removesuffix("."), opened.folder)
        raise ModelError(f"{place}: {len(missing)} tensors of the {what} are missing: {some(missing)}")
    shapes = places.places if places is not None else shapes
    for name, place in found.items():
        if places is not None and places.reshaped(name):
            continue
        wanted = tuple(shapes[place].shape)
        if tensors[name].shape != wanted:
            raise ModelError(
                f"{tensors[name].where}: {what}: {name} has shape {tensors[name].shape}, config.json asks for {wanted}"
            )


# ---- from an open folder to a model -----------------------------------------------------------------------------


class _Slice:
    """A tensor as transformers takes them from safetensors files: read when it is indexed."""

    def __init__(self, tensor: Lazy) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor.read()[index]

    def is_floating_point(self) -> bool:
        return self._tensor.dtype.is_floating_point


def materialise(
    opened: OpenModel, dtype: torch.dtype, language_dtype: torch.dtype | None = None
) -> VisionLanguageModel:
    """Read every tensor and make the model, in `dtype`, ready to answer. Raises ModelError for unreadable files.

    `language_dtype` is the language model's, if it is another one.
    """
    language = read_part(opened, names.LANGUAGE, language_dtype or dtype)
    return join(opened, read_part(opened, names.VISION, dtype), language, dtype)


def join(opened: OpenModel, vision: PreTrainedModel, language: Any, dtype: torch.dtype) -> VisionLanguageModel:
    """Join an encoder and a language model that are made already with the rest of an opened model, in `dtype`."""
    config = copy.deepcopy(opened.config)
    language.generation_config = copy.deepcopy(opened.generation_config)
    config.vision_config, config.text_config, config.dtype = vision.config, language.config, dtype
    with torch.device("meta"):
        model = VisionLanguageModel(config, vision, language)
    projector = {name: tensor.read().to(dtype) for name, tensor in opened.part(names.PROJECTOR).items()}
    model.projector.load_state_dict(projector, assign=True)
    if config.image_newline:
        model.image_newline = torch.nn.Parameter(opened.tensors[names.NEWLINE].read().to(dtype))
    return model.eval()


def read_part(opened: OpenModel, prefix: str, dtype: torch.dtype) -> PreTrainedModel:
    """Read the language model (`names.LANGUAGE`) or the vision encoder (`names.VISION`) of an opened model."""
    both = {
        names.LANGUAGE: (AutoModelForCausalLM, opened.config.text_config),
        names.VISION: (AutoModel, opened.config.vision_config),
    }
    auto, own = both[prefix]
    config: PreTrainedConfig = copy.deepcopy(own)
    empty = empty_model(auto, config, opened.folder)
    tensors: Tensors = opened.part(prefix)
    level = Names(empty).prefix
    state: Any = {level + name: _Slice(tensor) for name, tensor in tensors.items()}
    try:
        model, info = type(empty).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{opened.folder}: weights can't be read ({str(error).splitlines()[0]})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{opened.folder}: {len(missing)} weights are missing: {some(missing)}")
    return model.eval()
