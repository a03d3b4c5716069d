"""Model folders and pieces of models, described by their own files.

Every description ends with what is missing: a folder that does not load is the one that people inspect.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lapilli.assemble.folder import FolderSpec, read_spec
from lapilli.assemble.inspection import parts as seen
from lapilli.assemble.inspection.parts import Part
from lapilli.assemble.inspection.report import Inspection, Missing
from lapilli.base.errors import LapilliError, ModelError
from lapilli.base.layout import ImageLayout
from lapilli.checkpoint import llava, open_clip
from lapilli.checkpoint.stream import Tensors, open_file, open_folder
from lapilli.checkpoint.tensors import read_json, weight_file

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE_LORA = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
_PROJECTOR_ALONE = ("mm_projector.bin", "mm_projector.safetensors")
_OURS = ("lapilli.json", "projector.safetensors", "base.json")
_JOINED = ("llava", "llava_next")
_NORM = "model.norm.weight"
_DELTA_NORM = 0.1
"""A model's last norm is about one everywhere; what a delta adds to it is about nothing."""


def look(path: Path) -> Inspection | None:
    """Describe a folder with a config.json or with adapters; None for any other."""
    adapter = (path / _ADAPTER).is_file()
    fields = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if adapter:
        return _adapter(path, fields)
    if not fields:
        return None
    if llava.is_llava(fields):
        return _llava(path, fields)
    if fields.get("model_type") in (*_JOINED, "lapilli") and ("text_config" in fields or "vision_config" in fields):
        return _joined(path, fields)
    return _alone(path, fields)


def loose(path: Path) -> Inspection | None:
    """Describe a folder without a configuration: weights alone, or a tokenizer."""
    weights = weight_file(path) or next((path / name for name in _PROJECTOR_ALONE if (path / name).is_file()), None)
    if weights is not None:
        tensors = open_file(weights)
        made = Inspection(str(path), "weights", f"weights without a description ({weights.name})")
        made.parts = list(seen.count(tensors).values())
        made.missing.append(Missing("config.json", "copy it from where the weights come from"))
        return made
    if any((path / name).is_file() for name in _TOKENIZER):
        return Inspection(str(path), "tokenizer", "a tokenizer alone")
    return None


# ---- LLaVA's layout ---------------------------------------------------------------------------------------------


def _llava(path: Path, fields: dict[str, Any]) -> Inspection:
    made = Inspection(str(path), "llava", "a model in LLaVA's layout")
    alone = next((path / name for name in _PROJECTOR_ALONE if (path / name).is_file()), None)
    if weight_file(path) is None and alone is not None:
        made.format, made.what = "llava-projector", "a projector with LLaVA's settings, which belongs over its base"
        tensors = open_file(alone)
        _need_base(made, path, fields.get("_name_or_path"))
    else:
        tensors = _tensors(path, made)
    if _is_delta(tensors):
        made.format, made.what = "llava-delta", "delta weights: what a model in LLaVA's layout adds to its base"
        made.missing.append(Missing("its base", "join the two: lapilli delta apply"))
    parts = seen.count(tensors)
    made.parts = list(parts.values())
    if (
        made.format == "llava"
        and tensors
        and "projector" not in parts
        and fields.get("mm_projector_type") != "identity"
    ):
        made.missing.append(Missing("projector", "attach one with `lapilli projector attach`, or build and train it"))
    clip = {} if made.format == "llava-delta" else _tower(made, path, fields, "vision encoder" in parts)
    say_llava(made, fields, clip)
    made.template = (
        _template(path) or "not said in this layout; vicuna_v1 is taken (LLaVA-1.5's; --template names another)"
    )
    if made.format == "llava":
        _need_tokenizer(made, path)
    _say_conversion(made, path)
    return made


def _is_delta(tensors: Tensors) -> bool:
    """Whether the last norm, a few thousand numbers, is not one but what is added to one."""
    return _NORM in tensors and float(tensors[_NORM].read().float().abs().mean()) < _DELTA_NORM


