"""LLaVA checkpoints as the original wrote them, restored from the trimmed copies under `tests/reference/checkpoints`.

A copy keeps the tensors of the original's tiny checkpoint bit for bit, but of the two large tables only the rows that
its prompts and answers use (`rows.*` says which); its vision weights are those of `vision-tower`, and tokenizer files
that are llama-base's are not kept twice. `expected.json` holds the original's last logits at the kept rows.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

REFERENCE = Path(__file__).parents[1] / "reference"
NAMES = (
    "tiny-llava-v1.5",
    "tiny-llava-v1.6-anyres",
    "tiny-llava-mlp3x-cls",
    "tiny-llava-gqa",
    "tiny-llava-v1-im-start-end",
)
VISION = "model.vision_tower.vision_tower."


def restore(name: str, root: Path) -> Path:
    """Write the checkpoint `name`, and `vision-tower` beside it, under `root`; return its folder."""
    kept, folder = REFERENCE / "checkpoints" / name, root / name
    if not (root / "vision-tower").exists():
        shutil.copytree(REFERENCE / "checkpoints" / "vision-tower", root / "vision-tower")
    shutil.copytree(
        REFERENCE / "checkpoints" / "llama-base", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    for file in kept.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    tensors = tensors_of(name)
    if name.endswith("im-start-end"):
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def restore_piece(name: str, root: Path) -> Path:
    """Copy `tiny-llava-lora` or `tiny-llava-pretrain`, and write the model that it was trained on beside it."""
    if not (root / "tiny-llava-v1.5").exists():
        restore("tiny-llava-v1.5", root)
    return Path(shutil.copytree(REFERENCE / "checkpoints" / name, root / name))


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint; rows that were not kept are zero."""
    kept = load_file(REFERENCE / "checkpoints" / name / "trimmed.safetensors")
    vocabulary = json.loads((REFERENCE / "checkpoints" / name / "config.json").read_text())["vocab_size"]
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = kept.pop(f"rows.{table}").long()
        kept[table] = torch.zeros(vocabulary, kept[table].shape[1]).index_copy(0, rows, kept[table])
    vision = torch.load(REFERENCE / "checkpoints" / "vision-tower" / "pytorch_model.bin", weights_only=True)
    return kept | {VISION + key: value for key, value in vision.items()}


def expected(name: str) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """What the original answers, prompt by prompt, and the vocabulary rows (K,) that its `last_logits` are of."""
    folder = REFERENCE / "checkpoints" / name
    rows = load_file(folder / "trimmed.safetensors")["rows.lm_head.weight"].long()
    return json.loads((folder / "expected.json").read_text()), rows


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; a key set to `...` is taken out."""
    file = folder / "config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))
