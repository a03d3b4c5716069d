"""A LLaVA model written as Cerebras' tools take it: a state file or plain tensors with configuration, or their tree.

Each folder is whole: tokenizer, encoder settings and LLaVA's config.json lie in the same sub-folders in all forms, so
that nothing has to be copied or renamed, and what their configuration has no place for comes back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lapilli.base.errors import ModelError, unknown
from lapilli.base.progress import Progress
from lapilli.checkpoint.cerebras import names as cs
from lapilli.checkpoint.cerebras.config_to import clip_vision_fields, to_cerebras_config, version_of
from lapilli.checkpoint.cerebras.places import IMAGE, TEXT
from lapilli.checkpoint.cerebras.shapes import check, head_width, shapes_of, without_tied
from lapilli.checkpoint.cerebras.state_write import write_state_file
from lapilli.checkpoint.stream import Lazy, Tensors, Written, check_space, copy_files, total_bytes, write_folder

Form = Literal["mdl", "tensors", "tree"]
FORMS: tuple[Form, ...] = ("mdl", "tensors", "tree")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_SPARE_BYTES = 2**20
"""Room for the small files."""
_TABLES_BYTES = 8192
"""Room for what a state file says of one tensor."""

Place = tuple[str, str]
"""Sub-folder (empty: the folder itself) and name of a tensor there."""


@dataclass
class WrittenCerebras:
    """What was written: where each canonical tensor went, which file holds it, and what there is to say."""

    places: dict[str, list[Place]]
    written: dict[Place, Written]
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def write_cerebras(
    source: tuple[Mapping[str, Any], Mapping[str, Any], Tensors] | tuple[Any, ...],
    folder: Path,
    version: str,
    *,
    model: str = "mmsimple-llava",
    form: Form = "mdl",
    tokenizer: Path | None = None,
    token_ids: Mapping[str, int | None] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
    hashes: bool = False,
    progress: Progress | None = None,
) -> WrittenCerebras:
    """Write a model into a folder that is empty, or new.

    `source` begins with LLaVA's fields, CLIP's fields and canonical tensors. `version` is a release (`cs-2.9`, `2.4`,
    `current`). `tokenizer` is a folder whose tokenizer files are copied, `token_ids` are its bos, eos and pad,
    `preprocessor` is the encoder's preprocessor_config.json (None: CLIP's own). One tensor at a time is in memory;
    `progress` advances by bytes. Raises ModelError, before anything is written, for settings and tensors that their
    models can't hold, and RunError if the disk has too little room.
    """
    if form not in FORMS:
        raise ModelError(unknown("form", form, FORMS))
    kind = cs.model_name(model)
    release = version_of(version, kind)
    llava, clip, tensors = dict(source[0]), dict(source[1]), dict(source[2])
    config = to_cerebras_config(llava, clip, release.text, kind)
    tensors, notes = without_tied(tensors, llava)
    check(tensors, shapes_of(llava, clip), "the model to write")
    notes += [release.note] if release.note and form != "tree" else []
    notes += _warned(llava)
    check_space(folder, total_bytes(tensors.values()) + _SPARE_BYTES + _TABLES_BYTES * len(tensors))

    folder.mkdir(parents=True, exist_ok=True)
    done = WrittenCerebras({}, {}, config, notes)
    if form == "tree":
        _write_tree(folder, tensors, done, shard_bytes, hashes, progress)
    else:
        theirs = _theirs(tensors, kind, head_width(llava), done)
        _write_stored(folder, theirs, form, release.text, llava, done, shard_bytes, hashes, progress)
        (folder / f"config_to_cs-{release.text}.yaml").write_text(_yaml(config), encoding="utf-8")
    llava |= {key: value for key, value in (token_ids or {}).items() if value is not None}
    _write_beside(folder, llava, clip, tokenizer, preprocessor)
    return done


def _warned(llava: Mapping[str, Any]) -> list[str]:
    """What their configurations have no place for, though it counts when pictures are prepared."""
    mode = llava.get("image_aspect_ratio") or "square"
    if mode == "pad":
        return []
    return [f"image_aspect_ratio {mode}: their models say nothing of it; leave expand_to_square out of `transforms`"]


# ---- weights ----------------------------------------------------------------------------------------------------


def _theirs(tensors: Tensors, model: cs.Model, width: int, done: WrittenCerebras) -> dict[str, Lazy]:
    made: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        targets = cs.to_theirs(name, model)
        if not targets:
            raise ModelError(f"{tensor.where}: {name} has no place in a {model} model")
        done.places[name] = [("", target) for target in targets]
        for target in targets:
            made[target] = _turned(name, tensor, width) if cs.is_reordered(name) else tensor
    return made


def _turned(name: str, tensor: Lazy, width: int) -> Lazy:
    return tensor.then(lambda value: cs.reordered(name, value, width, theirs=True))


def _write_stored(
    folder: Path,
    theirs: Mapping[str, Lazy],
    form: Form,
    release: str,
    llava: Mapping[str, Any],
    done: WrittenCerebras,
    shard_bytes: int,
    hashes: bool,
    progress: Progress | None,
) -> None:
    if form == "tensors":
        made = write_folder(folder, theirs, shard_bytes=shard_bytes, hashes=hashes, progress=progress)
        done.written |= {("", name): written for name, written in made.items()}
        return
    file = folder / f"pytorch_model_to_cs-{release}.mdl"
    tied = {cs.OUTPUT: cs.EMBEDDING} if llava.get("tie_word_embeddings") else {}
    for name, digest in write_state_file(file, theirs, release, tied=tied, hashes=hashes, progress=progress):
        done.written["", name] = Written(file.name, digest)


def _write_tree(
    folder: Path, tensors: Tensors, done: WrittenCerebras, shard_bytes: int, hashes: bool, progress: Progress | None
) -> None:
    """Both folders with an index, because their converter doesn't find a single file of safetensors."""
    parts: dict[str, dict[str, Lazy]] = {IMAGE: {}, TEXT: {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        place = {
            "vision": (IMAGE, f"vision_model.{rest}"),
            "projector": (TEXT, f"model.mm_projector.{rest}"),
            "language": (TEXT, rest),
        }[part]
        parts[place[0]][place[1]] = tensor
        done.places[name] = [place]
    for inner, part in parts.items():
        (folder / inner).mkdir(exist_ok=True)
        made = write_folder(folder / inner, part, shard_bytes=shard_bytes, hashes=hashes, progress=progress)
        done.written |= {(inner, name): written for name, written in made.items()}
        index = folder / inner / "model.safetensors.index.json"
        if not index.exists():
            files = {name: written.file for name, written in sorted(made.items())}
            _write_json(index, {"metadata": {"total_size": total_bytes(part.values())}, "weight_map": files})


# ---- what lies beside them --------------------------------------------------------------------------------------


def _write_beside(
    folder: Path,
    llava: dict[str, Any],
    clip: Mapping[str, Any],
    tokenizer: Path | None,
    preprocessor: Mapping[str, Any] | None,
) -> None:
    for inner in (TEXT, IMAGE):
        (folder / inner).mkdir(exist_ok=True)
    if tokenizer is not None:
        copy_files(TOKENIZER_FILES, tokenizer, folder / TEXT)
    flat = {key: value for key, value in clip.items() if key not in ("vision_config", "text_config")}
    vision = flat | clip_vision_fields(clip) | {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    _write_json(folder / IMAGE / "preprocessor_config.json", preprocessor or _preprocessor(vision["image_size"]))
    _write_json(folder / IMAGE / "config.json", vision)
    _write_json(folder / TEXT / "config.json", llava | {"mm_vision_tower": f"../{IMAGE}"})


def _preprocessor(side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "do_convert_rgb": True,
    }


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), default_flow_style=False, indent=4)


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(fields), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