def _tower(made: Inspection, path: Path, fields: Mapping[str, Any], inside: bool) -> dict[str, Any]:
    """Find the encoder that config.json names; return its configuration, if it is here."""
    tower = fields.get("mm_vision_tower") or fields.get("vision_tower")
    if tower is None:
        made.missing.append(
            Missing("mm_vision_tower", "config.json names no vision encoder: write its folder or Hub name there")
        )
        return {}
    place = path / str(tower)
    if place.is_dir():
        encoder = encoder_at(place, made, weights=not inside)
        if not inside:
            made.parts = [encoder, *made.parts]
        return _vision_fields(place)
    if str(tower).startswith((".", "/", "~")) or str(tower).count("/") > 1:
        said = f"mm_vision_tower is {tower}, no folder here: write where it lies, or its Hub name, into config.json"
        made.missing.append(Missing("vision encoder", said))
    else:
        made.details["vision encoder"] = f"{tower} (a name on the Hugging Face Hub)"
    return {}


def say_llava(made: Inspection, fields: Mapping[str, Any], clip: Mapping[str, Any]) -> None:
    """What LLaVA's settings, and those of its encoder where they are known, say of parts and pictures."""
    words = {
        "language model": seen.language_sizes(fields),
        "projector": str(fields.get("mm_projector_type", "linear")),
        "vision encoder": seen.vision_sizes(clip) if clip else "",
    }
    for part in made.parts:
        part.what = words.get(part.name, "") or part.what
    mode, merge = fields.get("image_aspect_ratio") or "square", fields.get("mm_patch_merge_type")
    select = fields.get("mm_vision_select_feature", "patch")
    made.image = f"{mode}, layer {fields.get('mm_vision_select_layer', '?')}, {select}" + (
        f", {merge}" if merge else ""
    )
    if fields.get("mm_use_im_start_end"):
        made.details["image marks"] = "<im_start> and <im_end> around each picture"
    clip = clip.get("vision_config") or clip
    if not isinstance(clip.get("image_size"), int) or not isinstance(clip.get("patch_size"), int):
        return
    edge, side = clip["image_size"], clip["image_size"] // clip["patch_size"]
    made.tokens_per_image = _layout_words(
        made,
        mode=mode,
        tile_height=edge,
        tile_width=edge,
        grid_height=side,
        grid_width=side,
        extra_tokens=int(select == "cls_patch"),
        pinpoints=_pinpoints(fields.get("image_grid_pinpoints")) if mode == "anyres" else (),
    )


