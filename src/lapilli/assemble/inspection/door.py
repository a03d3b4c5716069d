"""`inspect`: what a folder or file is, by what is in it.

Names of folders say nothing, and are not looked at. Only descriptions and the headers of weight files are read, so the
answer takes a second whatever the size. What is missing is said with what to do about it; a folder that nobody here
can use is still described as far as it goes.
"""

from __future__ import annotations

from pathlib import Path

from lapilli.assemble.inspection import models
from lapilli.assemble.inspection import parts as seen
from lapilli.assemble.inspection.report import Inspection, Missing
from lapilli.base.atomic import is_complete
from lapilli.base.errors import LapilliError, ModelError
from lapilli.checkpoint import open_clip
from lapilli.checkpoint.stream import Tensors, open_file
from lapilli.checkpoint.tensors import read_json

_TABLES = ("embed_tokens.weight", "embed_in.weight", "wte.weight")
_PROJECTOR_ALONE = ("mm_projector.bin", "mm_projector.safetensors")


def inspect(path: Path | str) -> Inspection:
    """Say what a folder or file is. Raises ModelError if it is nothing that lapilli knows, or can't be read at all."""
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    for look in (_file,) if path.is_file() else (_run, _prepared, _open_clip, _cerebras, models.look, models.loose):
        found = look(path)
        if found is not None:
            return found
    raise ModelError(
        f"{path}: no model, adapter, projector, encoder, run or prepared data that lapilli knows: there is no "
        "config.json, no weight file and no HDF5 shard; for training data use `lapilli data check`"
    )


# ---- files ------------------------------------------------------------------------------------------------------


def _file(path: Path) -> Inspection | None:
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        raise ModelError(f"{path}: give the folder that it lies in, or for training data use `lapilli data check`")
    found = _cerebras(path)
    if found is not None:
        return found
    tensors = open_file(path)
    parts = seen.count(tensors)
    rows = {name for name in tensors if name.endswith(_TABLES)}
    if {seen.part_of(name) for name in tensors if name not in rows} == {"projector"}:
        return _projector(path, tensors)
    kind = "adapters" if set(parts) == {"adapters"} else "weights"
    made = Inspection(str(path), kind, f"{kind} without a description", list(parts.values()))
    made.missing.append(Missing("config.json", "inspect the folder that the file belongs to"))
    return made


def _projector(path: Path, tensors: Tensors) -> Inspection:
    parts = seen.count(tensors)
    mine = {name: tensor for name, tensor in tensors.items() if seen.part_of(name) == "projector"}
    kind = parts["projector"].what = seen.projector_kind(name for name in mine if "newline" not in name)
    widths = [tensor.shape for name, tensor in sorted(mine.items()) if name.endswith("weight")]
    made = Inspection(str(path), "projector", f"a projector alone ({kind})", list(parts.values()))
    if widths and all(len(shape) == 2 for shape in widths):
        made.details["from and to"] = f"features of {widths[0][1]} numbers to embeddings of {widths[-1][0]}"
    tables = [name for name in tensors if name.endswith(_TABLES)]
    if tables:
        made.details["token rows"] = f"{tensors[tables[0]].shape[0]:,} (with <im_start> and <im_end>)"
    if "image_newline" not in " ".join(tensors) and path.name in _PROJECTOR_ALONE:
        made.notes.append("no image_newline, which anyres models need: the original doesn't save it")
    made.details["use"] = "lapilli build --projector-weights, or lapilli projector attach"
    return made


# ---- folders that are no models ---------------------------------------------------------------------------------


def _run(path: Path) -> Inspection | None:
    if not (path / "run.json").is_file() or (path / "config.json").is_file():
        return None
    facts = read_json(path / "run.json")
    made = Inspection(str(path), "run", "a training run")
    complete = [folder.name for folder in sorted((path / "checkpoints").glob("*")) if is_complete(folder)]
    log = path / "metrics.jsonl"
    steps = log.read_bytes().count(b"\n") if log.is_file() else 0
    made.details |= {"steps logged": f"{steps:,}", "complete checkpoints": ", ".join(complete[-3:]) or "none"}
    if isinstance(facts.get("model"), str):
        made.details["started from"] = facts["model"]
    if (path / "model").is_dir():
        made.what = "a finished training run"
        made.inner = inspect(path / "model")
    else:
        made.missing.append(Missing("model/", "the run has not finished: start `lapilli train` again, it goes on"))
    return made


_COUNTS = {
    "rows": ("post-process", "n_examples"),
    "tokens": ("post-process", "num_tokens"),
    "supervised tokens": ("post-process", "loss_valid_tokens"),
    "records left out": ("post-process", "raw_docs_skipped"),
    "row length": ("processing", "max_seq_length"),
    "tokens per picture": ("dataset", "num_patches"),
    "pictures per row": ("dataset", "max_num_img"),
}
"""Places in data_params.json, which are Cerebras' own and ours alike."""


def _prepared(path: Path) -> Inspection | None:
    from lapilli.data.read.prepared import is_prepared

    if not is_prepared(path):
        return None
    made = Inspection(str(path), "prepared-data", "prepared data (HDF5 shards)")
    file = path / "data_params.json"
    if not file.is_file():
        made.notes.append("no data_params.json here, so nothing is known of how it was prepared")
        return made
    about = read_json(file)
    made.details["prepared by"] = "lapilli" if "lapilli" in about else "Cerebras' preprocessing"
    for name, (section, key) in _COUNTS.items():
        value = (about.get(section) or {}).get(key)
        if isinstance(value, int):
            made.details[name] = f"{value:,}"
    return made


def _open_clip(path: Path) -> Inspection | None:
    if not open_clip.is_open_clip(path):
        return None
    made = Inspection(str(path), "open-clip", "a vision encoder in OpenCLIP's layout")
    made.parts = [models.encoder_at(path, made)]
    try:
        made.image = models.processor_words(open_clip.image_fields(path, "pad"))
    except ModelError as error:
        made.missing.append(Missing("image settings that can be followed", str(error)))
    made.details["use"] = "lapilli build --vision-encoder"
    return made


def _cerebras(path: Path) -> Inspection | None:
    from lapilli.checkpoint.cerebras.read import is_cerebras, open_cerebras

    if not is_cerebras(path):
        return None
    made = Inspection(str(path), "cerebras", "a model in Cerebras' layout")
    try:
        opened = open_cerebras(path)
    except LapilliError as error:
        made.missing.append(Missing("a model that can be read", str(error)))
        return made
    parts = seen.count({_canonical_part(name): tensor for name, tensor in opened.tensors.items()})
    made.parts, made.notes = list(parts.values()), list(opened.notes)
    models.say_llava(made, opened.llava_fields, opened.clip_fields)
    made.template = "not said in this layout; vicuna_v1 is LLaVA-1.5's (name another with --template)"
    return made


def _canonical_part(name: str) -> str:
    first, _, rest = name.partition(".")
    return {"vision": f"vision_tower.{rest}", "language": f"language_model.{rest}"}.get(first, name)
