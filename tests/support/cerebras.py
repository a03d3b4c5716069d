"""What Cerebras' own tools wrote (`tests/reference/cerebras/convert`, see its README), and models to give to them."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lapilli.checkpoint.cerebras.shapes import shapes_of
from lapilli.checkpoint.stream import Tensors, held

REFERENCE = Path(__file__).parents[1] / "reference" / "cerebras" / "convert"


def load_json(name: str) -> Any:
    return json.loads(gzip.decompress((REFERENCE / f"{name}.json.gz").read_bytes()))


def restore(name: str, root: Path) -> Path:
    """Write a kept folder with its state file unpacked; return it."""
    folder = root / name
    shutil.copytree(REFERENCE / name, folder, ignore=shutil.ignore_patterns("*.gz"))
    for file in (REFERENCE / name).glob("*.mdl.gz"):
        (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return folder


def values(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in tensors.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def fields(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """LLaVA's and CLIP's config.json of the reference model; `vision_x` changes x of the encoder."""
    pair = load_json("configs")["mmsimple-2.9"]
    vision = {key.removeprefix("vision_"): value for key, value in changes.items() if key.startswith("vision_")}
    text = {key: value for key, value in changes.items() if not key.startswith("vision_")}
    return pair["text"] | text, pair["image"] | vision


def random_model(llava: dict[str, Any], clip: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: held(torch.randn(shape, generator=generator).to(dtype), name)
        for name, shape in shapes_of(llava, clip).items()
    }