def _pinpoints(value: Any) -> Any:
    """Canvas sizes, which some releases write as text."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value or ()
    except (ValueError, SyntaxError):
        return ()


def _layout_words(made: Inspection, **fields: Any) -> str:
    try:
        return seen.tokens_per_image(ImageLayout(**fields))
    except (LapilliError, ValueError) as error:
        made.notes.append(f"tokens per image can't be told ({' '.join(str(error).split())})")
        return ""


# ---- transformers' layout, and ours -----------------------------------------------------------------------------


def _joined(path: Path, fields: dict[str, Any]) -> Inspection:
    own = fields["model_type"] == "lapilli"
    made = Inspection(
        str(path),
        "lapilli" if own else "hf",
        "a model in lapilli's own layout" if own else f"a model in transformers' own layout ({fields['model_type']})",
    )
    parts = seen.count(_tensors(path, made))
    made.parts = list(parts.values())
    spec = _spec(path, made)
    if "language model" in parts:
        parts["language model"].what = seen.language_sizes(fields.get("text_config") or {})
    if "vision encoder" in parts:
        parts["vision encoder"].what = seen.vision_sizes(fields.get("vision_config") or {})
    if "projector" in parts:
        parts["projector"].what = str(spec.joined["projector"]) if spec else "mlp2x_gelu"
    made.template = _template(path)
    if spec is not None:
        made.image = _spec_words(spec)
        made.tokens_per_image = _layout_words(made, **spec.joined["layout"])
    else:
        _say_without_spec(made, path, fields, own)
    _need_tokenizer(made, path)
    _say_conversion(made, path)
    return made


def _say_without_spec(made: Inspection, path: Path, fields: Mapping[str, Any], own: bool) -> None:
    if own:
        made.missing.append(Missing("lapilli.json", "copy it from where the folder was made"))
    if not made.template:
        made.missing.append(Missing("chat template", "name the conversation template when you use it: --template"))
    made.image = _processor(path)
    if not made.image:
        made.missing.append(
            Missing("preprocessor_config.json", "copy the image processor from where the folder was made")
        )
    if fields.get("image_seq_length"):
        made.tokens_per_image = str(fields["image_seq_length"])


def _spec(path: Path, made: Inspection) -> FolderSpec | None:
    try:
        return read_spec(path, foreign=True)
    except ModelError as error:
        made.missing.append(Missing("lapilli.json", str(error)))
        return None


def _spec_words(spec: FolderSpec) -> str:
    height, width = spec.image.tile_size
    layers = ", ".join(map(str, spec.joined["feature_layers"]))
    return (
        f"{spec.image.mode} to {width}x{height}, layer {layers}, {spec.joined['feature_select']}, {spec.image.backend}"
    )


def _template(path: Path) -> str:
    """The template that a folder says its model was trained with; empty if it doesn't."""
    try:
        spec = read_spec(path, foreign=True)
    except ModelError:
        spec = None
    if spec is not None:
        return spec.template.name
    config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    there = any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    return "the tokenizer's chat template" if there or config.get("chat_template") else ""


# ---- pieces -----------------------------------------------------------------------------------------------------


def _adapter(path: Path, fields: dict[str, Any]) -> Inspection:
    about = read_json(path / _ADAPTER)
    theirs = bool(fields) and llava.is_llava(fields)
    ours = any((path / name).is_file() for name in _OURS)
    made = Inspection(str(path), "peft-adapter", "adapters of a language model (PEFT)")
    if theirs:
        made.format, made.what = "llava-lora", "adapters of a LoRA run in LLaVA's layout"
    elif ours:
        made.format, made.what = "lapilli-adapter", "adapters of a lapilli run, with their projector"
    beside = _BESIDE_LORA if theirs else ("projector.safetensors",) if ours else ()
    tensors: Tensors = {}
    for names, what in ((_ADAPTER_WEIGHTS, "adapters"), (beside, "projector that trained beside the adapters")):
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is not None:
            tensors |= open_file(file)
        elif names:
            made.missing.append(
                Missing(f"{' or '.join(names)} ({what})", "copy it from where the run wrote this folder")
            )
    made.parts = list(seen.count(tensors).values())
    rank, alpha = about.get("r"), about.get("lora_alpha")
    targets = about.get("target_modules")
    made.details["adapters"] = f"{about.get('peft_type', '?')}, rank {rank}, alpha {alpha}"
    made.details["on"] = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
    recorded = read_json(path / "base.json").get("base") if (path / "base.json").is_file() else None
    _need_base(made, path, recorded or about.get("base_model_name_or_path"))
    if theirs:
        say_llava(made, fields, {})
    spec = _spec(path, made)
    if spec is not None:
        made.image, made.tokens_per_image = _spec_words(spec), _layout_words(made, **spec.joined["layout"])
    made.template = _template(path)
    return made


def _alone(path: Path, fields: dict[str, Any]) -> Inspection:
    """One part by itself: an encoder or a language model."""
    kind = str(fields.get("model_type", "?"))
    vision = isinstance(fields.get("vision_config") or fields, dict) and bool(
        (fields.get("vision_config") or fields).get("patch_size")
    )
    if vision:
        made = Inspection(str(path), "vision-encoder", f"a vision encoder ({kind})")
        made.parts = [encoder_at(path, made)]
        made.image = _processor(path)
        made.details["use"] = "lapilli build --vision-encoder"
        if not made.image:
            said = "pictures get CLIP's mean and deviation without it: copy it from where the encoder comes from"
            made.missing.append(Missing("preprocessor_config.json", said))
        return made
    made = Inspection(str(path), "language-model", f"a language model ({kind})")
    tensors = _tensors(path, made)
    part = Part("language model", what=seen.language_sizes(fields))
    for found in seen.count(tensors).values():
        part.add(found)
    made.parts = [part]
    made.template = _template(path)
    made.details["use"] = "lapilli build --language-model"
    _need_tokenizer(made, path)
    return made


def encoder_at(place: Path, made: Inspection, *, weights: bool = True) -> Part:
    """The vision encoder in a folder, of either layout; what is missing there is added to `made`."""
    part = Part("vision encoder", place=str(place))
    try:
        if open_clip.is_open_clip(place):
            part.what = seen.vision_sizes(open_clip.read_open_clip_config(place).to_dict())
            tensors = open_clip.open_encoder(place) if weights else {}
        else:
            part.what = seen.vision_sizes(_vision_fields(place))
            tensors = open_folder(place) if weights else {}
    except ModelError as error:
        made.missing.append(Missing("vision encoder", str(error)))
        return part
    dual = any(name.startswith("text_model.") for name in tensors)
    for name, tensor in tensors.items():
        if not dual or name.startswith("vision_model."):
            part.count(name, tensor)
    return part


def _vision_fields(place: Path) -> dict[str, Any]:
    if open_clip.is_open_clip(place):
        return open_clip.read_open_clip_config(place).to_dict()
    return read_json(place / "config.json") if (place / "config.json").is_file() else {}


# ---- what every folder has --------------------------------------------------------------------------------------


def _tensors(path: Path, made: Inspection) -> Tensors:
    """The folder's tensors; what is wrong with them becomes something missing."""
    try:
        return open_folder(path)
    except ModelError as error:
        made.missing.append(Missing("weights", str(error)))
        return {}


def _need_tokenizer(made: Inspection, path: Path) -> None:
    if not any((path / name).is_file() for name in _TOKENIZER):
        made.missing.append(Missing("tokenizer", "copy tokenizer.json or tokenizer.model of the language model here"))


def _need_base(made: Inspection, path: Path, recorded: Any) -> None:
    made.details["base"] = str(recorded or "not recorded")
    if not isinstance(recorded, str) or not (path / recorded).is_dir():
        made.missing.append(Missing("base", "name the model that it was trained on when you use it: --base"))


def _processor(path: Path) -> str:
    for name in _PROCESSORS:
        if (path / name).is_file():
            fields = read_json(path / name)
            return processor_words(fields.get("image_processor") or fields)
    return ""


def processor_words(fields: Mapping[str, Any]) -> str:
    """An image processor's size and normalisation."""
    size = fields.get("crop_size") if fields.get("do_center_crop") else fields.get("size")
    if isinstance(size, dict):
        size = "x".join(str(value) for value in size.values() if value) or "?"
    said = [f"to {size}"] if size else []
    for words, name in (("mean", "image_mean"), ("deviation", "image_std")):
        if fields.get(name):
            said.append(f"{words} {', '.join(f'{value:.3g}' for value in fields[name])}")
    return ", ".join(said)


def _say_conversion(made: Inspection, path: Path) -> None:
    if not (path / "conversion.json").is_file():
        return
    about = read_json(path / "conversion.json")
    proof = about.get("verification") or {}
    how = proof.get("how", "none")
    ended = "without a proof" if how == "none" else f"proved ({how})" if not proof.get("problems") else "NOT proved"
    made.details["converted"] = f"from {about.get('source')} by {about.get('written_by')}, {ended}"
